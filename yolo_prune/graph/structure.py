# SPDX-License-Identifier: AGPL-3.0-or-later
"""What lives together: slots of tensors, sets of coupled channels, groups of sets that must keep equal shares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn


def output_dimension(layer: nn.Module | None) -> int:
    """The dimension of a layer's weight that its outputs are along."""
    return int(isinstance(layer, nn.modules.conv._ConvTransposeNd))


@dataclass(frozen=True)
class Rows:
    """A range of indices along one dimension of one tensor."""

    tensor: str
    dim: int
    start: int
    stop: int

    def __len__(self) -> int:
        """How many there are."""
        return self.stop - self.start


@dataclass(frozen=True)
class Slot:
    """Where the channels of a set lie in one tensor: channel `i` is index `index[i]` of dimension `dim`."""

    tensor: str
    dim: int
    index: tuple[int, ...]


@dataclass(frozen=True)
class ChannelSet:
    """Channels coupled one by one: removing channel `i` removes index `i` of every slot.

    Attributes:
        name: after the first layer that produces these channels; the same in every round.
        size: channels.
        slots: where they lie.
        layers: names of the layers that produce them.
        whole: each of them stands for many channels (a head of an attention); limits on widths do not apply.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    layers: tuple[str, ...] = ()
    whole: bool = False


@dataclass(frozen=True)
class Group:
    """Channel sets that must always keep the same fraction of their channels.

    Halves of a `chunk` keep equal counts, so do the heads of an attention; an attention's input is as wide as all
    its heads together. As such constraints hold in the dense model, keeping equal *fractions* keeps them all.

    Attributes:
        sets: the channel sets; which channels go is free within each.
        protected: why nothing may be removed here, or None.
    """

    sets: tuple[ChannelSet, ...]
    protected: str | None = None

    @property
    def name(self) -> str:
        """Name of the first set."""
        return self.sets[0].name

    @cached_property
    def width(self) -> int:
        """Channels in the widest set."""
        return max(s.size for s in self.sets)

    @cached_property
    def grain(self) -> int:
        """In how many equal steps the group can be cut: the greatest common divisor of the sets' sizes."""
        return math.gcd(*(s.size for s in self.sets))

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that produce these channels."""
        return tuple(dict.fromkeys(name for s in self.sets for name in s.layers))


@dataclass(frozen=True)
class Attribute:
    """`module.name` holds how many of `rows` are kept, divided by `per`; a list of such numbers if `many`."""

    module: str
    name: str
    rows: tuple[Rows, ...]
    per: int = 1
    many: bool = False


@dataclass(frozen=True)
class Fold:
    """A factor that forward derives from a width: `rows` are multiplied by `(kept / size of counted) ** power`."""

    rows: Rows
    counted: Rows
    power: float


@dataclass(frozen=True)
class Graph:
    """Everything the later steps need to know of a model's structure.

    Attributes:
        groups: in model order.
        attributes: widths that blocks remember.
        folds: factors that follow a width.
        work: MACs per element of each tensor, for one image of `imgsz`, of what runs in deployment.
        fixed_work: MACs that no width changes.
        deployed: names of the parameters that run in deployment.
        imgsz: image height and width in pixels.
    """

    groups: tuple[Group, ...]
    attributes: tuple[Attribute, ...]
    folds: tuple[Fold, ...]
    work: Mapping[str, float]
    fixed_work: float
    deployed: frozenset[str]
    imgsz: int

    @property
    def widths(self) -> dict[str, int]:
        """`{set name: channels}` of this model."""
        return {s.name: s.size for g in self.groups for s in g.sets}
