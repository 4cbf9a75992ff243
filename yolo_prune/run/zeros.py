# SPDX-License-Identifier: AGPL-3.0-or-later
"""Weights that a plan set to zero stay zero while the model trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from yolo_prune.cut.masks import Masked, Masks
from yolo_prune.cut.record import KEY, stored_record
from yolo_prune.errors import RunError
from yolo_prune.run import live
from yolo_prune.run.state import PruningTrainer


class KeptZeros:
    """Sets the masked weights to zero after each step of the optimizer, with their momenta and in the average.

    Before the step, their gradients are set to zero. The masks come from the record of the model, so they are also kept
    in a run that only trains a model further.
    """

    def __init__(self) -> None:
        self._record: Any = None
        self._masks: Masks = {}
        self._live = self._average = Masked(nn.Module(), {})

    @contextmanager
    def after_step(self, trainer: PruningTrainer) -> Iterator[None]:
        """Inside, zeros follow a step of the optimizer, before the average is updated; afterwards in the average."""
        self._read(trainer)
        if not self._masks:
            yield
            return
        self._live.hold_gradients()
        hook = trainer.optimizer.register_step_post_hook(self._hold)
        try:
            yield
        finally:
            hook.remove()
        self._average.hold()

    def check(self, trainer: PruningTrainer) -> None:
        """Check that all masked weights are zero, before a checkpoint is written.

        Raises:
            RunError: If a weight is not.
        """
        self._read(trainer)
        if not (self._live.holds() and self._average.holds()):
            raise RunError(
                "A weight that the plan of this model set to zero is not zero any more: another callback, or another "
                "trainer, changed the weights. Train without it."
            )

    def _read(self, trainer: PruningTrainer) -> None:
        """Find the masked parameters again if the record is a new one, or another object has them."""
        model, average = live.model_of(trainer), live.average_of(trainer)
        stored = (getattr(model, "yaml", None) or {}).get(KEY)  # a new object after each change
        if stored is not self._record:
            record = stored_record(model)
            self._record, self._masks = stored, record.plan.masks if record and record.plan else {}
        elif self._live.current(model) and self._average.current(average):
            return
        self._live, self._average = Masked(model, self._masks), Masked(average, self._masks)

    def _hold(self, optimizer: Any, *_: Any) -> None:
        self._live.hold(optimizer)
