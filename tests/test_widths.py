# SPDX-License-Identifier: AGPL-3.0-or-later
"""Blocks whose code has sizes, none with a rule: what is read from a tensor follows a cut, a fixed number does not."""

from __future__ import annotations

import functools
import importlib.util
from copy import deepcopy
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
import zoo
from test_strangers import Block, C, model_with
from torch import Tensor, nn

from yolo_prune.cut import surgery
from yolo_prune.cut.proof import prove
from yolo_prune.errors import UnsupportedModelError
from yolo_prune.graph import Facts, Graph, trace
from yolo_prune.graph.rules import RULES
from yolo_prune.planning import planner
from yolo_prune.planning.cost import cost_of
from yolo_prune.planning.planner import build_plan


class Excited(Block):
    """Squeeze-and-excitation, as most people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(C, 8), nn.ReLU(), nn.Linear(8, C), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        b, c, _, _ = x.size()
        return self.b(x * self.fc(self.pool(x).view(b, c)).view(b, c, 1, 1))


class ExcitedByExpansion(Excited):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = self.fc(self.pool(x).view(x.size(0), -1)).reshape(x.size(0), x.size(1), 1, 1)
        return self.b(x * gate.expand_as(x) + x * gate.expand(*x.shape))


class Tokens(Block):
    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.a(x).reshape(b, c, h * w).permute(0, 2, 1)
        return self.b(F.gelu(y).transpose(1, 2).view(b, -1, h, w))


class Windows(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        b, c, h, w = y.shape
        y = y.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 2, 2)
        y = y.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)
        return self.b(y)


class ShuffledGroups(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        b, c, h, w = y.shape
        assert c % 4 == 0
        y = y.view(b, 4, c // 4, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)
        return self.b(y)


class ShuffledByModule(Block):
    def __init__(self) -> None:
        super().__init__()
        self.shuffle = nn.ChannelShuffle(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.shuffle(self.a(x)))


class ShuffledBranches(Block):
    """As in ShuffleNet: two branches, shuffled, then one half goes on."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat((self.a(x), F.silu(self.b(x))), 1)
        b, c, h, w = y.size()
        y = y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        first, second = y.chunk(2, 1)
        return first * second


class GSConv(Block):
    """The shuffle of slim-neck, which divides a flat tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.depthwise = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 5, 1, 2, groups=C)
        self.b = nn.Conv2d(2 * C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = torch.cat((y, self.depthwise(y)), 1)
        b, n, h, w = y.size()
        y = y.reshape(b * n // 2, 2, h * w).permute(1, 0, 2).reshape(2, -1, n // 2, h, w)
        return self.b(torch.cat((y[0], y[1]), 1))


class Unflattened(Block):
    def __init__(self) -> None:
        super().__init__()
        self.unflatten = nn.Unflatten(1, (4, -1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.unflatten(self.a(x)).transpose(1, 2).flatten(1, 2)
        return self.b(y.unflatten(1, (2, -1)).sum(1).repeat(1, 2, 1, 1))


class Halves(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        c = y.shape[1]
        first, second = torch.split(y, c // 2, dim=1)
        third, fourth = y.split([c // 4, c - c // 4], 1)
        y = torch.cat((second, first), 1) * torch.cat((fourth, third), 1)
        return self.b(torch.cat((y[:, c // 2 :], y.narrow(1, 0, c // 2).sigmoid() * y[:, : c // 2]), 1))


class RolledByAPart(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(torch.roll(y, (y.shape[1] // 2, 1), (1, 2)))


class DepthwiseFunction(Block):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.rand(C, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(F.conv2d(y, self.kernel, padding=1, groups=y.shape[1]))


class LearnedWeights(Block):
    """Weights of inputs, as in BiFPN."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.u = (nn.Parameter(torch.rand(2)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        w, v = self.w.relu(), F.softmax(self.v, dim=0)
        w = w / (w.sum() + 1e-4)
        y = w[0] * x + w[1] * self.a(x)
        y = sum(weight * part for weight, part in zip(v, (y, x), strict=True))
        return self.b((self.u.view(-1, 1, 1, 1, 1) * torch.stack([x, y])).sum(0))


