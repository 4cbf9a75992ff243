# SPDX-License-Identifier: AGPL-3.0-or-later
"""Exactness, judged by an oracle that never asks the pruner what it kept.

Kept indices are recovered by looking the values of the pruned tensors up in the original ones. The reference is the
original with every removed *output* channel silenced; consumers are left alone, so that a wrong input index shows.
"""

from __future__ import annotations

import functools
from copy import deepcopy
from random import Random
from typing import Any

import models
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from yolo_prune import surgery
from yolo_prune.planner import build_plan, make_plan

TOLERANCE = 1e-8
Kept = dict[str, tuple[Tensor, ...]]


def recover_kept(original: nn.Module, pruned: nn.Module) -> Kept:
    """`{tensor: kept indices per dimension}` of every tensor, found by value."""
    before, after = original.state_dict(keep_vars=True), pruned.state_dict()
    assert list(before) == list(after)
    found: Kept = {}
    for name, now in after.items():
        was = before[name]
        if now.shape == was.shape:
            assert torch.equal(now, was), f"{name} changed though it kept its shape"
            continue
        values, order = _index(was)
        spot = torch.searchsorted(values, now.flatten()).clamp_max(len(values) - 1)
        assert torch.equal(values[spot], now.flatten()), f"{name} holds values that the original does not have"
        places = torch.unravel_index(order[spot].reshape(now.shape), was.shape)
        kept = []
        for dim, place in enumerate(places):
            along = place.movedim(dim, 0).reshape(now.shape[dim], -1)
            assert (along == along[:, :1]).all(), f"{name} is not a selection along dimension {dim}"
            kept.append(along[:, 0])
        found[name] = tuple(kept)
    return found


