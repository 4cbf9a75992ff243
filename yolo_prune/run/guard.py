# SPDX-License-Identifier: AGPL-3.0-or-later
"""A limit on the drop: how far the next cut goes, given how the models before it did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from yolo_prune.cut.record import RoundFacts
from yolo_prune.recipe import Recipe
from yolo_prune.report.front import round_file

RESOLUTION = 0.005  # of a search, as a fraction of the dense model
EPSILON = 1e-9  # a drop of exactly the limit is allowed


@dataclass(frozen=True)
class Stage:
    """A model that the run has been at: what a cut left, trained up to the next one.

    Attributes:
        number: of the cut; 0 is the model that the run started from.
        keep: fraction of the dense model.
        fitness: the best of its epochs, or as it was recovered before them; NaN where it is not known yet.
        held: it dropped by no more than the limit.
    """

    number: int
    keep: float
    fitness: float
    held: bool

    @property
    def file(self) -> str:
        """Name of the checkpoint that its best epoch is kept in, once the run has gone on to another stage."""
        return round_file(self.number)


def stages(start: float, rounds: Sequence[RoundFacts]) -> list[Stage]:
    """The stages that are over; the start comes first, and always counts as one that held.

    Args:
        start: fraction of the dense model that the run started from.
        rounds: those that are finished, as the record holds them.
    """
    first = Stage(0, start, known(rounds[0].reference) if rounds else math.nan, True)
    return [first, *(Stage(r.number, known(r.keep), known(r.end), r.held) for r in rounds if r.held is not None)]


def known(value: float | None) -> float:
    """A figure that a round left, as a number: NaN if it is not known."""
    return math.nan if value is None else value


def last_good(found: Sequence[Stage]) -> Stage:
    """The stage to go back to: the smallest that held."""
    return [s for s in found if s.held][-1]


def holds(fitness: float, reference: float, limit: float) -> bool:
    """True if a fitness is at most `limit` below the reference."""
    return fitness >= reference - limit - EPSILON


def next_keep(found: Sequence[Stage], planned: float | None, floor: float, target: float | None) -> float:
    """The fraction of the dense model that the next cut leaves.

    With a target: what was planned, until a stage did not hold; then, from the last good one on, steps of half the size
    that was too much. Without: halfway between the smallest that held and the largest that did not.

    Args:
        found: the stages that are over.
        planned: fraction that the schedule has for this round.
        floor: the least fraction that the constraints allow.
        target: fraction to reach in the end; None to search for the smallest that holds.
    """
    if planned is None or target is None:
        return (last_good(found).keep + max([s.keep for s in found if not s.held], default=floor)) / 2
    step, good = None, found[0].keep
    for stage in found[1:]:
        if stage.held:
            good = stage.keep
        else:
            step = (good - stage.keep) / 2
    return planned if step is None else max(target, good - step)


def tolerance(found: Sequence[Stage], keep: float, usual: float) -> float:
    """How far from `keep` a cut may come out, as a fraction of it: never as far as halfway to a size that failed."""
    nearest = max([s.keep for s in found if not s.held and s.keep < keep], default=0.0)
    return min(usual, (keep - nearest) / 2 / keep)


def is_found(found: Sequence[Stage]) -> bool:
    """True if a search cannot come much closer to the smallest that holds."""
    failed = [s.keep for s in found if not s.held]
    return bool(failed) and last_good(found).keep - max(failed) < RESOLUTION


def is_known_to_fail(found: Sequence[Stage], keep: float) -> bool:
    """True if a model of this size, or a larger one, has failed to hold."""
    return any(not s.held and keep <= s.keep + EPSILON for s in found)


def is_over(recipe: Recipe, found: Sequence[Stage]) -> bool:
    """True if a round was too much, and the recipe says to leave it at that."""
    stops = recipe.guard.on_breach == "stop" and recipe.target.keep is not None
    return stops and any(not s.held for s in found)


def turns(verdicts: Sequence[bool | None]) -> int:
    """How often the structure of the model has changed: once for each cut, once for each way back.

    Args:
        verdicts: for each cut, whether it held; None where that is not known.
    """
    return len(verdicts) + sum(held is False for held in verdicts)
