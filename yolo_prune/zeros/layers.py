# SPDX-License-Identifier: AGPL-3.0-or-later
"""The layers of a model in which single weights may become zero, and the reasons why others are left as they are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from ultralytics.nn.modules.block import RepVGGDW
from ultralytics.nn.modules.conv import RepConv

from yolo_prune.cut.census import weighted_layers
from yolo_prune.data import layer_samples
from yolo_prune.graph import named
from yolo_prune.recover.scope import inside
from yolo_prune.zeros.patterns import Pattern


@dataclass(frozen=True)
class SparseLayer:
    """A layer whose weights may become zero.

    Attributes:
        name: name of the layer.
        layer: the layer.
        merged: name and layer of the smaller kernel that an export adds to this one, at its centre. Zeros are shared:
            the added kernel has them only where both are zero.
    """

    name: str
    layer: nn.Module
    merged: tuple[str, nn.Module] | None = None

    @property
    def weight(self) -> Tensor:
        """The weight of the layer."""
        return self.layer.weight  # type: ignore[return-value]

    @property
    def tensor(self) -> str:
        """Name of the weight."""
        return f"{self.name}.weight"

    def spread(self, small: Tensor) -> Tensor:
        """A tensor in the shape of the smaller kernel, in the shape of this one, with zeros around."""
        high, wide = (a - b for a, b in zip(self.weight.shape[2:], small.shape[2:], strict=True))
        return F.pad(small, (wide // 2, wide - wide // 2, high // 2, high - high // 2))

    def centre(self, kept: Tensor) -> Tensor:
        """The part of a tensor in the shape of this kernel that lies over the smaller kernel."""
        assert self.merged is not None
        small: Any = self.merged[1].weight
        shape = small.shape[2:]
        top, left = ((a - b) // 2 for a, b in zip(self.weight.shape[2:], shape, strict=True))
        return kept[..., top : top + shape[0], left : left + shape[1]]


@dataclass(frozen=True)
class Found:
    """The layers of a model.

    Attributes:
        layers: the layers whose weights may become zero, in the order of the model.
        skipped: `{reason: names of layers}` of the others.
    """

    layers: Sequence[SparseLayer]
    skipped: Mapping[str, Sequence[str]] = field(default_factory=dict)


def find(
    model: nn.Module, pattern: Pattern, protect: Iterable[str], frozen: Collection[str], from_inputs: bool
) -> Found:
    """Find the layers whose weights may become zero.

    Args:
        model: the model.
        pattern: the pattern of the zeros.
        protect: patterns of modules whose weights stay, as in a recipe.
        frozen: names of modules that are not trained.
        from_inputs: whether the scores look at inputs of layers.
    """
    protected = {name for p in protect for name in named(model, p, "protect")}
    merged = _merged(model)
    small = {name for name, _ in merged.values()}
    layers, skipped = [], dict[str, list[str]]()
    for name, layer in weighted_layers(model):
        if name in small:
            continue
        reason = _reason((name, merged.get(name, (name,))[0]), layer, pattern, protected, frozen, from_inputs)
        if reason:
            skipped.setdefault(reason, []).append(name)
        else:
            layers.append(SparseLayer(name, layer, merged.get(name)))
    return Found(layers, skipped)


def _reason(
    names: tuple[str, str],
    layer: nn.Module,
    pattern: Pattern,
    protected: Collection[str],
    frozen: Collection[str],
    from_inputs: bool,
) -> str:
    """The reason why a layer keeps all its weights; empty if it need not keep them.

    `names` are those of the layer and of the smaller kernel that shares its zeros.
    """
    if any(inside(name, tuple(protected)) for name in names):
        return "protect"
    if any(inside(name, tuple(frozen)) for name in names):
        return "freeze"
    if from_inputs and not (layer_samples.readable(layer) or layer_samples.upsamples(layer)):
        return "the score needs inputs of the layer, which cannot be read for this kind of layer"
    return pattern.misfit(layer) if pattern.of else ""


def _merged(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """`{name of a kernel: (name, layer)}` of the smaller kernels that an export adds to it."""
    pairs: dict[str, tuple[str, nn.Module]] = {}
    for name, block in model.named_modules():
        if isinstance(block, RepConv) and hasattr(block, "conv2"):
            pairs[f"{name}.conv1.conv"] = f"{name}.conv2.conv", block.conv2.conv
        elif isinstance(block, RepVGGDW) and hasattr(block, "conv1"):
            pairs[f"{name}.conv.conv"] = f"{name}.conv1.conv", block.conv1.conv
    return pairs
