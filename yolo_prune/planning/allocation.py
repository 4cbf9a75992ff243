# SPDX-License-Identifier: AGPL-3.0-or-later
"""Allocations: how the removal is distributed over the layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from yolo_prune.data.calibration import Calibration, Progress
from yolo_prune.env.registry import Registry
from yolo_prune.errors import RecipeError
from yolo_prune.graph.structure import ChannelSet, Group
from yolo_prune.planning import sensitivity
from yolo_prune.planning.select import Allocation
from yolo_prune.recipe.options import fraction, make, whole_number

MOST_SHARES = 20
"""Maximum number of shares: each one needs a pass over the images for every layer, which takes minutes (see docs/)."""


@dataclass(frozen=True)
class Prunable:
    """The input of an allocator.

    Attributes:
        model: the model; it is not changed.
        levels: the groups that may be cut, each with its allowed numbers of grains, from the present number downward.
        scores: `{set name: (size,)}`; a higher score means a more important channel.
        calibration: training images, or None.
        progress: wraps an iterable to show a progress bar.
    """

    model: nn.Module
    levels: Sequence[tuple[Group, list[int]]]
    scores: Mapping[str, Tensor]
    calibration: Calibration | None
    progress: Progress


class Allocator(Protocol):
    """Decides which groups compete with one another, and by which measure.

    Attributes:
        images: number of training images that it uses; 0 for none.
    """

    images: int

    def __call__(self, prunable: Prunable) -> Allocation:
        """Make the allocation."""


ALLOCATIONS: Registry[str, Callable[..., Allocator]] = Registry("An allocation named '{}' is already registered.")


@ALLOCATIONS.register("global")
class Global:
    """All channels of the model compete: those with the lowest score per cost are removed, in any layer."""

    images = 0

    def __call__(self, prunable: Prunable) -> Allocation:
        """See `Allocator`."""
        return Allocation()


@ALLOCATIONS.register("uniform")
class Uniform:
    """All groups lose the same share of their channels, as far as the allowed widths permit."""

    images = 0

    def __call__(self, prunable: Prunable) -> Allocation:
        """See `Allocator`."""
        return Allocation({group.name: group.name for group, _ in prunable.levels})


@ALLOCATIONS.register("isomorphic")
class Isomorphic:
    """Only groups of the same structure compete. All kinds of structure lose the same share of their channels.

    "Isomorphic Pruning for Vision Models" (Fang et al., ECCV 2024, arXiv:2407.04616): scores of channels in parts of
    different structure have different distributions, so they must not be compared.
    """

    images = 0

    def __call__(self, prunable: Prunable) -> Allocation:
        """See `Allocator`."""
        layers = dict(prunable.model.named_modules())
        return Allocation({g.name: tuple(_structure(s, layers) for s in g.sets) for g, _ in prunable.levels})


@ALLOCATIONS.register("sensitivity")
class Sensitivity:
    """Groups compete by the measured rise of the loss when only one group is cut; see `sensitivity.curves`.

    The scores decide which channels of a group are removed.
    """

    def __init__(self, images: int = 32, shares: Sequence[float] = (0.25, 0.5, 0.75)) -> None:
        """Store the options.

        Args:
            images: number of training images on which the loss is measured. The default of 32 is a choice: more images
                give less noise but take longer.
            shares: points at which the loss is measured, as fractions of the channels that the limits on widths allow
                to remove. The default of three points is a choice: the curve is linear between points, and each point
                needs a pass over the images for every layer.
        """
        self.images = whole_number("images", images, kind="allocation")
        if not isinstance(shares, list | tuple) or not 0 < len(shares) <= MOST_SHARES:
            raise RecipeError(f"allocation.shares: must be a list of 1 to {MOST_SHARES} numbers, got {shares!r}.")
        self.shares = [fraction("shares", share, kind="allocation") for share in shares]

    def __call__(self, prunable: Prunable) -> Allocation:
        """See `Allocator`.

        Raises:
            RecipeError: If there are no training images.
        """
        if prunable.calibration is None:
            raise RecipeError("allocation: sensitivity needs training images, but there are none. Pass data=.")
        images = prunable.calibration.first(self.images)
        free = [(g, levels) for g, levels in prunable.levels if len(levels) > 1]
        return Allocation(
            curves=sensitivity.curves(prunable.model, free, prunable.scores, self.shares, images, prunable.progress)
        )


def _structure(channels: ChannelSet, layers: Mapping[str, nn.Module]) -> Hashable:
    """The layers of a set in model order: their type, whether they are grouped, and whether they read the channels."""
    places = dict.fromkeys((slot.tensor.rpartition(".")[0], slot.dim) for slot in channels.slots)
    return tuple((type(layers[n]).__name__, getattr(layers[n], "groups", 1) > 1, dim) for n, dim in places)


def create(name: str, options: Mapping[str, Any]) -> Allocator:
    """Create an allocator from its name and options in a recipe.

    Raises:
        RecipeError: If there is no such allocation, or an option is unknown or out of range.
    """
    return make("allocation", name, ALLOCATIONS, options)
