# SPDX-License-Identifier: AGPL-3.0-or-later
"""torch-pruning's high-level pruners on our graph: what they cut is exact, and the model trains and exports on."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import models
import oracle
import pytest
import torch
import torch_pruning as tp
import yaml
import zoo
from small_data import make
from small_runs import SMALL
from torch import nn
from ultralytics import RTDETR, YOLO
from ultralytics.cfg import get_cfg
from ultralytics.nn.modules import Conv, Detect

import yolo_prune
from yolo_prune.errors import ArgumentError
from yolo_prune.interop import pruners

Magnitude = tp.importance.GroupMagnitudeImportance
PRUNERS: dict[str, tuple[type[Any], Any, dict[str, Any]]] = {
    "base": (pruners.BasePruner, Magnitude(), {}),
    "group norm": (pruners.GroupNormPruner, Magnitude(normalizer=None), {}),
    "growing": (pruners.GrowingRegPruner, Magnitude(), {"delta_reg": 1e-3}),
    "bn scale": (pruners.BNScalePruner, tp.importance.BNScaleImportance(), {"reg": 1e-3}),
    "bn group lasso": (pruners.BNScalePruner, tp.importance.BNScaleImportance(), {"reg": 1e-3, "group_lasso": True}),
}
IMAGE = torch.zeros(1, 3, models.IMGSZ, models.IMGSZ)


def pruner_of(key: str, model: Any, **options: Any) -> Any:
    cls, importance, more = PRUNERS[key]
    settings = {"pruning_ratio": 0.5, "iterative_steps": 2, "max_pruning_ratio": 0.9, **more, **options}
    return cls(model, IMAGE, importance, **settings)


def learn(model: Any) -> None:
    """The gradients of a batch with the task's own loss; statistics of batch norms stay, for the oracle."""
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model.args, model.criterion = get_cfg(), None
    model.zero_grad()
    image = models.images(2).to(next(model.parameters()).dtype)
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.6], [0.4, 0.6, 0.7, 0.5]])
    batch = {"img": image, "batch_idx": torch.arange(2.0), "cls": torch.zeros(2, 1), "bboxes": boxes}
    model.loss(batch)[0].sum().backward()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


QUICK = [("yolo11-tiny", "base", False), ("yolo11-tiny", "group norm", True), ("yolo11-tiny", "bn group lasso", True)]
CASES = list(itertools.product(("yolo11-tiny", "yolo26-tiny"), PRUNERS, (False, True)))


@pytest.mark.parametrize(
    ("name", "key", "globally"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.long) for case in CASES if case not in QUICK)],
)
def test_two_steps_of_a_pruner_are_exact(name: str, key: str, globally: bool) -> None:
    original, model = models.shared(name), models.build(name)
    pruner = pruner_of(key, model, global_pruning=globally)
    before, sizes = gradients(model), [sum(p.numel() for p in model.parameters())]
    for _ in range(2):
        learn(model)
        before = gradients(model)
        pruner.regularize(model, None) if key == "base" else pruner.regularize(model)
        after = gradients(model)
        changed = [n for n in before if not torch.equal(before[n], after[n])]
        assert (len(changed) > 40) == (key != "base")
        assert all(torch.isfinite(g).all() for g in after.values())
        pruner.step()
        pruner.update_regularizer()
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert sizes[0] > sizes[1] * 1.2
    assert sizes[1] > sizes[2] * 1.2
    assert oracle.judge(original, model, name) < oracle.TOLERANCE
    assert yolo_prune.is_pruned(model)
    if not globally:
        assert sizes[2] < 0.35 * sizes[0]
    learn(model)


def test_a_pruner_keeps_no_groups_of_another() -> None:
    shared = [v for v in tp.BasePruner.__init__.__defaults__ or () if isinstance(v, dict)]
    first, second = (pruner_of("base", models.build("yolov8-tiny")) for _ in range(2))
    assert shared
    assert not any(shared)
    assert first.out_channel_groups is not second.out_channel_groups
    assert first.out_channel_groups == first.in_channel_groups == {}


