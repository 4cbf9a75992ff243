# SPDX-License-Identifier: AGPL-3.0-or-later
"""Blocks with habits of their own, none with a rule: randomness, state, casts, image sizes, modes, and errors."""

from __future__ import annotations

import random
import threading
import warnings
from copy import deepcopy
from typing import Any

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_strangers import Block, C, halved, model_with
from torch import Tensor, nn

import yolo_prune
from yolo_prune.cut import passes, surgery
from yolo_prune.cut.copies import bare_copy
from yolo_prune.cut.plan import Plan
from yolo_prune.cut.proof import prove
from yolo_prune.errors import ProofError, UnsupportedModelError
from yolo_prune.graph import rules, trace
from yolo_prune.planning import planner
from yolo_prune.planning.cost import cost_of


class SkippedBranch(Block):
    """Leaves its second convolution out, by chance."""

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device).bernoulli_(0.5)
        return x + self.b(self.a(x)) * (keep if self.training else 1)


class DroppedChannels(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(self.a(x), 0.4, self.training))


class Noisy(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y * torch.randn_like(y)) if self.training else self.b(y)


class Gumbel(Block):
    def forward(self, x: Tensor) -> Tensor:
        gate = F.gumbel_softmax(torch.stack([x.mean((1, 2, 3)), x.amax((1, 2, 3))], 1), dim=1)
        return self.b(self.a(x)) * gate[:, :1, None, None]


class Lottery(Block):
    """Draws from the generators of Python and of numpy."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * random.random()) * float(np.random.rand())


class Counting(Block):
    """Has a factor that rises with every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.b(self.a(x)) * self.passes


class OwnStatistics(Block):
    """Divides by a moving average of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.mul_(0.5).add_(0.5 * x.square().mean())
        return self.b(self.a(x)) / self.scale


class OnlySquares(Block):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] != x.shape[3]:
            raise ValueError(f"expected a square, got {tuple(x.shape[2:])}")
        return self.b(self.a(x))


class OneSize(Block):
    """Adds a table of positions in the resolution of training."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.rand(1, C, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.table)


class SinglePrecision(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type if x.device.type != "meta" else "cpu", enabled=False):
            return self.b(self.a(x.float()))


class KnowsItsWidth(Block):
    def forward(self, x: Tensor) -> Tensor:
        if self.a.in_channels != C:
            raise AssertionError(f"expected {C} channels\n")
        return self.b(self.a(x))


class FactorInEvaluation(Block):
    """Multiplies by a ratio of widths, but only in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y if self.training else y * (C / self.b.in_channels))


class AssertionInEvaluation(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if not self.training and self.b.in_channels != C:
            raise LookupError("no such width")
        return self.b(y)


class NeverRuns(Block):
    def forward(self, x: Tensor) -> Tensor:
        if not x.is_meta:
            raise KeyError("no table for this image")
        return self.a(x)


class ChoosesItsForward(Block):
    def __init__(self) -> None:
        super().__init__()
        self.forward = self.one_after_the_other

    def one_after_the_other(self, x: Tensor) -> Tensor:
        return self.b(F.silu(self.a(x)))


class KeepsAMethod(Block):
    def __init__(self) -> None:
        super().__init__()
        self.gate = self.gate_of

    def gate_of(self, x: Tensor) -> Tensor:
        return self.b(x).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.gate(x)


class KeepsAFunction(Block):
    def __init__(self) -> None:
        super().__init__()
        self.first = lambda x: F.silu(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.first(x))


class KeepsAList(Block):
    def __init__(self) -> None:
        super().__init__()
        self.steps = [self.a, {"last": self.b}]

    def forward(self, x: Tensor) -> Tensor:
        return self.steps[1]["last"](self.steps[0](x))


class CollectsByHook(Block):
    """Reads the output of a child from a list that a hook fills: a method of the block, or a function."""

    def __init__(self, method: bool = True) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.a.register_forward_hook(self.collect if method else lambda module, _, out: self.seen.append(out))

    def collect(self, module: nn.Module, inputs: Any, out: Tensor) -> None:
        self.seen.append(out)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.clear()
        self.a(x)
        return self.b(self.seen[0])


class CollectsByFunction(CollectsByHook):
    def __init__(self) -> None:
        super().__init__(method=False)


class NamedLikeHooks(Block):
    def __init__(self) -> None:
        super().__init__()
        self.my_hooks, self.shape = {"factor": 2}, (2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * self.my_hooks["factor"] * self.shape[1]


class CachesTensors(Block):
    def __init__(self) -> None:
        super().__init__()
        self.ramp, self.last = torch.linspace(0, 1, 3), None

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) * self.ramp[int(self.ramp.argmax())]
        self.last = y
        return self.b(y)


class NamesTypes(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        ramp = torch.arange(x.shape[3]).type(y.type()) * torch.ones(1).type(torch.FloatTensor)
        return self.b(y.type(x.type()) * ramp)


class ConstantsOnTheCPU(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.linspace(0, 1, x.shape[3]).to(x.dtype) * self.a(x).to("cpu"))


class FilledOnTheCPU(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(x.shape, dtype=x.dtype)
        y[:, :] = self.a(x)
        return y


class Compiled(Block):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.b = torch.jit.script(nn.Sequential(self.b, nn.ReLU()).double())
        self.c = nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(self.b(x)))


class Gated(Block):
    """A channel gate with a batch norm without positions."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.norm, self.excite = nn.Linear(C, 8), nn.BatchNorm1d(8), nn.Linear(8, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return x * self.excite(self.norm(self.squeeze(x.mean((2, 3)))).relu()).sigmoid()[..., None, None]


