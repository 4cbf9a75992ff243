# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a cut takes back: the schedule of the learning rate, and the weights."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import datasets
import pytest
from ultralytics import YOLO

RUN: dict[str, Any] = {
    "epochs": 6,
    "imgsz": 32,
    "batch": 4,
    "nbs": 4,
    "workers": 0,
    "amp": False,
    "plots": False,
    "val": False,
    "device": "cpu",
    "optimizer": "SGD",
    "lr0": 0.01,
    "lrf": 0.1,
    "warmup_epochs": 0.0,
    "exist_ok": True,
    "name": "run",
    "callbacks": "prune",
}
RECIPE: dict[str, Any] = {
    "target": {"flops": 0.6},
    "schedule": {"rounds": 2, "start": 2, "interval": 2},
    "channels": {"round_to": 2, "min": 2},
    "measure": False,
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return datasets.tiny(tmp_path_factory.mktemp("rewind"), train=8)


class Interrupted(Exception):
    """What ends some of the runs here."""


def train(folder: Path, project: Path, recover: dict[str, Any], **settings: Any) -> Path:
    """A run; returns its folder."""
    recipe = {**RECIPE, "recover": recover}
    places = {"data": str(folder / "scenes/scenes.yaml"), "project": str(project)}
    YOLO(folder / "dense.pt").train(**{**RUN, "recipe": recipe, **places, **settings})
    return project / "run"


def rates(run: Path) -> list[float]:
    return [float(row["lr/pg0"]) for row in csv.DictReader((run / "results.csv").open())]


@pytest.mark.parametrize("cosine", [False, True])
def test_the_learning_rates_of_a_run_begin_anew_at_each_cut(cosine: bool, folder: Path, tmp_path: Path) -> None:
    run = train(folder, tmp_path, {"batchnorm": 0, "learning_rate": "rewind"}, cos_lr=cosine)
    assert rates(run) == pytest.approx([0.01, 0.0055] * 3, rel=1e-5)


def test_a_warm_up_leads_to_the_learning_rate_that_was_rewound(folder: Path, tmp_path: Path) -> None:
    recover = {"batchnorm": 0, "learning_rate": "rewind"}
    run = train(folder, tmp_path, recover, warmup_epochs=3.0, warmup_bias_lr=0.0)
    warm = (1 / 6, 3 / 6, 5 / 6, 1, 1, 1)  # of six batches of warm-up, after the last batch of each epoch
    assert rates(run) == pytest.approx([0.01 * w * f for w, f in zip(warm, (1, 0.55) * 3, strict=True)], rel=1e-5)
