# SPDX-License-Identifier: AGPL-3.0-or-later
"""When things happen during an Ultralytics run: the rounds and their bookkeeping."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import LOGGER, colorstr

from yolo_prune import control, journal, metadata, planner, proof, ranks, recover, resume, schedule, surgery
from yolo_prune.calibration import Calibration
from yolo_prune.compat import load_checkpoint
from yolo_prune.errors import GradientError, NothingToRemoveError, RunError
from yolo_prune.files import write_text
from yolo_prune.journal import PREFIX, Run
from yolo_prune.metadata import Record
from yolo_prune.plans import Plan
from yolo_prune.recipe import Recipe
from yolo_prune.report import Proof, Report, RoundFitness, RoundRow, rounds_table, summary_table
from yolo_prune.report.data import FILE_NAME
from yolo_prune.report.picture import draw

METRICS = {"flops": "FLOPs", "params": "parameters"}


class PruneCallback:
    """`callbacks=prune`: cuts the model in rounds while it trains.

    Holds only what the user asked for, so that it can be pickled and shared; the state of a run is on its trainer.
    """

    EVENTS = (
        "on_pretrain_routine_end",
        "on_train_epoch_start",
        "on_train_batch_start",
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
        while due := run.due(trainer.epoch):
            if perform(trainer, run, due):
                break
        if due and run.exact:
            resume.seed_epoch(trainer)
        if run.done and run.recipe.recover.refit and run.recipe.recover.average:  # there is something to remember
            control.average_over(trainer, run.recipe.recover.average)  # each time: NaN recovery makes a new average

    def on_train_batch_start(self, trainer: BaseTrainer) -> None:
        """A resumed run takes up the cadence of the optimizer's steps."""
        trainer.cadence.batch_starts(trainer)

    def on_train_batch_end(self, trainer: BaseTrainer) -> None:
        """See `on_train_batch_start`."""
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
    record = metadata.read(control.live(trainer))
    run = _go_on(trainer, recipe, source, record) if trainer.resume and record else _begin(trainer, recipe, source)
    if run.done < len(run.rounds):
        control.hold_early_stopping(trainer)
    if ranks.first():
        write_text(trainer.save_dir / "prune.yaml", recipe.to_yaml())
    journal.save(trainer, run.report)
    epochs = ", ".join(str(r.epoch + 1) for r in run.rounds)
    LOGGER.info(
        f"{PREFIX}{len(run.rounds)} round{'s' * (len(run.rounds) > 1)}, before epoch {epochs}, down to "
        f"{recipe.target.keep:g} of the dense model's {METRICS[recipe.target.metric]}"
        + (f"; {run.done} done already" if run.done else "")
    )
    return run


def _begin(trainer: BaseTrainer, recipe: Recipe, source: str) -> Run:
    teacher = getattr(trainer.args, "distill_model", None)
    if teacher and Path(teacher).resolve().parent == Path(trainer.wdir).resolve():
        raise RunError(f"The teacher {teacher} lies where this run writes its checkpoints. Give the run a new name=.")
    model, frozen = control.live(trainer), control.frozen_modules(trainer)
    record = metadata.read(model)
    graph = planner.survey(model, recipe, trainer.args.imgsz, frozen)
    plan = planner.plan_for(model, graph, planner.rehearsal(recipe))
    past = record.plan if record else None
    widths = record.widths if record and past else planner.widths(model, graph)
    present = plan.predicted.present(recipe.target.metric)
    metadata.write(model, Record(recipe.to_dict(), past, widths, (), present, active=True))
    if ranks.first():
        for old in (*trainer.wdir.glob("round*.pt"), *trainer.wdir.glob("state-*.pt"), trainer.csv):
            old.unlink(missing_ok=True)  # of an earlier run in the same folder
    rounds = schedule.rounds(recipe.schedule, recipe.target.keep, trainer.epochs, present)
    report = journal.open_new(trainer, recipe, source, plan)
    cost = plan.predicted.flops_before, plan.predicted.params_before
    return Run(recipe, rounds, report, trainer.stopper.patience, cost, frozen, exact=bool(trainer.args.deterministic))


