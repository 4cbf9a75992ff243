# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the weight of a layer is multiplied with, at a sample of positions, and what comes out there."""

from __future__ import annotations

import zlib
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ReadableLayer = nn.Conv2d | nn.Linear


def readable(layer: nn.Module) -> TypeGuard[ReadableLayer]:
    """True for a layer that multiplies a weight with patches of its input."""
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def upsamples(layer: nn.Module) -> TypeGuard[nn.ConvTranspose2d]:
    """True for a transposed convolution whose patches of output do not overlap: each is a linear map of one pixel."""
    return (
        isinstance(layer, nn.ConvTranspose2d)
        and layer.kernel_size == layer.stride
        and layer.kernel_size[0] == layer.kernel_size[1]
        and (layer.groups, layer.dilation, layer.padding, layer.output_padding) == (1, (1, 1), (0, 0), (0, 0))
    )


def padding(layer: nn.Conv2d) -> tuple[int, int]:
    """Rows and columns of zeros on each side."""
    return int(layer.padding[0]), int(layer.padding[1])


def width(layer: ReadableLayer, value: Tensor) -> int:
    """Columns that a layer's output has for an input; of no meaning for a linear layer."""
    if isinstance(layer, nn.Linear):
        return 1
    reach = layer.dilation[1] * (layer.kernel_size[1] - 1)
    return (value.shape[-1] + 2 * padding(layer)[1] - reach - 1) // layer.stride[1] + 1


def groups(layer: nn.Module) -> int:
    """Of a convolution; another layer has one."""
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def positions(name: str, output: Tensor, layer: nn.Module, count: int) -> Tensor:
    """A sample of positions of a layer's output, the same for the same name.

    Args:
        name: of the layer.
        output: what it put out.
        layer: the layer.
        count: positions per image, at most.

    Returns:
        `(images, positions)`: numbers of positions, row by row.
    """
    flat = _flat(output, layer)
    images, spots = len(flat), flat.shape[2]
    if spots <= count:
        return torch.arange(spots, device=output.device).expand(images, -1)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.stack([torch.randperm(spots, generator=generator)[:count] for _ in range(images)]).to(output.device)


def read(layer: ReadableLayer, value: Tensor, where: Tensor, width: int) -> Tensor:
    """What a row of the weight is multiplied with.

    Args:
        layer: the layer.
        value: its input.
        where: positions of its output, `(images, positions)`.
        width: of its output (of no meaning for a linear layer).

    Returns:
        `(groups, columns, images * positions)`, columns in the order of the flattened weight.
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
    found = torch.stack([flat.gather(2, t[:, None].expand(-1, channels, -1)) for t in taps], 2)
    return found.permute(1, 2, 0, 3).reshape(layer.groups, -1, where.numel())


def written(layer: nn.Module, value: Tensor, where: Tensor | None = None) -> Tensor:
    """A layer's output at some positions, or at all of them: `(groups, outputs, images * positions)`."""
    found = _flat(value, layer)
    if where is not None:
        found = found.gather(2, where[:, None].expand(-1, found.shape[1], -1))
    return found.permute(1, 0, 2).reshape(groups(layer), -1, len(found) * found.shape[2])


def _flat(value: Tensor, layer: nn.Module) -> Tensor:
    """`(images, channels, positions)`."""
    if isinstance(layer, nn.Linear):
        value = value if value.ndim > 2 else value[:, None]
        return value.flatten(1, -2).transpose(1, 2)
    return value.flatten(2)
