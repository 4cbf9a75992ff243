# SPDX-License-Identifier: AGPL-3.0-or-later
"""Cost: the figures Ultralytics prints, predicted for shapes that do not exist yet."""

from __future__ import annotations

import math
from typing import Any

import models
import pytest
import torch
import zoo
from torch import nn
from ultralytics.utils.torch_utils import get_flops

from yolo_prune.cut import surgery
from yolo_prune.cut.forecast import Forecast
from yolo_prune.errors import PlanError, PruneError
from yolo_prune.graph import trace
from yolo_prune.planning.cost import Cost, cost_of
from yolo_prune.planning.planner import dense_cost, present_cost


def without_the_copy_of_the_head(model: Any) -> Any:
    for name in ("one2one_cv2", "one2one_cv3"):
        if hasattr(model.model[-1], name):
            setattr(model.model[-1], name, None)
    return model


@pytest.mark.parametrize("imgsz", [64, 640, (64, 96)])
@pytest.mark.parametrize("name", models.FAMILIES)
def test_flops_are_those_ultralytics_prints(name: str, imgsz: Any) -> None:
    dense = without_the_copy_of_the_head(models.build(name)).eval()
    assert models.cost_of(name, imgsz).flops() == pytest.approx(get_flops(dense, imgsz) * 1e9, rel=1e-9)


OTHERS = ("yolov3-tiny", "yolov9t", "yolov10n", "yolo12", "yolo26-seg", "yolov8-world", "rtdetr-l")


@pytest.mark.parametrize("name", OTHERS)
def test_flops_of_other_architectures_are_those_ultralytics_prints(name: str) -> None:
    """RT-DETR's differ by the softmax of torch's attention, which thop counts as well."""
    model = zoo.build(name).eval()
    for key in [k for k in model.model[-1]._modules if k.startswith("one2one_")]:
        setattr(model.model[-1], key, None)
    cost = cost_of(model, trace(model, imgsz=640))
    assert cost.flops() == pytest.approx(get_flops(model, 640) * 1e9, rel=2e-3 if name == "rtdetr-l" else 1e-9)


@pytest.mark.parametrize("name", models.FAMILIES)
def test_costs_of_a_pruned_model_are_those_of_what_is_deployed(name: str) -> None:
    model = models.pruned(name, target_flops=0.4)
    flops, params = present_cost(model, models.IMGSZ)
    deployed = without_the_copy_of_the_head(model).eval()
    assert flops == pytest.approx(get_flops(deployed, models.IMGSZ) * 1e9, rel=1e-9)
    assert params == sum(p.numel() for p in deployed.parameters())


def test_a_layer_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 8 x 3 x 3 x 3 weights at 16 x 16 positions
        nn.BatchNorm2d(8),  # 8 channels x 4 at 16 x 16
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),  # 8 x 1 x 3 x 3 at 16 x 16
        nn.Conv2d(8, 4, 1, bias=False),  # 4 x 8 at 16 x 16
    )
    cost = cost_of(model, trace(model, imgsz=32))
    assert cost.flops() == 2 * 256 * (8 * 27 + 8 * 4 + 8 * 9 + 32)
    assert cost.parameters() == (8 * 27 + 8) + 16 + 8 * 9 + 32
    smaller = {"0.weight": (6, 3, 3, 3), "3.weight": (4, 6, 1, 1)}
    assert cost.flops() - cost.flops(smaller) == 2 * 256 * (2 * 27 + 4 * 2)
    assert cost.parameters() - cost.parameters(smaller) == 2 * 27 + 4 * 2


def test_attention_by_hand() -> None:
    """q'k and v'a: positions squared, for every channel of k and of v."""
    model = models.shared("yolo11n")
    cost = cost_of(model, trace(model, imgsz=640))
    layers = sum(
        w * math.prod(cost.shapes[t]) for t, w in cost.macs.items() if not t.endswith(("qkv.bn.weight", "pe.bn.weight"))
    )
    attention: Any = model.model[10].m[0].attn
    norms = 4 * 20 * 20 * (attention.qkv.bn.num_features + attention.pe.bn.num_features)
    channels = attention.num_heads * (attention.key_dim + attention.head_dim)
    assert cost.flops() == pytest.approx(2 * (layers + norms + (20 * 20) ** 2 * channels), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "field"), [("yolov8-tiny", "flops"), ("yolo11n", "flops"), ("yolo26n", "params"), ("yolo26-deep", "flops")]
)
def test_the_forecast_is_what_the_cut_model_costs(name: str, field: str) -> None:
    plan = models.plan_of(name, **{f"target_{field}": 0.6, "channels_round_to": 4})
    model = models.build(name)
    surgery.apply(model, plan)
    forecast = plan.predicted
    assert present_cost(model, models.IMGSZ) == pytest.approx((forecast.flops_after, forecast.params_after))
    assert dense_cost(model, plan, models.IMGSZ) == pytest.approx((forecast.dense_flops, forecast.dense_params))
    dense = models.cost_of(name)
    assert (dense.flops(), dense.parameters()) == (forecast.dense_flops, forecast.dense_params)


def test_measuring_reads_the_model() -> None:
    model = models.build("yolo26n").eval()
    before, random = models.snapshot(model), torch.get_rng_state()
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    cost_of(model, trace(model, imgsz=320))
    assert models.same_bits(models.snapshot(model), before)
    assert not any(m.training for m in model.modules())
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("imgsz", [100, 0, -32, 64.0])
def test_an_image_size_that_the_model_cannot_take_is_refused(imgsz: int) -> None:
    with pytest.raises(PruneError, match=rf"imgsz={imgsz}: must be a multiple of 32"):
        trace(models.shared("yolov8n"), imgsz=imgsz)


def test_a_latency_that_was_not_measured_is_told_as_such() -> None:
    dense = Cost(macs={}, params=frozenset(), shapes={}, imgsz=64)
    for ask in (lambda: dense.total("latency"), lambda: dense.terms("latency")):
        with pytest.raises(PruneError, match="The latency of this model was not measured"):
            ask()
    forecast = Forecast(64, 2.0, 2.0, 1.0, 4, 4, 3)
    for share in (forecast.present, forecast.kept):
        with pytest.raises(PlanError, match="This plan has no latency"):
            share("latency")