class LooksAtValues(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if float(x.sum()) > 0 else self.b(x)


class MissesAKey(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.b({"cpu": self.a, "cuda": self.a}[x.device.type](x))


class Broken(Block):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("nothing for\nany image")


class ConstantAfterActivation(Block):
    """Adds one learned number to all channels, so that a silenced channel is not 0."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shift, self.c = nn.Parameter(torch.rand(shape or (1,))), nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(F.relu(self.a(x)) + self.shift))


class TableAfterActivation(ConstantAfterActivation):
    """Adds the same learned positions to all channels."""

    def __init__(self) -> None:
        super().__init__(1, 1, 16, 16)


class ShiftPerChannel(ConstantAfterActivation):
    def __init__(self) -> None:
        super().__init__(1, C, 1, 1)


class SoftSign(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.softsign(self.a(x)))


class GatedByOneVector(Block):
    """A linear layer without a batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * self.gate(x.mean((0, 2, 3))).sigmoid()[:, None, None]


TWINS = (
    *(ChoosesItsForward, KeepsAMethod, KeepsAFunction, KeepsAList, CollectsByHook, CollectsByFunction, NamedLikeHooks),
    *(CachesTensors, NamesTypes, ConstantsOnTheCPU, Compiled, Gated, ShiftPerChannel, SoftSign),
)
CUT = (SkippedBranch, DroppedChannels, Noisy, Gumbel, Lottery, Counting, OwnStatistics, OnlySquares, OneSize)


def cut_in_half(block: type[Block]) -> tuple[Any, Any]:
    model = model_with(block)
    graph = trace(model, imgsz=64)
    assert any("model.2.1.a" in g.layers and not g.protected for g in graph.groups)
    return model, halved(model, graph)


@pytest.mark.parametrize("block", CUT)
def test_randomness_state_and_sizes_do_not_refute_a_right_cut(block: type[Block]) -> None:
    model, plan = cut_in_half(block)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    before = models.snapshot(model)
    assert prove(model, plan).error < 1e-9
    assert models.same_bits(models.snapshot(model), before)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_block_in_single_precision_is_proved_with_the_precision_it_has() -> None:
    model, plan = cut_in_half(SinglePrecision)
    assert 0 <= prove(model, plan).error < 1e-3
    wrong = halved(model, trace(model, imgsz=64))
    kept = wrong.keep["model.2.1.b.weight"][1]
    wrong.keep["model.2.1.b.weight"][1] = tuple(i - 1 for i in kept)
    with pytest.raises(ProofError, match=r"differs is 'model\.2\.1\.b'.*block 'model\.2\.1' \(SinglePrecision\)"):
        prove(model, wrong)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (FactorInEvaluation, r"differs is 'model\.2\.1\.b' in evaluation mode.*\(FactorInEvaluation\)"),
        (AssertionInEvaluation, r"does not run \('model\.2\.1' \(AssertionInEvaluation\): LookupError: .*such width"),
        (KnowsItsWidth, r"does not run \('model\.2\.1' \(KnowsItsWidth\): AssertionError: expected 16 channels"),
    ],
)
def test_what_a_block_does_only_in_one_mode_or_at_one_width_is_found(block: type[Block], said: str) -> None:
    model, plan = cut_in_half(block)
    with pytest.raises(ProofError, match=rf"{said}.*The model is unchanged.*protect the block"):
        prove(model, plan)


