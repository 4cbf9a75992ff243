# SPDX-License-Identifier: AGPL-3.0-or-later
"""Differences between releases of Ultralytics: one name for each function, although the releases use several names."""

from __future__ import annotations

import importlib.util
import inspect
import pickle
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from torch import nn
from ultralytics import utils
from ultralytics.data import utils as data_utils
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn import tasks
from ultralytics.utils import dist, torch_utils

from yolo_prune.errors import RunError

DAMAGED = (EOFError, OSError, RuntimeError, KeyError, AttributeError, pickle.UnpicklingError)
"""The errors from loading a file that is incomplete, or that is not a checkpoint."""


class Blocks:
    """A module of Ultralytics' blocks. A block that this release lacks is replaced by a class without instances."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name, None) or type(name, (), {})


def load_checkpoint(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model in a checkpoint, in float32, and the checkpoint.

    Releases of Ultralytics before 8.3.200 call this function `attempt_load_one_weight`.

    Raises:
        RunError: If the file is missing, incomplete, or not a checkpoint of Ultralytics.
    """
    load = getattr(tasks, "load_checkpoint", None) or tasks.attempt_load_one_weight
    try:
        model, checkpoint = load(str(path))
    except (*DAMAGED, TypeError) as e:
        raise RunError(f"'{path}' is not a complete Ultralytics checkpoint: {type(e).__name__}: {e}") from e
    return model, checkpoint


def unwrap_model(model: nn.Module) -> Any:
    """The model inside wrappers for compilation and several devices.

    Releases of Ultralytics before 8.3.200 call this function `de_parallel`.
    """
    return (getattr(torch_utils, "unwrap_model", None) or torch_utils.de_parallel)(model)


def closes_mosaic_late() -> bool:
    """True if a run with fewer epochs than `close_mosaic` uses no mosaic. Earlier releases use mosaic in it."""
    return _mentions(inspect.unwrap(BaseTrainer._do_train).__code__, "mosaic_closed")


def shares_callbacks() -> bool:
    """True if the processes of a run on several devices get the callbacks of the process that started them."""
    return _mentions(inspect.unwrap(dist.generate_ddp_file).__code__, "callbacks")


def halves_onnx() -> bool:
    """True if an ONNX export on the CPU can have half precision. In early releases only an export on a GPU can."""
    exporter: Any = importlib.util.find_spec("ultralytics.engine.exporter")  # not imported, because that is slow
    return _mentions(exporter.loader.get_code(exporter.name), "convert_float_to_float16")


def _mentions(code: CodeType, word: str) -> bool:
    """True if a name or a constant in compiled code contains a word. Some installations have no sources to read."""
    names = (*code.co_names, *code.co_varnames, *code.co_cellvars, *code.co_freevars)
    if any(word in name for name in names):
        return True
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    plain = (repr(constant) for constant in code.co_consts if not isinstance(constant, CodeType))
    return any(word in text for text in plain) or any(_mentions(constant, word) for constant in inner)


def converted(data: Any, fraction: Any, split: str) -> Any:
    """A dataset in the form that Ultralytics reads: an `.ndjson` file is converted, as its trainer and validator do it.

    Releases of Ultralytics that lack this function do not convert such files in every command.

    Args:
        data: the dataset; all but `.ndjson` files are returned as they are.
        fraction: `fraction=` of the training, so that the same images are used.
        split: `split=` of the training.
    """
    convert = getattr(data_utils, "convert_ndjson_to_yolo_if_needed", None)
    if convert is None:
        return data
    known = inspect.signature(convert).parameters
    return convert(data, **{k: v for k, v in {"fraction": fraction, "split": split}.items() if k in known})


def strip_qat(model: nn.Module) -> None:
    """Remove the quantizers from a model, in place. Releases before 8.4.120 have no `quantize=8` in training."""
    if strip := getattr(torch_utils, "strip_qat", None):
        strip(model)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The content of a YAML file. Releases of Ultralytics before 8.3.200 call this function `yaml_load`."""
    data: dict[str, Any] = utils.YAML.load(path) if hasattr(utils, "YAML") else utils.yaml_load(path)
    return data


def save_yaml(path: str | Path, data: dict[str, Any]) -> None:
    """Write a YAML file. Releases of Ultralytics before 8.3.200 call this function `yaml_save`."""
    (utils.YAML.save if hasattr(utils, "YAML") else utils.yaml_save)(path, data)
