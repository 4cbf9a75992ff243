# SPDX-License-Identifier: AGPL-3.0-or-later
"""An oracle of exactness that never asks the pruner what it kept.

Kept indices are recovered by looking the values of the pruned tensors up in the original ones. The reference is the
original with every removed *output* channel silenced; consumers are left alone, so that a wrong input index shows.
"""

from __future__ import annotations

import functools
from copy import deepcopy
from typing import Any

import torch
import zoo
from torch import Tensor, nn
from ultralytics.nn.modules import block as blocks

from yolo_prune.env.releases import Blocks

TOLERANCE = 1e-8
Kept = dict[str, tuple[Tensor, ...]]


def recover_kept(original: nn.Module, pruned: nn.Module) -> Kept:
    """`{tensor: kept indices per dimension}` of every tensor that got smaller, found by value."""
    before, after = original.state_dict(keep_vars=True), unfolded(original, pruned).state_dict()
    assert list(before) == list(after)
    found: Kept = {}
    for name, now in after.items():
        was = before[name]
        if now.shape == was.shape:
            assert torch.allclose(now, was, rtol=1e-13, atol=0), f"{name} changed though it kept its shape"
            continue
        values, order = _index(was)
        spot = torch.searchsorted(values, now.flatten()).clamp(1, len(values) - 1)
        spot -= (now.flatten() - values[spot - 1] < values[spot] - now.flatten()).long()
        near = torch.isclose(values[spot], now.flatten(), rtol=1e-13, atol=0)
        assert near.all(), f"{name} holds values that the original does not have"
        places = torch.unravel_index(order[spot].reshape(now.shape), was.shape)
        kept = []
        for dim, place in enumerate(places):
            along = place.movedim(dim, 0).reshape(now.shape[dim], -1)
            assert (along == along[:, :1]).all(), f"{name} is not a selection along dimension {dim}"
            kept.append(along[:, 0])
        found[name] = tuple(kept)
    return found


@torch.no_grad()
def unfolded(original: nn.Module, pruned: nn.Module) -> nn.Module:
    """A copy of the pruned model without the factors that make up for a scale its forward derives from a width."""
    copy = deepcopy(pruned)
    modules: dict[str, Any] = dict(original.named_modules())
    for name, block in copy.named_modules():
        if isinstance(block, Blocks(blocks).AAttn):
            factor = (block.head_dim / modules[name].head_dim) ** 0.5
            rows = torch.arange(len(block.qkv.bn.weight)) % (3 * block.head_dim) < block.head_dim
            for tensor in (block.qkv.bn.weight, block.qkv.bn.bias):
                tensor[rows] /= factor
        elif isinstance(block, Blocks(blocks).MaxSigmoidAttnBlock):
            for tensor in (block.gl.weight, block.gl.bias):
                tensor /= (block.hc / modules[name].hc) ** 0.5
    return copy


@functools.lru_cache(1000)
def _index(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Values in ascending order, and where they stand."""
    values, order = tensor.detach().flatten().sort()
    assert (values[1:] > values[:-1]).all(), "values are not unique; the look-up would be ambiguous"
    return values, order


@torch.no_grad()
def silenced(original: nn.Module, kept: Kept) -> nn.Module:
    """A copy in which every output channel that was removed produces exactly 0."""
    reference = deepcopy(original)
    state, modules = reference.state_dict(), dict(reference.named_modules())
    for name, indices in kept.items():
        path, _, key = name.rpartition(".")
        if key in ("running_mean", "running_var"):
            continue
        layer = modules[path]
        dims = [int(isinstance(layer, nn.ConvTranspose2d) and key == "weight")]
        if not isinstance(layer, nn.modules.conv._ConvNd | nn.Linear | nn.modules.batchnorm._NormBase):
            dims = list(range(state[name].ndim))  # a parameter of a block, such as (1, channels, 1, 1)
        for dim in dims:
            gone = torch.ones(state[name].shape[dim], dtype=torch.bool)
            gone[indices[dim]] = False
            state[name].movedim(dim, 0)[gone] = 0
    return reference


@torch.no_grad()
def raw_outputs(model: Any, name: str, batch_statistics: bool) -> list[Tensor]:
    """What the model puts out before decoding, top-k or NMS: in training mode, where all branches run.

    Args:
        model: in float64.
        name: its architecture.
        batch_statistics: batch norms use the batch's statistics instead of their own.
    """
    copy = deepcopy(model).train()
    for module in copy.modules():
        if isinstance(module, nn.Dropout) or (
            isinstance(module, nn.modules.batchnorm._BatchNorm) and not batch_statistics
        ):
            module.eval()
        elif hasattr(module, "num_denoising"):
            module.num_denoising = 0  # queries made from targets, of which there are none
    image = zoo.images(copy, name)
    found = zoo.outputs(copy(image))
    if "yoloe" in name:
        torch.set_default_dtype(torch.float64)  # its prompts mix in Python numbers
        try:
            found += zoo.outputs(copy.predict(image, **prompts(copy, image)))
        finally:
            torch.set_default_dtype(torch.float32)
    return found


def prompts(model: Any, image: Tensor) -> dict[str, Tensor]:
    """Text and visual prompts for YOLOE."""
    generator = torch.Generator().manual_seed(2)
    text = torch.rand(len(image), 2, 512, generator=generator).to(image)
    boxes = torch.zeros(len(image), 2, image.shape[2] // 8, image.shape[3] // 8).to(image)
    boxes[:, 0, 2:5, 1:6] = boxes[:, 1, 4:, 3:] = 1
    return {"tpe": text, "vpe": boxes}


def gap(wanted: list[Tensor], got: list[Tensor]) -> float:
    """Largest difference, relative to how much that output varies over images and positions."""
    assert [t.shape for t in wanted] == [t.shape for t in got]
    worst = 0.0
    for a, b in zip(wanted, got, strict=True):
        dims = [d for d in range(a.ndim) if d != 1] if a.ndim > 2 else [0]
        spread = (a - a.mean(dims, keepdim=True)).abs().max().clamp_min(1e-3 * float(a.abs().max()))
        assert torch.isfinite(a).all()
        worst = max(worst, float((a - b).abs().max() / spread))
    return worst


def judge(original: nn.Module, pruned: nn.Module, name: str) -> float:
    """The largest error of a cut, over all outputs; refuses to judge where silencing changes nothing."""
    kept = recover_kept(original, pruned)
    assert kept, "nothing was removed"
    reference = silenced(original, kept)
    worst = 0.0
    for batch_statistics in (False, True):
        wanted = raw_outputs(reference, name, batch_statistics)
        dense = raw_outputs(original, name, batch_statistics)
        assert gap(dense, wanted) > 1e-3, "silencing changes nothing; the check is vacuous"
        worst = max(worst, gap(wanted, raw_outputs(pruned, name, batch_statistics)))
    return worst
