# SPDX-License-Identifier: AGPL-3.0-or-later
"""The first steps of an optimizer that starts anew in the middle of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from yolo_prune.run import live


class RestartWarmUp:
    """A warm-up of its own: before AdamW knows how gradients vary, it moves every weight by the whole learning rate.

    A few such steps undo a model that is trained or refitted. As a run begins, Ultralytics' own warm-up sees to them;
    this one is for an optimizer that starts anew later: where weights are taken back, or after a NaN.

    Attributes:
        steps: taken since then.
        total: steps in which the learning rate rises to what it is otherwise; 0 where nothing was started anew.
    """

    def __init__(self) -> None:
        self.steps = self.total = 0

    def epoch_starts(self, trainer: Any) -> None:
        """If the optimizer is new: warm up for as many epochs as the run, and for no more than half of those to come.

        Args:
            trainer: at the start of an epoch, when the cuts that are due are made.
        """
        if trainer.epoch == 0 or not is_new(trainer.optimizer):
            return
        epochs = min(trainer.args.warmup_epochs, trainer.pruning.ahead(trainer.epoch, trainer.epochs) / 2)
        self.steps, self.total = 0, max(round(epochs * live.steps_per_epoch(trainer)), 2) if epochs else 0

    @contextmanager
    def short_steps(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Inside, the learning rates are what they may be for this step, which is counted."""
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
    """Whether it has yet to gather momenta; SGD without momentum never does."""
    return not optimizer.state and any(group.get("momentum", 1.0) for group in optimizer.param_groups)
