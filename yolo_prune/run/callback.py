# SPDX-License-Identifier: AGPL-3.0-or-later
"""When things happen during an Ultralytics run."""

from __future__ import annotations

import sys
from typing import Any

from yolo_prune.env import ranks
from yolo_prune.recipe import Recipe
from yolo_prune.run import journal, live, resume, rounds, verdict
from yolo_prune.run.finish import finish
from yolo_prune.run.start import start
from yolo_prune.run.state import PruningTrainer, run_of


class PruneCallback:
    """`callbacks=prune`: cuts the model in rounds while it trains.

    Holds only what the user asked for, so that it can be pickled and shared; the state of a run is on its trainer.
    """

    EVENTS = (
        "on_pretrain_routine_end",
        "on_train_epoch_start",
        "on_train_batch_end",
        "on_train_epoch_end",
        "on_fit_epoch_end",
        "on_train_end",
        "teardown",
    )

    def __init__(self, recipe: Recipe, source: str = "") -> None:
        """Remember what to do.

        Args:
            recipe: the resolved recipe.
            source: the model the user named, for the report.
        """
        self.recipe = recipe
        self.source = source

    def attach(self, callbacks: dict[str, list[Any]]) -> None:
        """Add this callback to Ultralytics' `{event: [functions]}`."""
        for event in self.EVENTS:
            callbacks[event].append(getattr(self, event))

    def detach(self, callbacks: dict[str, list[Any]]) -> None:
        """Take this callback out again: the next run is another one."""
        for event in self.EVENTS:
            callbacks[event].remove(getattr(self, event))

    def on_pretrain_routine_end(self, trainer: PruningTrainer) -> None:
        """Everything is set up, nothing is trained yet: fix the rounds, or refuse."""
        trainer.pruning = start(trainer, self.recipe, self.source)

    def on_train_epoch_start(self, trainer: PruningTrainer) -> None:
        """No batch is in flight: cut, if a round is due."""
        run = run_of(trainer)
        journal.untrack(trainer)
        trainer.cadence.epoch_starts(trainer)
        if run.exact:
            resume.seed_epoch(trainer)
        if (early := run.recipe.recover.rewind) and not run.done:
            live.keep_early(trainer, early.epoch)
        if run.recipe.limit is not None and not trainer.epoch and not run.due(0):
            verdict.take_reference(trainer)
        while due := run.due(trainer.epoch):
            if rounds.perform(trainer, run, due):
                break
        if due and run.exact:
            resume.seed_epoch(trainer)
        trainer.warm_up.epoch_starts(trainer)
        if run.done and run.recipe.recover.refit and run.recipe.recover.average:  # there is something to remember
            share = run.recipe.recover.average
            live.average_over(trainer, share * run.stage(trainer.epochs))  # each time: NaN recovery makes a new one

    def on_train_batch_end(self, trainer: PruningTrainer) -> None:
        """One more batch since the optimizer's last step, or none."""
        trainer.cadence.batch_ends()

    def on_train_epoch_end(self, trainer: PruningTrainer) -> None:
        """An epoch was trained; `on_fit_epoch_end` follows once it is validated."""
        run_of(trainer).epoch_open = True

    def on_fit_epoch_end(self, trainer: PruningTrainer) -> None:
        """An epoch was validated: take it down. After the final validation this fires once more; that is no epoch."""
        run = run_of(trainer)
        if ranks.first():
            if run.epoch_open:
                journal.log_epoch(trainer, run, trainer.epoch + 1)
            journal.track(trainer, run)
        run.epoch_open = False

    def on_train_end(self, trainer: PruningTrainer) -> None:
        """The run is over: check what it delivers and write the report."""
        finish(trainer, run_of(trainer))
        trainer.tidy()  # integrations upload the folder after this

    def teardown(self, trainer: PruningTrainer) -> None:
        """The run is over, well or badly."""
        journal.fail(trainer, sys.exc_info()[1])
