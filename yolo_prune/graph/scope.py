# SPDX-License-Identifier: AGPL-3.0-or-later
"""Stand-ins: a weightless copy of a model in which blocks that tracing cannot read are written out plainly."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from yolo_prune.errors import UnsupportedModelError
from yolo_prune.graph.structure import Attribute, ExtraCost, Rows

Rule = Callable[[nn.Module, "Scope"], nn.Module]

BLOCKS: dict[type[nn.Module], Rule] = {}
AS_IS: set[type[nn.Module]] = set()
PLAIN: frozenset[type[nn.Module]] = frozenset(  # torch layers through which a silenced channel stays silent
    {
        *(nn.Sequential, nn.ModuleList, nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.Upsample, nn.Identity, nn.Dropout),
        *(nn.SiLU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.Mish, nn.Hardswish, nn.ELU, nn.Tanh),
    }
)


def register_block(*classes: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register a rule: given a block and a `Scope`, return a stand-in and state the block's facts.

    Raises:
        ValueError: If a class already has a rule.
    """

    def decorate(rule: Rule) -> Rule:
        for cls in classes:
            if cls in BLOCKS or cls in AS_IS:
                raise ValueError(f"{cls.__name__} already has a rule.")
            BLOCKS[cls] = rule
        return rule

    return decorate


def read_as_is(*classes: type[nn.Module]) -> None:
    """Declare blocks whose own forward is traced correctly: no split, no reshape of channels, no constraint."""
    AS_IS.update(classes)


@dataclass
class Origin:
    """The stock layer that a stand-in layer speaks for, and which of its output rows."""

    layer: str
    start: int
    label: str = ""


@dataclass
class Facts:
    """What the rules said about the model."""

    origins: dict[nn.Module, Origin] = field(default_factory=dict)
    equal: list[tuple[Rows, ...]] = field(default_factory=list)
    fixed: list[tuple[Rows, str]] = field(default_factory=list)
    attributes: list[Attribute] = field(default_factory=list)
    extra_costs: list[ExtraCost] = field(default_factory=list)
    spare: list[str] = field(default_factory=list)


