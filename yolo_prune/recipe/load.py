# SPDX-License-Identifier: AGPL-3.0-or-later
"""Reads recipes from bundled names, files, mappings and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from yolo_prune.errors import RecipeError
from yolo_prune.recipe import code
from yolo_prune.recipe.messages import explain, short
from yolo_prune.recipe.schema import METRICS, NAMED, WHERE, Recipe
from yolo_prune.recipe.strict_yaml import read_yaml

DEFAULT = "half-flops"
MAX_BYTES = 64 * 1024


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe | None = None, overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe that the user names or gives.

    Code that the recipe names may be imported afterwards. So a recipe inside a checkpoint must not be read here.

    Args:
        source: a bundled name, a path to a YAML file, a mapping or a `Recipe`; None is the default recipe, or no recipe
            if `overrides` ask for `sparsity` or `structure`, and for no `target`.
        overrides: values of single fields: `{"target.flops": 0.4}`. A string is read as YAML. A target in another
            metric replaces the target of the recipe.

    Raises:
        RecipeError: If the recipe is not valid. The message lists all problems: where, what was given, what is allowed.

    Example:
        >>> import yolo_prune
        >>> recipe = yolo_prune.load_recipe("half-flops", {"target.flops": 0.4, "recover.refit": 128})
        >>> recipe.target.flops, recipe.recover.refit, recipe.criterion.name
        (0.4, 128, 'obs')
    """
    overrides = overrides or {}
    data, origin = ({}, "no recipe") if source is None and _no_channels(overrides) else _read(source)
    if named := {str(key).removeprefix("target.") for key in overrides if str(key).startswith("target.")}:
        data["target"] = _compatible(data.get("target"), named)
    for key, value in overrides.items():
        _override(data, key, value)
    if overrides:
        origin += ", with overrides"
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as e:
        raise RecipeError(f"The recipe ({origin}) is not valid:\n" + "\n".join(explain(e))) from None
    code.allow(recipe)
    return recipe


def _no_channels(overrides: Mapping[str, Any]) -> bool:
    """Whether single fields ask for zeros or fewer classes, and for no target.

    There is no default recipe then, and no channel is cut.
    """
    fields = {str(key).partition(".")[0] for key in overrides}
    return bool(fields & {"sparsity", "structure"}) and "target" not in fields


def bundled_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(p.stem for p in _bundle().glob("*.yaml"))


def _read(source: str | Path | Mapping[str, Any] | Recipe | None) -> tuple[dict[str, Any], str]:
    if isinstance(source, Recipe):
        return source.to_dict(), "Recipe"
    if isinstance(source, Mapping):
        return _deep(source), "mapping"
    name = DEFAULT if source is None else str(source)
    if "://" in name:
        raise RecipeError(f"The recipe '{name}' is a web address. Download the file, and pass its path.")
    path = Path(name).expanduser()
    if path.suffix.lower() in (".yaml", ".yml"):
        return _parse(path), name
    if name in bundled_names():
        return _parse(_bundle() / f"{name}.yaml"), name
    near = get_close_matches(name, bundled_names(), n=1, cutoff=0.4)
    raise RecipeError(
        f"There is no recipe '{name}'. "
        + (f"Did you mean '{near[0]}'? " if near else "")
        + f"Pass one of the bundled recipes ({', '.join(bundled_names())}) or the path of a .yaml file."
    )


def _bundle() -> Path:
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def _parse(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as e:  # ValueError: a null byte in the path
        hint = f" The bundled recipe is called '{path.stem}'." if path.stem in bundled_names() else ""
        raise RecipeError(f"The recipe '{path}' cannot be read: {getattr(e, 'strerror', e)}.{hint}") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(
            f"The recipe '{path}' is larger than {MAX_BYTES // 1024} KiB. Check the path: this is not a recipe."
        )
    try:
        data = read_yaml(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise RecipeError(f"The recipe '{path}' is not UTF-8 text. Save it as UTF-8.") from None
    except ValueError as e:
        raise RecipeError(f"The recipe '{path}' is not valid YAML: {e}.") from None
    if not isinstance(data, dict):
        kind = "an empty file" if data is None else f"a {type(data).__name__}"
        raise RecipeError(f"The recipe '{path}' must be a mapping such as 'target: {{flops: 0.5}}', found {kind}.")
    return data


def _compatible(target: Any, named: set[str]) -> dict[str, Any]:
    """The fields of a target that stay when the fields `named` are overridden: fields can exclude one another."""
    out: set[str] = set()
    if metrics := named & set(METRICS):
        out |= {*METRICS, *(() if "latency" in metrics else (*WHERE, "profile"))}
    if "profile" in named:
        out |= set(WHERE)
    elif named & set(WHERE):
        out.add("profile")
    return {key: value for key, value in target.items() if key not in out} if isinstance(target, Mapping) else {}


def _override(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = str(dotted).split(".")
    if not all((*parents, last)):
        raise RecipeError(f"'recipe.{dotted}' is not the name of a field. Write a field as in recipe.target.flops=0.4.")
    if parents[:2] == ["channels", "layers"]:
        raise RecipeError(
            f"'recipe.{dotted}': a single layer cannot be overridden, because names of layers contain dots. Write all "
            "of channels.layers as one mapping, as in recipe.channels.layers='{model.0: {max_removed: 0.25}}'."
        )
    if isinstance(value, str) and not (dotted == "protect" and value.startswith("*")):  # a glob, not a YAML alias
        try:
            value = read_yaml(value)
        except ValueError as e:
            raise RecipeError(f"recipe.{dotted}={short(value)}: the value is not valid YAML: {e}.") from None
    place = data
    for parent in parents:
        inner = place.get(parent)
        if isinstance(inner, str) and parent in NAMED:
            inner = {"name": inner}
        place[parent] = inner = dict(inner) if isinstance(inner, Mapping) else {}
        place = inner
    place[last] = value


def _deep(data: Mapping[str, Any]) -> dict[str, Any]:
    return {str(k): _deep(v) if isinstance(v, Mapping) else v for k, v in data.items()}
