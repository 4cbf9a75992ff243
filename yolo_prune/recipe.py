# SPDX-License-Identifier: AGPL-3.0-or-later
"""`Recipe`: what the user asks for, as validated data. Unknown keys and impossible values are refused, all at once."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from yolo_prune.errors import RecipeError
from yolo_prune.safeyaml import read_yaml

DEFAULT = "half-flops"
MAX_BYTES = 64 * 1024
NAMED = ("criterion", "allocation")  # fields that are a name, or a mapping with options
ANY = "*"  # stands for any name of a layer in the path of a field

Fraction = Annotated[float, Field(gt=0, lt=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Target(_Part):
    """How much of the dense model is kept. Exactly one metric."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})
    flops: Fraction | None = Field(None, description="fraction of the dense model's FLOPs to keep")
    params: Fraction | None = Field(None, description="fraction of the dense model's parameters to keep")

    @model_validator(mode="after")
    def _one(self) -> Target:
        if (self.flops is None) == (self.params is None):
            raise ValueError("give exactly one of flops and params, for example {flops: 0.5}")
        return self

    @property
    def metric(self) -> Literal["flops", "params"]:
        """The metric that was given."""
        return "params" if self.flops is None else "flops"

    @property
    def keep(self) -> float:
        """Fraction of the dense model to keep, in `metric`."""
        return float(self.params if self.flops is None else self.flops)  # type: ignore[arg-type]  # one is set


class Schedule(_Part):
    """When the model is cut, and how much each cut takes."""

    rounds: int | None = Field(None, ge=1, le=100, description="number of cuts; 3, or 1 with curve one-shot")
    start: int | None = Field(None, ge=0, description="epoch before which the first cut is made, counted from 0")
    interval: int | None = Field(
        None, ge=1, description="epochs between cuts; by default over the first half of the run"
    )
    curve: Literal["one-shot", "linear", "cubic"] = Field(
        "cubic", description="how the removal is spread over the rounds; cubic takes most of it early"
    )

    @model_validator(mode="after")
    def _one_shot(self) -> Schedule:
        if self.curve == "one-shot" and (self.rounds or 1) > 1:
            raise ValueError("curve one-shot is a single cut; set rounds to 1, or curve to cubic or linear")
        return self


class _Named(_Part):
    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    @property
    def options(self) -> dict[str, Any]:
        """What was given beside the name."""
        return dict(self.model_extra or {})


class CriterionSpec(_Named):
    """Which criterion scores the channels, with its options beside the name."""

    name: str = Field(
        "magnitude",
        description="obs, taylor, fisher, magnitude, lamp, bn_scale, fpgm, random, or a registered one",
    )


class AllocationSpec(_Named):
    """How the removal is shared out over the layers, with options beside the name."""

    name: Literal["global", "uniform", "isomorphic", "sensitivity"] = Field(
        "global", description="how much each layer loses"
    )


class LayerLimits(_Part):
    """What holds for the layers that a pattern names, in place of the values for all."""

    round_to: int | None = Field(None, ge=1, le=1024, description="widths of these layers are multiples of this")
    min: int | None = Field(None, ge=1, description="none of these layers gets narrower than this")
    max_removed: Fraction | None = Field(
        None, description="most that is removed of any of these layers, as a fraction of its dense width"
    )


