# SPDX-License-Identifier: AGPL-3.0-or-later
"""The first steps of an optimizer that starts anew in the middle of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Restart:
    """A warm-up of its own: before AdamW knows how gradients vary, it moves every weight by the whole learning rate.

    One such step is enough to undo a model that is trained or refitted, and the first ones of SGD, with gradients that
    nothing has averaged yet, are not much better. Ultralytics' own warm-up sees to the first epochs of the run.

    Attributes:
        made: steps since the optimizer was started anew.
        over: steps that the learning rate takes to rise to what it is otherwise; 0 where nothing was started anew.
    """

    def __init__(self) -> None:
        self.made = self.over = 0

    def begin(self, trainer: Any) -> None:
        """The optimizer was started anew: as many epochs as the run warms up for, and no more than half a stage."""
        epochs = min(trainer.args.warmup_epochs, trainer.pruning.stage(trainer.epochs) / 2)
        steps = len(trainer.train_loader) / max(trainer.args.nbs / trainer.batch_size, 1)
        self.made, self.over = 0, round(epochs * steps)

    @contextmanager
    def beside(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Inside, the learning rates are what they may be for this step; it is counted."""
        if self.made >= self.over:
            yield
            return
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= self.made / self.over
        try:
            yield
        finally:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            self.made += 1
