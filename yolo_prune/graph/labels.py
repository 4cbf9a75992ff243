# SPDX-License-Identifier: AGPL-3.0-or-later
"""Labels: every index of the first two dimensions of a tensor has a label. Coupled channels have the same label.

A tensor that flows through the model carries `planes`: integer tensors of the same shape. A plane has the label of
every element: the element is removed when the channel with this label is removed. Dimensions along which a plane does
not vary have stride 0, so planes need almost no memory. An operation that moves elements (view, transpose, cat, chunk,
...) is applied to the planes as well, so labels move with the elements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]
NONE = -1  # the element belongs to no channel
STORED = 1 << 40  # from here on, ids stand for the units of numbers that blocks store

RULE, OUTPUT, TRACED, REQUESTED = range(4)  # of several reasons to protect a set, the one of lowest rank is shown


@dataclass(frozen=True)
class Tag:
    """The tracing information that is attached to a tensor.

    Attributes:
        planes: label tensors, each of the tensor's shape.
        silent: a silenced channel is 0 in this tensor. After a sigmoid, for example, it is not 0.
        source: name of the parameter, if the tensor is a parameter or a view of one.
    """

    planes: tuple[Tensor, ...] = ()
    silent: bool = True
    source: str | None = None


def tag_of(value: Any) -> Tag | None:
    """The tag of a value; None if the value is not a tensor or has no tag."""
    return getattr(value, "_yolo_prune", None) if isinstance(value, Tensor) else None


def attach(tensor: Tensor, tag: Tag) -> None:
    """Attach `tag` to a tensor, without the planes that do not vary: a single channel is never removed."""
    planes = tuple(p for p in tag.planes if varying(p))
    tensor._yolo_prune = Tag(planes, tag.silent or not planes, tag.source)  # type: ignore[attr-defined]


def varying(plane: Tensor) -> frozenset[int]:
    """Dimensions along which a plane varies."""
    return frozenset(d for d, (s, n) in enumerate(zip(plane.stride(), plane.shape, strict=True)) if s and n > 1)


def collapse(plane: Tensor) -> Tensor:
    """A plane, reduced to one index along each dimension along which it does not vary."""
    for d in set(range(plane.ndim)) - varying(plane):
        plane = plane.narrow(d, 0, min(1, plane.shape[d]))
    return plane


def restride(plane: Tensor) -> Tensor:
    """A plane that an operation copied, again with stride 0 along the dimensions along which it does not vary."""
    for d in varying(plane):
        first = plane.narrow(d, 0, 1)
        if torch.equal(plane, first.expand_as(plane)):
            plane = first.expand_as(plane)
    return plane


def reshape(plane: Tensor, shape: Sequence[int]) -> Tensor:
    """`plane` in another shape with the same number of elements."""
    try:
        return plane.view(tuple(shape))
    except RuntimeError:
        return restride(plane.reshape(tuple(shape)))


def lines(plane: Tensor, dims: Sequence[int]) -> Tensor:
    """`(others, elements)`: the labels along some dimensions, for every index of the other dimensions that vary."""
    others = sorted(varying(plane) - set(dims))
    for d in set(range(plane.ndim)) - {*others, *dims}:
        plane = plane.narrow(d, 0, 1)
    even = [d for d in range(plane.ndim) if d not in others and d not in dims]
    rows = 1
    for d in others:
        rows *= plane.shape[d]
    return plane.permute(*others, *sorted(dims), *even).reshape(rows, -1)


@dataclass(frozen=True)
class Stored:
    """A number that a block stores as an attribute, and that is the size of something with channels.

    Attributes:
        module: name of the block.
        name: name of the attribute.
        part: the labels of the channels; the number is `factor` times as many.
        factor: see `part`.
    """

    module: str
    name: str
    part: Ids
    factor: int


class Labels:
    """The labels of a model: which are the same, which must not be removed, which must keep equal counts."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Give every index of the first two dimensions of `tensors` (`{name: tensor}`) a label."""
        self.spaces: list[tuple[str, int]] = []
        self.start: dict[tuple[str, int], int] = {}
        self.numel = {name: tensor.numel() for name, tensor in tensors.items()}
        self._size: dict[tuple[str, int], int] = {}
        self.pins: list[tuple[int, str, Ids]] = []
        self.equals: list[list[Ids]] = []
        self.proportions: list[tuple[list[Ids], str]] = []
        self.stored: list[Stored] = []
        self._numbers: dict[int, tuple[str, str, int]] = {}  # by their first id
        self._fixed: set[int] = set()
        self.wholes: list[Ids] = []
        self.explain: Callable[[str], str] = str  # adds the block to a reason
        self._pairs: list[tuple[Ids, Ids]] = []
        self.count = 0
        for name, tensor in tensors.items():
            planes = []
            for dim in range(min(tensor.ndim, 2)):
                ids = torch.arange(self.count, self.count + tensor.shape[dim])
                planes.append(ids.view([-1 if d == dim else 1 for d in range(tensor.ndim)]).expand(tensor.shape))
                self.spaces.append((name, dim))
                self.start[name, dim] = self.count
                self._size[name, dim] = tensor.shape[dim]
                self.count += tensor.shape[dim]
            tensor._yolo_prune = Tag(tuple(planes), True, name)  # type: ignore[attr-defined]  # planes that do not vary, too; `attach` drops them

    def size(self, tensor: str, dim: int) -> int:
        """Number of indices of a tensor along a dimension."""
        return self._size[tensor, dim]

    def along(self, tensor: str, dim: int) -> Ids:
        """Labels of all indices along a dimension."""
        return self.of(tensor, dim, 0, self.size(tensor, dim))

    def of(self, tensor: str, dim: int, start: int, stop: int) -> Ids:
        """Labels of the indices from `start` to `stop`."""
        first = self.start[tensor, dim]
        return np.arange(first + start, first + stop)

    def unify(self, a: Tensor, b: Tensor) -> None:
        """Make the labels of `a` and `b` the same, element by element. If only one element has a label, pin it."""
        a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
        for d in set(range(a.ndim)) - (varying(a) | varying(b)):
            a, b = a.narrow(d, 0, 1), b.narrow(d, 0, 1)
        x, y = a.reshape(-1).numpy(), b.reshape(-1).numpy()
        if x.min(initial=0) == NONE or y.min(initial=0) == NONE:
            for mine, other in ((x, y), (y, x)):
                self.pin(mine[other == NONE], "meets a part of fixed width")
            both = (x != NONE) & (y != NONE)
            x, y = x[both], y[both]
        if (x != y).any():
            self._pairs.append((x, y))

    def pin(self, ids: Tensor | Ids, reason: str, rank: int = TRACED) -> None:
        """Protect these labels: no channel with one of them may be removed."""
        flat = collapse(ids).reshape(-1).numpy() if isinstance(ids, Tensor) else ids
        flat = flat[flat != NONE]
        if flat.size and flat[0] >= STORED:
            self._fixed.update(self._numbers_in(flat))
        elif flat.size:
            self.pins.append((rank, self.explain(reason) if rank == TRACED else reason, flat))

    def fix(self, ids: Tensor | Ids, reason: str) -> None:
        """Protect these labels; other channels of the same layer form a set of their own."""
        self.pin(ids, reason)
        self.equal([ids.flatten().numpy() if isinstance(ids, Tensor) else ids])

    def equal(self, parts: Sequence[Ids]) -> None:
        """Demand that each of these parts keeps the same fraction of its labels."""
        self.equals.append([p[p != NONE] for p in parts])

    def number(self, module: str, name: str, value: int) -> Ids:
        """Ids for the units of a number that a block stores. They can be in proportions, and they can be pinned."""
        start = STORED
        if self._numbers:
            last = next(reversed(self._numbers))
            start = last + self._numbers[last][2]
        self._numbers[start] = (module, name, value)
        return np.arange(start, start + value)

    def may_change(self, ids: Ids) -> bool:
        """Whether none of these stored numbers was pinned."""
        return not self._numbers_in(ids) & self._fixed

    def _numbers_in(self, ids: Ids) -> set[int]:
        """The first ids of the stored numbers to which ids belong."""
        firsts = np.fromiter(self._numbers, dtype=np.int64)
        return set(firsts[np.unique(np.searchsorted(firsts, ids, side="right") - 1)].tolist())

    def proportional(self, parts: Sequence[Ids], reason: str) -> None:
        """Demand the same as `equal`, unless the parts turn out to be the same channels.

        Args:
            parts: the parts; some may be numbers that blocks store.
            reason: why the channels are protected if such a number cannot change.
        """
        if all((p != NONE).all() for p in parts):
            self.proportions.append((list(parts), self.explain(reason)))
            return
        for part in parts:
            self.pin(part, reason)

    def settle(self) -> None:
        """Turn the proportions between different channels into constraints, once all labels are known."""
        self._settle_numbers()
        if not self.proportions:
            return
        root = self.roots()
        for parts, _ in self.proportions:
            (ids, counts), *others = [np.unique(root[p], return_counts=True) for p in parts]
            same = [np.array_equal(i, ids) and (n * counts.sum() == counts * n.sum()).all() for i, n in others]
            if not all(same):
                self.equals.append(parts)
        self.proportions.clear()

    def _settle_numbers(self) -> None:
        """A stored number follows the channels that it counts. If it cannot, these channels are protected."""
        free = {first for first in self._numbers if first not in self._fixed}
        of_number: dict[int, list[tuple[Ids, str]]] = {}
        rest = []
        for parts, reason in self.proportions:
            numbers = set().union(*(self._numbers_in(p) for p in parts if p[0] >= STORED))
            channels = [p for p in parts if p[0] < STORED]
            if not numbers:
                rest.append((parts, reason))
                continue
            if len(numbers) > 1 or len(channels) != 1:  # a sum of several numbers, or one compared with another
                free -= numbers
            for first in numbers:
                of_number.setdefault(first, []).extend((p, reason) for p in channels)
        for first, found in of_number.items():
            module, name, value = self._numbers[first]
            part, _ = min(found, key=lambda each: len(each[0]))
            if first in free and value % len(part) == 0 and len(np.unique(part)) == len(part):
                self.stored.append(Stored(module, name, part, value // len(part)))
                rest.append(([p for p, _ in found], ""))
                continue
            for p, reason in found:
                self.pins.append((TRACED, reason, p))
                self.equal([p])
        self.proportions = rest

    def roots(self) -> Ids:
        """`(count,)`: for each label, the smallest of all labels that are the same as it."""
        root = np.arange(self.count)
        if not self._pairs:
            return root
        a, b = (np.concatenate(side) for side in zip(*self._pairs, strict=True))
        while True:
            ra, rb = root[a], root[b]
            if (ra == rb).all():
                return root
            np.minimum.at(root, np.maximum(ra, rb), np.minimum(ra, rb))
            while (root != root[root]).any():
                root = root[root]
