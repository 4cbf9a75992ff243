# SPDX-License-Identifier: AGPL-3.0-or-later
"""Images for a model that is not being trained: of a dataset, or single files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import default_collate
from ultralytics.cfg import get_cfg
from ultralytics.data.augment import LetterBox
from ultralytics.data.utils import IMG_FORMATS, check_cls_dataset, check_det_dataset
from ultralytics.engine.model import Model
from ultralytics.utils import USER_CONFIG_DIR
from ultralytics.utils.patches import imread

from yolo_prune.data.calibration import Calibration, draw
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


def pixels(source: Any, imgsz: int) -> npt.NDArray[np.float32]:
    """Images as a model takes them, `(n, channels, imgsz, imgsz)`, 0 to 1.

    Args:
        source: such an array or tensor already; or a folder, a file, or a list of files, which are scaled to fit and
            padded with grey as `yolo predict` does.
        imgsz: in pixels.

    Raises:
        RunError: If there is no image, or one cannot be read.
    """
    if hasattr(source, "ndim"):
        array = np.asarray(source.detach().cpu() if hasattr(source, "detach") else source, np.float32)
        if array.ndim != 4 or not len(array):
            raise RunError(f"images: an array must be (n, channels, height, width), not {array.shape}.")
        return array
    files = [Path(source)] if isinstance(source, str | Path) else [Path(item) for item in source]
    if len(files) == 1 and files[0].is_dir():
        files = sorted(f for f in files[0].iterdir() if f.suffix.lower().lstrip(".") in IMG_FORMATS)
    if not files:
        raise RunError("images: there is none. Pass a folder of images, a list of files, or an array.")
    box, found = LetterBox((imgsz, imgsz), auto=False), []
    for file in files:
        picture = imread(str(file)) if file.is_file() else None
        if picture is None:
            raise RunError(f"images: '{file}' cannot be read as an image.")
        found.append(box(image=picture)[..., ::-1].transpose(2, 0, 1))
    return np.stack(found).astype(np.float32) / np.float32(255)
