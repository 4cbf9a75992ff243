# SPDX-License-Identifier: AGPL-3.0-or-later
"""A channel set as a `torch_pruning.Group`, which the importances of torch-pruning read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from yolo_prune.graph.structure import ChannelSet, output_dimension


class Member(NamedTuple):
    """A part of the model that has the channels of a set, on one side.

    Attributes:
        name: name of the part.
        part: a layer that torch-pruning knows; or a bare parameter of any other module.
        out: whether the channels are outputs of the part, not inputs.
        dim: the dimension of its weight.
        indices: channel `i` of the set is index `indices[k][i]`, for every `k`: a layer can read a channel
            several times.
    """

    name: str
    part: nn.Module | Tensor
    out: bool
    dim: int
    indices: list[tuple[int, ...]]


def pruning_group(layers: Mapping[str, nn.Module], channels: ChannelSet, merge: bool = True) -> Any:
    """The `torch_pruning.Group` of all channels of a set.

    As in torch-pruning, a layer is one item for its outputs and one for its inputs, and the first item is the layer
    that produces the channels. Root indices are the numbers of the channels in the set.

    Two points are for the importances that sort `idxs` in place or give their result the length of the first item: the
    indices of an item are in ascending order already, and the first item has every channel once.

    Args:
        layers: the named modules of the model.
        channels: the set.
        merge: a layer that has a channel several times is one item, as in torch-pruning; otherwise one for each time.
    """
    from torch_pruning import Group
    from torch_pruning.dependency import Dependency, Node
    from torch_pruning.pruner.function import PrunerBox

    members = _members(layers, channels)
    root = next((m for m in members if m.out and m.name in channels.layers), members[0])
    nodes = {m.name: Node(m.part, None, m.name) for m in members}

    def function(member: Member) -> Any:
        pruner = PrunerBox[nodes[member.name].type]
        return pruner.prune_out_channels if member.out else pruner.prune_in_channels

    group = Group()
    for member, indices in _items(members, root, merge):
        node = nodes[member.name]
        node.pruning_dim = member.dim
        pairs = sorted((index, i) for some in indices for i, index in enumerate(some))
        group.add_dep(
            Dependency(function(root), function(member), nodes[root.name], node), [index for index, _ in pairs]
        )
        group[len(group) - 1].root_idxs = [i for _, i in pairs]
    return group


def _items(members: list[Member], root: Member, merge: bool) -> Iterator[tuple[Member, list[tuple[int, ...]]]]:
    first, *again = root.indices
    yield root, [first]
    for member, indices in ((root, again), *((m, m.indices) for m in members if m is not root)):
        if indices and merge:
            yield member, indices
        else:
            yield from ((member, [once]) for once in indices)


def _members(layers: Mapping[str, nn.Module], channels: ChannelSet) -> list[Member]:
    from torch_pruning.ops import module2type
    from torch_pruning.pruner.function import PrunerBox

    members: dict[tuple[str, bool], Member] = {}
    source: dict[tuple[str, bool], str] = {}  # the first tensor of a layer stands for its others: bias, statistics
    for slot in channels.slots:
        owner, _, key = slot.tensor.rpartition(".")
        layer = layers[owner]
        tensor: Tensor = getattr(layer, key)
        known = module2type(layer) in PrunerBox
        if not known and not isinstance(tensor, nn.Parameter):
            continue  # a buffer, which torch-pruning does not look at
        out = tensor.ndim < 2 or slot.dim == output_dimension(layer)
        name, part = (owner, layer) if known else (slot.tensor, tensor)
        member = members.setdefault((name, out), Member(name, part, out, slot.dim, []))
        if source.setdefault((name, out), slot.tensor) == slot.tensor:
            member.indices.append(slot.index)
    return list(members.values())
