# SPDX-License-Identifier: AGPL-3.0-or-later
"""What lives together: slots of tensors, sets of coupled channels, groups of sets that must keep equal shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Rows:
    """A range of indices along one dimension of one stock tensor."""

    tensor: str
    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class Slot:
    """Where the channels of a set lie in one tensor: channel `i` is index `index[i]` of dimension `dim`."""

    tensor: str
    dim: int
    index: tuple[int, ...]


@dataclass(frozen=True)
class ChannelSet:
    """Channels coupled one by one: removing channel `i` removes index `i` of every slot."""

    name: str
    size: int
    slots: tuple[Slot, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that produce these channels."""
        names = (s.tensor.rpartition(".")[0] for s in self.slots if s.dim == 0 and s.tensor.endswith("weight"))
        return tuple(dict.fromkeys(n for n in names if not n.endswith("bn")))


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
    """`module.name` holds the number of channels kept among `rows`."""

    module: str
    name: str
    rows: Rows


@dataclass(frozen=True)
class ExtraCost:
    """MACs that no layer's weight accounts for (attention's products).

    Attributes:
        tensor: the tensor whose size the cost is proportional to.
        per_element: output positions of every layer by name -> MACs per element of the tensor.
    """

    tensor: str
    per_element: Callable[[Mapping[str, int]], float]


@dataclass(frozen=True)
class Graph:
    """Everything the later steps need to know of a model's structure.

    Attributes:
        groups: in model order.
        attributes: widths that blocks remember.
        extra_costs: see `ExtraCost`.
        spare: prefixes of modules that do not run in deployment beside their twin (the one-to-one copy of a head).
        constant: `(layer, reason)` of fixed layers that no group reaches.
    """

    groups: tuple[Group, ...]
    attributes: tuple[Attribute, ...]
    extra_costs: tuple[ExtraCost, ...]
    spare: tuple[str, ...]
    constant: tuple[tuple[str, str], ...]

    @property
    def widths(self) -> dict[str, int]:
        """`{set name: channels}` of this model."""
        return {s.name: s.size for g in self.groups for s in g.sets}
