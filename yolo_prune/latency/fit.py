# SPDX-License-Identifier: AGPL-3.0-or-later
"""Fits a formula for all widths to the times of a layer at some widths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain, combinations, product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

STEPS = (1, 2, 4, 8, 16, 32)
"""Steps in which runtimes may process channels: the size of a vector register, or of a tile of a GPU kernel."""
USUAL = 8
"""The usual step: an AVX2 register has eight 32-bit numbers, a tile of FP16 tensor cores has eight channels."""
SURELY = 0.9
"""Steps are as good as the best steps if their error times this factor is not larger than the best error.

This value is a choice: the noise of the times changes the errors of similar steps by some per cent, and noise must not
decide between them.
"""

LayerTime = tuple[int, int, float]
"""Input channels, output channels, milliseconds."""


class Formula(NamedTuple):
    """`base + ins * i + outs * o + both * i * o` milliseconds for `i` input and `o` output channels.

    `i` and `o` are rounded up to steps. No coefficient is negative.
    """

    base: float
    ins: float
    outs: float
    both: float


def formula(points: Sequence[LayerTime], steps: tuple[int, int] = (1, 1), depthwise: bool = False) -> Formula:
    """The formula with the least sum of squared relative errors.

    Args:
        points: one or more measured times.
        steps: steps of the input channels and of the output channels.
        depthwise: input and output channels are the same.
    """
    return _fit(points, steps, depthwise)[0]


def steps(layers: Mapping[str, tuple[Sequence[LayerTime], bool]]) -> tuple[int, int]:
    """Find the steps of a runtime: the multiples to which it rounds up input channels and output channels.

    Args:
        layers: `{name: (times, depthwise)}`.

    Returns:
        Among the steps that explain the times of all layers about as well as the best steps: those nearest to `USUAL`.
    """
    errors = {
        pair: sum(_fit(points, pair, depthwise)[1] for points, depthwise in layers.values())
        for pair in product(STEPS, STEPS)
    }
    best = min(errors.values())
    good = [pair for pair, error in errors.items() if error * SURELY <= best]
    return min(good, key=lambda pair: (abs(math.log2(max(pair) / USUAL)), pair))


def _fit(points: Sequence[LayerTime], steps: tuple[int, int], depthwise: bool) -> tuple[Formula, float]:
    """The best formula, and the sum of its squared relative errors."""
    table = np.array(points, dtype=np.float64)
    ins, outs = (np.ceil(table[:, i] / step) * step for i, step in enumerate(steps))
    if depthwise:
        ins, both = np.zeros_like(ins), np.zeros_like(ins)
    else:
        both = ins * outs
    columns = np.stack([np.ones_like(outs), ins, outs, both], axis=1) / table[:, 2:]
    coefficients, error = _non_negative(columns, np.ones(len(table)))
    return Formula(*map(float, coefficients)), error


def _non_negative(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Least squares without negative coefficients: the best non-negative solution of all subsets of columns.

    Returns:
        The coefficients, and the sum of squared errors.
    """
    count = a.shape[1]
    scale = np.maximum(np.abs(a).max(axis=0), 1e-300)
    best, least = np.zeros(count), float(b @ b)
    for chosen in chain.from_iterable(combinations(range(count), n) for n in range(1, count + 1)):
        index = list(chosen)
        coefficients = np.linalg.lstsq(a[:, index] / scale[index], b, rcond=None)[0]
        if (coefficients < 0).any():
            continue
        error = float(np.sum((a[:, index] / scale[index] @ coefficients - b) ** 2))
        if error < least * (1 - 1e-9):
            least = error
            best = np.zeros(count)
            best[index] = coefficients / scale[index]
    return best, least
