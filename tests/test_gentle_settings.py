# SPDX-License-Identifier: AGPL-3.0-or-later
"""Settings that nobody chose are gentle to a trained model; those that somebody chose stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_data
from small_runs import FINE, RUNS
from ultralytics import YOLO
from ultralytics.utils import DEFAULT_CFG_DICT

import yolo_prune
from yolo_prune.recipe import load_recipe
from yolo_prune.run import settings

RUN = RUNS["gentle_settings"]
PRUNE: dict[str, Any] = {
    "callbacks": "prune",
    "recipe.schedule.rounds": 1,
    "recipe.criterion": "magnitude",
    **{f"recipe.channels.{key}": value for key, value in FINE["channels"].items()},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data.tiny(tmp_path_factory.mktemp("gentle"), train=8)


def chosen(folder: Path, tmp_path: Path, model: str, **settings: Any) -> dict[str, Any]:
    """What a run went by, and how far its average reached."""
    yolo, found = YOLO(model), {}

    def look(trainer: Any) -> None:
        found.update(vars(trainer.args), memory=1 / (1 - trainer.ema.decay(1)))

    yolo.add_callback("on_train_epoch_end", look)
    places = {"data": str(folder / "scenes/scenes.yaml"), "project": str(tmp_path)}
    yolo.train(**RUN, **places, **PRUNE, **settings)
    return found


@pytest.mark.slow
def test_a_trained_model_is_treated_gently(folder: Path, tmp_path: Path) -> None:
    found = chosen(folder, tmp_path, str(folder / "dense.pt"), nbs=4)
    names = ("warmup_epochs", "warmup_bias_lr", "optimizer", "lr0", "cos_lr", "close_mosaic")
    assert [found[name] for name in names] == [1.0, 0.0, "AdamW", 0.001, True, 2]
    assert found["memory"] == pytest.approx(2.0)  # half of two epochs of two batches


@pytest.mark.parametrize(
    ("target", "rate"),
    [
        ({"flops": 0.5}, 0.001),
        ({"flops": 0.4}, 0.002),
        ({"params": 0.18}, 0.001),  # about half of the FLOPs
        ({"params": 0.15}, 0.002),
        ({"latency": 0.3}, 0.002),
        ({"max_drop": 0.01}, 0.002),
    ],
)
def test_the_less_is_left_the_faster_it_learns(target: dict[str, float], rate: float) -> None:
    found = settings.after_refit(load_recipe({"target": target}).target, 30)
    assert (found["lr0"], found["warmup_epochs"]) == (rate, 3.0)


@pytest.mark.parametrize(
    ("mine", "missing"),
    [
        ({"lr0": 0.0005}, {"lr0"}),  # Ultralytics' optimizer=auto would ignore it
        ({"optimizer": "NAdam"}, {"optimizer"}),
        ({"optimizer": "SGD"}, {"optimizer", "lr0"}),  # which wants another rate
        ({"optimizer": "auto"}, {"optimizer", "lr0"}),
    ],
)
def test_optimizer_and_learning_rate_fit_one_another(mine: dict[str, Any], missing: set[str]) -> None:
    whole = settings.recommended(load_recipe(), dict(DEFAULT_CFG_DICT), set())
    found = settings.recommended(load_recipe(), {**DEFAULT_CFG_DICT, **mine}, set(mine))
    assert whole.keys() - found.keys() == missing
    assert found.items() <= whole.items()


@pytest.mark.slow
def test_training_a_pruned_checkpoint_on_says_what_would_be_gentle(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    places = {"data": str(folder / "scenes/scenes.yaml"), "project": str(tmp_path)}
    model = YOLO(folder / "dense.pt")
    yolo_prune.apply(
        model, yolo_prune.plan(model, {"target": {"flops": 0.8}, "criterion": "magnitude", **FINE}, imgsz=32)
    )
    model.train(**{**RUN, "epochs": 1}, **places, cos_lr=True)
    better = "warmup_bias_lr=0.0 optimizer=AdamW lr0=0.001 warmup_epochs=0.5 close_mosaic=1"
    assert f"Settings that keep its accuracy: {better}" in caplog.text
    caplog.clear()
    model.train(**{**RUN, "epochs": 1}, **places, lr0=0.001, optimizer="AdamW")
    assert "Settings that keep its accuracy" not in caplog.text


@pytest.mark.slow
def test_what_somebody_chose_stays(folder: Path, tmp_path: Path) -> None:
    mine = {"warmup_epochs": 1.0, "optimizer": "SGD", "lr0": 0.002, "cos_lr": False, "close_mosaic": 1}
    mine |= {"warmup_bias_lr": 0.01}
    average: dict[str, Any] = {"recipe.recover.average": 1.0}
    found = chosen(folder, tmp_path, str(folder / "dense.pt"), nbs=4, **mine, **average)
    assert {name: found[name] for name in mine} == mine
    assert found["memory"] == pytest.approx(4.0)


@pytest.mark.slow
def test_without_a_refit_the_average_is_that_of_ultralytics(folder: Path, tmp_path: Path) -> None:
    refit: dict[str, Any] = {"recipe.recover.refit": 0}
    found = chosen(folder, tmp_path, str(folder / "dense.pt"), **refit)
    assert found["memory"] < 1.01
    assert found["lr0"] != 0.001
    assert (found["cos_lr"], found["close_mosaic"], found["warmup_bias_lr"]) == (False, 10, 0.0)