def test_layers_have_their_own_ratios_and_limits() -> None:
    model = models.build("yolov8-tiny")
    head = next(m for m in model.modules() if isinstance(m, Detect))
    before = models.conv_widths(model)
    pruner = pruner_of(
        "base", model, iterative_steps=1, ignored_layers=[head], round_to=2, pruning_ratio_dict={model.model[0]: 0.25}
    )
    pruner.step()
    after = models.conv_widths(model)
    assert after["model.0.conv"] == 0.75 * before["model.0.conv"]
    assert after["model.1.conv"] == 0.5 * before["model.1.conv"]
    assert all(after[n] == before[n] for n in after if n.startswith("model.22."))
    assert all(after[n] % 2 == 0 for n in after if after[n] != before[n])


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("customized_pruners", {nn.Conv2d: None}, "own trace"),
        ("num_heads", {nn.Conv2d(1, 1, 1): 2}, "coupled heads"),
        ("prune_num_heads", True, "heads='heads'"),
    ],
)
def test_an_argument_without_effect_is_refused(option: str, value: Any, said: str) -> None:
    with pytest.raises(ArgumentError, match=f"{option}: leave it out.*{said}"):
        pruner_of("base", models.build("yolov8-tiny"), **{option: value})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"importance": "magnitude"}, "importance='magnitude': must be an importance"),
        ({"importance": Magnitude}, "must be an importance, such as"),
        ({"pruning_ratio": 50}, "pruning_ratio=50: must be a number from 0 to below 1"),
        ({"iterative_steps": 0}, "iterative_steps=0: must be a whole number of at least 1"),
        ({"ignored_layers": ["model.0"]}, "ignored_layers: 'model.0' is no module or parameter of this model"),
        ({"ignored_layers": [nn.Linear(1, 1)]}, "ignored_layers: a Linear is no module or parameter of this model"),
        ({"heads": "whole"}, "heads='whole': must be 'dims' or 'heads'"),
    ],
)
def test_what_torch_pruning_does_not_check_is_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        pruners.MetaPruner(models.build("yolo26-tiny"), IMAGE, **{"importance": Magnitude(), **given})


def test_group_lasso_adds_what_the_formula_says() -> None:
    model = models.build("yolov8-tiny")
    pruner = pruner_of("bn group lasso", model)
    learn(model)
    before = gradients(model)
    pruner.regularize(model)
    norm = model.model[0].bn.weight.detach()
    wanted = before["model.0.bn.weight"] + 1e-3 / (norm.float() ** 2 + 1e-9).sqrt() * norm
    assert torch.allclose(model.model[0].bn.weight.grad, wanted)


def test_a_transposed_convolution_is_left_out_of_the_regularizer() -> None:
    model = zoo.build("yolo11-seg", 0.25)
    up = model.model[-1].proto.upsample
    pruner = pruners.GroupNormPruner(model, IMAGE, Magnitude(normalizer=None), pruning_ratio=0.3)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    length = [len(g) for g in pruner._groups]
    pruner.regularize(model)
    assert not up.weight.grad.any()
    assert model.model[0].conv.weight.grad.any()
    assert [len(g) for g in pruner._groups] == length


@pytest.mark.parametrize("key", ["group norm", "growing"])
def test_a_convolution_with_groups_is_regularized_by_its_outputs_alone(key: str) -> None:
    model = models.build("short").float()
    model.model[4] = changed(model.model[4], Conv(64, 128, 3, 2, g=8))
    pruner = pruner_of(key, model)
    grouped, plain = model.model[4].conv, model.model[3].conv
    ours = [item for g in pruner._groups for item in g if item.dep.layer is grouped]
    assert {item.dep.handler for item in ours} == {tp.prune_conv_in_channels, tp.prune_conv_out_channels}
    learn(model)
    before = gradients(model)
    pruner.regularize(model)
    assert not torch.equal(before["model.3.conv.weight"], plain.weight.grad)


def changed(layer: Any, other: Any) -> Any:
    """A layer in the place of another."""
    other.i, other.f, other.type, other.np = layer.i, layer.f, type(other).__name__, 0
    return other


def wide(name: str, folder: Path) -> Any:
    """A model whose YAML is in a file, thin where the architecture can be."""
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({**zoo.configuration(name, 0.25), "nc": 5}))
    return (RTDETR if "rtdetr" in name else YOLO)(file)


@pytest.mark.long
@pytest.mark.parametrize("key", ["base", "group norm", "growing", "bn scale"])
@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolo26n", "rtdetr-l"])
def test_a_pruned_model_trains_and_exports(name: str, key: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    data = make("detect", tmp_path)
    yolo = wide(name, tmp_path)
    dense = sum(p.numel() for p in yolo.model.parameters())
    pruner = pruner_of(key, yolo, pruning_ratio=0.3)
    for _ in range(2):
        if key != "base":
            for p in yolo.model.parameters():
                p.grad = torch.zeros_like(p)
            pruner.regularize(yolo.model)
        pruner.step()
        pruner.update_regularizer()
    yolo.model.zero_grad()
    cut = {n: tuple(p.shape) for n, p in yolo.model.named_parameters()}
    assert sum(p.numel() for p in yolo.model.parameters()) < 0.75 * dense
    yolo.train(data=str(data), epochs=1, project=tmp_path / "runs", **SMALL)
    best = YOLO(yolo.trainer.best) if "rtdetr" not in name else RTDETR(yolo.trainer.best)
    assert {n: tuple(p.shape) for n, p in best.model.named_parameters()} == cut
    assert yolo_prune.is_pruned(yolo.trainer.best)
    file = best.export(format="onnx", imgsz=64, simplify=False, verbose=False)
    assert Path(file).is_file()
