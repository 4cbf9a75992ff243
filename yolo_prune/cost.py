# SPDX-License-Identifier: AGPL-3.0-or-later
"""Cost of a model as a function of its tensors' shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from yolo_prune.graph.structure import Graph

Shapes = Mapping[str, tuple[int, ...]]


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
    """

    macs: Mapping[str, float]
    params: frozenset[str]
    shapes: dict[str, tuple[int, ...]]
    imgsz: int
    fixed: float = 0.0

    def flops(self, shapes: Shapes | None = None) -> float:
        """FLOPs (2 x MACs) of one image, with `shapes` in place of this model's where given."""
        return 2 * (self.fixed + sum(weight * self._numel(name, shapes) for name, weight in self.macs.items()))

    def parameters(self, shapes: Shapes | None = None) -> int:
        """Parameters, with `shapes` in place of this model's where given."""
        return sum(self._numel(name, shapes) for name in self.params)

    def total(self, metric: str, shapes: Shapes | None = None) -> float:
        """`flops` or `parameters`, by the name of a recipe's metric: "flops" or "params"."""
        return self.flops(shapes) if metric == "flops" else self.parameters(shapes)

    def _numel(self, name: str, shapes: Shapes | None) -> int:
        return math.prod(shapes.get(name, self.shapes[name]) if shapes else self.shapes[name])


def measure(model: nn.Module, graph: Graph) -> Cost:
    """The cost of a model from what its trace took down. The model is only read."""
    shapes = {n: tuple(t.shape) for n, t in model.state_dict(keep_vars=True).items()}
    return Cost(graph.work, graph.deployed, shapes, graph.imgsz, graph.fixed_work)
