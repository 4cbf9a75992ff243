# SPDX-License-Identifier: AGPL-3.0-or-later
"""Small random detection models for the tests of the core, as the oracle wants them.

Every tensor is drawn from a continuous distribution in float64, so that a value says where in its tensor it came from.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from copy import deepcopy
from typing import Any
from weakref import WeakKeyDictionary

import small_data
import torch
import zoo
from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel, yaml_model_load

from yolo_prune import criteria
from yolo_prune.criteria import Criterion
from yolo_prune.cut import surgery
from yolo_prune.cut.plan import Plan
from yolo_prune.cut.record import Record, read_record, write_record
from yolo_prune.env.image_size import ImageSize
from yolo_prune.graph import Graph, trace
from yolo_prune.planning import cost
from yolo_prune.planning.cost import Cost
from yolo_prune.planning.planner import ROUND_TO, build_plan
from yolo_prune.planning.select import Constraints, Goal, select
from yolo_prune.recipe import Recipe, load_recipe

FAMILIES = ("yolov8n", "yolo11n", "yolo26n")
TINY = ("yolov8-tiny", "yolo11-tiny", "yolo26-tiny")  # an eighth of full width: quick, for tests that try many cuts
DEEP = ("yolov8-deep", "yolo11-deep", "yolo26-deep")  # the blocks and depths of scale x, thin: C3k everywhere
SHORT = {"short": small_data.SHORT, "short-c2f": small_data.SHORT_C2F}  # a third of the layers
NC = 3
IMGSZ = 64

_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # which architecture a model was built from

torch.set_num_threads(1)  # faster than two for models this small, and far faster when the cores are shared


def recipe(**fields: Any) -> Recipe:
    """The default recipe with fields changed: `recipe(target_flops=0.4, channels_min=16)`."""
    return load_recipe(
        "half-flops",
        {"criterion": "magnitude", **{key.replace("_", ".", 1): value for key, value in fields.items()}},
    )


def build(name: str, seed: int = 0) -> DetectionModel:
    """A random model that the caller may change."""
    model = deepcopy(_built(name, seed))
    _names[model] = name
    return model


def shared(name: str) -> DetectionModel:
    """The same model for all tests of the session: to be read only."""
    return _built(name, 0)


@functools.cache
def graph_of(name: str, imgsz: ImageSize = IMGSZ) -> Graph:
    return trace(shared(name), imgsz=imgsz)


@functools.cache
def cost_of(name: str, imgsz: ImageSize = IMGSZ) -> Cost:
    return cost.cost_of(shared(name), graph_of(name, imgsz))


@functools.cache
def plan_of(name: str, **fields: Any) -> Plan:
    """What `make_plan` makes for `shared(name)`, from a graph that is traced only once: to be read only."""
    asked = recipe(**fields)
    graph, cost = graph_of(name), cost_of(name)
    if asked.channels.attention != "dims":
        graph = trace(shared(name), imgsz=IMGSZ, heads=asked.channels.attention)
    criterion, c = criterion_of(name, asked.criterion.name, asked.criterion.options), asked.channels
    scores = {s.name: criterion(shared(name).state_dict(), s) for g in graph.groups for s in g.sets}
    whole = cost.flops() if asked.target.metric == "flops" else cost.parameters()
    goal = Goal(asked.target.metric, asked.target.keep * whole, whole)
    constraints = Constraints(c.round_to or ROUND_TO, c.min, c.max_removed)
    return build_plan(graph, cost, select(graph.groups, cost, scores, goal, constraints, graph.widths), {})


def criterion_of(name: str, criterion: str, options: Mapping[str, Any]) -> Criterion:
    """A criterion that uses weights only and has read `shared(name)`."""
    found = criteria.create(criterion, options)
    if isinstance(found, criteria.ModelReader):
        found.read(shared(name))
    return found


def pruned(name: str, **fields: Any) -> DetectionModel:
    """A model after one round, with its record, that the caller may change."""
    model = build(name)
    cut(model, plan_of(name, **fields))
    return model


def cut(model: nn.Module, plan: Plan) -> None:
    """Apply a plan and write it down, as a run does between two rounds."""
    record = read_record(model)
    dense = record.widths if record else graph_of(_names[model]).widths
    past = record.plan if record else None
    surgery.apply(model, plan)
    write_record(model, Record({}, past.then(plan) if past else plan, dense))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(x.dtype == b[n].dtype and torch.equal(x, b[n]) for n, x in a.items())


def images(count: int = 1, size: int = IMGSZ, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conv_widths(model: nn.Module) -> dict[str, int]:
    return {n: m.out_channels for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}


@functools.cache
def _built(name: str, seed: int) -> DetectionModel:
    configuration: Any = f"{name}.yaml"
    if name.endswith("-tiny"):
        configuration = scaled(name.removesuffix("-tiny"), "n", 0.33, 0.125)
    elif name in SHORT:
        configuration = {**deepcopy(SHORT[name]), "nc": NC}
    elif name.endswith("-deep"):
        configuration = scaled(name.removesuffix("-deep"), "x", 1.0, 0.125)
    model = DetectionModel(configuration, nc=NC, verbose=False)
    return zoo.randomise(model.double(), seed).train()


def scaled(family: str, scale: str, depth: float, width: float) -> dict[str, Any]:
    """A stock architecture at a size of its own."""
    config: dict[str, Any] = yaml_model_load(f"{family}.yaml")
    return {**config, "scales": {scale: [depth, width, 1024]}, "scale": scale}
