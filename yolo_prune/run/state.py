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
    """A trainer of Ultralytics with `KeepStructure`: what this package reads and writes of it.

    Attributes:
        pruning: the state of the run; None if it does not prune, or is not set up yet.
        cadence: when the optimizer steps.
        warm_up: how long these steps are after the optimizer has started anew.
        stopped_early: the run that is resumed had stopped, for want of progress, when it was killed.
    """

    pruning: RunState | None
    cadence: Any
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
        """Make a checkpoint of this run a finished one."""

    def tidy(self) -> None:
        """Delete what only a resumed run needs."""

    def _close_dataloader_mosaic(self) -> None: ...


@dataclass
class RunState:
    """The state of one pruned run; lives on the trainer as `trainer.pruning`.

    Attributes:
        recipe: what was asked for.
        rounds: when to cut, and how far.
        report: what was measured so far.
        patience: the early stopping patience to restore after the last round.
        cost: FLOPs and parameters of the model as it is.
        frozen: modules that this run does not train (`freeze=`).
        timing: what takes how long, where the target is a latency.
        done: rounds that are finished.
        exact: a resumed run goes on bit for bit (`deterministic=`).
        epoch_open: an epoch was trained and is not yet in the report.
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
        """The next round, if its epoch has come; a round that is done never comes again."""
        left = self.rounds[self.done :]
        return left[0] if left and epoch >= left[0].epoch else None

    def stage(self, epochs: int) -> int:
        """Epochs from the last round that is done to the next one, or to the end of the run.

        Args:
            epochs: of the run.
        """
        begin = self.rounds[self.done - 1].epoch if self.done else 0
        return self.ahead(begin, epochs)

    def ahead(self, epoch: int, epochs: int) -> int:
        """Epochs from the start of `epoch` to the next round, or to the end of the run of `epochs`."""
        return (self.rounds[self.done].epoch if self.done < len(self.rounds) else epochs) - epoch

    @property
    def turns(self) -> int:
        """How often the structure of the model has changed in this run."""
        return guard.turns([row.held for row in self.report.rounds])

    @property
    def over(self) -> bool:
        """Whether all rounds are done."""
        return self.done == len(self.rounds)

    def imgsz(self, trainer: PruningTrainer) -> int:
        """The image size that the report's FLOPs are for; a run that is resumed at another one keeps it."""
        return self.report.imgsz if isinstance(self.report.imgsz, int) else trainer.args.imgsz

    def advance(self, trainer: PruningTrainer) -> None:
        """Finish a round; after the last one, early stopping works again."""
        self.done += 1
        if self.over:
            trainer.stopper.patience = self.patience


def run_of(trainer: PruningTrainer) -> RunState:
    """The state of the run that a trainer is in.

    Raises:
        RunError: If the run is not set up: another callback removed it, or called ours too early.
    """
    if trainer.pruning is None:
        raise RunError("This trainer has no pruning run: it is not set up yet, or another callback removed it.")
    return trainer.pruning
