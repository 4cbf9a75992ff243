# SPDX-License-Identifier: AGPL-3.0-or-later
"""What sizes in the code of a block demand: a size that is read from a tensor follows a cut, a fixed number does not.

The trace moves labels with the elements. After a cut, this is right only if all sizes in the code are right, too. So
the labels in a part whose size is a fixed number are protected. A part whose size is read from a tensor keeps the same
fraction of its channels as that tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from yolo_prune.env.registry import Registry
from yolo_prune.graph.labels import Labels, Tag, attach, collapse, lines, tag_of, varying
from yolo_prune.graph.widths import WHY, Width, number, sizes, widths_in

PLAIN_INDICES = (int, Width, slice, type(None), type(Ellipsis))
REST = -1  # in place of a size: what remains, as in `view(b, -1)`


@dataclass
class Use:
    """A call of a function of torch in the code of a block without a rule.

    Attributes:
        labels: the labels of the model.
        name: name of the function.
        args: the positional arguments.
        kwargs: the other arguments.
        out: the result; its tensors have their tags.
        layers: the named modules of the model.
    """

    labels: Labels
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    layers: Mapping[str, nn.Module]

    def get(self, position: int, *names: str) -> Any:
        """An argument; None if it is missing."""
        named = next((self.kwargs[n] for n in names if n in self.kwargs), None)
        return self.args[position] if position < len(self.args) else named

    def sizes_from(self, position: int, *names: str) -> list[Any]:
        """Sizes that are given as a list, or one by one from `position` on."""
        first = self.get(position, *names)
        return list(first) if isinstance(first, list | tuple) else list(self.args[position:])

    @property
    def tensor(self) -> Tensor:
        """The first argument."""
        tensor: Tensor = self.get(0, "input", "self", "tensor")
        return tensor

    @property
    def planes(self) -> tuple[Tensor, ...]:
        """The planes of the first argument."""
        return (tag_of(self.tensor) or Tag()).planes

    @property
    def why(self) -> str:
        """Why channels are protected whose number the code fixes."""
        return f"is cut up by '{self.name.strip('_')}'"

    def demand(self, part: Tensor, size: int) -> None:
        """Demand that the elements with the labels `part` are as many as a size in the code says."""
        if isinstance(size, Width):
            size.demand(part, self.why)
        elif size != REST:
            self.labels.fix(part, self.why)

    def divide(self, dim: int, parts: Sequence[int]) -> None:
        """Demand that the consecutive parts of a dimension have these sizes. One of them may be REST."""
        dim %= self.tensor.ndim
        planes = [p for p in self.planes if dim in varying(p)]
        rows = [lines(p, [dim]) for p in planes]
        if len(rows) != 1 or len(rows[0]) != 1:
            self.protect(planes, parts)
            return
        given = [None if _is_rest(size) else number(size) for size in parts]
        rest, start = rows[0].shape[1] - sum(n for n in given if n is not None), 0
        for size, length in zip(parts, given, strict=True):
            stop = start + (rest if length is None else length)
            if stop > start:
                self.demand(rows[0][0, start:stop], size)
            start = stop

    def protect(self, planes: Sequence[Tensor], arguments: Any) -> None:
        """Protect the labels in planes, and all channels whose number is among the arguments."""
        for plane in planes:
            self.labels.pin(plane, self.why)
        for width in widths_in(arguments):
            width.protect()

    def protect_all(self) -> None:
        """Protect the labels of the first argument, and all channels whose number is an argument."""
        self.protect(self.planes, (self.args, self.kwargs))


HANDLERS: Registry[str, Callable[[Use], None]] = Registry("'{}' is followed already.")


def follow(use: Use) -> None:
    """Follow the sizes in a call. What any other function computes from a width is not known."""
    handler = HANDLERS.get(use.name)
    if handler:
        handler(use)
    else:
        use.protect((), (use.args, use.kwargs))


def _is_rest(size: int) -> bool:
    return not isinstance(size, Width) and size == REST


@HANDLERS.register("view", "reshape", "unflatten", "view_as", "reshape_as")
def reshaped(use: Use) -> None:
    """The same elements in another shape. Channels may be divided, if only one of the new sizes follows a cut."""
    wanted = _new_shape(use)
    if len(wanted) != use.out.ndim:  # `view(torch.int32)`
        use.protect_all()
        return
    tag, before = tag_of(use.out) or Tag(), use.planes
    planes = list(tag.planes)
    for ins, outs in _segments(use.tensor.shape, use.out.shape):
        moved = [p for p in before if varying(p) & set(ins)]
        sizes_here = [wanted[d] for d in outs]
        if not moved:
            use.protect((), sizes_here)
        for plane in moved:
            whole = len(outs) == 1 or varying(plane) >= set(ins)
            at = _one_that_follows(sizes_here) if whole and varying(plane) <= set(ins) else None
            if at is None:
                use.protect([plane], sizes_here)
                continue
            use.protect((), [size for i, size in enumerate(sizes_here) if i != at])
            shape = [use.out.shape[d] for d in outs]
            blocks = lines(plane, ins).view(prod(shape[:at]), shape[at], prod(shape[at + 1 :]))
            use.labels.unify(blocks, blocks[:1, :, :1].expand_as(blocks))
            use.demand(blocks[0, :, 0], sizes_here[at])
            planes = [_even_along(p, {*outs} - {outs[at]}) for p in planes]
    attach(use.out, replace(tag, planes=tuple(planes)))


def _new_shape(use: Use) -> list[int]:
    """The sizes in the code of a reshape."""
    if use.name.endswith("_as"):
        return sizes(use.get(1, "other"), use.labels)
    if use.name != "unflatten":
        return use.sizes_from(1, "size", "shape")
    dim = use.get(1, "dim") % use.tensor.ndim
    own = [REST if isinstance(n, Width) else n for n in sizes(use.tensor, use.labels)]  # these are not in the code
    return [*own[:dim], *use.get(2, "sizes"), *own[dim + 1 :]]


def _one_that_follows(wanted: Sequence[int]) -> int | None:
    """Position of the size that follows a cut; None if it is not exactly one.

    A size that is read from a tensor follows, or else one that is left open. Of several stored sizes, the last one
    does: the number of heads stays, and their size follows.
    """
    read = [i for i, size in enumerate(wanted) if isinstance(size, Width) and not size.stored]
    stored = [i for i, size in enumerate(wanted) if isinstance(size, Width) and size.stored and size.may_change]
    follows = read or [i for i, size in enumerate(wanted) if _is_rest(size)] or stored[-1:]
    return follows[0] if len(follows) == 1 else None


def _even_along(plane: Tensor, dims: set[int]) -> Tensor:
    """A plane whose labels have become the same along some dimensions."""
    for d in dims & varying(plane):
        plane = plane.narrow(d, 0, 1).expand_as(plane)
    return plane


def _segments(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The dimensions that become other dimensions in a reshape, without dimensions of size 1."""
    left, right = ([d for d, n in enumerate(shape) if n != 1] for shape in (before, after))
    found = []
    while left and right:
        ins, outs = [left.pop(0)], [right.pop(0)]
        while (a := prod(before[d] for d in ins)) != (b := prod(after[d] for d in outs)):
            (ins if a < b else outs).append((left if a < b else right).pop(0))
        found.append((ins, outs))
    return found


