# SPDX-License-Identifier: AGPL-3.0-or-later
"""When things happen during an Ultralytics run: the rounds and their bookkeeping."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import LOGGER, colorstr

from yolo_prune.cut import surgery
from yolo_prune.cut.record import Record, read_record, student_of
from yolo_prune.env import ranks
from yolo_prune.env.files import write_text
from yolo_prune.env.log import PREFIX
from yolo_prune.env.releases import load_checkpoint
from yolo_prune.errors import RunError
from yolo_prune.latency import search
from yolo_prune.latency.target import find
from yolo_prune.pages import run_page
from yolo_prune.planning import planner
from yolo_prune.recipe import Recipe
from yolo_prune.recover.rewind import FILE as EARLY
from yolo_prune.report import Report, rounds_table, summary_table
from yolo_prune.report.data import FILE_NAME
from yolo_prune.report.front import FRONT
from yolo_prune.report.page import PAGE
from yolo_prune.report.picture import draw
from yolo_prune.run import guard, journal, live, resume, rounds, schedule
from yolo_prune.run.journal import Run

METRICS = {"flops": "FLOPs", "params": "parameters", "latency": "latency"}


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

    def on_pretrain_routine_end(self, trainer: BaseTrainer) -> None:
        """Everything is set up, nothing is trained yet: fix the rounds, or refuse."""
        trainer.pruning = start(trainer, self.recipe, self.source)

    def on_train_epoch_start(self, trainer: BaseTrainer) -> None:
        """No batch is in flight: cut, if a round is due."""
        run: Run = trainer.pruning
        journal.untrack(trainer)
        trainer.cadence.epoch_starts(trainer)
        if run.exact:
            resume.seed_epoch(trainer)
        if (early := run.recipe.recover.rewind) and not run.done:
            live.keep_early(trainer, early.epoch)
        if run.recipe.limit is not None and not trainer.epoch and not run.due(0):
            rounds.take_reference(trainer)
        while due := run.due(trainer.epoch):
            if rounds.perform(trainer, run, due):
                break
        if due and run.exact:
            resume.seed_epoch(trainer)
        trainer.restart.epoch_starts(trainer)
        if run.done and run.recipe.recover.refit and run.recipe.recover.average:  # there is something to remember
            share = run.recipe.recover.average
            live.average_over(trainer, share * run.stage(trainer.epochs))  # each time: NaN recovery makes a new one

    def on_train_batch_end(self, trainer: BaseTrainer) -> None:
        """One more batch since the optimizer's last step, or none."""
        trainer.cadence.batch_ends()

    def on_train_epoch_end(self, trainer: BaseTrainer) -> None:
        """An epoch was trained; `on_fit_epoch_end` follows once it is validated."""
        trainer.pruning.epoch_open = True

    def on_fit_epoch_end(self, trainer: BaseTrainer) -> None:
        """An epoch was validated: take it down. After the final validation this fires once more; that is no epoch."""
        run: Run = trainer.pruning
        if ranks.first():
            if run.epoch_open:
                journal.log_epoch(trainer, run, trainer.epoch + 1)
            journal.track(trainer, run)
        run.epoch_open = False

    def on_train_end(self, trainer: BaseTrainer) -> None:
        """The run is over: check what it delivers and write the report."""
        finish(trainer, trainer.pruning)
        trainer.tidy()  # integrations upload the folder after this

    def teardown(self, trainer: BaseTrainer) -> None:
        """The run is over, well or badly."""
        journal.fail(trainer, sys.exc_info()[1])


def start(trainer: BaseTrainer, recipe: Recipe, source: str) -> Run:
    """Fix the rounds of a run and open its report; on resume, go on where the checkpoint is.

    Raises:
        PruneError: If the recipe does not fit this model or this run.
    """
    record = read_record(live.model_of(trainer))
    run = _go_on(trainer, recipe, source, record) if trainer.resume and record else _begin(trainer, recipe, source)
    if run.done < len(run.rounds):
        live.hold_early_stopping(trainer)
    if ranks.first():
        write_text(trainer.save_dir / "prune.yaml", recipe.to_yaml())
    journal.save(trainer, run.report)
    epochs = ", ".join(str(r.epoch + 1) for r in run.rounds)
    LOGGER.info(
        f"{PREFIX}{_count(run)}, before epoch {epochs}, {_aim(recipe)}"
        + (f"; {run.done} done already" if run.done else "")
    )
    return run


def _count(run: Run) -> str:
    cuts = sum(not r.settles for r in run.rounds)
    return f"{cuts} round{'s' * (cuts > 1)}{' and a last phase without a cut' * (cuts < len(run.rounds))}"


def _aim(recipe: Recipe) -> str:
    if recipe.target.keep is None:
        return f"to find the smallest model within a drop of {recipe.limit:g}"
    return f"down to {recipe.target.keep:g} of the dense model's {METRICS[recipe.target.metric]}"


