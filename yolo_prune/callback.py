# SPDX-License-Identifier: AGPL-3.0-or-later
"""When things happen during an Ultralytics run: the rounds, their bookkeeping, the report."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import LOGGER, TQDM, colorstr
from ultralytics.utils.torch_utils import strip_optimizer

from yolo_prune import metadata, planner, proof, recover, schedule, surgery
from yolo_prune import trainer as control
from yolo_prune.errors import NothingToRemoveError, RunError
from yolo_prune.files import write_text
from yolo_prune.metadata import Record
from yolo_prune.plans import Plan
from yolo_prune.recipe import Recipe
from yolo_prune.report import (
    EpochRow,
    Figures,
    LayerRow,
    Proof,
    ProtectedRow,
    Report,
    RoundFitness,
    RoundRow,
    rounds_table,
    summary_table,
)
from yolo_prune.report.data import FILE_NAME
from yolo_prune.report.picture import draw
from yolo_prune.versions import installed

PREFIX = colorstr("yolo-prune: ")
METRICS = {"flops": "FLOPs", "params": "parameters"}


@dataclass
class Run:
    """The state of one pruned run; lives on the trainer as `trainer.pruning`.

    Attributes:
        recipe: what was asked for.
        rounds: when to cut, and how far.
        report: what was measured so far.
        patience: the early stopping patience to restore after the last round.
        cost: FLOPs and parameters of the model as it is.
        frozen: modules that this run does not train (`freeze=`).
        done: rounds that are finished.
        epoch_open: an epoch was trained and is not yet in the report.
    """

    recipe: Recipe
    rounds: tuple[schedule.Round, ...]
    report: Report
    patience: float
    cost: tuple[float, int]
    frozen: tuple[str, ...] = ()
    done: int = 0
    epoch_open: bool = False

    def due(self, epoch: int) -> schedule.Round | None:
        """The next round, if its epoch has come; a round that is done never comes again."""
        left = self.rounds[self.done :]
        return left[0] if left and epoch >= left[0].epoch else None

    def advance(self, trainer: BaseTrainer) -> None:
        """A round is over; after the last one, early stopping works again."""
        self.done += 1
        if self.done == len(self.rounds):
            trainer.stopper.patience = self.patience


class PruneCallback:
    """`callbacks=prune`: cuts the model in rounds while it trains.

    Holds only what the user asked for, so that it can be pickled and shared; the state of a run is on its trainer.
    """

    EVENTS = (
        "on_pretrain_routine_end",
        "on_train_epoch_start",
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
        if due := trainer.pruning.due(trainer.epoch):
            perform(trainer, trainer.pruning, due)

    def on_train_epoch_end(self, trainer: BaseTrainer) -> None:
        """An epoch was trained; `on_fit_epoch_end` follows once it is validated."""
        trainer.pruning.epoch_open = True

    def on_fit_epoch_end(self, trainer: BaseTrainer) -> None:
        """An epoch was validated: take it down. After the final validation this fires once more; that is no epoch."""
        run: Run = trainer.pruning
        if run.epoch_open:
            run.epoch_open = False
            _log_epoch(trainer, run)

    def on_train_end(self, trainer: BaseTrainer) -> None:
        """The run is over: check what it delivers and write the report."""
        finish(trainer, trainer.pruning)

    def teardown(self, trainer: BaseTrainer) -> None:
        """The run is over, well or badly."""
        run: Run | None = getattr(trainer, "pruning", None)
        if run and run.report.status == "running":
            run.report.status = "failed"
            _save(trainer, run.report)


def start(trainer: BaseTrainer, recipe: Recipe, source: str) -> Run:
    """Fix the rounds of a run and open its report; on resume, go on where the checkpoint is.

    Raises:
        PruneError: If the recipe does not fit this model or this run.
    """
    model = control.live(trainer)
    record = metadata.read(model)
    frozen = control.frozen_modules(trainer)
    if trainer.resume and record:
        report = _old_report(trainer, recipe, source, record)
        cost = planner.present_cost(model, trainer.args.imgsz)
    else:
        graph = planner.survey(model, recipe, trainer.args.imgsz, frozen)
        plan = planner.plan_for(model, graph, recipe)
        past = record.plan if record else None
        widths = record.widths if record and past else planner.widths(model, graph)
        present = plan.predicted.present(recipe.target.metric)
        record = Record(recipe.to_dict(), past, widths, (), present, active=True)
        metadata.write(model, record)
        report = _new_report(trainer, recipe, source, plan)
        cost = plan.predicted.flops_before, plan.predicted.params_before
        for aside in trainer.wdir.glob("round*.pt"):  # of an earlier run in the same folder
            aside.unlink()
    rounds = schedule.rounds(recipe.schedule, recipe.target.keep, trainer.epochs, record.start)
    run = Run(recipe, rounds, report, trainer.stopper.patience, cost, frozen, len(record.rounds))
    if run.done < len(rounds):
        control.hold_early_stopping(trainer)
    write_text(trainer.save_dir / "prune.yaml", recipe.to_yaml())
    _save(trainer, report)
    epochs = ", ".join(str(r.epoch + 1) for r in rounds)
    LOGGER.info(
        f"{PREFIX}{len(rounds)} round{'s' * (len(rounds) > 1)}, before epoch {epochs}, down to {recipe.target.keep:g} "
        f"of the dense model's {METRICS[recipe.target.metric]}" + (f"; {run.done} done already" if run.done else "")
    )
    return run


def perform(trainer: BaseTrainer, run: Run, due: schedule.Round) -> None:
    """One round: plan, prove, cut, recalibrate, and set the run's bookkeeping right.

    Planning and proof only read; whatever they raise leaves the run, its model and its files as they were.
    """
    began = time.perf_counter()
    recipe, ema = run.recipe, trainer.ema.ema
    record = metadata.read(control.live(trainer))
    if record is None:
        raise RunError("The run's pruning record is gone from the model; another callback replaced `model.yaml`.")
    before = _fitness_before(trainer, run)
    try:
        plan = planner.make_plan(ema, recipe, trainer.args.imgsz, due.keep, run.frozen)
    except NothingToRemoveError:
        plan = None
    if plan is None:
        LOGGER.info(f"{PREFIX}round {due.number}: the round before already went this far; nothing to remove")
        run.advance(trainer)
        return
    proven = proof.prove(ema, plan) if recipe.proof else None
    composed = record.plan.then(plan) if record.plan else plan
    control.cut(trainer, plan)
    run.cost = plan.predicted.flops_after, plan.predicted.params_after
    after_cut = control.validate(trainer) if recipe.measure else None
    _recalibrate(trainer, run, due.number)
    recalibrated = control.validate(trainer) if recipe.measure and recipe.recover.batchnorm else None
    control.forget_best(trainer, trainer.wdir / f"round{due.number}.pt")
    run.advance(trainer)
    row = RoundRow(
        number=due.number,
        epoch=trainer.epoch,
        target={recipe.target.metric: due.keep},
        flops=plan.predicted.flops_after,
        params=plan.predicted.params_after,
        size_mb=_size_mb(ema),
        plan=plan.hash,
        proof=Proof(**vars(proven)) if proven else None,
        fitness=RoundFitness(before=before, cut=after_cut, recalibrated=recalibrated),
        seconds=time.perf_counter() - began,
    )
    facts = row.model_dump(include={"number", "epoch", "target", "flops", "params", "plan"})
    metadata.write(control.live(trainer), replace(record, plan=composed, rounds=(*record.rounds, facts)))
    trainer.ema.ema.yaml = control.live(trainer).yaml
    control.save_last(trainer)
    _report_round(trainer, run, row)


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
    model, _ = load_checkpoint(delivered)
    wanted, found = metadata.read(control.live(trainer)), metadata.read(model)
    if not (wanted and wanted.plan and found and found.plan) or found.plan.hash != wanted.plan.hash:
        raise RunError(
            f"{delivered} does not have the structure of the last round. Do not use it; please report this with "
            f"{trainer.save_dir / FILE_NAME}."
        )
    surgery.check_applied(model, found.plan)
    report = run.report
    flops, params = planner.present_cost(model, trainer.args.imgsz)
    fitness = float(trainer.validator.metrics.fitness)
    report.pruned = Figures(flops=flops, params=params, size_mb=_size_mb(model), fitness=fitness)
    _close_rounds(report, fitness)
    report.layers = _layers(model, found.plan, report)
    report.status = "finished"
    _save(trainer, report)
    try:
        draw(report, trainer.save_dir / "prune.png")
    except Exception as e:  # a picture must not cost a finished run
        LOGGER.warning(f"{PREFIX}prune.png could not be drawn: {type(e).__name__}: {e}")
    for number in range(1, len(run.rounds) + 1):
        if (aside := trainer.wdir / f"round{number}.pt").exists():
            strip_optimizer(aside)
    LOGGER.info(f"\n{rounds_table(report)}\n\n{summary_table(report)}")
    LOGGER.info(f"{PREFIX}pruned model {colorstr('bold', delivered)}, report {colorstr('bold', trainer.save_dir)}")


def _fitness_before(trainer: BaseTrainer, run: Run) -> float | None:
    """Fitness of the averaged model as it goes into the cut: known from the last epoch, else measured."""
    if trainer.epoch > trainer.start_epoch and trainer.fitness is not None:
        return float(trainer.fitness)
    return control.validate(trainer) if run.recipe.measure else None


def _recalibrate(trainer: BaseTrainer, run: Run, number: int) -> None:
    """Estimate the batch norms of the live model and of its average anew; both go on into training."""
    batches = min(run.recipe.recover.batchnorm, len(trainer.train_loader))
    seed = trainer.args.seed + number
    for model in (control.live(trainer), trainer.ema.ema) if batches else ():
        with control.own_randomness(seed):
            images = control.training_images(trainer, batches, seed)
            bar = TQDM(images, total=batches, desc=f"{PREFIX}round {number}: recalibrating batch norm")
            recover.recalibrate(model, bar, run.frozen)


def _log_epoch(trainer: BaseTrainer, run: Run) -> None:
    flops, params = run.cost
    row = EpochRow(epoch=trainer.epoch + 1, fitness=trainer.fitness, flops=flops, params=params)
    kept = [r for r in run.report.epochs_log if r.epoch <= trainer.epoch]  # an epoch that is redone is written anew
    run.report.epochs_log = [*kept, row]
    _save(trainer, run.report)


def _save(trainer: BaseTrainer, report: Report) -> None:
    """Write the report; a disk or viewer that does not allow it must not cost a night of training."""
    try:
        report.save(trainer.save_dir / FILE_NAME)
    except OSError as e:
        LOGGER.warning(f"{PREFIX}{FILE_NAME} could not be written: {e}")


def _old_report(trainer: BaseTrainer, recipe: Recipe, source: str, record: Record) -> Report:
    """The report of the run that is resumed; rebuilt from the checkpoint's record where the file is gone."""
    if (trainer.save_dir / FILE_NAME).exists():
        report = Report.load(trainer.save_dir)
        report.status = "running"
        return report
    flops, params = planner.dense_cost(control.live(trainer), record.plan, trainer.args.imgsz)
    return Report(
        **_identity(trainer, recipe, source),
        dense=Figures(flops=flops, params=params),
        rounds=[RoundRow.model_validate(facts) for facts in record.rounds],
    )


