# SPDX-License-Identifier: AGPL-3.0-or-later
"""When the model is cut, and how much each cut removes: pure functions of the recipe and the number of epochs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from yolo_prune import criteria
from yolo_prune.errors import ScheduleError
from yolo_prune.recipe import Recipe, Schedule

DEFAULT_ROUNDS = 3
_WITH_LAST = ", and an epoch to train the result,"
SEARCH_ROUNDS = 5  # bisection: the result is larger than the smallest possible size by at most 3 % of the dense model


@dataclass(frozen=True)
class Round:
    """One cut, or the end of a search.

    Attributes:
        number: number of the round, counted from 1.
        epoch: the cut is made at the start of this epoch, counted from 0.
        keep: size after the cut, as a fraction of the dense model; None in a search, which decides the size later.
        settles: whether this ends a search: there is no cut, and the result is trained for the rest of the run.
    """

    number: int
    epoch: int
    keep: float | None
    settles: bool = False


def rounds(recipe: Recipe, epochs: int, present: float = 1.0) -> tuple[Round, ...]:
    """The rounds of a run. `lay_out` spreads them over the epochs.

    If the recipe does not set the start, the first cut waits for the steps that must come before it: the epoch of a
    rewind, or sparse training. Each of them takes at least a quarter of the run. If the recipe does not set the number
    of rounds and the weights are refitted, there is only one round, so that more epochs follow the cut. A run with a
    guard needs several rounds, so that there is a model to roll back to.

    Args:
        recipe: the recipe of the run.
        epochs: number of epochs of the run.
        present: fraction of the dense model that the run starts from.

    Raises:
        ScheduleError: If the rounds do not fit the epochs of the run.
    """
    asked, early = recipe.schedule, recipe.recover.rewind
    if early and early.epoch > epochs - 2:
        raise ScheduleError(
            f"recover.rewind.epoch: {early.epoch}, counted from 0, leaves no epoch for a cut and the training after it "
            f"in a run of {epochs} epochs. Set it to at most {epochs - 2}, or train longer."
        )
    if asked.start is None and (early or sparsity(recipe)):
        start = max(delayed_start(epochs), early.epoch + 1 if early else 0)
        asked = asked.model_copy(update={"start": start})
    if asked.rounds is None and recipe.recover.refit and recipe.limit is None:
        asked = asked.model_copy(update={"rounds": 1})
    return lay_out(asked, recipe.keep, epochs, present)


def sparsity(recipe: Recipe) -> float:
    """Weight of the L1 norm of batch norm scales before the last cut; 0 if the recipe does not ask for one."""
    if recipe.target is None:
        return 0.0
    return float(getattr(criteria.create(recipe.criterion.name, recipe.criterion.options), "sparsity", 0.0))


def lay_out(schedule: Schedule, target: float | None, epochs: int, present: float = 1.0) -> tuple[Round, ...]:
    """Lay out the rounds of a run.

    Cubic is the curve of "To prune, or not to prune" (Zhu & Gupta 2017, arXiv:1710.01878): most is removed early, while
    there is time to recover.

    Args:
        schedule: as the recipe gives it.
        target: fraction of the dense model to keep in the end; None to search for it, and then to train the result.
        epochs: epochs of the run.
        present: fraction of the dense model that the run starts from.

    Returns:
        The rounds in order, each in a different epoch. The last one keeps `target`.

    Raises:
        ScheduleError: If the rounds do not fit. The message says what would fit.
    """
    search = target is None
    default = SEARCH_ROUNDS if search else 1 if schedule.curve == "one-shot" else DEFAULT_ROUNDS
    count = (schedule.rounds or default) + search
    start = schedule.start or 0
    if count > epochs - start:
        room = epochs - start - search
        fit = f"at most {room} rounds fit" if room > 0 else "no round fits"
        ways = {"set fewer schedule.rounds": room > 0, "lower schedule.start": start > 0, "train longer": True}
        advice = " or ".join(way for way, helps in ways.items() if helps)
        raise ScheduleError(
            f"schedule: {count - search} rounds{_WITH_LAST * search} from epoch {start} need at least {start + count} "
            f"epochs, and the run has {epochs}; {fit}. {advice.capitalize()}."
        )
    cuts = _epochs(schedule, count, start, epochs, search)
    if cuts[-1] > epochs - 1:
        longest = (epochs - 1 - start) // (count - 1)
        raise ScheduleError(
            f"schedule.interval: with interval {schedule.interval} the last of {count} rounds falls on epoch "
            f"{cuts[-1]}, counted from 0, and the run has {epochs} epochs. Set the interval to at most {longest}, "
            "give fewer rounds, or train longer."
        )
    if target is None:
        return tuple(Round(i, e, None, settles=i == count) for i, e in enumerate(cuts, 1))
    shares = [_removed(schedule.curve, i / count) for i in range(1, count + 1)]
    keeps = [present - (present - target) * share for share in shares[:-1]] + [target]
    return tuple(Round(i, e, k) for i, (e, k) in enumerate(zip(cuts, keeps, strict=True), 1))


def delayed_start(epochs: int) -> int:
    """Epoch of the first cut after a rewind epoch or sparse training: a quarter of the epochs, but at least 1."""
    return max(epochs // 4, 1)


def learning_rate_factor(epoch: int, rounds: Sequence[Round], epochs: int, lf: Callable[[float], float]) -> float:
    """The factor of the learning rate in an epoch, if its schedule restarts at each cut.

    Learning rate rewinding, after "Comparing Rewinding and Fine-tuning in Neural Network Pruning" (Renda et al., ICLR
    2020, arXiv:2003.02389): the whole schedule is run before the first cut, between two cuts and after the last cut.

    Args:
        epoch: number of the epoch, counted from 0.
        rounds: the rounds of the run.
        epochs: number of epochs of the run.
        lf: the schedule over the whole run: a function from the epoch, which may be a fraction, to the factor.
    """
    begin = max((r.epoch for r in rounds if r.epoch <= epoch), default=0)
    end = min((r.epoch for r in rounds if r.epoch > epoch), default=epochs)
    return lf((epoch - begin) * epochs / (end - begin))


def _epochs(schedule: Schedule, count: int, start: int, epochs: int, search: bool) -> list[int]:
    if schedule.interval is not None:
        return [start + i * schedule.interval for i in range(count)]
    # Spread the cuts from `start` over the first half of the run (in a search: the first two thirds). If this span is
    # too short, there is one cut in each epoch.
    intervals = count - search
    span = max(epochs * (2 / 3 if search else 1 / 2) - start, intervals)
    cuts = [start + int(i * span / intervals) for i in range(count)]
    if any(a >= b for a, b in pairwise(cuts)):
        cuts = [start + i for i in range(count)]
    return cuts


def _removed(curve: str, progress: float) -> float:
    """Share of all removed channels that is removed after a share `progress` of the rounds."""
    return progress if curve == "linear" else 1 - (1 - progress) ** 3
