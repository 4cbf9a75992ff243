# SPDX-License-Identifier: AGPL-3.0-or-later
"""Elementwise operations: they couple the channels of their inputs. A silenced channel may not be 0 afterwards."""

from __future__ import annotations

from torch import Tensor

from yolo_prune.graph.labels import Tag, attach, tag_of, varying
from yolo_prune.graph.ops.base import Call, effect, first_input, first_tensor
from yolo_prune.graph.ops.moving import same


@effect(
    *("relu", "relu6", "silu", "gelu", "tanh", "hardtanh", "hardswish", "elu", "selu", "celu", "mish", "leaky_relu"),
    *("neg", "abs", "sqrt", "square", "sign", "sin", "tan", "asin", "atan", "round", "floor", "ceil", "trunc", "erf"),
    *("expm1", "log1p", "softsign", "hardshrink", "softshrink", "tanhshrink", "nan_to_num", "silu_backward"),
)
def keeps_silence(call: Call) -> None:
    """f(0) = 0: a silenced channel stays silent."""
    same(call)


@effect(
    *("sigmoid", "hardsigmoid", "softplus", "exp", "log", "log2", "cos", "reciprocal", "rsqrt", "logit"),
    *("log_sigmoid_forward", "acos", "logical_not", "bitwise_not", "isnan", "isinf", "isfinite"),
)
def breaks_silence(call: Call) -> None:
    """f(0) is not 0: after this operation, silencing a channel is no longer the same as removing it."""
    _, tag = first_input(call)
    attach(first_tensor(call.out), Tag(tag.planes, False))


@effect("clamp", "clamp_min", "clamp_max")
def clamp(call: Call) -> None:
    """A silenced channel stays silent if 0 lies within the bounds."""
    _, tag = first_input(call)
    low, high = call.get("min"), call.get("max")
    numbers = all(x is None or isinstance(x, int | float) for x in (low, high))
    inside = numbers and (low is None or low <= 0) and (high is None or high >= 0)
    attach(call.out, Tag(tag.planes, tag.silent and inside))


@effect(
    *("add", "sub", "rsub", "mul", "div", "maximum", "minimum", "where", "pow", "masked_fill", "lerp", "addcmul"),
    *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "bitwise_and", "bitwise_or", "copy"),
    *("_prelu_kernel", "remainder", "fmod", "floor_divide", "atan2"),
)
def elementwise(call: Call) -> None:
    """Combine tensors by element. Labels that meet become the same; labels that meet a fixed width are pinned."""
    tensors = [t for t in call.tensors if t.ndim]
    tags = [tag_of(t) or Tag() for t in tensors]
    ndim, merged = call.out.ndim, list[Tensor]()
    for tensor, tag in zip(tensors, tags, strict=True):
        for plane in tag.planes:
            plane = plane.expand(call.out.shape) if plane.ndim <= ndim else plane
            _meets_fixed(call, tensor, plane, tensors, tags)
            partner = next((i for i, p in enumerate(merged) if varying(p) & varying(plane)), None)
            if partner is None:
                merged.append(plane)
                continue
            call.labels.unify(merged[partner], plane)
            if len(varying(plane)) > len(varying(merged[partner])):
                merged[partner] = plane
    full = [tag.source for tensor, tag in zip(tensors, tags, strict=True) if tensor.numel() == call.out.numel()]
    source = full[0] if full and all(full) else None  # a parameter, changed element by element
    attach(call.out, Tag(tuple(merged), _stays_silent(call, tags), source))


def _meets_fixed(call: Call, tensor: Tensor, plane: Tensor, tensors: list[Tensor], tags: list[Tag]) -> None:
    if call.trusted:
        return
    for other, tag in zip(tensors, tags, strict=True):
        if other is tensor:
            continue
        lead = plane.ndim - other.ndim
        taken = {d + lead for p in tag.planes for d in varying(p)}
        sized = {d for d in varying(plane) if d >= lead and other.shape[d - lead] > 1}
        if sized - taken:
            call.labels.pin(plane, "meets a tensor of fixed width")


def _stays_silent(call: Call, tags: list[Tag]) -> bool:
    """Whether a silenced channel is still 0 after an elementwise operation."""
    silent = [t.silent for t in tags if _has_channels(t)]
    if call.name in ("mul", "bitwise_and", "logical_and"):
        return any(silent)
    if call.name == "div":
        dead = len(tags) > 1 and _has_channels(tags[1]) and tags[1].silent  # 0 / 0
        return bool(tags) and tags[0].silent and not dead
    if call.name in ("add", "sub", "maximum", "minimum"):
        plain = [a for a in call.args[:2] if not _has_channels(tag_of(a) or Tag())]
        return all(silent) and all(not isinstance(a, Tensor) and a == 0 for a in plain)
    if call.name == "pow":
        return all(silent) and isinstance(call.args[1], int | float) and call.args[1] > 0
    if call.name == "masked_fill":
        return all(silent) and call.args[2] == 0
    if call.name in ("copy", "_prelu_kernel"):
        return all(silent)
    return False


def _has_channels(tag: Tag) -> bool:
    """Whether a tensor has labels that differ. A parameter with one value, for example, has none: it is a constant."""
    return any(map(varying, tag.planes))
