# SPDX-License-Identifier: AGPL-3.0-or-later
"""Criteria that use weights only."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from yolo_prune.criteria.base import Criterion, Tensors, register_criterion
from yolo_prune.errors import RecipeError
from yolo_prune.graph.structure import ChannelSet
from yolo_prune.recipe.options import whole_number


@register_criterion("magnitude")
def magnitude(norm: int = 2) -> Criterion:
    """Norm of all weights of a channel: the weights that produce it and the weights that read it.

    The group-level magnitude of "DepGraph: Towards Any Structural Pruning" (Fang et al., CVPR 2023,
    arXiv:2301.12900), after "Pruning Filters for Efficient ConvNets" (Li et al., ICLR 2017, arXiv:1608.08710).

    Args:
        norm: 1 (sum of absolute values) or 2 (Euclidean).
    """
    if isinstance(norm, bool) or norm not in (1, 2):
        raise RecipeError(f"criterion.norm: must be 1 or 2, got {norm!r}.")

    sums: dict[int, tuple[Tensor, Tensor]] = {}  # one entry per tensor, used for all its sets

    def powers(weight: Tensor) -> Tensor:
        """|w|^norm, summed over all but the first two dimensions."""
        if id(weight) not in sums:
            value = weight.detach().to("cpu", torch.promote_types(weight.dtype, torch.float32))
            value = value.square() if norm == 2 else value.abs()
            value = value.flatten(2).sum(-1) if value.ndim > 2 else value
            sums[id(weight)] = weight, value.to(torch.float64)  # the tensor is stored too: else its id could be reused
        return sums[id(weight)][1]

    def score(tensors: Tensors, channels: ChannelSet) -> Tensor:
        total = torch.zeros(channels.size, dtype=torch.float64)
        for slot in channels.slots:
            if slot.tensor.endswith("weight"):
                value = powers(tensors[slot.tensor])
                value = value.sum(1 - slot.dim) if value.ndim > 1 else value
                total += value[list(slot.index)]
        return total.pow(1 / norm)

    return score


@register_criterion("lamp")
class Lamp:
    """Squared magnitude, divided by the sum of all squared magnitudes in the set that are not smaller.

    Scores are compared over the whole model. "Layer-adaptive Sparsity for the Magnitude-based Pruning" (Lee et al.,
    ICLR 2021, arXiv:2010.07611), with the group-level magnitude instead of the magnitude of single weights.
    """

    comparable = True

    def __init__(self) -> None:
        """Create the criterion, which has no options."""
        self._magnitude = magnitude()

    def __call__(self, tensors: Tensors, channels: ChannelSet) -> Tensor:
        """Score every channel; see `Criterion`."""
        squares = self._magnitude(tensors, channels).square()
        order = torch.argsort(squares, stable=True)
        left = squares[order].flip(0).cumsum(0).flip(0)
        return torch.zeros_like(squares).scatter(0, order, squares[order] / left.clamp(min=1e-300))


@register_criterion("bn_scale")
class BatchNormScale:
    """Absolute scale of the batch norms behind a channel; the magnitude if there is no batch norm.

    "Learning Efficient Convolutional Networks through Network Slimming" (Liu et al., ICCV 2017, arXiv:1708.06519).
    """

    def __init__(self, sparsity: float = 0.0) -> None:
        """Store the option.

        Args:
            sparsity: weight of the L1 norm of the scales in the loss, during training up to the last cut; 0 does not
                change the loss.
        """
        if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
            raise RecipeError(f"criterion.sparsity: must be a number at least 0 and below 1, got {sparsity!r}.")
        self.sparsity = float(sparsity)
        self._fallback = magnitude()

    def __call__(self, tensors: Tensors, channels: ChannelSet) -> Tensor:
        """Score every channel; see `Criterion`."""
        scales = [s for s in channels.slots if f"{s.tensor.removesuffix('weight')}running_var" in tensors]
        if not scales:
            return self._fallback(tensors, channels)
        return torch.stack([tensors[s.tensor].detach().double().cpu().abs()[list(s.index)] for s in scales]).sum(0)


@register_criterion("fpgm")
def fpgm() -> Criterion:
    """Sum of distances to all other filters of the layer: other filters can replace a filter in the middle of them.

    "Filter Pruning via Geometric Median" (He et al., CVPR 2019, arXiv:1811.00250).
    """

    def score(tensors: Tensors, channels: ChannelSet) -> Tensor:
        total = torch.zeros(channels.size, dtype=torch.float64)
        for slot in channels.slots:
            weight = tensors[slot.tensor].detach().double().cpu()
            if slot.dim == 0 and slot.tensor.endswith("weight") and weight.ndim > 1:
                filters = weight[list(slot.index)].flatten(1)
                total += torch.cdist(filters, filters).sum(1)
        return total

    return score


@register_criterion("random")
def random(seed: int = 0) -> Criterion:
    """Uniform random scores: a baseline that any other criterion has to beat.

    Args:
        seed: from 0 to 2**32 - 1; the same seed gives the same scores on every machine.
    """
    whole_number("seed", seed, 0, 2**32 - 1)

    def score(tensors: Tensors, channels: ChannelSet) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(channels.name.encode()) + seed)
        return torch.rand(channels.size, generator=generator, dtype=torch.float64)

    return score