@HANDLERS.register("expand", "expand_as", "broadcast_to")
def expanded(use: Use) -> None:
    """One element becomes as many as the code says; where there are more already, their number has to fit."""
    named = use.name.endswith("_as")
    wanted = sizes(use.get(1, "other"), use.labels) if named else use.sizes_from(1, "size")
    lead = use.out.ndim - use.tensor.ndim
    for dim, size in enumerate(wanted):
        if dim >= lead and use.tensor.shape[dim - lead] > 1:
            use.divide(dim - lead, [size])
        else:
            _grow(use, dim, size)


@HANDLERS.register("repeat")
def repeated(use: Use) -> None:
    """A tensor is repeated: how often, the code says."""
    times = use.sizes_from(1, "repeats")
    lead = use.out.ndim - use.tensor.ndim
    for dim, size in enumerate(times):
        if dim >= lead and use.tensor.shape[dim - lead] > 1:
            use.protect((), [size])
        else:
            _grow(use, dim, size)


@HANDLERS.register("zeros", "ones", "full", "empty", "rand", "randn")
@HANDLERS.register("new_zeros", "new_ones", "new_full", "new_empty")
def made(use: Use) -> None:
    """A new tensor. On the meta device, it has the channels that its sizes count."""
    position = int(use.name.startswith("new_"))
    for dim, size in enumerate(use.sizes_from(position, "size")):
        _grow(use, dim, size)
    if use.name.endswith("full"):
        use.protect((), use.get(position + 1, "fill_value"))


def _grow(use: Use, dim: int, size: int) -> None:
    """Give the elements along a new dimension the labels of the channels that its size counts."""
    if not isinstance(size, Width):
        return
    if not size.counts or not use.out.is_meta:
        size.protect()
        return
    plane = torch.from_numpy(size.ids).view([-1 if d == dim else 1 for d in range(use.out.ndim)])
    planes = (tag_of(use.out) or Tag()).planes
    attach(use.out, Tag((*planes, plane.expand(use.out.shape)), use.name.endswith("zeros")))