def _identity(trainer: BaseTrainer, recipe: Recipe, source: str) -> dict[str, Any]:
    return {
        "versions": installed(),
        "recipe": recipe.to_dict(),
        "model": source or str(trainer.args.model),
        "data": str(trainer.args.data),
        "imgsz": trainer.args.imgsz,
        "epochs": trainer.epochs,
    }


def _new_report(trainer: BaseTrainer, recipe: Recipe, source: str, plan: Plan) -> Report:
    forecast = plan.predicted
    whole = forecast.present(recipe.target.metric) == 1.0
    return Report(
        **_identity(trainer, recipe, source),
        dense=Figures(
            flops=forecast.dense_flops,
            params=forecast.dense_params,
            size_mb=_size_mb(control.live(trainer)) if whole else None,
        ),
        protected=[ProtectedRow(layers=list(p.layers), reason=p.reason) for p in plan.protected],
    )


def _report_round(trainer: BaseTrainer, run: Run, row: RoundRow) -> None:
    report = run.report
    if not report.rounds and report.dense.size_mb is not None:
        report.dense = report.dense.model_copy(update={"fitness": row.fitness.before})
    report.rounds = [*(r for r in report.rounds if r.number < row.number), row]
    _close_rounds(report, None)
    _save(trainer, report)
    kept = (row.flops or 0) / (report.dense.flops or 1)
    steps = [f"{name} {value:.3f}" for name, value in row.fitness if value is not None]
    LOGGER.info(
        f"{PREFIX}round {row.number} of {len(run.rounds)}: {kept:.1%} of the FLOPs, {row.params:,} parameters; "
        + (f"fitness {', '.join(steps)}" if steps else "not measured")
        + (f"; exact to {row.proof.error:.0e}" if row.proof else "; not proved")
    )


def _close_rounds(report: Report, final: float | None) -> None:
    """A round's end is what the next one starts from; the last one's is the delivered model."""
    starts = [*(r.fitness.before for r in report.rounds[1:]), final]
    for row, end in zip(report.rounds, starts, strict=False):
        row.fitness.end = end


def _layers(model: nn.Module, plan: Plan, report: Report) -> list[LayerRow]:
    protected = {name for p in report.protected for name in p.layers}
    rows = []
    for name, width in planner.layer_widths(model):
        dense = plan.shapes.get(f"{name}.weight", (width,))[0]
        rows.append(LayerRow(name=name, dense=dense, pruned=width, protected=name in protected))
    return rows


def _size_mb(model: nn.Module) -> float:
    """Megabytes of the model as a checkpoint stores it, in half precision."""
    copy = proof.lean_copy(model).half()
    buffer = io.BytesIO()
    torch.save({"model": copy}, buffer)
    return buffer.getbuffer().nbytes / 1e6
