# SPDX-License-Identifier: AGPL-3.0-or-later
"""Surgery: new parameters, old graphs left alone, optimizers that carry on, and no change at all when it is refused."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.modules.block import C2PSA, Attention, C2f
from ultralytics.optim import MuSGD

from yolo_prune.cut import surgery
from yolo_prune.cut.plan import Plan
from yolo_prune.errors import PlanError

OPTIMIZERS = ["SGD", "AdamW", "MuSGD", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop"]


def plan() -> Plan:
    return models.plan_of("yolo26-tiny", target_flops=0.6)


def tensors(out: Any) -> list[Tensor]:
    """Raw outputs of a head in training mode."""
    if isinstance(out, dict):
        return [t for key, value in out.items() if key != "feats" for t in tensors(value)]
    return [out]


def loss(model: nn.Module, seed: int = 0) -> Tensor:
    """With fixed statistics: batch statistics would hide a shift that the next batch norm takes out again."""
    for layer in model.train().modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    image = models.images(2, seed=seed).to(next(model.parameters()).dtype)
    return torch.stack([t.square().mean() for t in tensors(model(image))]).sum()


def trained(name: str, optimizer_name: str) -> tuple[Any, torch.optim.Optimizer]:
    """A model after one step of the optimizer that the stock trainer builds."""
    model = models.build(name).float().train()
    optimizer = BaseTrainer.build_optimizer(None, model, name=optimizer_name, lr=1e-3, momentum=0.9, decay=5e-4)
    loss(model).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def sliced(tensor: Tensor, dims: dict[int, tuple[int, ...]]) -> Tensor:
    for dim, kept in dims.items():
        tensor = torch.stack([tensor.select(dim, i) for i in kept], dim)
    return tensor


@pytest.mark.parametrize("name", models.FAMILIES)
def test_every_tensor_holds_the_kept_slices_and_the_rest_is_left_alone(name: str) -> None:
    cut, model = models.plan_of(name, target_flops=0.5), models.build(name)
    before = models.snapshot(model)
    surgery.apply(model, cut)
    after = model.state_dict()
    assert list(after) == list(before)
    for tensor, value in after.items():
        assert torch.equal(value, sliced(before[tensor], cut.keep.get(tensor, {}))), tensor


def test_parameters_are_new_and_an_old_graph_still_works() -> None:
    model = models.build("yolo26-tiny")
    before = dict(model.named_parameters())
    values = {n: p.detach().clone() for n, p in before.items()}
    last = loss(model)
    replaced = surgery.apply(model, plan())
    after = dict(model.named_parameters())
    for name, parameter in before.items():
        if name in plan().keep:
            assert replaced[parameter] is after[name]
            assert type(after[name]) is nn.Parameter
            assert after[name].is_leaf
        else:
            assert after[name] is parameter
        assert torch.equal(parameter, values[name])
    assert len(replaced) == sum(n in plan().keep for n in before)
    last.backward()
    assert all(before[n].grad is not None and after[n].grad is None for n in plan().keep if n in before)


def test_gradients_go_with_the_old_parameters() -> None:
    model = models.build("yolo26-tiny")
    loss(model).backward()
    surgery.apply(model, plan())
    assert all(p.grad is None for n, p in model.named_parameters() if n in plan().keep)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    model = models.build("yolo26-tiny").to(dtype)
    surgery.apply(model, plan())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {b.dtype for n, b in model.named_buffers() if "num_batches" not in n} == {dtype}
    assert {b.dtype for n, b in model.named_buffers() if "num_batches" in n} == {torch.int64}


def test_requires_grad_is_kept_one_by_one() -> None:
    model = models.build("yolo26-tiny")
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != 0)
    wanted = [p.requires_grad for p in model.parameters()]
    surgery.apply(model, plan())
    assert [p.requires_grad for p in model.parameters()] == wanted


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_memory_format_is_kept(layout: torch.memory_format) -> None:
    model: Any = models.build("yolo26-tiny").to(memory_format=layout)
    surgery.apply(model, plan())
    filters = {n: p for n, p in model.named_parameters() if p.ndim == 4}
    assert all(p.is_contiguous(memory_format=layout) for p in filters.values())
    other = torch.contiguous_format if layout is torch.channels_last else torch.channels_last
    assert any(n in plan().keep and not p.is_contiguous(memory_format=other) for n, p in filters.items())


def test_mode_names_and_number_of_batches_stay() -> None:
    model = models.build("yolo26-tiny").eval()
    model.model[0].bn.num_batches_tracked.fill_(7)
    names = [n for n, _ in model.named_modules()]
    surgery.apply(model, plan())
    assert not any(m.training for m in model.modules())
    assert [n for n, _ in model.named_modules()] == names
    assert model.model[0].bn.num_batches_tracked == 7


@pytest.mark.parametrize("name", [*models.FAMILIES, *models.DEEP])
def test_layers_remember_the_widths_they_have(name: str) -> None:
    model = models.build(name)
    surgery.apply(model, models.plan_of(name, target_flops=0.6, channels_round_to=1))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            assert (layer.out_channels, layer.in_channels // layer.groups) == layer.weight.shape[:2]
            assert layer.groups in (1, layer.out_channels)
        elif isinstance(layer, nn.BatchNorm2d):
            assert layer.num_features == len(layer.weight) == len(layer.running_mean)


@pytest.mark.parametrize("name", [*models.FAMILIES, *models.DEEP])
def test_blocks_remember_the_widths_they_have(name: str) -> None:
    model, dense = models.build(name), dict(models.shared(name).named_modules())
    surgery.apply(model, models.plan_of(name, target_flops=0.6, channels_round_to=1))
    changed = 0
    for path, block in model.named_modules():
        was: Any = dense[path]
        if isinstance(block, C2f | C2PSA):
            assert 2 * block.c == block.cv1.conv.out_channels
            changed += block.c != was.c
        elif isinstance(block, Attention):
            assert block.num_heads == was.num_heads
            assert block.num_heads * block.head_dim == block.pe.conv.groups == block.qkv.conv.in_channels
            assert block.num_heads * (2 * block.key_dim + block.head_dim) == block.qkv.conv.out_channels
            assert block.scale == was.scale  # set by the width it was trained at
            assert isinstance(block.key_dim, int)
            changed += block.head_dim != was.head_dim
    assert changed


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolo26-deep"])
def test_the_export_s_way_through_a_block_agrees(name: str) -> None:
    model = models.build(name)
    surgery.apply(model, models.plan_of(name, target_flops=0.6))
    found: list[Tensor] = []
    for block in model.modules():
        if isinstance(block, C2f):
            block.register_forward_hook(
                lambda block, args, out: found.append((block.forward_split(*args) - out).abs().max())
            )
    with torch.no_grad():
        model.eval()(models.images())
    assert len(found) >= 8
    assert max(found) == 0


def test_the_average_and_any_copy_are_cut_alike() -> None:
    model = models.build("yolo26-tiny")
    average = deepcopy(model).float().requires_grad_(False)
    surgery.apply(model, plan())
    surgery.apply(average, plan())
    assert models.same_bits(models.snapshot(average), models.snapshot(model.float()))


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_an_optimizer_carries_on_with_the_kept_channels(optimizer_name: str) -> None:
    model, optimizer = trained("yolo26-tiny", optimizer_name)
    names = {p: n for n, p in model.named_parameters()}
    order = [[names[p] for p in g["params"]] for g in optimizer.param_groups]
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    state = {names[p]: {k: deepcopy(v) for k, v in s.items()} for p, s in optimizer.state.items()}
    replaced = surgery.apply(model, plan())
    surgery.apply_to_optimizer(optimizer, replaced, model, plan())

    names = {p: n for n, p in model.named_parameters()}
    assert [[names.get(p) for p in g["params"]] for g in optimizer.param_groups] == order
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == settings
    assert {names.get(p) for p in optimizer.state} == set(state)
    moments = 0
    for parameter, now in optimizer.state.items():
        was = state[names[parameter]]
        assert list(now) == list(was)
        for key, value in now.items():
            if isinstance(value, Tensor) and value.ndim:
                assert torch.equal(value, sliced(was[key], plan().keep.get(names[parameter], {}))), key
                assert value.shape == parameter.shape
                moments += 1
            else:
                assert value == was[key]
    assert moments >= len(state)

    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss(model, seed=1).backward()
    optimizer.step()
    still = [n for n, p in model.named_parameters() if p.requires_grad and torch.equal(p, weights[n])]
    assert still == []
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_stock_optimizer_is_the_one_with_two_kinds_of_momentum() -> None:
    _, optimizer = trained("yolov8-tiny", "MuSGD")
    assert isinstance(optimizer, MuSGD)
    assert {"momentum_buffer", "momentum_buffer_SGD"} in [set(s) for s in optimizer.state.values()]


def test_an_optimizer_s_state_survives_saving_after_a_cut() -> None:
    model, optimizer = trained("yolo26-tiny", "AdamW")
    surgery.apply_to_optimizer(optimizer, surgery.apply(model, plan()), model, plan())
    fresh = BaseTrainer.build_optimizer(None, model, name="AdamW", lr=1e-3)
    fresh.load_state_dict(deepcopy(optimizer.state_dict()))
    for parameter, state in optimizer.state.items():
        assert all(torch.equal(value, fresh.state[parameter][key]) for key, value in state.items())


def test_an_optimizer_before_its_first_step_can_be_cut() -> None:
    model = models.build("yolo26-tiny").float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    surgery.apply_to_optimizer(optimizer, surgery.apply(model, plan()), model, plan())
    assert not optimizer.state
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]


def test_an_optimizer_of_some_parameters_gets_no_others() -> None:
    model = models.build("yolo26-tiny").float()
    optimizer = torch.optim.SGD(model.model[-1].parameters(), lr=0.1)
    surgery.apply_to_optimizer(optimizer, surgery.apply(model, plan()), model, plan())
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.model[-1].parameters()]


def refused(model: nn.Module, wrong: Plan, message: str) -> None:
    before = models.snapshot(model)
    parameters = list(model.parameters())
    numbers = [{k: v for k, v in vars(m).items() if isinstance(v, int)} for m in model.modules()]
    with pytest.raises(PlanError, match=message):
        surgery.apply(model, wrong)
    assert models.same_bits(models.snapshot(model), before)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [{k: v for k, v in vars(m).items() if isinstance(v, int)} for m in model.modules()] == numbers


def test_a_plan_for_another_architecture_is_refused() -> None:
    refused(models.build("yolov8-tiny"), plan(), r"made for another model: .*'model\.\S+'")


def test_a_plan_for_another_scale_is_refused_with_both_shapes() -> None:
    message = r"another model: 'model\.\S+' has shape \(\d+.*\) here but \(\d+.*\) in the plan\. Make a new plan"
    refused(models.build("yolo26n"), plan(), message)


def test_a_plan_is_not_applied_twice() -> None:
    model = models.build("yolo26-tiny")
    surgery.apply(model, plan())
    refused(model, plan(), r"another model: 'model\.\S+' has shape")


def with_keep(tensor: str, dims: dict[int, tuple[int, ...]]) -> Plan:
    return replace(plan(), keep={**plan().keep, tensor: dims})


def test_a_plan_with_an_impossible_index_is_refused_before_anything_is_cut() -> None:
    last = list(plan().keep)[-1]
    refused(models.build("yolo26-tiny"), with_keep(last, {0: (0, 4096)}), f"damaged: kept indices of '{last}'")


def test_a_plan_for_a_missing_tensor_is_refused_before_anything_is_cut() -> None:
    wrong = with_keep("model.99.conv.weight", {0: (0,)})
    wrong = replace(wrong, shapes={**wrong.shapes, "model.99.conv.weight": (2, 2)})
    refused(models.build("yolo26-tiny"), wrong, r"this model has no 'model\.99\.conv\.weight'")


@pytest.mark.parametrize(("module", "key"), [("model.2", "d"), ("model.99", "c"), ("model.2", "training")])
def test_a_plan_for_an_attribute_that_is_no_width_is_refused(module: str, key: str) -> None:
    wrong = replace(plan(), attributes={**plan().attributes, module: {key: 1}})
    refused(models.build("yolo26-tiny"), wrong, f"'{module}' has no width '{key}' here")


def test_a_layer_that_cannot_be_cut_is_refused_before_anything_is_cut() -> None:
    model = models.build("yolo26-tiny")
    model.extra = nn.MultiheadAttention(4, 2).double()
    wrong = with_keep("extra.in_proj_weight", {0: (0, 1)})
    wrong = replace(wrong, shapes={**wrong.shapes, "extra.in_proj_weight": (12, 4)})
    refused(model, wrong, "'extra.in_proj_weight' belongs to a MultiheadAttention")


def test_what_was_applied_can_be_checked() -> None:
    model = models.build("yolo26-tiny")
    with pytest.raises(PlanError, match=r"'model\.\S+' has shape .*, but must have .* after pruning"):
        surgery.check_applied(model, plan())
    surgery.apply(model, plan())
    surgery.check_applied(model, plan())
