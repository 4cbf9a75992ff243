# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a pruning run writes down: its report, lines in the log, and figures for experiment trackers."""

from __future__ import annotations

from typing import Any

from torch import nn
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER

from yolo_prune.cut.copies import size_mb
from yolo_prune.cut.plan import Plan
from yolo_prune.cut.record import Record, RoundFacts
from yolo_prune.env import ranks
from yolo_prune.env.log import PREFIX
from yolo_prune.env.metrics import class_ap
from yolo_prune.env.versions import installed
from yolo_prune.errors import PruneError
from yolo_prune.planning import planner
from yolo_prune.recipe import Recipe
from yolo_prune.report import EpochRow, Figures, LayerRow, ProtectedRow, Report, RoundRow
from yolo_prune.report.data import FILE_NAME
from yolo_prune.report.front import front
from yolo_prune.run import guard, live
from yolo_prune.run.guard import Stage
from yolo_prune.run.state import PruningTrainer, RunState

TRACKED = "prune/"
APART = ("model", "data", "imgsz", "epochs", "task", "mode", "name", "project", "exist_ok", "save_dir", "resume")
"""Arguments that a report has a key for, or that say where a run lies and not what it does."""


def save(trainer: PruningTrainer, report: Report) -> None:
    """Write the report; a disk or viewer that does not allow it must not cost a night of training."""
    if not ranks.first():
        return
    try:
        report.save(trainer.save_dir / FILE_NAME)
    except OSError as e:
        LOGGER.warning(f"{PREFIX}{FILE_NAME} could not be written: {e}")


def fail(trainer: PruningTrainer, error: BaseException | None) -> None:
    """Close the report of a run that did not end by itself."""
    run = trainer.pruning
    if run and run.report.status == "running":
        run.report.status = "failed"
        run.report.error = f"{type(error).__name__}: {error}" if error else None
        save(trainer, run.report)


def open_new(trainer: PruningTrainer, recipe: Recipe, source: str, plan: Plan) -> Report:
    """The report of a run that begins; `plan` is what it would do at once."""
    forecast = plan.predicted
    whole = forecast.present(recipe.target.metric) == 1.0
    return Report(
        **_identity(trainer, recipe, source),
        dense=Figures(
            flops=forecast.dense_flops,
            params=forecast.dense_params,
            size_mb=size_mb(live.model_of(trainer)) if whole else None,
        ),
        protected=[ProtectedRow(layers=list(p.layers), reason=p.reason) for p in plan.protected],
    )


def reopen(trainer: PruningTrainer, recipe: Recipe, source: str, record: Record) -> Report:
    """The report of the run that is resumed, as of its checkpoint; rebuilt from the record where the file is gone."""
    report = _old(trainer)
    if report is None:
        flops, params = planner.dense_cost(live.model_of(trainer), record.plan, trainer.args.imgsz)
        report = Report(**_identity(trainer, recipe, source), dense=Figures(flops=flops, params=params))
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


def _old(trainer: PruningTrainer) -> Report | None:
    if not (trainer.save_dir / FILE_NAME).exists():
        return None
    try:
        report = Report.load(trainer.save_dir)
    except PruneError as e:
        LOGGER.warning(f"{PREFIX}{e} It is begun anew.")
        return None
    report.status, report.error = "running", None
    return report


def _identity(trainer: PruningTrainer, recipe: Recipe, source: str) -> dict[str, Any]:
    return {
        "versions": installed(),
        "recipe": recipe.to_dict(),
        "model": source or str(trainer.args.model),
        "data": str(trainer.args.data),
        "imgsz": trainer.args.imgsz,
        "epochs": trainer.epochs,
        "arguments": {
            key: value
            for key, value in vars(trainer.args).items()
            if key in DEFAULT_CFG_DICT and key not in APART and value != DEFAULT_CFG_DICT[key]
        },
    }


def log_epoch(trainer: PruningTrainer, run: RunState, number: int) -> None:
    """Take down an epoch, counted from 1, that was trained and validated."""
    flops, params = run.cost
    row = EpochRow(epoch=number, fitness=trainer.fitness, flops=flops, params=params)
    kept = [r for r in run.report.epochs_log if r.epoch < number]  # an epoch that is redone is written anew
    run.report.epochs_log = [*kept, row]
    save(trainer, run.report)


