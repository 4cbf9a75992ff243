# SPDX-License-Identifier: AGPL-3.0-or-later
"""The arguments of `train` that this package adds to those of Ultralytics: `callbacks`, `recipe`, `recipe.<field>`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from yolo_prune.errors import ArgumentError

NAMES = ("callbacks", "recipe")
CALLBACKS = ("prune",)


def is_pruning_key(key: str) -> bool:
    """True for `callbacks`, `recipe` and `recipe.<field>`."""
    return key in NAMES or key.startswith("recipe.")


def without_pruning_keys(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that belong to Ultralytics."""
    return {k: v for k, v in arguments.items() if not is_pruning_key(k)}


def overrides(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`{"target.flops": 0.4}` from `{"recipe.target.flops": 0.4}`."""
    return {k.removeprefix("recipe."): v for k, v in arguments.items() if k.startswith("recipe.")}


def wants_pruning(value: Any) -> bool:
    """Tell whether `callbacks=` asks for pruning. Its value is a name, several names separated by commas, or a list.

    Raises:
        ArgumentError: If a name is not known. The message suggests the nearest known name.
    """
    names = value if isinstance(value, list | tuple) else str(value).strip("[]()").split(",")
    names = [str(n).strip(" '\"") for n in names if str(n).strip(" '\"") not in ("", "None")]
    for name in names:
        if name not in CALLBACKS:
            near = get_close_matches(name, CALLBACKS, cutoff=0.4)
            raise ArgumentError(
                f"callbacks='{name}' is not a known callback. "
                + (f"Did you mean callbacks={near[0]}?" if near else f"Known: {', '.join(CALLBACKS)}.")
            )
    return bool(names)


def check_spelling(arguments: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse a misspelt argument of this package, as Ultralytics refuses its own misspelt arguments.

    An argument is misspelt if it is not known, but is similar to an argument of this package.

    Raises:
        ArgumentError: If an argument is misspelt. The message suggests the argument that was probably meant.
    """
    for key in arguments:
        if key in known or is_pruning_key(key):
            continue
        stem, dot, field = key.partition(".")
        near = get_close_matches(stem, NAMES, cutoff=0.75)
        if near and not get_close_matches(key, known, cutoff=0.9):
            raise ArgumentError(f"'{key}' is not a valid YOLO argument. Did you mean '{near[0]}{dot}{field}'?")
