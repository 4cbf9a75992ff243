# SPDX-License-Identifier: AGPL-3.0-or-later
"""Blocks of Ultralytics that are not as the rules of this package were written for them, as in another release."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import models
import oracle
import pytest
import torch
import zoo
from torch import Tensor, nn
from ultralytics.nn.modules.block import AAttn, Attention, C2f, RepVGGDW
from ultralytics.nn.modules.conv import RepConv
from ultralytics.nn.modules.head import Detect

from yolo_prune.cut import surgery
from yolo_prune.cut.plan import Plan
from yolo_prune.cut.proof import prove
from yolo_prune.errors import ProofError, UnsupportedModelError
from yolo_prune.graph import blocks, register_block, rules, trace
from yolo_prune.planning.planner import make_plan

Patch = pytest.MonkeyPatch
RULED = blocks.__name__  # its import registers the rules


def thin(name: str) -> Any:
    return zoo.randomise(zoo.build(name, 0.25 if name == "yolo12" else 0.125).double())


def each(model: nn.Module, cls: type[nn.Module]) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, cls)]


def plan_of(model: nn.Module, name: str) -> Plan:
    recipe = models.recipe(target_flops=0.7, channels_round_to=1, channels_min=1)
    return make_plan(model, recipe, 2 * zoo.image_size(name))


def cut(model: nn.Module, name: str) -> Plan:
    """Plan and cut a copy; the proof and the oracle find the cut exact."""
    plan = plan_of(model, name)
    assert prove(model, plan).error < 1e-9
    pruned = deepcopy(model)
    surgery.apply(pruned, plan)
    assert oracle.judge(model, pruned, name) < oracle.TOLERANCE
    return plan


def without(name: str) -> Callable[[Any, Patch], None]:
    """An attribute that no forward reads is not there."""
    return lambda block, _: delattr(block, name)


def renamed(cls: type[nn.Module], old: str, new: str) -> Callable[[Any, Patch], None]:
    """An attribute has another name, also in the forward, which finds it under the old one only while it runs."""
    stock = cls.forward

    def forward(self: Any, x: Tensor) -> Any:
        vars(self)[old] = vars(self)[new]
        try:
            return stock(self, x)
        finally:
            del vars(self)[old]

    def change(block: Any, monkeypatch: Patch) -> None:
        vars(block)[new] = vars(block).pop(old)
        monkeypatch.setattr(cls, "forward", forward)

    return change


def doubled(name: str) -> Callable[[Any, Patch], None]:
    """The attribute is there, but means something else."""
    return lambda block, _: setattr(block, name, 2 * getattr(block, name))


def child_renamed(block: Any, monkeypatch: Patch) -> None:
    """The second convolution of a bottleneck has another name."""
    block.last = block.cv2
    del block.cv2

    def forward(self: Any, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.last(torch.cat(y, 1))

    monkeypatch.setattr(C2f, "forward", forward)
    del block.c


def deeper(head: Any, _: Patch) -> None:
    """The twin of a branch has one layer more."""
    head.one2one_cv2[0].append(nn.Identity())


@pytest.mark.parametrize(
    ("name", "cls", "change", "misfit"),
    [
        ("yolov8", C2f, without("c"), "AttributeError: 'C2f' object has no attribute 'c'"),
        ("yolov8", C2f, doubled("c"), "output channels, not "),
        ("yolov8", C2f, child_renamed, "AttributeError: 'C2f' object has no attribute 'c'"),
        ("yolo11", Attention, renamed(Attention, "key_dim", "width"), "'Attention' object has no attribute 'key_dim'"),
        ("yolo12", AAttn, renamed(AAttn, "num_heads", "count"), "'AAttn' object has no attribute 'num_heads'"),
        ("yolov9t", RepConv, without("c1"), "'c1' is not of type int"),
        ("yolov9t", RepConv, doubled("c2"), "'c2' is 32, not 16"),
        ("yolov10n", RepVGGDW, without("dim"), "'dim' is not of type int"),
        ("yolo26", Detect, deeper, "ValueError: zip() argument 2 is shorter than argument 1"),
    ],
)
def test_a_block_that_its_rule_does_not_fit_is_traced_and_cut_exactly(
    name: str, cls: type[nn.Module], change: Any, misfit: str, monkeypatch: Patch
) -> None:
    model = thin(name)
    for block in each(model, cls):
        change(block, monkeypatch)
    stated = rules.gather(model)
    assert stated.unfit == set(each(model, cls)) != set()
    assert any(f"the rule for {cls.__name__} does not fit (" in r and misfit in r for r in stated.reasons.values())
    cut(model, name)


def test_the_plan_says_why_a_block_is_not_pruned(monkeypatch: Patch) -> None:
    model = thin("yolo11")
    for block in each(model, Attention):
        renamed(Attention, "key_dim", "width")(block, monkeypatch)
    reason = "the rule for Attention does not fit (AttributeError: 'Attention' object has no attribute 'key_dim')"
    (part,) = (p for p in plan_of(model, "yolo11").protected if p.reason == reason)
    assert "model.10.m.0.attn.qkv.conv" in part.layers


def early_area_attention(self: Any, x: Tensor) -> Tensor:
    """The forward before Ultralytics 8.4.60: the input has as many channels as all heads together."""
    (batch, c, h, w), area = x.shape, self.area
    qkv = self.qkv(x).flatten(2).transpose(1, 2).reshape(batch * area, h * w // area, c * 3)
    qkv = qkv.view(*qkv.shape[:2], self.num_heads, self.head_dim * 3).permute(0, 2, 3, 1)
    q, k, v = qkv.split([self.head_dim] * 3, dim=2)
    x = v @ ((q.transpose(-2, -1) @ k) * self.head_dim**-0.5).softmax(-1).transpose(-2, -1)
    x, v = (t.permute(0, 3, 1, 2).reshape(batch, h, w, c).permute(0, 3, 1, 2).contiguous() for t in (x, v))
    return self.proj(x + self.pe(v))


@pytest.mark.parametrize("heads", ["dims", "heads"])
def test_area_attention_of_early_releases_is_pruned(heads: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(AAttn, "forward", early_area_attention)
    monkeypatch.delattr(AAttn, "__setstate__")  # which would give copies the attribute
    model = zoo.randomise(zoo.build("yolo12").double())
    for block in each(model, AAttn):
        del block.all_head_dim
    assert not rules.gather(model, heads).unfit
    plan = make_plan(model, models.recipe(target_flops=0.5, channels_attention=heads), 64)
    assert prove(model, plan).error < 1e-9
    named = {"dims": "head_dim", "heads": "num_heads"}[heads]
    assert any(named in values for values in plan.attributes.values())


def test_a_block_of_the_user_that_inherits_a_rule_may_differ_too() -> None:
    class Own(C2f):
        pass

    model = models.build("yolov8-tiny")
    model.model[2].__class__ = Own
    model.model[2].c += 1
    assert rules.gather(model).unfit == {model.model[2]}
    cut(model, "yolov8")


class Peeks:
    """Forwards that no trace follows, or that a cut changes."""

    stock = C2f.forward

    def at_values(self, x: Tensor) -> Tensor:
        return Peeks.stock(self, x) * float(x.sum() > 0)  # type: ignore[arg-type]

    def at_its_width(self, x: Tensor) -> Tensor:
        return Peeks.stock(self, x) * self.cv1.conv.out_channels  # type: ignore[arg-type, attr-defined]


def test_a_misfit_of_ultralytics_that_cannot_be_traced_is_an_error(monkeypatch: Patch) -> None:
    model = models.build("yolov8-tiny")
    del model.model[2].c
    monkeypatch.setattr(C2f, "forward", Peeks.at_values)
    with pytest.raises(UnsupportedModelError, match=r"'model\.2' \(C2f\) cannot be traced"):
        trace(model, imgsz=64)


def test_a_misfit_of_ultralytics_whose_cut_is_refuted_is_an_error(monkeypatch: Patch) -> None:
    model = models.build("yolov8-tiny")
    del model.model[2].c
    monkeypatch.setattr(C2f, "forward", Peeks.at_its_width)
    with pytest.raises(ProofError, match="does not compute what silencing its channels computes"):
        prove(model, plan_of(model, "yolov8"))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda block, facts: facts.attribute("cc", facts.outputs("cv1")), r"'cc', but 'model\.2\.cc' is not of type"),
        (lambda block, facts: facts.outputs("cv9"), r"rule for C2f fails on 'model\.2': AttributeError"),
        (lambda block, facts: facts.parts("cv1", block.c), r"'model\.2\.cv1\.conv' has 16.*rule for C2f expects 8\."),
    ],
)
def test_a_mistake_in_a_rule_of_the_user_is_an_error_also_for_a_block_of_ultralytics(
    rule: Any, message: str, monkeypatch: Patch
) -> None:
    mine = rules.RULES.copy()
    del mine[C2f]
    monkeypatch.setattr(rules, "RULES", mine)
    register_block(C2f)(rule)
    with pytest.raises(UnsupportedModelError, match=message):
        trace(models.build("yolov8-tiny"), imgsz=64)
