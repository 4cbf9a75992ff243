# SPDX-License-Identifier: AGPL-3.0-or-later
"""Operations of layers: a sum over channels couples them, a normalization over channels pins them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from yolo_prune.graph.labels import NONE, Labels, Tag, attach, collapse, tag_of, varying
from yolo_prune.graph.ops.base import Call, effect, first_input, first_tensor


@effect("convolution", "conv2d", "conv1d", "conv3d", "conv_transpose2d", "_convolution")
def convolution(call: Call) -> None:
    """A convolution sums over input channels. In a grouped one, channels with the same index in a group are coupled."""
    x, weight = call.args[:2]
    w, tag = tag_of(weight), tag_of(x) or Tag()
    transposed, groups = bool(call.get("transposed", False)), int(call.get("groups", 1))
    macs = math.prod((x if transposed else call.out).shape[2:]) * x.shape[0] * weight.numel()
    labels_of_weight = _rows_and_columns(weight, w or Tag())
    if w is None or labels_of_weight is None:
        call.pin_all("is convolved with weights that are computed")
        call.count(None, None, macs)
        return
    in_labels = _channels(call, tag, x.shape[1])
    for plane in (p for p in tag.planes if 1 not in varying(p)):
        call.labels.pin(plane, "is convolved over channels")
    if not tag.silent:
        call.labels.pin(in_labels, "feeds a convolution through an activation that is not 0 at 0")
    out_labels = (_transposed if transposed else _direct)(call.labels, *labels_of_weight, in_labels, groups)
    if (bias := tag_of(call.get("bias"))) and bias.planes:
        call.labels.unify(bias.planes[0], out_labels)
    plane = out_labels.view(1, -1, *[1] * (call.out.ndim - 2)).expand(call.out.shape)
    attach(call.out, Tag((plane,), w.silent))
    call.count(None, w.source, macs)


def _rows_and_columns(weight: Tensor, tag: Tag) -> tuple[Tensor, Tensor] | None:
    """Labels along the first two dimensions of a parameter, also if its elements were changed one by one.

    None if the weight is anything else.
    """
    along = {d: p for p in tag.planes for d in varying(p)}
    single = [p.flatten()[:1] for p in tag.planes if not varying(p)]  # of dimensions of size 1
    wide = {d for d, size in enumerate(weight.shape[:2]) if size > 1}
    if tag.source is None or along.keys() != wide or any(len(varying(p)) > 1 for p in tag.planes):
        return None
    found = []
    for d in (0, 1):
        rest = single.pop(0) if d not in along and single else torch.full((1,), NONE)
        found.append(along[d].movedim(d, 0).flatten(1)[:, 0] if d in along else rest)
    return found[0], found[1]


def _direct(labels: Labels, rows: Tensor, columns: Tensor, in_labels: Tensor, groups: int) -> Tensor:
    """Output labels of a convolution with a weight of shape (out, in // groups, ...)."""
    if groups == 1:
        labels.unify(columns, in_labels)
        return rows
    outs = rows.view(groups, -1)
    if columns.numel() == 1:  # depthwise: each input channel has its own outputs
        labels.unify(outs, in_labels[:, None].expand_as(outs))
    else:
        labels.unify(columns.expand(groups, -1), in_labels.view(groups, -1))
        labels.unify(outs, outs[:1].expand_as(outs))
    return rows


def _transposed(labels: Labels, rows: Tensor, columns: Tensor, in_labels: Tensor, groups: int) -> Tensor:
    """Output labels of a transposed convolution with a weight of shape (in, out // groups, ...)."""
    labels.unify(rows, in_labels)
    if groups == 1:
        return columns
    if len(rows) == groups:  # depthwise
        labels.pin(columns, "is a multiple of each channel")
        return rows.repeat_interleave(len(columns))
    ins = rows.view(groups, -1)
    labels.unify(ins, ins[:1].expand_as(ins))
    return columns.repeat(groups)


def _channels(call: Call, tag: Tag, size: int) -> Tensor:
    """`(size,)`: labels of the channels (dimension 1) of an input; NONE for channels without a label."""
    planes = [p for p in tag.planes if 1 in varying(p)]
    if any(varying(p) != {1} for p in planes):
        call.pin_all("is rearranged between channels and positions")
        planes = []
    if not planes:
        return torch.full((size,), NONE)
    labels = planes[0][0]
    return labels.flatten(1)[:, 0] if labels.ndim > 1 else labels  # without positions: (batch, channels)


@effect("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "batch_norm")
@effect("cudnn_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update")
def batch_norm(call: Call) -> None:
    """A factor and an offset per channel; both are 0 in a silenced channel."""
    x, tag = first_input(call)
    in_labels = _channels(call, tag, x.shape[1])
    for plane in (p for p in tag.planes if 1 not in varying(p)):
        call.labels.pin(plane, "is normalized together with other channels")
    silent = False
    for name in ("weight", "bias", "running_mean", "running_var"):
        if (own := tag_of(call.get(name))) and own.planes:
            call.labels.unify(own.planes[0], in_labels)
            if name == "weight":
                silent = True
                call.count(None, own.source, 4.0 * x.numel())  # 4 per element, as thop counts, which Ultralytics uses
    attach(first_tensor(call.out), Tag(tag.planes, silent))


@effect("native_layer_norm", "layer_norm", "native_group_norm", "group_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> None:
    """A normalization over channels: every channel depends on all channels."""
    x, tag = first_input(call)
    reason = "GroupNorm" if "group" in call.name else "LayerNorm"
    for plane in tag.planes:
        call.labels.pin(plane, reason)
    for name in ("weight", "bias"):
        if (own := tag_of(call.get(name))) and own.planes:
            call.labels.pin(own.planes[0], reason)
            if tag.planes and reason == "LayerNorm" and varying(tag.planes[0]) == {x.ndim - 1}:
                call.labels.unify(own.planes[0], collapse(tag.planes[0]).flatten())
            if name == "weight":
                call.count(None, own.source, 4.0 * x.numel())
    attach(first_tensor(call.out), Tag(tag.planes, False))


class _Factor(NamedTuple):
    """One of the two factors of a matrix product.

    Attributes:
        tensor: `(..., rows, columns)`.
        tag: the tag of the tensor.
        summed: the dimension that the product sums over, counted from the end.
        free: the other dimension of the matrix, counted from the end.
    """

    tensor: Tensor
    tag: Tag
    summed: int
    free: int

    @property
    def summed_planes(self) -> list[Tensor]:
        """Planes that vary along the summed dimension."""
        return [p for p in self.tag.planes if p.ndim + self.summed in varying(p)]

    def other_planes(self, shape: torch.Size) -> list[Tensor]:
        """The other planes, expanded to the shape of the product."""
        planes = [p for p in self.tag.planes if p.ndim + self.summed not in varying(p)]
        return [p.narrow(self.summed, 0, 1).expand(shape) for p in planes]

    def mixes(self, plane: Tensor) -> bool:
        """Whether a plane also varies along the free dimension."""
        return plane.ndim + self.free in varying(plane)


@effect("mm", "bmm", "matmul", "mv", "dot", "addmm", "baddbmm", "linear", "addmv")
def contract(call: Call) -> None:
    """A matrix product: it couples the channels that it sums over; the other channels keep their labels."""
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
    kept_a, kept_b = a.other_planes(shape), b.other_planes(shape)
    _add_bias(call, bias, kept_b)
    silent = (a.tag.silent or not kept_a) and (b.tag.silent or not kept_b)  # silent weights make a silent output
    attach(call.out, Tag((*kept_a, *kept_b), silent))
    source = b.tag.source or a.tag.source
    labelled = next(iter((*a.summed_planes, *b.summed_planes, *kept_b, *kept_a)), None)
    call.count(None if source else labelled, source, float(call.out.numel() * a.tensor.shape[-1]))


def _operands(call: Call) -> tuple[Tensor | None, Tensor, Tensor]:
    """The summand (None if there is none), and the two factors."""
    if call.name in ("addmm", "baddbmm", "addmv"):
        return call.args[0], call.args[1], call.args[2]
    return None, call.args[0], call.args[1]


def _sum_over(call: Call, a: _Factor, b: _Factor) -> None:
    """Couple the summed channels of both factors. Pin those without a partner, and those that are not 0 if silenced."""
    for p, q in zip(a.summed_planes, b.summed_planes, strict=False):
        if a.mixes(p) or b.mixes(q):
            call.pin_all("is rearranged between channels and positions")
        else:
            call.labels.unify(p[..., :1, :].transpose(-1, -2), q[..., :, :1])
    for p in (*a.summed_planes[len(b.summed_planes) :], *b.summed_planes[len(a.summed_planes) :]):
        call.labels.pin(p, "is multiplied by a matrix of fixed width")
    if (a.summed_planes and not a.tag.silent) or (b.summed_planes and not b.tag.silent):
        for p in (*a.summed_planes, *b.summed_planes):
            call.labels.pin(p, "feeds a product through an activation that is not 0 at 0")


def _add_bias(call: Call, bias: Tensor | None, kept: Sequence[Tensor]) -> None:
    """Couple the labels of the bias with the output channels of the second factor."""
    own = None if bias is None else tag_of(bias)
    for p in own.planes if own else ():
        for q in kept:
            call.labels.unify(p.expand(call.out.shape), q)


def _batch_dimensions(call: Call, *factors: _Factor) -> None:
    """Pin labels that vary along batch dimensions: only a rule can promise that all heads keep equal counts."""
    for factor in factors:
        for plane in factor.tag.planes:
            if any(d < factor.tensor.ndim - 2 for d in varying(plane)):
                call.labels.pin(plane, "is multiplied head by head")
