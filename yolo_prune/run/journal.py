# SPDX-License-Identifier: AGPL-3.0-or-later
"""The records of a pruning run: its report, its log lines, and its figures for experiment trackers."""

from __future__ import annotations

from typing import Any

from torch import nn
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER

from yolo_prune.cut.census import census, compressed_mb
from yolo_prune.cut.copies import checkpoint_bytes, size_mb
from yolo_prune.cut.plan import Plan
from yolo_prune.cut.record import Record, RoundFacts
from yolo_prune.data import datasets
from yolo_prune.env import ranks
from yolo_prune.env.log import PREFIX
from yolo_prune.env.metrics import class_ap
from yolo_prune.env.versions import installed
from yolo_prune.errors import PruneError
from yolo_prune.planning import planner
from yolo_prune.recipe import Recipe
from yolo_prune.report import EpochRow, Figures, LayerRow, ProtectedRow, Report, RoundRow
from yolo_prune.report.data import FILE_NAME
from yolo_prune.report.front import make_front
from yolo_prune.run import guard, live
from yolo_prune.run.guard import Stage
from yolo_prune.run.state import PruningTrainer, RunState

TRACKED = "prune/"
NOT_LISTED = ("model", "data", "imgsz", "epochs", "task", "mode", "name", "project", "exist_ok", "save_dir", "resume")
"""Arguments that a report does not list: the report has keys for them, or they only say where the run is stored."""


def save(trainer: PruningTrainer, report: Report) -> None:
    """Write the report. An error becomes a warning: a full disk or a locked file must not end a long training."""
    if not ranks.first():
        return
    try:
        report.save(trainer.save_dir / FILE_NAME)
    except OSError as e:
        LOGGER.warning(f"{PREFIX}{FILE_NAME} could not be written: {e}")


def fail(trainer: PruningTrainer, error: BaseException | None) -> None:
    """Mark the report of a run that has failed or was interrupted."""
    run = trainer.pruning
    if run and run.report.status == "running":
        run.report.status = "failed"
        run.report.error = f"{type(error).__name__}: {error}" if error else None
        save(trainer, run.report)


def new_report(trainer: PruningTrainer, recipe: Recipe, plan: Plan) -> Report:
    """The report of a new run. `plan` is a trial plan that applies the recipe in one cut."""
    forecast = plan.predicted
    whole = forecast.present(recipe.metric) == 1.0
    return Report(
        **_identity(trainer, recipe),
        dense=Figures(
            flops=forecast.dense_flops,
            params=forecast.dense_params,
            size_mb=size_mb(live.model_of(trainer)) if whole else None,
        ),
        protected=[ProtectedRow(layers=list(p.layers), reason=p.reason) for p in plan.protected],
    )


def resumed_report(trainer: PruningTrainer, recipe: Recipe, record: Record) -> Report:
    """The report of a resumed run, as it was at the checkpoint. A missing report is made from the record."""
    report = _saved_report(trainer)
    if report is None:
        flops, params = planner.dense_cost(live.model_of(trainer), record.plan, trainer.args.imgsz)
        report = Report(**_identity(trainer, recipe), dense=Figures(flops=flops, params=params))
    known = {(row.number, row.plan): row for row in report.rounds}
    report.rounds = [
        known.get((facts.number, facts.plan)) or RoundRow.model_validate(facts.to_dict()) for facts in record.rounds
    ]
    for row, facts in zip(report.rounds, record.rounds, strict=True):
        row.held = facts.held
        row.fitness.end = row.fitness.end if facts.end is None else facts.end
    report.epochs_log = [row for row in report.epochs_log if row.epoch <= trainer.start_epoch]
    close_rounds(report, None)
    return report


def _saved_report(trainer: PruningTrainer) -> Report | None:
    if not (trainer.save_dir / FILE_NAME).exists():
        return None
    try:
        report = Report.load(trainer.save_dir)
    except PruneError as e:
        LOGGER.warning(f"{PREFIX}{e} A new report is started.")
        return None
    report.status, report.error = "running", None
    return report


