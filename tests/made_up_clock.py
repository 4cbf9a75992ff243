# SPDX-License-Identifier: AGPL-3.0-or-later
"""A device on which models take as long as a law says, without being run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import models
import numpy as np
import pytest
from small_data import IMGSZ
from torch import nn

from yolo_prune.latency import probe, search, target
from yolo_prune.latency.fit import LayerTime
from yolo_prune.latency.layers import Layer, distinct, layers_of
from yolo_prune.latency.profile import Place, Table
from yolo_prune.latency.stopwatch import Measured
from yolo_prune.measure.clock import Interval
from yolo_prune.measure.subjects import Setting
from yolo_prune.planning import planner

PLACE = Place(format="torch", runtime="torch", hardware="somewhere", device="cpu", threads=1, batch=1, quantize=32)


def made_up(layer: Layer, each: tuple[int, int], noise: float = 0.0) -> list[LayerTime]:
    """Times of a runtime that works in multiples: 1e-4 ms, and 1e-8 ms a multiplication, 1e-7 a value moved."""
    pixels = int(np.prod(layer.size)) * (int(np.prod(layer.kernel)) if layer.kernel else 1)
    rng, found = np.random.default_rng(len(layer.key)), []
    for ins, outs in layer.widths():
        i, o = (-(-width // step) * step for width, step in zip((ins, outs), each, strict=True))
        work = o if layer.depthwise else i * o
        time = 1e-4 + pixels * (1e-8 * work + 1e-7 * (0 if layer.depthwise else i) + 1e-7 * o)
        found.append((ins, outs, float(time * (1 + noise * rng.standard_normal()))))
    return found


@functools.cache
def layers(name: str = "yolo11n") -> dict[str, list[Layer]]:
    """Of a model at the image size of tests."""
    return layers_of(models.shared(name), IMGSZ)


def table(each: tuple[int, int] = (1, 1), name: str = "yolo11n", noise: float = 0.0) -> Table:
    """Times of these layers."""
    return Table(place=PLACE, layers={layer.key: made_up(layer, each, noise) for layer in distinct(layers(name))})


class Clock:
    """Stands in for the stopwatch: a model takes as long as its FLOPs say, by a law of its own."""

    def __init__(self, law: Callable[[float], float]) -> None:
        self.law, self.asked = law, 0

    def __call__(self, dense: nn.Module, format: str, setting: Setting) -> Clock:
        self.dense = planner.present_cost(dense, IMGSZ)[0]
        return self

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def measure(self, cuts: Sequence[nn.Module]) -> list[Measured]:
        self.asked += 1
        ratios = [float(self.law(planner.present_cost(cut, IMGSZ)[0] / self.dense)) for cut in cuts]
        return [Measured(10.0, 10 * ratio, Interval(ratio, ratio, ratio)) for ratio in ratios]


def install(patch: pytest.MonkeyPatch, law: Callable[[float], float] = lambda flops: 0.1 + 0.9 * flops) -> None:
    """Let layers and models be timed there."""
    patch.setattr(probe, "_time", lambda layer, *_: made_up(layer, (1, 1)))
    for module in (target, search):
        patch.setattr(module, "Stopwatch", Clock(law))
