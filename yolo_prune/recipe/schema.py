# SPDX-License-Identifier: AGPL-3.0-or-later
"""`Recipe`: the user's settings as validated data. Unknown keys and impossible values are errors, reported together."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

NAMED = ("criterion", "allocation")  # these fields are a name, or a mapping with a name and options

Fraction = Annotated[float, Field(gt=0, lt=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


METRICS = ("flops", "params", "latency", "max_drop")
"""Fields of a target that exclude one another."""
WHERE = ("format", "device", "imgsz", "batch", "threads", "quantize")
"""Fields of a target that define how a latency is measured."""


class Target(_Part):
    """How much of the dense model is kept: a given fraction, or the least with an allowed drop of the fitness."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})
    flops: Fraction | None = Field(None, description="fraction of the dense model's FLOPs to keep")
    params: Fraction | None = Field(None, description="fraction of the dense model's parameters to keep")
    max_drop: Fraction | None = Field(
        None, description="search, while training, for the fewest FLOPs at which the fitness drops by at most this"
    )

    latency: Fraction | None = Field(None, description="fraction of the dense model's measured latency to keep")
    format: Literal["torch", "torchscript", "onnx", "openvino", "ncnn", "engine"] | None = Field(
        None, description="latency: runtime of the measurement; default: onnx (ONNX Runtime)"
    )
    device: str | None = Field(None, description="latency: cpu, or the number of a GPU; default: cpu")
    imgsz: int | None = Field(None, ge=32, multiple_of=32, description="latency: image size; default: that of the run")
    batch: int | None = Field(None, ge=1, description="latency: images per pass; default: 1")
    threads: int | None = Field(None, ge=1, description="latency: CPU threads of the runtime; default: one per core")
    quantize: Literal[16, 32] | None = Field(
        None, description="latency: precision of the export, 16 is half precision; default: 32"
    )
    profile: str | None = Field(
        None, description="latency: file from 'yolo-prune profile' on the target device, if this is another machine"
    )

    @field_validator("device", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("imgsz", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) or (isinstance(value, str) and "," in value):
            raise ValueError(
                "latency targets need a square size here, so give one number; for rectangles, measure a profile with "
                "'yolo-prune profile imgsz=height,width', and give it as target.profile"
            )
        return value

    @model_validator(mode="after")
    def _one(self) -> Target:
        if sum(getattr(self, metric) is not None for metric in METRICS) != 1:
            raise ValueError("give exactly one of flops, params, latency and max_drop, for example {flops: 0.5}")
        where = [key for key in (*WHERE, "profile") if getattr(self, key) is not None]
        if where and self.latency is None:
            raise ValueError(f"{where[0]} needs latency beside it: add latency, or leave {where[0]} out")
        if self.profile is not None and len(where) > 1:
            raise ValueError(f"{where[0]} is already fixed by the profile; leave {where[0]} out")
        return self

    @property
    def metric(self) -> Literal["flops", "params", "latency"]:
        """The metric in which the size of the model is counted."""
        if self.latency is not None:
            return "latency"
        return "flops" if self.params is None else "params"

    @property
    def keep(self) -> float | None:
        """Fraction of the dense model to keep, in `metric`; None if the run searches for it."""
        return next((value for value in (self.flops, self.params, self.latency) if value is not None), None)


class LayerSparsity(_Part):
    """The sparsity of the layers that a pattern matches, instead of that of all layers."""

    amount: float = Field(ge=0, lt=1, description="fraction of the weights of each of these layers that become zero")


PATTERN = re.compile(r"([1-9]\d?):([1-9]\d?)")


class Sparsity(_Part):
    """Single weights become zero; the layers keep their sizes."""

    amount: Fraction | None = Field(
        None, description="fraction of the weights that become zero; with a pattern N:M it is 1 - N/M"
    )
    pattern: str = Field(
        "unstructured", description="unstructured: zeros anywhere; N:M, such as 2:4: N of each M weights are kept"
    )
    scope: Literal["global", "layer"] = Field(
        "global", description="global: weights of all layers are compared; layer: each layer gets the same amount"
    )
    score: Literal["magnitude", "wanda", "obs", "random"] = Field(
        "magnitude", description="which weights become zero; wanda and obs look at training images"
    )
    images: int | None = Field(None, ge=1, le=100_000, description="number of training images for wanda and obs")
    seed: int | None = Field(None, ge=0, lt=2**32, description="seed of the score random")
    layers: dict[str, LayerSparsity] = Field(
        {}, description="amounts for some layers: names or globs of modules, each with amount"
    )

    @field_validator("pattern")
    @classmethod
    def _known(cls, value: str) -> str:
        found = PATTERN.fullmatch(value)
        if value != "unstructured" and not (found and int(found[1]) < int(found[2])):
            raise ValueError("must be unstructured, or N:M with N below M, as in '2:4'")
        return value

    @field_validator("layers", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _consistent(self) -> Sparsity:
        if self.pattern == "unstructured":
            if self.amount is None:
                raise ValueError("amount is missing; add it, for example {amount: 0.5}")
        elif self.amount is not None and not math.isclose(self.amount, self.fixed, abs_tol=1e-6):
            raise ValueError(f"amount: the pattern {self.pattern} means {self.fixed:g}; leave amount out")
        elif self.layers:
            raise ValueError(f"layers: the pattern {self.pattern} has one amount for all layers; leave layers out")
        if self.images is not None and self.score not in ("wanda", "obs"):
            raise ValueError(f"images: the score {self.score} looks at no images; leave images out")
        if self.seed is not None and self.score != "random":
            raise ValueError(f"seed: the score {self.score} is not random; leave seed out")
        return self

    @property
    def fixed(self) -> float:
        """Fraction of the weights that become zero."""
        if self.pattern == "unstructured":
            return self.amount or 0.0
        kept, of = map(int, self.pattern.split(":"))
        return 1 - kept / of

    @property
    def multiple(self) -> int:
        """Widths that are multiples of this number can have the pattern; 16 for the sparse tensor cores' 2:4."""
        return {"unstructured": 1, "2:4": 16}.get(self.pattern) or int(self.pattern.split(":")[1])


class Structure(_Part):
    """What goes whole: classes that are not needed."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})
    keep_classes: tuple[str | int, ...] | None = Field(
        None, strict=False, description="classes that stay, by name or number; all others are removed"
    )
    drop_classes: tuple[str | int, ...] | None = Field(
        None, strict=False, description="classes that are removed, by name or number; all others stay"
    )

    @field_validator("keep_classes", "drop_classes", mode="before")
    @classmethod
    def _one_class(cls, value: Any) -> Any:
        given = [value] if isinstance(value, str | int) else value
        for each in given if isinstance(given, list | tuple) else ():
            if isinstance(each, bool) or not isinstance(each, str | int):
                raise ValueError("must be names or numbers of classes; put quotes around a name such as 'no'")
        return given

    @field_validator("keep_classes", "drop_classes")
    @classmethod
    def _some_classes(cls, value: tuple[str | int, ...] | None) -> tuple[str | int, ...] | None:
        if value is not None and not value:
            raise ValueError("names no class; give at least one name or number")
        if twice := [name for i, name in enumerate(value or ()) if name in (value or ())[:i]]:
            raise ValueError(f"names the class {twice[0]!r} twice; name it once")
        return value

    @model_validator(mode="after")
    def _one(self) -> Structure:
        if (self.keep_classes is None) == (self.drop_classes is None):
            raise ValueError("give exactly one of keep_classes and drop_classes, for example {keep_classes: [person]}")
        return self


class Schedule(_Part):
    """When the model is cut, and how much each cut removes."""

    rounds: int | None = Field(
        None,
        ge=1,
        le=100,
        description="number of cuts; default: 5 with target.max_drop; otherwise 1 with a refit and without a guard, "
        "else 3",
    )
    start: int | None = Field(None, ge=0, description="epoch before which the first cut is made, counted from 0")
    interval: int | None = Field(
        None, ge=1, description="epochs between cuts; default: cuts are spread over the first half of the run"
    )
    curve: Literal["one-shot", "linear", "cubic"] = Field(
        "cubic", description="how the removal is spread over the rounds; cubic removes most of it early"
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
        """The options that were given beside the name."""
        return dict(self.model_extra or {})


class CriterionSpec(_Named):
    """Which criterion scores the channels, with its options beside the name."""

    name: str = Field(
        "obs",
        description="obs, taylor, fisher, magnitude, lamp, bn_scale, fpgm, random, torch_pruning (with importance), or "
        "a registered one",
    )


class AllocationSpec(_Named):
    """How the removal is distributed over the layers, with options beside the name."""

    name: Literal["global", "uniform", "isomorphic", "sensitivity"] = Field(
        "global", description="how much each layer loses"
    )


class LayerLimits(_Part):
    """Limits for the layers that a pattern matches, instead of the limits for all layers."""

    round_to: int | None = Field(None, ge=1, le=1024, description="widths of these layers are multiples of this")
    min: int | None = Field(None, ge=1, description="none of these layers gets narrower than this")
    max_removed: Fraction | None = Field(
        None, description="maximum removed from any of these layers, as a fraction of its dense width"
    )


class Channels(_Part):
    """Constraints on the widths of layers."""

    round_to: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="widths are multiples of this; default: 8, or the measured step of the runtime for a latency",
    )
    min: int = Field(8, ge=1, description="no layer gets narrower than this")
    max_removed: Fraction = Field(0.75, description="maximum removed from any layer, as a fraction of its dense width")
    attention: Literal["dims", "heads"] = Field(
        "dims", description="dims removes equally many channels of every attention head, heads removes whole heads"
    )
    layers: dict[str, LayerLimits] = Field(
        {}, description="limits for some layers: names or globs of modules, each with round_to, min or max_removed"
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value


class Rewind(_Part):
    """The weights to which the model is rewound after a cut."""

    epoch: int = Field(ge=0, description="epoch, counted from 0, at whose start the weights are stored")


class Recover(_Part):
    """What is done right after each cut, before training goes on."""

    refit: int = Field(
        64,
        ge=0,
        le=100_000,
        description="number of training images for the refit of the remaining weights; 0: no refit",
    )
    batchnorm: int = Field(
        32,
        ge=0,
        description="without refit: number of training batches for new batch norm statistics; 0: keep the old ones",
    )
    average: float = Field(
        0.5,
        ge=0,
        le=1,
        description="after a refit: length of the moving average of the saved model, as a share of the epochs up to "
        "the next cut or the end; 0: that of Ultralytics",
    )
    rewind: Rewind | None = Field(
        None,
        title="Rewind",
        description="after each cut, the remaining weights get their values of this epoch, instead of a refit",
    )
    learning_rate: Literal["run", "rewind"] = Field(
        "run",
        description="run: one schedule over the whole run; rewind: a new schedule from each cut to the next",
    )
    distill: bool = Field(
        False, description="distill from the checkpoint at the start of the run, as with distill_model="
    )

    @model_validator(mode="before")
    @classmethod
    def _rewound(cls, data: Any) -> Any:
        """Switch the refit off if weights are rewound, because rewinding would overwrite the refitted weights."""
        return {**data, "refit": 0} if isinstance(data, Mapping) and data.get("rewind") is not None else data


class Guard(_Part):
    """What happens when a round costs too much accuracy."""

    max_drop: Fraction | None = Field(
        None, description="maximum drop of the fitness after a round, from the model at the start; default: no limit"
    )
    on_breach: Literal["rollback", "stop"] = Field(
        "rollback",
        description="rollback: restore the last good model, go on with half the step; stop: restore it, no more cuts",
    )


class Recipe(_Part):
    """A pruning recipe.

    Example:
        >>> import yolo_prune
        >>> recipe = yolo_prune.load_recipe({"target": {"flops": 0.5}, "criterion": {"name": "fisher", "images": 32}})
        >>> recipe.criterion.name, recipe.criterion.options
        ('fisher', {'images': 32})
        >>> isinstance(recipe, yolo_prune.Recipe)
        True
    """

    version: Literal[1] = Field(1, description="version of the recipe format")
    target: Target | None = Field(None, title="Target", description="how much of the dense model is kept")
    sparsity: Sparsity | None = Field(
        None,
        title="Sparsity",
        description="single weights that become zero, after the channels of target or without it",
    )
    structure: Structure | None = Field(
        None,
        title="Structure",
        description="what goes whole, before the channels of target and the zeros of sparsity, or without them",
    )
    schedule: Schedule = Field(Schedule(), description="when, and how much each time")
    criterion: CriterionSpec = Field(CriterionSpec(), description="a name, or a mapping with options")
    allocation: AllocationSpec = Field(
        AllocationSpec(),
        description="how the removal is distributed over layers: a name, or a mapping with options",
    )
    channels: Channels = Field(Channels(), description="constraints on widths")
    protect: tuple[str, ...] = Field((), strict=False, description="modules that are never pruned: names or globs")
    recover: Recover = Field(Recover(), description="what is done after each cut")
    guard: Guard = Field(Guard(), description="what happens when a round costs too much accuracy")
    proof: bool = Field(True, description="prove each cut on a copy of the model before the cut is made")
    measure: bool = Field(True, description="validate before and after each cut, for the report")

    @field_validator(*NAMED, mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("recover")
    @classmethod
    def _rewinds_to_the_past(cls, recover: Recover, info: ValidationInfo) -> Recover:
        start = info.data["schedule"].start if "schedule" in info.data else None
        if recover.rewind and start is not None and start < recover.rewind.epoch:
            raise ValueError(
                f"the first cut, at epoch {start} (schedule.start), cannot rewind to epoch {recover.rewind.epoch}, "
                "because this epoch is later; rewind to an earlier epoch, cut later, or leave schedule.start out"
            )
        return recover

    @field_validator("protect", mode="before")
    @classmethod
    def _one_pattern(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_limit(self) -> Recipe:
        if self.target is None and self.sparsity is None and self.structure is None:
            raise ValueError(
                "target: is missing; add it, for example 'target: {flops: 0.5}'. For zeros instead of fewer channels, "
                "add 'sparsity: {amount: 0.5}'; to remove classes, add 'structure: {keep_classes: [person]}'"
            )
        if self.sparsity and self.searches:
            raise ValueError(
                "sparsity: target.max_drop searches for a size, and zeros would change the fitness that it looks at; "
                "leave sparsity out, and add zeros to the result in a second run"
            )
        if self.searches and self.guard.max_drop is not None:
            raise ValueError("guard.max_drop: target.max_drop already sets a limit; leave one of the two out")
        if self.guard.on_breach == "stop" and self.guard.max_drop is None:
            raise ValueError("guard.on_breach: stop needs a limit; add guard.max_drop, or leave guard.on_breach out")
        if self.searches and self.schedule.curve == "one-shot":
            raise ValueError(
                "schedule.curve: one-shot is a single cut, but target.max_drop needs several; leave schedule.curve out"
            )
        return self

    @property
    def limit(self) -> float | None:
        """Maximum drop of the fitness after a round; None for no limit.

        Example:
            >>> import yolo_prune
            >>> yolo_prune.load_recipe("smallest").limit
            0.01
        """
        return self.guard.max_drop if self.target is None or self.target.max_drop is None else self.target.max_drop

    @property
    def metric(self) -> Literal["flops", "params", "latency", "weights"]:
        """What the size of the model is counted in; "weights" without a target: the weights that are not zero.

        Example:
            >>> import yolo_prune
            >>> yolo_prune.load_recipe("half-flops").metric
            'flops'
        """
        return self.target.metric if self.target else "weights"

    @property
    def keep(self) -> float | None:
        """Fraction of the dense model to keep, in `metric`; None if the run searches for it.

        Example:
            >>> import yolo_prune
            >>> yolo_prune.load_recipe({"sparsity": {"amount": 0.75}}).keep
            0.25
        """
        if self.target:
            return self.target.keep
        return 1 - self.sparsity.fixed if self.sparsity else 1.0

    @property
    def searches(self) -> bool:
        """Whether the run searches for the size of the model.

        Example:
            >>> import yolo_prune
            >>> yolo_prune.load_recipe("smallest").searches
            True
        """
        return self.keep is None

    def zeros(self, keep: float, start: float) -> float:
        """Fraction of the weights that are zero at a size: the zeros grow together with the removed channels.

        With a target, zeros in a pattern N:M are made with the last cut only: an earlier pattern would not fit the
        inputs that a later cut leaves.

        Args:
            keep: size of the model, in `metric`.
            start: size that the run started from.

        Example:
            >>> import yolo_prune
            >>> recipe = yolo_prune.load_recipe({"target": {"flops": 0.5}, "sparsity": {"amount": 0.8}})
            >>> recipe.zeros(0.75, 1.0), recipe.zeros(0.5, 1.0)
            (0.4, 0.8)
        """
        if self.sparsity is None:
            return 0.0
        if self.target is None:
            return 1 - keep
        if self.sparsity.pattern != "unstructured":
            return self.sparsity.fixed if keep <= (self.keep or 0.0) * (1 + 1e-9) else 0.0
        whole = start - (self.keep or 0.0)
        return self.sparsity.fixed * min(max((start - keep) / whole, 0.0), 1.0) if whole > 0 else self.sparsity.fixed

    def to_dict(self) -> dict[str, Any]:
        """Plain data with all default values; `load_recipe` can read it.

        Example:
            >>> import yolo_prune
            >>> yolo_prune.load_recipe("half-flops").to_dict()["target"]
            {'flops': 0.5}
        """
        data = self.model_dump(mode="json", exclude_none=True)
        for field in NAMED:  # to an option, None is a value: a criterion can have `normalizer: null`
            data[field] |= {key: None for key, value in getattr(self, field).options.items() if value is None}
        return data

    def to_yaml(self) -> str:
        """`to_dict` as YAML, in the order of the fields.

        Example:
            >>> import yolo_prune
            >>> print(yolo_prune.load_recipe("half-flops").to_yaml())
            version: 1
            target: {flops: 0.5}
            ...
        """
        return as_yaml(self.to_dict())


def as_yaml(data: Mapping[str, Any]) -> str:
    """A recipe that is given as plain data, as YAML."""
    return yaml.safe_dump(dict(data), sort_keys=False, default_flow_style=None)


def json_schema() -> dict[str, Any]:
    """The JSON schema of recipes, for completion in editors."""
    needed = ("target", "sparsity", "structure")
    return {**fields_schema(), "anyOf": [{"required": [field]} for field in needed]}


def fields_schema() -> dict[str, Any]:
    """The JSON schema of the fields of recipes."""
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
    about = {"title": "yolo-prune recipe", "description": "A pruning recipe."}  # without the example of the docstring
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, **about}
