# SPDX-License-Identifier: AGPL-3.0-or-later
"""Validates models at the size of an export, which may be a rectangle."""

from __future__ import annotations

from typing import Any

from ultralytics.engine.model import Model

from yolo_prune.data.datasets import validator_at
from yolo_prune.env.image_size import ImageSize


def at_size(model: Model, imgsz: ImageSize) -> dict[str, Any]:
    """The arguments of `model.val` for images of exactly this size.

    Ultralytics validates an export at the size of the export, but a checkpoint at one number of pixels only.
    """
    if isinstance(imgsz, int):
        return {"imgsz": imgsz}
    return {"imgsz": max(imgsz), "rect": False, "validator": validator_at(model, imgsz)}
