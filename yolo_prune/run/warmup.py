# SPDX-License-Identifier: AGPL-3.0-or-later
"""The warm-up after a reset of the optimizer in the middle of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from yolo_prune.run import live
from yolo_prune.run.state import PruningTrainer, run_of


class RestartWarmUp:
    """A second warm-up, after a reset of the optimizer.

    The first steps of AdamW move every weight by the whole learning rate, because AdamW has no statistics of the
    gradients yet. A few such steps destroy a trained or refitted model. At the start of a run, Ultralytics' own warm-up
    prevents this. This warm-up is for a later reset: after a rollback, a rewind or a NaN.

    Attributes:
        steps: number of steps since the reset.
        total: number of steps of the warm-up, in which the learning rate rises; 0 if the optimizer was not reset.
    """

    def __init__(self) -> None:
        self.steps = self.total = 0

    def epoch_starts(self, trainer: PruningTrainer) -> None:
        """Start the warm-up if the optimizer was reset.

        It takes `warmup_epochs`, but at most half of the epochs until the next cut or the end of the run.

        Args:
            trainer: at the start of an epoch, after the cuts that are due.
        """
        if trainer.epoch == 0 or not is_new(trainer.optimizer):
            return
        epochs = min(trainer.args.warmup_epochs, run_of(trainer).ahead(trainer.epoch, trainer.epochs) / 2)
        self.steps, self.total = 0, max(round(epochs * live.steps_per_epoch(trainer)), 2) if epochs else 0

    @contextmanager
    def short_steps(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Inside, the learning rates are reduced for one step of the warm-up. The step is counted."""
        if self.steps >= self.total:
            yield
            return
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * (self.steps / self.total)
        try:
            yield
        finally:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            self.steps += 1


def is_new(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer has no momentum yet. SGD without momentum is never new, because it has no state."""
    return not optimizer.state and any(group.get("momentum", 1.0) for group in optimizer.param_groups)
