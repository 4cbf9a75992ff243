# SPDX-License-Identifier: AGPL-3.0-or-later
"""The settings that a model was trained with. They also hold when it is validated, measured or cut later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from ultralytics.engine.model import Model
from ultralytics.utils import DEFAULT_CFG_DICT

from yolo_prune.env.image_size import ImageSize, image_size, rounded_up

SIZE = 640
"""The image size of a model that does not store one, in pixels: the default of Ultralytics."""
JUDGING = (
    *("single_cls", "classes", "split", "fraction"),  # which images, and which of their labels
    *("overlap_mask", "mask_ratio"),  # how labels become masks
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
    """The image size that a model was trained with, rounded up to multiples of 32."""
    return rounded_up(image_size(_stored(model).get("imgsz") or SIZE, multiple=1))


def differences(models: Sequence[Model]) -> list[str]:
    """The settings in which the validations of some models differ, for a message: `["single_cls (False, True)"]`.

    A setting that a model does not store has the default of Ultralytics.
    """
    known = [DEFAULT_CFG_DICT | settings(model) for model in models]
    values = {key: [str(each[key]) for each in known] for key in JUDGING if key in HELD}
    return [f"{key} ({', '.join(each)})" for key, each in values.items() if len(set(each)) > 1]


def _stored(model: Model | nn.Module) -> Mapping[str, Any]:
    """The arguments in the checkpoint of a model, or those that a module carries; empty for an untrained model."""
    if isinstance(model, Model):
        arguments = (model.ckpt or {}).get("train_args")
    else:
        arguments = getattr(model, "args", None)
    if arguments is None:
        return {}
    return arguments if isinstance(arguments, Mapping) else vars(arguments)
