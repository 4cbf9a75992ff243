# SPDX-License-Identifier: AGPL-3.0-or-later
"""Sizes that a cut changes, as the code of a block sees them: numbers that know which channels they count."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from yolo_prune.graph.labels import NONE, STORED, Ids, Labels, Tag, lines, tag_of, varying

WHY = "has a width that the code computes with"


class Width(int):
    """The size of a tensor along its channels: `ratio * (number of channels in ids) + extra`.

    It is a number like any other. Sums and multiples of it are widths as well. Every other result (a root, a fraction,
    a remainder) is a plain number, which a cut would change, so the channels are protected.
    """

    labels: Labels
    ids: Ids
    ratio: Fraction
    extra: Fraction
    without: Width | None = None  # the stored number in `x.shape[1] - self.n`; `extra` has its value

    @staticmethod
    def of(value: int, labels: Labels, ids: Ids, ratio: Fraction = Fraction(1), extra: Fraction = Fraction(0)) -> Width:
        """A width with this value; see the class."""
        width = Width(value)
        width.labels, width.ids, width.ratio, width.extra = labels, ids, ratio, extra
        return width

    @property
    def plain(self) -> int:
        """The value alone."""
        return int.__add__(self, 0)

    @property
    def counts(self) -> bool:
        """Whether this is exactly the number of the channels in `ids`."""
        return self.ratio == 1 and self.extra == 0 and len(self.ids) == self.plain and not self.stored

    @property
    def is_multiple(self) -> bool:
        """Whether this is a multiple or a part of the number of the channels in `ids`."""
        return self.extra == 0 and self.ratio * len(self.ids) == self.plain

    @property
    def stored(self) -> bool:
        """Whether this comes from a number that a block stores, not from the size of a tensor."""
        return bool(self.ids[0] >= STORED)

    @property
    def may_change(self) -> bool:
        """Whether no use in the code so far fixes a stored number."""
        return self.labels.may_change(self.ids)

    def fixed(self) -> int:
        """The value alone, of a stored number that must not change."""
        self.protect()
        return self.plain

    def protect(self) -> None:
        """Protect the channels: the code depends on their number."""
        self.labels.pin(self.ids, WHY)
        if self.without is not None:
            self.without.protect()

    def demand(self, part: Tensor, why: str) -> None:
        """Demand that the elements with these labels, `(number,)`, always are as many as this width says.

        Args:
            part: the labels.
            why: the reason to protect them if they cannot be.
        """
        ids = part.numpy()
        if self.is_multiple and self.plain == len(ids):
            self.labels.proportional([self.ids, ids], why)
            return
        others = self.ids[~np.isin(self.ids, ids)]
        if self.ratio == 1 and len(others) == -self.extra == len(self.ids) - len(ids):  # all but a fixed number
            if self.without is None:
                self.labels.fix(others, WHY)
            else:
                self.without.demand(torch.from_numpy(others), WHY)
            return
        self.protect()
        self.labels.fix(ids, why)

    def __add__(self, other: Any) -> Any:
        """A sum of widths, or of a width and a fixed number, is a width."""
        if isinstance(other, Width) and other.labels is not self.labels:
            return self + other.plain
        if isinstance(other, Width) and other.stored != self.stored:
            return self + other.fixed() if other.stored else other + self.fixed()
        if isinstance(other, Width) and (self.without is not None or other.without is not None):
            return self._computed(operator.add, other)
        if isinstance(other, Width) and np.array_equal(other.ids, self.ids):
            return self._new(self.plain + other.plain, self.ratio + other.ratio, self.extra + other.extra)
        if isinstance(other, Width) and other.ratio == self.ratio:
            ids = np.concatenate([self.ids, other.ids])
            return Width.of(self.plain + other.plain, self.labels, ids, self.ratio, self.extra + other.extra)
        if type(other) is int:
            return self._new(self.plain + other, self.ratio, self.extra + other)
        return self._computed(operator.add, other)

    __radd__ = __add__

    def __neg__(self) -> Any:
        """The width times -1."""
        return self * -1

    def __sub__(self, other: Any) -> Any:
        """A difference of widths is a width."""
        if isinstance(other, Width) and other.stored and self.counts and other.labels is self.labels:
            rest = self._new(self.plain - other.plain, self.ratio, Fraction(-other.plain))
            rest.without = other
            return rest
        return self + other * -1 if isinstance(other, int) else self._computed(operator.sub, other)

    def __rsub__(self, other: Any) -> Any:
        """A fixed number minus a width is a width."""
        return self * -1 + other

    def __mul__(self, other: Any) -> Any:
        """A multiple of a width is a width."""
        if isinstance(other, Width) and other.stored != self.stored:
            return self * other.fixed() if other.stored else other * self.fixed()
        return self._times(Fraction(other)) if type(other) is int else self._computed(operator.mul, other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        """A part of a width is a width, if nothing remains."""
        other = other.fixed() if isinstance(other, Width) and other.stored else other
        if type(other) is int and other and self.plain % other == 0:
            return self._times(Fraction(1, other))
        return self._computed(operator.floordiv, other)

    def __mod__(self, other: Any) -> Any:
        """A remainder is used in checks, and cuts keep what is divided divisible."""
        other = other.fixed() if isinstance(other, Width) and other.stored and not self.stored else other
        return self.plain % other if type(other) is int else self._computed(operator.mod, other)

    def __eq__(self, other: object) -> bool:
        """Equal widths have to stay equal. Otherwise, a cut could change the answer, so the channels are protected."""
        equal = self.plain == (other.plain if isinstance(other, Width) else other)
        together = isinstance(other, Width) and other.labels is self.labels
        if equal and together and self.is_multiple and other.is_multiple:  # type: ignore[attr-defined]
            self.labels.proportional([self.ids, other.ids], WHY)  # type: ignore[attr-defined]
        elif isinstance(other, int | float):
            for width in widths_in((self, other)):
                width.protect()
        return equal

    def __ne__(self, other: object) -> bool:
        """The opposite of equality."""
        return not self == other

    def __hash__(self) -> int:
        """Unlike a plain number, so that a result that was stored for one is not found. Stored numbers are keys."""
        return hash(self.plain if self.stored else (self.plain, self.ids.tobytes(), id(self.labels)))

    def __copy__(self) -> Width:
        """The same width: it belongs to its trace."""
        return self

    def __deepcopy__(self, memo: Any) -> Width:
        """The same width, as for `copy`."""
        return self

    def __reduce__(self) -> Any:
        """In a file, it is a plain number."""
        return int, (self.plain,)

    def _times(self, factor: Fraction) -> Width:
        return self._new(int(self.plain * factor), self.ratio * factor, self.extra * factor)

    def _new(self, value: int, ratio: Fraction, extra: Fraction) -> Width:
        if self.without is not None:
            self.without.protect()
        return Width.of(value, self.labels, self.ids, ratio, extra)

    def _computed(self, function: Callable[..., Any], *others: Any) -> Any:
        """A plain result. Torch computes with tensors itself."""
        if any(isinstance(other, Tensor) for other in others):
            return NotImplemented
        for width in (self, *others):
            if isinstance(width, Width):
                width.protect()
        return function(self.plain, *(o.plain if isinstance(o, Width) else o for o in others))


def _computing(name: str) -> Callable[..., Any]:
    return lambda self, *others: self._computed(getattr(int, name), *others)


COMPUTED = (
    *("truediv", "rtruediv", "rfloordiv", "rmod", "divmod", "rdivmod", "pow", "rpow", "abs", "round", "ceil", "floor"),
    *("lshift", "rlshift", "rshift", "rrshift", "and", "rand", "or", "ror", "xor", "rxor", "invert", "trunc"),
    *("lt", "le", "gt", "ge", "int", "float", "format", "str", "repr"),
)
"""Python cannot tell of others: `0.5 * c`, `math.log(c)` and `range(c)` read the number itself. Trials find these."""
for _name in COMPUTED:
    setattr(Width, f"__{_name}__", _computing(f"__{_name}__"))


def current(value: Any, labels: Labels) -> Any:
    """Arguments of a call, in which widths of other traces, which a cache has kept, are plain numbers."""
    if isinstance(value, Width):
        return value if value.labels is labels else value.plain
    if isinstance(value, slice):
        return slice(*current([value.start, value.stop, value.step], labels))
    if type(value) is dict:
        return {key: current(item, labels) for key, item in value.items()}
    if type(value) in (list, tuple, torch.Size):
        items = [current(item, labels) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def number(size: int) -> int:
    """A size as a plain number."""
    return int.__add__(size, 0)


def sizes(tensor: Tensor, labels: Labels) -> list[int]:
    """The sizes of a tensor. Those that a cut changes are widths."""
    found, tag = list(tensor.shape), tag_of(tensor) or Tag()
    for dim in {d for plane in tag.planes for d in varying(plane)}:
        rows = [lines(p, [dim]) for p in tag.planes if dim in varying(p)]
        ids = torch.cat([r.flatten() for r in rows]).numpy()
        clear = len(rows) == len(rows[0]) == 1 and ids.min() > NONE
        found[dim] = Width.of(found[dim], labels, ids, Fraction(int(clear)))  # a ratio of 0 fits nothing: it protects
    return found


def read(tensor: Tensor, dim: int | None, labels: Labels) -> Any:
    """What code reads as the shape of a tensor, or as its size along a dimension."""
    found = sizes(tensor, labels)
    return torch.Size(found) if dim is None else found[dim]


def widths_in(value: Any) -> Iterator[Width]:
    """All widths in arguments of a function."""
    if isinstance(value, Width):
        yield value
    elif isinstance(value, slice):
        yield from widths_in((value.start, value.stop, value.step))
    elif isinstance(value, dict):
        yield from widths_in(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from widths_in(item)
