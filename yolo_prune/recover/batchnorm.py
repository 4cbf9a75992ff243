# SPDX-License-Identifier: AGPL-3.0-or-later
"""Estimates batch norm statistics again after a cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from yolo_prune.recover.scope import inside, modes_kept


@torch.no_grad()
def recalibrate(model: nn.Module, images: Iterable[Tensor], frozen: Sequence[str] = ()) -> int:
    """Estimate the running statistics of every batch norm again, as plain averages over `images`.

    A cut changes the inputs of the remaining layers, so the old statistics are wrong.

    Args:
        model: the model. Its mode and the momentum of its batch norms are restored at the end.
        images: batches `(n, channels, height, width)` on the model's device, as in training.
        frozen: names of modules whose statistics are not changed, including all modules inside them.

    Returns:
        Number of batches used. With 0 batches, the statistics are not changed.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats}
    norms = [m for n, m in layers.items() if not inside(n, frozen)]
    momenta = [m.momentum for m in norms]
    count = 0
    with modes_kept(model):
        try:
            model.train()
            for name in frozen:
                model.get_submodule(name).eval()
            for batch in images:
                if not count:
                    for m in norms:
                        m.reset_running_stats()
                        m.momentum = None  # cumulative average
                model(batch)
                count += 1
        finally:
            for m, momentum in zip(norms, momenta, strict=True):
                m.momentum = momentum
    return count
