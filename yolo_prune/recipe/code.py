# SPDX-License-Identifier: AGPL-3.0-or-later
"""Code that a recipe names, as in `importance: my.module:MyImportance`. It is imported only if the user named it.

The user names code on the command line, in Python, or in a recipe that is opened by its path: `load_recipe` reads all
of them. A recipe inside a checkpoint can come from anyone, and is not read by `load_recipe`, so it never imports code.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from yolo_prune.errors import RecipeError
from yolo_prune.recipe.schema import Recipe

FIELD = "criterion.importance"
"""The only field of a recipe that can name code."""
_named_by_user: set[str] = set()


def is_code(value: Any) -> bool:
    """Whether a value of the field is the name of code, and not of a class of torch-pruning."""
    return isinstance(value, str) and ":" in value


def named_in(recipe: Recipe) -> str | None:
    """The code that a recipe names, `module:name`; None if it names none."""
    value = recipe.criterion.options.get("importance")
    return str(value) if is_code(value) else None


def allow(recipe: Recipe) -> None:
    """Allow the code that a recipe names, because the user named it."""
    if name := named_in(recipe):
        _named_by_user.add(name)


def load(name: str) -> Any:
    """Import what `module:name` names.

    Raises:
        RecipeError: If the user did not name it, or it cannot be imported.
    """
    if name not in _named_by_user:
        raise RecipeError(
            f"{FIELD}: '{name}' is code, and is named only in a checkpoint, which must not import code by itself. If "
            f"you trust the code, pass recipe.{FIELD}={name}."
        )
    module, _, attribute = name.partition(":")
    try:
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as e:  # a module of the user can raise any error
        raise RecipeError(
            f"{FIELD}: '{name}' cannot be imported: {type(e).__name__}: {e}. Write it as module:Class, and put the "
            "folder of the module on PYTHONPATH."
        ) from e
    return found
