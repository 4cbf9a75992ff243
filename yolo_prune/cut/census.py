# SPDX-License-Identifier: AGPL-3.0-or-later
"""Counts the zeros in a model, and what they are worth: the size of its file when compressed, and its 2:4 layers."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

LEVEL = 6  # of compression; the default of zip programs
SPARSE_CORES = (16, 8)
"""Inputs and outputs of a layer are multiples of these numbers, if sparse tensor cores of NVIDIA can use its 2:4 zeros.

Source: the rule of ASP in NVIDIA's Apex (`apex/contrib/sparsity/asp.py`), which makes such zeros for them. TensorRT
itself asks for groups of four inputs only.
"""


@dataclass(frozen=True)
class Census:
    """The zeros of a model.

    Attributes:
        weights: number of weights of convolutions and linear layers.
        zeros: number of zeros among them.
        layers: `{name of a layer: share of zeros}`.
        two_of_four: names of the layers whose zeros sparse tensor cores can use.
    """

    weights: int
    zeros: int
    layers: dict[str, float]
    two_of_four: tuple[str, ...]

    @property
    def share(self) -> float:
        """Share of zeros."""
        return self.zeros / self.weights if self.weights else 0.0


def census(model: nn.Module) -> Census:
    """Count the zeros in the weights of convolutions and linear layers, without the fixed layer of DFL."""
    layers, counted, zeros, ready = {}, 0, 0, []
    for name, layer in weighted_layers(model):
        weight = layer.weight.detach()
        none = int((weight == 0).sum())
        layers[name] = none / weight.numel()
        counted, zeros = counted + weight.numel(), zeros + none
        if fits_sparse_cores(layer) and is_two_of_four(weight):
            ready.append(name)
    return Census(counted, zeros, layers, tuple(ready))


def weighted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """`(name, layer)` of the convolutions and linear layers, without the fixed layer of DFL; shared weights once."""
    seen = set[int]()
    for name, layer in model.named_modules():
        if (
            isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)
            and ".dfl" not in name
            and id(layer.weight) not in seen
        ):
            seen.add(id(layer.weight))
            yield name, layer


def fits_sparse_cores(layer: nn.Module) -> bool:
    """Whether the sizes of a layer are those that sparse tensor cores need."""
    if isinstance(layer, nn.modules.conv._ConvTransposeNd) or getattr(layer, "groups", 1) > 1:
        return False
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return not weight.shape[1] % SPARSE_CORES[0] and not weight.shape[0] % SPARSE_CORES[1]


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at most two of each four weights along the inputs are not zero; `(outputs, inputs, ...)`."""
    fours = (weight != 0).movedim(1, -1).reshape(-1, 4)
    return bool((fours.sum(1) <= 2).all())


def compressed_mb(content: bytes) -> float:
    """Size in megabytes of the content of a file when it is compressed (zlib, as in zip files)."""
    return len(zlib.compress(content, LEVEL)) / 1e6


def compressed_file_mb(path: Path) -> float:
    """Size in megabytes of a file or a folder, when each file is compressed."""
    files = [file for file in (path, *path.rglob("*")) if file.is_file()]
    return sum(compressed_mb(file.read_bytes()) for file in files)
