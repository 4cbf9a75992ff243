# SPDX-License-Identifier: AGPL-3.0-or-later
"""Operations that move elements: the labels move with the elements."""

from __future__ import annotations

import torch

from yolo_prune.graph.labels import NONE, Tag, attach, reshape, restride, tag_of, varying
from yolo_prune.graph.ops.base import Call, effect, first_input, first_tensor


@effect("clone", "contiguous", "_to_copy", "detach", "alias", "lift_fresh", "dropout", "native_dropout")
def same(call: Call) -> None:
    """The result has the same elements at the same places."""
    _, tag = first_input(call)
    attach(first_tensor(call.out), tag)


@effect("new_full", "new_zeros", "new_ones", "new_empty", "new_empty_strided", "_shape_as_tensor")
def fresh(call: Call) -> None:
    """A new tensor that has only the type of the input: it gets no labels."""


@effect("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "fill", "zero", "bernoulli")
def shaped_alike(call: Call) -> None:
    """A new tensor in the shape of the input: it has the same channels."""
    _, tag = first_input(call)
    attach(first_tensor(call.out), Tag(tag.planes, call.name in ("zeros_like", "zero")))


@effect("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten")
def shape(call: Call) -> None:
    """The same elements in another shape."""
    _, tag = first_input(call)
    attach(call.out, Tag(tuple(reshape(p, call.out.shape) for p in tag.planes), tag.silent, tag.source))


@effect(
    *("permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice", "select", "split", "split_with_sizes"),
    *("unbind", "flip", "roll", "repeat", "pixel_unshuffle", "chunk", "narrow", "numpy_T"),
    *("movedim", "unfold"),
)
def move(call: Call) -> None:
    """The operation moves elements. The same operation moves their labels."""
    tensor, tag = first_input(call)
    moved = [call.func(p, *call.args[1:], **call.kwargs) for p in tag.planes]
    outs = call.out if isinstance(call.out, list | tuple) else [call.out]
    copied = call.name in ("flip", "roll", "repeat", "pixel_unshuffle")
    for i, out in enumerate(outs):
        planes = [m[i] if isinstance(m, list | tuple) else m for m in moved]
        whole = tag.source if out.numel() == tensor.numel() else None
        attach(out, Tag(tuple(map(restride, planes) if copied else planes), tag.silent, whole))


@effect("channel_shuffle", "native_channel_shuffle")
def shuffle(call: Call) -> None:
    """Groups of channels change places with the channels in a group. Every group loses the same channels."""
    x, tag = first_input(call)
    groups, planes = int(call.args[1]), []
    for plane in tag.planes:
        split = reshape(plane, (x.shape[0], groups, -1, *x.shape[2:]))
        call.labels.unify(split, split[:, :1].expand_as(split))
        planes.append(reshape(split[:, :1].expand_as(split).transpose(1, 2), x.shape))
    attach(call.out, Tag(tuple(planes), tag.silent))


@effect("pixel_shuffle")
def channels_to_positions(call: Call) -> None:
    """Consecutive channels become the positions of one channel, so they are coupled."""
    x, tag = first_input(call)
    lead, factor, planes = x.shape[:-3], int(call.args[1]), []
    for plane in tag.planes:
        if varying(plane) & {x.ndim - 2, x.ndim - 1}:
            call.labels.pin(plane, "is rearranged between channels and positions")
            continue
        split = reshape(plane[..., :1, :1], (*lead, -1, factor**2, 1, 1))
        call.labels.unify(split, split[..., :1, :, :].expand_as(split))
        planes.append(split[..., 0, :, :].expand(call.out.shape))
    attach(call.out, Tag(tuple(planes), tag.silent))


@effect("im2col")
def windows(call: Call) -> None:
    """Every channel becomes as many channels as a window has positions."""
    x, tag = first_input(call)
    planes = []
    for plane in tag.planes:
        if varying(plane) != {x.ndim - 3}:
            call.labels.pin(plane, "is rearranged between channels and positions")
            continue
        row = plane[..., 0, 0].unsqueeze(-1).expand(*x.shape[:-2], call.out.shape[-2] // x.shape[-3])
        planes.append(reshape(row, call.out.shape[:-1]).unsqueeze(-1).expand(call.out.shape))
    attach(call.out, Tag(tuple(planes), tag.silent))


@effect("cat", "stack", "concat")
def join(call: Call) -> None:
    """Join parts. The elements of a part without labels get the label NONE."""
    parts, dim = call.args[0], call.get("dim", 0)
    if call.name == "stack":
        tags = [tag_of(t) or Tag() for t in parts]
        planes = [[p.unsqueeze(dim) for p in tag.planes] for tag in tags]
        shapes = [t.unsqueeze(dim).shape for t in parts]
    else:
        parts = [t for t in parts if t.ndim == call.out.ndim]  # torch.cat accepts empty one-dimensional tensors
        tags = [tag_of(t) or Tag() for t in parts]
        planes = [list(tag.planes) for tag in tags]
        shapes = [t.shape for t in parts]
    dim %= call.out.ndim
    joined = []
    for layer in range(max((len(p) for p in planes), default=0)):
        pieces = [
            p[layer] if layer < len(p) else torch.tensor(NONE).expand(size)
            for p, size in zip(planes, shapes, strict=True)
        ]
        along = frozenset().union(*map(varying, pieces))
        if along and dim not in along:  # parts are joined along another dimension, so their channels are coupled
            for piece in pieces[1:]:
                call.labels.unify(pieces[0].narrow(dim, 0, 1), piece.narrow(dim, 0, 1))
            joined.append(next(p for p in pieces if varying(p)).narrow(dim, 0, 1).expand(call.out.shape))
            continue
        for d in set(range(call.out.ndim)) - along - {dim}:
            pieces = [p.narrow(d, 0, min(1, p.shape[d])) for p in pieces]
        joined.append(restride(torch.cat(pieces, dim)).expand(call.out.shape))
    attach(call.out, Tag(tuple(joined), all(tag.silent for tag in tags)))


@effect("constant_pad_nd")
def pad(call: Call) -> None:
    """Padding adds elements with the label NONE at the edges."""
    x, tag = first_input(call)
    amounts, value, planes = list(call.args[1]), call.get("value", 0), []
    for plane in tag.planes:
        kept = list(amounts)
        for i in range(0, len(kept), 2):
            d = plane.ndim - 1 - i // 2
            if d not in varying(plane):
                kept[i : i + 2] = [0, 0]
                plane = plane.narrow(d, 0, 1)
        planes.append(restride(torch.constant_pad_nd(plane, kept, NONE)).expand(call.out.shape))
    source = tag.source if call.out.shape[:2] == x.shape[:2] else None  # a kernel with a border
    attach(call.out, Tag(tuple(planes), tag.silent and value == 0, source))


@effect("index", "gather", "index_select", "embedding")
def pick(call: Call) -> None:
    """Elements are picked by indices that are not known. Labels that vary along these dimensions are pinned."""
    x, tag = first_input(call)
    if call.name == "index":
        dims = {d for d, index in enumerate(call.args[1]) if index is not None}
        zeros = [None if i is None else torch.zeros(i.shape, dtype=torch.long) for i in call.args[1]]
    else:
        dims = {0 if call.name == "embedding" else int(call.args[1]) % x.ndim}
    planes = []
    for plane in tag.planes:
        if varying(plane) & dims:
            call.labels.pin(plane, "is picked by index")
        elif call.name == "index":
            planes.append(restride(torch.ops.aten.index(plane, zeros)))
        elif call.name == "embedding":
            planes.append(plane[0].expand(call.out.shape))
        else:
            for d in range(plane.ndim):
                plane = plane.narrow(d, 0, 1 if d in dims else min(plane.shape[d], call.out.shape[d]))
            planes.append(plane.expand(call.out.shape))
    attach(call.out, Tag(tuple(planes), tag.silent))