class Channels(_Part):
    """Constraints on the widths of layers."""

    round_to: int = Field(8, ge=1, le=1024, description="widths are multiples of this")
    min: int = Field(8, ge=1, description="no layer gets narrower than this")
    max_removed: Fraction = Field(
        0.75, description="most that is removed of any layer, as a fraction of its dense width"
    )
    attention: Literal["dims", "heads"] = Field(
        "dims", description="dims thins every head of an attention alike, heads removes whole heads"
    )
    layers: dict[str, LayerLimits] = Field(
        {}, description="other limits for some layers: names or globs of modules, each with round_to, min, max_removed"
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value


class Recover(_Part):
    """What is done right after each cut, before training goes on."""

    refit: int = Field(
        0,
        ge=0,
        le=100_000,
        description="training images to refit the remaining weights on, layer after layer; 0 leaves them as they are",
    )
    batchnorm: int = Field(
        32,
        ge=0,
        description="without refit: training batches to re-estimate batch norm statistics with; 0 leaves them",
    )
    average: float = Field(
        0.25,
        ge=0,
        le=1,
        description="after a refit: share of the run that the delivered average reaches over; 0: Ultralytics' own",
    )
    distill: bool = Field(
        False, description="train with the checkpoint that the run starts from as teacher, as with distill_model="
    )


class Recipe(_Part):
    """A pruning recipe."""

    version: Literal[1] = Field(1, description="version of the recipe format")
    target: Target = Field(description="how much of the dense model is kept")
    schedule: Schedule = Field(Schedule(), description="when, and how much each time")
    criterion: CriterionSpec = Field(CriterionSpec(), description="a name, or a mapping with options")
    allocation: AllocationSpec = Field(
        AllocationSpec(), description="how the removal is shared out over the layers: a name, or a mapping with options"
    )
    channels: Channels = Field(Channels(), description="constraints on widths")
    protect: tuple[str, ...] = Field((), strict=False, description="modules that are never touched: names or globs")
    recover: Recover = Field(Recover(), description="what follows each cut")
    proof: bool = Field(True, description="prove each cut on a copy before it is made")
    measure: bool = Field(True, description="validate before and after each cut, for the report")

    @field_validator(*NAMED, mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("protect", mode="before")
    @classmethod
    def _one_pattern(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with every default spelled out; `load_recipe` reads it."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_yaml(self) -> str:
        """`to_dict` as YAML, in the order of the fields."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None)


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe | None = None, overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe.

    Args:
        source: a bundled name, a path to a YAML file, a mapping, or a `Recipe`; the default recipe where None.
        overrides: `{"target.flops": 0.4}`; a text value is read as YAML. A target replaces the other metric's.

    Raises:
        RecipeError: One message with every problem: where, what was given, what is allowed.
    """
    data, origin = _read(source)
    overrides = overrides or {}
    if any(str(key).startswith("target.") for key in overrides):
        data["target"] = {}  # the metrics exclude one another
    for key, value in overrides.items():
        _override(data, key, value)
    if overrides:
        origin += ", with overrides"
    try:
        return Recipe.model_validate(data)
    except ValidationError as e:
        raise RecipeError(f"The recipe ({origin}) cannot be used:\n" + "\n".join(_explain(e))) from None


def bundled_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(p.stem for p in _bundle().glob("*.yaml"))


def json_schema() -> dict[str, Any]:
    """JSON schema of recipes, for completion in editors."""
    schema = Recipe.model_json_schema()
    for field in schema["properties"].values():
        field.update(*field.pop("allOf", ()))  # pydantic before 2.9 wraps references
    for key in NAMED:
        field, spec = schema["properties"][key], f"{key.title()}Spec"
        name = {k: v for k, v in schema["$defs"][spec]["properties"]["name"].items() if k in ("type", "enum")}
        field["title"] = key.title()
        field["anyOf"] = [{**name, "description": f"name of the {key}"}, {"$ref": field.pop("$ref", f"#/$defs/{spec}")}]
    schema["properties"]["protect"]["anyOf"] = [
        {"type": "string"},
        {"type": "array", "items": schema["properties"]["protect"].pop("items")},
    ]
    del schema["properties"]["protect"]["type"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "yolo-prune recipe"}


def _read(source: str | Path | Mapping[str, Any] | Recipe | None) -> tuple[dict[str, Any], str]:
    if isinstance(source, Recipe):
        return source.to_dict(), "Recipe"
    if isinstance(source, Mapping):
        return _deep(source), "mapping"
    name = DEFAULT if source is None else str(source)
    path = Path(name)
    if path.suffix.lower() in (".yaml", ".yml"):
        return _parse(path), name
    if name in bundled_names():
        return _parse(_bundle() / f"{name}.yaml"), name
    near = get_close_matches(name, bundled_names(), n=1, cutoff=0.4)
    raise RecipeError(
        f"There is no recipe '{name}'. "
        + (f"Did you mean '{near[0]}'? " if near else "")
        + f"Bundled are {', '.join(bundled_names())}; or pass the path of a .yaml file."
    )


def _bundle() -> Path:
    package = Path(__file__).parent
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
        raise RecipeError(f"The recipe '{path}' is larger than {MAX_BYTES // 1024} KiB; that is not a recipe.")
    try:
        data = read_yaml(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise RecipeError(f"The recipe '{path}' is not UTF-8 text. Save it as UTF-8.") from None
    except ValueError as e:
        raise RecipeError(f"The recipe '{path}' is not valid YAML: {e}.") from None
    if not isinstance(data, dict):
        found = "an empty file" if data is None else f"a {type(data).__name__}"
        raise RecipeError(f"The recipe '{path}' must be a mapping such as 'target: {{flops: 0.5}}', found {found}.")
    return data


def _override(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = str(dotted).split(".")
    if not all((*parents, last)):
        raise RecipeError(f"'recipe.{dotted}' does not name a field; write it as in recipe.target.flops=0.4.")
    if parents[:2] == ["channels", "layers"]:
        raise RecipeError(
            f"'recipe.{dotted}': names of layers have dots of their own; write all of channels.layers as one mapping, "
            "as in recipe.channels.layers='{model.0: {max_removed: 0.25}}'."
        )
    if isinstance(value, str) and not (dotted == "protect" and value.startswith("*")):  # a glob, not a YAML alias
        try:
            value = read_yaml(value)
        except ValueError as e:
            raise RecipeError(f"recipe.{dotted}={_SHORT.repr(value)}: the value is not valid YAML: {e}.") from None
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


class _Short(Repr):
    """A value as a message quotes it: never pages of it."""

    def repr_int(self, x: int, level: int) -> str:
        """Digits, unless there are more than Python is willing to print."""
        return "a huge number" if x.bit_length() > 256 else repr(x)


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 60


def _explain(error: ValidationError) -> list[str]:
    return [f"  {line}" for line in dict.fromkeys(_line(e) for e in error.errors())]


def _line(e: ErrorDetails) -> str:
    where = [str(part) for part in e["loc"]]
    path, got, kind = ".".join(where), _SHORT.repr(e["input"]), e["type"]
    if kind in ("extra_forbidden", "invalid_key"):
        return f"{path}: unknown key; {_remedy(where, got)}"
    if kind == "missing":
        return f"{path}: is missing; give it, for example 'target: {{flops: 0.5}}'"
    if kind == "value_error":
        return f"{path}: {e['msg'].removeprefix('Value error, ')}, got {got}"
    field = _describe(json_schema(), where)
    names = [str(name) for option in _options(field) for name in option.get("enum", ())]
    near = get_close_matches(e["input"], names, n=1) if isinstance(e["input"], str) else []
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"{path}: must be {_allowed(field)}, got {got}{hint} ({field.get('description', 'a recipe')})"


def _remedy(where: list[str], got: str) -> str:
    """What to write in place of an unknown key."""
    key, keys = where[-1], _keys()
    if where[:2] == ["channels", "layers"]:
        where = ["channels", "layers", ANY, *where[3:]]
    here = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == ".".join(where[:-1])]
    if "." in key and key in keys:
        parent, _, field = key.partition(".")
        return f"write it as '{parent}: {{{field}: {got}}}'"
    moved = [k for k in keys if k.rpartition(".")[2] == key]
    near = moved or get_close_matches(key, here, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known are {', '.join(here)}"


def _keys() -> list[str]:
    """Dotted paths of all fields, sections included."""
    fields = Recipe.model_fields
    return [
        *fields,
        *(f"{name}.{key}" for name in fields for key in getattr(fields[name].annotation, "model_fields", ())),
        *(f"channels.layers.{ANY}.{key}" for key in LayerLimits.model_fields),
    ]


def _describe(schema: dict[str, Any], where: list[str]) -> dict[str, Any]:
    """The part of the JSON schema that is about a field; of a list's items, about the list."""
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
    """In words, the values that a part of the JSON schema admits."""
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
    limits = " and ".join(f"{word} {node[key]:g}" for key, word in bounds.items() if key in node)
    if node["type"] == "object":
        return f"a mapping with {', '.join(node['properties'])}" if "properties" in node else "a mapping"
    if node["type"] == "array":
        return "a list of texts"
    return f"{words[node['type']]} {limits}".strip()