@dataclass
class Scope:
    """A rule's view of one block: makes stand-ins of its children and takes down its facts."""

    facts: Facts
    path: str

    def child(self, name: str) -> Any:
        """Stand-in of a named child of the block."""
        module = self._block.get_submodule(name)
        return self._inside(name).stand_in(module)

    def split(self, name: str, parts: Mapping[str, int]) -> list[Any]:
        """Stand-ins of a child `Conv` cut along its output channels; `parts` gives label -> channels, in order."""
        conv: Any = self._block.get_submodule(name)
        total = conv.conv.out_channels
        if sum(parts.values()) != total:
            raise UnsupportedModelError(
                f"'{self._inside(name).path}' has {total} output channels, where {dict(parts)} are expected; "
                "the block was changed in a way this version does not know."
            )
        pieces, start = [], 0
        for label, size in parts.items():
            piece: Any = self._inside(name).stand_in(conv)
            piece.conv = self._piece(conv.conv, f"{name}.conv", start, size, label)
            piece.bn = self._piece(conv.bn, f"{name}.bn", start, size, label)
            pieces.append(piece)
            start += size
        return pieces

    def equal(self, *parts: Any) -> None:
        """Fact: these (the output channels of stand-ins, or rows) always keep equal fractions."""
        self.facts.equal.append(tuple(p if isinstance(p, Rows) else self.outputs(p) for p in parts))

    def attribute(self, name: str, of: Any) -> None:
        """Fact: the block's attribute `name` is the number of output channels of stand-in `of`."""
        self.facts.attributes.append(Attribute(self.path, name, self.outputs(of)))

    def fixed(self, name: str, reason: str) -> None:
        """Fact: the output channels of the child layer `name` may not change."""
        layer: Any = self._block.get_submodule(name)
        rows = Rows(f"{self._inside(name).path}.weight", 0, 0, layer.weight.shape[0])
        self.facts.fixed.append((rows, reason))

    def costs(self, tensor: str, per_element: Callable[[Mapping[str, int]], float]) -> None:
        """Fact: the block does MACs in proportion to `tensor`, see `ExtraCost`."""
        self.facts.extra_costs.append(ExtraCost(f"{self.path}.{tensor}", per_element))

    def spare(self, name: str) -> None:
        """Fact: the child `name` does not run in deployment beside its twin."""
        self.facts.spare.append(f"{self.path}.{name}.")

    def outputs(self, piece: Any) -> Rows:
        """The stock rows that a stand-in convolution (or `Conv`) produces."""
        conv = piece if isinstance(piece, nn.Conv2d) else piece.conv
        origin = self.facts.origins[conv]
        return Rows(f"{origin.layer}.weight", 0, origin.start, origin.start + conv.out_channels)

    def inputs(self, piece: Any) -> Rows:
        """The stock input channels that a stand-in convolution (or `Conv`) reads."""
        conv = piece if isinstance(piece, nn.Conv2d) else piece.conv
        return Rows(f"{self.facts.origins[conv].layer}.weight", 1, 0, conv.in_channels)

    def stand_in(self, module: nn.Module) -> Any:
        """Stand-in of `module` at this path: by its rule, or a weightless copy.

        Raises:
            UnsupportedModelError: If the module's class is not known.
        """
        cls = type(module)
        if cls in BLOCKS:
            self._block = module
            twin = BLOCKS[cls](module, self)
            for name in ("i", "f", "type", "np"):  # how Ultralytics routes top-level layers
                if hasattr(module, name):
                    setattr(twin, name, getattr(module, name))
            return twin
        if cls not in AS_IS and cls not in PLAIN:
            where = f"'{self.path}'" if self.path else "The model"
            raise UnsupportedModelError(
                f"{where} is a {cls.__name__} ({cls.__module__}), which this version of yolo-prune cannot "
                "prune yet. Supported are detection models of YOLOv8, YOLO11 and YOLO26."
            )
        return self._copy(module)

    def _copy(self, module: nn.Module) -> nn.Module:
        if isinstance(module, nn.Conv2d) and module.groups not in (1, module.out_channels):
            raise UnsupportedModelError(
                f"'{self.path}' is a convolution of {module.groups} groups; this version of yolo-prune prunes plain "
                "and depthwise convolutions only."
            )
        twin = weightless(module)
        twin._modules = {
            name: child if child is None else self._inside(name).stand_in(child)
            for name, child in module._modules.items()
        }
        self.facts.origins[twin] = Origin(self.path, 0)
        return twin

    def _piece(self, layer: nn.Module, name: str, start: int, size: int, label: str) -> nn.Module:
        twin = weightless(layer)
        for key, parameter in twin.named_parameters(recurse=False):
            setattr(twin, key, nn.Parameter(torch.empty((size, *parameter.shape[1:]), device="meta")))
        for key, buffer in twin.named_buffers(recurse=False):
            if buffer.ndim:
                setattr(twin, key, torch.empty(size, device="meta"))
        setattr(twin, "out_channels" if isinstance(twin, nn.Conv2d) else "num_features", size)
        self.facts.origins[twin] = Origin(self._inside(name).path, start, label)
        return twin

    def _inside(self, name: str) -> Scope:
        return Scope(self.facts, f"{self.path}.{name}" if self.path else name)

    _block: nn.Module = field(init=False, repr=False)


def weightless(module: nn.Module) -> nn.Module:
    """A shallow copy of one module whose tensors have shapes but no storage; children are still the original's."""
    twin = copy.copy(module)
    for hooks in (k for k in twin.__dict__ if k.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))):
        twin.__dict__[hooks] = OrderedDict()
    twin._parameters = {
        k: p if p is None else nn.Parameter(torch.empty(p.shape, device="meta"), requires_grad=p.is_floating_point())
        for k, p in module._parameters.items()
    }
    twin._buffers = {
        k: b if b is None else torch.empty(b.shape, dtype=b.dtype if not b.is_floating_point() else None, device="meta")
        for k, b in module._buffers.items()
    }
    return twin


def weightless_tree(module: nn.Module) -> nn.Module:
    """A copy of a module tree without storage, for recording shapes."""
    twin = weightless(module)
    twin._modules = {k: c if c is None else weightless_tree(c) for k, c in module._modules.items()}
    return twin