def test_a_model_that_does_not_run_by_itself_is_told_as_such() -> None:
    model = model_with(NeverRuns)
    with pytest.raises(ProofError, match=r"itself does not run.*'model\.2\.1' \(NeverRuns\) stops with KeyError"):
        prove(model, halved(model, trace(model, imgsz=64)))


@pytest.mark.parametrize("name", models.TINY)
def test_rounding_in_single_precision_stays_far_below_its_tolerance(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "settings", lambda *_: [passes.Setting(64, 96, torch.float32)])
    assert prove(models.shared(name), models.plan_of(name)).error < 1e-4


def test_the_image_size_of_a_plan_is_used_wherever_the_model_is_traced() -> None:
    """The table of positions fits 64 pixels, and nothing else."""
    model = model_with(OneSize).float()
    plan = yolo_prune.plan(model, models.recipe(target_flops=0.8), imgsz=64)
    assert yolo_prune.apply(model, plan) is not None
    attentive = models.build("yolo11-tiny").float()
    attentive.model[1] = nn.Sequential(attentive.model[1], OneSize())
    attentive.model[1].i, attentive.model[1].f = 1, -1
    assert planner.widths(attentive, trace(attentive, imgsz=64)) == planner.widths(attentive, imgsz=64)
    assert yolo_prune.dependency_graph(model_with(OneSize).float(), imgsz=64)._widths


@pytest.mark.parametrize("block", TWINS)
def test_the_twin_runs_as_the_block_does(block: type[Block]) -> None:
    model, plan = cut_in_half(block)
    before = models.snapshot(model)
    assert prove(model, plan).error < 1e-10
    assert models.same_bits(models.snapshot(model), before)
    surgery.apply(model, plan)
    model.eval()(models.images())


def test_a_tensor_that_has_a_gradient_is_copied() -> None:
    model = model_with(CachesTensors)
    model(models.images())
    assert model.model[2][1].last.grad_fn is not None
    assert prove(model, halved(model, trace(model, imgsz=64))).error < 1e-10


def test_copies_share_nothing_with_the_block_that_a_hook_fills() -> None:
    for block in (CollectsByHook, CollectsByFunction):
        model: Any = model_with(block)
        copy: Any = bare_copy(model)
        copy(models.images())
        assert len(copy.model[2][1].seen) == 1
        assert model.model[2][1].seen == []


@pytest.mark.parametrize("trusted", [False, True])
def test_channels_that_go_into_a_tensor_on_the_cpu_are_protected(
    trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trusted:
        monkeypatch.setitem(rules.RULES, FilledOnTheCPU, lambda block, facts: None)
    groups = trace(model_with(FilledOnTheCPU), imgsz=64).groups
    (reason,) = {g.protected for g in groups if "model.2.1.a" in g.layers}
    how = "is written into" if trusted else "meets"
    assert reason == f"{how} a tensor of fixed width in FilledOnTheCPU"


@pytest.mark.parametrize(
    ("block", "said"),
    [(LooksAtValues, "RuntimeError: Tensor.item() cannot be called on meta"), (MissesAKey, "KeyError: 'meta'")],
)
def test_a_block_that_cannot_be_traced_is_left_as_it_is(block: type[Block], said: str) -> None:
    model = model_with(block)
    graph = trace(model, imgsz=64)
    (reason,) = {g.protected for g in graph.groups if {"model.2.1.a", "model.2.1.b"} & set(g.layers)}
    assert reason is not None
    assert reason.startswith(f"'model.2.1' ({block.__name__}) cannot be traced: {said}")
    assert "give its forward a path for inputs on the 'meta' device" in reason
    assert {g.protected for g in graph.groups if "model.2.0.cv2.conv" in g.layers} == {reason}
    cost, stock = cost_of(model, graph), models.cost_of("yolov8-tiny")
    assert 0 < cost.flops() - stock.flops() <= 2 * 2 * 16 * 16 * C * C  # one or two convolutions
    assert cost.parameters() - stock.parameters() == 2 * (C * C + C)
    plan = halved(model, graph)
    assert len(plan.groups) > 20
    assert not any(name.startswith("model.2.1.") for name in plan.keep)
    assert reason in {part.reason for part in plan.protected}
    assert prove(model, plan).error < 1e-10


def test_a_block_that_never_runs_is_one_clear_error() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"'model\.2\.1' \(Broken\) cannot be traced: KeyError: .*any image'"
    ):
        trace(model_with(Broken), imgsz=64)


def test_a_stock_block_that_cannot_be_traced_is_an_error() -> None:
    model = deepcopy(models.shared("yolov8-tiny"))
    model.model[2].cv2.conv = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"'model\.\S+' \(\w+\) cannot be traced"):
        trace(model, imgsz=64)


