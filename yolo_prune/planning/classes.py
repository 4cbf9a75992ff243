# SPDX-License-Identifier: AGPL-3.0-or-later
"""Makes the plan that removes classes from a model: which rows of which tensors belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from yolo_prune.cut import heads, surgery
from yolo_prune.cut.classes import COUNTS, PROMPTS, Classes, names_of
from yolo_prune.cut.copies import bare_copy
from yolo_prune.cut.heads import Affine, Followers
from yolo_prune.cut.plan import Attributes, Plan
from yolo_prune.cut.record import KEY, after_cut, read_record, write_record
from yolo_prune.errors import RecipeError, UnsupportedModelError
from yolo_prune.graph import Graph
from yolo_prune.graph.probes import image_channels
from yolo_prune.planning import planner
from yolo_prune.planning.cost import cost_of
from yolo_prune.recipe.schema import Structure

ONE_EACH = Affine(0, 1)
"""The size of a dimension that has one index for each class."""


def plan_for(model: Any, graph: Graph, asked: Structure) -> Plan:
    """Plan the removal of classes. The model is not changed.

    Args:
        model: the module in `YOLO(...).model`; dense or pruned before.
        graph: the graph of the model.
        asked: the classes that stay or go.

    Raises:
        RecipeError: If a class is not known, or no class or all classes would stay.
        UnsupportedModelError: If classes cannot be removed from this model.
    """
    names = names_of(model)
    kept = kept_by(asked, names)
    follow = followers_of(model, len(names))
    rows = {name for name, dims in follow.tensors.items() if dims == {0: ONE_EACH}}
    prompts = [key for key in PROMPTS if isinstance(getattr(model, key, None), torch.Tensor)]
    if rows != follow.tensors.keys() or not (rows or prompts):
        raise UnsupportedModelError(
            "structure: classes cannot be removed from this model, because "
            + ("no layer has one output for each class." if not rows else f"{_others(follow, rows)}.")
            + " Train a model with fewer classes instead."
        )
    state = model.state_dict()
    ordered = tuple(name for name in state if name in rows)
    counts: Attributes = {
        name: {key: sizes[key].at(len(kept)) for key in COUNTS if key in sizes}
        for name, sizes in follow.attributes.items()
        if sizes.keys() & set(COUNTS)
    }
    for name in ("", f"model.{len(model.model) - 1}"):  # training sets that of the model, texts that of the head
        if vars(model.get_submodule(name)).get("nc") == len(names):
            counts.setdefault(name, {})["nc"] = len(kept)
    shapes = {name: tuple(state[name].shape) for name in ordered}
    classes = Classes(names, kept, ordered)
    plan = Plan({name: {0: kept} for name in ordered}, counts, shapes, classes=classes)
    return replace(plan, protected=planner.protected_parts(graph), forecast=_forecast(model, graph, plan))


def removed(model: nn.Module, graph: Graph, plan: Plan) -> nn.Module:
    """A copy of a model after the removal of classes, with its record: targets stay fractions of the dense model.

    Args:
        model: the model before; it is not changed.
        graph: its graph.
        plan: the plan of `plan_for`.
    """
    record, after = read_record(model), bare_copy(model)
    widths = record.widths if record and record.plan else planner.widths(model, graph)
    surgery.apply(after, plan)
    write_record(after, after_cut(record, plan, widths))
    return after


def _others(follow: Followers, rows: set[str]) -> str:
    name = next(name for name in follow.tensors if name not in rows)
    return f"'{name}' depends on the number of classes in another way than one row for each"


def _forecast(model: nn.Module, graph: Graph, plan: Plan) -> Any:
    cost, present = cost_of(model, graph), planner.standing(model, graph)
    after = {name: plan.shape_after(name) for name in plan.keep}
    return replace(present, flops_after=cost.flops(after), params_after=cost.parameters(after))


def refuse_other_tasks(model: Any) -> None:
    """Refuse a model whose classes cannot be removed, or that has none. It is called before the model is traced.

    Raises:
        UnsupportedModelError: With the reason.
    """
    head = type(model.model[-1]).__name__ if hasattr(model, "model") else ""
    if head == "SemanticSegment":
        raise UnsupportedModelError(
            "structure: semantic segmentation gives each pixel the class with the highest score. Without a class, its "
            "pixels would get another class instead of none, so classes cannot be removed. Train with a dataset that "
            "merges them into one class."
        )
    if head == "Depth":
        raise UnsupportedModelError("structure: a depth model has no classes. Leave structure out.")
    if getattr(model.model[-1], "lrpc", None) is not None or getattr(model.model[-1], "is_fused", None) is True:
        raise UnsupportedModelError(
            "structure: the classes of this YOLOE are fused into its layers. Remove the classes from the YOLOE model "
            "before it is fused."
        )


def kept_by(asked: Structure, names: Sequence[str]) -> tuple[int, ...]:
    """Numbers of the classes that stay, ascending.

    Args:
        asked: the classes that stay or go, by name or number.
        names: names of the model's classes.

    Raises:
        RecipeError: If a class is not known, is named twice, or no class or all classes would stay.
    """
    field = "keep_classes" if asked.keep_classes is not None else "drop_classes"
    numbers = [_number(each, names, field) for each in getattr(asked, field)]
    if twice := [n for i, n in enumerate(numbers) if n in numbers[:i]]:
        raise RecipeError(f"structure.{field}: the class '{names[twice[0]]}' is named twice. Name it once.")
    kept = set(numbers) if field == "keep_classes" else set(range(len(names))) - set(numbers)
    if not kept:
        raise RecipeError(f"structure.{field}: no class would stay. Leave at least one class out.")
    if len(kept) == len(names):
        raise RecipeError(f"structure.{field}: all {len(names)} classes would stay. Leave structure out.")
    return tuple(sorted(kept))


def _number(asked: str | int, names: Sequence[str], field: str) -> int:
    if isinstance(asked, int):
        if not 0 <= asked < len(names):
            raise RecipeError(
                f"structure.{field}: there is no class {asked}: the model's classes are numbered 0 to {len(names) - 1}."
            )
        return asked
    known = [heads.plain(name) for name in names]
    if known.count(heads.plain(asked)) > 1:
        raise RecipeError(f"structure.{field}: several classes are named '{asked}'. Give their numbers.")
    if heads.plain(asked) in known:
        return known.index(heads.plain(asked))
    near = get_close_matches(heads.plain(asked), known, n=1, cutoff=0.5)
    hint = f"did you mean '{names[known.index(near[0])]}'?" if near else f"the classes are {_listed(names)}."
    raise RecipeError(f"structure.{field}: the model has no class '{asked}'; {hint}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def followers_of(model: Any, count: int) -> Followers:
    """The tensors and attributes of a model that have its number of classes.

    Args:
        model: the model. Two models are built from its YAML for other numbers, to see what depends on them.
        count: its number of classes.

    Raises:
        UnsupportedModelError: If such models cannot be built.
    """
    yaml = {key: value for key, value in model.yaml.items() if key != KEY}
    channels = image_channels(model) or 3

    def build(number: int) -> nn.Module:
        built: nn.Module = type(model)({**_untrained(yaml), "nc": number}, ch=channels, nc=number, verbose=False)
        return built

    try:
        with torch.random.fork_rng(devices=[]):
            found = heads.followers(build)
        follow = found.of(model, count)
    except Exception as e:  # the class of the model may be the user's code
        raise UnsupportedModelError(
            f"structure: the classes of this model are not known, because {type(model).__name__} cannot be built from "
            f"its YAML: {type(e).__name__}: {e}. Give the class the parameters of DetectionModel."
        ) from e
    missing = found.tensors.keys() - follow.tensors.keys()
    if missing:
        raise UnsupportedModelError(
            f"structure: '{sorted(missing)[0]}' does not have one row for each of the {count} names of the model's "
            "classes. Correct the names of the model."
        )
    return follow


def _untrained(yaml: dict[str, Any]) -> dict[str, Any]:
    """A copy of a YAML in which no backbone is downloaded."""
    copy = deepcopy(yaml)
    for layer in copy.get("backbone", ()):
        if layer[2] == "TorchVision":
            layer[3] = [None if value == "DEFAULT" else value for value in layer[3]]
    return copy
