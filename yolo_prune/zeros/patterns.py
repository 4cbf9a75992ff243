# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where zeros may be: anywhere, or all but N in each M weights. The masks come from `torch.nn.utils.prune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from yolo_prune.cut.census import SPARSE_CORES


class NOfM(prune.BasePruningMethod):
    """Of each M weights along the inputs, at each kernel position, the N with the highest scores are kept."""

    PRUNING_TYPE = "unstructured"

    def __init__(self, kept: int, of: int) -> None:
        """Create the method.

        Args:
            kept: N.
            of: M.
        """
        self.kept, self.of = kept, of

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The mask for scores.

        Args:
            t: `(outputs, inputs, ...)`, not negative; the number of inputs is a multiple of M.
            default_mask: zeros in it are zeros of the result.
        """
        scores = torch.where(default_mask.bool(), t, -1).movedim(1, -1)  # weights that are zero already go first
        sets = scores.reshape(*scores.shape[:-1], -1, self.of)
        best = sets.argsort(stable=True, dim=-1, descending=True)[..., : self.kept]
        chosen = torch.zeros_like(sets).scatter_(-1, best, 1).reshape(scores.shape).movedim(-1, 1)
        return default_mask * chosen.to(default_mask)


@dataclass(frozen=True)
class Pattern:
    """A pattern of zeros.

    Attributes:
        kept: N in `N:M`; 0 for zeros anywhere.
        of: M in `N:M`; 0 for zeros anywhere.
    """

    kept: int = 0
    of: int = 0

    @classmethod
    def read(cls, text: str) -> Pattern:
        """Read "unstructured" or "N:M", which the recipe has checked."""
        if text == "unstructured":
            return cls()
        kept, of = text.split(":")
        return cls(int(kept), int(of))

    def misfit(self, layer: nn.Module) -> str:
        """Why a layer cannot have this pattern; empty if it can."""
        asked = f"{self.kept}:{self.of}"
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            return f"{asked} runs along the inputs of a convolution, and this one is transposed"
        weight: Any = layer.weight
        outputs, inputs = weight.shape[:2]
        if getattr(layer, "groups", 1) > 1:
            return f"{asked} needs a convolution without groups"
        wanted = SPARSE_CORES if (self.kept, self.of) == (2, 4) else (self.of, 1)
        if inputs % wanted[0]:
            return f"{asked} needs a number of inputs that is a multiple of {wanted[0]}"
        if outputs % wanted[1]:
            return f"{asked} needs a number of outputs that is a multiple of {wanted[1]}"
        return ""

    def allowed(self, scores: Tensor, kept: Tensor) -> Tensor:
        """The weights that may become zero, as bools; those that are zero already are among them.

        Args:
            scores: `(outputs, inputs, ...)`, not negative.
            kept: the weights that are not zero already, as bools.
        """
        if not self.of:
            return torch.ones_like(kept)
        return ~NOfM(self.kept, self.of).compute_mask(scores, kept.to(scores)).bool()


def lowest(scores: Tensor, count: int) -> Tensor:
    """The kept weights, as bools, after the `count` weights with the lowest scores became zero.

    Args:
        scores: any shape, not negative.
        count: number of zeros.
    """
    method: Any = prune.L1Unstructured(count)
    mask: Tensor = method.compute_mask(scores.flatten(), default_mask=torch.ones(scores.numel(), dtype=scores.dtype))
    return mask.bool().reshape(scores.shape)
