# SPDX-License-Identifier: AGPL-3.0-or-later
"""Exactness, judged by `oracle.py`: a masked reference that is made from the pruned weights, not from the plan."""

from __future__ import annotations

import functools
from copy import deepcopy
from dataclasses import replace
from random import Random
from typing import Any

import models
import oracle
import pytest
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from ultralytics.nn.modules.conv import CBAM, Conv, Conv2
from ultralytics.nn.tasks import DetectionModel

from yolo_prune.cut import surgery
from yolo_prune.cut.plan import Plan
from yolo_prune.cut.proof import prove
from yolo_prune.errors import PlanError, ProofError
from yolo_prune.graph import Graph, trace
from yolo_prune.planning.cost import Cost, cost_of
from yolo_prune.planning.planner import build_plan, make_plan

FAMILIES = (  # one of each kind of block and head, thin
    *("yolov3-tiny", "yolov5", "yolov6", "yolov8-ghost", "yolov8-world", "yolov9t", "yolov10n", "yolo11-seg", "yolo12"),
    *(
        "yolo26-pose",
        "yolo26-seg",
        "yolo26-depth",
        "yolo26-sem",
        "yoloe-26-seg",
        "yolov8-rtdetr",
        "yolo11-cls-resnet18",
    ),
)

ATTENTIVE = (
    *("yolo11-seg", "yolo12"),
    *(
        pytest.param(name, marks=pytest.mark.long)
        for name in ("yolov10n", "yolo26-pose", "yolo26-seg", "yolo26-depth", "yolo26-sem", "yoloe-26-seg")
    ),
)


@functools.cache
def original(name: str) -> Any:
    """A thin random model in float64: to be read only."""
    return zoo.randomise(zoo.build(name, width=0.25).double())


@functools.cache
def traced(name: str, heads: str = "dims") -> tuple[Graph, Cost]:
    graph = trace(original(name), imgsz=2 * zoo.image_size(name), heads=heads)
    return graph, cost_of(original(name), graph)


def cut(model: nn.Module, plan: Plan) -> nn.Module:
    pruned = deepcopy(model)
    surgery.apply(pruned, plan)
    return pruned


