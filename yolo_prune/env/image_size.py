# SPDX-License-Identifier: AGPL-3.0-or-later
"""The size of images: one number of pixels for squares, or height and width as in Ultralytics' export."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from yolo_prune.errors import PruneError

LARGEST = 8192
"""Longest side in pixels. This value is a choice, to find mistyped sizes before memory runs out."""


class Rectangle(NamedTuple):
    """The size of images that are not square, in pixels. As text it is what the command line takes: `480,640`."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height},{self.width}"


ImageSize: TypeAlias = int | Rectangle
"""Height and width in pixels; one number if they are equal."""


def image_size(value: Any, multiple: int = 32, error: type[Exception] = PruneError) -> ImageSize:
    """Read an image size that a user passed.

    Args:
        value: a number, or height and width: `640`, `(480, 640)`, `[480, 640]`, `"640"`, `"480,640"`, `"[480, 640]"`.
        multiple: both sides must be multiples of this.
        error: the class of the error.

    Raises:
        PruneError: If this is no size, or not one that a model can take. With `error`, its class is `error`.
    """
    return _read(value, multiple, LARGEST, f"between {multiple} and {LARGEST}", error)


def stored_size(value: Any, multiple: int = 1, error: type[Exception] = PruneError) -> ImageSize:
    """Read an image size that a checkpoint or a report holds. It was used already, so there is no largest size.

    Args:
        value: as for `image_size`.
        multiple: both sides must be multiples of this.
        error: the class of the error.

    Raises:
        PruneError: If this is no size. With `error`, its class is `error`.
    """
    return _read(value, multiple, math.inf, f"of at least {multiple}", error)


def plain(size: ImageSize) -> int | list[int]:
    """The size as plain data: for files, and for Ultralytics."""
    return size if isinstance(size, int) else list(size)


def height_width(size: ImageSize) -> tuple[int, int]:
    """Height and width in pixels."""
    return (size, size) if isinstance(size, int) else (size.height, size.width)


def rounded_up(size: ImageSize, multiple: int = 32) -> ImageSize:
    """The size with both sides rounded up to a multiple, as a model takes it."""
    return stored_size([-(-side // multiple) * multiple for side in height_width(size)])


def _read(value: Any, multiple: int, largest: float, limits: str, error: type[Exception]) -> ImageSize:
    try:
        sides = _sides(value)
    except (TypeError, ValueError):
        sides = []
    if len(sides) not in (1, 2) or not all(0 < side <= largest and side % multiple == 0 for side in sides):
        number = "whole number" if multiple == 1 else f"multiple of {multiple}"
        raise error(f"imgsz={value}: must be a {number} {limits}, or two of them for rectangles (height,width).")
    height, width = sides[0], sides[-1]
    return height if height == width else Rectangle(height, width)


def _sides(value: Any) -> list[int]:
    """The numbers in a value.

    Raises:
        TypeError: If a part of it is not a whole number.
        ValueError: If it is text of another form.
    """
    if isinstance(value, str):
        return [int(side) for side in value.strip().strip("[]()").split(",")]
    sides = value if isinstance(value, Sequence) else [value]
    if any(isinstance(side, bool) for side in sides):
        raise TypeError("a truth value is no number of pixels")
    return [operator.index(side) for side in sides]  # also the whole numbers of numpy and torch
