# SPDX-License-Identifier: AGPL-3.0-or-later
"""Ultralytics' own settings together with pruning: each works, with the effect it is there for, or is refused."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_data
import torch
from PIL import Image
from small_runs import RECIPES, RUNS
from ultralytics import YOLO
from ultralytics.data.augment import Compose, Mosaic
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils.metrics import DetMetrics

from yolo_prune.cut.record import read_record
from yolo_prune.errors import RunError
from yolo_prune.report import Report

RUN: dict[str, Any] = {**RUNS["settings"], "recipe": RECIPES["settings"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_data.tiny(tmp_path_factory.mktemp("settings"), train=12)
    for path in sorted((folder / "scenes/images/train").iterdir())[::2]:  # with rect=True, batches of two shapes
        with Image.open(path) as image:
            wide = image.resize((128, 64))
        wide.save(path)
    return folder


def mosaic_of(transforms: Any) -> float:
    """How probable a mosaic is."""
    for transform in transforms.transforms:
        if isinstance(transform, Mosaic):
            return float(transform.p)
        if isinstance(transform, Compose):
            return mosaic_of(transform)
    return 0.0


class Watched:
    """A run, with what its trainer looked like at the end of each epoch."""

    def __init__(
        self, folder: Path, tmp_path: Path, callbacks: dict[str, Callable[[Any], None]] | None = None, **settings: Any
    ):
        self.epochs: list[dict[str, Any]] = []
        self.shapes: set[tuple[int, ...]] = set()
        model = YOLO(folder / "dense.pt")
        model.add_callback("on_train_epoch_end", self.look)
        model.add_callback("on_train_start", self.look_at_batches)
        for event, function in (callbacks or {}).items():
            model.add_callback(event, function)
        places = {"data": str(folder / "scenes/scenes.yaml"), "project": str(tmp_path), "name": "run"}
        model.train(**{**RUN, **places, **settings})
        self.folder = tmp_path / "run"
        self.report = Report.load(self.folder)
        self.best = load_checkpoint(self.folder / "weights/best.pt")[0]

    def look(self, trainer: Any) -> None:
        self.epochs.append(
            {
                "patience": trainer.stopper.patience,
                "lr": [g["lr"] for g in trainer.optimizer.param_groups],
                "batch": trainer.batch_size,
                "images": len(trainer.train_loader.dataset),
                "weights": getattr(trainer.model, "class_weights", None),
                "mosaic": mosaic_of(trainer.train_loader.dataset.transforms),
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "cached": sum(i is not None for i in trainer.train_loader.dataset.ims),
            }
        )

    def look_at_batches(self, trainer: Any) -> None:
        def preprocess_batch(batch: dict[str, Any]) -> Any:
            self.shapes.add(tuple(batch["img"].shape[2:]))
            return stock(batch)

        stock = trainer.preprocess_batch
        trainer.preprocess_batch = preprocess_batch

    def rows(self) -> list[dict[str, str]]:
        return list(csv.DictReader((self.folder / "results.csv").open()))

    def is_delivered(self) -> None:
        """Whatever was set: two rounds, the target met, the checkpoint of the last structure, figures that agree."""
        assert self.report.status == "finished"
        assert [r.number for r in self.report.rounds] == [1, 2]
        assert self.report.pruned.flops / self.report.dense.flops <= 0.6
        assert self.report.pruned.params == sum(p.numel() for p in self.best.parameters())
        assert [r.plan for r in read_record(self.best).rounds] == [r.plan for r in self.report.rounds]
        assert [int(r["epoch"]) for r in self.rows()] == [e.epoch for e in self.report.epochs_log]


def closes_mosaic(run: Watched) -> bool:
    return [e["mosaic"] for e in run.epochs] == [1.0, 1.0, 0.0]


def freezes(run: Watched) -> bool:
    dense = load_checkpoint(run.folder.parent / "dense.pt")[0].state_dict()
    frozen = {k: v for k, v in run.best.state_dict().items() if k.startswith(("model.0.", "model.1."))}
    return all(torch.equal(value, dense[key]) for key, value in frozen.items())


def falls_like_a_cosine(run: Watched) -> bool:
    shares = [(1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in range(3)]
    return [e["lr"][0] for e in run.epochs] == pytest.approx([0.01 * (0.01 + 0.99 * share) for share in shares])


def saves_epochs(run: Watched) -> bool:
    saved = [load_checkpoint(run.folder / f"weights/epoch{i}.pt")[0] for i in range(3)]
    sizes = [sum(p.numel() for p in model.parameters()) for model in saved]
    return sizes == [e.params for e in run.report.epochs_log] and sizes[0] > sizes[1] == sizes[2]


def has_class_weights(run: Watched) -> bool:
    return all(e["weights"] is not None and len(e["weights"]) == 5 for e in run.epochs)


Effect = Callable[[Watched], bool] | None
SETTINGS: dict[str, tuple[dict[str, Any], Effect]] = {
    "val": ({"val": False}, lambda run: run.report.pruned.fitness is not None),
    "save_period": ({"save_period": 1}, saves_epochs),
    "close_mosaic": ({"close_mosaic": 1}, closes_mosaic),
    "warm-up": (
        {"warmup_epochs": 2.0, "optimizer": "SGD", "lr0": 0.01},
        lambda run: run.epochs[0]["lr"][0] < run.epochs[1]["lr"][0],
    ),
    "cos_lr": ({"cos_lr": True, "warmup_epochs": 0.0, "lr0": 0.01, "lrf": 0.01}, falls_like_a_cosine),
    "freeze": ({"freeze": 2}, freezes),
    "multi_scale": ({"multi_scale": 0.5, "imgsz": 128}, None),
    "rect": ({"rect": True}, lambda run: len(run.shapes) > 1),
    "cache in memory": ({"cache": "ram"}, lambda run: all(e["cached"] == 12 for e in run.epochs)),
    "cache on disk": ({"cache": "disk"}, lambda run: any((run.folder.parent / "scenes").rglob("*.npy"))),
    "fraction": ({"fraction": 0.5}, lambda run: all(e["images"] == 6 for e in run.epochs)),
    "single_cls": ({"single_cls": True}, lambda run: run.best.model[-1].nc == 1),
    "class weights": ({"cls_pw": 0.5}, has_class_weights),
    "deterministic": ({"deterministic": False}, lambda run: not any(e["deterministic"] for e in run.epochs)),
    "accumulation": ({"nbs": 16}, None),
    "classes": ({"classes": [0, 1]}, None),
    "plots": ({"plots": True}, lambda run: (run.folder / "results.png").exists()),
    "seed": ({"seed": 7}, None),
    "dropout and augmentation": ({"mixup": 0.5, "degrees": 10.0, "dropout": 0.1}, None),
}
TOGETHER = (  # settings that do not hide one another's effects, in one run
    ("val", "save_period", "cos_lr", "fraction", "seed"),
    ("close_mosaic", "freeze", "cache in memory", "class weights", "accumulation"),
    ("warm-up", "rect", "cache on disk", "single_cls"),
    ("multi_scale", "deterministic", "classes", "dropout and augmentation", "plots"),
)


@pytest.mark.slow
@pytest.mark.parametrize("names", TOGETHER, ids=", ".join)
def test_a_setting_works_while_channels_go(names: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "dense.pt").symlink_to(folder / "dense.pt")
    (tmp_path / "scenes").symlink_to(folder / "scenes")
    run = Watched(folder, tmp_path, **{k: v for name in names for k, v in SETTINGS[name][0].items()})
    run.is_delivered()
    for name in names:
        if effect := SETTINGS[name][1]:
            assert effect(run), name


def test_every_setting_has_a_run() -> None:
    assert sorted(name for names in TOGETHER for name in names) == sorted(SETTINGS)


@pytest.mark.slow
def test_nan_after_a_cut_is_recovered_from(folder: Path, tmp_path: Path) -> None:
    """Ultralytics reloads last.pt, which has been rewritten with the new structure."""
    attempts: list[int] = []

    def poison(trainer: Any) -> None:
        if trainer.epoch == 1 and not attempts:
            with torch.no_grad():
                next(trainer.model.parameters()).fill_(torch.nan)
                next(trainer.ema.ema.parameters()).fill_(torch.nan)

    def count(trainer: Any) -> None:
        if trainer.epoch == 1 and trainer.nan_recovery_attempts:
            attempts.append(trainer.nan_recovery_attempts)

    run = Watched(folder, tmp_path, {"on_train_batch_start": poison, "on_train_epoch_start": count})
    run.is_delivered()
    assert attempts == [1]
    assert all(torch.isfinite(v).all() for v in run.best.state_dict().values())


@pytest.mark.slow
def test_a_first_epoch_out_of_memory_is_redone_with_half_the_batch(folder: Path, tmp_path: Path) -> None:
    failed: list[int] = []

    def fail_once(trainer: Any) -> None:
        stock = trainer.preprocess_batch

        def preprocess_batch(batch: Any) -> Any:
            trainer.preprocess_batch = stock
            failed.append(trainer.epoch)
            raise torch.OutOfMemoryError("CUDA out of memory")

        if not failed:
            trainer.preprocess_batch = preprocess_batch

    run = Watched(folder, tmp_path, {"on_train_batch_start": fail_once})
    run.is_delivered()
    assert failed == [0]
    assert [e["batch"] for e in run.epochs] == [2, 2, 2]


@pytest.mark.slow
def test_early_stopping_ends_the_run_after_the_last_round(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DetMetrics, "fitness", property(lambda self: 0.5))
    run = Watched(folder, tmp_path, epochs=30, patience=2, recipe={**RECIPES["settings"], "measure": False})
    run.is_delivered()
    assert len(run.rows()) == 4  # the last cut, before the second epoch, begins the wait anew
    assert [e["patience"] for e in run.epochs] == [math.inf, 2, 2, 2]  # until the last round, nothing stops
    assert [r.fitness.cut for r in run.report.rounds] == [None, None]  # not measured


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time": 0.1}, r"time=0\.1 does not work with callbacks=prune: the number of epochs is not known beforehand"),
        ({"compile": True}, "compile=True does not work with callbacks=prune: a compiled model cannot change shape"),
        ({"quantize": 8}, "Instead, prune first, then train the pruned checkpoint with quantize=8"),
        ({"save": False}, "save=False does not work with callbacks=prune: the pruned model would be lost"),
        ({"data": ["a.yaml", "b.yaml"]}, "rounds belong to one run"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_with_the_reason(
    settings: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=message):
        Watched(folder, tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []
