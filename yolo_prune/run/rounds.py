# SPDX-License-Identifier: AGPL-3.0-or-later
"""One round of a run: judge the previous round, plan, prove, cut, recover, and update the records of the run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn
from ultralytics.utils import LOGGER

from yolo_prune import recover
from yolo_prune.cut import proof
from yolo_prune.cut.copies import bare_copy, size_mb
from yolo_prune.cut.masks import Masks
from yolo_prune.cut.plan import Plan
from yolo_prune.cut.record import Record, RoundFacts
from yolo_prune.data.calibration import Calibration
from yolo_prune.env import log, ranks
from yolo_prune.env.files import remove
from yolo_prune.env.log import PREFIX
from yolo_prune.errors import GradientError, NothingToRemoveError, RunError
from yolo_prune.graph import Graph
from yolo_prune.latency import search
from yolo_prune.planning import planner
from yolo_prune.recipe import Recipe
from yolo_prune.report import Proof, RoundFitness, RoundRow
from yolo_prune.report.data import LatencyRow
from yolo_prune.report.front import round_file
from yolo_prune.run import guard, journal, live, schedule, verdict
from yolo_prune.run.state import PruningTrainer, RunState
from yolo_prune.run.verdict import check_delivers, judge
from yolo_prune.zeros import planner as zeros


@dataclass(frozen=True)
class Decision:
    """The decision to cut. With several ranks, all of them follow the decision of the first rank.

    Attributes:
        keep: size to reach, as a fraction of the dense model.
        plan: plan of the cut; or of zeros, if the recipe has no target.
        proof: proof that the cut is exact; None if the recipe asks for no proof.
        latency: measured latency of the cut model, if the target is a latency.
    """

    keep: float
    plan: Plan
    proof: proof.Proof | None
    latency: LatencyRow | None


@dataclass(frozen=True)
class Outcome:
    """The result of a cut.

    Attributes:
        plan: plan of the cut, with the zeros that followed it.
        composed: everything removed so far, this cut included.
        fitness: fitness before the cut, right after it, and after recovery.
        reference: fitness from which drops are measured, if there is a limit.
    """

    plan: Plan
    composed: Plan
    fitness: RoundFitness
    reference: float | None


def perform(trainer: PruningTrainer, run: RunState, due: schedule.Round) -> bool:
    """Perform one round: judge the previous round, decide, cut, commit.

    The decision changes nothing: if it raises an error, the run, its model and its files are as before.

    Returns:
        Whether the model changed. A round without a cut is not recorded, because a resumed run decides it again.
    """
    began = time.perf_counter()
    record, changed = judge(trainer, run)
    stages = guard.stages(record.start, record.rounds)
    if due.settles or guard.stops_on_breach(run.recipe, stages):
        check_delivers(trainer, run, stages)
        run.advance(trainer)
        return changed
    calibration = _calibration(trainer, run.recipe)
    decision = ranks.agree(lambda: _decide(trainer, run, due, record, calibration))
    if decision is None:
        why = "an earlier round removed as much" if run.recipe.keep else "the search has no other size to try"
        LOGGER.info(f"{PREFIX}round {due.number}: {why}; nothing to remove")
        run.advance(trainer)
        return changed
    outcome = _cut(trainer, run, due, record, decision, calibration)
    _commit(trainer, run, due, record, decision, outcome, time.perf_counter() - began)
    return True


def conclude(trainer: PruningTrainer, run: RunState) -> None:
    """Judge the last cut, after the last epoch.

    Raises:
        RunError: If no cut held.
    """
    if run.over:
        record, _ = judge(trainer, run, ended=True)
        check_delivers(trainer, run, guard.stages(record.start, record.rounds))


def _calibration(trainer: PruningTrainer, recipe: Recipe) -> Calibration | None:
    """The training images for the scores and the refit. Only the first rank reads them."""
    images = max(planner.images_for(recipe), zeros.images_for(recipe), recipe.recover.refit)
    return live.calibration(trainer, images) if images and ranks.first() else None


def _cut(
    trainer: PruningTrainer,
    run: RunState,
    due: schedule.Round,
    record: Record,
    decision: Decision,
    calibration: Calibration | None,
) -> Outcome:
    """Cut the live model, its average and the optimizer, then recover without training."""
    recipe, plan = run.recipe, decision.plan
    before = _fitness_before(trainer, run)
    reference = verdict.reference(trainer, run, record, before)
    composed = record.plan.then(plan) if record.plan else plan
    uncut = bare_copy(live.average_of(trainer)) if recipe.recover.refit and ranks.first() else None
    if recipe.limit is not None and not record.rounds and trainer.best_fitness is None:
        live.save_average(trainer, trainer.wdir / round_file(0))
    early = live.read_early_weights(trainer, plan, composed) if recipe.recover.rewind else None
    live.cut(trainer, plan)
    _compare_ranks(trainer, composed)
    run.cost = plan.predicted.flops_after, plan.predicted.params_after
    after = live.validate(trainer) if recipe.measure else None
    if recipe.target and recipe.sparsity:
        amount = recipe.zeros(decision.keep, record.start)
        _refit(trainer, run, due.number, uncut, replace(plan, masks=composed.masks), calibration)
        added = _add_zeros(trainer, run, due, plan, amount, composed.masks, calibration)
        plan, composed = plan.then(added), composed.then(added)
    if early:
        live.rewind(trainer, early, composed.masks)
    recovered = _recover(trainer, run, due.number, uncut, replace(plan, masks=composed.masks), calibration)
    return Outcome(plan, composed, RoundFitness(before=before, cut=after, recovered=recovered), reference)


def _add_zeros(
    trainer: PruningTrainer,
    run: RunState,
    due: schedule.Round,
    plan: Plan,
    amount: float,
    earlier: Masks,
    calibration: Calibration | None,
) -> Plan:
    """After a cut, set weights of what is left to zero. Returns the plan of the zeros, which may be empty."""
    average, bar = live.average_of(trainer), log.bar(f"{PREFIX}round {due.number}: scoring weights")
    added = ranks.agree(
        lambda: zeros.plan_after(plan, average, run.recipe, amount, earlier, run.frozen, calibration, bar)
    )
    live.cut(trainer, added)
    return added


def _commit(
    trainer: PruningTrainer,
    run: RunState,
    due: schedule.Round,
    record: Record,
    decision: Decision,
    outcome: Outcome,
    seconds: float,
) -> None:
    """Save the result of a round: record, best checkpoint, report, last.pt. A kill in between does no harm."""
    plan, metric = outcome.plan, run.recipe.metric
    row = RoundRow(
        number=due.number,
        epoch=trainer.epoch,
        target={metric: decision.keep},
        flops=plan.predicted.flops_after,
        params=plan.predicted.params_after,
        size_mb=size_mb(live.average_of(trainer)),
        zeros=plan.predicted.zeros_after / plan.predicted.weights if plan.predicted.weights else None,
        plan=plan.hash,
        latency=decision.latency,
        proof=Proof(**vars(decision.proof)) if decision.proof else None,
        fitness=outcome.fitness,
        seconds=seconds,
    )
    facts = RoundFacts(
        **row.model_dump(include={"number", "epoch", "target", "flops", "params", "plan", "latency"}),
        keep=plan.predicted.kept(metric) if run.recipe.target else decision.keep,
        reference=outcome.reference,
    )
    _forget_best(trainer, record)
    run.advance(trainer)
    live.store_record(trainer, replace(record, plan=outcome.composed, rounds=(*record.rounds, facts)))
    if outcome.fitness.recovered is not None:
        live.take_average_for_best(trainer, outcome.fitness.recovered)
    journal.log_round(trainer, run, row)
    live.save_last(trainer)


def _forget_best(trainer: PruningTrainer, record: Record) -> None:
    """Move best.pt to the file of its round, because the checkpoint that will replace best.pt has another structure.

    After a rollback, best.pt is a copy of such a file, so it is deleted instead.
    """
    last = record.rounds[-1] if record.rounds else None
    if last is None or last.held is not False:
        live.put_aside(trainer, trainer.wdir / round_file(last.number if last else 0))
    elif ranks.first():
        remove(trainer.best)
    live.forget_best(trainer)


def _recover(
    trainer: PruningTrainer,
    run: RunState,
    number: int,
    uncut: nn.Module | None,
    plan: Plan,
    calibration: Calibration | None,
) -> float | None:
    """Recover the model without training. Returns the fitness after recovery, or None if it is not measured."""
    asked = run.recipe.recover
    if asked.refit:
        _refit(trainer, run, number, uncut, plan, calibration)
        live.start_from_average(trainer)
    else:
        _recalibrate(trainer, run, number)
    changed = asked.refit or asked.batchnorm or asked.rewind
    wanted = run.recipe.measure or run.recipe.limit is not None
    return live.validate(trainer) if wanted and changed else None


def _decide(
    trainer: PruningTrainer, run: RunState, due: schedule.Round, record: Record, calibration: Calibration | None
) -> Decision | None:
    """Make and prove the plan of a round. Returns None if earlier rounds removed as much, or if a search is over."""
    ema, recipe, stages = live.average_of(trainer), run.recipe, guard.stages(record.start, record.rounds)
    graph, searches = planner.survey(ema, recipe, run.imgsz(trainer), run.frozen), recipe.searches
    if recipe.target is None:
        return _decide_zeros(run, due, record, stages, ema, graph, calibration)
    floor = planner.limits_of(ema, graph, recipe).least(recipe.metric) if searches else 0.0
    keep = guard.next_keep(stages, due.keep, floor, recipe.keep)
    if searches and guard.search_is_over(stages):
        return None
    try:
        aim = Aim(keep, _present(record), guard.tolerance(stages, keep, search.TOLERANCE))
        plan, latency = _plan(trainer, run, due, graph, aim, calibration)
    except NothingToRemoveError:
        return _zeros_alone(run, keep, record, ema, graph)
    if searches and guard.is_known_to_fail(stages, plan.predicted.kept(recipe.metric)):
        return None
    return Decision(keep, plan, proof.prove(ema, plan) if recipe.proof else None, latency)


def _decide_zeros(
    run: RunState,
    due: schedule.Round,
    record: Record,
    stages: Sequence[guard.Stage],
    ema: nn.Module,
    graph: Graph,
    calibration: Calibration | None,
) -> Decision | None:
    """The decision of a round without a target. Returns None if there are as many zeros already."""
    keep = guard.next_keep(stages, due.keep, 0.0, run.recipe.keep)
    amount, present = run.recipe.zeros(keep, record.start), planner.standing(ema, graph)
    bar = log.bar(f"{PREFIX}round {due.number}: scoring weights")
    try:
        plan = zeros.plan_for(ema, run.recipe, amount, present, run.frozen, calibration, bar)
    except NothingToRemoveError:
        return None
    return Decision(keep, plan, None, None)


def _zeros_alone(run: RunState, keep: float, record: Record, ema: nn.Module, graph: Graph) -> Decision | None:
    """The decision of a round with no channel to remove: zeros may be missing. Returns None if none is."""
    recipe = run.recipe
    if recipe.sparsity is None or recipe.metric == "latency":
        return None
    missing = recipe.zeros(keep, record.start) - zeros.share_of(ema, recipe, run.frozen)
    if missing < FEW:
        return None
    plan = Plan({}, {}, {}, forecast=planner.standing(ema, graph))
    return Decision(keep, plan, None, None)


FEW = 1e-3
"""A round is not worth it for a smaller share of zeros: a share of the weights, below what rounds differ by."""


class Aim(NamedTuple):
    """The aim of a cut. Sizes are fractions of the dense model.

    Attributes:
        keep: size to reach.
        present: size before the cut.
        tolerance: allowed error, as a fraction of `keep`.
    """

    keep: float
    present: float
    tolerance: float


def _present(record: Record) -> float:
    """Present size of the model, as a fraction of the dense model: after the last cut that was not rolled back."""
    kept = [guard.recorded(r.keep, "keep") for r in record.rounds if r.held is not False]
    return kept[-1] if kept else record.start


def _plan(
    trainer: PruningTrainer, run: RunState, due: schedule.Round, graph: Graph, aim: Aim, calibration: Calibration | None
) -> tuple[Plan, LatencyRow | None]:
    """The plan of a round. For a latency target, it is corrected with measured latencies."""
    ema, recipe = live.average_of(trainer), run.recipe
    bar = log.bar(f"{PREFIX}round {due.number}: scoring channels")

    def plan(recipe: Recipe, calibration: Calibration | None) -> tuple[Plan, LatencyRow | None]:
        if run.timing is None:
            return planner.plan_for(ema, graph, recipe, aim.keep, calibration, bar), None
        weighed = planner.weigh(ema, graph, recipe, calibration, bar, run.timing)
        assert recipe.target is not None
        hit = search.settle(ema, weighed, recipe.target, run.imgsz(trainer), *aim)
        return hit.plan, hit.row

    try:
        return plan(recipe, calibration)
    except GradientError as e:  # a model with such gradients has little accuracy to lose, so the run goes on
        LOGGER.warning(f"{PREFIX}{e} This round uses the criterion magnitude instead.")
        return plan(planner.rehearsal(recipe), None)


def _compare_ranks(trainer: PruningTrainer, plan: Plan) -> None:
    """Make sure that every rank has the same model."""
    if not ranks.several():
        return
    hashes = ranks.gather((plan.hash, live.structure_hash(trainer)))
    LOGGER.info(PREFIX + "; ".join(f"rank {i} holds plan {h[:12]}, model {m[:12]}" for i, (h, m) in enumerate(hashes)))
    if len(set(hashes)) > 1:
        raise RunError("The ranks do not hold the same model after the cut. Please report this with the log above.")


def _fitness_before(trainer: PruningTrainer, run: RunState) -> float | None:
    """Fitness of the averaged model before the cut: that of the last epoch if it is known, else measured."""
    known = live.fitness_of_epoch(trainer) if trainer.epoch > trainer.start_epoch else None
    known = ranks.agree(lambda: None if known is None else float(known))  # only the first rank knows it
    wanted = run.recipe.measure or run.recipe.limit is not None
    before = live.validate(trainer) if known is None and wanted else known
    journal.log_start(trainer, run.report, before)
    return before


def _refit(
    trainer: PruningTrainer,
    run: RunState,
    number: int,
    uncut: nn.Module | None,
    plan: Plan,
    calibration: Calibration | None,
) -> None:
    """Refit the averaged model, layer by layer, to the layer outputs before the cut. Only the first rank does so."""
    if uncut is None or calibration is None:
        return
    images = calibration.images(run.recipe.recover.refit)
    bar = log.bar(f"{PREFIX}round {number}: refitting layers")
    used = recover.refit(uncut, live.average_of(trainer), plan, images, run.frozen, bar)
    if used < len(images):
        LOGGER.warning(f"{PREFIX}the memory was enough for a refit on {used} images, not on {len(images)}")


def _recalibrate(trainer: PruningTrainer, run: RunState, number: int) -> None:
    """Estimate the batch norm statistics of the live model and its average again, because training uses both."""
    batches = min(run.recipe.recover.batchnorm, len(trainer.train_loader))
    seed = trainer.args.seed + number
    for model in (live.model_of(trainer), live.average_of(trainer)) if batches else ():
        if ranks.first():
            with live.own_randomness(seed):
                images = live.training_images(trainer, batches, seed)
                bar = log.bar(f"{PREFIX}round {number}: recalibrating batch norm", batches)
                recover.recalibrate(model, bar(images), run.frozen)
        ranks.share(model.buffers())
