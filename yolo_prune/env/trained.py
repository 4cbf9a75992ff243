# SPDX-License-Identifier: AGPL-3.0-or-later
"""The settings that a model was trained with. They also hold when it is validated, measured or cut later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from ultralytics.engine.model import Model
from ultralytics.utils import DEFAULT_CFG_DICT

from yolo_prune.env.image_size import ImageSize, rounded_up, stored_size

SIZE = 640
"""The image size of a model that does not store one, in pixels: the default of Ultralytics."""
SPLITS = ("train", "val", "test")
MASKS = ("overlap_mask", "mask_ratio")
"""How labels become masks, in segmentation."""
JUDGING = (
    *("single_cls", "classes", "split", "fraction"),  # which images, and which of their labels
    *MASKS,
    *("conf", "iou", "max_det", "agnostic_nms"),  # which detections count
)
"""The arguments of training that the accuracy in its validation depends on, beside `task`, `data` and `imgsz`."""
LOSS = ("box", "cls", "cls_pw", "dfl", "pose", "kobj", "rle", "angle")
"""The weights of the parts of the loss."""
HELD = tuple(key for key in (*JUDGING, *LOSS) if key in DEFAULT_CFG_DICT)  # earlier releases lack some


def settings(model: Model | nn.Module) -> dict[str, Any]:
    """The settings of a model's training that hold in every later validation, as arguments of `model.val`."""
    return held(_stored(model))


def held(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments of a training that hold in every later validation."""
    return {key: arguments[key] for key in HELD if arguments.get(key) is not None}


def size(model: Model | nn.Module) -> ImageSize:
    """The image size that a model was trained with, as models and exports take it."""
    return usable(_stored(model).get("imgsz"))


def usable(imgsz: Any) -> ImageSize:
    """The image size of a training, rounded up to multiples of 32, as models and exports take it.

    Args:
        imgsz: what the checkpoint or the report holds; None is the default of Ultralytics.
    """
    return rounded_up(stored_size(imgsz or SIZE))


def differences(models: Sequence[Model]) -> list[str]:
    """The settings in which the validations of some models differ, for a message: `["single_cls (False, True)"]`.

    A setting that a model does not store has the default of Ultralytics.
    """
    known = [_judging(model) for model in models]
    values = {key: [str(each.get(key)) for each in known] for key in JUDGING}
    return [f"{key} ({', '.join(each)})" for key, each in values.items() if len(set(each)) > 1]


def _judging(model: Model) -> dict[str, Any]:
    """The settings that have an effect on the validation of a model."""
    known = DEFAULT_CFG_DICT | settings(model)
    known["fraction"] = _fraction(known["fraction"], str(known["split"]))
    masks = () if model.task == "segment" else MASKS
    return {key: value for key, value in known.items() if key in JUDGING and key not in masks}


def _fraction(value: Any, split: str) -> float:
    """The part of a split that is used. One number is for training images only; a list has a number for each split."""
    shares = dict(zip(SPLITS, value if isinstance(value, list | tuple) else [value], strict=False))
    return float(shares.get(split, 1.0))


def _stored(model: Model | nn.Module) -> Mapping[str, Any]:
    """The arguments in the checkpoint of a model, or those that a module carries; empty for an untrained model."""
    if isinstance(model, Model):
        arguments = (model.ckpt or {}).get("train_args")
    else:
        arguments = getattr(model, "args", None)
    if arguments is None:
        return {}
    return arguments if isinstance(arguments, Mapping) else vars(arguments)
