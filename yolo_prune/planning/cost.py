# SPDX-License-Identifier: AGPL-3.0-or-later
"""Cost of a model as a function of its tensors' shapes: FLOPs, parameters, and time where it was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from yolo_prune.errors import PruneError
from yolo_prune.graph.structure import Graph

Shapes = Mapping[str, tuple[int, ...]]


class Term(NamedTuple):
    """What a tensor costs: `both * d0 * d1 + first * d0 + second * d1`, each size rounded up to multiples of a step."""

    both: float
    first: float = 0.0
    second: float = 0.0
    steps: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Timing:
    """Time of a model as a function of its tensors' shapes, as measured in one runtime on one device.

    Attributes:
        terms: `{weight name: milliseconds}`, for what depends on widths.
        fixed: milliseconds that no width changes.
        multiple: widths between multiples of this take as long as the next one.
    """

    terms: Mapping[str, Term]
    fixed: float
    multiple: int

    def total(self, shapes: Shapes) -> float:
        """Milliseconds of one pass."""
        return self.fixed + sum(_time(term, *shapes[name][:2]) for name, term in self.terms.items())


def _time(term: Term, d0: int, d1: int) -> float:
    d0, d1 = (-(-d // step) * step for d, step in zip((d0, d1), term.steps, strict=True))
    return term.both * d0 * d1 + term.first * d0 + term.second * d1


@dataclass(frozen=True)
class Cost:
    """MACs and parameters as sums over tensors: `macs = sum(weight[t] * numel(t)) + fixed`.

    Only what runs in deployment counts: of the two copies of an end-to-end head's towers, one; no branch that is there
    for training alone.

    Attributes:
        macs: `{tensor name: MACs per element of the tensor}` for one image.
        fixed: MACs that no width changes.
        params: names of the parameters that count.
        shapes: shapes of all tensors in this model.
        imgsz: image height and width in pixels the MACs are for.
        timing: what takes how long, where the target is a latency.
    """

    macs: Mapping[str, float]
    params: frozenset[str]
    shapes: dict[str, tuple[int, ...]]
    imgsz: int
    fixed: float = 0.0
    timing: Timing | None = None

    def flops(self, shapes: Shapes | None = None) -> float:
        """FLOPs (2 x MACs) of one image, with `shapes` in place of this model's where given."""
        return 2 * (self.fixed + sum(weight * self._numel(name, shapes) for name, weight in self.macs.items()))

    def parameters(self, shapes: Shapes | None = None) -> int:
        """Parameters, with `shapes` in place of this model's where given."""
        return sum(self._numel(name, shapes) for name in self.params)

    def total(self, metric: str, shapes: Shapes | None = None) -> float:
        """FLOPs, parameters or milliseconds, by the name of a recipe's metric: "flops", "params" or "latency".

        Raises:
            PruneError: If the latency is asked for, and was not measured.
        """
        if metric == "latency":
            return self._timing.total({**self.shapes, **(shapes or {})})
        return self.flops(shapes) if metric == "flops" else self.parameters(shapes)

    def terms(self, metric: str) -> tuple[float, dict[str, Term]]:
        """What a metric is the sum of: what no width changes, and a term for every tensor.

        Raises:
            PruneError: If the metric is the latency, and was not measured.
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
            raise PruneError("The latency of this model was not measured: its cost knows FLOPs and parameters only.")
        return self.timing

    def _numel(self, name: str, shapes: Shapes | None) -> int:
        return math.prod(shapes.get(name, self.shapes[name]) if shapes else self.shapes[name])


def measure(model: nn.Module, graph: Graph, timing: Timing | None = None) -> Cost:
    """The cost of a model from what its trace took down. The model is only read."""
    shapes = {n: tuple(t.shape) for n, t in model.state_dict(keep_vars=True).items()}
    return Cost(graph.work, graph.deployed, shapes, graph.imgsz, graph.fixed_work, timing)
