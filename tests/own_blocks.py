# SPDX-License-Identifier: AGPL-3.0-or-later
"""Blocks of users, for models that are built from a YAML: `register` makes their names known there."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from small_data import SHORT
from torch import Tensor, nn
from ultralytics.nn import tasks


class DropPath(nn.Module):
    """A residual branch that is left out by chance."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand(len(x), 1, 1, 1, device=x.device, dtype=x.dtype) > 0.2 if self.training else 1
        return x + self.b(F.silu(self.a(x))) * kept


class ScalarBias(nn.Module):
    """An activation with one learned scale and one learned shift."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)
        self.scale, self.shift = nn.Parameter(torch.tensor([0.9])), nn.Parameter(torch.tensor([0.1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.scale * F.relu(self.a(x)) ** 2 + self.shift)


class OnlySquares(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        side = int((x.shape[2] * x.shape[3]) ** 0.5)
        return self.b(self.a(x).flatten(2).unflatten(2, (side, side)))


class GateBN1d(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.squeeze, self.norm, self.excite = nn.Linear(c, c // 4), nn.BatchNorm1d(c // 4), nn.Linear(c // 4, c)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.excite(self.norm(self.squeeze(x.mean((2, 3)))).relu()).sigmoid()
        return x * gate[..., None, None]


class KnowsItsWidth(nn.Module):
    """Cannot be cut, and no trace can see it: Python counts by itself."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.labels = nn.Conv2d(c, c, 1), [str(i) for i in range(c)]

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if len(range(x.shape[1])) != len(self.labels):
            raise ValueError(f"expected {len(self.labels)} channels")
        return F.silu(y)


BLOCKS = (DropPath, ScalarBias, OnlySquares, GateBN1d, KnowsItsWidth)


def register() -> None:
    """Let Ultralytics find the blocks, as a fork or a script of a user does."""
    for block in BLOCKS:
        setattr(tasks, block.__name__, block)


def with_blocks(c: int = 128) -> dict[str, Any]:
    """The layers of `SHORT` with all blocks at the end of the backbone."""
    backbone = [*SHORT["backbone"], *([-1, 1, block.__name__, [c]] for block in BLOCKS)]
    head = [*SHORT["head"][:-1], [[len(backbone) + 2], 1, "Detect", ["nc"]]]
    return {"backbone": backbone, "head": head}
