# SPDX-License-Identifier: AGPL-3.0-or-later
"""Operations of layers: what is summed over is one, a normalisation over channels pins them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from yolo_prune.graph.labels import NONE, Labels, Tag, put, tag_of, tight, varying
from yolo_prune.graph.ops.base import Call, effect, first, first_input


@effect("convolution", "conv2d", "conv1d", "conv3d", "conv_transpose2d", "_convolution")
def convolution(call: Call) -> None:
    """Sums over input channels; in groups, the same places of every group live together."""
    x, weight = call.args[:2]
    w, tag = tag_of(weight), tag_of(x) or Tag()
    transposed, groups = bool(call.get("transposed", False)), int(call.get("groups", 1))
    if w is None or w.source is None or len(w.planes) != 2:
        call.pin_all("is convolved with weights that are computed")
        return
    rows, columns = (w.planes[0].flatten(1)[:, 0], w.planes[1][0].flatten(1)[:, 0])
    given = _channels(call, tag, x.shape[1])
    if not tag.silent:
        call.labels.pin(given, "feeds a convolution through an activation that is not 0 at 0")
    made = (_transposed if transposed else _direct)(call.labels, rows, columns, given, groups)
    if (bias := tag_of(call.get("bias"))) and bias.planes:
        call.labels.unify(bias.planes[0], made)
    put(call.out, Tag((made.view(1, -1, *[1] * (call.out.ndim - 2)).expand(call.out.shape),)))
    positions = math.prod((x if transposed else call.out).shape[2:]) * x.shape[0]
    call.count(None, w.source, positions * weight.numel())


def _direct(labels: Labels, rows: Tensor, columns: Tensor, given: Tensor, groups: int) -> Tensor:
    """Output labels of a convolution; its weight is (out, in // groups, ...)."""
    if groups == 1:
        labels.unify(columns, given)
        return rows
    outs = rows.view(groups, -1)
    if columns.numel() == 1:  # depthwise: each input channel has its own outputs
        labels.unify(outs, given[:, None].expand_as(outs))
    else:
        labels.unify(columns.expand(groups, -1), given.view(groups, -1))
        labels.unify(outs, outs[:1].expand_as(outs))
    return rows


def _transposed(labels: Labels, rows: Tensor, columns: Tensor, given: Tensor, groups: int) -> Tensor:
    """Output labels of a transposed convolution; its weight is (in, out // groups, ...)."""
    labels.unify(rows, given)
    if groups == 1:
        return columns
    if len(rows) == groups:  # depthwise
        labels.pin(columns, "is a multiple of each channel")
        return rows.repeat_interleave(len(columns))
    ins = rows.view(groups, -1)
    labels.unify(ins, ins[:1].expand_as(ins))
    return columns.repeat(groups)


def _channels(call: Call, tag: Tag, size: int) -> Tensor:
    """Labels of the channels (dimension 1) of an input: `(size,)`; NONE where it has none."""
    planes = [p for p in tag.planes if 1 in varying(p)]
    if any(varying(p) != {1} for p in planes):
        call.pin_all("is rearranged between channels and positions")
        planes = []
    if not planes:
        return torch.full((size,), NONE)
    return planes[0][0].flatten(1)[:, 0]


@effect("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "batch_norm")
@effect("cudnn_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update")
def batch_norm(call: Call) -> None:
    """A factor and an offset per channel; a silenced channel has neither."""
    x, tag = first_input(call)
    given = _channels(call, tag, x.shape[1])
    silent = False
    for name in ("weight", "bias", "running_mean", "running_var"):
        if (own := tag_of(call.get(name))) and own.planes:
            call.labels.unify(own.planes[0], given)
            if name == "weight":
                silent = True
                call.count(None, own.source, 4.0 * x.numel())  # as thop counts it, and so Ultralytics
    put(first(call.out), Tag(tag.planes, silent))


@effect("native_layer_norm", "layer_norm", "native_group_norm", "group_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> None:
    """Normalises over channels: every channel depends on all."""
    x, tag = first_input(call)
    reason = "GroupNorm" if "group" in call.name else "LayerNorm"
    for plane in tag.planes:
        call.labels.pin(plane, reason)
    for name in ("weight", "bias"):
        if (own := tag_of(call.get(name))) and own.planes:
            call.labels.pin(own.planes[0], reason)
            if tag.planes and reason == "LayerNorm" and varying(tag.planes[0]) == {x.ndim - 1}:
                call.labels.unify(own.planes[0], tight(tag.planes[0]).flatten())
            if name == "weight":
                call.count(None, own.source, 4.0 * x.numel())
    put(first(call.out), Tag(tag.planes, False))


class _Factor(NamedTuple):
    """One of the two factors of a matrix product.

    Attributes:
        tensor: `(..., rows, columns)`.
        tag: what it carries.
        summed: the dimension that the product sums over, counted from the end.
        free: the other one of the matrix.
    """

    tensor: Tensor
    tag: Tag
    summed: int
    free: int

    @property
    def gone(self) -> list[Tensor]:
        """Planes that vary along what is summed over."""
        return [p for p in self.tag.planes if p.ndim + self.summed in varying(p)]

    def left(self, shape: torch.Size) -> list[Tensor]:
        """The other planes, as they are found in a product of this shape."""
        planes = [p for p in self.tag.planes if p.ndim + self.summed not in varying(p)]
        return [p.narrow(self.summed, 0, 1).expand(shape) for p in planes]

    def mixes(self, plane: Tensor) -> bool:
        """A plane varies along both dimensions of the matrix."""
        return plane.ndim + self.free in varying(plane)


@effect("mm", "bmm", "matmul", "mv", "dot", "addmm", "baddbmm", "linear", "addmv")
def contract(call: Call) -> None:
    """A matrix product: what it sums over is one, what stays keeps its labels."""
    bias, first_factor, second_factor = _operands(call)
    if first_factor.ndim == 1 or second_factor.ndim == 1:
        call.pin_all("is multiplied as a vector")
        return
    a = _Factor(first_factor, tag_of(first_factor) or Tag(), summed=-1, free=-2)
    b = _Factor(second_factor, tag_of(second_factor) or Tag(), summed=-2, free=-1)
    _sum_over(call, a, b)
    if not call.trusted:
        _batch_dimensions(call, a, b)
    shape = call.out.shape
    kept_a, kept_b = a.left(shape), b.left(shape)
    _add_bias(call, bias, kept_b)
    silent = (a.tag.silent or not kept_a) and (b.tag.silent or not kept_b)  # a silent row of weights: a silent output
    put(call.out, Tag((*kept_a, *kept_b), silent))
    source = b.tag.source or a.tag.source
    labelled = next(iter((*a.gone, *b.gone, *kept_b, *kept_a)), None)
    call.count(None if source else labelled, source, float(call.out.numel() * a.tensor.shape[-1]))


def _operands(call: Call) -> tuple[Tensor | None, Tensor, Tensor]:
    """What is added, and the two factors."""
    if call.name in ("addmm", "baddbmm", "addmv"):
        return call.args[0], call.args[1], call.args[2]
    return None, call.args[0], call.args[1]


def _sum_over(call: Call, a: _Factor, b: _Factor) -> None:
    """What is summed over lives together in both factors; what has no partner, or is not silent at 0, stays."""
    for p, q in zip(a.gone, b.gone, strict=False):
        if a.mixes(p) or b.mixes(q):
            call.pin_all("is rearranged between channels and positions")
        else:
            call.labels.unify(p[..., :1, :].transpose(-1, -2), q[..., :, :1])
    for p in (*a.gone[len(b.gone) :], *b.gone[len(a.gone) :]):
        call.labels.pin(p, "is multiplied by a matrix of fixed width")
    if (a.gone and not a.tag.silent) or (b.gone and not b.tag.silent):
        for p in (*a.gone, *b.gone):
            call.labels.pin(p, "feeds a product through an activation that is not 0 at 0")


def _add_bias(call: Call, bias: Tensor | None, kept: Sequence[Tensor]) -> None:
    """What is added to a product lives with what the second factor puts out."""
    own = None if bias is None else tag_of(bias)
    for p in own.planes if own else ():
        for q in kept:
            call.labels.unify(p.expand(call.out.shape), q)


def _batch_dimensions(call: Call, *factors: _Factor) -> None:
    """Outside of a rule, heads must not vary: that all of them keep equal counts is not known."""
    for factor in factors:
        for plane in factor.tag.planes:
            if any(d < factor.tensor.ndim - 2 for d in varying(plane)):
                call.labels.pin(plane, "is multiplied head by head")
