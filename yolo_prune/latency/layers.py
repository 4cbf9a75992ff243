# SPDX-License-Identifier: AGPL-3.0-or-later
"""The layers of a model whose time depends on widths, and the same layers at other widths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from yolo_prune.cut.copies import lean_copy
from yolo_prune.graph import probes

COPIES = 4
"""Layers side by side in a probe: what a runtime does around them then weighs a quarter.

A choice: with more of them it weighs less, and a probe takes longer and more memory.
"""
DEPTHWISE = 0
KINDS: dict[str, Any] = {"conv": nn.Conv2d, "deconv": nn.ConvTranspose2d, "linear": nn.Linear}
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer as a runtime sees it: batch norm folded in, at one size of what it reads.

    Attributes:
        kind: conv, deconv or linear.
        ins: channels that it reads.
        outs: channels that it puts out.
        size: height and width in pixels of what it reads; for a linear layer, the number of vectors.
        kernel: height and width; with stride, padding, dilation empty for a linear layer.
        groups: 0 where every channel is a group.
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
        """What its time depends on, as text."""
        return f"{self.alike}: {self.ins} to {self.outs}"

    @property
    def alike(self) -> str:
        """What it has in common with the same layer at other widths: its key up to the colon."""
        groups = "" if self.groups == 1 else " depthwise" if self.groups == DEPTHWISE else f" in {self.groups}"
        shape = "".join(
            f" {name}{'x'.join(map(str, value))}"
            for name, value in zip("kspd", (self.kernel, self.stride, self.padding, self.dilation), strict=True)
            if value
        )
        return f"{self.kind}{shape}{groups} at {'x'.join(map(str, self.size))}"

    @property
    def depthwise(self) -> bool:
        """Every channel is a group, so that both widths are one."""
        return self.groups == DEPTHWISE

    def widths(self) -> list[tuple[int, int]]:
        """`(ins, outs)` at which it is to be timed: shares of its own widths, and a little more than half of them.

        A width just above a multiple of what a runtime works in costs as much as the next multiple, which tells most.
        """
        ins, outs = self._shares(self.ins), self._shares(self.outs)
        if self.depthwise:
            return list(dict.fromkeys((n, n) for n in outs))
        whole = {(ins[0], n) for n in outs} | {(n, outs[0]) for n in ins}
        pairs = [*whole, (ins[1], outs[1]), (ins[-1], outs[-1])]
        return sorted(dict.fromkeys(pairs), reverse=True)

    def _shares(self, width: int) -> list[int]:
        """The whole width, half of it, a channel more than half, three quarters, a quarter."""
        multiple = max(self.groups, 1)
        if width < 8 * multiple:  # an image, a head's scores: nothing that is pruned
            return [width, width]
        unit = width // multiple
        return [n * multiple for n in (unit, unit // 2, unit // 2 + 1, 3 * unit // 4, unit // 4)]

    def at(self, ins: int, outs: int) -> Layer:
        """The same layer at other widths."""
        return replace(self, ins=ins, outs=outs)

    def probe(self, batch: int) -> tuple[nn.Module, Tensor]:
        """A small model of some such layers side by side with activations behind them, and what it reads."""
        with torch.random.fork_rng(devices=[]):  # weights are drawn: a run must not go on from there
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


def layers_of(model: nn.Module, imgsz: int) -> dict[str, list[Layer]]:
    """`{weight name: the layer, once for every time that a pass goes through it}`, of what runs in deployment.

    Args:
        model: it is only read.
        imgsz: image size in pixels.
    """
    deployed: Any = lean_copy(model).float().eval()
    known = {name for name, _ in model.named_parameters()}
    deployed.fuse(verbose=False)
    found: dict[str, list[Layer]] = {}
    handles = []
    for name, module in deployed.named_modules():
        weight = _weight(name, known)
        if weight and isinstance(module, LAYERS):
            handles.append(module.register_forward_hook(_note(found.setdefault(weight, []))))
    channels = probes.image_channels(model) or 3
    try:
        with torch.inference_mode():
            deployed(torch.zeros(1, channels, imgsz, imgsz))
    finally:
        for handle in handles:
            handle.remove()
    return {weight: layers for weight, layers in found.items() if layers}


def _note(found: list[Layer]) -> Any:
    def hook(module: Any, inputs: tuple[Tensor, ...], _: object) -> None:
        x = inputs[0]
        if isinstance(module, nn.Linear):
            found.append(Layer("linear", module.in_features, module.out_features, (x[0].numel() // x.shape[-1],)))
            return
        kind = "deconv" if isinstance(module, nn.ConvTranspose2d) else "conv"
        depthwise = module.groups == module.in_channels == module.out_channels > 1
        padding = module.padding if isinstance(module.padding, tuple) else (0, 0)
        found.append(
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
    """The weight that a layer of the fused model was made from: branches that fuse are known by their first."""
    parent, _, last = name.rpartition(".")
    branches = [f"{name}.weight", f"{parent}.conv1.conv.weight"] if last == "conv" else [f"{name}.weight"]
    return next((weight for weight in (*branches, f"{name}.conv.weight") if weight in known), None)


def distinct(layers: Mapping[str, list[Layer]]) -> Iterator[Layer]:
    """Every layer once, however often a model has it."""
    yield from {layer.key: layer for found in layers.values() for layer in found}.values()
