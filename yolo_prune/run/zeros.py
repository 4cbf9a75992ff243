# SPDX-License-Identifier: AGPL-3.0-or-later
"""Weights that a plan set to zero stay zero while the model trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from yolo_prune.cut.masks import Masked
from yolo_prune.cut.record import KEY, composed_plan
from yolo_prune.errors import RunError
from yolo_prune.run import live
from yolo_prune.run.state import PruningTrainer


class KeptZeros:
    """Sets the masked weights to zero after each step of the optimizer, with their momenta and in the average.

    The masks come from the record of the model, so they are also kept in a run that only trains a model further.
    """

    def __init__(self) -> None:
        self._record: Any = None
        self._live: Masked | None = None
        self._average: Masked | None = None

    @contextmanager
    def after_step(self, trainer: PruningTrainer) -> Iterator[None]:
        """Inside, zeros follow a step of the optimizer, before the average is updated; afterwards in the average."""
        self._read(trainer)
        if self._live is None or self._average is None:
            yield
            return
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
        for masked in (self._live, self._average):
            if masked is not None and not masked.holds():
                raise RunError(
                    "A weight that the plan of this model set to zero is not zero any more: another callback, or "
                    "another trainer, changed the weights. Train without it."
                )

    def _read(self, trainer: PruningTrainer) -> None:
        """Find the masked parameters again if the record is a new one, or a cut replaced parameters."""
        model = live.model_of(trainer)
        record = _record(model)
        if record is self._record and self._current(trainer):
            return
        self._record = record
        plan = composed_plan(model) if record else None
        masks = plan.masks if plan else {}
        self._live, self._average = (
            (Masked(model, masks), Masked(live.average_of(trainer), masks)) if masks else (None, None)
        )

    def _current(self, trainer: PruningTrainer) -> bool:
        if self._live is None:
            return True
        owned = {p for group in trainer.optimizer.param_groups for p in group["params"]}
        return self._live.gone.keys() <= owned

    def _hold(self, optimizer: Any, *_: Any) -> None:
        if self._live:
            self._live.hold(optimizer)


def _record(model: nn.Module) -> Any:
    """The record of a model as it is stored: a new object after each change."""
    return (getattr(model, "yaml", None) or {}).get(KEY)
