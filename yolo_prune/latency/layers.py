# SPDX-License-Identifier: AGPL-3.0-or-later
"""The layers of a model whose time depends on widths, and variants of these layers with other widths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from yolo_prune.cut.copies import lean_copy
from yolo_prune.env.image_size import ImageSize, height_width
from yolo_prune.graph import probes

COPIES = 4
"""Copies of a layer in a probe: the overhead of the runtime is then divided by four.

This value is a choice: more copies reduce the overhead further, but need more time and memory.
"""
DEPTHWISE = 0
KINDS: dict[str, Any] = {"conv": nn.Conv2d, "deconv": nn.ConvTranspose2d, "linear": nn.Linear}
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer in a runtime: its batch norm is folded in, and its input size is fixed.

    Attributes:
        kind: "conv", "deconv" or "linear".
        ins: number of input channels.
        outs: number of output channels.
        size: height and width of the input in pixels; for a linear layer, the number of input vectors.
        kernel: height and width of the kernel; empty for a linear layer.
        stride: vertical and horizontal stride; empty for a linear layer.
        padding: vertical and horizontal padding; empty for a linear layer.
        dilation: vertical and horizontal dilation; empty for a linear layer.
        groups: number of groups; 0 (`DEPTHWISE`) if every channel is a group.
    """

    kind: str
    ins: int
    outs: int
    size: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def key(self) -> str:
        """Everything on which the layer's time depends, as text."""
        return f"{self.alike}: {self.ins} to {self.outs}"

    @property
    def alike(self) -> str:
        """The key up to the colon: it is the same for all widths of the layer."""
        groups = "" if self.groups == 1 else " depthwise" if self.groups == DEPTHWISE else f" in {self.groups}"
        shape = "".join(
            f" {name}{'x'.join(map(str, value))}"
            for name, value in zip("kspd", (self.kernel, self.stride, self.padding, self.dilation), strict=True)
            if value
        )
        return f"{self.kind}{shape}{groups} at {'x'.join(map(str, self.size))}"

    @property
    def depthwise(self) -> bool:
        """Whether every channel is a group, so that input and output have the same width."""
        return self.groups == DEPTHWISE

    def widths(self) -> list[tuple[int, int]]:
        """`(ins, outs)` at which to time the layer: fractions of its widths, and one channel more than half of them.

        The time at a width just above a multiple of the runtime's step shows this step best.
        """
        ins, outs = self._shares(self.ins), self._shares(self.outs)
        if self.depthwise:
            return list(dict.fromkeys((n, n) for n in outs))
        whole = {(ins[0], n) for n in outs} | {(n, outs[0]) for n in ins}
        pairs = [*whole, (ins[1], outs[1]), (ins[-1], outs[-1])]
        return sorted(dict.fromkeys(pairs), reverse=True)

    def _shares(self, width: int) -> list[int]:
        """The full width, half of it, one channel (per group) more than half, three quarters, a quarter."""
        multiple = max(self.groups, 1)
        if width < 8 * multiple:  # image channels or class scores, which are not pruned
            return [width, width]
        unit = width // multiple
        return [n * multiple for n in (unit, unit // 2, unit // 2 + 1, 3 * unit // 4, unit // 4)]

    def at(self, ins: int, outs: int) -> Layer:
        """The same layer with other widths."""
        return replace(self, ins=ins, outs=outs)

    def probe(self, batch: int) -> tuple[nn.Module, Tensor]:
        """A small model with parallel copies of the layer, each followed by an activation; and an input for it."""
        with torch.random.fork_rng(devices=[]):  # initial weights must not change the random numbers of a run
            side_by_side = _SideBySide([self._module() for _ in range(COPIES)]).eval()
        shape = (self.size[0], self.ins) if self.kind == "linear" else (self.ins, *self.size)
        return side_by_side, torch.rand(batch, *shape, generator=torch.Generator().manual_seed(0))

    def _module(self) -> nn.Module:
        if self.kind == "linear":
            return nn.Linear(self.ins, self.outs)
        groups = self.ins if self.depthwise else self.groups
        settings: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        layer: nn.Module = KINDS[self.kind](self.ins, self.outs, self.kernel, groups=groups, **settings)
        return layer


class _SideBySide(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = (self.act(layer(x)) for layer in self.layers)
        for out in rest:
            first = first + out
        result: Tensor = first
        return result


def layers_of(model: nn.Module, imgsz: ImageSize) -> dict[str, list[Layer]]:
    """`{weight name: [layer, ...]}` of all layers that run in deployment, with one entry per call in a forward pass.

    Args:
        model: the model; it is not changed.
        imgsz: image size in pixels.
    """
    deployed: Any = lean_copy(model).float().eval()
    known = {name for name, _ in model.named_parameters()}
    deployed.fuse(verbose=False)
    calls: dict[str, list[Layer]] = {}
    handles = []
    for name, module in deployed.named_modules():
        weight = _weight(name, known)
        if weight and isinstance(module, LAYERS):
            handles.append(module.register_forward_hook(_recording_hook(calls.setdefault(weight, []))))
    channels = probes.image_channels(model) or 3
    try:
        with torch.inference_mode():
            deployed(torch.zeros(1, channels, *height_width(imgsz)))
    finally:
        for handle in handles:
            handle.remove()
    return {weight: layers for weight, layers in calls.items() if layers}


def _recording_hook(calls: list[Layer]) -> Any:
    def hook(module: Any, inputs: tuple[Tensor, ...], _: object) -> None:
        x = inputs[0]
        if isinstance(module, nn.Linear):
            calls.append(Layer("linear", module.in_features, module.out_features, (x[0].numel() // x.shape[-1],)))
            return
        kind = "deconv" if isinstance(module, nn.ConvTranspose2d) else "conv"
        depthwise = module.groups == module.in_channels == module.out_channels > 1
        padding = module.padding if isinstance(module.padding, tuple) else (0, 0)
        calls.append(
            Layer(
                kind,
                module.in_channels,
                module.out_channels,
                tuple(x.shape[2:]),
                module.kernel_size,
                module.stride,
                padding,
                module.dilation,
                DEPTHWISE if depthwise else module.groups,
            )
        )

    return hook


def _weight(name: str, known: set[str]) -> str | None:
    """Name of the weight from which a layer of the fused model was made; for fused branches, that of the first."""
    parent, _, last = name.rpartition(".")
    branches = [f"{name}.weight", f"{parent}.conv1.conv.weight"] if last == "conv" else [f"{name}.weight"]
    return next((weight for weight in (*branches, f"{name}.conv.weight") if weight in known), None)


def distinct(layers: Mapping[str, list[Layer]]) -> Iterator[Layer]:
    """All different layers of a model; equal layers are yielded once."""
    yield from {layer.key: layer for calls in layers.values() for layer in calls}.values()
