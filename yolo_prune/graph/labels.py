# SPDX-License-Identifier: AGPL-3.0-or-later
"""Labels: every index of every tensor's first two dimensions has one; channels that live together share theirs.

A tensor that flows through the model carries `planes`: integer tensors of its own shape that say, for each element,
which label it stands and falls with. Dimensions along which a plane does not vary have stride 0, so planes cost almost
nothing, and whatever moves elements about (view, transpose, cat, chunk, ...) moves labels by the same operation.
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
NONE = -1  # an element that stands by itself

RULE, OUTPUT, FOUND, ASKED = range(4)  # which reason is told where several hold: what a rule says, ...


@dataclass(frozen=True)
class Tag:
    """What a tensor carries.

    Attributes:
        planes: labels, each of the tensor's shape.
        silent: a silenced channel is 0 here; after a sigmoid it is not.
        source: name of the parameter that this is, or is a view of.
    """

    planes: tuple[Tensor, ...] = ()
    silent: bool = True
    source: str | None = None


def tag_of(value: Any) -> Tag | None:
    """What a value carries, if it is a tensor that carries anything."""
    return getattr(value, "_yolo_prune", None) if isinstance(value, Tensor) else None


def put(tensor: Tensor, tag: Tag) -> None:
    """Let a tensor carry `tag`, without the planes that vary nowhere: a single channel is never removed."""
    planes = tuple(p for p in tag.planes if varying(p))
    tensor._yolo_prune = Tag(planes, tag.silent or not planes, tag.source)  # type: ignore[attr-defined]


def varying(plane: Tensor) -> frozenset[int]:
    """Dimensions along which a plane varies."""
    return frozenset(d for d, (s, n) in enumerate(zip(plane.stride(), plane.shape, strict=True)) if s and n > 1)


def tight(plane: Tensor) -> Tensor:
    """A plane with one index left of the dimensions along which it does not vary."""
    for d in set(range(plane.ndim)) - varying(plane):
        plane = plane.narrow(d, 0, min(1, plane.shape[d]))
    return plane


def settled(plane: Tensor) -> Tensor:
    """A plane that was copied, with stride 0 again wherever it does not vary."""
    for d in varying(plane):
        first = plane.narrow(d, 0, 1)
        if torch.equal(plane, first.expand_as(plane)):
            plane = first.expand_as(plane)
    return plane


def reshape(plane: Tensor, shape: Sequence[int]) -> Tensor:
    """`plane` in another shape of the same size."""
    try:
        return plane.view(tuple(shape))
    except RuntimeError:
        return settled(plane.reshape(tuple(shape)))


class Labels:
    """The labels of a model: which are one, which may not go, which must keep equal counts."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Give labels to `tensors`: `{name: tensor}`."""
        self.spaces: list[tuple[str, int]] = []
        self.start: dict[tuple[str, int], int] = {}
        self.numel = {name: tensor.numel() for name, tensor in tensors.items()}
        self._size: dict[tuple[str, int], int] = {}
        self.pins: list[tuple[int, str, Ids]] = []
        self.equals: list[list[Ids]] = []
        self.wholes: list[Ids] = []
        self.explain: Callable[[str], str] = str  # adds to a reason where it was met
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
            tensor._yolo_prune = Tag(tuple(planes), True, name)  # type: ignore[attr-defined]  # all of them: see `put`

    def size(self, tensor: str, dim: int) -> int:
        """Indices that a tensor has along a dimension."""
        return self._size[tensor, dim]

    def along(self, tensor: str, dim: int) -> Ids:
        """Labels of all indices along a dimension."""
        return self.of(tensor, dim, 0, self.size(tensor, dim))

    def of(self, tensor: str, dim: int, start: int, stop: int) -> Ids:
        """Labels of a range of indices."""
        first = self.start[tensor, dim]
        return np.arange(first + start, first + stop)

    def unify(self, a: Tensor, b: Tensor) -> None:
        """Labels of `a` and of `b` are one, element by element; what meets an element without a label is pinned."""
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

    def pin(self, ids: Tensor | Ids, reason: str, rank: int = FOUND) -> None:
        """Nothing with these labels may be removed."""
        flat = tight(ids).reshape(-1).numpy() if isinstance(ids, Tensor) else ids
        flat = flat[flat != NONE]
        if flat.size:
            self.pins.append((rank, self.explain(reason) if rank == FOUND else reason, flat))

    def equal(self, parts: Sequence[Ids]) -> None:
        """Each of these keeps the same fraction of its labels."""
        self.equals.append([p[p != NONE] for p in parts])

    def roots(self) -> Ids:
        """`(count,)`: the smallest label that each label is one with."""
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