def _identity(trainer: PruningTrainer, recipe: Recipe) -> dict[str, Any]:
    return {
        "versions": installed(),
        "recipe": recipe.to_dict(),
        "model": str(trainer.args.model),
        "kept_classes": kept.describe() if (kept := datasets.kept_classes(live.model_of(trainer))) else "",
        "data": str(trainer.args.data),
        "imgsz": trainer.args.imgsz,
        "epochs": trainer.epochs,
        "arguments": {
            key: value
            for key, value in vars(trainer.args).items()
            if key in DEFAULT_CFG_DICT and key not in NOT_LISTED and value != DEFAULT_CFG_DICT[key]
        },
    }


def log_epoch(trainer: PruningTrainer, run: RunState, number: int) -> None:
    """Add an epoch that was trained and validated to the report. `number` is counted from 1."""
    flops, params = run.cost
    row = EpochRow(epoch=number, fitness=live.fitness_of_epoch(trainer), flops=flops, params=params)
    kept = [r for r in run.report.epochs_log if r.epoch < number]  # a repeated epoch replaces its old row
    run.report.epochs_log = [*kept, row]
    save(trainer, run.report)


def track(trainer: PruningTrainer, run: RunState) -> None:
    """Add the figures of the run to the metrics that Ultralytics' integrations (TensorBoard, W&B, ...) log next."""
    flops, params = run.cost
    figures: dict[str, Any] = {"round": run.done}
    if run.report.dense.flops and run.report.dense.params:
        figures |= {"flops_kept": flops / run.report.dense.flops, "params_kept": params / run.report.dense.params}
    last = run.report.rounds[-1] if run.report.rounds else None
    if last and last.epoch == trainer.epoch:
        figures |= {f"fitness_{name}": value for name, value in last.fitness if value is not None}
    trainer.metrics = {**(trainer.metrics or {}), **{f"{TRACKED}{name}": value for name, value in figures.items()}}


def untrack(trainer: PruningTrainer) -> None:
    """Remove these figures again, so that the columns of results.csv stay the same."""
    trainer.metrics = {k: v for k, v in (trainer.metrics or {}).items() if not k.startswith(TRACKED)}


def log_start(trainer: PruningTrainer, report: Report, fitness: float | None) -> None:
    """Add the fitness before the first cut of the run to the report, if the model was dense then."""
    if not report.rounds and report.dense.size_mb is not None:
        measured = trainer.validator.metrics if fitness is not None and ranks.first() else None
        report.dense = report.dense.model_copy(update={"fitness": fitness, "classes": class_ap(measured)})


def log_round(trainer: PruningTrainer, run: RunState, row: RoundRow) -> None:
    """Add a round that was performed to the report, and log it."""
    report = run.report
    report.rounds = [*(r for r in report.rounds if r.number < row.number), row]
    close_rounds(report, None)
    save(trainer, report)
    cuts = sum(not r.settles for r in run.rounds)
    kept = (row.flops or 0) / (report.dense.flops or 1)
    steps = [f"{name} {value:.3f}" for name, value in row.fitness if value is not None]
    LOGGER.info(
        f"{PREFIX}round {row.number} of {cuts}: {kept:.1%} of the FLOPs, {row.params:,} parameters; "
        + (f"fitness {', '.join(steps)}" if steps else "not measured")
        + (f"; exact to {row.proof.error:.0e}" if row.proof else "; not proved" * ("weights" not in row.target))
        + (f"; {row.latency}" if row.latency else "")
        + (f"; {row.zeros:.1%} of the weights are zero" if row.zeros else "")
    )


