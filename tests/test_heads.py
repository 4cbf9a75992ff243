# SPDX-License-Identifier: AGPL-3.0-or-later
"""A pruned model on another dataset: only the layers that depend on it are made anew."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import small_data
import torch
import yaml
from models import build, plan_of, scaled
from PIL import Image
from small_runs import FINE, PLAIN, RUNS
from torch import nn
from ultralytics import YOLO
from ultralytics.nn import tasks
from ultralytics.nn.tasks import load_checkpoint

import yolo_prune
from yolo_prune.cut import heads, surgery
from yolo_prune.cut.record import Record, read_record, write_record

RUN = RUNS["heads"]
MODELS = {
    "yolov8n": "DetectionModel",
    "yolo26n": "DetectionModel",
    "yolo26n-seg": "SegmentationModel",
    "yolo26n-pose": "PoseModel",
    "yolo11n-obb": "OBBModel",
    "yolo11n-cls": "ClassificationModel",
    "yolo26n-sem": "SemanticSegmentationModel",
    "yolov8-rtdetr": "RTDETRDetectionModel",
}


@pytest.mark.parametrize("name", MODELS)
def test_what_follows_the_classes_is_all_that_differs_from_a_model_of_that_many(name: str) -> None:
    """Hidden widths of some heads depend on the classes, too; those of a pruned model are kept."""
    cls = getattr(tasks, MODELS[name])

    def make(nc: int) -> nn.Module:
        return cls(f"{name}.yaml", nc=nc, verbose=False)

    model, wanted = make(5), make(7)
    heads.resize(model, heads.followers(make).of(model, 5), 7, make(7))
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in wanted.state_dict().items()}
    for (n, mine), (_, theirs) in zip(model.named_modules(), wanted.named_modules(), strict=True):
        numbers = {k: v for k, v in vars(theirs).items() if type(v) is int}
        assert {k: vars(mine)[k] for k in numbers} == numbers, n
        if ".score_head" in n or n.endswith(("cv3.0.2", "score")):
            assert torch.equal(mine.bias, theirs.bias), f"{n}: a class would be everywhere"
    image = torch.rand(1, 3, 64, 64)
    if name != "yolov8-rtdetr":  # its decoder has no use for a class it has not seen, in training only
        model.eval()(image)


def test_rows_of_classes_with_the_same_name_move_with_it() -> None:
    model = build("yolo26-tiny").float()
    surgery.apply(model, plan := plan_of("yolo26-tiny", channels_round_to=1, channels_min=1))
    write_record(model, Record({}, plan))
    config = scaled("yolo26", "n", 0.33, 0.125)
    follow = heads.followers(lambda n: tasks.DetectionModel(dict(config), nc=n, verbose=False)).of(model, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stock = tasks.DetectionModel(dict(config), nc=4, verbose=False)
    rows = heads.same_names({0: "a", 1: "b", 2: "c"}, {0: "New", 1: "C ", 2: "a", 3: "x"})
    heads.resize(model, follow, 4, stock, rows)
    assert read_record(model).plan.shapes["model.23.cv3.0.2.weight"][0] == 4
    surgery.check_applied(model, read_record(model).plan)
    after = model.state_dict()
    renewed = {name for name in after if after[name].shape != before[name].shape}
    branches = [f"model.23.{b}.{i}.2.{k}" for b in ("cv3", "one2one_cv3") for i in range(3) for k in ("weight", "bias")]
    assert renewed == set(branches)
    for name in after:
        if name in renewed:
            assert torch.equal(after[name][[1, 2]], before[name][[2, 0]])
            assert not torch.equal(after[name][0], before[name][0])
        else:
            assert torch.equal(after[name], before[name]), name


@pytest.mark.parametrize(
    ("old", "new", "rows"),
    [
        ("abc", "abc", None),
        ("abc", "xyz", None),  # Ultralytics keeps the rows, too
        ("abc", "cab", [2, 0, 1]),
        ("abc", "abx", [0, 1, None]),
        ("abc", "ab", [0, 1]),
        ("01", "ab", None),
        ("01", "abc", [None, None, None]),
    ],
)
def test_classes_are_matched_by_name(old: str, new: str, rows: list[int | None] | None) -> None:
    assert heads.same_names(dict(enumerate(old)), dict(enumerate(new))) == rows


def test_grey_images_see_the_sum_of_the_filters() -> None:
    def make(channels: int) -> nn.Module:
        return tasks.DetectionModel("yolo11n.yaml", ch=channels, nc=3, verbose=False)

    model = make(3)
    old = model.model[0].conv.weight.detach().clone()
    follow = heads.followers(make).of(model, 3)
    heads.resize(model, follow, 1, make(1))
    assert torch.equal(model.model[0].conv.weight, old.sum(1, keepdim=True))
    heads.resize(model, follow, 4, make(4))
    assert model.model[0].conv.in_channels == 4
    assert torch.equal(model.model[0].conv.weight[:, :1], old.sum(1, keepdim=True))


def thin(name: str, folder: Path, **data: Any) -> Path:
    """A pruned checkpoint."""
    torch.manual_seed(0)
    path = folder / f"{name}-thin.yaml"
    family, _, task = name.partition("-")
    config = scaled(f"{family}{f'-{task}' if task else ''}", "n", 0.33, 0.125)
    path.write_text(yaml.safe_dump({**config, **data}))
    model = YOLO(path)
    if "nc" in data:
        model.model.names = dict(enumerate("abcdefgh"[: data["nc"]]))
    yolo_prune.apply(model, yolo_prune.plan(model, {"target": {"flops": 0.5}, **FINE}, imgsz=64))
    model.save(folder / f"{name}.pt")
    return folder / f"{name}.pt"


def check(run: Path, start: Path) -> nn.Module:
    """The delivered model is pruned like the one it began with, and can be pruned further."""
    best, before = load_checkpoint(run / "weights/best.pt")[0], load_checkpoint(start)[0]
    assert yolo_prune.is_pruned(best)
    record, plan = read_record(best), yolo_prune.plan(best, {"target": {"flops": 0.4}, **FINE}, imgsz=64)
    assert record.plan.keep == read_record(before).plan.keep
    assert plan.predicted.flops_kept <= 0.4
    assert plan.predicted.dense_flops > plan.predicted.flops_before
    widths = {n: m.out_channels for n, m in best.named_modules() if isinstance(m, nn.Conv2d)}
    old = {n: m.out_channels for n, m in before.named_modules() if isinstance(m, nn.Conv2d)}
    assert 0 < sum(widths[n] != old[n] for n in widths) <= 18 or widths == old
    return best


@pytest.mark.slow
def test_a_pruned_model_trains_on_other_classes(tmp_path: Path) -> None:
    data = small_data.make("detect", tmp_path)
    start = thin("yolo26", tmp_path, nc=8)
    YOLO(start).train(data=str(data), project=str(tmp_path), **RUN)
    best = check(tmp_path / "train", start)
    assert list(best.names.values()) == list(yaml.safe_load(data.read_text())["names"].values())
    assert best.model[-1].nc == best.model[-1].cv3[0][-1].out_channels == 5


@pytest.mark.slow
def test_a_pruned_model_trains_on_other_keypoints(tmp_path: Path) -> None:
    data = small_data.make("pose", tmp_path)
    start = thin("yolo26-pose", tmp_path)  # 17 keypoints, of three values each
    YOLO(start).train(data=str(data), project=str(tmp_path), **RUN)
    best = check(tmp_path / "train", start)
    assert list(best.model[-1].kpt_shape) == [2, 3]


@pytest.mark.slow
def test_a_pruned_model_trains_on_grey_images(tmp_path: Path) -> None:
    source = small_data.make("detect", tmp_path)
    grey = tmp_path / "grey"
    shutil.copytree(source.parent, grey, ignore=shutil.ignore_patterns("*.cache"))
    for path in (grey / "images").rglob("*.*"):
        Image.open(path).convert("L").save(path)
    data = grey / "grey.yaml"
    data.write_text(yaml.safe_dump({**yaml.safe_load(source.read_text()), "path": str(grey), "channels": 1}))
    start = thin("yolo11", tmp_path, nc=5)
    YOLO(start).train(data=str(data), project=str(tmp_path), **RUN)
    best = check(tmp_path / "train", start)
    assert best.model[0].conv.weight.shape[1] == 1


@pytest.mark.slow
def test_a_pruned_model_is_pruned_further_on_other_classes(tmp_path: Path) -> None:
    data = small_data.make("detect", tmp_path)
    start = thin("yolo11", tmp_path, nc=3)
    recipe = {**PLAIN, **FINE, "target": {"flops": 0.4}, "schedule": {"rounds": 1}}
    YOLO(start).train(data=str(data), project=str(tmp_path), callbacks="prune", recipe=recipe, **RUN)
    report = yolo_prune.report.Report.load(tmp_path / "train")
    assert report.status == "finished"
    assert report.pruned.flops <= 0.4 * report.dense.flops
