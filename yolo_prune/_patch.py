# SPDX-License-Identifier: AGPL-3.0-or-later
"""The two Ultralytics functions that are replaced, and the one public list that is extended.

`ultralytics.cfg.check_dict_alignment` lets `callbacks=` and `recipe=` through for `yolo train`; `Model.train` takes
them out again before anything else sees them. `default_callbacks["on_export_start"]` gets one more entry.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from yolo_prune._keys import check_spelling, is_pruning_key, without_pruning_keys
from yolo_prune.errors import ArgumentError, PruneError

MARK = "__yolo_prune__"
RECORD = "pruning"  # as `cut.record.KEY`, which lives beside what needs torch
CUSTOM_KEYS = ("augmentations", "save_dir")  # what Ultralytics accepts beside its defaults
EXAMPLES = {"callbacks": "prune", "recipe": "half-flops"}


def apply(module: ModuleType) -> None:
    """Patch one of the two modules; does nothing the second time.

    Raises:
        RuntimeError: If this Ultralytics does not have what is patched, or has it with another signature.
    """
    if module.__name__ == "ultralytics.cfg":
        _replace(module, "check_dict_alignment", ["base", "custom", "e", "allowed_custom_keys"], _alignment, since=3)
    elif module.__name__ == "ultralytics.engine.model":
        _replace(module.Model, "train", ["self", "trainer", "kwargs"], _train)
        _extend_export()


def _replace(
    owner: Any,
    name: str,
    expected: list[str],
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]],
    since: int | None = None,
) -> None:
    """Put `wrap(original)` in its place. Earlier releases may lack the `expected` parameters from number `since` on."""
    original = getattr(owner, name, None)
    if original is None:
        raise RuntimeError(f"{owner.__name__} has no '{name}'")
    if hasattr(original, MARK):
        return
    found = list(inspect.signature(original).parameters)
    if found != expected and (since is None or found != expected[:since]):
        raise RuntimeError(f"{owner.__name__}.{name} takes {found}, expected {expected}")
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
        further = [allowed_custom_keys] if allowed_custom_keys else []  # releases before 8.4.0 have no such parameter
        if "train" not in base:  # not the command line: run configurations never hold our keys
            original(base, custom, e, *further)
            return
        with _one_line_for_commands():
            _check_command(custom, unreadable=e is not None)
        # The examples make the suggestions for misspelt keys know ours too.
        original({**base, **EXAMPLES}, without_pruning_keys(custom), e, *further)

    return check_dict_alignment


def _check_command(custom: Mapping[str, Any], unreadable: bool) -> None:
    """Refuse our keys where a command line gives them no value, or no run to be about."""
    ours = [key for key in custom if is_pruning_key(key.rstrip("="))]
    mode = custom.get("mode")
    if ours and (unreadable or custom[ours[0]] == ""):  # how the command line reports what it cannot read
        raise ArgumentError(f"'{ours[0].rstrip('=')}' needs a value, for example callbacks=prune recipe=half-flops.")
    if ours and "mode" in custom and mode != "train":
        raise ArgumentError(
            f"'{ours[0]}' is an argument of 'yolo train' only; 'yolo {mode}' works on pruned models as on any other, "
            "leave it out."
        )
    if ours and "callbacks" not in custom and mode == "train":
        raise ArgumentError(f"'{ours[0]}' has no effect by itself. Add callbacks=prune to prune while training.")


def _train(original: Callable[..., Any]) -> Callable[..., Any]:
    def train(self: Any, trainer: Any = None, **kwargs: Any) -> Any:
        from ultralytics.utils import DEFAULT_CFG_DICT

        check_spelling(kwargs, {*DEFAULT_CFG_DICT, *CUSTOM_KEYS})
        if not _concerns_us(self, kwargs):
            return original(self, trainer=trainer, **kwargs)
        from yolo_prune.run import launch  # only now: no other run should depend on what it imports

        with _one_line_for_commands():
            return launch.train(self, original, trainer, kwargs)

    return train


@contextmanager
def _one_line_for_commands() -> Iterator[None]:
    """End a `yolo` command with the message of our error: who typed it does not need to know where it comes from."""
    try:
        yield
    except PruneError as e:
        command = Path(sys.argv[0])
        if command.stem in ("yolo", "ultralytics") and command.suffix.lower() in ("", ".exe"):
            sys.exit(f"yolo-prune: {e}")
        raise


def _concerns_us(model: Any, arguments: Mapping[str, Any]) -> bool:
    """True for runs with our keys, of pruned models, and from other checkpoints, which may be pruned."""
    yaml = getattr(model.model, "yaml", None)
    pruned = isinstance(yaml, Mapping) and RECORD in yaml
    resumed = arguments.get("resume", model.overrides.get("resume"))
    from_file = isinstance(arguments.get("pretrained", model.overrides.get("pretrained")), str | Path)
    return pruned or bool(resumed) or from_file or any(is_pruning_key(key) for key in arguments)


def _extend_export() -> None:
    from ultralytics.utils.callbacks.base import default_callbacks

    from yolo_prune.cut.export_record import on_export_start

    if on_export_start not in default_callbacks["on_export_start"]:
        default_callbacks["on_export_start"].append(on_export_start)
