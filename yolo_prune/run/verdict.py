# SPDX-License-Identifier: AGPL-3.0-or-later
"""Did the last cut hold? Judge it by the limit on the drop, and go back if it cost too much."""

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
    if run.recipe.limit is None or not record.rounds or record.rounds[-1].held is not None:
        return record, False
    *earlier, last = record.rounds
    fitness = ranks.agree(lambda: None if trainer.best_fitness is None else float(trainer.best_fitness))
    if fitness is None:
        raise RunError(
            "No epoch since the last cut was validated, so that its drop is not known. Resume with val=True."
        )
    held = guard.holds(fitness, guard.known(last.reference), run.recipe.limit)
    record = replace(record, rounds=(*earlier, replace(last, end=fitness, held=held)))
    live.keep_record(trainer, record)
    good = guard.last_good(guard.stages(record.start, record.rounds))
    journal.log_verdict(trainer, run, record.rounds[-1], good)
    journal.write_front(trainer, run, record)
    if not held:
        return _go_back(trainer, run, record, good, ended), True
    return record, not ended and _take_up_best(trainer, record, good)


def _take_up_best(trainer: PruningTrainer, record: Record, good: Stage) -> bool:
    """Go on from what was judged: the best epoch since the last cut, if that is not the last one."""
    if ranks.agree(lambda: trainer.fitness == good.fitness) or record.plan is None:
        return False
    aside = trainer.wdir / good.file  # there already, if a run was killed after this
    source, _ = load_checkpoint(aside if aside.exists() else trainer.best)
    live.go_back(trainer, source, record.plan)
    live.save_last(trainer)
    return True


def _go_back(trainer: PruningTrainer, run: RunState, record: Record, good: Stage, ended: bool) -> Record:
    """Make the model what it was at its best before the cut that was too much."""
    path = trainer.wdir / good.file
    source, _ = load_checkpoint(path)
    then = read_record(source)
    if then is None or record.plan is None:
        raise RunError(f"{path} is not of this run. Put back the one that is, or start the run anew.")
    live.go_back(trainer, source, record.plan)
    record = replace(record, plan=then.plan)
    live.keep_record(trainer, record)
    run.cost = planner.present_cost(live.model_of(trainer), run.imgsz(trainer))
    live.put_aside(trainer, trainer.wdir / round_file(record.rounds[-1].number))
    live.take_for_best(trainer, path, good.fitness, ended)
    live.save_last(trainer, ended)
    return record


def check_delivers(trainer: PruningTrainer, run: RunState, found: Sequence[Stage]) -> None:
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


def take_reference(trainer: PruningTrainer) -> None:
    """Measure the model that the run starts from, where it is trained before the first cut."""
    record = read_record(live.model_of(trainer))
    if record and record.reference is None:
        measured = live.validate(trainer)
        live.keep_record(trainer, replace(record, reference=ranks.agree(lambda: measured)))


def reference(trainer: PruningTrainer, run: RunState, record: Record, before: float | None) -> float | None:
    """Fitness that drops are counted from, if there is a limit: the start's, or better what became of it before cuts.

    Raises:
        RunError: If all of it may be lost.
    """
    limit = run.recipe.limit
    if limit is None:
        return None
    if record.rounds:
        return guard.known(record.rounds[0].reference)
    reference = ranks.agree(lambda: float(max(record.reference or 0.0, trainer.best_fitness or before or 0.0)))
    if reference <= limit:
        raise RunError(
            f"Before its first cut the model has a fitness of {reference:.4f}, which is no more than the drop that is "
            f"allowed ({limit:g}): any cut would hold. Train the model first, or longer before the first cut "
            "(schedule.start)."
        )
    return reference
