# SPDX-License-Identifier: AGPL-3.0-or-later
"""Validates models at the size of an export, which may be a rectangle."""

from __future__ import annotations

from typing import Any

from ultralytics.engine.model import Model

from yolo_prune.env.image_size import ImageSize, plain


def at_size(model: Model, imgsz: ImageSize) -> dict[str, Any]:
    """The arguments of `model.val` for images of exactly this size.

    Ultralytics validates an export at the size of the export, but a checkpoint at one number of pixels only. For
    rectangles, the validator therefore gets the size after it is made.
    """
    if isinstance(imgsz, int):
        return {"imgsz": imgsz}
    stock: Any = model._smart_load("validator")

    class AtSize(stock):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.args.imgsz = plain(imgsz)

    return {"imgsz": max(imgsz), "rect": False, "validator": AtSize}
