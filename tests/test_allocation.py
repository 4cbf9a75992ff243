# SPDX-License-Identifier: AGPL-3.0-or-later
"""How what is removed is shared out over the layers of a model."""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import get_args

import models
import pytest
from torch import nn
from ultralytics import YOLO

import yolo_prune
from yolo_prune.errors import RecipeError
from yolo_prune.graph import ChannelSet, Group, Slot, trace
from yolo_prune.planning import allocation, planner, select
from yolo_prune.recipe import AllocationSpec, load_recipe

T = {"target": {"flops": 0.5}, "criterion": "magnitude"}
LIMITS = select.Constraints(8, 8, 0.75)


def test_recipes_know_every_allocation_by_name() -> None:
    names = get_args(AllocationSpec.model_fields["name"].annotation)
    assert set(names) == set(allocation.ALLOCATIONS)
    for name in names:
        assert allocation.create(name, {})
        assert load_recipe({**T, "allocation": name}).allocation == AllocationSpec(name=name)


def test_an_allocation_is_registered_once_and_asked_for_by_a_name_that_is_there() -> None:
    with pytest.raises(ValueError, match="An allocation named 'global' is already registered"):
        allocation.ALLOCATIONS.register("global")(allocation.Uniform)
    with pytest.raises(RecipeError, match=r"allocation\.name: there is no allocation 'local'; choose one of global, "):
        allocation.create("local", {})


def test_sensitivity_asks_for_images_where_there_are_none() -> None:
    what = allocation.Prunable(nn.Identity(), (), {}, None, iter)
    with pytest.raises(RecipeError, match="allocation: sensitivity needs training images, but there are none"):
        allocation.create("sensitivity", {})(what)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("unifrom", r"allocation\.name: must be one of global, .*, got 'unifrom'; did you mean 'uniform'\?"),
        (5, r"allocation: must be one of global, .* or a mapping with name, got 5"),
        ({}, None),
        ({"name": "uniform", "shares": 1}, r"allocation\.shares: 'uniform' has no such option. Leave it out"),
    ],
)
def test_what_cannot_be_is_refused(given: object, message: str | None) -> None:
    def rehearse() -> str:
        return planner.rehearsal(load_recipe({**T, "allocation": given})).allocation.name

    if message is None:
        assert rehearse() == "global"
    else:
        with pytest.raises(RecipeError, match=message):
            rehearse()


@pytest.mark.parametrize("metric", ["flops", "params"])
@pytest.mark.parametrize("name", models.FAMILIES)
@pytest.mark.parametrize("how", ["uniform", "isomorphic"])
def test_each_of_two_rounds_lands_within_one_percent_below_its_target(how: str, name: str, metric: str) -> None:
    model = models.build(name)
    for keep in (0.7, 0.4):
        made = planner.make_plan(model, models.recipe(**{f"target_{metric}": keep}, allocation=how), models.IMGSZ)
        forecast = made.predicted
        assert 0.99 * keep < (forecast.flops_kept if metric == "flops" else forecast.params_kept) <= keep
        models.cut(model, made)


@pytest.mark.parametrize("keep", [0.75, 0.4])
def test_uniform_takes_nearly_the_same_share_of_every_layer(keep: float) -> None:
    model = YOLO("yolo11n.yaml")
    plan = yolo_prune.plan(model, {**T, "target": {"flops": keep}, "allocation": "uniform"}, imgsz=64)
    graph = trace(model.model, imgsz=64)
    after, shares, allowed = {g.name: g.after for g in plan.groups}, {}, {}
    for group in graph.groups:
        levels = [] if group.protected else select.levels(group, LIMITS, graph.widths)
        if len(levels) > 1:
            shares[group.name] = 1 - after.get(group.name, group.width) / group.width
            allowed[group.name] = [1 - level / group.grain for level in levels]
    common = median(shares.values())
    assert 0.05 < common < 0.6
    for name, share in shares.items():  # within a step back from what is nearest to the common share
        nearest = min(allowed[name], key=lambda x: abs(x - common))
        assert abs(allowed[name].index(share) - allowed[name].index(nearest)) <= 1, name
    wide = [share for name, share in shares.items() if len(allowed[name]) > 12]
    assert len(wide) > 10
    assert max(wide) - min(wide) < 0.15


class Twice(nn.Module):
    """Two convolutions of each kind, under names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 3)
        self.an, self.bn = nn.BatchNorm2d(8), nn.BatchNorm2d(16)
        self.deep, self.last = nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 4, 1)


def group(name: str, *places: tuple[str, int]) -> Group:
    return Group((ChannelSet(name, 8, tuple(Slot(tensor, dim, tuple(range(8))) for tensor, dim in places)),))


def test_isomorphic_groups_have_layers_of_the_same_kinds_in_the_same_order() -> None:
    statistics = [(f"bn.{key}", 0) for key in ("weight", "bias", "running_mean", "running_var")]
    groups = [
        group(
            "one", ("a.weight", 0), ("a.bias", 0), *[(t.replace("bn", "an"), d) for t, d in statistics], ("b.weight", 1)
        ),
        group("two", ("b.weight", 0), ("b.bias", 0), *statistics, ("last.weight", 1)),
        group("no batch norm", ("a.weight", 0), ("a.bias", 0), ("b.weight", 1)),
        group("depthwise", ("b.weight", 0), ("deep.weight", 0), ("last.weight", 1)),
        group("two writers", ("b.weight", 0), ("a.weight", 0), ("last.weight", 1)),
        group("no reader", ("b.weight", 0), ("b.bias", 0), *statistics),
    ]
    subject = allocation.Prunable(Twice(), [(g, []) for g in groups], {}, None, iter)
    found = allocation.Isomorphic()(subject).classes
    same = defaultdict(list)
    for name, kind in found.items():
        same[kind].append(name)
    assert [names for names in same.values() if len(names) > 1] == [["one", "two"]]
    assert len(same) == 5


def test_isomorphic_classes_of_a_model_lose_equal_shares_of_their_channels() -> None:
    model, graph = models.shared("yolov8n"), models.graph_of("yolov8n")
    plan = planner.make_plan(model, models.recipe(target_flops=0.5, allocation="isomorphic"), models.IMGSZ)
    free = [(g, select.levels(g, LIMITS, graph.widths)) for g in graph.groups if not g.protected]
    classes = allocation.Isomorphic()(allocation.Prunable(model, free, {}, None, iter)).classes
    after = {g.name: g.after / g.before for g in plan.groups}
    gone: dict[object, float] = defaultdict(float)
    size: dict[object, int] = defaultdict(int)
    for g, _ in free:
        channels = sum(s.size for s in g.sets)
        gone[classes[g.name]] += channels * (1 - after.get(g.name, 1))
        size[classes[g.name]] += channels
    shares = [gone[kind] / size[kind] for kind in gone]
    assert len(shares) == 7
    assert max(shares) - min(shares) < 0.1
    assert len({round(1 - share, 3) for share in after.values()}) > 8  # within classes they differ
