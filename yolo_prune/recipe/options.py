# SPDX-License-Identifier: AGPL-3.0-or-later
"""Creates and checks named objects with options, as in `{name: obs, images: 128}` in a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import Any, TypeVar

from yolo_prune.errors import RecipeError

T = TypeVar("T")


def make(kind: str, name: str, factories: Mapping[str, Callable[..., T]], options: Mapping[str, Any]) -> T:
    """Create the object that a recipe names: call its factory with the options.

    Args:
        kind: the field of the recipe, for messages.
        name: name of the object.
        factories: `{name: factory}`; the parameters of a factory are the possible options. A factory with `**` checks
            its options itself.
        options: `{option: value}`.

    Raises:
        RecipeError: If the name or an option is unknown, or an option is out of range.
    """
    if name not in factories:
        near = get_close_matches(name, factories, 1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise RecipeError(f"{kind}.name: there is no {kind} '{name}'; choose one of {', '.join(factories)}.{hint}")
    factory = factories[name]
    known = signature(factory).parameters
    takes_all = any(p.kind is Parameter.VAR_KEYWORD for p in known.values())
    for option in options:
        if option not in known and not takes_all:
            remedy = f"The options are: {', '.join(known)}" if known else "Leave it out"
            raise RecipeError(f"{kind}.{option}: '{name}' has no such option. {remedy}.")
    return factory(**options)


def whole_number(option: str, value: Any, least: int = 1, most: int = 100_000, kind: str = "criterion") -> int:
    """Check an option that must be a whole number from `least` to `most`.

    Raises:
        RecipeError: If the value is not a whole number or is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise RecipeError(f"{kind}.{option}: must be a whole number from {least} to {most}, got {value!r}.")
    return value


def fraction(option: str, value: Any, kind: str = "criterion") -> float:
    """Check an option that must be a number above 0 and at most 1.

    Raises:
        RecipeError: If the value is not such a number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise RecipeError(f"{kind}.{option}: must be a number above 0 and at most 1, got {value!r}.")
    return float(value)
