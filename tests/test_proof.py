# SPDX-License-Identifier: AGPL-3.0-or-later
"""The proof: holds for right plans, names the layer where a wrong one goes wrong, and leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel

from yolo_prune.cut.copies import lean_copy
from yolo_prune.cut.plan import Plan
from yolo_prune.cut.proof import prove
from yolo_prune.errors import PlanError, ProofError
from yolo_prune.planning.planner import build_plan

OUT = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")


def plan(name: str = "yolo11-tiny") -> Plan:
    return models.plan_of(name, target_flops=0.6)


def with_keep(base: Plan, changes: dict[str, dict[int, tuple[int, ...]]]) -> Plan:
    keep = {**base.keep, **{name: {**base.keep.get(name, {}), **dims} for name, dims in changes.items()}}
    return replace(base, keep=keep)


def exchanged(kept: tuple[int, ...], size: int) -> tuple[int, ...]:
    """One kept index given up for one that was removed."""
    return tuple(sorted({*kept[1:], next(i for i in range(size) if i not in kept)}))


def refuted(name: str, wrong: Plan, layer: str, how: str = "does not compute what silencing") -> None:
    model = models.build(name)
    before = models.snapshot(model)
    with pytest.raises(ProofError, match=rf"The pruned model {how}.*differs is '{layer}'.*The model is unchanged"):
        prove(model, wrong)
    assert models.same_bits(models.snapshot(model), before)


@pytest.mark.parametrize("name", [*models.FAMILIES, *models.DEEP])
def test_the_proof_of_a_right_plan_holds_and_is_not_vacuous(name: str) -> None:
    proof = prove(models.shared(name), plan(name))
    assert proof.error < 1e-10
    assert proof.effect > 1e-2
    assert proof.seconds > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_proof_holds_at_the_precision_of_a_checkpoint(dtype: torch.dtype) -> None:
    model = models.build("yolo26-tiny").to(dtype)
    assert prove(model, plan("yolo26-tiny")).error < 1e-10
    assert {p.dtype for p in model.parameters()} == {dtype}


def in_blocks(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution that adds its input channels up in blocks of five: as another machine's library might."""
    if layer.groups > 1 or isinstance(layer.padding, str):
        return nn.functional.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    parts = zip(x.split(5, 1), weight.split(5, 1), strict=True)
    total = sum(nn.functional.conv2d(a, w, None, layer.stride, layer.padding, layer.dilation) for a, w in parts)
    return total if bias is None else total + bias[:, None, None]


