# SPDX-License-Identifier: AGPL-3.0-or-later
"""Optimal Brain Surgeon for channels: the loss of removing a channel after the layers that read it have adapted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 48
"""Approximate number of steps that remove all channels of a set. A wide set loses several channels per step.

This value is a choice. All channels of one step are chosen before any of them is removed, so fewer steps are less
exact. Each step updates matrices as large as the layers, so more steps take longer. docs/ has the total time.
"""


@dataclass
class Reader:
    """A layer that reads the channels of a set, during their removal.

    Attributes:
        inverse: `(inputs, inputs)`: inverse of the second moment of the inputs that are not removed yet.
        weight: `(outputs, inputs)`: the layer's weights, multiplied by a square root of the curvature of its outputs.
        columns: `(channels of the set, columns per channel)`: the columns of the set's channels in `inputs`.
    """

    inverse: Tensor
    weight: Tensor
    columns: Tensor

    def losses(self, alive: Tensor) -> Tensor:
        """`(alive,)`: for each channel, the loss of removing only this channel and adapting the other weights."""
        columns = self.columns[alive]
        block = self.inverse[columns[:, :, None], columns[:, None, :]]
        weight = self.weight[:, columns].permute(1, 2, 0)
        half = torch.linalg.solve_triangular(torch.linalg.cholesky(block), weight, upper=False)
        loss: Tensor = half.square().sum((1, 2)) / 2
        return loss

    def remove(self, channels: Tensor) -> float:
        """Remove channels and adapt the other weights; returns the loss of this removal."""
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
    """Score channels by removing them step by step; each step removes the channels with the lowest loss.

    Take one layer with the output `w x` and the curvature `G` of this output. Removing the inputs `S` and adapting the
    other weights costs `tr(G w_S (H^-1_SS)^-1 w_S^T) / 2` with `H = E[x x^T]`, and changes `w` by
    `- w_S (H^-1_SS)^-1 H^-1_S:`. This is Optimal Brain Surgeon (Hassibi & Stork, NIPS 1993) with a Kronecker-factored
    Hessian (Martens & Grosse, ICML 2015, arXiv:1503.05671; for convolutions Grosse & Martens, ICML 2016,
    arXiv:1602.01407), applied to structures as in EigenDamage (Wang et al., ICML 2019, arXiv:1905.05934) and ZipLM
    (Kurtic et al., NeurIPS 2023, arXiv:2302.04089).

    Args:
        readers: all layers that read the set; their matrices are overwritten.
        size: number of channels in the set.

    Returns:
        `(size,)`, float64, on the CPU: the rise of the loss with each removal, never less than the rise before. The
        last channel cannot be removed and has the highest score.
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
