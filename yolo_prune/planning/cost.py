# SPDX-License-Identifier: AGPL-3.0-or-later
"""Cost of a model as a function of its tensors' shapes: FLOPs, parameters and, if it was measured, latency."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from yolo_prune.env.image_size import ImageSize
from yolo_prune.errors import PruneError
from yolo_prune.graph.structure import Graph

Shapes = Mapping[str, tuple[int, ...]]


class Term(NamedTuple):
    """Cost of a tensor: `both * d0 * d1 + first * d0 + second * d1`, with sizes rounded up to multiples of `steps`."""

    both: float
    first: float = 0.0
    second: float = 0.0
    steps: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Timing:
    """Latency of a model as a function of its tensors' shapes, as measured in one runtime on one device.

    Attributes:
        terms: `{weight name: milliseconds}`, for the part of the latency that depends on widths.
        fixed: milliseconds that do not depend on any width.
        multiple: a width between two multiples of this takes as long as the larger multiple.
    """

    terms: Mapping[str, Term]
    fixed: float
    multiple: int

    def total(self, shapes: Shapes) -> float:
        """Milliseconds of one forward pass."""
        return self.fixed + sum(_time(term, *shapes[name][:2]) for name, term in self.terms.items())


def _time(term: Term, d0: int, d1: int) -> float:
    d0, d1 = (-(-d // step) * step for d, step in zip((d0, d1), term.steps, strict=True))
    return term.both * d0 * d1 + term.first * d0 + term.second * d1


@dataclass(frozen=True)
class Cost:
    """MACs and parameters as sums over tensors: `macs = sum(weight[t] * numel(t)) + fixed`.

    Only parts that run in deployment count: one of the two branches of an end-to-end head, and no branch that is only
    for training.

    Attributes:
        macs: `{tensor name: MACs per element of the tensor}` for one image.
        fixed: MACs that do not depend on any width.
        params: names of the parameters that count.
        shapes: shapes of all tensors in this model.
        imgsz: image size in pixels for which the MACs are counted.
        timing: the latency as a function of widths, if the target is a latency.
    """

    macs: Mapping[str, float]
    params: frozenset[str]
    shapes: dict[str, tuple[int, ...]]
    imgsz: ImageSize
    fixed: float = 0.0
    timing: Timing | None = None

    def flops(self, shapes: Shapes | None = None) -> float:
        """FLOPs (2 x MACs) of one image. `shapes` replaces the shapes of this model, for the tensors that it has."""
        return 2 * (self.fixed + sum(weight * self._numel(name, shapes) for name, weight in self.macs.items()))

    def parameters(self, shapes: Shapes | None = None) -> int:
        """Number of parameters. `shapes` replaces the shapes of this model, for the tensors that it has."""
        return sum(self._numel(name, shapes) for name in self.params)

    def total(self, metric: str, shapes: Shapes | None = None) -> float:
        """The cost in a recipe's metric: FLOPs for "flops", parameters for "params", milliseconds for "latency".

        Raises:
            PruneError: If `metric` is "latency" and the latency was not measured.
        """
        if metric == "latency":
            return self._timing.total({**self.shapes, **(shapes or {})})
        return self.flops(shapes) if metric == "flops" else self.parameters(shapes)

    def terms(self, metric: str) -> tuple[float, dict[str, Term]]:
        """The summands of a metric: the part that does not depend on any width, and a term for every tensor.

        Raises:
            PruneError: If `metric` is "latency" and the latency was not measured.
        """
        if metric == "latency":
            return self._timing.fixed, dict(self._timing.terms)
        rest = {name: math.prod(shape[2:]) for name, shape in self.shapes.items()}
        if metric == "flops":
            return 2 * self.fixed, {name: Term(2 * macs * rest[name]) for name, macs in self.macs.items()}
        return 0.0, {name: Term(rest[name]) for name in self.params}

    @property
    def _timing(self) -> Timing:
        if self.timing is None:
            raise PruneError(
                "The latency of this model was not measured, so its cost has FLOPs and parameters only. Plan with "
                "target.latency to measure it."
            )
        return self.timing

    def _numel(self, name: str, shapes: Shapes | None) -> int:
        return math.prod(shapes.get(name, self.shapes[name]) if shapes else self.shapes[name])


def cost_of(model: nn.Module, graph: Graph, timing: Timing | None = None) -> Cost:
    """The cost of a model, from the MACs in its graph. The model is not changed."""
    shapes = {n: tuple(t.shape) for n, t in model.state_dict(keep_vars=True).items()}
    return Cost(graph.work, graph.deployed, shapes, graph.imgsz, graph.fixed_work, timing)