def _go_on(trainer: BaseTrainer, recipe: Recipe, source: str, record: Record) -> Run:
    exact = bool(trainer.args.deterministic)
    if exact:
        resume.restore(trainer, len(record.rounds), trainer.cadence)
    if ranks.first():
        resume.trim_results(trainer.csv, trainer.start_epoch)
    rounds = schedule.rounds(recipe.schedule, recipe.target.keep, trainer.epochs, record.start)
    cut = int(record.rounds[-1]["number"]) if record.rounds else 0
    done = max(cut, sum(r.epoch < trainer.start_epoch for r in rounds))  # no record is kept of rounds without a cut
    report = journal.reopen(trainer, recipe, source, record)
    cost = planner.present_cost(control.live(trainer), journal.imgsz(trainer, report))
    frozen = control.frozen_modules(trainer)
    run = Run(recipe, rounds, report, trainer.stopper.patience, cost, frozen, done, exact)
    if len(report.epochs_log) == trainer.start_epoch - 1:  # killed between last.pt and the report
        journal.log_epoch(trainer, run, trainer.start_epoch)
    return run


def perform(trainer: BaseTrainer, run: Run, due: schedule.Round) -> bool:
    """One round: plan, prove, cut, recalibrate, and set the run's bookkeeping right.

    Planning and proof only read; whatever they raise leaves the run, its model and its files as they were. With several
    ranks, the first one plans and proves, and all cut alike.

    Returns:
        False if there was nothing to remove. No record is kept of that: a resumed run finds it out again.
    """
    began = time.perf_counter()
    recipe, record = run.recipe, metadata.read(control.live(trainer))
    if record is None:
        raise RunError("The run's pruning record is gone from the model; another callback replaced `model.yaml`.")
    images = max(planner.images_for(recipe), recipe.recover.refit)
    calibration = control.calibration(trainer, images) if images and ranks.first() else None
    plan, proven = ranks.agree(lambda: _decide(trainer, run, due, calibration))
    if plan is None:
        LOGGER.info(f"{PREFIX}round {due.number}: the round before already went this far; nothing to remove")
        run.advance(trainer)
        return False
    before = _fitness_before(trainer, run)
    composed = record.plan.then(plan) if record.plan else plan
    whole = proof.bare_copy(control.average(trainer)) if recipe.recover.refit and ranks.first() else None
    control.cut(trainer, plan)
    _compare_ranks(trainer, composed)
    run.cost = plan.predicted.flops_after, plan.predicted.params_after
    after_cut = control.validate(trainer) if recipe.measure else None
    if recipe.recover.refit:
        if whole is not None and calibration:
            _refit(trainer, run, due.number, whole, plan, calibration)
        control.start_from_average(trainer)
    else:
        _recalibrate(trainer, run, due.number)
    recovers = recipe.recover.refit or recipe.recover.batchnorm
    recovered = control.validate(trainer) if recipe.measure and recovers else None
    control.forget_best(trainer, trainer.wdir / f"round{due.number}.pt")
    run.advance(trainer)
    row = RoundRow(
        number=due.number,
        epoch=trainer.epoch,
        target={recipe.target.metric: due.keep},
        flops=plan.predicted.flops_after,
        params=plan.predicted.params_after,
        size_mb=journal.size_mb(control.average(trainer)),
        plan=plan.hash,
        proof=Proof(**vars(proven)) if proven else None,
        fitness=RoundFitness(before=before, cut=after_cut, recovered=recovered),
        seconds=time.perf_counter() - began,
    )
    facts = row.model_dump(include={"number", "epoch", "target", "flops", "params", "plan"})
    metadata.write(control.live(trainer), replace(record, plan=composed, rounds=(*record.rounds, facts)))
    control.average(trainer).yaml = control.live(trainer).yaml
    journal.log_round(trainer, run, row)
    control.save_last(trainer)
    return True