class Spread(Block):
    """Makes tensors as wide as a width says."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Conv2d(C, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        b, c, h, w = y.shape
        mask = self.mask(x).sigmoid()
        y = y * mask.expand(b, c, h, w) * mask.repeat(1, c, 1, 1) * y.new_ones(b, c, 1, 1)
        return self.b(y + torch.zeros(b, c, h, w, device=x.device, dtype=x.dtype))


class WrittenInParts(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        c, z = y.shape[1], y.new_zeros(y.shape)
        z[:, : c // 2] = y[:, c // 2 :]
        z[:, c // 2 :] = y[:, : c // 2]
        return self.b(z)


class Attention(Block):
    """Four heads, whose sizes are read from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale = nn.Conv2d(C, 3 * C, 1), 0.5

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.a(x).reshape(b, 3, 4, c // 4, h * w).unbind(1)
        y = (q.transpose(-2, -1) @ k * self.scale).softmax(-1) @ v.transpose(-2, -1)
        return self.b(y.transpose(-2, -1).reshape(b, c, h, w))


class SameShapes(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(x + y if x.shape == y.shape else y)


class Remembered(Block):
    """Looks a result up under the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        key = tuple(y.shape)
        if key not in self.seen:
            self.seen[key] = (key[0], key[1] // 2, 2, *key[2:])
        return self.b(y.view(self.seen[key]).transpose(1, 2).reshape(y.shape))


class SubPixel(Block):
    """Doubles the resolution with a convolution, and halves it again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up = nn.Conv2d(C, 4 * C, 1), nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.b(F.silu(self.up(self.a(x)))), 2)


class DepthwiseStandardized(Block):
    """Standardizes the weights of its convolutions, one of them depthwise, and passes their attributes on."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(C, C, 3, 1, 1, groups=C)

    def forward(self, x: Tensor) -> Tensor:
        w = self.c.weight
        w = (w - w.mean((2, 3), keepdim=True)) / (w.std((2, 3), keepdim=True) + 1e-5)
        return self.b(F.conv2d(self.a(x), w, self.c.bias, self.c.stride, self.c.padding, 1, self.c.groups))


class Reassembled(Block):
    """Weighs the positions around every position, as CARAFE does."""

    def __init__(self) -> None:
        super().__init__()
        self.windows, self.weights = nn.Unfold(3, padding=1), nn.Conv2d(C, 9, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        b, c, h, w = y.shape
        kernel = F.softmax(self.weights(y), dim=1)
        return self.b(torch.einsum("bkhw,bckhw->bchw", [kernel, self.windows(y).view(b, c, -1, h, w)]))


class Reparametrized(Block):
    """Adds two kernels of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.one, self.b = nn.Conv2d(C, C, 3, 1, 1), nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.a.weight + F.pad(self.one.weight, [1, 1, 1, 1])
        return self.b(F.conv2d(x, kernel, self.a.bias + self.one.bias, 1, 1))


FREE = (Excited, ExcitedByExpansion, Tokens, Windows, ShuffledGroups, ShuffledByModule, ShuffledBranches, GSConv)
FREE += (Unflattened, Halves, RolledByAPart, DepthwiseFunction, LearnedWeights, Spread, WrittenInParts, Attention)
FREE += (SameShapes, Remembered, SubPixel, DepthwiseStandardized, Reparametrized)


class FixedUnflatten(Block):
    def __init__(self) -> None:
        super().__init__()
        self.unflatten = nn.Unflatten(1, (4, C // 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.unflatten(self.a(x)).flatten(1, 2))


class FixedShuffle(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        b, _, h, w = y.shape
        return self.b(y.view(b, 4, C // 4, h, w).transpose(1, 2).reshape(b, -1, h, w))


class FixedGroups(DepthwiseFunction):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.conv2d(self.a(x), self.kernel, padding=1, groups=C))


class FixedExpansion(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y * y.mean((2, 3), keepdim=True).expand(-1, C, -1, -1))


class EverySecond(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(torch.cat((y[:, ::2], y[:, 1::2]), 1))


class ManualMean(Block):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(1, 1, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y) * self.c(y.sum(1, keepdim=True) / y.shape[1]).sigmoid()


class Scaled(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y * y.shape[1] ** -0.5)


class ScaledByFloat(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y * (float(y.size(1)) + 1))


class ScaledByCount(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y / len(y[0]))


class ScaledByElements(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y / y.numel())


class Compared(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if y.shape[1] != C:
            raise AssertionError
        return self.b(y)


class Counted(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y * torch.arange(y.shape[1], device=y.device).view(-1, 1, 1))


class OneByOne(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(torch.stack(y.unbind(1)[::-1], 1))


class ByTurns(Block):
    """Reads channels as positions: no cut leaves them where they are."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        b, c, h, w = y.shape
        return self.b(y.reshape(b, h * w, c).permute(0, 2, 1).reshape(b, c, h, w))


class AlongChannels(Block):
    """Efficient channel attention: a convolution over neighbouring channels."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        gate = self.c(y.mean((2, 3), keepdim=True).squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return self.b(y * gate.sigmoid().expand_as(y))


class EveryChannelAlone(Block):
    """Convolves every channel as an image of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(1, 1, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        b, c, h, w = y.shape
        return self.b(self.c(y.view(b * c, 1, h, w)).view(b, -1, h, w))


COMPUTING = (ManualMean, Scaled, ScaledByFloat, ScaledByCount, ScaledByElements, Compared, Counted)
FIXED = (
    (FixedUnflatten, "is cut up by 'unflatten' in Unflatten"),
    (FixedShuffle, "is cut up by 'view' in FixedShuffle"),
    (FixedGroups, "is cut up by 'conv2d' in FixedGroups"),
    (FixedExpansion, "is cut up by 'expand' in FixedExpansion"),
    (EverySecond, "is cut up by 'getitem' in EverySecond"),
    *((cls, f"has a width that the code computes with in {cls.__name__}") for cls in COMPUTING),
    (OneByOne, "is cut up by 'unbind' in OneByOne"),
    (ByTurns, None),
    (AlongChannels, None),
    (EveryChannelAlone, "is convolved over channels in Conv2d"),
)


def test_windows_of_positions_keep_their_channels() -> None:
    model = built(Reassembled)
    graph = trace(model, imgsz=64)
    assert around(graph) == {
        "model.2.0.cv2.conv": {None},
        "model.2.1.a": {None},
        "model.2.1.b": {None},
        "model.2.1.weights": {"softmax over channels in Reassembled"},
    }
    assert prove(model, scattered(model, graph)).error < 1e-10


class PartialConvolution(Block):
    """Convolves the first channels only, a fixed number of them."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(4, 4, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        first, rest = y.split([4, y.shape[1] - 4], 1)
        return self.b(torch.cat((self.c(first), rest), 1))


class PartialSlice(PartialConvolution):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(torch.cat((self.c(y[:, :4]), y[:, 4:]), 1))


class RolledByANumber(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.roll(self.a(x), (-4, 1), (1, 3)))


class LastOnes(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(torch.cat((y[:, -3:], y[:, :-3]), 1) * y[:, -4].unsqueeze(1))


PARTLY = (PartialConvolution, PartialSlice, RolledByANumber, LastOnes)


def built(block: type[Block]) -> Any:
    model = model_with(block)
    zoo.randomise(model.model[2][1], 1)
    return model


def scattered(model: Any, graph: Graph, seed: int = 0) -> Any:
    """A plan that keeps half of all channels, other ones in every set."""
    generator = torch.Generator().manual_seed(seed)

    def half(size: int, grain: int) -> tuple[int, ...]:
        kept = torch.randperm(size, generator=generator)[: size * (grain // 2) // grain]
        return tuple(sorted(kept.tolist()))

    free = [g for g in graph.groups if not g.protected and g.grain > 1]
    return build_plan(graph, cost_of(model, graph), {s.name: half(s.size, g.grain) for g in free for s in g.sets}, {})


def around(graph: Graph) -> dict[str, set[str | None]]:
    """`{layer: reasons}` of what a block reads, and of its own layers."""
    found: dict[str, set[str | None]] = {}
    for group in graph.groups:
        for layer in group.layers:
            if layer.startswith("model.2.1.") or layer == "model.2.0.cv2.conv":
                found.setdefault(layer, set()).add(group.protected)
    return found


@pytest.mark.parametrize("block", FREE)
def test_a_size_that_is_read_from_a_tensor_follows_a_cut(block: type[Block]) -> None:
    model = built(block)
    graph = trace(model, imgsz=64)
    assert {reason for reasons in around(graph).values() for reason in reasons} == {None}
    for seed in range(2):
        plan = scattered(model, graph, seed)
        assert plan.forecast
        assert len(plan.keep["model.2.1.a.weight"][0]) == model.model[2][1].a.out_channels // 2
        assert prove(model, plan).error < 1e-10
        cut = deepcopy(model)
        surgery.apply(cut, plan)
        assert cost_of(cut, trace(cut, imgsz=64)).flops() == pytest.approx(plan.forecast.flops_after, rel=1e-9)


@pytest.mark.parametrize(("block", "reason"), FIXED)
def test_channels_whose_number_the_code_fixes_are_protected_and_no_others(
    block: type[Block], reason: str | None
) -> None:
    model = built(block)
    graph = trace(model, imgsz=64)
    reasons = around(graph)
    (found,) = reasons["model.2.1.a"]
    assert found == reason if reason else found is not None
    assert reasons["model.2.0.cv2.conv"] == {None}
    assert prove(model, scattered(model, graph)).error < 1e-10


@pytest.mark.parametrize("block", PARTLY)
def test_a_part_of_fixed_size_is_protected_and_the_rest_is_not(block: type[Block]) -> None:
    model = built(block)
    graph = trace(model, imgsz=64)
    free = [s.size for g in graph.groups if not g.protected for s in g.sets if "model.2.1.a" in s.layers]
    assert sum(free) == C - 4
    assert prove(model, scattered(model, graph)).error < 1e-10


class Remembers(Block):
    """Stores a width, and uses it in the places where people use it."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.half, self.groups = C, C // 2, 4
        self.kernel = nn.Parameter(torch.rand(C, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(self.a(x), self.kernel, padding=1, groups=self.c)
        first, second = y.split((self.half, self.half), 1)
        y = torch.cat((y[:, self.half :], y[:, : self.half]), 1) * torch.cat((second, first), 1)
        y = torch.roll(y, self.half, 1).view(y.shape[0], self.c, -1).view(x.shape[0], self.c, *x.shape[2:])
        return self.b(
            y.view(y.shape[0], self.groups, self.c // self.groups, *y.shape[2:]).transpose(1, 2).flatten(1, 2)
        )


class SplitInTwo(Block):
    """The first layer of a `C2f` in the code of a user."""

    def __init__(self) -> None:
        super().__init__()
        self.c = C // 2
        self.b = nn.Conv2d(self.c, self.c, 3, 1, 1)
        self.last = nn.Conv2d(3 * self.c, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.a(x).split((self.c, self.c), 1))
        y.append(self.b(y[-1]) + y[-1])
        return self.last(torch.cat(y, 1))


class PartialByTwoNumbers(PartialConvolution):
    """Partial convolution as in FasterNet: it stores both sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.convolved, self.untouched = 4, C - 4

    def forward(self, x: Tensor) -> Tensor:
        first, rest = torch.split(self.a(x), [self.convolved, self.untouched], dim=1)
        return self.b(torch.cat((self.c(first), rest), 1))


class PartialByOneNumber(PartialConvolution):
    """Partial convolution that stores one size; the other one is what remains."""

    def __init__(self) -> None:
        super().__init__()
        self.convolved = 4

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        first, rest = y.split([self.convolved, y.shape[1] - self.convolved], 1)
        return self.b(torch.cat((self.c(first), rest), 1))


class Insists(Block):
    def __init__(self) -> None:
        super().__init__()
        self.width = C

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.width
        return self.b(self.a(x))


class StoredHeads(Block):
    """An attention as people write it: the number of heads, their size and the scale are stored."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size, self.scale = 4, C // 4, {4: (C // 4) ** -0.5}
        self.a = nn.Linear(C, 3 * C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.a(x.flatten(2).transpose(1, 2)).reshape(b, h * w, 3, self.heads, self.size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1) * self.scale[self.heads]).softmax(dim=-1) @ v
        return self.b(y.transpose(1, 2).reshape(b, h * w, c).transpose(1, 2).view(b, c, h, w))


STORES: tuple[tuple[type[Block], dict[str, int]], ...] = (
    (Remembers, {"c": C // 2, "half": C // 4}),
    (SplitInTwo, {"c": C // 4}),
    (PartialByTwoNumbers, {"convolved": 2, "untouched": (C - 4) // 2}),
    (PartialByOneNumber, {"convolved": 2}),
    (Insists, {"width": C // 2}),
    (StoredHeads, {"size": C // 8}),
)


@pytest.mark.parametrize(("block", "after"), STORES)
def test_a_width_that_a_block_stores_follows_a_cut(block: type[Block], after: dict[str, int]) -> None:
    model = built(block)
    graph = trace(model, imgsz=64)
    assert {reason for reasons in around(graph).values() for reason in reasons} == {None}
    for seed in range(2):
        plan = scattered(model, graph, seed)
        assert plan.attributes["model.2.1"] == after
        assert prove(model, plan).error < 1e-10
    surgery.apply(model, plan)
    assert {name: vars(model.model[2][1])[name] for name in after} == after
    assert {type(vars(model.model[2][1])[name]) for name in after} == {int}
    again = trace(model, imgsz=64)
    assert again.groups == graph.after(plan.keep).groups
    assert prove(model, scattered(model, again)).error < 1e-10


class StoredScale(Remembers):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y.view(y.shape[0], self.c, -1).view(y.shape) * self.c**-0.5)


class StoredTwice(Remembers):
    """Uses one number for channels, and for something else."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).view(x.shape[0], self.c, -1)
        return self.b(F.adaptive_avg_pool1d(y, 4 * self.c).view(x.shape[0], -1, 8, 8).repeat(1, 1, 2, 2))


class StoredDifference(PartialByOneNumber):
    """Computes with what remains."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        rest = y.shape[1] - self.convolved
        return self.b(torch.cat((self.c(y[:, : self.convolved]), y[:, self.convolved :]), 1) / (rest + 1))


@pytest.mark.parametrize(("block", "name"), [(StoredScale, "view"), (StoredTwice, "view")])
def test_a_stored_number_that_has_another_use_stays(block: type[Block], name: str) -> None:
    model = built(block)
    graph = trace(model, imgsz=64)
    assert around(graph)["model.2.1.a"] == {f"is cut up by '{name}' in {block.__name__}"}
    assert around(graph)["model.2.0.cv2.conv"] == {None}
    plan = scattered(model, graph)
    assert "model.2.1" not in plan.attributes
    assert prove(model, plan).error < 1e-10


def test_what_a_difference_with_a_stored_number_scales_is_protected() -> None:
    model = built(StoredDifference)
    graph = trace(model, imgsz=64)
    assert around(graph)["model.2.1.a"] == {"has a width that the code computes with in StoredDifference"}
    assert prove(model, scattered(model, graph)).error < 1e-10


class Swapped(Block):
    """Swaps the halves of what its second convolution reads."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [C // 2, C // 2]

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.a(x).split(self.sizes, 1)
        return self.b(torch.cat((second, first), 1))


def test_a_rule_can_name_parts_of_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(block: Any, facts: Facts) -> None:
        second, first = facts.input_parts("b", *block.sizes[::-1])
        facts.attribute_list("sizes", first, second)

    monkeypatch.setitem(RULES, Swapped, rule)
    model = built(Swapped)
    graph = trace(model, imgsz=64)
    assert around(graph)["model.2.1.a"] == {None}
    plan = scattered(model, graph)
    assert plan.attributes["model.2.1"] == {"sizes": [C // 4, C // 4]}
    assert prove(model, plan).error < 1e-10
    monkeypatch.setitem(RULES, Swapped, lambda block, facts: facts.input_parts("b", 1, 2))
    with pytest.raises(UnsupportedModelError, match=r"'model\.2\.1\.b' has 16 input channels, .* expects 1 \+ 2"):
        trace(model, imgsz=64)


class Generated(Block):
    """Convolves with kernels that a network makes from the image."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.kernels = nn.Linear(C, 4), nn.Parameter(torch.rand(4, C, C, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        weights = self.route(x.mean((0, 2, 3))[None]).softmax(1)
        return F.conv2d(y, (weights.view(4, 1, 1, 1, 1) * self.kernels).sum(0), padding=1)


def test_kernels_that_are_computed_count_in_flops() -> None:
    model = built(Generated)
    graph = trace(model, imgsz=64)
    assert around(graph)["model.2.1.a"] == {"is convolved with weights that are computed in Generated"}
    more = cost_of(model, graph).flops() - models.cost_of("yolov8-tiny").flops()
    positions = 16 * 16
    assert more == 2 * (positions * C * C * (9 + 1) + 4 * C)  # the kernel, `a` and the route
    assert prove(model, scattered(model, graph)).error < 1e-10


def test_the_benchmark_counts_the_channels_of_a_block_and_judges_its_cut() -> None:
    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location("blocks", root / "benchmarks/blocks.py")
    assert spec
    assert spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    blocks = benchmark.cases(str(root / "tests/user_blocks.py"))
    for name, counts in (("se_view", "576 | 576 | 0 | 0"), ("nn_unflatten", "512 | 512 | 256 | 0")):
        row = benchmark.row(blocks, name)
        assert row.startswith(f"| {name} | {counts} |")
        assert float(row.split("|")[-2]) < 1e-10


class Numbered(Block):
    """Stores numbers that are equal to its width."""

    def __init__(self) -> None:
        super().__init__()
        self.k = self.n = self._k = C


class PrivateNumber(Numbered):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y.view(y.shape[0], self._k, *y.shape[2:]))


class NumberAsPadding(Numbered):
    def forward(self, x: Tensor) -> Tensor:
        y, kernel = self.a(x), x.new_ones(1, C, 1, 1)
        z = F.conv2d(x, kernel, padding=self.k)[..., self.k : -self.k, self.k : -self.k]
        return self.b(y.view(y.shape[0], self.k, *y.shape[2:])) + z


class WithinLimits(Numbered):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y.view(y.shape[0], self.k, *y.shape[2:]) * (2.0 if self.k > 12 else 1.0))


class NotEight(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y * (3.0 if y.shape[1] == 8 else 2.0))


class WidthAsValue(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y / y.new_full((1, 1, 1, 1), y.shape[1]))


class WidthWritten(Block):
    def forward(self, x: Tensor) -> Tensor:
        y, factor = self.a(x), x.new_zeros(1)
        factor[:] = y.shape[1]
        return self.b(y / factor)


class AttentionByName(Block):
    def forward(self, x: Tensor) -> Tensor:
        q = self.a(x).flatten(2).transpose(1, 2)
        out = F.scaled_dot_product_attention(query=q, key=q, value=q)
        return self.b(out.transpose(1, 2).view_as(x))


class WindowsOfChannels(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        b, c, h, w = y.shape
        return self.b(y.unfold(1, 4, 4).permute(0, 4, 1, 2, 3).reshape(b, c, h, w))


@pytest.mark.parametrize(
    "block",
    [
        *(PrivateNumber, NumberAsPadding, WithinLimits, NotEight, WidthAsValue, WidthWritten, AttentionByName),
        WindowsOfChannels,
    ],
)
def test_another_use_of_a_width_protects_it(block: type[Block]) -> None:
    model = built(block)
    graph = trace(model, imgsz=64)
    reasons = {g.protected for g in graph.groups if "model.2.1.a" in g.layers}
    assert None not in reasons
    plan = scattered(model, graph)
    assert "model.2.1" not in plan.attributes
    assert prove(model, plan).error < 1e-10


class ChunksByName(Block):
    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.chunk(input=self.a(x), chunks=2, dim=1)
        return self.b(torch.cat((second, first), 1))


class RolledRound(Block):
    """By more than the number of channels."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.roll(self.a(x), C + 4, 1))


class CopiesItsShape(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y.view(deepcopy(tuple(y.shape))))


@functools.lru_cache(None)
def half(number: int) -> int:
    return number // 2


class Cached(Numbered):
    """A cache keeps the width of an earlier trace."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.a(x).split(half(self.k), 1)
        return self.b(torch.cat((second, first), 1))


@pytest.mark.parametrize("block", [ChunksByName, RolledRound, CopiesItsShape, Cached])
def test_cuts_of_such_blocks_are_right_in_every_trace(block: type[Block]) -> None:
    for _ in range(3):
        model = built(block)
        assert prove(model, scattered(model, trace(model, imgsz=64))).error < 1e-10


class OneByWidth(Block):
    """Python gives torch a plain number: no trace can see where it comes from."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y * (1.0 / y.shape[1]))


def test_a_use_that_no_trace_can_see_is_found_by_the_trial() -> None:
    model = built(OneByWidth)
    graph = planner.survey(model, models.recipe(target_flops=0.8), 64)
    assert graph.opaque.keys() == {"model.2.1"}


class NotOnRealNumbers(Block):
    def forward(self, x: Tensor) -> Tensor:
        if not x.is_meta:
            raise RuntimeError("only on another device")
        return self.b(self.a(x))


def test_a_protected_block_that_does_not_run_here_is_traced() -> None:
    graph = trace(built(NotOnRealNumbers), imgsz=64, protect=["model.2.1"])
    reasons = {g.protected for g in graph.groups if {"model.2.1.a", "model.2.1.b"} & set(g.layers)}
    assert reasons == {"recipe: protect 'model.2.1'"}