@pytest.mark.parametrize(
    ("keep", "criterion"),
    [
        (0.5, "magnitude"),
        (0.3, "random"),
        pytest.param(0.3, "magnitude", marks=pytest.mark.long),
        pytest.param(0.5, "random", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("name", models.FAMILIES)
def test_a_pruned_model_computes_what_silencing_computes(name: str, keep: float, criterion: str) -> None:
    pruned = models.pruned(name, target_flops=keep, criterion=criterion)
    assert oracle.judge(models.shared(name), pruned, name) < oracle.TOLERANCE


@pytest.mark.parametrize(
    "name", ["yolo11-deep", *(pytest.param(name, marks=pytest.mark.long) for name in ("yolov8-deep", "yolo26-deep"))]
)
def test_other_scales_are_exact_too_at_any_width(name: str) -> None:
    plan = models.plan_of(name, target_flops=0.5, channels_round_to=1, channels_min=1)
    assert oracle.judge(models.shared(name), cut(models.build(name), plan), name) < oracle.TOLERANCE


@pytest.mark.parametrize(
    "name", ["yolo26n", *(pytest.param(name, marks=pytest.mark.long) for name in ("yolov8n", "yolo11n"))]
)
def test_two_rounds_are_exact_against_the_dense_model(name: str) -> None:
    pruned = models.pruned(name, target_flops=0.7)
    models.cut(pruned, make_plan(pruned, models.recipe(target_flops=0.4), models.IMGSZ))
    assert oracle.judge(models.shared(name), pruned, name) < oracle.TOLERANCE


def legal(name: str, random: Random, share: float, heads: str = "dims") -> Plan:
    """A plan that cuts about a share of the groups to a random width, channels drawn at random."""
    graph, cost = traced(name, heads)
    groups = [g for g in graph.groups if not g.protected and g.grain > 1]
    chosen = [g for g in groups if random.random() < share] or [random.choice(groups)]
    kept = {}
    for group in chosen:
        grains = random.randint(1, group.grain - 1)
        for s in group.sets:
            kept[s.name] = tuple(sorted(random.sample(range(s.size), s.size // group.grain * grains)))
    return build_plan(graph, cost, kept, {})


@pytest.mark.parametrize("name", FAMILIES)
def test_every_group_of_every_family_cut_at_once_is_exact(name: str) -> None:
    graph, _ = traced(name)
    plan = legal(name, Random(0), share=1.0)
    assert {g.name for g in plan.groups} == {g.name for g in graph.groups if not g.protected and g.grain > 1}
    assert oracle.judge(original(name), cut(original(name), plan), name) < oracle.TOLERANCE


@pytest.mark.parametrize("name", ATTENTIVE)
def test_every_group_is_exact_also_where_whole_heads_go(name: str) -> None:
    graph, _ = traced(name, "heads")
    assert graph.widths != traced(name)[0].widths
    plan = legal(name, Random(0), share=1.0, heads="heads")
    assert {g.name for g in plan.groups} == {g.name for g in graph.groups if not g.protected and g.grain > 1}
    assert oracle.judge(original(name), cut(original(name), plan), name) < oracle.TOLERANCE


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(seed=st.integers(0, 2**32), share=st.floats(0.1, 1.0))
def test_any_legal_choice_of_channels_is_exact(name: str, seed: int, share: float) -> None:
    plan = legal(name, Random(seed), share)
    assert oracle.judge(original(name), cut(original(name), plan), name) < oracle.TOLERANCE


def spoil(plan: Plan, random: Random) -> Plan:
    """One kept index of one tensor exchanged for a removed one, dropped, or out of range."""
    tensor = random.choice(sorted(plan.keep))
    dim = random.choice(sorted(plan.keep[tensor]))
    kept, size = list(plan.keep[tensor][dim]), plan.shapes[tensor][dim]
    spot = random.randrange(len(kept))
    kind = random.choice(["exchanged", "dropped", "beyond"] if len(kept) > 1 else ["exchanged", "beyond"])
    if kind == "dropped":
        del kept[spot]
    else:
        kept[spot] = size if kind == "beyond" else random.choice(sorted(set(range(size)) - set(kept)))
    wrong = tuple(sorted(kept))
    return replace(plan, keep={**plan.keep, tensor: {**plan.keep[tensor], dim: wrong}})


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(seed=st.integers(0, 2**32))
def test_any_illegal_choice_of_channels_is_refused(name: str, seed: int) -> None:
    random = Random(seed)
    wrong = spoil(legal(name, random, 0.5), random)
    with pytest.raises((ProofError, PlanError)):
        prove(original(name), wrong)


@pytest.mark.parametrize(
    "name", ["yolo26n", *(pytest.param(name, marks=pytest.mark.long) for name in ("yolov8n", "yolo11n"))]
)
def test_the_oracle_catches_one_wrong_input_channel_of_any_layer(name: str) -> None:
    dense_model, pruned = models.shared(name), models.pruned(name, target_flops=0.5)
    kept = oracle.recover_kept(dense_model, pruned)
    wanted = oracle.raw_outputs(oracle.silenced(dense_model, kept), name, True)
    dense, weights, caught = dense_model.state_dict(), pruned.state_dict(), []
    consumers = [t for t, (_, *more) in kept.items() if more and len(more[0]) < dense[t].shape[1]]
    for tensor in consumers[::3]:
        rows, columns = kept[tensor][:2]
        wrong = next(c for c in range(dense[tensor].shape[1]) if c not in columns)
        right = weights[tensor][:, 0].clone()
        weights[tensor][:, 0] = dense[tensor][rows, wrong]
        caught.append(oracle.gap(wanted, oracle.raw_outputs(pruned, name, True)))
        weights[tensor][:, 0] = right
    assert len(caught) > 12
    assert min(caught) > 1e3 * oracle.TOLERANCE
    assert oracle.gap(wanted, oracle.raw_outputs(pruned, name, True)) < oracle.TOLERANCE


def test_the_oracle_catches_a_wrong_channel_of_a_batch_norm() -> None:
    dense, pruned = models.shared("yolov8n"), models.pruned("yolov8n", target_flops=0.5)
    kept = oracle.recover_kept(dense, pruned)["model.3.bn.running_mean"][0]
    wrong = next(c for c in range(64) if c not in kept)
    pruned.model[3].bn.running_mean[0] = dense.model[3].bn.running_mean[wrong]
    assert oracle.judge(dense, pruned, "yolov8n") > 1e3 * oracle.TOLERANCE


ODD: dict[str, dict[str, Any]] = {  # architectures that no YAML ships
    "odd multiples": {
        "scales": {"q": [0.7, 0.3125, 640]},
        "scale": "q",
        "backbone": [
            [-1, 1, "Conv", [64, 3, 2]],
            [-1, 1, "Conv", [128, 3, 2]],
            [-1, 3, "C3k2", [256, False, 0.375, False, 1, False]],  # e and shortcut of its own
            [-1, 1, "Conv", [256, 3, 2]],
            [-1, 4, "C3k2", [512, True, 0.75]],
            [-1, 1, "Conv", [512, 3, 2]],
            [-1, 2, "C2f", [512, True]],
            [-1, 1, "SPPF", [512, 3]],
            [-1, 2, "C2PSA", [512]],
        ],
        "head": [
            [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
            [[-1, 4], 1, "Concat", [1]],
            [-1, 2, "C3k2", [256, True, 0.5, False, 1, True]],
            [[8, 11], 1, "Detect", ["nc"]],
        ],
    },
    "nested attention": {
        "backbone": [
            [-1, 1, "Conv", [32, 3, 2]],
            [-1, 1, "Conv", [64, 3, 2]],
            [-1, 1, "C3k2", [128, True, 0.5, True]],  # attention inside of C3k2
            [-1, 1, "Conv", [128, 3, 2]],
            [-1, 2, "C2fPSA", [128]],
            [-1, 1, "Conv", [256, 3, 2]],
            [-1, 1, "A2C2f", [256, True, 1, True, 1.5, 0.75]],
            [-1, 1, "PSA", [256]],
        ],
        "head": [[[4, 7], 1, "Detect", ["nc"]]],
    },
    "old blocks": {
        "backbone": [
            [-1, 1, "Focus", [32, 3]],
            [-1, 1, "Conv", [64, 3, 2]],
            [-1, 2, "BottleneckCSP", [64]],
            [-1, 1, "Conv", [96, 3, 2]],
            [-1, 2, "C3x", [96, False]],
            [-1, 1, "GhostConv", [128, 3, 2]],
            [-1, 2, "C3Ghost", [128]],
            [-1, 1, "C3TR", [128]],
            [-1, 1, "SPP", [128, [3, 5]]],
            [-1, 1, "C2", [128]],
            [-1, 1, "C1", [128]],
            [-1, 1, "Conv", [160, 3, 2]],
            [-1, 1, "DWConv", [160, 3]],
        ],
        "head": [[[4, 10, 12], 1, "Segment", ["nc", 32, 64]]],
    },
}


def replaced(layer: Any, other: Any) -> Any:
    other.i, other.f, other.type, other.np = layer.i, layer.f, type(other).__name__, 0
    return other


@pytest.mark.parametrize("name", ODD)
def test_architectures_that_no_yaml_ships_are_exact(name: str) -> None:
    cls = DetectionModel if "Detect" in str(ODD[name]["head"]) else zoo.MODELS["segment"]
    model = cls({"nc": 3, **deepcopy(ODD[name])}, nc=3, verbose=False)
    if name == "old blocks":
        model.model[3] = replaced(model.model[3], Conv2(64, 96, 3, 2))
        model.model[8] = replaced(model.model[8], nn.Sequential(Conv(128, 128, 1, act=nn.ReLU6()), CBAM(128)))
    zoo.randomise(model.double())
    fields = {"target_flops": 0.5, "channels_round_to": 1, "channels_min": 1, "criterion": "random"}
    for attention in ("dims",) if name == "old blocks" else ("dims", "heads"):  # whose attention is torch's own
        plan = make_plan(model, models.recipe(**fields, channels_attention=attention), 64)
        assert prove(model, plan).error < 1e-9
        assert oracle.judge(model, cut(model, plan), name) < oracle.TOLERANCE
