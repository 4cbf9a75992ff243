# SPDX-License-Identifier: AGPL-3.0-or-later
"""When a recipe cuts, in a run of so many epochs."""

from __future__ import annotations

from yolo_prune import criteria, schedule
from yolo_prune.errors import ScheduleError
from yolo_prune.recipe import Recipe


def sparsity(recipe: Recipe) -> float:
    """Weight of the L1 norm of batch norm scales in training up to the last cut; 0 where nobody asks for it."""
    return float(getattr(criteria.create(recipe.criterion.name, recipe.criterion.options), "sparsity", 0.0))


def rounds(recipe: Recipe, epochs: int, present: float = 1.0) -> tuple[schedule.Round, ...]:
    """The rounds of a run; see `schedule.rounds`.

    Where the recipe does not say when to begin, what has to come before the first cut does: the weights to rewind to,
    sparse training, and in either case a quarter of the run. Where it does not say how many, and the weights are
    refitted, it is one: the epochs are better spent after it. A guard needs more, to have something to go back to.

    Raises:
        ScheduleError: If they do not fit the epochs of the run.
    """
    asked, early = recipe.schedule, recipe.recover.rewind
    if early and early.epoch > epochs - 2:
        raise ScheduleError(
            f"recover.rewind.epoch: {early.epoch}, counted from 0, leaves no epoch for a cut and what follows in a run "
            f"of {epochs}. It can be at most {epochs - 2}, or train longer."
        )
    if asked.start is None and (early or sparsity(recipe)):
        start = max(schedule.quarter(epochs), early.epoch + 1 if early else 0)
        asked = asked.model_copy(update={"start": start})
    if asked.rounds is None and recipe.recover.refit and recipe.limit is None:
        asked = asked.model_copy(update={"rounds": 1})
    return schedule.rounds(asked, recipe.target.keep, epochs, present)
