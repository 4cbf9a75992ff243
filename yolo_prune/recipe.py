# SPDX-License-Identifier: AGPL-3.0-or-later
"""`Recipe`: what the user asks for, as validated data. Unknown keys and impossible values are refused, all at once."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from yolo_prune.errors import RecipeError

DEFAULT = "half-flops"
MAX_BYTES = 64 * 1024

Fraction = Annotated[float, Field(gt=0, lt=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Target(_Part):
    """How much of the dense model is kept. Exactly one metric."""

    flops: Fraction | None = Field(None, description="fraction of the dense model's FLOPs to keep, between 0 and 1")
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
            raise ValueError(f"curve one-shot is a single cut, but rounds is {self.rounds}; drop one of them")
        return self


class CriterionSpec(_Part):
    """Which criterion scores the channels, with its options beside the name."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    name: str = Field("magnitude", description="magnitude or random, or one that was registered")

    @property
    def options(self) -> dict[str, Any]:
        """What was given beside the name."""
        return dict(self.model_extra or {})


class Channels(_Part):
    """Constraints on the widths of layers."""

    round_to: int = Field(8, ge=1, le=1024, description="widths are multiples of this")
    min: int = Field(8, ge=1, description="no layer gets narrower than this")
    max_removed: Fraction = Field(
        0.75, description="most that is removed of any layer, as a fraction of its dense width"
    )


class Recover(_Part):
    """What is done right after each cut, before training goes on."""

    batchnorm: int = Field(
        32,
        ge=0,
        description="training batches to re-estimate batch norm statistics with; 0 leaves them as they are",
    )


class Recipe(_Part):
    """A pruning recipe."""

    version: Literal[1] = Field(1, description="version of the recipe format")
    target: Target = Field(description="how much of the dense model is kept")
    schedule: Schedule = Field(default_factory=Schedule, description="when, and how much each time")
    criterion: CriterionSpec = Field(default_factory=CriterionSpec, description="a name, or a mapping with options")
    channels: Channels = Field(default_factory=Channels, description="constraints on widths")
    protect: tuple[str, ...] = Field((), strict=False, description="modules that are never touched: names or globs")
    recover: Recover = Field(default_factory=Recover, description="what follows each cut")
    proof: bool = Field(True, description="prove each cut on a copy before it is made")
    measure: bool = Field(True, description="validate before and after each cut, for the report")

    @field_validator("criterion", mode="before")
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
    for key, value in (overrides or {}).items():
        _override(data, key, value)
        origin = f"{origin}, with overrides" if not origin.endswith("overrides") else origin
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
    criterion = schema["properties"]["criterion"]
    reference = {"$ref": criterion.pop("$ref", "#/$defs/CriterionSpec")}
    criterion["anyOf"] = [{"type": "string", "description": "name of a criterion"}, reference]
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
    if path.suffix in (".yaml", ".yml"):
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
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"The recipe '{path}' is larger than {MAX_BYTES // 1024} KiB; that is not a recipe.")
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)  # a SafeLoader
    except OSError as e:
        raise RecipeError(f"The recipe '{path}' cannot be read: {e.strerror or e}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as e:
        raise RecipeError(f"The recipe '{path}' is not valid YAML: {' '.join(str(e).split())}.") from None
    if not isinstance(data, dict):
        found = "an empty file" if data is None else f"a {type(data).__name__}"
        raise RecipeError(f"The recipe '{path}' must be a mapping such as 'target: {{flops: 0.5}}', found {found}.")
    return data


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML in which a key that is given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, refusing duplicate keys."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(key, str | int | float) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key}' is given twice", problem_mark=key_node.start_mark)
            seen.add(key if isinstance(key, str | int | float) else str(key))
        return super().construct_mapping(node, deep)


def _override(data: dict[str, Any], dotted: str, value: Any) -> None:
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            raise RecipeError(f"recipe.{dotted}={value}: the value is not valid YAML.") from None
    *parents, last = dotted.split(".")
    place = data
    for parent in parents:
        inner = place.get(parent)
        if isinstance(inner, str) and parent == "criterion":
            inner = {"name": inner}
        place[parent] = inner = dict(inner) if isinstance(inner, Mapping) else {}
        place = inner
    if parents == ["target"]:
        place.clear()  # the metrics exclude one another
    place[last] = value


def _deep(data: Mapping[str, Any]) -> dict[str, Any]:
    return {str(k): _deep(v) if isinstance(v, Mapping) else v for k, v in data.items()}


def _explain(error: ValidationError) -> list[str]:
    return [f"  {line}" for line in dict.fromkeys(_line(e) for e in error.errors())]


def _line(e: ErrorDetails) -> str:
    where = [str(part) for part in e["loc"] if not str(part).startswith("function-")]
    path, got, kind = ".".join(where), e["input"], e["type"]
    if kind == "extra_forbidden":
        known = _fields_at(where[:-1])
        near = get_close_matches(where[-1], known, n=1, cutoff=0.5)
        return f"{path}: unknown key; " + (f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}")
    if kind == "missing":
        return f"{path}: is missing; give it, for example 'target: {{flops: 0.5}}'"
    if kind == "value_error":
        return f"{path or 'recipe'}: {e['msg'].removeprefix('Value error, ')}"
    limits = _limits(where)
    message = e["msg"][0].lower() + e["msg"][1:]
    return f"{path}: {message}, got {got!r}" + (f"; {limits}" if limits else "")


def _fields_at(where: list[str]) -> list[str]:
    part: type[BaseModel] = Recipe
    for name in where:
        inner = part.model_fields[name].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        part = inner
    return list(part.model_fields)


def _limits(where: list[str]) -> str:
    part: type[BaseModel] = Recipe
    for name in where[:-1]:
        inner = part.model_fields[name].annotation if name in part.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return ""
        part = inner
    field = part.model_fields.get(where[-1]) if where else None
    return field.description or "" if field else ""
