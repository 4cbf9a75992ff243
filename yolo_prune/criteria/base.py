# SPDX-License-Identifier: AGPL-3.0-or-later
"""The interface of criteria, their registry, and the functions that create them and check their scores."""

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
    """Scores channels. A higher score means a more important channel.

    Scores are only compared within a set, unless the criterion has a true attribute `comparable`. Comparable scores are
    amounts of the loss: they are added, and compared over all sets.

    A criterion may have an attribute `sparsity`. If it is above 0, training up to the last cut is sparse: `sparsity` is
    the weight of the L1 norm of batch norm scales in the loss.
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
    """A criterion that needs training images before it can score channels; with `images` 0, it needs none."""

    images: int

    def observe(self, model: nn.Module, calibration: Calibration, progress: Progress) -> None:
        """Observe the model on training images.

        Args:
            model: the model; it is not changed.
            calibration: at most `images` training images, and the loss.
            progress: wraps an iterable of images to show a progress bar.
        """


@runtime_checkable
class ModelReader(Protocol):
    """A criterion that reads the layers of the model, not only its tensors."""

    def read(self, model: nn.Module) -> None:
        """Read the model before channels are scored; it is not changed."""


CRITERIA: Registry[str, Callable[..., Criterion]] = Registry("A criterion named '{}' is already registered.")


def register_criterion(name: str) -> Callable[[C], C]:
    """Register a factory `(**options) -> Criterion` under the name that recipes use.

    Raises:
        ValueError: If a criterion with this name is already registered.

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
    """Create a criterion from its name and options in a recipe.

    Raises:
        RecipeError: If there is no such criterion, or an option is unknown or out of range.
    """
    return make("criterion", name, CRITERIA, options)


def score(criterion: Criterion, tensors: Tensors, channels: ChannelSet) -> Tensor:
    """Score the channels of a set, and check the scores.

    Raises:
        PruneError: If a score is missing, negative, NaN or infinite.
    """
    scores = criterion(tensors, channels)
    if scores.shape != (channels.size,):
        raise PruneError(
            f"The criterion returned scores of shape {tuple(scores.shape)} for '{channels.name}', not of shape "
            f"({channels.size},). Correct the criterion."
        )
    if not (torch.isfinite(scores) & (scores >= 0)).all():
        raise PruneError(
            f"The criterion returned a score for '{channels.name}' that is negative, NaN or infinite. The weights of "
            "this layer are probably damaged: take a checkpoint from before the training diverged."
        )
    return scores
