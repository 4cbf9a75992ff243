# SPDX-License-Identifier: AGPL-3.0-or-later
"""Recovery: recovered statistics are those of the activations, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator

import models
import pytest
import torch
from torch import Tensor, nn

from yolo_prune.recover import recalibrate

Seen = dict[str, list[Tensor]]


def norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def watch(model: nn.Module) -> Seen:
    """What every batch norm is given, batch by batch, one row per channel."""
    seen: Seen = {name: [] for name in norms(model)}
    for name, layer in norms(model).items():
        layer.register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].detach().movedim(1, 0).flatten(1))
        )
    return seen


@pytest.mark.parametrize("name", ["yolov8-tiny", "yolo11-tiny", "yolo26-tiny"])
def test_statistics_are_those_of_the_activations(name: str) -> None:
    model = models.pruned(name, target_flops=0.6).eval()
    seen = watch(model)
    assert recalibrate(model, [models.images(2)]) == 1
    for layer_name, layer in norms(model).items():
        (values,) = seen[layer_name]
        torch.testing.assert_close(layer.running_mean, values.mean(1))
        torch.testing.assert_close(layer.running_var, values.var(1))
        assert layer.num_batches_tracked == 1


def test_several_batches_weigh_the_same() -> None:
    model = models.pruned("yolov8-tiny", target_flops=0.6)
    seen = watch(model)
    assert recalibrate(model, (models.images(2, seed=i) for i in range(3))) == 3
    for name, layer in norms(model).items():
        torch.testing.assert_close(layer.running_mean, torch.stack([v.mean(1) for v in seen[name]]).mean(0))
        torch.testing.assert_close(layer.running_var, torch.stack([v.var(1) for v in seen[name]]).mean(0))


def test_what_was_measured_before_is_forgotten() -> None:
    one, other = models.build("yolov8-tiny"), models.build("yolov8-tiny")
    for layer in norms(other).values():
        layer.running_mean.fill_(1e6)
        layer.running_var.fill_(1e-6)
    for model in (one, other):
        recalibrate(model, [models.images(2)])
    assert models.same_bits(models.snapshot(one), models.snapshot(other))


def test_only_statistics_change() -> None:
    model = models.build("yolo26-tiny")
    before, random = models.snapshot(model), torch.get_rng_state()
    recalibrate(model, [models.images(2)])
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    keys = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{n}.{key}" for n in norms(model) for key in keys}
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def settle(model: nn.Module) -> None:
    """Modes and momenta that are different from layer to layer."""
    for i, layer in enumerate(model.modules()):
        layer.training = i % 2 == 0
    for i, layer in enumerate(norms(model).values()):
        layer.momentum = None if i == 3 else 0.01 * i


def test_modes_and_momenta_are_as_before() -> None:
    model, untouched = models.build("yolov8-tiny"), models.build("yolov8-tiny")
    settle(model)
    settle(untouched)
    recalibrate(model, [models.images(2)])
    assert [m.training for m in model.modules()] == [m.training for m in untouched.modules()]
    assert [m.momentum for m in norms(model).values()] == [m.momentum for m in norms(untouched).values()]


def test_modes_and_momenta_are_as_before_when_the_images_fail() -> None:
    def images() -> Iterator[Tensor]:
        yield models.images(2)
        raise OSError("the disk is gone")

    model, untouched = models.build("yolov8-tiny"), models.build("yolov8-tiny")
    settle(model)
    settle(untouched)
    with pytest.raises(OSError, match="the disk is gone"):
        recalibrate(model, images())
    assert [m.training for m in model.modules()] == [m.training for m in untouched.modules()]
    assert [m.momentum for m in norms(model).values()] == [m.momentum for m in norms(untouched).values()]


@pytest.mark.parametrize("frozen", [("model.0.bn", "model.2.cv1.bn"), ("model.0", "model.2"), ("model.2.cv1",)])
def test_frozen_modules_keep_their_statistics_and_run_on_them(frozen: tuple[str, ...]) -> None:
    model = models.build("yolov8-tiny")
    before = models.snapshot(model)
    seen = watch(model)
    recalibrate(model, [models.images(2)], frozen)
    for name, layer in norms(model).items():
        if any(name == f or name.startswith(f"{f}.") for f in frozen):
            assert all(torch.equal(t, before[f"{name}.{key}"]) for key, t in layer.state_dict().items()), name
        else:
            torch.testing.assert_close(layer.running_mean, seen[name][0].mean(1))


def test_a_module_beside_a_frozen_one_is_not_frozen() -> None:
    model = models.build("yolov8-tiny")
    before = model.model[12].cv1.bn.running_mean.clone()
    recalibrate(model, [models.images(2)], ["model.1"])
    assert not torch.equal(model.model[12].cv1.bn.running_mean, before)


def test_without_images_nothing_changes() -> None:
    model = models.build("yolov8-tiny")
    before = models.snapshot(model)
    assert recalibrate(model, iter(())) == 0
    assert models.same_bits(models.snapshot(model), before)


def test_a_batch_norm_without_statistics_is_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3)).double().eval()
    assert recalibrate(model, [models.images(2)]) == 1
    assert model[0].running_mean is None
    assert model[1].num_batches_tracked == 1


def test_images_are_taken_one_batch_at_a_time() -> None:
    model, ready = models.build("yolov8-tiny"), []
    seen = watch(model)

    def images() -> Iterator[Tensor]:
        for i in range(3):
            ready.append(len(seen["model.0.bn"]))
            yield models.images(2, seed=i)

    recalibrate(model, images())
    assert ready == [0, 1, 2]


def test_recalibration_repairs_what_a_cut_shifts() -> None:
    """Judged in the mode of deployment: after it, activations are normalised again, give or take n / (n - 1)."""
    model, image = models.build("yolov8n"), models.images(8)
    recalibrate(model, [image])
    models.cut(model, models.plan_of("yolov8n", target_flops=0.5))

    def off() -> float:
        seen = watch(model)
        with torch.no_grad():
            model.eval()(image)
        layers = norms(model)
        z = [(v[0].mean(1) - layers[n].running_mean) / layers[n].running_var.sqrt() for n, v in seen.items()]
        return float(torch.cat(z).abs().mean())  # mean shift, in standard deviations

    before = off()
    recalibrate(model, [image])
    assert off() < before / 2
