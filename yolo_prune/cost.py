# SPDX-License-Identifier: AGPL-3.0-or-later
"""Cost of a model as a function of its tensors' shapes, from the sizes recorded in one weightless forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from yolo_prune.errors import PruneError
from yolo_prune.graph.scope import weightless_tree
from yolo_prune.graph.structure import Graph

BATCHNORM_MACS = 4  # per element, as thop (and so Ultralytics) counts an affine batch norm


@dataclass(frozen=True)
class Cost:
    """MACs and parameters as sums over tensors: `macs = sum(weight[t] * numel(t))`.

    Only what runs in deployment counts: of the two copies of an end-to-end head's towers, one.

    Attributes:
        macs: `{tensor name: MACs per element of the tensor}` for one image.
        params: names of the parameters that count.
        shapes: shapes of all tensors in this model.
        imgsz: image height and width in pixels the MACs are for.
    """

    macs: dict[str, float]
    params: frozenset[str]
    shapes: dict[str, tuple[int, ...]]
    imgsz: int

    def flops(self, shapes: Mapping[str, tuple[int, ...]] | None = None) -> float:
        """FLOPs (2 x MACs) of one image, with `shapes` in place of this model's where given."""
        return 2 * sum(weight * self._numel(name, shapes) for name, weight in self.macs.items())

    def parameters(self, shapes: Mapping[str, tuple[int, ...]] | None = None) -> int:
        """Parameters, with `shapes` in place of this model's where given."""
        return sum(self._numel(name, shapes) for name in self.params)

    def _numel(self, name: str, shapes: Mapping[str, tuple[int, ...]] | None) -> int:
        shape = shapes.get(name, self.shapes[name]) if shapes else self.shapes[name]
        count = 1
        for size in shape:
            count *= size
        return count


def measure(model: nn.Module, graph: Graph, imgsz: int = 640) -> Cost:
    """Record the output size of every layer at `imgsz` x `imgsz` and turn it into a `Cost`. The model is only read.

    Raises:
        PruneError: If the model cannot take images of that size.
    """
    stride = int(max(getattr(model, "stride", (32,))))
    if not isinstance(imgsz, int) or imgsz < 1 or imgsz % stride:
        raise PruneError(f"imgsz: must be a multiple of {stride}, got {imgsz}.")
    positions = _positions(model, imgsz)
    macs: dict[str, float] = {}
    for name, layer in model.named_modules():
        if name not in positions or name.startswith(graph.spare):
            continue
        per_element = BATCHNORM_MACS if isinstance(layer, nn.BatchNorm2d) else 1
        macs[f"{name}.weight"] = float(per_element * positions[name])
    for extra in graph.extra_costs:
        macs[extra.tensor] = macs.get(extra.tensor, 0.0) + extra.per_element(positions)
    params = frozenset(n for n, _ in model.named_parameters() if not n.startswith(graph.spare))
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    return Cost(macs, params, shapes, imgsz)


def _positions(model: nn.Module, imgsz: int) -> dict[str, int]:
    """Output positions (height x width) of every convolution and batch norm that runs."""
    twin = weightless_tree(model).train()  # in training mode the head returns raw maps, nothing is decoded
    found: dict[str, int] = {}
    first = None
    for name, layer in twin.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.training = False
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
            first = first or layer
            layer.register_forward_hook(
                lambda _, __, out, name=name: found.__setitem__(name, out.shape[-2] * out.shape[-1])
            )
    channels = first.in_channels if isinstance(first, nn.Conv2d) else 3
    with torch.no_grad():
        twin(torch.empty(1, channels, imgsz, imgsz, device="meta"))
    return found
