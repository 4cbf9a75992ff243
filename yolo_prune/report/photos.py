# SPDX-License-Identifier: AGPL-3.0-or-later
"""Images with the detections of models, as plain data for a page."""

from __future__ import annotations

import base64
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Detection:
    """A detection of a model. Points are fractions of the width and the height of the image.

    Attributes:
        name: name of the class.
        kind: number of the class.
        score: confidence.
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
    """An image, scaled down, with the detections of each model.

    Attributes:
        name: name of the file.
        jpeg: the encoded image.
        width: width in pixels.
        height: height in pixels.
        detections: one tuple of detections for each model.
    """

    name: str
    jpeg: bytes
    width: int
    height: int
    detections: tuple[tuple[Detection, ...], ...]

    @property
    def base64(self) -> str:
        """The image as text for a data URL."""
        return base64.b64encode(self.jpeg).decode("ascii")

    def corners(self, detection: Detection) -> str:
        """The outline of a detection in pixels, in the format of an SVG polygon."""
        return " ".join(f"{x * self.width:.1f},{y * self.height:.1f}" for x, y in detection.outline)
