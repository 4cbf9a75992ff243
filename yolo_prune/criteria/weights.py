# SPDX-License-Identifier: AGPL-3.0-or-later
"""Criteria that use weights only. Four of them are classes of torch-pruning, with options of ours."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from yolo_prune.criteria.base import Criterion, Tensors, register_criterion
from yolo_prune.criteria.importances import TorchPruning
from yolo_prune.errors import RecipeError
from yolo_prune.graph.structure import ChannelSet
from yolo_prune.recipe.options import whole_number


@register_criterion("magnitude")
class Magnitude(TorchPruning):
    """Norm of the weights of a channel: the weights that produce it and the weights that read it.

    The group-level magnitude of "DepGraph: Towards Any Structural Pruning" (Fang et al., CVPR 2023,
    arXiv:2301.12900), after "Pruning Filters for Efficient ConvNets" (Li et al., ICLR 2017, arXiv:1608.08710).
    """

    def __init__(self, norm: int = 2) -> None:
        """Make the importance.

        Args:
            norm: 1 (sum of absolute values) or 2 (Euclidean).
        """
        if isinstance(norm, bool) or norm not in (1, 2):
            raise RecipeError(f"criterion.norm: must be 1 or 2, got {norm!r}.")
        super().__init__("GroupMagnitudeImportance", p=norm, group_reduction="sum", normalizer=None)
        self.norm, self.comparable = norm, False

    def __call__(self, tensors: Tensors, channels: ChannelSet) -> Tensor:
        """Score every channel; see `Criterion`."""
        return super().__call__(tensors, channels).pow(1 / self.norm)


@register_criterion("lamp")
class Lamp(TorchPruning):
    """Squared magnitude, divided by the sum of all squared magnitudes in the set that are not smaller.

    Scores are compared over the whole model. "Layer-adaptive Sparsity for the Magnitude-based Pruning" (Lee et al.,
    ICLR 2021, arXiv:2010.07611), with the group-level magnitude instead of the magnitude of single weights.
    """

    def __init__(self) -> None:
        """Make the importance, which has no options."""
        super().__init__("LAMPImportance")


@register_criterion("bn_scale")
class BatchNormScale(TorchPruning):
    """Absolute scale of the batch norms behind a channel; the magnitude if there is no batch norm.

    "Learning Efficient Convolutional Networks through Network Slimming" (Liu et al., ICCV 2017, arXiv:1708.06519).
    """

    def __init__(self, sparsity: float = 0.0) -> None:
        """Make the importance.

        Args:
            sparsity: weight of the L1 norm of the scales in the loss, during training up to the last cut; 0 does not
                change the loss.
        """
        if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
            raise RecipeError(f"criterion.sparsity: must be a number at least 0 and below 1, got {sparsity!r}.")
        super().__init__("BNScaleImportance", group_reduction="sum", normalizer=None)
        self.sparsity, self.comparable = float(sparsity), False
        self._fallback = Magnitude()

    def read(self, model: nn.Module) -> None:
        """Copy the model whose weights are scored."""
        super().read(model)
        self._fallback._layers = self._layers

    def __call__(self, tensors: Tensors, channels: ChannelSet) -> Tensor:
        """Score every channel; see `Criterion`."""
        scores = self._scores(channels)
        return self._fallback(tensors, channels) if scores is None else scores


@register_criterion("fpgm")
class FPGM(TorchPruning):
    """Sum of distances to all other filters of the layer: other filters can replace a filter in the middle of them.

    "Filter Pruning via Geometric Median" (He et al., CVPR 2019, arXiv:1811.00250), as torch-pruning computes it: of
    squared weights, for the layers that produce a channel and those that read it.
    """

    def __init__(self) -> None:
        """Make the importance, which has no options."""
        super().__init__("FPGMImportance")


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
