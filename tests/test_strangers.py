# SPDX-License-Identifier: AGPL-3.0-or-later
"""Blocks that people put into their models, none with a rule: the whole model can be cut in half, exactly."""

from __future__ import annotations

import threading
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yolo_prune.cut import surgery
from yolo_prune.cut.proof import prove
from yolo_prune.errors import UnsupportedModelError
from yolo_prune.graph import Graph, trace
from yolo_prune.planning.cost import cost_of
from yolo_prune.planning.planner import build_plan

C = 16  # channels of the layer that the block is put behind


class Block(nn.Module):
    """One or two convolutions; subclasses say what is done with them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1)


class SharedModule(Block):
    def __init__(self) -> None:
        super().__init__()
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.silu(self.a(x)))


class TiedWeights(Block):
    def __init__(self) -> None:
        super().__init__()
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.silu(self.a(x)))


class Memoised(Block):
    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        key = tuple(x.shape[2:])
        if key not in self.seen:
            self.seen[key] = torch.linspace(0, 1, key[1], device=x.device, dtype=x.dtype).view(1, 1, 1, -1)
        return self.a(x) + self.seen[key]


class Catching(Block):
    def __init__(self) -> None:
        super().__init__()
        self.bad = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.bad(x)
        except RuntimeError:
            y = self.a(x)
            return y.view(y.shape[0], C, *y.shape[2:])


class GroupedTranspose(Block):
    def __init__(self, groups: int = 4) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(C, C, 2, 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.up(self.a(x)), 2)


class DepthwiseTranspose(GroupedTranspose):
    def __init__(self) -> None:
        super().__init__(C)


class InstanceNorm(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(C, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)))


class GroupNorm(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)))


class Recurrent(Block):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(C, C, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x.mean(2).transpose(1, 2))
        return x + self.a(x) * y.transpose(1, 2)[:, :, None]


class ShapeOfAnother(Block):
    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return self.a(x).view(b, 4, c // 4, h, w).transpose(1, 2).reshape(b, c, h, w)


class ViewAs(Block):
    def forward(self, x: Tensor) -> Tensor:
        q, v = self.a(x).flatten(2), self.b(x).flatten(2)
        return torch.einsum("bij,bcj->bci", torch.einsum("bci,bcj->bij", q, q), v).view_as(x)


class DotProduct(Block):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.flatten(2).transpose(1, 2) for t in (self.a(x), self.b(x), x))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)


class CopiedInto(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y.copy_(self.a(x))
        return y


class SummedUp(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.a(x)).sum(1, keepdim=True)


class HalfOverwritten(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y.chunk(2, 1)[0].sigmoid_()
        return self.b(y)


class HorizontalSplit(Block):
    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.hsplit(self.a(x), 2)
        return torch.cat([F.silu(a), b], 1)


class SqueezeExcite(Block):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.PReLU(C)
        self.scale = nn.Parameter(torch.rand(C))

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))))
        return self.act(x * gate) * self.scale[:, None, None]


class Shuffled(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(F.pixel_shuffle(self.a(x), 2), 2)


BLOCKS = [cls for cls in (*Block.__subclasses__(), DepthwiseTranspose)]


def model_with(block: type[Block]) -> Any:
    model: Any = models.build("yolov8-tiny")
    torch.manual_seed(0)
    model.model[2] = layer = nn.Sequential(model.model[2], block().double())
    stock = layer[0]
    layer.i, layer.f, layer.type, layer.np = stock.i, stock.f, "Sequential", 0
    return model


def halved(model: Any, graph: Graph) -> Any:
    kept = {s.name: tuple(range(s.size))[1::2] for g in graph.groups if not g.protected and g.grain > 1 for s in g.sets}
    return build_plan(graph, cost_of(model, graph), kept, {})


@pytest.mark.parametrize("block", BLOCKS)
def test_all_that_is_not_protected_can_be_cut_in_half(block: type[Block]) -> None:
    model = model_with(block)
    before = models.snapshot(model)
    plan = halved(model, trace(model, imgsz=64))
    assert len(plan.groups) > 20
    assert prove(model, plan).error < 1e-10
    assert models.same_bits(models.snapshot(model), before)
    surgery.apply(model, plan)
    with torch.no_grad():
        model.eval()(models.images())


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (TiedWeights, "shared with model.2.1.b"),
        (GroupNorm, "GroupNorm in GroupNorm"),
        (DotProduct, "sets the scale of an attention in DotProduct"),
        (HorizontalSplit, "is cut up by 'hsplit' in HorizontalSplit"),
        (HalfOverwritten, "is overwritten in part in HalfOverwritten"),
    ],
)
def test_the_reason_is_told(block: type[Block], reason: str) -> None:
    groups = trace(model_with(block), imgsz=64).groups
    assert reason in {g.protected for g in groups if {"model.2.1.a", "model.2.1.b"} & set(g.layers)}


def test_a_shared_module_is_cut_once() -> None:
    model = model_with(SharedModule)
    plan = halved(model, trace(model, imgsz=64))
    assert [t for t in plan.keep if t.startswith("model.2.1.")] == ["model.2.1.a.bias", "model.2.1.a.weight"]


def test_forward_passes_of_other_threads_do_not_disturb() -> None:
    alone, stop = trace(models.shared("yolo11-tiny"), imgsz=64), threading.Event()
    other = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))

    def run() -> None:
        while not stop.is_set():
            other(torch.rand(1, 3, 8, 8))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert all(trace(models.shared("yolo11-tiny"), imgsz=64).groups == alone.groups for _ in range(3))
    finally:
        stop.set()
        thread.join()


def test_weights_that_are_computed_are_refused_with_the_remedy() -> None:
    model = models.build("yolov8-tiny")
    nn.utils.parametrizations.weight_norm(model.model[3].conv)
    with pytest.raises(UnsupportedModelError, match=r"'model\.3\.conv' computes its weight.*remove_parametrizations"):
        trace(model, imgsz=64)
