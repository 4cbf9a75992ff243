# SPDX-License-Identifier: AGPL-3.0-or-later
"""Real runs of every task: pruned while training, delivered pruned, trained further, loaded, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import zoo
from ultralytics import YOLO
from ultralytics.nn import tasks
from ultralytics.nn.tasks import load_checkpoint

import yolo_prune
from yolo_prune import metadata
from yolo_prune.report import Report

TINY: dict[str, Any] = {
    "imgsz": 64,
    "batch": 4,
    "nbs": 4,
    "workers": 0,
    "amp": False,
    "plots": False,
    "verbose": False,
    "device": "cpu",
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


def check(model: YOLO, run: Path, before: int) -> None:
    """A run delivered a pruned checkpoint with a report that agrees, and it goes on from there."""
    report = Report.load(run)
    assert report.status == "finished"
    delivered, _ = load_checkpoint(run / "weights/best.pt")
    record = metadata.read(delivered)
    assert record
    assert record.plan
    after = sum(p.numel() for p in delivered.parameters())
    assert after < before
    assert report.pruned.flops / report.dense.flops <= 0.7 + 1e-9
    assert report.rounds[0].proof.error < 1e-8
    assert yolo_prune.is_pruned(model)


@pytest.mark.slow
@pytest.mark.parametrize("task", RUNS)
def test_a_run_of_every_task(task: str, folder: Path) -> None:
    data = str(datasets.make(task, folder))
    torch.manual_seed(0)
    model = YOLO(f"{RUNS[task]}.yaml")
    before = sum(p.numel() for p in model.model.parameters())
    run = {"data": data, "project": str(folder / "runs"), **TINY}
    model.train(epochs=2, callbacks="prune", name=task, **run, **EASY)
    check(model, folder / "runs" / task, before)

    again = YOLO(folder / "runs" / task / "weights/best.pt")
    pruned = sum(p.numel() for p in again.model.parameters())
    again.train(epochs=1, name=f"{task}-again", **run)
    assert sum(p.numel() for p in again.model.parameters()) == pruned
    assert len(again.predict(torch.rand(1, 3, 64, 64), verbose=False)) == 1


@pytest.mark.slow
def test_a_run_of_rtdetr(folder: Path) -> None:
    from ultralytics import RTDETR

    data = str(datasets.make("detect", folder))
    model = RTDETR("yolov8-rtdetr.yaml")
    before = sum(p.numel() for p in model.model.parameters())
    run = {"data": data, "project": str(folder / "runs"), **TINY}
    model.train(epochs=2, callbacks="prune", name="rtdetr", **run, **EASY)
    check(model, folder / "runs" / "rtdetr", before)


@pytest.mark.slow
def test_a_run_of_world(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text embeddings come from CLIP, which would be downloaded: made up here."""
    from ultralytics import YOLOWorld

    def embed(self: Any, text: list[str], batch: int = 80, cache_clip_model: bool = False) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.nn.functional.normalize(torch.randn(1, len(text), 512, generator=generator), dim=-1)

    monkeypatch.setattr(tasks.WorldModel, "get_text_pe", embed)
    data = str(datasets.make("detect", folder))
    model = YOLOWorld("yolov8-world.yaml")
    before = sum(p.numel() for p in model.model.parameters())
    run = {"data": data, "project": str(folder / "runs"), **TINY}
    model.train(epochs=2, callbacks="prune", name="world", **run, **EASY)
    check(model, folder / "runs" / "world", before)
    again = YOLO(folder / "runs/world/weights/best.pt")
    pruned = sum(p.numel() for p in again.model.parameters())
    again.train(epochs=1, name="world-again", **run)
    assert sum(p.numel() for p in again.model.parameters()) == pruned


def test_every_task_has_a_run() -> None:
    assert {zoo.task_of(name) for name in zoo.NAMES} == set(RUNS)