@functools.lru_cache(1000)
def _index(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Values in ascending order, and where they stand."""
    values, order = tensor.detach().flatten().sort()
    assert (values[1:] > values[:-1]).all(), "values are not unique; the look-up would be ambiguous"
    return values, order


@torch.no_grad()
def silenced(original: nn.Module, kept: Kept) -> nn.Module:
    """A copy in which every output channel that was removed produces exactly 0."""
    reference = deepcopy(original)
    state = reference.state_dict()
    for name, (rows, *_) in kept.items():
        if not name.endswith(("running_mean", "running_var")):
            gone = torch.ones(len(state[name]), dtype=torch.bool)
            gone[rows] = False
            state[name][gone] = 0
    return reference


@torch.no_grad()
def head_outputs(model: Any, training: bool) -> dict[str, Tensor]:
    """What the last convolution of every tower of the head puts out: raw, before decoding, top-k or NMS.

    In training mode batch norms use the batch, so running statistics move; they are put back.
    """
    head, found = model.model[-1], {}
    towers = [n for n in ("cv2", "cv3", "one2one_cv2", "one2one_cv3") if hasattr(head, n)]
    hooks = [
        level[-1].register_forward_hook(lambda _, __, out, key=f"{n}.{i}": found.__setitem__(key, out.clone()))
        for n in towers
        for i, level in enumerate(getattr(head, n))
    ]
    mode, statistics = model.training, [b.clone() for b in model.buffers()]
    model.train(training)(models.images(2 if training else 1))
    model.train(mode)
    for buffer, before in zip(model.buffers(), statistics, strict=True):
        buffer.copy_(before)
    for hook in hooks:
        hook.remove()
    assert len(found) == head.nl * len(towers)
    return found


def gap(wanted: dict[str, Tensor], got: dict[str, Tensor]) -> float:
    """Largest difference, relative to how much that output varies over images and positions."""
    assert {k: t.shape for k, t in wanted.items()} == {k: t.shape for k, t in got.items()}
    spread = {k: (t - t.mean((0, 2, 3), keepdim=True)).abs().max() for k, t in wanted.items()}
    return max(float((t - got[k]).abs().max() / spread[k]) for k, t in wanted.items())


@functools.cache
def dense_outputs(name: str, training: bool) -> dict[str, Tensor]:
    return head_outputs(models.shared(name), training)


def assert_exact(name: str, pruned: nn.Module) -> None:
    """The oracle's verdict on a cut of `models.shared(name)`."""
    original = models.shared(name)
    reference = silenced(original, recover_kept(original, pruned))
    for training in (False, True):
        wanted = head_outputs(reference, training)
        assert gap(dense_outputs(name, training), wanted) > 1e-3, "silencing changes nothing; the check is vacuous"
        assert gap(wanted, head_outputs(pruned, training)) < TOLERANCE


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
@pytest.mark.parametrize("keep", [0.5, 0.3])
@pytest.mark.parametrize("name", models.FAMILIES)
def test_a_pruned_model_computes_what_silencing_computes(name: str, keep: float, criterion: str) -> None:
    assert_exact(name, models.pruned(name, target_flops=keep, criterion=criterion))


@pytest.mark.parametrize("name", [*models.DEEP, "yolov5-tiny", "yolo26-p2-tiny"])
def test_other_scales_and_relatives_are_exact_too_at_any_width(name: str) -> None:
    plan = models.plan_of(name, target_flops=0.5, channels_round_to=1, channels_min=1)
    pruned = models.build(name)
    surgery.apply(pruned, plan)
    assert_exact(name, pruned)


@pytest.mark.parametrize("name", models.FAMILIES)
def test_two_rounds_are_exact_against_the_dense_model(name: str) -> None:
    pruned = models.pruned(name, target_flops=0.7)
    models.cut(pruned, make_plan(pruned, models.recipe(target_flops=0.4), models.IMGSZ))
    assert_exact(name, pruned)


@pytest.mark.parametrize("name", models.TINY)
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_any_legal_choice_of_channels_is_exact(name: str, data: st.DataObject) -> None:
    graph, random = models.graph_of(name), Random(data.draw(st.integers(0, 2**32)))
    groups = [g for g in graph.groups if not g.protected]
    grains = [data.draw(st.integers(1, g.grain), label=g.name) for g in groups]
    grains[random.randrange(len(groups))] = 1  # something has to go
    kept = {
        s.name: tuple(sorted(random.sample(range(s.size), s.size // g.grain * n)))
        for g, n in zip(groups, grains, strict=True)
        for s in g.sets
    }
    plan = build_plan(graph, models.cost_of(name), kept, {})
    pruned = models.build(name)
    surgery.apply(pruned, plan)
    assert_exact(name, pruned)


@pytest.mark.parametrize("name", models.FAMILIES)
def test_the_oracle_catches_one_wrong_input_channel_of_any_layer(name: str) -> None:
    original, pruned = models.shared(name), models.pruned(name, target_flops=0.5)
    kept = recover_kept(original, pruned)
    wanted = head_outputs(silenced(original, kept), training=True)
    dense, weights, caught = original.state_dict(), pruned.state_dict(), []
    consumers = [t for t, (_, *more) in kept.items() if more and len(more[0]) < dense[t].shape[1]]
    for tensor in consumers[::3]:
        rows, columns = kept[tensor][:2]
        wrong = next(c for c in range(dense[tensor].shape[1]) if c not in columns)
        right = weights[tensor][:, 0].clone()
        weights[tensor][:, 0] = dense[tensor][rows, wrong]
        caught.append(gap(wanted, head_outputs(pruned, training=True)))
        weights[tensor][:, 0] = right
    assert len(caught) > 12
    assert min(caught) > 1e3 * TOLERANCE
    assert gap(wanted, head_outputs(pruned, training=True)) < TOLERANCE


def test_the_oracle_catches_a_wrong_channel_of_a_batch_norm() -> None:
    original, pruned = models.shared("yolov8n"), models.pruned("yolov8n", target_flops=0.5)
    kept = recover_kept(original, pruned)["model.3.bn.running_mean"][0]
    wrong = next(c for c in range(64) if c not in kept)
    pruned.model[3].bn.running_mean[0] = original.model[3].bn.running_mean[wrong]
    reference = silenced(original, recover_kept(original, pruned))
    assert gap(head_outputs(reference, False), head_outputs(pruned, False)) > 1e3 * TOLERANCE
