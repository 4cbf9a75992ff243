# SPDX-License-Identifier: AGPL-3.0-or-later
"""Optimal Brain Surgeon for channels: what does it cost to remove one, once its readers are adapted to its absence?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 48
"""In about so many steps a set is emptied; wider ones lose several channels at once.

A choice. The removals of one step do not see each other's effect on the choice, so fewer steps are coarser; each step
updates matrices as large as the layers, so more steps take longer. The README has the seconds of the whole.
"""


@dataclass
class Reader:
    """A layer that reads the channels of a set, while they go.

    Attributes:
        inverse: `(inputs, inputs)`: inverse of the second moment of what it reads, of the inputs still there.
        weight: `(outputs, inputs)`: its weights, multiplied by a square root of the curvature of its outputs.
        columns: `(channels of the set, columns per channel)`: where the set's channels lie in `inputs`.
    """

    inverse: Tensor
    weight: Tensor
    columns: Tensor

    def losses(self, alive: Tensor) -> Tensor:
        """`(alive,)`: loss of removing each channel alone, the other weights adapted."""
        columns = self.columns[alive]
        block = self.inverse[columns[:, :, None], columns[:, None, :]]
        weight = self.weight[:, columns].permute(1, 2, 0)
        half = torch.linalg.solve_triangular(torch.linalg.cholesky(block), weight, upper=False)
        loss: Tensor = half.square().sum((1, 2)) / 2
        return loss

    def remove(self, channels: Tensor) -> float:
        """Take channels out and adapt the other weights; returns the loss of doing so."""
        gone = self.columns[channels].flatten()
        factor = torch.linalg.cholesky(self.inverse[gone][:, gone])
        rows = torch.linalg.solve_triangular(factor, self.inverse[gone], upper=False)
        weight = torch.linalg.solve_triangular(factor, self.weight[:, gone].T, upper=False)
        self.weight -= weight.T @ rows
        self.inverse -= rows.T @ rows
        self.inverse[gone] = self.inverse[:, gone] = self.weight[:, gone] = 0
        self.inverse[gone, gone] = 1
        return float(weight.square().sum()) / 2


def order(readers: Sequence[Reader], size: int) -> Tensor:
    """Remove channel after channel, each time those that cost least.

    For one layer whose output `w x` has the curvature `G`, removing the inputs `S` and adapting the other weights costs
    `tr(G w_S (H^-1_SS)^-1 w_S^T) / 2` with `H = E[x x^T]`, and changes `w` by `- w_S (H^-1_SS)^-1 H^-1_S:`: Optimal
    Brain Surgeon (Hassibi & Stork, NIPS 1993) with a Kronecker-factored Hessian (Martens & Grosse, ICML 2015,
    arXiv:1503.05671; for convolutions Grosse & Martens, ICML 2016, arXiv:1602.01407), for structures as in EigenDamage
    (Wang et al., ICML 2019, arXiv:1905.05934) and ZipLM (Kurtic et al., NeurIPS 2023, arXiv:2302.04089).

    Args:
        readers: every layer that reads the set. They are used up.
        size: channels in the set.

    Returns:
        `(size,)`, float64, on the CPU: how much the loss rises with each removal, never less than with the one before;
        the last one cannot be removed and has the most.
    """
    scores = torch.zeros(size, dtype=torch.float64)
    alive = torch.arange(size)
    step, least = max(1, size // STEPS), 0.0
    while len(alive) > 1:
        losses = sum(reader.losses(alive.to(reader.weight.device)).cpu() for reader in readers)
        chosen = alive[torch.argsort(torch.as_tensor(losses), stable=True)[: min(step, len(alive) - 1)]]
        together = sum(reader.remove(chosen.to(reader.weight.device)) for reader in readers)
        least = max(least, together / len(chosen))
        scores[chosen] = least
        alive = alive[~torch.isin(alive, chosen)]
    scores[alive] = 2 * least
    return scores
