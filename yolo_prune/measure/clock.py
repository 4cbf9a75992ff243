# SPDX-License-Identifier: AGPL-3.0-or-later
"""How long models take, side by side: the clock, and what may be concluded from it. Times are seconds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

Pass = Callable[[], object]
"""One pass of a model; returns when its results are there."""
Clock = Callable[[], float]
CONFIDENCE = 0.95
"""Of the intervals that go with ratios: the usual one."""
LEAST, MOST = 10, 300
"""Rounds, where nobody says how many.

A choice. The interval of a median takes six rounds to exist (see `_tail`), and of ten it leaves out the smallest and
the largest. 300 rounds gave a ratio to +- 0.004 (README), less than it moves by from one hour to the next.
"""


class Interval(NamedTuple):
    """A median, and the ends of what it is given with."""

    median: float
    low: float
    high: float


def warm_up(runs: Sequence[Pass], *, seconds: float = 1.0, least: int = 3, clock: Clock = time.perf_counter) -> float:
    """Go round for a while without looking; returns how long a round usually took, in seconds.

    Args:
        runs: one per model.
        seconds: that this takes at least: clocks rise and caches fill.
        least: rounds, also where these take longer. Runtimes that compile on the way are through by then.
        clock: in seconds.
    """
    began = clock()
    rounds: list[float] = []
    while len(rounds) < least or clock() - began < seconds:
        start = clock()
        for run in runs:
            run()
        rounds.append(clock() - start)
    return statistics.median(rounds)


def rounds_for(seconds: float, budget: float) -> int:
    """How many rounds of so many seconds fit into a budget, within `LEAST` and `MOST`."""
    return max(LEAST, min(MOST, int(budget / seconds) if seconds > 0 else MOST))


def interleave(
    runs: Sequence[Pass], rounds: Iterable[object], *, clock: Clock = time.perf_counter
) -> list[list[float]]:
    """Time models in turn, each once a round, so that whatever slows the machine down meets all of them alike.

    Args:
        runs: one per model.
        rounds: gone through once, for its length alone; may show how far it is.
        clock: in seconds.

    Returns:
        `times[model][round]` in seconds.
    """
    times: list[list[float]] = [[] for _ in runs]
    for _ in rounds:
        for run, own in zip(runs, times, strict=True):
            start = clock()
            run()
            own.append(clock() - start)
    return times


def quartiles(times: Sequence[float]) -> Interval:
    """Median, first and third quartile; of a single time, that time."""
    if len(times) < 2:
        return Interval(times[0], times[0], times[0])
    first, median, third = statistics.quantiles(times, n=4, method="inclusive")
    return Interval(median, first, third)


def paired_ratio(times: Sequence[float], reference: Sequence[float]) -> Interval:
    """By what factor a model takes longer than another in the same round.

    Args:
        times: of the model, round by round.
        reference: of the other, in the same rounds.

    Returns:
        The median of the ratios of all rounds, and its 95 % confidence interval; of fewer than six rounds, which do not
        allow one, the smallest and the largest ratio.
    """
    ratios = sorted(a / b for a, b in zip(times, reference, strict=True))
    skip = max(_tail(len(ratios)) - 1, 0)
    return Interval(statistics.median(ratios), ratios[skip], ratios[-1 - skip])


def _tail(count: int) -> int:
    """The k for which the k-th smallest and k-th largest of `count` values hold their median with `CONFIDENCE`.

    Each value is as likely above the median as below, whatever its distribution, so this is a matter of coin tosses;
    0 where even the extremes do not hold it surely enough.
    """
    allowed, below, k = (1 - CONFIDENCE) / 2 * 2**count, 0, 0
    while k <= count // 2 and (below := below + math.comb(count, k)) <= allowed:
        k += 1
    return k