def _begin(trainer: BaseTrainer, recipe: Recipe, source: str) -> Run:
    teacher = getattr(trainer.args, "distill_model", None)
    if teacher and Path(teacher).resolve().parent == Path(trainer.wdir).resolve():
        raise RunError(f"The teacher {teacher} lies where this run writes its checkpoints. Give the run a new name=.")
    model, frozen = live.model_of(trainer), live.frozen_modules(trainer)
    record = read_record(model)
    graph = planner.survey(model, recipe, trainer.args.imgsz, frozen)
    plan, present, timing = ranks.agree(lambda: search.trial(model, graph, recipe, trainer.args.imgsz))
    past = record.plan if record else None
    widths = record.widths if record and past else planner.widths(model, graph)
    live.keep_record(trainer, Record(recipe.to_dict(), past, widths, (), present, active=True))
    if ranks.first():
        weights = (p for pattern in ("round*.pt", "state-*.pt", EARLY) for p in trainer.wdir.glob(pattern))
        for old in (*weights, trainer.csv, trainer.save_dir / FRONT):
            old.unlink(missing_ok=True)  # of an earlier run in the same folder
    due = schedule.rounds(recipe, trainer.epochs, present)
    report = journal.open_new(trainer, recipe, source, plan)
    cost = plan.predicted.flops_before, plan.predicted.params_before
    exact = bool(trainer.args.deterministic)
    return Run(recipe, due, report, trainer.stopper.patience, cost, frozen, timing=timing, exact=exact)


def _go_on(trainer: BaseTrainer, recipe: Recipe, source: str, record: Record) -> Run:
    exact = bool(trainer.args.deterministic)
    if exact:
        resume.restore(trainer, guard.turns([r.get("held") for r in record.rounds]), trainer.cadence)
    if ranks.first():
        resume.trim_results(trainer.csv, trainer.start_epoch)
    due = schedule.rounds(recipe, trainer.epochs, record.start)
    cut = int(record.rounds[-1]["number"]) if record.rounds else 0
    done = max(cut, sum(r.epoch < trainer.start_epoch for r in due))  # no record is kept of rounds without a cut
    report = journal.reopen(trainer, recipe, source, record)
    cost = planner.present_cost(live.model_of(trainer), journal.imgsz(trainer, report))
    frozen = live.frozen_modules(trainer)
    timing = ranks.agree(lambda: find(live.model_of(trainer), recipe.target, journal.imgsz(trainer, report)))
    run = Run(recipe, due, report, trainer.stopper.patience, cost, frozen, timing, done, exact)
    cut_since = bool(record.rounds) and record.rounds[-1]["epoch"] == trainer.start_epoch
    if len(report.epochs_log) == trainer.start_epoch - 1 and not cut_since:  # killed between last.pt and the report
        journal.log_epoch(trainer, run, trainer.start_epoch)
    return run


def finish(trainer: BaseTrainer, run: Run) -> None:
    """Check that the delivered checkpoint is the pruned one, and complete the report.

    Raises:
        RunError: If rounds are missing, or the checkpoint does not have the final structure.
    """
    delivered = trainer.best if trainer.best.exists() else trainer.last
    if run.done < len(run.rounds):
        left = run.rounds[run.done]
        raise RunError(
            f"The run ended after epoch {trainer.epoch + 1}, before round {left.number} (epoch {left.epoch + 1}): "
            f"{delivered} has not reached the target. Train longer, or give the schedule fewer rounds."
        )
    model = student_of(load_checkpoint(delivered)[0])
    wanted, found = read_record(live.model_of(trainer)), read_record(model)
    if not (wanted and wanted.plan and found and found.plan) or found.plan.hash != wanted.plan.hash:
        raise RunError(
            f"{delivered} does not have the structure of the last round. Do not use it; please report this with "
            f"{trainer.save_dir / FILE_NAME}."
        )
    surgery.check_applied(model, found.plan)
    journal.complete(trainer, run.report, model, found.plan)
    journal.log_if_untrained(run.report, trainer.batch_size, live.batches_per_step(trainer))
    journal.write_front(trainer, run, wanted)
    _spare("prune.png could not be drawn", lambda: draw(run.report, trainer.save_dir / "prune.png"))
    for aside in trainer.wdir.glob("round*.pt"):
        trainer.strip(aside)
    _spare(f"{PAGE} could not be written", lambda: _write_page(trainer, run.report))
    LOGGER.info(f"\n{rounds_table(run.report)}\n\n{summary_table(run.report)}")
    LOGGER.info(f"{PREFIX}pruned model {colorstr('bold', delivered)}, report {colorstr('bold', trainer.save_dir)}")


def _write_page(trainer: BaseTrainer, report: Report) -> None:
    shown = trainer.test_loader.dataset if trainer.args.plots else None
    run_page.at_end(Path(trainer.save_dir), report, dataset=shown, device=trainer.device)


def _spare(failure: str, make: Callable[[], object]) -> None:
    """Make what shows a finished run, which must not be lost for it."""
    try:
        make()
    except Exception as e:
        LOGGER.warning(f"{PREFIX}{failure}: {type(e).__name__}: {e}")