@pytest.mark.parametrize("fresh", [False, True], ids=["random", "as built"])
@pytest.mark.parametrize("name", models.FAMILIES)
def test_the_proof_holds_whatever_the_order_of_summation(
    name: str, fresh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here, removing zeros leaves every sum the same to the last bit; that is luck of the library, not the proof's."""
    model = DetectionModel(f"{name}.yaml", nc=3, verbose=False) if fresh else models.shared(name)
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", in_blocks)
    assert 0 < prove(model, plan(name)).error < 1e-9


def test_every_wrong_input_channel_is_found_where_it_is() -> None:
    consumers = [n for n, dims in plan().keep.items() if 1 in dims]
    assert len(consumers) > 20
    for tensor in consumers[::3]:
        kept, size = plan().keep[tensor][1], plan().shapes[tensor][1]
        wrong = with_keep(plan(), {tensor: {1: exchanged(kept, size)}})
        refuted("yolo11-tiny", wrong, tensor.removesuffix(".weight"))


def test_a_wrong_channel_of_a_batch_norm_is_found() -> None:
    for key in ("weight", "bias", "running_mean", "running_var"):
        tensor = f"model.4.cv2.bn.{key}"
        kept, size = plan().keep[tensor][0], plan().shapes[tensor][0]
        refuted("yolo11-tiny", with_keep(plan(), {tensor: {0: exchanged(kept, size)}}), r"model\.4\.cv2\.bn")


def test_unequal_halves_are_found_behind_the_split() -> None:
    """As many rows as before, but one more of the first half and one less of the second."""
    base = models.plan_of("yolov8n", target_flops=0.5)
    kept, half = base.keep["model.8.cv1.conv.weight"][0], base.shapes["model.8.cv1.conv.weight"][0] // 2
    more = next(i for i in range(half) if i not in kept)
    less = next(i for i in kept if i >= half)
    rows = tuple(sorted({*kept, more} - {less}))
    wrong = with_keep(base, {f"model.8.cv1.{key}": {0: rows} for key in OUT})
    refuted("yolov8n", wrong, r"model\.8\.m\.0\.cv1\.conv")


def test_the_first_half_s_channels_for_the_second_s_are_found() -> None:
    base = models.plan_of("yolov8n", target_flops=0.5)
    tensor = "model.12.cv2.conv.weight"  # reads both halves and the bottleneck behind the second
    kept, half = base.keep[tensor][1], base.shapes["model.12.cv1.conv.weight"][0] // 2
    first, second = [i for i in kept if i < half], [i - half for i in kept if half <= i < 2 * half]
    assert len(first) == len(second)
    assert first != second
    turned = tuple(second + [i + half for i in first] + [i for i in kept if i >= 2 * half])
    refuted("yolov8n", with_keep(base, {tensor: {1: turned}}), r"model\.12\.cv2\.conv")


def by_head(kept: tuple[int, ...], size: int) -> list[list[int]]:
    return [[i - start for i in kept if start <= i < start + size] for start in range(0, max(kept) + 1, size)]


def test_channels_of_one_head_given_to_another_are_found() -> None:
    base = models.plan_of("yolo11n", target_flops=0.5)
    path = "model.10.m.0.attn"
    attention: Any = models.shared("yolo11n").model[10].m[0].attn
    heads = by_head(base.keep[f"{path}.pe.conv.weight"][0], attention.head_dim)
    assert len(heads) == 2
    assert heads[0] != heads[1]
    turned = tuple(heads[1] + [i + attention.head_dim for i in heads[0]])
    refuted("yolo11n", with_keep(base, {f"{path}.pe.{key}": {0: turned} for key in OUT}), rf"{path}\.pe\.conv")
    refuted("yolo11n", with_keep(base, {f"{path}.proj.conv.weight": {1: turned}}), rf"{path}\.proj\.conv")


def test_keys_that_do_not_belong_to_their_queries_are_found() -> None:
    path, graph = "model.10.m.0.attn", models.graph_of("yolo11n")
    attention: Any = models.shared("yolo11n").model[10].m[0].attn
    size = attention.key_dim
    group = next(g for g in graph.groups if g.name.startswith(f"{path}.qkv"))
    halves = {s.name: tuple(range(i, s.size, 2)) for i, s in enumerate(group.sets)}
    base = build_plan(graph, models.cost_of("yolo11n"), halves, {})
    assert prove(models.shared("yolo11n"), base).error < 1e-10
    kept = base.keep[f"{path}.qkv.conv.weight"][0]
    keys = tuple(i - size for i in kept if size <= i < 2 * size)
    assert len(keys) == size // 2
    rows = tuple(sorted({i for i in kept if not size <= i < 2 * size} | {i + size for i in exchanged(keys, size)}))
    refuted("yolo11n", with_keep(base, {f"{path}.qkv.{key}": {0: rows} for key in OUT}), rf"{path}\.proj\.conv")


def test_a_plan_after_which_the_model_does_not_run_is_refuted_naming_the_layer() -> None:
    kept = plan().keep["model.5.conv.weight"][1]
    wrong = with_keep(plan(), {"model.5.conv.weight": {1: kept[1:]}})
    refuted("yolo11-tiny", wrong, r"model\.5\.conv", how=r"does not run \(.*channels")


def test_a_wrong_width_of_an_attention_is_refuted() -> None:
    base = models.plan_of("yolo11n", target_flops=0.5)
    wrong = {"model.10.m.0.attn": {**base.attributes["model.10.m.0.attn"], "head_dim": 24}}
    layer = r"model\.10\.m\.0\.attn\.\S+"
    refuted("yolo11n", replace(base, attributes={**base.attributes, **wrong}), layer, how="does not run")


def test_an_activation_that_silence_does_not_pass_is_refuted() -> None:
    """A sigmoid makes 0.5 of a silenced channel, so that taking it out changes what comes after."""
    model = models.build("yolo11-tiny")
    model.model[5].act = nn.Sigmoid()
    assert "model.5.conv.weight" in plan().keep
    with pytest.raises(ProofError, match=r"differs is 'model\.6\.cv1\.conv'"):
        prove(model, plan())


def test_a_wrong_channel_is_found_though_its_activation_is_dead() -> None:
    """On the proof's image, ReLU makes 0 of the channels that are exchanged; on another it may not."""
    model = models.build("yolo11-tiny")
    model.model[5].act = nn.ReLU()
    model.model[5].bn.bias.data[:] = -1e3
    tensor = "model.6.cv1.conv.weight"
    kept, size = plan().keep[tensor][1], plan().shapes[tensor][1]
    assert prove(model, plan()).error < 1e-10
    with pytest.raises(ProofError, match=r"differs is 'model\.6\.cv1\.conv'"):
        prove(model, with_keep(plan(), {tensor: {1: exchanged(kept, size)}}))


def test_weights_that_are_not_numbers_prove_nothing() -> None:
    model = models.build("yolo11-tiny")
    model.model[2].cv2.conv.weight.data[:] = float("nan")
    with pytest.raises(ProofError, match=r"differs is 'model\.2\.cv2\.conv'"):
        prove(model, plan())


def test_a_plan_for_another_model_is_refused() -> None:
    with pytest.raises(PlanError, match="made for another model"):
        prove(models.shared("yolov8-tiny"), plan("yolo26-tiny"))


def test_proving_leaves_no_trace() -> None:
    model: Any = models.build("yolo26-tiny").float().eval()
    model.model[3].train()
    model.criterion = object()
    model.model[0].register_forward_hook(lambda *_: pytest.fail("the model itself was run"))
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
        parameter.grad = torch.ones_like(parameter)
    before, random = models.snapshot(model), torch.get_rng_state()
    tensors = {n: (id(t), t._version) for n, t in model.state_dict(keep_vars=True).items()}
    facts = [{k: v for k, v in vars(m).items() if isinstance(v, bool | int | float)} for m in model.modules()]
    gradients, criterion = [p.requires_grad for p in model.parameters()], model.criterion
    prove(model, plan("yolo26-tiny"))
    assert models.same_bits(models.snapshot(model), before)
    assert {n: (id(t), t._version) for n, t in model.state_dict(keep_vars=True).items()} == tensors
    assert [{k: v for k, v in vars(m).items() if isinstance(v, bool | int | float)} for m in model.modules()] == facts
    assert [p.requires_grad for p in model.parameters()] == gradients
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert model.criterion is criterion
    assert len(model.model[0]._forward_hooks) == 1
    assert torch.equal(torch.get_rng_state(), random)


class Run:
    """Something big that hangs on a model while it trains."""

    def __deepcopy__(self, memo: object) -> object:
        raise AssertionError("the run was copied")

    def watch(self, *_: object) -> None:
        raise AssertionError("the run saw the proof's image")


def test_a_copy_for_the_proof_leaves_loss_and_hooks_behind() -> None:
    model: Any = models.build("yolo26-tiny")
    model.criterion = run = Run()
    model.model[0].register_forward_hook(run.watch)
    model.model[1].register_forward_pre_hook(run.watch)
    copy = lean_copy(model)
    assert copy.criterion is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in copy.modules())
    assert copy.model[0]._forward_hooks is not copy.model[1]._forward_hooks
    assert model.criterion is run
    assert len(model.model[0]._forward_hooks) == len(model.model[1]._forward_pre_hooks) == 1
