# SPDX-License-Identifier: AGPL-3.0-or-later
"""One round of a run: judge the one before, plan, prove, cut, recover, and set the run's bookkeeping right."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import LOGGER

from yolo_prune import recover
from yolo_prune.cut import proof
from yolo_prune.cut.copies import bare_copy, size_mb
from yolo_prune.cut.plan import Plan
from yolo_prune.cut.record import Record, read_record
from yolo_prune.data.calibration import Calibration
from yolo_prune.env import log, ranks
from yolo_prune.env.log import PREFIX
from yolo_prune.env.releases import load_checkpoint
from yolo_prune.errors import GradientError, NothingToRemoveError, RunError
from yolo_prune.graph import Graph
from yolo_prune.latency import search
from yolo_prune.planning import planner
from yolo_prune.recipe import Recipe
from yolo_prune.report import Proof, RoundFitness, RoundRow
from yolo_prune.report.data import LatencyRow
from yolo_prune.report.front import round_file
from yolo_prune.run import guard, journal, live, schedule
from yolo_prune.run.guard import Stage
from yolo_prune.run.journal import Run


def perform(trainer: BaseTrainer, run: Run, due: schedule.Round) -> bool:
    """One round. With several ranks, the first one judges, plans and proves, and all follow alike.

    Planning and proof only read; whatever they raise leaves the run, its model and its files as they were.

    Returns:
        False if nothing changed. No record is kept of a round without a cut: a resumed run finds it out again.
    """
    began = time.perf_counter()
    recipe = run.recipe
    record, changed = judge(trainer, run)
    found = guard.stages(record.start, record.rounds)
    if due.settles or guard.is_over(recipe, found):
        _check_delivers(trainer, run, found)
        run.advance(trainer)
        return changed
    images = max(planner.images_for(recipe), recipe.recover.refit)
    calibration = live.calibration(trainer, images) if images and ranks.first() else None
    plan, proven, asked, latency = ranks.agree(lambda: _decide(trainer, run, due, record, calibration))
    if plan is None:
        why = "the round before already went this far" if recipe.target.keep else "no other size is left to try"
        LOGGER.info(f"{PREFIX}round {due.number}: {why}; nothing to remove")
        run.advance(trainer)
        return changed
    before = _fitness_before(trainer, run)
    reference = _reference(trainer, run, record, before)
    composed = record.plan.then(plan) if record.plan else plan
    whole = bare_copy(live.average_of(trainer)) if recipe.recover.refit and ranks.first() else None
    if recipe.limit is not None and not record.rounds and trainer.best_fitness is None:
        live.save_average(trainer, trainer.wdir / found[0].file)
    early = live.recall_early(trainer, plan, composed) if recipe.recover.rewind else None
    live.cut(trainer, plan)
    _compare_ranks(trainer, composed)
    run.cost = plan.predicted.flops_after, plan.predicted.params_after
    after_cut = live.validate(trainer) if recipe.measure else None
    if early:
        live.rewind(trainer, early)
    recovered = _recover(trainer, run, due.number, whole, plan, calibration)
    row = RoundRow(
        number=due.number,
        epoch=trainer.epoch,
        target={recipe.target.metric: asked},
        flops=plan.predicted.flops_after,
        params=plan.predicted.params_after,
        size_mb=size_mb(live.average_of(trainer)),
        plan=plan.hash,
        latency=latency,
        proof=Proof(**vars(proven)) if proven else None,
        fitness=RoundFitness(before=before, cut=after_cut, recovered=recovered),
        seconds=time.perf_counter() - began,
    )
    facts = row.model_dump(include={"number", "epoch", "target", "flops", "params", "plan", "latency"})
    facts["keep"] = plan.predicted.kept(recipe.target.metric)
    if reference is not None:
        facts["reference"] = reference
    _forget_best(trainer, record)
    run.advance(trainer)
    live.keep_record(trainer, replace(record, plan=composed, rounds=(*record.rounds, facts)))
    if recovered is not None:
        live.take_average_for_best(trainer, recovered)
    journal.log_round(trainer, run, row)
    live.save_last(trainer)
    return True


def conclude(trainer: BaseTrainer, run: Run) -> None:
    """The last epoch is over: what the last cut left must hold, too.

    Raises:
        RunError: If no cut held.
    """
    if run.done == len(run.rounds):
        record, _ = judge(trainer, run, ended=True)
        _check_delivers(trainer, run, guard.stages(record.start, record.rounds))


def judge(trainer: BaseTrainer, run: Run, ended: bool = False) -> tuple[Record, bool]:
    """Compare what the last cut has left, now that it was trained, with the limit; beyond it, go back.

    Args:
        trainer: at the start of an epoch, or after the last one.
        run: its state.
        ended: no epoch follows.

    Returns:
        The record, with the verdict, and whether the model is another one now.
    """
    record = read_record(live.model_of(trainer))
    if record is None:
        raise RunError("The run's pruning record is gone from the model; another callback replaced `model.yaml`.")
    if run.recipe.limit is None or not record.rounds or "held" in record.rounds[-1]:
        return record, False
    *earlier, last = record.rounds
    fitness = ranks.agree(lambda: None if trainer.best_fitness is None else float(trainer.best_fitness))
    if fitness is None:
        raise RunError(
            "No epoch since the last cut was validated, so that its drop is not known. Resume with val=True."
        )
    held = guard.holds(fitness, last["reference"], run.recipe.limit)
    record = replace(record, rounds=(*earlier, {**last, "end": fitness, "held": held}))
    live.keep_record(trainer, record)
    good = guard.last_good(guard.stages(record.start, record.rounds))
    journal.log_verdict(trainer, run, record.rounds[-1], good)
    journal.write_front(trainer, run, record)
    if not held:
        return _go_back(trainer, run, record, good, ended), True
    return record, not ended and _take_up_best(trainer, record, good)


def _take_up_best(trainer: BaseTrainer, record: Record, good: Stage) -> bool:
    """Go on from what was judged: the best epoch since the last cut, if that is not the last one."""
    if ranks.agree(lambda: trainer.fitness == good.fitness) or record.plan is None:
        return False
    aside = trainer.wdir / good.file  # there already, if a run was killed after this
    source, _ = load_checkpoint(aside if aside.exists() else trainer.best)
    live.go_back(trainer, source, record.plan)
    live.save_last(trainer)
    return True


def _go_back(trainer: BaseTrainer, run: Run, record: Record, good: Stage, ended: bool) -> Record:
    """Make the model what it was at its best before the cut that was too much."""
    path = trainer.wdir / good.file
    source, _ = load_checkpoint(path)
    then = read_record(source)
    if then is None or record.plan is None:
        raise RunError(f"{path} is not of this run. Put back the one that is, or start the run anew.")
    live.go_back(trainer, source, record.plan)
    record = replace(record, plan=then.plan)
    live.keep_record(trainer, record)
    run.cost = planner.present_cost(live.model_of(trainer), journal.imgsz(trainer, run.report))
    live.put_aside(trainer, trainer.wdir / round_file(record.rounds[-1]["number"]))
    live.take_for_best(trainer, path, good.fitness, ended)
    live.save_last(trainer, ended)
    return record


def _check_delivers(trainer: BaseTrainer, run: Run, found: Sequence[Stage]) -> None:
    """Where there is a limit, at least one cut must have held."""
    tried = found[1:]
    if run.recipe.limit is None or not tried or any(s.held for s in tried):
        return
    nearest = max(tried, key=lambda s: s.fitness)
    raise RunError(
        f"No cut stayed within a drop of {run.recipe.limit:g}: the nearest was {nearest.keep:.3f} of the dense model, "
        f"with a fitness of {nearest.fitness:.4f} ({trainer.wdir / nearest.file}). Allow a larger drop, train longer, "
        "or give the run more rounds, for smaller steps. best.pt is not pruned to the target."
    )


def take_reference(trainer: BaseTrainer) -> None:
    """Measure the model that the run starts from, where it is trained before the first cut."""
    record = read_record(live.model_of(trainer))
    if record and record.reference is None:
        measured = live.validate(trainer)
        live.keep_record(trainer, replace(record, reference=ranks.agree(lambda: measured)))


def _reference(trainer: BaseTrainer, run: Run, record: Record, before: float | None) -> float | None:
    """Fitness that drops are counted from, if there is a limit: the start's, or better what became of it before cuts.

    Raises:
        RunError: If all of it may be lost.
    """
    limit = run.recipe.limit
    if limit is None:
        return None
    if record.rounds:
        return float(record.rounds[0]["reference"])
    reference = ranks.agree(lambda: float(max(record.reference or 0.0, trainer.best_fitness or before or 0.0)))
    if reference <= limit:
        raise RunError(
            f"Before its first cut the model has a fitness of {reference:.4f}, which is no more than the drop that is "
            f"allowed ({limit:g}): any cut would hold. Train the model first, or longer before the first cut "
            "(schedule.start)."
        )
    return reference


def _forget_best(trainer: BaseTrainer, record: Record) -> None:
    """What was best so far has another structure: it is kept aside, unless it is a copy of what lies there already."""
    last = record.rounds[-1] if record.rounds else {}
    if last.get("held") is not False:
        live.put_aside(trainer, trainer.wdir / round_file(last.get("number", 0)))
    elif ranks.first():
        trainer.best.unlink(missing_ok=True)
    live.forget_best(trainer)


def _recover(
    trainer: BaseTrainer, run: Run, number: int, whole: nn.Module | None, plan: Plan, calibration: Calibration | None
) -> float | None:
    """Recover what can be without training; the fitness after it, where it is measured."""
    asked = run.recipe.recover
    if asked.refit:
        if whole is not None and calibration:
            _refit(trainer, run, number, whole, plan, calibration)
        live.start_from_average(trainer)
    else:
        _recalibrate(trainer, run, number)
    changed = asked.refit or asked.batchnorm or asked.rewind
    wanted = run.recipe.measure or run.recipe.limit is not None
    return live.validate(trainer) if wanted and changed else None


def _decide(
    trainer: BaseTrainer, run: Run, due: schedule.Round, record: Record, calibration: Calibration | None
) -> tuple[Plan | None, proof.Proof | None, float, LatencyRow | None]:
    """The proved plan of a round, what it aims at, and how fast it makes the model where that is the target.

    No plan where the rounds before went this far already.
    """
    ema, recipe, found = live.average_of(trainer), run.recipe, guard.stages(record.start, record.rounds)
    graph = planner.survey(ema, recipe, journal.imgsz(trainer, run.report), run.frozen)
    searches = recipe.target.keep is None
    floor = planner.reachable(ema, graph, recipe) if searches else 0.0
    keep = guard.next_keep(found, due.keep, floor, recipe.target.keep)
    if searches and guard.is_found(found):
        return None, None, keep, None
    try:
        aim = Aim(keep, _present(record), guard.tolerance(found, keep, search.TOLERANCE))
        plan, latency = _plan(trainer, run, due, graph, aim, calibration)
    except NothingToRemoveError:
        return None, None, keep, None
    if searches and guard.is_known_to_fail(found, plan.predicted.kept(recipe.target.metric)):
        return None, None, keep, None
    return plan, proof.prove(ema, plan) if recipe.proof else None, keep, latency


class Aim(NamedTuple):
    """What a cut is to leave, and what is there before it, of the dense model; and how near to that it has to come."""

    keep: float
    present: float
    tolerance: float


def _present(record: Record) -> float:
    """Fraction of the dense model that the model is: what the last cut left that was not taken back."""
    kept = [float(r["keep"]) for r in record.rounds if r.get("held") is not False]
    return kept[-1] if kept else record.start


def _plan(
    trainer: BaseTrainer, run: Run, due: schedule.Round, graph: Graph, aim: Aim, calibration: Calibration | None
) -> tuple[Plan, LatencyRow | None]:
    """The plan of a round; for a latency, corrected by what is measured."""
    ema, recipe = live.average_of(trainer), run.recipe
    bar = log.bar(f"{PREFIX}round {due.number}: weighing channels")

    def plan(recipe: Recipe, calibration: Calibration | None) -> tuple[Plan, LatencyRow | None]:
        if run.timing is None:
            return planner.plan_for(ema, graph, recipe, aim.keep, calibration, bar), None
        weighed = planner.weigh(ema, graph, recipe, calibration, bar, run.timing)
        hit = search.settle(ema, weighed, recipe.target, journal.imgsz(trainer, run.report), *aim)
        return hit.plan, hit.row

    try:
        return plan(recipe, calibration)
    except GradientError as e:  # such a model has little to lose, and its run must not end here
        LOGGER.warning(f"{PREFIX}{e} This round goes by magnitude.")
        return plan(planner.rehearsal(recipe), None)


def _compare_ranks(trainer: BaseTrainer, plan: Plan) -> None:
    """Make sure that every rank has the same model."""
    if not ranks.several():
        return
    held = ranks.gather((plan.hash, live.structure(trainer)))
    LOGGER.info(PREFIX + "; ".join(f"rank {i} holds plan {h[:12]}, model {m[:12]}" for i, (h, m) in enumerate(held)))
    if len(set(held)) > 1:
        raise RunError("The ranks do not hold the same model after the cut. Please report this with the log above.")


def _fitness_before(trainer: BaseTrainer, run: Run) -> float | None:
    """Fitness of the averaged model as it goes into the cut: known from the last epoch, else measured."""
    known = trainer.fitness if trainer.epoch > trainer.start_epoch else None
    known = ranks.agree(lambda: None if known is None else float(known))  # later ranks do not know it
    wanted = run.recipe.measure or run.recipe.limit is not None
    before = live.validate(trainer) if known is None and wanted else known
    journal.log_start(trainer, run.report, before)
    return before


def _refit(trainer: BaseTrainer, run: Run, number: int, whole: nn.Module, plan: Plan, calibration: Calibration) -> None:
    """Fit the averaged model, layer after layer, to what it put out before the cut."""
    images = calibration.images(run.recipe.recover.refit)
    bar = log.bar(f"{PREFIX}round {number}: refitting layers")
    used = recover.refit(whole, live.average_of(trainer), plan, images, run.frozen, bar)
    if used < len(images):
        LOGGER.warning(f"{PREFIX}memory was enough to refit on {used} images only, not on {len(images)}")


def _recalibrate(trainer: BaseTrainer, run: Run, number: int) -> None:
    """Estimate the batch norms of the live model and of its average anew; both go on into training."""
    batches = min(run.recipe.recover.batchnorm, len(trainer.train_loader))
    seed = trainer.args.seed + number
    for model in (live.model_of(trainer), live.average_of(trainer)) if batches else ():
        if ranks.first():
            with live.own_randomness(seed):
                images = live.training_images(trainer, batches, seed)
                bar = log.bar(f"{PREFIX}round {number}: recalibrating batch norm", batches)
                recover.recalibrate(model, bar(images), run.frozen)
        ranks.share(model.buffers())