def log_if_no_epoch_helped(report: Report, batch: int, per_step: int) -> None:
    """Tell the user if no epoch after the last cut reached the fitness right after recovery.

    Args:
        report: the report of the run.
        batch: images in a batch.
        per_step: batches for each step of the optimizer.
    """
    if not report.rounds:
        return
    last = report.rounds[-1]
    since = [e.fitness for e in report.epochs_log if e.fitness is not None and e.epoch > (last.epoch or 0)]
    recovered = last.fitness.recovered
    if recovered is not None and since and max(since) < recovered:
        advice = "Longer training may improve it."
        if per_step > 1:
            advice += (
                f" More optimizer steps may also improve it: now there is one step for each {per_step} batches; with "
                f"nbs={batch} there is one step for each batch."
            )
        LOGGER.info(
            f"{PREFIX}training after the last cut did not improve the model: its fitness was {recovered:.3f} right "
            f"after recovery and at most {max(since):.3f} in the epochs after that. best.pt is the recovered model. "
            f"{advice}"
        )


def log_verdict(trainer: PruningTrainer, run: RunState, facts: RoundFacts, good: Stage) -> None:
    """Add the verdict on a round to the report, and log it."""
    row = run.report.rounds[-1]
    row.held, row.fitness.end = facts.held, facts.end
    save(trainer, run.report)
    end, reference = guard.recorded(facts.end, "end"), guard.recorded(facts.reference, "reference")
    fell = f"fitness {end:.4f}, {abs(reference - end):.4f} {'below' if reference > end else 'above'} {reference:.4f}"
    back = f"round {good.number}" if good.number else "the start"
    LOGGER.info(
        f"{PREFIX}round {row.number} {'held' if row.held else 'exceeded the limit'} ({fell}; limit "
        f"{run.recipe.limit:g})" + ("" if row.held else f": rolled back to {back}, {good.keep:.3f} of the dense model")
    )


def close_rounds(report: Report, final: float | None) -> None:
    """Set the final fitness of the rounds that were not judged.

    The final fitness of a round is the fitness before the next cut. For the last round, it is `final`, the fitness of
    the delivered model.
    """
    starts = [*(r.fitness.before for r in report.rounds[1:]), final]
    for row, end in zip(report.rounds, starts, strict=False):
        if row.held is None:
            row.fitness.end = end


def complete(trainer: PruningTrainer, run: RunState, model: nn.Module, plan: Plan) -> None:
    """Add the measurements of the delivered model to the report, and mark the report as finished."""
    report = run.report
    flops, params = planner.present_cost(model, run.imgsz(trainer))
    fitness = float(trainer.validator.metrics.fitness) if live.labelled(trainer) else None
    classes = class_ap(trainer.validator.metrics)
    content = checkpoint_bytes(model)
    report.pruned = Figures(flops=flops, params=params, size_mb=len(content) / 1e6, fitness=fitness, classes=classes)
    if plan.masks:
        report.pruned.zeros, report.pruned.zipped_mb = census(model).share, compressed_mb(content)
    if report.timed:
        report.dense.latency_ms, report.pruned.latency_ms = report.timed.dense_ms, report.timed.ms
    close_rounds(report, fitness)
    report.layers = _layers(model, plan, report)
    report.status = "finished"
    save(trainer, report)


def write_front(trainer: PruningTrainer, run: RunState, record: Record) -> None:
    """Write front.json, if the run had a limit on the drop."""
    if run.recipe.limit is None or not record.rounds or not ranks.first():
        return
    start: dict[str, float] = {run.recipe.metric: record.start}
    if record.start == 1.0:
        start |= {"flops": 1.0, "params": 1.0}
    make_front(run.report, run.recipe.limit, guard.recorded(record.rounds[0].reference, "reference"), start).save(
        trainer.save_dir
    )


def _layers(model: nn.Module, plan: Plan, report: Report) -> list[LayerRow]:
    protected = {name for p in report.protected for name in p.layers}
    rows = []
    for name, width in planner.layer_widths(model):
        dense = plan.shapes.get(f"{name}.weight", (width,))[0]
        mask = plan.masks.get(f"{name}.weight")
        share = mask.zeros / mask.size if mask else None
        rows.append(LayerRow(name=name, dense=dense, pruned=width, zeros=share, protected=name in protected))
    return rows
