# SPDX-License-Identifier: AGPL-3.0-or-later
"""Blocks with habits of their own, none with a rule: randomness, state, casts, image sizes, modes, and errors."""

from __future__ import annotations

import random
from typing import Any

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_strangers import Block, C, halved, model_with
from torch import Tensor, nn

import yolo_prune
from yolo_prune.cut import passes
from yolo_prune.cut.proof import prove
from yolo_prune.errors import ProofError
from yolo_prune.graph import trace
from yolo_prune.planning import planner


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
        if x.shape[1] != C:
            raise AssertionError(f"expected {C} channels\n")
        return self.b(self.a(x))


class FactorInEvaluation(Block):
    """Multiplies by a ratio of widths, but only in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y if self.training else y * (C / y.shape[1]))


class AssertionInEvaluation(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if not self.training and y.shape[1] != C:
            raise LookupError("no such width")
        return self.b(y)


class NeverRuns(Block):
    def forward(self, x: Tensor) -> Tensor:
        if not x.is_meta:
            raise KeyError("no table for this image")
        return self.a(x)


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
