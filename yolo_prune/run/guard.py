# SPDX-License-Identifier: AGPL-3.0-or-later
"""The limit on the drop in fitness: how much the next cut removes, given the fitness after earlier cuts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from yolo_prune.cut.record import RoundFacts
from yolo_prune.errors import RunError
from yolo_prune.recipe import Recipe
from yolo_prune.report.front import round_file

RESOLUTION = 0.005  # a search ends if its two bounds are closer than this, as a fraction of the dense model
EPSILON = 1e-9  # a drop of exactly the limit is allowed


@dataclass(frozen=True)
class Stage:
    """One model of the run: the result of a cut, trained until the next cut.

    Attributes:
        number: number of the cut; 0 is the model that the run starts from.
        keep: size of the model, as a fraction of the dense model.
        fitness: best fitness after the cut, right after recovery or in an epoch; NaN if it is not known yet.
        held: whether the fitness dropped by no more than the limit.
    """

    number: int
    keep: float
    fitness: float
    held: bool

    @property
    def file(self) -> str:
        """Name of the checkpoint with the best epoch of this stage. The file is written when the next stage begins."""
        return round_file(self.number)


def stages(start: float, rounds: Sequence[RoundFacts]) -> list[Stage]:
    """The finished stages. The first one is the model that the run starts from; it always counts as held.

    Args:
        start: size of the model that the run starts from, as a fraction of the dense model.
        rounds: the finished rounds, from the record.
    """
    first = Stage(0, start, first_reference(rounds), True)
    return [
        first,
        *(
            Stage(r.number, recorded(r.keep, "keep"), recorded(r.end, "end"), r.held)
            for r in rounds
            if r.held is not None
        ),
    ]


def recorded(value: float | None, name: str) -> float:
    """A value that the record of a judged round must have.

    Raises:
        RunError: If the record does not have the value.
    """
    if value is None:
        raise RunError(
            f"The pruning record of this run is damaged: a round has no '{name}'. Resume from another checkpoint of "
            "the run, or start the run again."
        )
    return value


def first_reference(rounds: Sequence[RoundFacts]) -> float:
    """The fitness that drops are counted from; NaN before the first round, and in a run without a limit."""
    reference = rounds[0].reference if rounds else None
    return math.nan if reference is None else reference


def last_good(finished: Sequence[Stage]) -> Stage:
    """The stage to roll back to: the smallest stage that held."""
    return [s for s in finished if s.held][-1]


def holds(fitness: float, reference: float, limit: float) -> bool:
    """True if a fitness is at most `limit` below the reference."""
    return fitness >= reference - limit - EPSILON


def next_keep(finished: Sequence[Stage], planned: float | None, floor: float, target: float | None) -> float:
    """The size that the next cut leaves, as a fraction of the dense model.

    With a target, the cuts follow the schedule until a stage fails to hold. After that, each cut starts from the last
    stage that held, and its step is half of the step that failed. Without a target, the size is halfway between the
    smallest size that held and the largest size that failed.

    Args:
        finished: the finished stages.
        planned: the size that the schedule gives for this round; None in a search.
        floor: the smallest size that the constraints allow.
        target: the size to reach in the end; None to search for the smallest size that holds.
    """
    if planned is None or target is None:
        return (last_good(finished).keep + max([s.keep for s in finished if not s.held], default=floor)) / 2
    step, good = None, finished[0].keep
    for stage in finished[1:]:
        if stage.held:
            good = stage.keep
        else:
            step = (good - stage.keep) / 2
    return planned if step is None else max(target, good - step)


def tolerance(finished: Sequence[Stage], keep: float, usual: float) -> float:
    """The allowed error of a cut, as a fraction of `keep`: at most half of the distance to a size that failed."""
    nearest = max([s.keep for s in finished if not s.held and s.keep < keep], default=0.0)
    return min(usual, (keep - nearest) / 2 / keep)


def search_is_over(finished: Sequence[Stage]) -> bool:
    """True if the bounds of a search are closer than `RESOLUTION`: the smallest size that holds is known."""
    failed = [s.keep for s in finished if not s.held]
    return bool(failed) and last_good(finished).keep - max(failed) < RESOLUTION


def is_known_to_fail(finished: Sequence[Stage], keep: float) -> bool:
    """True if a model of this size or a larger model has failed to hold."""
    return any(not s.held and keep <= s.keep + EPSILON for s in finished)


def stops_on_breach(recipe: Recipe, finished: Sequence[Stage]) -> bool:
    """True if a round failed to hold, and the recipe says to stop in this case (`guard.on_breach`)."""
    stops = recipe.guard.on_breach == "stop" and not recipe.searches
    return stops and any(not s.held for s in finished)


def structure_changes(verdicts: Sequence[bool | None]) -> int:
    """How often the structure of the model has changed: once for each cut, and once for each rollback.

    Args:
        verdicts: for each cut, whether it held; None if that is not known.
    """
    return len(verdicts) + sum(held is False for held in verdicts)
