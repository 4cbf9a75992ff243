# SPDX-License-Identifier: AGPL-3.0-or-later
"""Error messages for recipes: where the error is, what was given, and what is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from reprlib import Repr
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from yolo_prune.recipe.schema import Recipe, fields_schema

MISSING = {"target": "'target: {flops: 0.5}'", "recover.rewind.epoch": "'rewind: {epoch: 3}'"}
ANY = "*"  # stands for any layer name in the path of a field


class _Short(Repr):
    """Quotes a value in a message, and shortens long values."""

    def repr_int(self, x: int, level: int) -> str:
        """The digits, unless the number is so long that Python refuses to print it."""
        return "a huge number" if x.bit_length() > 256 else repr(x)


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 60


def short(value: Any) -> str:
    """A value as it is quoted in a message, shortened if it is long."""
    return _SHORT.repr(value)


def explain(error: ValidationError) -> list[str]:
    """One line per error."""
    return [f"  {line}" for line in dict.fromkeys(_line(e) for e in error.errors())]


def _line(e: ErrorDetails) -> str:
    where = [str(part) for part in e["loc"]]
    path, got, kind = ".".join(where), short(e["input"]), e["type"]
    if kind in ("extra_forbidden", "invalid_key"):
        return f"{path}: unknown key; {_remedy(where, got)}"
    if kind == "missing":
        return f"{path}: is missing; add it, for example {MISSING.get(path, path)}"
    if kind == "value_error":
        said = e["msg"].removeprefix("Value error, ")
        return f"{path}: {said}, got {got}" if path else said
    field = _describe(fields_schema(), where)
    names = [str(name) for option in _options(field) for name in option.get("enum", ())]
    near = get_close_matches(e["input"], names, n=1) if isinstance(e["input"], str) else []
    hint = f"; did you mean '{near[0]}'?" if near else ""
    meaning = field.get("description", "a recipe")
    return f"{path}: must be {_allowed(field)}, got {got}{hint}" + (f" ({meaning})" if meaning else "")


def _remedy(where: list[str], got: str) -> str:
    """What to write instead of an unknown key."""
    key, keys = where[-1], _keys()
    if any(k.startswith(f"{'.'.join(where[:2])}.{ANY}.") for k in keys):  # a mapping by names of layers
        where = [*where[:2], ANY, *where[3:]]
    here = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == ".".join(where[:-1])]
    if "." in key and key in keys:
        parent, _, field = key.partition(".")
        return f"write it as '{parent}: {{{field}: {got}}}'"
    moved = [k for k in keys if k.rpartition(".")[2] == key]
    near = moved or get_close_matches(key, here, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known keys are {', '.join(here)}"


def _keys() -> list[str]:
    """Dotted paths of all fields, including sections."""

    def inside(model: Any, path: str) -> Iterator[str]:
        for name, field in model.model_fields.items():
            yield f"{path}{name}"
            for option in (field.annotation, *get_args(field.annotation)):
                if hasattr(option, "model_fields"):
                    by_name = get_origin(field.annotation) is dict
                    yield from inside(option, f"{path}{name}.{ANY}." if by_name else f"{path}{name}.")

    return list(inside(Recipe, ""))


def _describe(schema: dict[str, Any], where: list[str]) -> dict[str, Any]:
    """The part of the JSON schema that describes a field; for an item of a list, the part that describes the list."""
    node = schema
    for name in where:
        known = {key: field for option in _options(node) for key, field in option.get("properties", {}).items()}
        each = [o["additionalProperties"] for o in _options(node) if isinstance(o.get("additionalProperties"), dict)]
        field = known.get(name, each[0] if each else node)
        options = [{**o, **schema["$defs"].get(o.get("$ref", "").rpartition("/")[2], {})} for o in _options(field)]
        node = {**field, "anyOf": options, "description": field.get("description", "")}
    return node


def _options(node: dict[str, Any]) -> list[dict[str, Any]]:
    return [o for o in node.get("anyOf", [node]) if o.get("type") != "null"]


def _allowed(node: dict[str, Any]) -> str:
    """A description of the values that a part of the JSON schema allows."""
    options = _options(node)
    if len(options) > 1:
        return " or ".join(map(_allowed, options))
    node = options[0]
    if "const" in node:
        return str(node["const"])
    if "enum" in node:
        return "one of " + ", ".join(map(str, node["enum"]))
    words = {"boolean": "true or false", "string": "a text", "integer": "a whole number", "number": "a number"}
    bounds = {"minimum": "at least", "maximum": "at most", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}
    bounds["multipleOf"] = "a multiple of"
    limits = " and ".join(f"{word} {node[key]:g}" for key, word in bounds.items() if key in node)
    if node["type"] == "object":
        return f"a mapping with {', '.join(node['properties'])}" if "properties" in node else "a mapping"
    if node["type"] == "array":
        numbers = any(o.get("type") == "integer" for o in _options(node["items"]))
        return "a list of names or numbers" if numbers else "a list of texts"
    return f"{words[node['type']]} {limits}".strip()
