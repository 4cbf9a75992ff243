# SPDX-License-Identifier: AGPL-3.0-or-later
"""The data types of the graph: slots in tensors, sets of coupled channels, groups of sets that keep equal fractions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import nn

from yolo_prune.env.image_size import ImageSize


def output_dimension(layer: nn.Module | None) -> int:
    """The dimension of a layer's weight whose indices are the layer's outputs."""
    return int(isinstance(layer, nn.modules.conv._ConvTransposeNd))


@dataclass(frozen=True)
class Rows:
    """A range of indices along one dimension of one tensor."""

    tensor: str
    dim: int
    start: int
    stop: int

    def __len__(self) -> int:
        """Number of indices in the range."""
        return self.stop - self.start


@dataclass(frozen=True)
class Slot:
    """The place of a set's channels in one tensor: channel `i` is index `index[i]` of dimension `dim`."""

    tensor: str
    dim: int
    index: tuple[int, ...]


@dataclass(frozen=True)
class ChannelSet:
    """Channels coupled one by one: removing channel `i` removes index `i` of every slot.

    Attributes:
        name: name of the first layer that produces these channels; it is the same in every round.
        size: number of channels.
        slots: the places of the channels in tensors.
        layers: names of the layers that produce these channels.
        whole: one "channel" of this set stands for many channels (a head of an attention), so limits on widths do not
            apply.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    layers: tuple[str, ...] = ()
    whole: bool = False


@dataclass(frozen=True)
class Group:
    """Channel sets that must always keep the same fraction of their channels.

    Examples: both halves of a `chunk` keep equal counts, and so do the heads of an attention; the input of an attention
    is as wide as all its heads together. The dense model fulfils these constraints. If all sets of a group keep the
    same *fraction* of their channels, the pruned model fulfils them as well.

    Attributes:
        sets: the channel sets. Each set may lose different channels.
        protected: why no channel of the group may be removed; None if the group can be pruned.
    """

    sets: tuple[ChannelSet, ...]
    protected: str | None = None

    @property
    def name(self) -> str:
        """Name of the first set."""
        return self.sets[0].name

    @cached_property
    def width(self) -> int:
        """Number of channels in the widest set."""
        return max(s.size for s in self.sets)

    @cached_property
    def grain(self) -> int:
        """Number of equal steps in which the group can be cut: the greatest common divisor of the sets' sizes."""
        return math.gcd(*(s.size for s in self.sets))

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that produce these channels."""
        return tuple(dict.fromkeys(name for s in self.sets for name in s.layers))


@dataclass(frozen=True)
class Attribute:
    """`module.name` is the number of kept indices in `rows`, divided by `per`; if `many`, a list of numbers."""

    module: str
    name: str
    rows: tuple[Rows, ...]
    per: int = 1
    many: bool = False


@dataclass(frozen=True)
class Fold:
    """Compensates for a factor that forward computes from a width.

    A cut multiplies `rows` by `(kept / size of counted) ** power`.
    """

    rows: Rows
    counted: Rows
    power: float


@dataclass(frozen=True)
class Graph:
    """Everything that the later steps need to know about a model's structure.

    Attributes:
        groups: the groups of coupled channels, in model order.
        attributes: widths that blocks store as attributes.
        folds: factors that compensate for a changed width.
        work: `{tensor name: MACs per element}` for one image of `imgsz`, for all parts that run in deployment.
        fixed_work: MACs that do not depend on any width.
        deployed: names of the parameters that run in deployment.
        imgsz: image size in pixels.
        opaque: `{module name: reason}` of the blocks that are not traced, without those that the recipe protects.
    """

    groups: tuple[Group, ...]
    attributes: tuple[Attribute, ...]
    folds: tuple[Fold, ...]
    work: Mapping[str, float]
    fixed_work: float
    deployed: frozenset[str]
    imgsz: ImageSize
    opaque: Mapping[str, str] = field(default_factory=dict)

    @property
    def widths(self) -> dict[str, int]:
        """`{set name: number of channels}` of this model."""
        return {s.name: s.size for g in self.groups for s in g.sets}

    def after(self, keep: Mapping[str, Mapping[int, tuple[int, ...]]]) -> Graph:
        """The graph of the model after a cut, without a new trace.

        Args:
            keep: `{tensor: {dimension: kept indices}}`; for every channel, it keeps all places or none.
        """
        new = {
            (t, dim): {old: i for i, old in enumerate(kept)} for t, dims in keep.items() for dim, kept in dims.items()
        }

        def rows(old: Rows) -> Rows:
            kept = new.get((old.tensor, old.dim))
            if kept is None:
                return old
            start = sum(i < old.start for i in kept)
            return replace(old, start=start, stop=start + sum(old.start <= i < old.stop for i in kept))

        def slot(old: Slot) -> Slot:
            kept = new.get((old.tensor, old.dim))
            return replace(old, index=tuple(kept[i] for i in old.index if i in kept)) if kept is not None else old

        def channels(old: ChannelSet) -> ChannelSet:
            slots = tuple(slot(s) for s in old.slots)
            return old if slots == old.slots else replace(old, slots=slots, size=len(slots[0].index))

        return replace(
            self,
            groups=tuple(replace(g, sets=tuple(channels(s) for s in g.sets)) for g in self.groups),
            attributes=tuple(replace(a, rows=tuple(rows(r) for r in a.rows)) for a in self.attributes),
            folds=tuple(replace(f, rows=rows(f.rows), counted=rows(f.counted)) for f in self.folds),
        )
