# SPDX-License-Identifier: AGPL-3.0-or-later
"""From a model and a recipe to a plan: targets, constraints and protections over one round and two."""

from __future__ import annotations

import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import models
import pytest
import torch
from torch import nn

from yolo_prune.criteria import CRITERIA
from yolo_prune.cut.plan import Plan
from yolo_prune.errors import NothingToRemoveError, PruneError, RecipeError, TargetError
from yolo_prune.planning.planner import layer_widths, make_plan, widths


def plan(model: nn.Module, **fields: object) -> Plan:
    return make_plan(model, models.recipe(**fields), models.IMGSZ)


@pytest.mark.parametrize("metric", ["flops", "params"])
@pytest.mark.parametrize("name", models.FAMILIES)
def test_each_of_two_rounds_lands_within_one_percent_below_its_target(name: str, metric: str) -> None:
    model = models.build(name)
    for keep in (0.7, 0.4):
        made = plan(model, **{f"target_{metric}": keep})
        forecast = made.predicted
        assert 0.99 * keep < (forecast.flops_kept if metric == "flops" else forecast.params_kept) <= keep
        assert (forecast.dense_flops, forecast.dense_params) == pytest.approx(dense_figures(name))
        models.cut(model, made)


def dense_figures(name: str) -> tuple[float, int]:
    cost = models.cost_of(name)
    return cost.flops(), cost.parameters()


@pytest.mark.parametrize("name", models.FAMILIES)
def test_limits_per_layer_count_from_the_dense_model_in_every_round(name: str) -> None:
    fields = {"channels_max_removed": 0.5, "channels_min": 16}
    model, dense = models.build(name), models.conv_widths(models.shared(name))
    for keep in (0.7, 0.5):
        models.cut(model, plan(model, target_flops=keep, **fields))
    now = models.conv_widths(model)
    assert any(now[layer] == width / 2 for layer, width in dense.items()), "the limit was never touched"
    assert all(now[layer] >= width / 2 for layer, width in dense.items())
    assert all(now[layer] >= min(16, width) for layer, width in dense.items())
    assert all(now[layer] % 8 == 0 for layer, width in dense.items() if now[layer] != width)
    with pytest.raises(TargetError, match="cannot be reached"):
        plan(model, target_flops=0.25, **fields)


def after(model: nn.Module, made: Plan) -> dict[str, tuple[int, int]]:
    """`{layer: (width before, width after)}` of the convolutions that get narrower."""
    dense = models.conv_widths(model)
    cut = {n.removesuffix(".weight"): made.shape_after(n)[0] for n in made.keep if n.endswith("weight")}
    return {n: (dense[n], width) for n, width in cut.items() if n in dense and width != dense[n]}


def test_layers_that_a_pattern_names_have_limits_of_their_own() -> None:
    model = models.shared("yolov8n")
    everywhere = after(model, plan(model, target_flops=0.4))
    limits = {"model.3": {"max_removed": 0.25}, "model.2*": {"round_to": 16}, "model.22.cv3.*": {"min": 48}}
    made = after(model, plan(model, target_flops=0.4, channels_layers=limits))
    assert everywhere["model.3.conv"] == (64, 32)
    assert made.get("model.3.conv", (64, 64))[1] >= 48
    for name, (_, width) in made.items():
        assert width % (16 if fnmatch(name, "model.2*") else 8) == 0
        assert width >= (48 if fnmatch(name, "model.22.cv3.*") else 8)
    assert any(fnmatch(name, "model.2*") for name in made)
    assert any(fnmatch(n, "model.22.cv3.*") and w < 48 for n, (_, w) in everywhere.items())


def test_limits_of_named_layers_may_be_looser_and_of_several_the_strictest_holds() -> None:
    model = models.shared("yolov8n")
    fields = {"channels_max_removed": 0.2, "target_flops": 0.8}
    loose = {"model.22.cv2.*": {"max_removed": 0.75}}
    made = after(model, plan(model, **fields, channels_layers=loose))
    assert any(w < 0.8 * d for n, (d, w) in made.items() if n.startswith("model.22.cv2"))
    assert all(w >= 0.8 * d for n, (d, w) in made.items() if not n.startswith("model.22.cv2"))
    both = loose | {"model.22.cv2.0*": {"max_removed": 0.5}, "model.22": {"round_to": 3}}
    made = after(model, plan(model, **fields, channels_layers=both))
    mine = {n: (d, w) for n, (d, w) in made.items() if n.startswith("model.22.cv2")}
    assert mine
    assert all(w >= 0.5 * d for n, (d, w) in mine.items() if n.startswith("model.22.cv2.0"))
    assert all(w % 3 == 0 for _, w in mine.values())


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("model.0.cnv", r"channels\.layers: 'model\.0\.cnv' matches no module of this model.*did you mean 'model\.0"),
        ("nothing*", r"channels\.layers: 'nothing\*' matches no module of this model\. Its layers are model\.0 to"),
        ("model.10", r"channels\.layers: 'model\.10' matches no layer that has a width of its own"),  # it upsamples
    ],
)
def test_limits_for_nothing_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(models.shared("yolov8n"), target_flops=0.5, channels_layers={pattern: {"min": 16}})


