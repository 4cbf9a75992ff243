# SPDX-License-Identifier: AGPL-3.0-or-later
"""From labels that are one to channel sets, and from constraints to groups."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from yolo_prune.graph.labels import Ids, Labels
from yolo_prune.graph.structure import ChannelSet, Group, Slot


@dataclass(frozen=True)
class Sets:
    """Channel sets in model order.

    Attributes:
        sets: every channel of every layer is in exactly one.
        home: `(labels,)`: the number of the set that each label is in, -1 for those that are no channels.
        reasons: `{number of a set: why nothing may be removed}`.
    """

    sets: tuple[ChannelSet, ...]
    home: Ids
    reasons: Mapping[int, str]


def channel_sets(labels: Labels, outputs: Mapping[tuple[str, int], str]) -> Sets:
    """Sort labels into sets: channels that lie at the same places and obey the same constraints are one set.

    Args:
        labels: after tracing.
        outputs: `{(tensor, dimension): layer}` of what layers put out. Labels that no layer puts out (channels of the
            image, of a text embedding) are no channels of the model and are left out.
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
    found = [np.stack(members) for members in kinds.values()]  # (channels, places)
    found.sort(key=lambda m: _first_output(m, space, puts_out))
    names = _names(found, space, puts_out, labels, outputs)
    sets, home = [], np.full(labels.count, -1)
    whole = {int(roots[ids[0]]) for ids in labels.wholes}
    for number, (name, members) in enumerate(zip(names, found, strict=True)):
        places = [labels.spaces[i] for i in space[members[0]]]
        slots = tuple(Slot(tensor, dim, tuple(index[members[:, i]].tolist())) for i, (tensor, dim) in enumerate(places))
        layers = tuple(dict.fromkeys(outputs[p] for p in places if p in outputs))
        sets.append(ChannelSet(name, len(members), slots, layers, int(roots[members[0, 0]]) in whole))
        home[members] = number
    return Sets(tuple(sets), home, _reasons(labels, home))


def _marks(labels: Labels, roots: Ids) -> dict[int, list[tuple[int, int]]]:
    """`{root: parts of constraints it is in}`."""
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
    found: list[Ids], space: Ids, puts_out: Ids, labels: Labels, outputs: Mapping[tuple[str, int], str]
) -> list[str]:
    """After the first layer that puts the channels out; numbered where a layer has several sets."""
    homes = [outputs[labels.spaces[space[_first_output(m, space, puts_out)]]] for m in found]
    homes = [h.removesuffix(".conv").removesuffix(".conv_transpose") for h in homes]
    several, turn = Counter(homes), Counter[str]()
    names = []
    for home in homes:
        names.append(f"{home}[{turn[home]}]" if several[home] > 1 else home)
        turn[home] += 1
    return names


def _reasons(labels: Labels, home: Ids) -> dict[int, str]:
    reasons: dict[int, str] = {}
    for _, reason, ids in sorted(labels.pins, key=lambda pin: pin[0]):
        for number in _touched(home, ids):
            reasons.setdefault(number, reason)
    return reasons


def _touched(home: Ids, ids: Ids) -> list[int]:
    """Numbers of the sets that have any of these labels, in order."""
    numbers: list[int] = np.unique(home[ids]).tolist()
    return [n for n in numbers if n >= 0]


def groups_of(found: Sets, labels: Labels) -> list[Group]:
    """Join sets that keep equal fractions; a group with a set that is protected is protected whole."""
    parent = list(range(len(found.sets)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for parts in labels.equals:
        if len(parts) > 1:
            first, *rest = sorted({root(n) for ids in parts for n in _touched(found.home, ids)}) or [0]
            for other in rest:
                parent[other] = first
    together: dict[int, list[int]] = {}
    for number in range(len(found.sets)):
        together.setdefault(root(number), []).append(number)
    return [
        Group(
            tuple(found.sets[n] for n in numbers),
            next((found.reasons[n] for n in numbers if n in found.reasons), None),
        )
        for numbers in together.values()
    ]
