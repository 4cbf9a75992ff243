# SPDX-License-Identifier: AGPL-3.0-or-later
"""Makes channel sets from the labels that are the same, and groups from the constraints between sets."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from yolo_prune.graph.labels import Ids, Labels
from yolo_prune.graph.structure import ChannelSet, Group, Slot


@dataclass(frozen=True)
class Sets:
    """All channel sets of a model, in model order.

    Attributes:
        sets: the channel sets; every channel of every layer is in exactly one.
        set_of: `(labels,)`: for each label, the number of its set; -1 if the label is not of a channel.
        reasons: `{number of a set: why none of its channels may be removed}`.
    """

    sets: tuple[ChannelSet, ...]
    set_of: Ids
    reasons: Mapping[int, str]


def channel_sets(labels: Labels, outputs: Mapping[tuple[str, int], str]) -> Sets:
    """Sort labels into sets: channels in the same tensors that obey the same constraints form one set.

    Args:
        labels: the labels after the trace.
        outputs: `{(tensor, dimension): layer}` for the output channels of all layers. Labels that are no layer's
            output (the channels of the image or of a text embedding) are not channels of the model and are left out.
    """
    roots = labels.roots()
    space = np.repeat(np.arange(len(labels.spaces)), [labels.size(*s) for s in labels.spaces])
    index = np.arange(labels.count) - np.array([labels.start[s] for s in labels.spaces], dtype=np.int64)[space]
    puts_out = np.array([s in outputs for s in labels.spaces])
    marks = _marks(labels, roots)
    order = np.lexsort((np.arange(labels.count), space, roots))
    bounds = np.concatenate(([0], np.flatnonzero(np.diff(roots[order])) + 1, [labels.count])).tolist()
    sorted_space = space[order]
    is_channel = np.logical_or.reduceat(puts_out[sorted_space], bounds[:-1])
    kinds: dict[tuple[bytes, tuple[tuple[int, int], ...]], list[Ids]] = defaultdict(list)
    for start, stop, channel in zip(bounds, bounds[1:], is_channel.tolist(), strict=False):
        if channel:
            members = order[start:stop]
            kinds[sorted_space[start:stop].tobytes(), tuple(marks.get(int(roots[members[0]]), ()))].append(members)
    all_members = [np.stack(members) for members in kinds.values()]  # labels, (channels, places)
    all_members.sort(key=lambda m: _first_output(m, space, puts_out))
    names = _names(all_members, space, puts_out, labels, outputs)
    sets, set_of = [], np.full(labels.count, -1)
    whole = {int(roots[ids[0]]) for ids in labels.wholes}
    for number, (name, members) in enumerate(zip(names, all_members, strict=True)):
        places = [labels.spaces[i] for i in space[members[0]]]
        slots = tuple(Slot(tensor, dim, tuple(index[members[:, i]].tolist())) for i, (tensor, dim) in enumerate(places))
        layers = tuple(dict.fromkeys(outputs[p] for p in places if p in outputs))
        sets.append(ChannelSet(name, len(members), slots, layers, int(roots[members[0, 0]]) in whole))
        set_of[members] = number
    return Sets(tuple(sets), set_of, _reasons(labels, set_of))


def _marks(labels: Labels, roots: Ids) -> dict[int, list[tuple[int, int]]]:
    """`{root: [(constraint, part of it that contains the root), ...]}`."""
    marks: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, parts in enumerate(labels.equals):
        for part, ids in enumerate(parts):
            for root in np.unique(roots[ids]).tolist():
                marks[root].append((number, part))
    return marks


def _first_output(members: Ids, space: Ids, puts_out: Ids) -> int:
    flat = members[puts_out[space[members]]]
    return int(flat.min())


def _names(
    all_members: list[Ids], space: Ids, puts_out: Ids, labels: Labels, outputs: Mapping[tuple[str, int], str]
) -> list[str]:
    """A set is named after the first layer that outputs its channels, with a number if the layer has several sets."""
    layers = [outputs[labels.spaces[space[_first_output(m, space, puts_out)]]] for m in all_members]
    layers = [h.removesuffix(".conv").removesuffix(".conv_transpose") for h in layers]
    count, used = Counter(layers), Counter[str]()
    names = []
    for layer in layers:
        names.append(f"{layer}[{used[layer]}]" if count[layer] > 1 else layer)
        used[layer] += 1
    return names


def _reasons(labels: Labels, set_of: Ids) -> dict[int, str]:
    reasons: dict[int, str] = {}
    for _, reason, ids in sorted(labels.pins, key=lambda pin: pin[0]):
        for number in _sets_with(set_of, ids):
            reasons.setdefault(number, reason)
    return reasons


def _sets_with(set_of: Ids, ids: Ids) -> list[int]:
    """Numbers of the sets that contain any of these labels, in ascending order."""
    numbers: list[int] = np.unique(set_of[ids]).tolist()
    return [n for n in numbers if n >= 0]


def groups_of(all_sets: Sets, labels: Labels) -> list[Group]:
    """Join the sets that must keep equal fractions into groups. One protected set protects its whole group."""
    parent = list(range(len(all_sets.sets)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for parts in labels.equals:
        if len(parts) > 1:
            first, *rest = sorted({root(n) for ids in parts for n in _sets_with(all_sets.set_of, ids)}) or [0]
            for other in rest:
                parent[other] = first
    together: dict[int, list[int]] = {}
    for number in range(len(all_sets.sets)):
        together.setdefault(root(number), []).append(number)
    return [
        Group(
            tuple(all_sets.sets[n] for n in numbers),
            next((all_sets.reasons[n] for n in numbers if n in all_sets.reasons), None),
        )
        for numbers in together.values()
    ]
