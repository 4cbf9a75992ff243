# SPDX-License-Identifier: AGPL-3.0-or-later
"""From times of layers at some widths to a formula for all widths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain, combinations, product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

STEPS = (1, 2, 4, 8, 16, 32)
"""Multiples that runtimes may work in: of numbers in a vector register, or in a tile of a GPU."""
USUAL = 8
"""Of eight 32-bit numbers a register of AVX2 consists, of eight channels a tile of tensor cores in half precision."""
SURELY = 0.9
"""Steps count as good as the best ones if their error, times this, is no larger.

A choice: the noise of the times moves the errors of like steps by some per cent, and is not to choose between them.
"""

LayerTime = tuple[int, int, float]
"""Channels read, channels put out, milliseconds."""


class Formula(NamedTuple):
    """`base + ins * i + outs * o + both * i * o` milliseconds, of widths rounded up to steps; none is negative."""

    base: float
    ins: float
    outs: float
    both: float


def formula(points: Sequence[LayerTime], steps: tuple[int, int] = (1, 1), depthwise: bool = False) -> Formula:
    """The formula that comes nearest to some times, by relative squares.

    Args:
        points: at least one.
        steps: of the channels read, and of those put out.
        depthwise: both are the same channels.
    """
    return _fit(points, steps, depthwise)[0]


def steps(layers: Mapping[str, tuple[Sequence[LayerTime], bool]]) -> tuple[int, int]:
    """In multiples of what a runtime works: steps of the channels that layers read, and of those they put out.

    Args:
        layers: `{name: (times, depthwise)}`.

    Returns:
        Of those that explain the times of all layers nearly as well as the best ones do, the nearest to the usual ones.
    """
    errors = {
        pair: sum(_fit(points, pair, depthwise)[1] for points, depthwise in layers.values())
        for pair in product(STEPS, STEPS)
    }
    best = min(errors.values())
    good = [pair for pair, error in errors.items() if error * SURELY <= best]
    return min(good, key=lambda pair: (abs(math.log2(max(pair) / USUAL)), pair))


def _fit(points: Sequence[LayerTime], steps: tuple[int, int], depthwise: bool) -> tuple[Formula, float]:
    """A formula, and the sum of its squared relative errors."""
    table = np.array(points, dtype=np.float64)
    ins, outs = (np.ceil(table[:, i] / step) * step for i, step in enumerate(steps))
    if depthwise:
        ins, both = np.zeros_like(ins), np.zeros_like(ins)
    else:
        both = ins * outs
    columns = np.stack([np.ones_like(outs), ins, outs, both], axis=1) / table[:, 2:]
    found, error = _non_negative(columns, np.ones(len(table)))
    return Formula(*map(float, found)), error


def _non_negative(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Least squares without negative coefficients: of all subsets of columns, the best that has none."""
    count = a.shape[1]
    scale = np.maximum(np.abs(a).max(axis=0), 1e-300)
    best, least = np.zeros(count), float(b @ b)
    for chosen in chain.from_iterable(combinations(range(count), n) for n in range(1, count + 1)):
        index = list(chosen)
        found = np.linalg.lstsq(a[:, index] / scale[index], b, rcond=None)[0]
        if (found < 0).any():
            continue
        error = float(np.sum((a[:, index] / scale[index] @ found - b) ** 2))
        if error < least * (1 - 1e-9):
            least = error
            best = np.zeros(count)
            best[index] = found / scale[index]
    return best, least
