# SPDX-License-Identifier: AGPL-3.0-or-later
"""Times models side by side, and computes medians and intervals from the times. Times are in seconds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

Pass = Callable[[], object]
"""Runs one forward pass of a model, and returns when the results are ready."""
Clock = Callable[[], float]
CONFIDENCE = 0.95
"""Confidence of the intervals of ratios: the usual 95 %."""
LEAST, MOST = 10, 300
"""Minimum and maximum number of rounds, if the number is not given.

These values are a choice. The interval of a median needs at least six rounds (see `_tail`); with ten rounds it leaves
out the smallest and the largest value. 300 rounds gave a ratio to +- 0.004 (see docs/), which is less than the ratio
changes from one hour to the next.
"""


class Interval(NamedTuple):
    """A median, and the lower and upper end of its interval."""

    median: float
    low: float
    high: float


def warm_up(runs: Sequence[Pass], *, seconds: float = 1.0, least: int = 3, clock: Clock = time.perf_counter) -> float:
    """Run rounds whose times do not count, until processor clocks have risen and caches are filled.

    Args:
        runs: one pass per model.
        seconds: minimum duration.
        least: minimum number of rounds. Runtimes that compile during the first passes have finished by then.
        clock: returns the time in seconds.

    Returns:
        Median duration of a round in seconds.
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
    """Number of rounds of the given duration that fit into a budget, between `LEAST` and `MOST`."""
    return max(LEAST, min(MOST, int(budget / seconds) if seconds > 0 else MOST))


def interleave(
    runs: Sequence[Pass], rounds: Iterable[object], *, clock: Clock = time.perf_counter
) -> list[list[float]]:
    """Time models in turn, each once per round, so that a slow phase of the machine affects all models equally.

    Args:
        runs: one pass per model.
        rounds: an iterable with one item per round; it may show a progress bar.
        clock: returns the time in seconds.

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
    """Median with the first and third quartile; a single time is all three."""
    if len(times) < 2:
        return Interval(times[0], times[0], times[0])
    first, median, third = statistics.quantiles(times, n=4, method="inclusive")
    return Interval(median, first, third)


def paired_ratio(times: Sequence[float], reference: Sequence[float]) -> Interval:
    """Ratio of the times of two models in the same rounds.

    Args:
        times: times of the model, one per round.
        reference: times of the other model, in the same rounds.

    Returns:
        The median of the ratios of all rounds, and its 95 % confidence interval. Fewer than six rounds do not allow
        such an interval: it is then from the smallest to the largest ratio.
    """
    ratios = sorted(a / b for a, b in zip(times, reference, strict=True))
    skip = max(_tail(len(ratios)) - 1, 0)
    return Interval(statistics.median(ratios), ratios[skip], ratios[-1 - skip])


def _tail(count: int) -> int:
    """The largest k for which the median lies between the k-th smallest and k-th largest value with `CONFIDENCE`.

    Each of the `count` values is above the true median with probability 1/2, whatever the distribution, so a binomial
    distribution gives k. The result is 0 if even the smallest and largest value do not reach the confidence.
    """
    below, k = 0, 0
    while k <= count // 2 and (below := below + math.comb(count, k)) / 2**count <= (1 - CONFIDENCE) / 2:
        k += 1
    return k
