# SPDX-License-Identifier: AGPL-3.0-or-later
"""Options that a recipe gives beside a name, as in `{name: obs, images: 128}`: made into the thing, and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, TypeVar

from yolo_prune.errors import RecipeError

T = TypeVar("T")


def make(kind: str, name: str, factories: Mapping[str, Callable[..., T]], options: Mapping[str, Any]) -> T:
    """Make what a recipe asks for: call the factory of that name with the options beside it.

    Args:
        kind: the recipe's field, for messages.
        name: what is made.
        factories: `{name: what makes it}`; the parameters of each are the options that there are.
        options: `{option: value}`.

    Raises:
        RecipeError: If there is no such name, or an option is unknown or out of range.
    """
    if name not in factories:
        raise RecipeError(f"{kind}.name: there is no {kind} '{name}'; choose one of {', '.join(factories)}.")
    factory = factories[name]
    known = list(signature(factory).parameters)
    for option in options:
        if option not in known:
            knows = f"it knows {', '.join(known)}" if known else "it has none"
            raise RecipeError(f"{kind}.{option}: '{name}' has no such option; {knows}.")
    return factory(**options)


def whole_number(option: str, value: Any, least: int = 1, most: int = 100_000, kind: str = "criterion") -> int:
    """An option that is a whole number.

    Raises:
        RecipeError: If it is not, or is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise RecipeError(f"{kind}.{option}: must be a whole number from {least} to {most}, got {value!r}.")
    return value


def fraction(option: str, value: Any, kind: str = "criterion") -> float:
    """An option that is a number above 0 and at most 1.

    Raises:
        RecipeError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise RecipeError(f"{kind}.{option}: must be a number above 0 and at most 1, got {value!r}.")
    return float(value)
