# SPDX-License-Identifier: AGPL-3.0-or-later
"""Images for a model outside of training: from a dataset, or from files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from torch import nn
from torch.utils.data import default_collate
from ultralytics.cfg import get_cfg
from ultralytics.data.augment import LetterBox
from ultralytics.data.utils import IMG_FORMATS, check_cls_dataset, check_det_dataset
from ultralytics.engine.model import Model
from ultralytics.utils import DATASETS_DIR, LOGGER, USER_CONFIG_DIR
from ultralytics.utils.patches import imread

from yolo_prune.cut.classes import Classes
from yolo_prune.cut.record import composed_plan
from yolo_prune.data.calibration import Calibration, draw
from yolo_prune.data.relabel import refuse_single_class, relabelled
from yolo_prune.env import outputs, trained
from yolo_prune.env.image_size import ImageSize, height_width, plain
from yolo_prune.env.releases import converted
from yolo_prune.errors import RunError
from yolo_prune.graph.probes import image_channels, stride

WITH_BOXES = ("detect", "segment", "pose", "obb")
"""The tasks with outlines of objects, so that images may lack labels. Other datasets have no image without a label."""
MEMORY = Path(USER_CONFIG_DIR) / "yolo-prune"  # stores results on images of a dataset


def calibration(
    model: Model, data: str | Path, imgsz: ImageSize, count: int, seed: int = 0, kept: Classes | None = None
) -> Calibration:
    """Training images of a dataset, prepared as for validation, with the labels that the loss needs.

    Args:
        model: a `YOLO` object.
        data: the dataset, as for `model.train`.
        imgsz: image size in pixels.
        count: largest number of images.
        seed: the same seed gives the same images.
        kept: the classes that are left if some are removed; None: those in the record of the model.

    Raises:
        RunError: If the dataset cannot be read, or has another number of classes than the model.
    """
    dataset, validator, settings = _dataset(model, data, imgsz, "train", trained.settings(model), kept)
    if not labelled(dataset, model.task):
        LOGGER.warning(
            f"No training image of data={data} has a label. A criterion or an allocation that uses the loss does not "
            "see then what the model is for."
        )
    collate = getattr(dataset, "collate_fn", default_collate)
    return Calibration(lambda: draw(dataset, collate, count, seed), validator.preprocess, settings, MEMORY)


def spread(dataset: Any, count: int) -> list[Path]:
    """At most `count` image files of a dataset, evenly spaced over it."""
    files = getattr(dataset, "im_files", None) or [sample[0] for sample in dataset.samples]
    shown = min(count, len(files))
    return [Path(files[i * len(files) // shown]) for i in range(shown)]


def validation_set(model: Model, data: str | Path, imgsz: ImageSize) -> Any:
    """The validation images of a dataset, as an Ultralytics dataset.

    Raises:
        RunError: If the dataset cannot be read, or has another number of classes than the model.
    """
    settings = trained.settings(model)
    return _dataset(model, data, imgsz, str(settings.get("split", "val")), settings)[0]


def read(model: Model, data: str | Path, imgsz: ImageSize, split: str) -> tuple[Any, Mapping[str, Any]] | None:
    """All images of a split, as an Ultralytics dataset, and the facts of the dataset; None without this split.

    Raises:
        RunError: If the dataset cannot be read, or its classes are not those of the model.
    """
    settings = {"fraction": 1.0, "split": split}
    if not _facts(model.task, data, settings, split).get(split):
        return None
    dataset, validator, _ = _dataset(model, data, imgsz, split, settings)
    return dataset, validator.data


def lacks_images(data: str | Path, task: str | None, split: str) -> bool:
    """Whether a split of a dataset on this machine is empty. False for other datasets, which may be downloaded."""
    path = Path(data)
    if task == "classify":
        root = next((folder for folder in (path, DATASETS_DIR / path) if (folder / "train").is_dir()), None)
        names = (split, "val", "validation", "valid", "test")  # Ultralytics uses the first that exists
        return root is not None and not has_images([root / name for name in names if (root / name).exists()][:1])
    if "://" in str(data) or not (path.is_dir() or path.suffix in (".yaml", ".yml")):
        return False
    try:
        info = check_det_dataset(str(data), autodownload=False)
    except Exception:  # images that are not here, or a file that Ultralytics will refuse when the run starts
        return False
    return not has_images(info.get(split) or info.get("test") or [])


def has_images(source: str | Path | Sequence[str | Path]) -> bool:
    """Whether a split of a dataset has an image. It is a folder, a text file that lists images, or several of them."""
    sources = [source] if isinstance(source, str | Path) else source
    return any(name.rpartition(".")[2].lower() in IMG_FORMATS for each in sources for name in _names(Path(each)))


def _names(path: Path) -> Iterator[str]:
    if path.is_file():
        yield from path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    for _, _, files in os.walk(path, followlinks=True):
        yield from files


def labelled(dataset: Any, task: str | None) -> bool:
    """Whether an image of an Ultralytics dataset has a label. If none has one, Ultralytics reports an accuracy of 0."""
    labels = getattr(dataset, "labels", None)  # a user's own dataset may have none
    return task not in WITH_BOXES or labels is None or any(len(label.get("cls", "?")) for label in labels)


def validator_at(model: Model, imgsz: ImageSize) -> Any:
    """The class of the validator of a model, for images of exactly this size.

    Ultralytics' own class takes rectangles of exports only, so the size is set after it has read its arguments.
    """
    stock: Any = model._smart_load("validator")

    class AtSize(stock):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.args.imgsz = plain(imgsz)

    return AtSize


def _facts(task: str | None, data: str | Path, settings: Mapping[str, Any], split: str) -> dict[str, Any]:
    """A dataset as Ultralytics reads it from its file; `fraction` and `split` of the settings choose its images."""
    try:
        local = str(converted(data, settings["fraction"], str(settings["split"])))
        facts: dict[str, Any] = check_cls_dataset(local, split) if task == "classify" else check_det_dataset(local)
    except Exception as e:  # Ultralytics raises many kinds of errors here; their messages say the reason
        raise RunError(f"data={data}: the dataset cannot be read: {e}") from e
    return facts


def _dataset(
    model: Model,
    data: str | Path,
    imgsz: ImageSize,
    split: str,
    settings: Mapping[str, Any],
    kept: Classes | None = None,
) -> tuple[Any, Any, Any]:
    """A split of a dataset, prepared as for validation at exactly this size, the validator, and its settings."""
    module: Any = model.model
    device, size = next(module.parameters()).device, height_width(imgsz)
    overrides = {"task": model.task, "mode": "val", "data": str(data), "imgsz": max(size), "batch": 1, "workers": 0}
    fixed = {"device": device.type, "rect": False, "split": split}
    args = get_cfg(overrides={**settings, **overrides, **fixed})
    info = _facts(model.task, data, {"split": "val", **settings, "fraction": args.fraction}, split)
    kept = kept or kept_classes(module)
    if kept:
        refuse_single_class(args)
    elif args.single_cls:  # as the trainer does
        info |= {"names": {0: "item"}, "nc": 1}
    if (channels := image_channels(module) or 3) != info.get("channels", 3):
        raise RunError(
            f"data={data} has images of {info.get('channels', 3)} channels, the model takes {channels}. Set "
            f"'channels: {channels}' in the file of the dataset, or pass the dataset on which the model was trained."
        )
    names = getattr(module, "names", None)
    other = relabelled(kept, info, data) if kept else None
    if names and not other and len(names) != info["nc"]:
        raise RunError(
            f"data={data} has {info['nc']} classes, the model {len(names)}. Pass the dataset on which the model was "
            "trained."
        )
    with outputs.scratch() as folder:
        validator: Any = validator_at(model, imgsz)(save_dir=Path(folder), args=args)
    validator.data, validator.stride, validator.device = info, stride(module), device
    if not (path := info.get(split)) or not has_images(path):
        raise RunError(f"data={data} has no images in its split '{split}', and this command needs them. Add them.")
    build = partial(validator.build_dataset, path, *(() if model.task == "classify" else ("val", 1)))
    try:
        dataset = other.built(validator, build) if other else build()
    except Exception as e:  # as above
        raise RunError(f"data={data}: the split '{split}' cannot be read: {e}") from e
    return dataset, validator, args


def kept_classes(module: nn.Module) -> Classes | None:
    """The classes that a model keeps, if some were removed from it."""
    plan = composed_plan(module)
    return plan.classes if plan else None


def pixels(source: Any, imgsz: ImageSize, channels: int = 3) -> npt.NDArray[np.float32]:
    """Images in the form that a model takes: `(n, channels, height, width)`, 0 to 1.

    Args:
        source: an array or tensor of this form, which is returned as it is; or a folder, a file, or a list of files.
            Images from files are scaled and padded with grey, as in `yolo predict`.
        imgsz: image size in pixels.
        channels: number of channels of the model's input. With another number than 1 and 3, all channels of a file are
            read.

    Raises:
        RunError: If there is no image, or an image cannot be read or has another number of channels.
    """
    if hasattr(source, "ndim"):
        array = np.asarray(source.detach().cpu() if hasattr(source, "detach") else source, np.float32)
        if array.ndim != 4 or not len(array) or array.shape[1] != channels:
            raise RunError(f"images: an array must be (n, {channels}, height, width) here, not {array.shape}.")
        return array
    files = [Path(source)] if isinstance(source, str | Path) else [Path(item) for item in source]
    if len(files) == 1 and files[0].is_dir():
        files = sorted(f for f in files[0].iterdir() if f.suffix.lower().lstrip(".") in IMG_FORMATS)
    if not files:
        raise RunError("images: there are none. Pass a folder of images, a list of files, or an array.")
    box, arrays = LetterBox(height_width(imgsz), auto=False), []
    flags = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR}.get(channels, cv2.IMREAD_UNCHANGED)  # as Ultralytics does
    for file in files:
        picture = imread(str(file), flags) if file.is_file() else None
        if picture is None:
            raise RunError(f"images: '{file}' cannot be read as an image.")
        picture = picture if picture.ndim == 3 else picture[..., None]
        if picture.shape[2] != channels:
            raise RunError(f"images: '{file}' has {picture.shape[2]} channels, and the model takes {channels}.")
        array = box(image=picture)
        arrays.append((array[..., ::-1] if channels == 3 else array).transpose(2, 0, 1))
    return np.stack(arrays).astype(np.float32) / np.float32(255)