class Around(Block):
    """Has a block inside that cannot be cut, between two convolutions that can."""

    def __init__(self, inner: type[Block] = KnowsItsWidth) -> None:
        super().__init__()
        self.inner = inner()
        self.c = nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.silu(self.b(self.inner(F.silu(self.a(x))))))


def surveyed(model: Any, **fields: Any) -> Any:
    return planner.survey(model, models.recipe(target_flops=0.8, **fields), 64)


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (FactorInEvaluation, "'model.2.1.b' in evaluation mode differs after a cut"),
        (AssertionInEvaluation, "LookupError: no such width"),
        (KnowsItsWidth, "AssertionError: expected 16 channels"),
    ],
)
def test_a_block_whose_cut_is_refuted_is_left_as_it_is(block: type[Block], why: str) -> None:
    model = model_with(block).float()
    plan = yolo_prune.plan(model, models.recipe(target_flops=0.8), imgsz=64)
    (part,) = (p for p in plan.protected if "model.2.1.a" in p.layers)
    assert part.reason.startswith(f"'model.2.1' ({block.__name__}) does not work with fewer channels: {why}")
    assert part.reason.endswith("To prune it, state its rule (register_block)")
    assert {"model.2.0.cv2.conv", "model.2.1.b"} <= set(part.layers)
    assert yolo_prune.apply(model, plan) is not None
    assert model.model[2][1].a.in_channels == model.model[2][1].b.out_channels == C


def test_the_smallest_block_around_the_fault_is_left_and_all_of_its_class() -> None:
    model = model_with(Around)
    model.model[2].append(Around().double())
    proofs: list[int] = []
    graph = planner.tried_out(
        model,
        trace(model, imgsz=64),
        lambda opaque: proofs.append(len(opaque)) or trace(model, imgsz=64, opaque=opaque),
    )
    assert proofs == [2]
    reasons = {name: g.protected for g in graph.groups for name in g.layers}
    for path in ("model.2.1", "model.2.2"):
        assert (reasons[f"{path}.inner.b"] or "").startswith(f"'{path}.inner' (KnowsItsWidth) does not work")
        assert reasons[f"{path}.a"] == reasons[f"{path}.inner.a"]
        assert reasons[f"{path}.b"] is None
    assert prove(model, halved(model, graph)).error < 1e-10


def test_blocks_of_two_kinds_are_found_one_after_the_other() -> None:
    model = model_with(FactorInEvaluation)
    model.model[2].append(KnowsItsWidth().double())
    reasons = {g.protected for g in surveyed(model).groups if g.protected}
    assert {reason.partition(")")[0] for reason in reasons if "does not work" in reason} == {
        "'model.2.1' (FactorInEvaluation",
        "'model.2.2' (KnowsItsWidth",
    }


def test_blocks_are_not_tried_out_without_the_proof_and_without_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "prove", lambda *_: pytest.fail("a cut was proved"))
    surveyed(models.shared("yolov8-tiny"))
    free = {
        name for g in surveyed(model_with(KnowsItsWidth), proof=False).groups if not g.protected for name in g.layers
    }
    assert "model.2.1.a" in free


def test_a_fault_outside_of_all_blocks_leaves_no_block_opaque() -> None:
    """Here, an activation of a stock layer is exchanged after the trace."""
    model = model_with(KeepsAList)
    graph = trace(model, imgsz=64)
    model.model[7].act = nn.Sigmoid()
    tried: list[str] = []
    assert planner.tried_out(model, graph, lambda opaque: tried.extend(opaque) or graph) is graph
    assert tried == ["model.2.1"]


@pytest.mark.parametrize("block", [ConstantAfterActivation, TableAfterActivation])
def test_channels_before_a_learned_constant_are_protected_and_no_others(block: type[Block]) -> None:
    model = model_with(block)
    graph = trace(model, imgsz=64)
    reasons = {name: g.protected for g in graph.groups for name in g.layers if name.startswith("model.2.")}
    assert reasons["model.2.1.a"] == "feeds a convolution through an activation that is not 0 at 0 in Conv2d"
    assert reasons["model.2.1.b"] is reasons["model.2.1.c"] is reasons["model.2.0.cv2.conv"] is None
    assert prove(model, halved(model, graph)).error < 1e-10


def test_a_layer_without_a_batch_dimension_is_proved() -> None:
    model = model_with(GatedByOneVector)
    assert prove(model, halved(model, trace(model, imgsz=64))).error < 1e-10


