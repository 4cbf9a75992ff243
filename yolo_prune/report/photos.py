# SPDX-License-Identifier: AGPL-3.0-or-later
"""Images of a dataset with what models found in them, as plain data for a page."""

from __future__ import annotations

import base64
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Mark:
    """Something a model found; points are fractions of the image's width and height.

    Attributes:
        name: its class.
        kind: the number of its class.
        score: the confidence.
        outline: the corners of a box, rotated box or mask.
        dots: keypoints.
    """

    name: str
    kind: int
    score: float
    outline: tuple[Point, ...] = ()
    dots: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Photo:
    """An image, scaled down, and for each model what it found there.

    Attributes:
        name: of the file.
        jpeg: the encoded image.
        width: in pixels.
        height: in pixels.
        found: one tuple of marks for each model.
    """

    name: str
    jpeg: bytes
    width: int
    height: int
    found: tuple[tuple[Mark, ...], ...]

    @property
    def base64(self) -> str:
        """The image as text for a data URL."""
        return base64.b64encode(self.jpeg).decode("ascii")

    def corners(self, mark: Mark) -> str:
        """The outline of a mark in pixels, as an SVG polygon wants it."""
        return " ".join(f"{x * self.width:.1f},{y * self.height:.1f}" for x, y in mark.outline)
