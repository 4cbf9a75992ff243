# SPDX-License-Identifier: AGPL-3.0-or-later
"""The callback: what this package does at each event of an Ultralytics run."""

from __future__ import annotations

import sys
from typing import Any

from yolo_prune.env import ranks
from yolo_prune.recipe import Recipe
from yolo_prune.run import journal, live, resume, rounds, verdict
from yolo_prune.run.finish import fail, finish
from yolo_prune.run.start import start
from yolo_prune.run.state import PruningTrainer, run_of


class PruneCallback:
    """`callbacks=prune`: cuts the model in rounds while it trains.

    It holds only the recipe, so that it can be pickled and shared. The state of a run is on its trainer.
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

    def __init__(self, recipe: Recipe) -> None:
        """Make a callback for a recipe.

        Args:
            recipe: the resolved recipe.
        """
        self.recipe = recipe

    def attach(self, callbacks: dict[str, list[Any]]) -> None:
        """Add this callback to Ultralytics' `{event: [functions]}`."""
        for event in self.EVENTS:
            callbacks[event].append(getattr(self, event))

    def detach(self, callbacks: dict[str, list[Any]]) -> None:
        """Remove this callback, because it belongs to one run only."""
        for event in self.EVENTS:
            callbacks[event].remove(getattr(self, event))

    def on_pretrain_routine_end(self, trainer: PruningTrainer) -> None:
        """The run is set up but not yet trained: fix its rounds, or refuse the run."""
        trainer.pruning = start(trainer, self.recipe)

    def on_train_epoch_start(self, trainer: PruningTrainer) -> None:
        """No batch is being processed at this point: cut the model if a round is due."""
        run = run_of(trainer)
        journal.untrack(trainer)
        trainer.accumulation.epoch_starts(trainer)
        if run.exact:
            resume.seed_epoch(trainer)
        if (early := run.recipe.recover.rewind) and not run.done:
            live.save_early_weights(trainer, early.epoch)
        if run.recipe.limit is not None and not trainer.epoch and not run.due(0):
            verdict.measure_reference(trainer)
        while due := run.due(trainer.epoch):
            if rounds.perform(trainer, run, due):
                break
        if due and run.exact:
            resume.seed_epoch(trainer)
        trainer.warm_up.epoch_starts(trainer)
        if run.done and run.recipe.recover.refit and run.recipe.recover.average:  # refitted weights are worth averaging
            share = run.recipe.recover.average
            live.average_over(trainer, share * run.stage(trainer.epochs))  # in each epoch: NaN recovery resets the EMA

    def on_train_batch_end(self, trainer: PruningTrainer) -> None:
        """Count the batches since the last step of the optimizer."""
        trainer.accumulation.batch_ends()

    def on_train_epoch_end(self, trainer: PruningTrainer) -> None:
        """An epoch was trained. `on_fit_epoch_end` follows after its validation."""
        run_of(trainer).epoch_open = True

    def on_fit_epoch_end(self, trainer: PruningTrainer) -> None:
        """An epoch was validated: log it. Ultralytics also calls this after the final validation, which is no epoch."""
        run = run_of(trainer)
        if ranks.first():
            if run.epoch_open:
                journal.log_epoch(trainer, run, trainer.epoch + 1)
            journal.track(trainer, run)
        run.epoch_open = False

    def on_train_end(self, trainer: PruningTrainer) -> None:
        """The run is over: check the delivered checkpoint and write the report."""
        finish(trainer, run_of(trainer))
        trainer.tidy()  # integrations upload the folder after this

    def teardown(self, trainer: PruningTrainer) -> None:
        """The run is over, with or without an error."""
        fail(trainer, sys.exc_info()[1])
