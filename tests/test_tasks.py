# SPDX-License-Identifier: AGPL-3.0-or-later
"""Real runs of every task: pruned while training, delivered pruned, trained further, loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_data
import torch
import yaml
import zoo
from models import scaled
from small_runs import FINE, RECIPES, RUNS
from ultralytics import RTDETR, YOLO, YOLOWorld
from ultralytics.engine.model import Model
from ultralytics.nn import tasks
from ultralytics.nn.tasks import load_checkpoint

import yolo_prune
from yolo_prune.cut.record import read_record
from yolo_prune.report import Report

THIN, STOCK = 0.125, None  # width multiples; stock models are as Ultralytics ships them
WIDTHS = pytest.mark.parametrize("width", [THIN, pytest.param(STOCK, marks=pytest.mark.long)], ids=["thin", "stock"])
TASKS = {
    "detect": "yolo12",
    "segment": "yolo26-seg",
    "pose": "yolo26-pose",
    "obb": "yolo11-obb",
    "classify": "yolo11-cls",
    "semantic": "yolo26-sem",
    "depth": "yolo26-depth",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


def settings(task: str, folder: Path) -> dict[str, Any]:
    """What all runs of a task pass to `train`."""
    return {"data": str(small_data.make(task, folder)), "project": str(folder / "runs"), **RUNS["tasks"]}


def source(name: str, width: float | None, folder: Path) -> str:
    """The YAML file of an architecture, as it is shipped or thin."""
    if width is STOCK:
        return f"{name}.yaml"
    config = scaled(name, "n", 0.33, 2 * width if name == "yolo12" else width)  # which needs multiples of 32
    head, arguments = config["head"][-1][2:]
    if head == "RTDETRDecoder":
        arguments += [64, 100, 4, 4, 2]  # width, queries, points, heads, layers
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(path)


def prune(model: Model, name: str, run: dict[str, Any], width: float | None) -> Path:
    """Prune a model while it trains; what is delivered is pruned, with a report that agrees."""
    before = sum(p.numel() for p in model.model.parameters())
    recipe = {**RECIPES["tasks"], **({"criterion": "obs"} if width is STOCK else FINE)}
    model.train(epochs=2, callbacks="prune", recipe=recipe, name=name, **run)
    folder = Path(run["project"]) / name
    report = Report.load(folder)
    assert report.status == "finished"
    delivered, _ = load_checkpoint(folder / "weights/best.pt")
    record = read_record(delivered)
    assert record
    assert record.plan
    assert sum(p.numel() for p in delivered.parameters()) < before
    assert report.pruned.flops / report.dense.flops <= 0.7 + 1e-9
    assert report.rounds[0].proof.error < 1e-8
    assert yolo_prune.is_pruned(model)
    return folder / "weights/best.pt"


def train_on(checkpoint: Path, name: str, run: dict[str, Any]) -> YOLO:
    """Training a pruned checkpoint further keeps its structure."""
    model = YOLO(checkpoint)
    pruned = sum(p.numel() for p in model.model.parameters())
    model.train(epochs=1, name=f"{name}-again", **run)
    assert sum(p.numel() for p in model.model.parameters()) == pruned
    return model


@pytest.mark.slow
@WIDTHS
@pytest.mark.parametrize("task", TASKS)
def test_a_run_of_every_task(task: str, width: float | None, folder: Path) -> None:
    run = settings(task, folder)
    torch.manual_seed(0)
    name = f"{task}-{width}"
    again = train_on(prune(YOLO(source(TASKS[task], width, folder)), name, run, width), name, run)
    assert len(again.predict(torch.rand(1, 3, 64, 64), verbose=False)) == 1


@pytest.mark.slow
@WIDTHS
def test_a_run_of_rtdetr(width: float | None, folder: Path) -> None:
    run = settings("detect", folder)
    prune(RTDETR(source("yolov8-rtdetr", width, folder)), f"rtdetr-{width}", run, width)


@pytest.mark.slow
@WIDTHS
def test_a_run_of_world(width: float | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text embeddings come from CLIP, which would be downloaded: made up here."""

    def embed(self: Any, text: list[str], batch: int = 80, cache_clip_model: bool = False) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.nn.functional.normalize(torch.randn(1, len(text), 512, generator=generator), dim=-1)

    monkeypatch.setattr(tasks.WorldModel, "get_text_pe", embed)
    run, name = settings("detect", folder), f"world-{width}"
    train_on(prune(YOLOWorld(source("yolov8-world", width, folder)), name, run, width), name, run)


def test_every_task_has_a_run() -> None:
    assert {zoo.task_of(name) for name in zoo.NAMES} == set(TASKS)
