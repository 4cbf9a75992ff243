# SPDX-License-Identifier: AGPL-3.0-or-later
"""Images of a dataset, for a model that is not being trained."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch.utils.data import default_collate
from ultralytics.cfg import get_cfg
from ultralytics.data.utils import check_cls_dataset, check_det_dataset
from ultralytics.engine.model import Model
from ultralytics.utils import USER_CONFIG_DIR

from yolo_prune.calibration import Calibration, draw
from yolo_prune.errors import RunError
from yolo_prune.graph.probes import stride

MEMORY = Path(USER_CONFIG_DIR) / "yolo-prune"  # what was measured on images of a dataset


def calibration(model: Model, data: str | Path, imgsz: int, count: int, seed: int = 0) -> Calibration:
    """Training images of a dataset as validation would show them, and what the task's loss needs.

    Args:
        model: a `YOLO` object.
        data: the dataset, as for `model.train`.
        imgsz: image size in pixels.
        count: at most this many images.
        seed: same seed, same images.

    Raises:
        RunError: If the dataset cannot be read, or does not have the model's classes.
    """
    dataset, validator, settings = _dataset(model, data, imgsz, "train")
    collate = getattr(dataset, "collate_fn", default_collate)
    return Calibration(lambda: draw(dataset, collate, count, seed), validator.preprocess, settings, MEMORY)


def spread(dataset: Any, count: int) -> list[Path]:
    """At most `count` image files of a dataset, from all over it."""
    files = getattr(dataset, "im_files", None) or [sample[0] for sample in dataset.samples]
    shown = min(count, len(files))
    return [Path(files[i * len(files) // shown]) for i in range(shown)]


def validation_files(model: Model, data: str | Path, imgsz: int, count: int) -> list[Path]:
    """At most `count` validation images of a dataset, from all over it.

    Raises:
        RunError: If the dataset cannot be read, or does not have the model's classes.
    """
    return spread(_dataset(model, data, imgsz, "val")[0], count)


def _dataset(model: Model, data: str | Path, imgsz: int, split: str) -> tuple[Any, Any, Any]:
    """A part of a dataset as validation would show it, the validator and its settings."""
    module: Any = model.model
    device = next(module.parameters()).device
    overrides = {"task": model.task, "mode": "val", "data": str(data), "imgsz": imgsz, "batch": 1, "workers": 0}
    settings = get_cfg(overrides={**overrides, "device": device.type, "rect": False})
    check = check_cls_dataset if model.task == "classify" else check_det_dataset
    try:
        found = check(str(data))
    except Exception as e:  # whatever is wrong with it, the reason is in the message
        raise RunError(f"data={data}: the dataset cannot be read: {e}") from e
    names = getattr(module, "names", None)
    if names and len(names) != found["nc"]:
        raise RunError(f"data={data} has {found['nc']} classes, the model {len(names)}. Pass what it was trained on.")
    with tempfile.TemporaryDirectory() as folder:
        validator: Any = model._smart_load("validator")(save_dir=Path(folder), args=settings)
    validator.data, validator.stride, validator.device = found, stride(module), device
    path = found[split]
    dataset = validator.build_dataset(path) if model.task == "classify" else validator.build_dataset(path, "val", 1)
    return dataset, validator, settings
