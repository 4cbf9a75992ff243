# SPDX-License-Identifier: AGPL-3.0-or-later
"""Runs that were interrupted in unusual circumstances, and what is left of them."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import small_data
from small_runs import RECIPES, RUNS
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import callbacks as integrations

from yolo_prune.cut.record import is_pruned
from yolo_prune.errors import RunError
from yolo_prune.report import Report
from yolo_prune.run import checks, resume

RUN: dict[str, Any] = {**RUNS["resume"], "recipe": RECIPES["resume"]}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data.tiny(tmp_path_factory.mktemp("resume"), train=8)


class Interrupted(Exception):
    """What ends the runs here."""


def begin(folder: Path, project: Path, trained: int, model: YOLO | None = None, **settings: Any) -> YOLO:
    """A run that is interrupted once that many epochs are trained and last.pt of the last one is written."""

    def interrupt(trainer: Any) -> None:
        if trainer.epoch == trained - 1:
            raise Interrupted

    model = model or YOLO(folder / "dense.pt")
    model.add_callback("on_model_save", interrupt)
    with pytest.raises(Interrupted):
        model.train(**{**RUN, "data": str(folder / "scenes/scenes.yaml"), "project": str(project), **settings})
    model.clear_callback("on_model_save")
    return model


def epochs_of(run: Path) -> list[int]:
    return [int(row["epoch"]) for row in csv.DictReader((run / "results.csv").open())]


def test_without_validation_a_resumed_run_trains_all_its_epochs(folder: Path, tmp_path: Path) -> None:
    begin(folder, tmp_path, 4, epochs=6, val=False, patience=1)
    YOLO(tmp_path / "run/weights/last.pt").train(resume=True)
    assert epochs_of(tmp_path / "run") == list(range(1, 7))


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_run_whose_epochs_are_all_trained_is_completed(folder: Path, tmp_path: Path, epochs: int) -> None:
    recipe = {**RUN["recipe"], "schedule": {"rounds": 1}}
    plots = epochs == 1
    begin(folder, tmp_path, epochs, epochs=epochs, recipe=recipe, plots=plots)
    YOLO(tmp_path / "run/weights/last.pt").train(resume=True)
    assert Report.load(tmp_path / "run").status == "finished"
    assert is_pruned(load_checkpoint(tmp_path / "run/weights/best.pt")[0])
    assert (tmp_path / "run/results.png").exists() is plots


def test_another_image_size_leaves_the_figures_of_the_report_comparable(folder: Path, tmp_path: Path) -> None:
    begin(folder, tmp_path, 1, epochs=2)
    YOLO(tmp_path / "run/weights/last.pt").train(resume=True, imgsz=32)
    report = Report.load(tmp_path / "run")
    assert report.imgsz == 64
    assert 0.5 < report.pruned.flops / report.dense.flops <= 0.6
    assert [r.flops / report.dense.flops <= t for r, t in zip(report.rounds, (0.66, 0.6), strict=True)] == [True, True]


def test_a_run_whose_folder_was_moved_goes_on_with_all_of_it(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begin(folder, tmp_path, 2)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    YOLO(tmp_path / "moved/weights/last.pt").train(resume=True)
    assert "continues from last.pt alone" not in caplog.text
    assert epochs_of(tmp_path / "run") == [1, 2, 3]
    assert [row.epoch for row in Report.load(tmp_path / "run").epochs_log] == [1, 2, 3]


def test_a_disk_that_takes_no_state_costs_exactness_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Any, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume, "write_bytes", full)
    begin(folder, tmp_path, 2)
    assert "No space left on device" in caplog.text
    monkeypatch.undo()
    YOLO(tmp_path / "run/weights/last.pt").train(resume=True)
    assert "continues from last.pt alone" in caplog.text
    assert Report.load(tmp_path / "run").status == "finished"


def test_without_the_word_resume_one_is_told_that_a_run_is_unfinished(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begin(folder, tmp_path, 1)
    begin(folder, tmp_path, 1, YOLO(tmp_path / "run/weights/last.pt"), name="other")
    assert "belongs to an unfinished pruning run, and this command starts a new run from it" in caplog.text


def test_a_failed_run_can_be_started_again_from_the_same_object(folder: Path, tmp_path: Path) -> None:
    model = begin(folder, tmp_path, 2)
    assert not is_pruned(model.model)
    assert Report.load(tmp_path / "run").status == "failed"
    assert Report.load(tmp_path / "run").error == "Interrupted: "
    with pytest.raises(
        RunError, match=r"is not the checkpoint of the interrupted run. Resume that run with YOLO\('.*last\.pt'\)"
    ):
        model.train(resume=True)
    model.train(**{**RUN, "data": str(folder / "scenes/scenes.yaml"), "project": str(tmp_path)})
    assert [r.number for r in Report.load(tmp_path / "run").rounds] == [1, 2]


def test_a_run_into_the_folder_of_its_own_model_keeps_it_until_there_is_a_better_one(
    folder: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "run/weights"
    weights.mkdir(parents=True)
    shutil.copy(folder / "dense.pt", weights / "best.pt")
    there = []
    model = YOLO(weights / "best.pt")
    model.add_callback("on_train_batch_start", lambda trainer: there.append(trainer.best.exists()))
    begin(folder, tmp_path, 1, model)
    assert there
    assert all(there)


class Archiving(DetectionTrainer):
    """A trainer of the user's own, that copies what is saved."""

    def save_model(self) -> Any:
        saved = super().save_model()
        shutil.copy(self.last, self.save_dir / f"copy{self.epoch}.pt")
        return saved


def test_a_trainer_of_ones_own_finds_the_files_it_saved(folder: Path, tmp_path: Path) -> None:
    begin(folder, tmp_path, 2, trainer=Archiving)
    assert [load_checkpoint(tmp_path / f"run/copy{i}.pt")[1]["epoch"] for i in range(2)] == [0, 1]
    with pytest.raises(RunError, match="is not a class"):
        YOLO(folder / "dense.pt").train(trainer=lambda: None, **RUN, data=str(folder / "scenes/scenes.yaml"))


def test_integrations_find_a_tidy_folder_at_the_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []

    def uploads(trainer: Any) -> None:
        found.extend(p.name for p in trainer.wdir.iterdir())
        assert load_checkpoint(trainer.last)[1].get("optimizer") is None

    def add(trainer: Any) -> None:
        trainer.callbacks["on_train_end"].append(uploads)

    monkeypatch.setattr(integrations, "add_integration_callbacks", add)
    model = YOLO(folder / "dense.pt")
    model.train(**{**RUN, "data": str(folder / "scenes/scenes.yaml"), "project": str(tmp_path), "epochs": 2})
    assert sorted(set(found)) == ["best.pt", "last.pt", "round1.pt"]


def test_several_devices_are_refused_where_ultralytics_would_not_prune_on_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "shares_callbacks", lambda: False)
    with pytest.raises(RunError, match="does not pass callbacks to the processes of a run on several devices"):
        YOLO(folder / "dense.pt").train(
            **{**RUN, "data": str(folder / "scenes/scenes.yaml"), "project": str(tmp_path), "device": "0,1"}
        )
    assert list(tmp_path.iterdir()) == []
