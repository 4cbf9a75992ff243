# SPDX-License-Identifier: AGPL-3.0-or-later
"""What else Ultralytics can do with a pruned checkpoint: it stays pruned in all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_data
import torch
from test_heads import RUN, thin
from ultralytics import YOLO
from ultralytics.engine import trainer as engine
from ultralytics.nn.tasks import load_checkpoint

import yolo_prune


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("further")


@pytest.fixture(scope="module")
def data(folder: Path) -> str:
    return str(small_data.make("detect", folder))


@pytest.fixture(scope="module")
def start(folder: Path) -> Path:
    return thin("yolo11", folder, nc=5)


def parameters(path: Path) -> int:
    return sum(p.numel() for p in load_checkpoint(path)[0].parameters())


@pytest.mark.slow
def test_a_list_of_datasets(start: Path, data: str, tmp_path: Path) -> None:
    model = YOLO(start)
    results = model.train(data=[data, data], project=str(tmp_path), **RUN)
    assert len(results) == 2
    delivered = sorted(tmp_path.rglob("best.pt"))
    assert [parameters(path) for path in delivered] == [parameters(start)] * 2
    assert all(yolo_prune.is_pruned(path) for path in delivered)


@pytest.mark.slow
def test_tuning_of_hyperparameters(start: Path, data: str, tmp_path: Path) -> None:
    YOLO(start).tune(data=data, iterations=1, project=str(tmp_path), **RUN)
    delivered = list(tmp_path.rglob("best.pt"))
    assert delivered
    assert {parameters(path) for path in delivered} == {parameters(start)}


@pytest.mark.slow
def test_compiled_training(start: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile=` is refused while channels go; afterwards a pruned model compiles like any other."""
    compiled: list[Any] = []

    def attempt_compile(model: Any, **_: Any) -> Any:
        compiled.append(torch.compile(model, backend="eager"))  # no compiler is needed for the eager backend
        return compiled[0]

    monkeypatch.setattr(engine, "attempt_compile", attempt_compile)
    YOLO(start).train(data=data, project=str(tmp_path), compile=True, **RUN)
    assert compiled
    assert parameters(tmp_path / "train/weights/best.pt") == parameters(start)


@pytest.mark.slow
def test_quantization_aware_training(start: Path, data: str, tmp_path: Path) -> None:
    pytest.importorskip("modelopt", reason="quantize=8 needs nvidia-modelopt; `nox -s integrations` installs it")

    def stop(trainer: Any) -> None:
        if trainer.epoch == 1:
            raise KeyboardInterrupt

    model = YOLO(start)
    model.add_callback("on_train_batch_end", stop)
    with pytest.raises(KeyboardInterrupt):
        model.train(data=data, project=str(tmp_path), quantize=8, **{**RUN, "epochs": 2})
    YOLO(tmp_path / "train/weights/last.pt").train(resume=True)
    best = load_checkpoint(tmp_path / "train/weights/best.pt")[0]
    assert type(best.model[0].conv).__name__ == "QuantConv2d"
    assert sum(p.numel() for p in best.parameters()) == parameters(start)
    assert yolo_prune.is_pruned(best)


TRACKED = """
import sys
from ultralytics import YOLO, settings
tracker, model, data, folder = sys.argv[1:]
settings.update({tracker: True})
YOLO(model).train(
    data=data, project=folder, name="run", epochs=2, imgsz=64, batch=4, nbs=4, amp=False, plots=False, device="cpu",
    optimizer="AdamW", callbacks="prune", **{
        "recipe.target.flops": 0.4, "recipe.schedule.rounds": 1, "recipe.schedule.start": 1,
        "recipe.recover.batchnorm": 1,
    },
)
"""


def train_tracked(tracker: str, start: Path, data: str, folder: Path, **environment: str) -> None:
    command = [sys.executable, "-c", TRACKED, tracker, str(start), data, str(folder)]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # or Ultralytics tracks nothing
    environment = inherited | {"YOLO_CONFIG_DIR": str(folder), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


FIGURES = {"prune/round", "prune/flops_kept", "prune/params_kept", "prune/fitness_cut", "prune/fitness_recovered"}


@pytest.mark.slow
def test_tensorboard_shows_the_rounds(start: Path, data: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="not a dependency; `nox -s integrations` installs it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_tracked("tensorboard", start, data, tmp_path)
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= FIGURES
    kept = {e.step: round(e.value, 2) for e in events.Scalars("prune/flops_kept")}
    assert kept[1] > 0.4 >= kept[2]
    assert {e.step: e.value for e in events.Scalars("prune/round")} == {1: 0, 2: 1, 3: 1}
    header, *rows = (tmp_path / "run/results.csv").read_text().splitlines()
    assert "prune" not in header
    assert {len(row.split(",")) for row in rows} == {len(header.split(","))}


@pytest.mark.slow
def test_mlflow_shows_the_rounds(start: Path, data: str, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="not a dependency; `nox -s integrations` installs it")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    train_tracked("mlflow", start, data, tmp_path, MLFLOW_TRACKING_URI=uri)
    mlflow.set_tracking_uri(uri)
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert set(run.data.metrics) >= FIGURES
    assert run.data.metrics["prune/flops_kept"] <= 0.4


@pytest.mark.slow
def test_wandb_shows_the_rounds(start: Path, data: str, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="not a dependency; `nox -s integrations` installs it")
    train_tracked("wandb", start, data, tmp_path, WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    (log,) = tmp_path.rglob("run-*.wandb")
    written = log.read_bytes()
    assert all(figure.encode() in written for figure in FIGURES)
