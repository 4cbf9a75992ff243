# SPDX-License-Identifier: AGPL-3.0-or-later
"""Real runs of every task: pruned while training, delivered pruned, trained further, loaded, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_data
import torch
import zoo
from small_runs import QUICK
from ultralytics import RTDETR, YOLO, YOLOWorld
from ultralytics.engine.model import Model
from ultralytics.nn import tasks
from ultralytics.nn.tasks import load_checkpoint

import yolo_prune
from yolo_prune.cut.record import read_record
from yolo_prune.report import Report

TINY: dict[str, Any] = {
    "imgsz": 64,
    "batch": 4,
    "nbs": 4,
    **QUICK,
    "verbose": False,
    "optimizer": "AdamW",
    "lr0": 0.001,
}
EASY = {"recipe.target.flops": 0.7, "recipe.schedule.rounds": 1, "recipe.recover.batchnorm": 1}
RUNS = {
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
    return {"data": str(small_data.make(task, folder)), "project": str(folder / "runs"), **TINY}


def prune(model: Model, name: str, run: dict[str, Any]) -> Path:
    """Prune a model while it trains; what is delivered is pruned, with a report that agrees."""
    before = sum(p.numel() for p in model.model.parameters())
    model.train(epochs=2, callbacks="prune", name=name, **run, **EASY)
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
@pytest.mark.parametrize("task", RUNS)
def test_a_run_of_every_task(task: str, folder: Path) -> None:
    run = settings(task, folder)
    torch.manual_seed(0)
    again = train_on(prune(YOLO(f"{RUNS[task]}.yaml"), task, run), task, run)
    assert len(again.predict(torch.rand(1, 3, 64, 64), verbose=False)) == 1


@pytest.mark.slow
def test_a_run_of_rtdetr(folder: Path) -> None:
    prune(RTDETR("yolov8-rtdetr.yaml"), "rtdetr", settings("detect", folder))


@pytest.mark.slow
def test_a_run_of_world(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text embeddings come from CLIP, which would be downloaded: made up here."""

    def embed(self: Any, text: list[str], batch: int = 80, cache_clip_model: bool = False) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.nn.functional.normalize(torch.randn(1, len(text), 512, generator=generator), dim=-1)

    monkeypatch.setattr(tasks.WorldModel, "get_text_pe", embed)
    run = settings("detect", folder)
    train_on(prune(YOLOWorld("yolov8-world.yaml"), "world", run), "world", run)


def test_every_task_has_a_run() -> None:
    assert {zoo.task_of(name) for name in zoo.NAMES} == set(RUNS)
