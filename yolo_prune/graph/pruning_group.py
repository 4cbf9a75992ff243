# SPDX-License-Identifier: AGPL-3.0-or-later
"""Channel sets as torch-pruning sees them: indices of its layers, items of its groups, and a group of one set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import _helpers, ops
from torch_pruning.dependency import Dependency, Node
from torch_pruning.pruner.function import PrunerBox

from yolo_prune.graph.structure import ChannelSet, Slot, output_dimension

LAYERS = {
    ops.OPTYPE.CONV,
    ops.OPTYPE.DEPTHWISE_CONV,
    ops.OPTYPE.LINEAR,
    ops.OPTYPE.BN,
    ops.OPTYPE.LN,
    ops.OPTYPE.GN,
    ops.OPTYPE.IN,
    ops.OPTYPE.PRELU,
    ops.OPTYPE.EMBED,
}


class Part(NamedTuple):
    """One side of a layer, or a parameter that belongs to no layer."""

    name: str
    out: bool

    def __str__(self) -> str:
        return f"'{self.name}' ({'outputs' if self.out else 'inputs'})"


class Member(NamedTuple):
    """A part of the model that has the channels of a set.

    Attributes:
        part: the part.
        module: its layer; or a bare parameter of a module that torch-pruning does not know.
        dim: the dimension of a bare parameter; -1 for a layer.
        places: channel `i` of the set is index `place[i]`, for every `place`: a layer can read a channel several times.
        repeats: groups of a convolution that read the same inputs. The inputs of a group are numbered first, then those
            of the next one, as in torch-pruning.
    """

    part: Part
    module: nn.Module | Tensor
    dim: int
    places: tuple[tuple[int, ...], ...]
    repeats: int


class IndexMapping:
    """Maps indices of a group's root to the indices of one member, as the index mappings of torch-pruning do."""

    def __init__(self, pairs: Iterable[tuple[int, int]]) -> None:
        """`pairs`: `(index in the member, index in the root)`."""
        self._pairs = pairs
        self._places: dict[int, list[int]] = {}

    def __call__(self, idxs: Sequence[Any]) -> list[Any]:
        """Map indices that carry their index in the root."""
        if not self._places:
            for index, root in self._pairs:
                self._places.setdefault(root, []).append(index)
        return [_helpers._HybridIndex(idx=i, root_idx=h.root_idx) for h in idxs for i in self._places.get(h.idx, ())]


def kind_of(layer: Any) -> ops.OPTYPE:
    """torch-pruning's type of a layer.

    torch-pruning takes every convolution with as many groups as outputs for a depthwise one, also if each group reads
    several inputs.
    """
    kind = ops.module2type(layer)
    grouped = kind == ops.OPTYPE.DEPTHWISE_CONV and layer.in_channels != layer.out_channels
    return ops.OPTYPE.CONV if grouped else kind


def members(layers: Mapping[str, nn.Module], channels: ChannelSet) -> list[Member]:
    """The parts of a model that have the channels of a set, in the order of its slots.

    Args:
        layers: the named modules of the model.
        channels: the set.
    """
    found: dict[Part, Member] = {}
    places: dict[Part, dict[tuple[int, ...], None]] = {}
    for slot in channels.slots:
        name, _, key = slot.tensor.rpartition(".")
        member, size = _member(slot, layers[name], key)
        if member is None:
            continue  # a buffer, which torch-pruning does not look at
        indices = places.setdefault(found.setdefault(member.part, member).part, {})
        for k in range(member.repeats):
            indices[tuple(i + k * size for i in slot.index) if k else slot.index] = None
    return [member._replace(places=tuple(places[part])) for part, member in found.items()]


def _member(slot: Slot, layer: Any, key: str) -> tuple[Member | None, int]:
    """The part in which a slot lies, without its places, and its number of inputs per group of a convolution."""
    kind = kind_of(layer)
    if kind not in LAYERS:
        tensor = getattr(layer, key)
        of_parameter = Member(Part(slot.tensor, True), tensor, slot.dim, (), 1)
        return of_parameter if isinstance(tensor, nn.Parameter) else None, 0
    name = slot.tensor.rpartition(".")[0]
    if kind not in (ops.OPTYPE.CONV, ops.OPTYPE.LINEAR) or key != "weight":
        return Member(Part(name, True), layer, -1, (), 1), 0
    repeats = getattr(layer, "groups", 1) if slot.dim else 1
    return Member(Part(name, slot.dim == output_dimension(layer)), layer, -1, (), repeats), layer.weight.shape[slot.dim]


def group_item(root: Node, of_root: Callable[..., Any], node: Node, function: Callable[..., Any], pairs: Any) -> Any:
    """An item of a `torch_pruning.Group`.

    Args:
        root: what the group begins with.
        of_root: torch-pruning's function that removes indices of the root.
        node: what loses indices.
        function: torch-pruning's function that removes them.
        pairs: `(index of the node, index of the root)`, in ascending order.
    """
    dependency = Dependency(of_root, function, root, node)
    dependency.index_mapping[0] = IndexMapping(pairs)
    made = _helpers.GroupItem(dependency, [index for index, _ in pairs])
    made.root_idxs = [i for _, i in pairs]
    return made


def pruning_group(layers: Mapping[str, nn.Module], channels: ChannelSet, merge: bool = True) -> Any:
    """The `torch_pruning.Group` of all channels of one set, which an importance scores.

    As in torch-pruning, a layer is one item for its outputs and one for its inputs, and the first item is the layer
    that produces the channels. Root indices are the numbers of the channels in the set.

    Two points are for the importances that sort `idxs` in place or give their result the length of the first item: the
    indices of an item are in ascending order already, and the first item has every channel once.

    Args:
        layers: the named modules of the model.
        channels: the set.
        merge: a layer that has a channel several times is one item, as in torch-pruning; otherwise one for each time.
    """
    found = members(layers, channels)
    root = next((m for m in found if m.part.out and m.part.name in channels.layers), found[0])
    nodes = {m.part.name: Node(m.module, None, m.part.name) for m in found}

    def function(member: Member) -> Any:
        pruner = PrunerBox[ops.module2type(member.module)]
        return pruner.prune_out_channels if member.part.out else pruner.prune_in_channels

    group = tp.Group()
    for member, places in _items(found, root, merge):
        node = nodes[member.part.name]
        node.pruning_dim = member.dim
        pairs = sorted((index, i) for place in places for i, index in enumerate(place))
        group.items.append(group_item(nodes[root.part.name], function(root), node, function(member), pairs))
    return group


def _items(found: list[Member], root: Member, merge: bool) -> Iterator[tuple[Member, Sequence[tuple[int, ...]]]]:
    first, *again = root.places
    yield root, [first]
    # A weight that reads an input of each of its groups counts once.
    for member, places in ((root, again), *((m, m.places[:: m.repeats]) for m in found if m is not root)):
        if places and merge:
            yield member, places
        else:
            yield from ((member, [once]) for once in places)
