# SPDX-License-Identifier: AGPL-3.0-or-later
"""Samples of a layer's input patches, which its weight is multiplied with, and of its outputs, at some positions."""

from __future__ import annotations

import zlib
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ReadableLayer = nn.Conv2d | nn.Linear
POSITIONS = 8000
"""Positions, of all images together, at which a layer is read, for the refit and for scores.

This value is a choice: memory and time grow in proportion.
"""
PER_COLUMN = 3
"""Minimum number of positions per weight of an output.

This value is a choice: with one position per weight, the fit would be exact at every position, noise included, and only
the ridge would limit it. With a few positions per weight, the noise is averaged.
"""


def readable(layer: nn.Module) -> TypeGuard[ReadableLayer]:
    """True for a layer that multiplies a weight with patches of its input."""
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def upsamples(layer: nn.Module) -> TypeGuard[nn.ConvTranspose2d]:
    """True for a transposed convolution whose output patches do not overlap: each depends on one input pixel only."""
    return (
        isinstance(layer, nn.ConvTranspose2d)
        and layer.kernel_size == layer.stride
        and layer.kernel_size[0] == layer.kernel_size[1]
        and (layer.groups, layer.dilation, layer.padding, layer.output_padding) == (1, (1, 1), (0, 0), (0, 0))
    )


def padding(layer: nn.Conv2d) -> tuple[int, int]:
    """Number of rows and columns of zeros that a convolution adds on each side."""
    return int(layer.padding[0]), int(layer.padding[1])


def width(layer: ReadableLayer, value: Tensor) -> int:
    """Width of the output of a convolution for an input. For a linear layer it has no meaning and is 1."""
    if isinstance(layer, nn.Linear):
        return 1
    reach = layer.dilation[1] * (layer.kernel_size[1] - 1)
    return (value.shape[-1] + 2 * padding(layer)[1] - reach - 1) // layer.stride[1] + 1


def groups(layer: nn.Module) -> int:
    """Number of groups of a convolution; 1 for another layer."""
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def positions(name: str, output: Tensor, layer: nn.Module, count: int) -> Tensor:
    """A random sample of positions in a layer's output. The same name gives the same positions.

    Args:
        name: name of the layer.
        output: output of the layer.
        layer: the layer.
        count: largest number of positions per image.

    Returns:
        `(images, positions)`: positions, counted row by row.
    """
    flat = _flat(output, layer)
    images, spots = len(flat), flat.shape[2]
    if spots <= count:
        return torch.arange(spots, device=output.device).expand(images, -1)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.stack([torch.randperm(spots, generator=generator)[:count] for _ in range(images)]).to(output.device)


def sample(name: str, output: Tensor, layer: nn.Module) -> Tensor:
    """The `positions` at which a layer is read, for the refit and for scores: `(images, positions)`.

    Args:
        name: name of the layer.
        output: output of the layer; for a layer that `upsamples`, a value with one pixel for each of its patches.
        layer: the layer.
    """
    columns = 0 if upsamples(layer) else layer.weight[0].numel()  # type: ignore[index]
    count = max(POSITIONS, PER_COLUMN * columns)
    return positions(name, output, layer, max(1, count // len(output)))


def read(layer: ReadableLayer, value: Tensor, where: Tensor, width: int) -> Tensor:
    """The input patches that the rows of the weight are multiplied with.

    Args:
        layer: the layer.
        value: input of the layer.
        where: positions in the output of the layer, `(images, positions)`.
        width: width of the output; it has no meaning for a linear layer.

    Returns:
        `(groups, columns, images * positions)`, with columns in the order of the flattened weight.
    """
    if isinstance(layer, nn.Linear):
        return written(layer, value, where)
    top, left = padding(layer)
    (down, right), (dy, dx) = layer.stride, layer.dilation
    value = F.pad(value, (left, left, top, top))
    channels, wide = value.shape[1], value.shape[3]
    y, x = where // width * down, where % width * right
    flat = value.flatten(2)
    taps = [(y + i * dy) * wide + x + j * dx for i in range(layer.kernel_size[0]) for j in range(layer.kernel_size[1])]
    patches = torch.stack([flat.gather(2, t[:, None].expand(-1, channels, -1)) for t in taps], 2)
    return patches.permute(1, 2, 0, 3).reshape(layer.groups, -1, where.numel())


def written(layer: nn.Module, value: Tensor, where: Tensor | None = None) -> Tensor:
    """A layer's output at some or all positions: `(groups, outputs, images * positions)`."""
    outputs = _flat(value, layer)
    if where is not None:
        outputs = outputs.gather(2, where[:, None].expand(-1, outputs.shape[1], -1))
    return outputs.permute(1, 0, 2).reshape(groups(layer), -1, len(outputs) * outputs.shape[2])


def _flat(value: Tensor, layer: nn.Module) -> Tensor:
    """A value of a layer in the form `(images, channels, positions)`."""
    if isinstance(layer, nn.Linear):
        value = value if value.ndim > 2 else value[:, None]
        return value.flatten(1, -2).transpose(1, 2)
    return value.flatten(2)