def test_a_block_is_tried_out_with_widths_that_a_plan_may_have() -> None:
    groups = [g for g in models.graph_of("yolov8n").groups if not g.protected]
    for step in (8, 32):
        for group in groups:
            kept, sizes = planner.about_half(group, step), {s.name: s.size for s in group.sets}
            fractions = {len(indices) / sizes[name] for name, indices in kept.items()}
            assert len(fractions) == 1
            assert 0 < max(fractions) <= 0.5
            counts = [len(indices) for name, indices in kept.items() if sizes[name] == group.grain > 2 * step]
            assert all(count % step == 0 and count // step % 2 == 1 for count in counts)
    assert {len(k) for g in groups for k in planner.about_half(g, 8).values()} >= {8, 24, 56, 120}


class Locked(Block):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_an_attribute_that_cannot_be_copied_is_named() -> None:
    for look in (lambda model: trace(model, imgsz=64), bare_copy):
        with pytest.raises(
            UnsupportedModelError, match=r"'model\.2\.1\.lock' cannot be copied: TypeError: .*__deepcopy__"
        ):
            look(model_with(Locked))


def test_what_is_protected_is_not_traced() -> None:
    """Its code sees real images, as in a run, and the reason is the recipe."""
    for block in (KnowsItsWidth, Broken, LooksAtValues):
        model = model_with(Around)
        model.model[2][1].inner = block().double()
        if block is Broken:
            with pytest.raises(
                UnsupportedModelError, match=r"'model\.2\.1\.inner' \(Broken\) cannot be traced: KeyError"
            ):
                surveyed(model, protect=["model.2.1.inner"])
            continue
        graph = surveyed(model, protect=["model.2.1.inner"])
        reasons = {name: g.protected for g in graph.groups for name in g.layers}
        assert reasons["model.2.1.a"] == reasons["model.2.1.inner.b"] == "recipe: protect 'model.2.1.inner'"
        assert reasons["model.2.1.b"] is None
        assert graph.opaque == {}
    assert trace(model_with(RefusesToBeTraced), imgsz=64, protect=["model.2.1.a"]).opaque
    assert not trace(model_with(RefusesToBeTraced), imgsz=64, protect=["model.2.1"]).opaque


class RefusesToBeTraced(Block):
    def forward(self, x: Tensor) -> Tensor:
        assert not x.is_meta
        return self.b(self.a(x))


class Straight(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_opaque_blocks_are_named_in_the_plan_and_stay_opaque_in_later_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with(KnowsItsWidth).float()
    first = yolo_prune.plan(model, models.recipe(target_flops=0.8), imgsz=64)
    assert first.opaque.keys() == {"model.2.1"}
    assert Plan.from_dict(first.to_dict()).opaque == first.opaque
    yolo_prune.apply(model, first)
    monkeypatch.setattr(KnowsItsWidth, "forward", Straight.forward)  # from now on it could be cut
    second = yolo_prune.plan(model, models.recipe(target_flops=0.6), imgsz=64)
    assert second.opaque == first.opaque == first.then(second).opaque == first.then(second).since(first).opaque
    assert not any(name.startswith("model.2.1.") for name in second.keep)
    monkeypatch.setitem(rules.RULES, KnowsItsWidth, lambda block, facts: None)
    assert not yolo_prune.plan(model, models.recipe(target_flops=0.6), imgsz=64).opaque


def test_after_some_trials_all_blocks_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "TRIALS", 1)
    model = model_with(KnowsItsWidth)
    model.model[2].append(KeepsAList().double())
    assert surveyed(model).opaque.keys() == {"model.2.1", "model.2.2"}


class Blurred(Block):
    """A kernel in a buffer, and pooling over levels."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.rand(C, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.conv2d(self.a(x), self.kernel, padding=1, groups=C))


class OverLevels(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.max_pool3d(torch.stack((self.a(x), x), 2), (2, 1, 1)).squeeze(2))


def test_a_rule_that_names_a_buffer_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rules.RULES, Blurred, lambda block, facts: facts.equal(facts.parameter("kernel")))
    with pytest.raises(UnsupportedModelError, match=r"'model\.2\.1\.kernel' is no parameter.*requires_grad=False"):
        trace(model_with(Blurred), imgsz=64)


def test_pooling_over_levels_keeps_channels_apart() -> None:
    model = model_with(OverLevels)
    graph = trace(model, imgsz=64)
    assert {g.protected for g in graph.groups if "model.2.1.a" in g.layers} == {None}
    assert prove(model, halved(model, graph)).error < 1e-10
