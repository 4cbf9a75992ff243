# SPDX-License-Identifier: AGPL-3.0-or-later
"""Operations of layers: what is summed over is one, a normalisation over channels pins them."""

from __future__ import annotations

import math

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


@effect("mm", "bmm", "matmul", "mv", "dot", "addmm", "baddbmm", "linear", "addmv")
def contract(call: Call) -> None:
    """A matrix product: what it sums over is one, what stays keeps its labels."""
    bias, a, b = _operands(call)
    s, t = tag_of(a) or Tag(), tag_of(b) or Tag()
    if b.ndim == 1 or a.ndim == 1:
        call.pin_all("is multiplied as a vector")
        return
    summed_a = [p for p in s.planes if p.ndim - 1 in varying(p)]
    summed_b = [p for p in t.planes if p.ndim - 2 in varying(p)]
    for p, q in zip(summed_a, summed_b, strict=False):
        mixed = p.ndim - 2 in varying(p) or q.ndim - 1 in varying(q)
        if mixed:
            call.pin_all("is rearranged between channels and positions")
        else:
            call.labels.unify(p[..., :1, :].transpose(-1, -2), q[..., :, :1])
    for p in (*summed_a[len(summed_b) :], *summed_b[len(summed_a) :]):
        call.labels.pin(p, "is multiplied by a matrix of fixed width")
    if (summed_a and not s.silent) or (summed_b and not t.silent):
        for p in (*summed_a, *summed_b):
            call.labels.pin(p, "feeds a product through an activation that is not 0 at 0")
    kept_a = [p[..., :1].expand(call.out.shape) for p in s.planes if p.ndim - 1 not in varying(p)]
    kept_b = [p[..., :1, :].expand(call.out.shape) for p in t.planes if p.ndim - 2 not in varying(p)]
    if not call.trusted:
        _batch_dimensions(call, (a, s), (b, t))
    if bias is not None and (own := tag_of(bias)):
        for p in own.planes:
            for q in kept_b:
                call.labels.unify(p.expand(call.out.shape), q)
    silent = (s.silent or not kept_a) and (t.silent or not kept_b)  # a silent row of weights makes a silent output
    put(call.out, Tag((*kept_a, *kept_b), silent))
    macs = float(call.out.numel() * a.shape[-1])
    source = t.source or s.source
    labelled = next(iter((*summed_a, *summed_b, *kept_b, *kept_a)), None)
    call.count(None if source else labelled, source, macs)


def _operands(call: Call) -> tuple[Tensor | None, Tensor, Tensor]:
    if call.name in ("addmm", "baddbmm", "addmv"):
        return call.args[0], call.args[1], call.args[2]
    return None, call.args[0], call.args[1]


def _batch_dimensions(call: Call, *operands: tuple[Tensor, Tag]) -> None:
    """Outside of a rule, heads must not vary: that all of them keep equal counts is not known."""
    for tensor, tag in operands:
        for plane in tag.planes:
            if any(d < tensor.ndim - 2 for d in varying(plane)):
                call.labels.pin(plane, "is multiplied head by head")