@HANDLERS.register("split", "split_with_sizes")
def split(use: Use) -> None:
    """Consecutive parts: all of one size, or each of its own."""
    asked = use.get(1, "split_size", "split_size_or_sections", "split_sizes")
    dim = use.get(2, "dim") or 0
    if isinstance(asked, list | tuple):
        use.divide(dim, asked)
    elif use.tensor.shape[dim] % number(asked) == 0:
        use.divide(dim, [asked] * (use.tensor.shape[dim] // number(asked)))
    else:
        use.protect_all()


@HANDLERS.register("narrow")
def narrowed(use: Use) -> None:
    """A part with a start and a length."""
    start, length = use.get(2, "start"), use.get(3, "length")
    if isinstance(start, int) and number(start) >= 0:
        use.divide(use.get(1, "dim"), [start, length, REST])
    else:
        use.protect_all()


@HANDLERS.register("select")
def selected(use: Use) -> None:
    """One element."""
    _item(use, use.get(1, "dim"), use.get(2, "index"))


@HANDLERS.register("roll")
def rolled(use: Use) -> None:
    """The last elements, as many as the code says, become the first ones."""
    shifts, dims = ([n] if isinstance(n, int) else n for n in (use.get(1, "shifts"), use.get(2, "dims")))
    if not dims:
        use.protect_all()
        return
    for by, dim in zip(shifts, dims, strict=True):
        if abs(number(by)) > use.tensor.shape[dim]:  # what remains depends on the size
            use.protect_all()
        else:
            use.divide(dim, [REST, by] if number(by) >= 0 else [-by, REST])


@HANDLERS.register("__getitem__", "__setitem__")
def indexed(use: Use) -> None:
    """Slices and single elements. What is picked by tensors is protected by the operation itself."""
    use.protect((), use.get(2, "value"))
    index = use.get(1)
    items = list(index) if isinstance(index, tuple) else [index]
    if any(type(item) not in PLAIN_INDICES for item in items):
        picked(use)
        return
    used = sum(item is not None and item is not Ellipsis for item in items)
    spread = [[slice(None)] * (use.tensor.ndim - used) if item is Ellipsis else [item] for item in items]
    for dim, item in enumerate(i for part in spread for i in part if i is not None):
        if isinstance(item, slice):
            _slice(use, dim, item)
        else:
            _item(use, dim, item)


def _item(use: Use, dim: int, index: int) -> None:
    use.divide(dim, [index, 1, REST] if number(index) >= 0 else [REST, 1, -index - 1])


def _slice(use: Use, dim: int, item: slice) -> None:
    """Demand the sizes of the parts before, in and after a slice."""
    size = use.tensor.shape[dim]
    start, stop = item.start or 0, item.stop
    if stop is not None and number(stop) >= size and not isinstance(stop, Width):
        stop = None  # it is beyond the end
    if not isinstance(start, Width) and (start, stop, item.step) == (0, None, None):
        return
    if item.step not in (None, 1) or (stop is not None and number(start) < 0):
        use.protect([p for p in use.planes if dim in varying(p)], item)
    elif number(start) < 0:
        use.divide(dim, [REST, -start])
    elif stop is None:
        use.divide(dim, [start, REST])
    elif number(stop) < 0:
        use.divide(dim, [start, REST, -stop])
    else:
        use.divide(dim, [start, stop - start, REST])


@HANDLERS.register("tensor_split", "hsplit", "vsplit", "dsplit", "unsafe_split", "unsafe_chunk", "narrow_copy")
@HANDLERS.register("index_select", "unbind", "take")
def picked(use: Use) -> None:
    """Parts are taken out in another way."""
    before, outs = _ids(use.planes), use.out if isinstance(use.out, list | tuple) else [use.out]
    if any(before - _ids((tag_of(out) or Tag()).planes) for out in outs):
        use.protect_all()
    else:
        use.protect((), (use.args, use.kwargs))


def _ids(planes: Sequence[Tensor]) -> set[int]:
    return {i for plane in planes for i in torch.unique(collapse(plane)).tolist()}


@HANDLERS.register("unfold")
def windows(use: Use) -> None:
    """Windows along a dimension: a method of tensors, unlike the function of this name, which takes positions."""
    if use.tensor.ndim == use.out.ndim - 1:
        dim = use.get(1, "dimension") % use.tensor.ndim
        use.protect([p for p in use.planes if dim in varying(p)], ())
    use.protect((), (use.args[1:], use.kwargs))


@HANDLERS.register("__len__", "__iter__", "numel", "nelement")
def counted(use: Use) -> None:
    """A number that is read in another way: Python makes a plain number of it."""
    dims = frozenset(range(use.tensor.ndim if use.name.startswith("n") else 1))
    for plane in use.planes:
        if varying(plane) & dims:
            use.labels.pin(plane, WHY)


@HANDLERS.register("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolved(use: Use) -> None:
    """A convolution in as many groups as there are channels: their number is in the code."""
    named = {key: value for key, value in use.kwargs.items() if key != "groups"}
    use.protect((), [use.args[:6], use.args[7:], named])
    groups = use.get(6, "groups")
    if groups is None or number(groups) == 1:
        return
    source = getattr(tag_of(use.get(1, "weight")), "source", None) or ""
    if isinstance(use.layers.get(source.rpartition(".")[0]), nn.modules.conv._ConvNd):
        return  # the number of groups is an attribute of this layer, too, and a cut updates it
    if number(groups) == use.tensor.shape[1]:
        use.divide(1, [groups])
    else:
        use.protect((), [groups])


@HANDLERS.register("scaled_dot_product_attention")
def attention(use: Use) -> None:
    """Without a scale, the products are divided by the root of a width."""
    if use.get(6, "scale") is None:
        for tensor in (use.get(0, "query"), use.get(1, "key")):
            for plane in (tag_of(tensor) or Tag()).planes:
                use.labels.pin(plane, "sets the scale of an attention")
