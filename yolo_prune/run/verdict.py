# SPDX-License-Identifier: AGPL-3.0-or-later
"""The verdict on a cut: the drop in fitness is compared with the limit, and the model is rolled back if necessary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from yolo_prune.cut.record import Record, read_record
from yolo_prune.env import ranks
from yolo_prune.env.releases import load_checkpoint
from yolo_prune.errors import RunError
from yolo_prune.planning import planner
from yolo_prune.report.front import round_file
from yolo_prune.run import guard, journal, live
from yolo_prune.run.guard import Stage
from yolo_prune.run.state import PruningTrainer, RunState


def judge(trainer: PruningTrainer, run: RunState, ended: bool = False) -> tuple[Record, bool]:
    """Compare the drop in fitness since the last cut with the limit. If the drop exceeds the limit, roll back.

    Args:
        trainer: at the start of an epoch, or after the last one.
        run: the state of the run.
        ended: whether this is after the last epoch.

    Returns:
        The record with the verdict, and whether the model was replaced.
    """
    record = read_record(live.model_of(trainer))
    if record is None:
        raise RunError(
            "The pruning record is missing from the model: another callback replaced `model.yaml`. Train without that "
            "callback."
        )
    if run.recipe.limit is None or not record.rounds or record.rounds[-1].held is not None:
        return record, False
    *earlier, last = record.rounds
    fitness = ranks.agree(lambda: None if trainer.best_fitness is None else float(trainer.best_fitness))
    if fitness is None:
        raise RunError(
            "No epoch since the last cut was validated, so the drop in fitness is not known. Resume with val=True."
        )
    held = guard.holds(fitness, guard.recorded(last.reference, "reference"), run.recipe.limit)
    record = replace(record, rounds=(*earlier, replace(last, end=fitness, held=held)))
    live.store_record(trainer, record)
    good = guard.last_good(guard.stages(record.start, record.rounds))
    journal.log_verdict(trainer, run, record.rounds[-1], good)
    journal.write_front(trainer, run, record)
    if not held:
        return _roll_back(trainer, run, record, good, ended), True
    return record, not ended and _continue_from_best(trainer, record, good)


def _continue_from_best(trainer: PruningTrainer, record: Record, good: Stage) -> bool:
    """If the last epoch is not the best one since the cut, continue from the best epoch, which was judged."""
    if ranks.agree(lambda: trainer.fitness == good.fitness) or record.plan is None:
        return False
    aside = trainer.wdir / good.file  # this file exists if the run was killed after this step
    source, _ = load_checkpoint(aside if aside.exists() else trainer.best)
    live.go_back(trainer, source, record.plan)
    live.save_last(trainer)
    return True


def _roll_back(trainer: PruningTrainer, run: RunState, record: Record, good: Stage, ended: bool) -> Record:
    """Restore the best model of the last stage that held, before the cut that exceeded the limit."""
    path = trainer.wdir / good.file
    source, _ = load_checkpoint(path)
    earlier = read_record(source)
    if earlier is None or record.plan is None:
        raise RunError(f"{path} does not belong to this run. Restore the file of this run, or start the run again.")
    live.go_back(trainer, source, record.plan)
    record = replace(record, plan=earlier.plan)
    live.store_record(trainer, record)
    run.cost = planner.present_cost(live.model_of(trainer), run.imgsz(trainer))
    live.put_aside(trainer, trainer.wdir / round_file(record.rounds[-1].number))
    live.take_for_best(trainer, path, good.fitness, ended)
    live.save_last(trainer, ended)
    return record


def check_delivers(trainer: PruningTrainer, run: RunState, finished: Sequence[Stage]) -> None:
    """Check that at least one cut held, if there is a limit.

    Raises:
        RunError: If no cut held.
    """
    tried = finished[1:]
    if run.recipe.limit is None or not tried or any(s.held for s in tried):
        return
    nearest = max(tried, key=lambda s: s.fitness)
    raise RunError(
        f"No cut stayed within a drop of {run.recipe.limit:g}: the nearest model keeps {nearest.keep:.3f} of the dense "
        f"model, with a fitness of {nearest.fitness:.4f} ({trainer.wdir / nearest.file}). Allow a larger drop, train "
        "longer, or give the run more rounds, for smaller steps. best.pt is not pruned to the target."
    )


def measure_reference(trainer: PruningTrainer) -> None:
    """Measure the model that the run starts from, before the epochs that come before the first cut."""
    record = read_record(live.model_of(trainer))
    if record and record.reference is None:
        measured = live.validate(trainer)
        live.store_record(trainer, replace(record, reference=ranks.agree(lambda: measured)))


def reference(trainer: PruningTrainer, run: RunState, record: Record, before: float | None) -> float | None:
    """The fitness from which drops are measured, if there is a limit.

    It is the fitness of the model that the run starts from, or the best fitness before the first cut if this is higher.

    Raises:
        RunError: If the limit is as large as this fitness, so that every cut would hold.
    """
    limit = run.recipe.limit
    if limit is None:
        return None
    if record.rounds:
        return guard.recorded(record.rounds[0].reference, "reference")
    reference = ranks.agree(lambda: float(max(record.reference or 0.0, trainer.best_fitness or before or 0.0)))
    if reference <= limit:
        raise RunError(
            f"Before its first cut the model has a fitness of {reference:.4f}, which is no more than the allowed drop "
            f"({limit:g}), so every cut would hold. Train the model first, or train longer before the first cut "
            "(schedule.start)."
        )
    return reference
