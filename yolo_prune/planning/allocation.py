# SPDX-License-Identifier: AGPL-3.0-or-later
"""How what is removed is shared out over the layers of a model."""

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
"""A bound, not an optimum: every share is a pass over the images for every layer, which takes minutes (see README)."""


@dataclass(frozen=True)
class Prunable:
    """What is to be cut: all that an allocator may look at.

    Attributes:
        model: only read.
        levels: the groups that may be cut, each with its allowed numbers of grains, from the present one downward.
        scores: `{set name: (size,)}`, higher matters more.
        calibration: training images, or None.
        progress: wraps what is gone through, to show how far it is.
    """

    model: nn.Module
    levels: Sequence[tuple[Group, list[int]]]
    scores: Mapping[str, Tensor]
    calibration: Calibration | None
    progress: Progress


class Allocator(Protocol):
    """Decides which groups compete, and by what.

    Attributes:
        images: how many training images it looks at; 0 if it looks at none.
    """

    images: int

    def __call__(self, prunable: Prunable) -> Allocation:
        """Allocate."""


ALLOCATIONS: Registry[str, Callable[..., Allocator]] = Registry("An allocation named '{}' is already registered.")


@ALLOCATIONS.register("global")
class Global:
    """All channels of the model compete with one another: what matters least for its cost goes, wherever it is."""

    images = 0

    def __call__(self, prunable: Prunable) -> Allocation:
        """See `Allocator`."""
        return Allocation()


@ALLOCATIONS.register("uniform")
class Uniform:
    """All groups lose the same share of their channels, as nearly as the allowed widths let them."""

    images = 0

    def __call__(self, prunable: Prunable) -> Allocation:
        """See `Allocator`."""
        return Allocation({group.name: group.name for group, _ in prunable.levels})


@ALLOCATIONS.register("isomorphic")
class Isomorphic:
    """Channels compete within groups of the same structure, and all kinds of structure lose the same share of channels.

    "Isomorphic Pruning for Vision Models" (Fang et al., ECCV 2024, arXiv:2407.04616): scores of channels that lie in
    differently built parts of a model do not follow one distribution, and are not to be compared.
    """

    images = 0

    def __call__(self, prunable: Prunable) -> Allocation:
        """See `Allocator`."""
        layers = dict(prunable.model.named_modules())
        return Allocation({g.name: tuple(_structure(s, layers) for s in g.sets) for g, _ in prunable.levels})


@ALLOCATIONS.register("sensitivity")
class Sensitivity:
    """Groups compete by what the loss was seen to rise by as each of them was cut by itself; see `sensitivity.curves`.

    The scores decide which channels of a group go.
    """

    def __init__(self, images: int = 32, shares: Sequence[float] = (0.25, 0.5, 0.75)) -> None:
        """Remember the options.

        Args:
            images: training images to measure the loss on. 32 are a choice: more are less noisy, and take longer.
            shares: where it is measured, as fractions of what the limits on widths let go. Three are a choice, too:
                between them the curve is straight, and each is a pass over the images for every layer.
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
            raise RecipeError("allocation sensitivity looks at training images, and there are none: pass data=.")
        images = prunable.calibration.first(self.images)
        free = [(g, levels) for g, levels in prunable.levels if len(levels) > 1]
        return Allocation(
            curves=sensitivity.curves(prunable.model, free, prunable.scores, self.shares, images, prunable.progress)
        )


def _structure(channels: ChannelSet, layers: Mapping[str, nn.Module]) -> Hashable:
    """Kinds of the layers that a set of channels goes through, in model order, and whether they write or read it."""
    places = dict.fromkeys((slot.tensor.rpartition(".")[0], slot.dim) for slot in channels.slots)
    return tuple((type(layers[n]).__name__, getattr(layers[n], "groups", 1) > 1, dim) for n, dim in places)


def create(name: str, options: Mapping[str, Any]) -> Allocator:
    """Make the allocator that a recipe asks for.

    Raises:
        RecipeError: If there is no such allocation, or an option is unknown or out of range.
    """
    return make("allocation", name, ALLOCATIONS, options)