def _decide(
    trainer: BaseTrainer, run: Run, due: schedule.Round, calibration: Calibration | None
) -> tuple[Plan | None, proof.Proof | None]:
    """The proved plan of a round; none where the rounds before went this far already."""
    ema = control.average(trainer)
    try:
        size = journal.imgsz(trainer, run.report)
        bar = journal.bar(f"{PREFIX}round {due.number}: looking at training images")
        try:
            plan = planner.make_plan(ema, run.recipe, size, due.keep, run.frozen, calibration, bar)
        except GradientError as e:  # such a model has little to lose, and its run must not end here
            LOGGER.warning(f"{PREFIX}{e} This round goes by magnitude.")
            plan = planner.make_plan(ema, planner.rehearsal(run.recipe), size, due.keep, run.frozen)
    except NothingToRemoveError:
        return None, None
    return plan, proof.prove(ema, plan) if run.recipe.proof else None


def _compare_ranks(trainer: BaseTrainer, plan: Plan) -> None:
    """Make sure that every rank has the same model."""
    if not ranks.several():
        return
    held = ranks.gather((plan.hash, control.structure(trainer)))
    LOGGER.info(PREFIX + "; ".join(f"rank {i} holds plan {h[:12]}, model {m[:12]}" for i, (h, m) in enumerate(held)))
    if len(set(held)) > 1:
        raise RunError("The ranks do not hold the same model after the cut. Please report this with the log above.")


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
    model = metadata.inner(load_checkpoint(delivered)[0])
    wanted, found = metadata.read(control.live(trainer)), metadata.read(model)
    if not (wanted and wanted.plan and found and found.plan) or found.plan.hash != wanted.plan.hash:
        raise RunError(
            f"{delivered} does not have the structure of the last round. Do not use it; please report this with "
            f"{trainer.save_dir / FILE_NAME}."
        )
    surgery.check_applied(model, found.plan)
    journal.complete(trainer, run.report, model, found.plan)
    _draw(trainer, run.report)
    for number in range(1, len(run.rounds) + 1):
        if (aside := trainer.wdir / f"round{number}.pt").exists():
            trainer.strip(aside)
    LOGGER.info(f"\n{rounds_table(run.report)}\n\n{summary_table(run.report)}")
    LOGGER.info(f"{PREFIX}pruned model {colorstr('bold', delivered)}, report {colorstr('bold', trainer.save_dir)}")


def _draw(trainer: BaseTrainer, report: Report) -> None:
    try:
        draw(report, trainer.save_dir / "prune.png")
    except Exception as e:  # a picture must not cost a finished run
        LOGGER.warning(f"{PREFIX}prune.png could not be drawn: {type(e).__name__}: {e}")


def _fitness_before(trainer: BaseTrainer, run: Run) -> float | None:
    """Fitness of the averaged model as it goes into the cut: known from the last epoch, else measured."""
    known = trainer.fitness if trainer.epoch > trainer.start_epoch else None
    known = ranks.agree(lambda: None if known is None else float(known))  # later ranks do not know it
    return control.validate(trainer) if known is None and run.recipe.measure else known


def _refit(trainer: BaseTrainer, run: Run, number: int, whole: nn.Module, plan: Plan, calibration: Calibration) -> None:
    """Fit the averaged model, layer after layer, to what it put out before the cut."""
    images = calibration.images(run.recipe.recover.refit)
    bar = journal.bar(f"{PREFIX}round {number}: refitting layers")
    recover.refit(whole, control.average(trainer), plan, images, run.frozen, bar)


def _recalibrate(trainer: BaseTrainer, run: Run, number: int) -> None:
    """Estimate the batch norms of the live model and of its average anew; both go on into training."""
    batches = min(run.recipe.recover.batchnorm, len(trainer.train_loader))
    seed = trainer.args.seed + number
    for model in (control.live(trainer), control.average(trainer)) if batches else ():
        if ranks.first():
            with control.own_randomness(seed):
                images = control.training_images(trainer, batches, seed)
                bar = journal.bar(f"{PREFIX}round {number}: recalibrating batch norm", batches)
                recover.recalibrate(model, bar(images), run.frozen)
        ranks.share(model.buffers())
