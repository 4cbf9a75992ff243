# SPDX-License-Identifier: AGPL-3.0-or-later
"""Operations in which an element depends on other elements along some dimensions."""

from __future__ import annotations

from torch import Tensor

from yolo_prune.graph.labels import Tag, attach, varying
from yolo_prune.graph.ops.base import Call, effect, first_input, first_tensor
from yolo_prune.graph.ops.elementwise import elementwise


@effect("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", "cumsum", "cumprod")
def over_one_dimension(call: Call) -> None:
    """Every element depends on the others along one dimension."""
    x, tag = first_input(call)
    dim = int(call.args[1]) % x.ndim
    for plane in tag.planes:
        if dim in varying(plane):
            call.labels.pin(plane, f"{call.name.strip('_').replace('log_', '')} over channels")
    attach(call.out, Tag(tag.planes, call.name.startswith("cum") and tag.silent))


@effect("mean", "sum", "amax", "amin", "max", "min", "std", "var", "var_mean", "prod", "linalg_vector_norm", "norm")
@effect("argmax", "argmin", "any", "all", "logsumexp", "median", "nansum", "topk", "sort", "aminmax")
def reduce(call: Call) -> None:
    """The elements along some dimensions are reduced to one element, or to a few."""
    x, tag = first_input(call)
    if len(call.tensors) > 1:  # max(a, b) and min(a, b)
        elementwise(call)
        return
    dims = _dimensions(call, x.ndim)
    planes = []
    for plane in tag.planes:
        summed = varying(plane) & dims
        if summed:
            if call.name not in ("sum", "nansum") or not tag.silent:
                call.labels.pin(plane, f"{call.name.replace('linalg_vector_', '')} over channels")
            continue
        planes.append(plane)
    outs = [o for o in (call.out if isinstance(call.out, list | tuple) else [call.out]) if isinstance(o, Tensor)]
    for out in outs:
        attach(out, Tag(tuple(_without(p, dims, out) for p in planes), tag.silent and call.name != "prod"))


def _dimensions(call: Call, ndim: int) -> frozenset[int]:
    dim = call.get("dim", -1 if call.name in ("topk", "sort") else None)
    if dim is None or dim == []:
        return frozenset(range(ndim))
    return frozenset(d % ndim for d in ([dim] if isinstance(dim, int) else dim)) if ndim else frozenset()


def _without(plane: Tensor, dims: frozenset[int], out: Tensor) -> Tensor:
    for d in sorted(dims, reverse=True):
        plane = plane.narrow(d, 0, 1) if out.ndim == plane.ndim else plane
    if out.ndim < plane.ndim:
        for d in sorted(dims, reverse=True):
            plane = plane.select(d, 0)
    return plane.expand(out.shape)


@effect(
    "max_pool3d_with_indices",
    "max_pool2d_with_indices",
    "max_pool2d",
    "avg_pool2d",
    "_adaptive_avg_pool2d",
    "adaptive_avg_pool2d",
)
@effect("adaptive_max_pool2d", "upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d", "avg_pool1d")
@effect("upsample_bicubic2d", "_upsample_bilinear2d_aa", "grid_sampler_2d", "grid_sampler", "reflection_pad2d")
@effect("replication_pad2d", "cudnn_grid_sampler", "upsample_linear1d", "upsample_nearest1d", "avg_pool3d")
def positions(call: Call) -> None:
    """Operations on positions, the same in every channel."""
    _, tag = first_input(call)
    out, planes = first_tensor(call.out), []
    for plane in tag.planes:
        if any(d >= 2 for d in varying(plane)):
            call.labels.pin(plane, f"{call.name} over channels")
            continue
        for d in range(2, plane.ndim):
            plane = plane.narrow(d, 0, 1)
        planes.append(plane.expand(out.shape))
    attach(out, Tag(tuple(planes), tag.silent))
