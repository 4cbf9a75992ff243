# SPDX-License-Identifier: AGPL-3.0-or-later
"""How criteria are written, registered, made from a recipe, and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from yolo_prune.data.calibration import Calibration, Progress
from yolo_prune.env.registry import Registry
from yolo_prune.errors import PruneError
from yolo_prune.graph.structure import ChannelSet
from yolo_prune.recipe.options import make

Tensors = Mapping[str, Tensor]
C = TypeVar("C", bound=Callable[..., "Criterion"])


class Criterion(Protocol):
    """Scores channels; higher matters more.

    Scores are compared within one set only, unless the criterion has an attribute `comparable` that is true: then they
    are amounts of the loss, and are added up and compared over all sets.

    One with an attribute `sparsity` above 0 asks for sparse training up to the last cut: that is the weight of the L1
    norm of the scales of batch norms in the loss.
    """

    def __call__(self, tensors: Tensors, channels: ChannelSet) -> Tensor:
        """Score every channel.

        Args:
            tensors: the model's state, `{name: tensor}`.
            channels: the set to score.

        Returns:
            float64 `(channels.size,)`, not negative, on the CPU.
        """


@runtime_checkable
class Observer(Protocol):
    """A criterion that has to look at training images before it can score."""

    images: int

    def observe(self, model: nn.Module, calibration: Calibration, progress: Progress) -> None:
        """Look at the images.

        Args:
            model: only read.
            calibration: images, at most `images` of them, with the loss.
            progress: wraps an iterable of images, to show how far it is.
        """


CRITERIA: Registry[str, Callable[..., Criterion]] = Registry("A criterion named '{}' is already registered.")


def register_criterion(name: str) -> Callable[[C], C]:
    """Register a factory `(**options) -> Criterion` under the name that recipes use.

    Raises:
        ValueError: If the name is taken.

    Example:
        >>> import yolo_prune
        >>> @yolo_prune.register_criterion("peak")
        ... def peak():
        ...     def score(tensors, channels):  # one score per channel: its largest weight
        ...         slot = next(s for s in channels.slots if tensors[s.tensor].ndim > 1)
        ...         weight = tensors[slot.tensor].movedim(slot.dim, 0)[list(slot.index)]
        ...         return weight.flatten(1).abs().amax(1).double()
        ...     return score
        >>> plan = yolo_prune.plan("best.pt", {"target": {"flops": 0.5}, "criterion": "peak"}, imgsz=640)
    """
    return CRITERIA.register(name)


def create(name: str, options: Mapping[str, Any]) -> Criterion:
    """Make the criterion that a recipe asks for.

    Raises:
        RecipeError: If there is no such criterion, or an option is unknown or out of range.
    """
    return make("criterion", name, CRITERIA, options)


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
