# SPDX-License-Identifier: AGPL-3.0-or-later
"""How much a channel matters: a `Criterion` gives one score per channel of a set."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor

from yolo_prune.errors import PruneError, RecipeError
from yolo_prune.graph.structure import ChannelSet

Tensors = Mapping[str, Tensor]


class Criterion(Protocol):
    """Scores channels; higher matters more. Scores are compared within one set only."""

    def __call__(self, tensors: Tensors, channels: ChannelSet) -> Tensor:
        """Score every channel.

        Args:
            tensors: the model's state, `{name: tensor}`.
            channels: the set to score.

        Returns:
            float64 `(channels.size,)`, not negative, on the CPU.
        """


CRITERIA: dict[str, Callable[..., Criterion]] = {}


def register_criterion(name: str) -> Callable[[Callable[..., Criterion]], Callable[..., Criterion]]:
    """Register a factory `(**options) -> Criterion` under the name that recipes use.

    Raises:
        ValueError: If the name is taken.
    """

    def decorate(factory: Callable[..., Criterion]) -> Callable[..., Criterion]:
        if name in CRITERIA:
            raise ValueError(f"A criterion named '{name}' is already registered.")
        CRITERIA[name] = factory
        return factory

    return decorate


def create(name: str, options: Mapping[str, Any]) -> Criterion:
    """Make the criterion that a recipe asks for.

    Raises:
        RecipeError: If there is no such criterion, or an option is unknown or out of range.
    """
    if name not in CRITERIA:
        raise RecipeError(f"criterion.name: there is no criterion '{name}'; choose one of {', '.join(CRITERIA)}.")
    factory = CRITERIA[name]
    known = list(signature(factory).parameters)
    for option in options:
        if option not in known:
            raise RecipeError(f"criterion.{option}: '{name}' has no such option; it knows {', '.join(known)}.")
    return factory(**options)


def score(criterion: Criterion, tensors: Tensors, channels: ChannelSet) -> Tensor:
    """What `criterion` gives, checked: nothing can be chosen by scores that are not numbers.

    Raises:
        PruneError: If a score is missing, negative, NaN or infinite.
    """
    scores = criterion(tensors, channels)
    if scores.shape != (channels.size,):
        raise PruneError(f"The criterion gave {tuple(scores.shape)} scores for '{channels.name}', not {channels.size}.")
    if not (torch.isfinite(scores) & (scores >= 0)).all():
        raise PruneError(
            f"The criterion gave a score for '{channels.name}' that is negative, NaN or infinite. The weights there "
            "are damaged; take a checkpoint from before the training diverged."
        )
    return scores


@register_criterion("magnitude")
def magnitude(norm: int = 2) -> Criterion:
    """Norm over all weights that belong to a channel, producers and consumers together.

    The group-level magnitude of "DepGraph: Towards Any Structural Pruning" (Fang et al., CVPR 2023,
    arXiv:2301.12900), after "Pruning Filters for Efficient ConvNets" (Li et al., ICLR 2017, arXiv:1608.08710).

    Args:
        norm: 1 (sum of absolute values) or 2 (Euclidean).
    """
    if isinstance(norm, bool) or norm not in (1, 2):
        raise RecipeError(f"criterion.norm: must be 1 or 2, got {norm!r}.")

    sums: dict[int, tuple[Tensor, Tensor]] = {}  # of a tensor, once for all the sets in it

    def powers(weight: Tensor) -> Tensor:
        """|w|^norm, summed over all but the first two dimensions."""
        if id(weight) not in sums:
            value = weight.detach().to("cpu", torch.promote_types(weight.dtype, torch.float32))
            value = value.square() if norm == 2 else value.abs()
            value = value.flatten(2).sum(-1) if value.ndim > 2 else value
            sums[id(weight)] = weight, value.to(torch.float64)  # the tensor too, so that its id stays its own
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


@register_criterion("random")
def random(seed: int = 0) -> Criterion:
    """Uniform random scores: the control that any other criterion has to beat.

    Args:
        seed: same seed, same scores, on every machine; 0 to 2**32 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise RecipeError(f"criterion.seed: must be a whole number from 0 to {2**32 - 1}, got {seed!r}.")

    def score(tensors: Tensors, channels: ChannelSet) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(channels.name.encode()) + seed)
        return torch.rand(channels.size, generator=generator, dtype=torch.float64)

    return score
