# SPDX-License-Identifier: AGPL-3.0-or-later
"""The main path, as short as it can be: what must work on every release of Ultralytics that is supported.

`nox -s releases` runs this file and `test_kill.py` on each of them. Nothing here may need a recent release.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_data
import torch
import ultralytics
from small_runs import FINE, RECIPES, RUNS
from torch import nn
from ultralytics import YOLO

import yolo_prune
from yolo_prune.cut.record import is_pruned
from yolo_prune.env.releases import load_checkpoint
from yolo_prune.errors import PruneError
from yolo_prune.report import Report

RUN, RECIPE = RUNS["main_path"], {**RECIPES["main_path"], **FINE}


def parameters(model: nn.Module | Path) -> int:
    module = load_checkpoint(model)[0] if isinstance(model, Path) else model
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data.tiny(tmp_path_factory.mktemp("main"), train=12)


@pytest.fixture(scope="module")
def pruned(folder: Path) -> Path:
    """A run that was interrupted after its second cut and resumed."""

    def stop(trainer: Any) -> None:
        if trainer.epoch == 2:
            raise KeyboardInterrupt

    model = YOLO(folder / "dense.pt")
    model.add_callback("on_train_batch_end", stop)
    places = {"data": str(folder / "scenes/scenes.yaml"), "project": str(folder), "name": "pruned"}
    with pytest.raises(KeyboardInterrupt):
        model.train(epochs=3, callbacks="prune", recipe=RECIPE, **places, **RUN)
    YOLO(folder / "pruned/weights/last.pt").train(resume=True)
    return folder / "pruned"


@pytest.mark.parametrize(
    "name",
    [
        *("yolov8n-seg", "yolo11n-pose", "yolov10n"),
        *(pytest.param(name, marks=pytest.mark.long) for name in ("yolov8n", "yolo11n", "yolo11n-obb")),
    ],
)
def test_plan_proof_and_cut(name: str) -> None:
    model = YOLO(f"{name}.yaml")
    proof = yolo_prune.apply(model, yolo_prune.plan(model, imgsz=64))
    assert proof is not None
    assert proof.error < 1e-9
    assert proof.effect > 0
    assert yolo_prune.is_pruned(model)
    model.model(torch.rand(1, 3, 64, 64))


def test_prune_while_training_and_resume(pruned: Path) -> None:
    report = Report.load(pruned)
    assert report.status == "finished"
    assert report.pruned.flops / report.dense.flops <= 0.5
    assert [r.number for r in report.rounds] == [1, 2]
    assert [e.epoch for e in report.epochs_log] == [1, 2, 3]
    assert report.pruned.params == parameters(pruned / "weights/best.pt") < parameters(pruned.parent / "dense.pt")
    assert {p.name for p in (pruned / "weights").iterdir()} == {"best.pt", "last.pt", "round1.pt"}


def test_a_pruned_model_stays_pruned_and_takes_other_classes(pruned: Path, folder: Path) -> None:
    text = (folder / "scenes/scenes.yaml").read_text()
    few = folder / "scenes/few.yaml"
    few.write_text(text.replace("  4: cross", "  4: cross\n  5: cube"))
    assert few.read_text() != text
    model = YOLO(pruned / "weights/best.pt")
    before = {n: m.out_channels for n, m in model.model.named_modules() if isinstance(m, nn.Conv2d)}
    model.train(data=str(few), project=str(folder), name="again", epochs=1, **RUN)
    after = {n: m.out_channels for n, m in model.model.named_modules() if isinstance(m, nn.Conv2d)}
    changed = {n: (before[n], after[n]) for n in after if after[n] != before[n]}
    assert changed == {"model.10.cv3.0.2": (5, 6)}
    assert is_pruned(model.model)


def test_the_command_line(pruned: Path, folder: Path) -> None:
    command = "import sys; sys.argv[0] = 'yolo'; from ultralytics.cfg import entrypoint; entrypoint()"
    settings = [f"{key}={value}" for key, value in RUN.items()]
    arguments = [f"model={pruned}/weights/best.pt", f"data={folder}/scenes/scenes.yaml", "epochs=1", *settings]
    pruning = ["callbacks=prune", "recipe.target.flops=0.4", "recipe.schedule.rounds=1", "recipe.recover.batchnorm=1"]
    pruning += [f"recipe.channels.{key}={value}" for key, value in FINE["channels"].items()]
    places = [f"project={folder}", "name=cli"]
    done = subprocess.run(
        [sys.executable, "-c", command, "train", *arguments, *pruning, *places],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = Report.load(folder / "cli")
    assert report.status == "finished"
    assert report.pruned.flops / report.dense.flops <= 0.4


def test_what_is_wrong_is_said_at_once(folder: Path, tmp_path: Path) -> None:
    data = str(folder / "scenes/scenes.yaml")
    with pytest.raises(PruneError, match=r"no recipe 'half'\. Did you mean 'half-flops'"):
        YOLO(folder / "dense.pt").train(data=data, project=str(tmp_path), callbacks="prune", recipe="half")
    with pytest.raises(SyntaxError, match="Did you mean callbacks=prune"):
        YOLO(folder / "dense.pt").train(data=data, project=str(tmp_path), callbacks="prun")
    assert list(tmp_path.iterdir()) == []


def test_the_standard_exporter(pruned: Path) -> None:
    pytest.importorskip("onnx", reason="needs the export extra")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the export extra")
    session = onnxruntime.InferenceSession(YOLO(pruned / "weights/best.pt").export(format="onnx", imgsz=64))
    image = torch.rand(1, 3, 64, 64)
    (got,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        wanted = load_checkpoint(pruned / "weights/best.pt")[0](image)[0]
    assert (torch.from_numpy(got) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    told = session.get_modelmeta().custom_metadata_map
    if ultralytics.__version__ not in ("8.3.0", "8.3.100"):  # where nothing can be added to what is exported
        assert json.loads(told["pruning"])["params"] == Report.load(pruned).pruned.params
