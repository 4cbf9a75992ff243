# SPDX-License-Identifier: AGPL-3.0-or-later
"""The start of a run: its rounds are fixed and its report is opened, or the run is resumed from its checkpoint."""

from __future__ import annotations

from ultralytics.utils import LOGGER

from yolo_prune.cut.record import Record, read_record
from yolo_prune.env import ranks
from yolo_prune.env.files import remove, write_text
from yolo_prune.env.log import PREFIX
from yolo_prune.errors import RunError
from yolo_prune.latency.target import find, written_out
from yolo_prune.planning import planner
from yolo_prune.recipe import Recipe, as_yaml
from yolo_prune.recover.rewind import FILE as EARLY
from yolo_prune.report.front import FRONT
from yolo_prune.run import guard, journal, live, resume, schedule
from yolo_prune.run.state import PruningTrainer, RunState
from yolo_prune.zeros import planner as zeros

METRICS = {"flops": "FLOPs", "params": "parameters", "latency": "latency", "weights": "weights"}


def start(trainer: PruningTrainer, recipe: Recipe) -> RunState:
    """Fix the rounds of a run and open its report, or resume the run from its checkpoint.

    Raises:
        PruneError: If the recipe does not fit this model or this run.
    """
    ranks.agree(lambda: _check_labels(trainer, recipe))
    record = read_record(live.model_of(trainer))
    run = _resume(trainer, recipe, record) if trainer.resume and record else _begin(trainer, recipe)
    if not run.over:
        live.hold_early_stopping(trainer)
    if ranks.first():
        write_text(trainer.save_dir / "prune.yaml", as_yaml(run.report.recipe))
    journal.save(trainer, run.report)
    epochs = ", ".join(str(r.epoch + 1) for r in run.rounds)
    LOGGER.info(
        f"{PREFIX}{_count(run)}, before epoch {epochs}, {_aim(recipe)}"
        + (f"; {run.done} done already" if run.done else "")
    )
    return run


def _check_labels(trainer: PruningTrainer, recipe: Recipe) -> None:
    """Refuse a limit on the drop if the validation images have no labels: no fitness is measured then."""
    if live.labelled(trainer):
        return
    what = f"No validation image of data={trainer.args.data} has a label that this run uses"
    if recipe.limit is not None:
        raise RunError(
            f"{what}, so no fitness can be measured, and a limit on the drop (max_drop) needs one. Add the labels, or "
            "leave max_drop out."
        )
    LOGGER.warning(f"{PREFIX}{what}: the fitness is not measured, and best.pt is the model of the last epoch.")


def _count(run: RunState) -> str:
    cuts = sum(not r.settles for r in run.rounds)
    return f"{cuts} round{'s' * (cuts > 1)}{' and a last phase without a cut' * (cuts < len(run.rounds))}"


def _aim(recipe: Recipe) -> str:
    if recipe.keep is None:
        return f"to find the smallest model within a drop of {recipe.limit:g}"
    size = f"down to {recipe.keep:g} of the dense model's {METRICS[recipe.metric]}"
    return (
        size if recipe.sparsity is None or recipe.target is None else f"{size}, {recipe.sparsity.fixed:g} of them zero"
    )


def _begin(trainer: PruningTrainer, recipe: Recipe) -> RunState:
    model, frozen = live.model_of(trainer), live.frozen_modules(trainer)
    record = read_record(model)
    graph = planner.survey(model, recipe, trainer.args.imgsz, frozen)
    plan, present, timing = ranks.agree(lambda: zeros.trial(model, graph, recipe, trainer.args.imgsz, frozen))
    past = record.plan if record else None
    widths = record.widths if record and past else planner.widths(model, graph)
    live.store_record(trainer, Record(recipe.to_dict(), past, widths, (), present, active=True))
    if ranks.first():
        weights = (p for pattern in ("round*.pt", "state-*.pt", EARLY) for p in trainer.wdir.glob(pattern))
        for old in (*weights, trainer.csv, trainer.save_dir / FRONT):
            remove(old)  # these files belong to an earlier run in the same folder
    due = schedule.rounds(recipe, trainer.epochs, present)
    there = written_out(recipe.target, trainer.args.imgsz) if recipe.target else None
    report = journal.new_report(trainer, recipe.model_copy(update={"target": there}), plan)
    cost = plan.predicted.flops_before, plan.predicted.params_before
    exact = bool(trainer.args.deterministic)
    return RunState(recipe, due, report, trainer.stopper.patience, cost, frozen, timing=timing, exact=exact)


def _resume(trainer: PruningTrainer, recipe: Recipe, record: Record) -> RunState:
    exact = bool(trainer.args.deterministic)
    if exact:
        resume.restore(trainer, guard.structure_changes([r.held for r in record.rounds]))
    if ranks.first():
        resume.trim_results(trainer.csv, trainer.start_epoch)
    due = schedule.rounds(recipe, trainer.epochs, record.start)
    cut = record.rounds[-1].number if record.rounds else 0
    done = max(cut, sum(r.epoch < trainer.start_epoch for r in due))  # the record has no rounds without a cut
    report = journal.resumed_report(trainer, recipe, record)
    frozen = live.frozen_modules(trainer)
    run = RunState(recipe, due, report, trainer.stopper.patience, (0.0, 0), frozen, None, done, exact)
    run.cost = planner.present_cost(live.model_of(trainer), run.imgsz(trainer))
    if target := recipe.target:
        run.timing = ranks.agree(lambda: find(live.model_of(trainer), target, run.imgsz(trainer)))
    cut_since = bool(record.rounds) and record.rounds[-1].epoch == trainer.start_epoch
    if len(report.epochs_log) == trainer.start_epoch - 1 and not cut_since:  # killed before writing the report
        journal.log_epoch(trainer, run, trainer.start_epoch)
    return run
