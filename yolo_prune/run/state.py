# SPDX-License-Identifier: AGPL-3.0-or-later
"""The state of a pruning run, and the trainer that owns it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from yolo_prune.errors import RunError
from yolo_prune.planning.cost import Timing
from yolo_prune.recipe import Recipe
from yolo_prune.report import Report
from yolo_prune.run import guard
from yolo_prune.run.schedule import Round


class PruningTrainer(Protocol):
    """An Ultralytics trainer with `KeepStructure`: the attributes that this package reads and writes.

    Attributes:
        pruning: the state of the run; None if the run does not prune or is not set up yet.
        accumulation: the batches since the last step of the optimizer.
        warm_up: the warm-up after a reset of the optimizer.
        stopped_early: whether the resumed run had already stopped early when it was killed.
    """

    pruning: RunState | None
    accumulation: Any
    warm_up: Any
    stopped_early: bool

    # Ultralytics' own
    accumulate: int
    args: Any
    batch_size: int
    best: Path
    best_fitness: float | None
    csv: Path
    data: Any
    device: Any
    ema: Any
    epoch: int
    epochs: int
    fitness: float | None
    last: Path
    loss: Any
    loss_items: Any
    metrics: Any
    model: Any
    optimizer: Any
    resume: Any
    save_dir: Path
    save_period: int
    scaler: Any
    start_epoch: int
    stop: bool
    stopper: Any
    test_loader: Any
    train_loader: Any
    validator: Any
    wdir: Path

    def preprocess_batch(self, batch: Any) -> Any:
        """Move a batch to the device and make its images floating point."""

    def save_model(self) -> Any:
        """Write last.pt, and best.pt if this epoch is the best."""

    def strip(self, path: Any, s: str = "", updates: Any = None) -> Any:
        """Remove the optimizer from a checkpoint of this run."""

    def tidy(self) -> None:
        """Delete the files that only a resumed run needs."""

    def _close_dataloader_mosaic(self) -> None: ...


@dataclass
class RunState:
    """The state of one pruning run, stored as `trainer.pruning`.

    Attributes:
        recipe: the recipe of the run.
        rounds: when to cut, and how much to keep.
        report: the report of the run so far.
        patience: the early stopping patience to restore after the last round.
        cost: FLOPs and parameters of the present model.
        frozen: modules that this run does not train (`freeze=`).
        timing: how latency depends on widths, if the target is a latency.
        done: number of finished rounds.
        exact: whether the run can be resumed bit for bit (`deterministic=`).
        epoch_open: whether an epoch was trained and is not yet in the report.
    """

    recipe: Recipe
    rounds: tuple[Round, ...]
    report: Report
    patience: float
    cost: tuple[float, int]
    frozen: tuple[str, ...] = ()
    timing: Timing | None = None
    done: int = 0
    exact: bool = True
    epoch_open: bool = False

    def due(self, epoch: int) -> Round | None:
        """The next round, if its epoch has come. A finished round is never returned again."""
        left = self.rounds[self.done :]
        return left[0] if left and epoch >= left[0].epoch else None

    def stage(self, epochs: int) -> int:
        """Number of epochs from the last finished round to the next round, or to the end of the run.

        Args:
            epochs: number of epochs of the run.
        """
        begin = self.rounds[self.done - 1].epoch if self.done else 0
        return self.ahead(begin, epochs)

    def ahead(self, epoch: int, epochs: int) -> int:
        """Number of epochs from the start of `epoch` to the next round, or to the end of the run after `epochs`."""
        return (epochs if self.over else self.rounds[self.done].epoch) - epoch

    @property
    def structure_changes(self) -> int:
        """How often the structure of the model has changed in this run."""
        return guard.structure_changes([row.held for row in self.report.rounds])

    @property
    def over(self) -> bool:
        """Whether all rounds are done."""
        return self.done == len(self.rounds)

    def imgsz(self, trainer: PruningTrainer) -> int:
        """The image size for the FLOPs in the report. It stays the same if the run is resumed with another size."""
        return self.report.imgsz if isinstance(self.report.imgsz, int) else trainer.args.imgsz

    def advance(self, trainer: PruningTrainer) -> None:
        """Mark a round as finished. After the last round, early stopping works again."""
        self.done += 1
        if self.over:
            trainer.stopper.patience = self.patience


def run_of(trainer: PruningTrainer) -> RunState:
    """The state of the run that a trainer is in.

    Raises:
        RunError: If the run is not set up.
    """
    if trainer.pruning is None:
        raise RunError(
            "This trainer has no pruning run: the run is not set up yet, or another callback removed it. Remove that "
            "callback."
        )
    return trainer.pruning
