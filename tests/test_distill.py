# SPDX-License-Identifier: AGPL-3.0-or-later
"""A teacher beside the pruned student: in the same run, resumed, and as a second stage."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import small_data
import torch
from small_runs import RECIPES, RUNS
from ultralytics import YOLO
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.tasks import load_checkpoint

import yolo_prune
from yolo_prune.cut.record import is_pruned
from yolo_prune.errors import RunError
from yolo_prune.report import Report

RUN = RUNS["distill"]
PRUNE: dict[str, Any] = {"callbacks": "prune", "recipe": RECIPES["distill"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data.tiny(tmp_path_factory.mktemp("distill"), train=16, end2end=True, reg_max=1)


def places(folder: Path, name: str) -> dict[str, str]:
    return {"data": str(folder / "scenes/scenes.yaml"), "project": str(folder), "name": name}


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def taught(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A run with `recover.distill`, interrupted after its second cut and resumed, and what was seen in it."""
    seen: dict[str, Any] = {}

    def look(trainer: Any) -> None:
        if trainer.epoch == 1 and "teacher" not in seen:
            model = trainer.model
            assert isinstance(model, DistillationModel)
            head = model.student_model.model[-1]
            seen["neck"] = [branch[0].conv.in_channels for branch in head.cv2]
            seen["read"] = [layers[0].in_channels for layers in model.projector]
            seen["teacher"] = parameters(model.teacher_model)
            owned = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
            seen["owned"] = all(id(p) in owned for p in model.projector.parameters())
            seen["averaged"] = [layers[0].weight.shape for layers in trainer.ema.ema.projector]
            raise KeyboardInterrupt

    model = YOLO(folder / "dense.pt")
    model.add_callback("on_train_batch_end", look)
    with pytest.raises(KeyboardInterrupt):
        model.train(**RUN, **PRUNE, **places(folder, "taught"), **{"recipe.recover.distill": True})
    YOLO(folder / "taught/weights/last.pt").train(resume=True)
    return folder / "taught", seen


@pytest.mark.slow
def test_a_run_distils_from_the_model_it_began_with(taught: tuple[Path, dict[str, Any]], folder: Path) -> None:
    run, seen = taught
    dense = load_checkpoint(folder / "dense.pt")[0]
    assert seen["teacher"] == parameters(dense)
    assert seen["read"] == seen["neck"] == [shape[1] for shape in seen["averaged"]]
    assert seen["read"] != [branch[0].conv.in_channels for branch in dense.model[-1].cv2]  # head inputs got thinner
    assert seen["owned"]
    report = Report.load(run)
    assert report.status == "finished"
    assert len(report.rounds) == 2
    assert report.pruned.flops / report.dense.flops <= 0.5
    best = load_checkpoint(run / "weights/best.pt")[0]
    assert type(best).__name__ == "DetectionModel"
    assert is_pruned(best)
    rows = list(csv.DictReader((run / "results.csv").open()))
    assert [int(r["epoch"]) for r in rows] == [1, 2, 3]
    assert all(float(r["train/dis_loss"]) > 0 for r in rows)


@pytest.mark.slow
def test_a_pruned_model_distils_in_a_second_stage(taught: tuple[Path, dict[str, Any]], folder: Path) -> None:
    best = taught[0] / "weights/best.pt"
    model = YOLO(best)
    model.train(**{**RUN, "epochs": 1}, **places(folder, "second"), distill_model=str(folder / "dense.pt"))
    assert parameters(model.model) == parameters(load_checkpoint(best)[0])
    assert yolo_prune.is_pruned(folder / "second/weights/best.pt")
    assert float(next(csv.DictReader((folder / "second/results.csv").open()))["train/dis_loss"]) > 0


@pytest.mark.parametrize(
    ("start", "arguments", "message"),
    [
        ("yolo26n.yaml", {"recipe.recover.distill": True}, "this model was not loaded from a file"),
        ("yolo26n-cls.yaml", {"distill_model": "dense.pt"}, "distill_model needs a model with a detection head"),
        ("dense.pt", {"recipe.recover.distill": True, "distill_model": "x.pt"}, "both name a teacher"),
        ("dense.pt", {"distill_model": "dense.onnx"}, "is not a checkpoint"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused_at_once(
    start: str, arguments: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    model = YOLO(folder / start if start.endswith(".pt") else start)
    with pytest.raises(RunError, match=message):
        model.train(**RUN, **PRUNE, **{**places(folder, "no"), "project": str(tmp_path)}, **arguments)
    assert list(tmp_path.iterdir()) == []
