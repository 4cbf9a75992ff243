# SPDX-License-Identifier: AGPL-3.0-or-later
"""Validates models at the size of an export, which may be a rectangle."""

from __future__ import annotations

from typing import Any

from ultralytics.engine.model import Model

from yolo_prune.data.datasets import kept_classes, validator_at
from yolo_prune.data.relabel import relabelling
from yolo_prune.env.image_size import ImageSize


def at_size(model: Model, imgsz: ImageSize) -> dict[str, Any]:
    """The arguments of `model.val` for images of exactly this size, and for the classes of the model.

    Ultralytics validates an export at the size of the export, but a checkpoint at one number of pixels only. They also
    hold for an export of the model, which does not know the names of the classes that were removed.
    """
    how: dict[str, Any] = {"imgsz": imgsz}
    if not isinstance(imgsz, int):
        how = {"imgsz": max(imgsz), "rect": False, "validator": validator_at(model, imgsz)}
    if kept := kept_classes(model.model):
        how["validator"] = relabelling(how.get("validator") or model._smart_load("validator"), kept)
    return how