def track(trainer: PruningTrainer, run: RunState) -> None:
    """Add the run's figures to what Ultralytics' integrations (TensorBoard, MLflow, W&B, ...) are about to log."""
    flops, params = run.cost
    figures: dict[str, Any] = {"round": run.done}
    if run.report.dense.flops and run.report.dense.params:
        figures |= {"flops_kept": flops / run.report.dense.flops, "params_kept": params / run.report.dense.params}
    last = run.report.rounds[-1] if run.report.rounds else None
    if last and last.epoch == trainer.epoch:
        figures |= {f"fitness_{name}": value for name, value in last.fitness if value is not None}
    trainer.metrics = {**(trainer.metrics or {}), **{f"{TRACKED}{name}": value for name, value in figures.items()}}


def untrack(trainer: PruningTrainer) -> None:
    """Take them out again: results.csv keeps its columns."""
    trainer.metrics = {k: v for k, v in (trainer.metrics or {}).items() if not k.startswith(TRACKED)}


def log_start(trainer: PruningTrainer, report: Report, fitness: float | None) -> None:
    """Take down how good the model was before the first cut of the run, if that was the dense one."""
    if not report.rounds and report.dense.size_mb is not None:
        measured = trainer.validator.metrics if fitness is not None and ranks.first() else None
        report.dense = report.dense.model_copy(update={"fitness": fitness, "classes": class_ap(measured)})


def log_round(trainer: PruningTrainer, run: RunState, row: RoundRow) -> None:
    """Take down a round that was performed."""
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
        + (f"; exact to {row.proof.error:.0e}" if row.proof else "; not proved")
        + (f"; {row.latency}" if row.latency else "")
    )


def log_if_untrained(report: Report, batch: int, per_step: int) -> None:
    """Say so if no epoch after the last cut was as good as what was recovered before any training.

    Args:
        report: of the run.
        batch: images in a batch.
        per_step: batches whose gradients are gathered for a step of the optimizer.
    """
    if not report.rounds:
        return
    last = report.rounds[-1]
    since = [e.fitness for e in report.epochs_log if e.fitness is not None and e.epoch > (last.epoch or 0)]
    recovered = last.fitness.recovered
    if recovered is not None and since and max(since) < recovered:
        more = "Longer training may go beyond it."
        if per_step > 1:
            more += f" So may more steps: the optimizer takes one in {per_step} batches, with nbs={batch} one in each."
        LOGGER.info(
            f"{PREFIX}no epoch after the last cut came up to the fitness of {recovered:.3f} that was recovered before "
            f"any training (the best: {max(since):.3f}), so best.pt is that model. {more}"
        )


def log_verdict(trainer: PruningTrainer, run: RunState, facts: RoundFacts, good: Stage) -> None:
    """Take down whether a round has held."""
    row = run.report.rounds[-1]
    row.held, row.fitness.end = facts.held, facts.end
    save(trainer, run.report)
    end, reference = guard.known(facts.end), guard.known(facts.reference)
    fell = f"fitness {end:.4f}, {abs(reference - end):.4f} {'below' if reference > end else 'above'} {reference:.4f}"
    back = f"round {good.number}" if good.number else "the start"
    LOGGER.info(
        f"{PREFIX}round {row.number} {'held' if row.held else 'cost too much'} ({fell}; limit {run.recipe.limit:g})"
        + ("" if row.held else f": back to {back}, {good.keep:.3f} of the dense model")
    )


def close_rounds(report: Report, final: float | None) -> None:
    """A round's end is what the next one starts from, the last one's the delivered model; where it was judged, that."""
    starts = [*(r.fitness.before for r in report.rounds[1:]), final]
    for row, end in zip(report.rounds, starts, strict=False):
        if row.held is None:
            row.fitness.end = end


def complete(trainer: PruningTrainer, run: RunState, model: nn.Module, plan: Plan) -> None:
    """Fill in what only the delivered model can tell, and close the report."""
    report = run.report
    flops, params = planner.present_cost(model, run.imgsz(trainer))
    fitness = float(trainer.validator.metrics.fitness)
    classes = class_ap(trainer.validator.metrics)
    report.pruned = Figures(flops=flops, params=params, size_mb=size_mb(model), fitness=fitness, classes=classes)
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
    start: dict[str, float] = {run.recipe.target.metric: record.start}
    if record.start == 1.0:
        start = {"flops": 1.0, "params": 1.0}
    front(run.report, run.recipe.limit, guard.known(record.rounds[0].reference), start).save(trainer.save_dir)


def _layers(model: nn.Module, plan: Plan, report: Report) -> list[LayerRow]:
    protected = {name for p in report.protected for name in p.layers}
    rows = []
    for name, width in planner.layer_widths(model):
        dense = plan.shapes.get(f"{name}.weight", (width,))[0]
        rows.append(LayerRow(name=name, dense=dense, pruned=width, protected=name in protected))
    return rows
