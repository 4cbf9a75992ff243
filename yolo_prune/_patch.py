# SPDX-License-Identifier: AGPL-3.0-or-later
"""The patch of Ultralytics: four functions are replaced, and one public list is extended.

The new `ultralytics.cfg.check_dict_alignment` accepts `callbacks=` and `recipe=` for `yolo train`. The new
`Model.train` removes these two arguments before Ultralytics reads the others. The new `BaseModel.load`, through which
all weights pass from one model into another, refuses to mix a pruned model with another structure. The new `Model.val`
reads the labels of a dataset by name if classes were removed from the model. The list
`default_callbacks["on_export_start"]` gets one more entry.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from yolo_prune._keys import check_spelling, is_pruning_key, without_pruning_keys
from yolo_prune.env.terminal import forgiving
from yolo_prune.errors import ArgumentError, PruneError

MARK = "__yolo_prune__"
RECORD = "pruning"  # equal to `cut.record.KEY`; importing that module would import torch
CUSTOM_KEYS = ("augmentations", "save_dir")  # Ultralytics accepts these arguments although they have no default
EXAMPLES = {"callbacks": "prune", "recipe": "half-flops"}


def apply(module: ModuleType) -> None:
    """Patch one of the two modules. A second call does nothing.

    Raises:
        RuntimeError: If this Ultralytics lacks a function to patch, or the function has another signature.
    """
    if module.__name__ == "ultralytics.cfg":
        _replace(module, "check_dict_alignment", ["base", "custom", "e", "allowed_custom_keys"], _alignment, fewest=3)
    elif module.__name__ == "ultralytics.engine.model":
        from ultralytics.nn.tasks import BaseModel  # this module has imported it already

        _replace(BaseModel, "load", ["self", "weights", "verbose"], _load)
        _replace(module.Model, "train", ["self", "trainer", "kwargs"], _train)
        _replace(module.Model, "val", ["self", "validator", "kwargs"], _val)
        _extend_export()


def _replace(
    owner: Any,
    name: str,
    expected: list[str],
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]],
    fewest: int | None = None,
) -> None:
    """Replace the function `name` of `owner` by `wrap(original)`.

    In earlier releases of Ultralytics, the function may have only the first `fewest` of the `expected` parameters.
    """
    original = getattr(owner, name, None)
    if original is None:
        raise RuntimeError(f"{owner.__name__} has no '{name}'")
    if hasattr(original, MARK):
        return
    parameters = list(inspect.signature(original).parameters)
    if parameters != expected and (fewest is None or parameters != expected[:fewest]):
        raise RuntimeError(f"{owner.__name__}.{name} takes {parameters}, expected {expected}")
    replacement = functools.wraps(original)(wrap(original))
    setattr(replacement, MARK, True)
    setattr(owner, name, replacement)


def _alignment(original: Callable[..., Any]) -> Callable[..., Any]:
    def check_dict_alignment(
        base: Mapping[str, Any],
        custom: Mapping[str, Any],
        e: Exception | None = None,
        allowed_custom_keys: set[str] | None = None,
    ) -> None:
        allowed = [allowed_custom_keys] if allowed_custom_keys else []  # releases before 8.4.0 lack this parameter
        if "train" not in base:  # not a command, but the arguments of a mode, or another configuration
            with _as_a_command():
                _refuse_elsewhere(custom)
            original(base, custom, e, *allowed)
            return
        with _as_a_command():
            _check_command(custom, unreadable=e is not None)
        # With the examples, Ultralytics also suggests the keys of this package for misspelt keys.
        original({**base, **EXAMPLES}, without_pruning_keys(custom), e, *allowed)

    return check_dict_alignment


def _check_command(custom: Mapping[str, Any], unreadable: bool) -> None:
    """Refuse keys of this package in a command that gives them no value, or that does not prune."""
    ours = [key for key in custom if is_pruning_key(key.rstrip("="))]
    mode = custom.get("mode")
    if ours and (unreadable or custom[ours[0]] == ""):  # Ultralytics reports an argument without a value in both ways
        raise ArgumentError(f"'{ours[0].rstrip('=')}' needs a value, for example callbacks=prune recipe=half-flops.")
    if mode != "train":
        _refuse_elsewhere(custom)
    if ours and "callbacks" not in custom and mode == "train" and not custom.get("resume"):
        raise ArgumentError(f"'{ours[0]}' has no effect by itself. Add callbacks=prune to prune while training.")


def _refuse_elsewhere(arguments: Mapping[str, Any]) -> None:
    """Refuse keys of this package among arguments that no `train` of this package reads.

    `YOLO.train` removes these keys. They are left in other modes, in `tune`, and in trainers that a user makes.
    """
    key = next(filter(is_pruning_key, arguments), None)
    if key is None or "mode" not in arguments:
        return
    mode = arguments["mode"]
    if mode != "train":
        raise ArgumentError(
            f"'{key}' is an argument of 'yolo train' and YOLO.train only. Leave it out: '{mode}' works on pruned "
            "models as on any other model."
        )
    raise ArgumentError(
        f"'{key}' is an argument of 'yolo train' and YOLO.train only: tune() and trainers of your own do not prune. "
        "Leave it out here. To prune with the tuned settings, pass them to train: "
        "cfg=best_hyperparameters.yaml callbacks=prune"
    )


def _train(original: Callable[..., Any]) -> Callable[..., Any]:
    def train(self: Any, trainer: Any = None, **kwargs: Any) -> Any:
        from ultralytics.utils import DEFAULT_CFG_DICT

        check_spelling(kwargs, {*DEFAULT_CFG_DICT, *CUSTOM_KEYS})
        if not _may_involve_pruning(self, kwargs):
            return original(self, trainer=trainer, **kwargs)
        from yolo_prune.run import launch  # imported late, so that runs without pruning do not depend on its imports

        with _as_a_run():
            return launch.train(self, original, trainer, kwargs)

    return train


def _val(original: Callable[..., Any]) -> Callable[..., Any]:
    def val(self: Any, validator: Any = None, **kwargs: Any) -> Any:
        if not _has_record(self.model):
            return original(self, validator=validator, **kwargs)
        from yolo_prune.data import datasets, relabel  # imported late, like `launch` above

        with _as_a_command():
            if kept := datasets.kept_classes(self.model):
                validator = relabel.relabelling(validator or self._smart_load("validator"), kept)
            return original(self, validator=validator, **kwargs)

    return val


@contextmanager
def _as_a_command() -> Iterator[None]:
    """In a `yolo` command, show only the message of an error of this package, without a traceback."""
    try:
        yield
    except PruneError as e:
        if _is_command():
            sys.exit(f"yolo-prune: {e}")
        raise


@contextmanager
def _as_a_run() -> Iterator[None]:
    """In a `yolo` command, output that fails does not end a run of this package, either."""
    with _as_a_command(), forgiving() if _is_command() else nullcontext():
        yield


def _is_command() -> bool:
    command = Path(sys.argv[0])
    return command.stem in ("yolo", "ultralytics") and command.suffix.lower() in ("", ".exe")


def _may_involve_pruning(model: Any, arguments: Mapping[str, Any]) -> bool:
    """True for runs with our keys or a file of arguments, of pruned models, or that load another checkpoint."""
    resumed = arguments.get("resume", model.overrides.get("resume"))
    from_file = isinstance(arguments.get("pretrained", model.overrides.get("pretrained")), str | Path)
    has_file = bool(arguments.get("cfg"))  # its arguments may be keys of this package
    return (
        _has_record(model.model)
        or bool(resumed)
        or from_file
        or has_file
        or any(is_pruning_key(key) for key in arguments)
    )


def _has_record(module: Any) -> bool:
    yaml = getattr(module, "yaml", None)
    return isinstance(yaml, Mapping) and RECORD in yaml


def _load(original: Callable[..., Any]) -> Callable[..., Any]:
    def load(self: Any, weights: Any, verbose: bool = True) -> None:
        source = (weights.get("ema") or weights.get("model")) if isinstance(weights, Mapping) else weights
        if source is not None and (_has_record(self) or _has_record(source)):
            from yolo_prune.cut import masks
            from yolo_prune.run import checks  # imported late, like `launch` above

            with _as_a_command():
                held = checks.check_load(self, source)
            original(self, weights, verbose)
            masks.hold(self, held)
        else:
            original(self, weights, verbose)

    return load


def _extend_export() -> None:
    from ultralytics.utils.callbacks.base import default_callbacks

    from yolo_prune.cut.export_record import on_export_start

    if on_export_start not in default_callbacks["on_export_start"]:
        default_callbacks["on_export_start"].append(on_export_start)