@pytest.mark.parametrize("pattern", ["model.4", "model.22.cv1", "*.m.0.cv2", "model.10.m.0.attn"])
def test_a_protected_module_keeps_all_its_tensors(pattern: str) -> None:
    model, dense = models.build("yolo11-tiny"), models.snapshot(models.shared("yolo11-tiny"))
    for keep in (0.9, 0.8):
        models.cut(model, plan(model, target_flops=keep, protect=[pattern], channels_round_to=2, channels_min=2))
    after = model.state_dict()
    inside = [n for n in dense if fnmatch(n, f"{pattern}.*")]
    assert inside
    assert all(torch.equal(after[n], dense[n]) for n in inside)


def test_what_is_protected_is_told_with_the_reason() -> None:
    made = plan(models.shared("yolov8n"), target_flops=0.6, protect=["model.0"])
    reasons = {p.reason: p.layers for p in made.protected}
    assert reasons["recipe: protect 'model.0'"] == ("model.0.conv",)
    assert "model.22.cv3.2.2" in reasons["task output"]
    assert reasons["box distribution (DFL)"] == ("model.22.dfl.conv",)


def test_frozen_modules_keep_their_tensors() -> None:
    frozen = ["model.2.cv1.conv", "model.2.cv1.bn"]
    made = make_plan(models.shared("yolov8n"), models.recipe(target_flops=0.6), models.IMGSZ, frozen=frozen)
    assert not [n for n in made.keep if n.rpartition(".")[0] in frozen]


def test_a_model_that_meets_the_target_has_nothing_to_remove() -> None:
    model = models.pruned("yolov8n", target_flops=0.5)
    with pytest.raises(NothingToRemoveError, match=r"target\.flops: the model already is at 0\.\d+ of its dense size"):
        plan(model, target_flops=0.5)


def test_a_round_s_share_goes_before_the_recipe_s_target() -> None:
    made = make_plan(models.shared("yolov8n"), models.recipe(target_flops=0.3), models.IMGSZ, keep=0.8)
    assert 0.79 < made.predicted.flops_kept <= 0.8


@pytest.mark.parametrize("name", models.FAMILIES)
def test_unreachable_targets_say_what_is_reachable_and_that_works(name: str) -> None:
    with pytest.raises(TargetError, match="Set the target to") as refusal:
        plan(models.shared(name), target_flops=0.02)
    least = float(str(refusal.value).split("Set the target to ")[1][:4])
    assert plan(models.shared(name), target_flops=least).predicted.flops_kept <= least


def test_a_recipe_that_protects_everything_is_refused() -> None:
    with pytest.raises(TargetError, match=r"can be removed from this model.*protect 'model\.\*'.* Protect less"):
        plan(models.shared("yolov8-tiny"), target_flops=0.5, protect=["model.*"])


def test_planning_reads_the_model() -> None:
    model = models.build("yolo26n").eval()
    before, random = models.snapshot(model), torch.get_rng_state()
    plan(model, target_flops=0.5, criterion="random")
    assert models.same_bits(models.snapshot(model), before)
    assert not any(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_diverged_is_refused_naming_the_layer(value: float) -> None:
    model = models.build("yolov8-tiny")
    model.model[3].conv.weight.data[0, 0] = value
    with pytest.raises(PruneError, match=r"score for 'model\.2\.cv2' that is negative, NaN or infinite"):
        plan(model, target_flops=0.5)


def test_a_criterion_that_gives_too_few_scores_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CRITERIA, "one", lambda: lambda tensors, channels: torch.ones(1, dtype=torch.float64))
    with pytest.raises(PruneError, match=r"scores of shape \(1,\) for 'model\.0', not of shape \(8,\)"):
        plan(models.shared("yolov8-tiny"), target_flops=0.5, criterion="one")


def test_a_model_in_half_precision_gives_the_plan_of_its_values() -> None:
    half = models.build("yolov8n").half()
    assert plan(half, target_flops=0.5).hash == plan(half.double(), target_flops=0.5).hash


@pytest.mark.parametrize("name", ["yolov8n", "yolo11-tiny", "yolo26-tiny"])
def test_the_same_input_gives_the_same_plan(name: str) -> None:
    first = models.plan_of(name, target_flops=0.6)
    assert plan(models.build(name), target_flops=0.6) == first
    assert plan(models.build(name).float().double(), target_flops=0.6).groups == first.groups


def test_the_plan_does_not_depend_on_the_process() -> None:
    code = """
import models
from yolo_prune.planning.planner import make_plan
model = models.build("yolo26-tiny")
for criterion in ("magnitude", "random"):
    print(make_plan(model, models.recipe(target_flops=0.6, criterion=criterion), models.IMGSZ).hash)
"""
    environment = {**os.environ, "PYTHONHASHSEED": "4321", "PYTHONPATH": str(Path(__file__).parent)}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    here = [models.plan_of("yolo26-tiny", target_flops=0.6, criterion=c).hash for c in ("magnitude", "random")]
    assert out.stdout.split()[-2:] == here


def test_widths_are_listed_by_set_and_by_layer() -> None:
    model = models.shared("yolov8-tiny")
    assert widths(model)["model.2.cv1[0]"] == 8
    assert dict(layer_widths(model)) == models.conv_widths(model)
