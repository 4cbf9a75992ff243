# SPDX-License-Identifier: AGPL-3.0-or-later
"""torch-pruning's graph and groups on our trace: judged by the oracle, and refused where something is missing."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import models
import oracle
import pytest
import torch
import torch_pruning as tp
import zoo
from torch import nn
from ultralytics import YOLO

import yolo_prune
from yolo_prune.cut import surgery
from yolo_prune.cut.record import read_record
from yolo_prune.errors import PlanError
from yolo_prune.graph import trace
from yolo_prune.interop.dependency import DependencyGraph
from yolo_prune.planning.planner import make_plan

NAMES = (*models.TINY, *(pytest.param(n, marks=pytest.mark.long) for n in ("yolo12", "yolov8-world", "rtdetr-l")))


def built(name: str) -> tuple[Any, int]:
    """A model that the caller may change, and an image size for it."""
    if name not in zoo.NAMES:
        return models.build(name), models.IMGSZ
    return zoo.randomise(zoo.build(name, 0.25).double()), 2 * zoo.image_size(name)


def prune_a_third(graph: DependencyGraph, seed: int = 0) -> int:
    """Cut every group by a random third of its indices; how many groups there were."""
    random, count = Random(seed), 0
    for group in graph.get_all_groups():
        width = len(group[0].idxs)
        group.prune(sorted(random.sample(range(width), max(1, width // 3))))
        count += 1
    return count


@pytest.mark.parametrize("name", NAMES)
def test_every_group_that_may_be_cut_is_one_of_torch_prunings(name: str) -> None:
    model, imgsz = built(name)
    graph = yolo_prune.dependency_graph(model, imgsz)
    assert isinstance(graph, tp.DependencyGraph)
    groups = list(graph.get_all_groups())
    free = [g for g in graph.structure.groups if not g.protected and g.grain > 1]
    assert [len(g[0].idxs) for g in groups] == [g.grain for g in free]
    assert len({g[0].dep.target.module for g in groups}) == len(groups), "local pruning tells groups apart by the root"
    for group in groups:
        assert isinstance(group, tp.dependency.Group)
        assert group[0].idxs == group[0].root_idxs == list(range(len(group[0].idxs)))
        assert all(
            len(item.idxs) == len(item.root_idxs) and set(item.root_idxs) == set(group[0].idxs) for item in group
        )
        assert all(item.dep.source is group[0].dep.target for item in group)
        assert not graph.check_pruning_group(group), "nothing would be left"


@pytest.mark.parametrize("name", NAMES)
def test_a_random_third_of_every_group_is_exact_and_the_graph_follows(name: str) -> None:
    original, imgsz = built(name)
    model = deepcopy(original)
    graph = yolo_prune.dependency_graph(model, imgsz)
    assert prune_a_third(graph) > 40
    assert oracle.judge(original, model, name) < oracle.TOLERANCE
    assert graph.structure == trace(model, imgsz=imgsz)
    again = yolo_prune.dependency_graph(deepcopy(original), imgsz)
    again.load_pruning_history(graph.pruning_history())
    assert models.same_bits(models.snapshot(model), models.snapshot(again.model))


@pytest.mark.parametrize("name", ["yolo11", pytest.param("yolo12", marks=pytest.mark.long)])
def test_whole_heads_are_groups_too(name: str) -> None:
    original = zoo.randomise(zoo.build(name, 0.5).double())
    model, imgsz = deepcopy(original), 2 * zoo.image_size(name)
    graph = yolo_prune.dependency_graph(model, imgsz, heads="heads")
    whole = [g for g in graph.structure.groups if any(s.whole for s in g.sets) and g.grain > 1 and not g.protected]
    widths = [len(g[0].idxs) for g in graph.get_all_groups()]
    assert whole
    assert widths == [g.grain for g in graph.structure.groups if not g.protected and g.grain > 1]
    score = tp.importance.GroupMagnitudeImportance()
    assert [len(score(g)) for g in graph.get_all_groups()] == widths
    prune_a_third(graph)
    assert oracle.judge(original, model, name) < oracle.TOLERANCE
    assert graph.structure == trace(model, imgsz=imgsz, heads="heads")
    again = yolo_prune.dependency_graph(deepcopy(original), imgsz, heads="heads")
    again.load_pruning_history(graph.pruning_history())
    assert models.same_bits(models.snapshot(model), models.snapshot(again.model))


def test_an_index_mapping_leads_from_the_root_to_the_member() -> None:
    graph = yolo_prune.dependency_graph(models.build("yolo11-tiny"), models.IMGSZ)
    for group in graph.get_all_groups():
        roots = [tp._helpers._HybridIndex(idx=i, root_idx=i) for i in group[0].idxs]
        for item in group:
            mapped = item.dep.index_mapping[0](roots)
            assert sorted((h.idx, h.root_idx) for h in mapped) == list(zip(item.idxs, item.root_idxs, strict=True))


def test_an_index_takes_its_partners_with_it() -> None:
    model = models.build("yolov8-tiny")
    graph, conv = yolo_prune.dependency_graph(model, models.IMGSZ), model.model[2].cv1.conv
    group = graph.get_pruning_group(conv, tp.prune_conv_out_channels, 3)
    half = conv.out_channels // 2
    lost = [
        item.idxs
        for item in group
        if item.dep.target.module is conv and item.dep.handler.__name__.endswith("out_channels")
    ]
    assert sorted(lost) == [[3], [3 + half]]
    group.prune()
    assert (model.model[2].c, conv.out_channels) == (half - 1, 2 * half - 2)
    assert conv.weight.shape[0] == model.model[2].cv1.bn.num_features == 2 * half - 2


def test_inputs_lead_to_the_same_group_as_outputs() -> None:
    model = models.build("yolov8-tiny")
    graph = yolo_prune.dependency_graph(model, models.IMGSZ)
    out = graph.get_pruning_group(model.model[0].conv, tp.prune_conv_out_channels, [1, 2])
    inner = graph.get_pruning_group(model.model[1].conv, tp.prune_conv_in_channels, [1, 2])
    assert graph.plan_of(out).hash == graph.plan_of(inner).hash


def test_ignored_layers_and_types_of_roots_leave_groups_out() -> None:
    model = models.build("yolov8-tiny")
    graph = yolo_prune.dependency_graph(model, models.IMGSZ)
    everything = list(graph.get_all_groups())
    fewer = list(graph.get_all_groups(ignored_layers=[model.model[2]]))
    assert 0 < len(everything) - len(fewer) < 6
    inside = set(model.model[2].modules())
    assert not any(
        i.dep.target.module in inside and graph._part_of(i.dep.target.module, i.dep.handler).out
        for g in fewer
        for i in g
    )
    assert list(graph.get_all_groups(root_module_types=[nn.Linear])) == []


def test_an_incomplete_group_is_refused_and_the_model_stays() -> None:
    model = models.build("yolov8-tiny")
    graph, before = yolo_prune.dependency_graph(model, models.IMGSZ), models.snapshot(model)
    group = graph.get_pruning_group(model.model[0].conv, tp.prune_conv_out_channels, [1])
    spot = next(i for i, item in enumerate(group) if item.dep.target.module is model.model[1].conv)
    group[spot] = (group[spot].dep, [])
    with pytest.raises(PlanError, match=r"incomplete: 'model.1.conv' \(inputs\) must also lose index 1,"):
        group.prune()
    halves = graph.get_pruning_group(model.model[2].cv1.conv, tp.prune_conv_out_channels, [1])
    half = model.model[2].c
    for i, (dep, idxs) in enumerate(list(halves)):
        keep = [c for c in idxs if c >= half] if dep.target._name.startswith("model.2.cv1") else idxs
        halves[i] = (dep, keep)
    with pytest.raises(PlanError, match="must also lose index 1,"):
        halves.prune()
    assert models.same_bits(before, models.snapshot(model))


def test_what_cannot_be_cut_is_refused_with_the_reason() -> None:
    model = models.build("yolov8-tiny")
    graph = yolo_prune.dependency_graph(model, models.IMGSZ)
    last = model.model[-1].cv3[0][2]
    with pytest.raises(PlanError, match=r"may not be removed \(.*output"):
        graph.get_pruning_group(last, tp.prune_conv_out_channels, [0])
    with pytest.raises(PlanError, match=r"'model.0.conv' \(outputs\) has no index 999"):
        graph.get_pruning_group(model.model[0].conv, tp.prune_conv_out_channels, [999])
    with pytest.raises(ValueError, match="not in the dependency graph"):
        graph.get_pruning_group(nn.Conv2d(1, 1, 1), tp.prune_conv_out_channels, [0])
    with pytest.raises(PlanError, match="not all"):
        next(graph.get_all_groups()).prune()
    with pytest.raises(PlanError, match="register_block"):
        graph.register_customized_layer(nn.Conv2d, None)


@pytest.mark.parametrize("name", models.TINY)
def test_a_plan_is_groups_and_groups_are_the_plan(name: str) -> None:
    plan = models.plan_of(name, target_flops=0.5, channels_round_to=1, channels_min=1)
    by_plan, by_groups = models.build(name), models.build(name)
    surgery.apply(by_plan, plan)
    graph = yolo_prune.dependency_graph(by_groups, models.IMGSZ)
    assert len(list(graph.groups_of(plan))) == len(plan.groups)
    for group in graph.groups_of(plan):
        group.prune()
    assert models.same_bits(models.snapshot(by_plan), models.snapshot(by_groups))
    record = read_record(by_groups)
    assert record
    assert record.plan
    assert record.plan.hash == plan.hash
    again = yolo_prune.dependency_graph(models.build(name), models.IMGSZ)
    again.load_pruning_history(graph.pruning_history())
    assert models.same_bits(models.snapshot(by_plan), models.snapshot(again.model))
    with pytest.raises(PlanError, match="another model"):
        list(graph.groups_of(plan))


def test_the_saved_file_is_an_ordinary_pruned_checkpoint(tmp_path: Path) -> None:
    yolo = YOLO("yolo11n.yaml")
    graph = yolo_prune.dependency_graph(yolo, 64)
    prune_a_third(graph)
    yolo.save(tmp_path / "cut.pt")
    again = YOLO(tmp_path / "cut.pt")
    assert yolo_prune.is_pruned(tmp_path / "cut.pt")
    wanted = {n: tuple(p.shape) for n, p in yolo.model.named_parameters()}
    assert {n: tuple(p.shape) for n, p in again.model.named_parameters()} == wanted
    plan = make_plan(again.model, models.recipe(target_flops=0.2), 64)  # it can be cut again
    assert plan.predicted.flops_before < 0.7 * plan.predicted.dense_flops
    image = torch.zeros(1, 3, 64, 64)
    assert torch.isfinite(again.model.eval()(image)[0]).all()
