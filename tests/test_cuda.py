# SPDX-License-Identifier: AGPL-3.0-or-later
"""On a GPU: mixed precision and the channels_last layout survive a cut, resuming is exact, several GPUs agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics import YOLO

from yolo_prune.compat import load_checkpoint
from yolo_prune.report import Report
from yolo_prune.scenes import make_dataset

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")

RUN: dict[str, Any] = {
    "epochs": 4,
    "imgsz": 128,
    "batch": 8,
    "nbs": 16,
    "workers": 2,
    "plots": False,
    "optimizer": "AdamW",
    "callbacks": "prune",
    "recipe": {
        "target": {"flops": 0.5},
        "schedule": {"rounds": 2, "interval": 1},
        "criterion": "magnitude",
        "recover": {"refit": 0, "batchnorm": 2},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    make_dataset(folder / "scenes", train=36, val=8, imgsz=128)
    torch.manual_seed(0)
    YOLO("yolo11n.yaml").save(folder / "dense.pt")
    return folder


def train(folder: Path, name: str, **settings: Any) -> Path:
    model = YOLO(folder / "dense.pt")
    for event, function in settings.pop("events", {}).items():
        model.add_callback(event, function)
    places = {"data": str(folder / "scenes/scenes.yaml"), "project": str(folder), "name": name}
    model.train(**{**RUN, **places, **settings})
    return folder / name


@pytest.mark.slow
@pytest.mark.parametrize("amp", [True, "bf16", False])
def test_precision_and_layout_survive_a_cut(amp: bool | str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ultralytics.engine import trainer as engine

    monkeypatch.setattr(engine, "check_amp", lambda model: True)  # it would download a model to compare with
    seen: list[tuple[bool, bool, set[torch.dtype]]] = []

    def look(trainer: Any) -> None:
        weights = [m.weight for m in trainer.model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size[0] > 1]
        layout = all(w.is_contiguous(memory_format=torch.channels_last) for w in weights if w.shape[1] > 1)
        finite = all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
        seen.append((layout, finite, {p.dtype for p in trainer.model.parameters()}))

    run = train(folder, f"amp-{amp}", amp=amp, channels_last=True, device=0, events={"on_train_batch_end": look})
    assert all(row == (True, True, {torch.float32}) for row in seen)
    report = Report.load(run)
    assert report.status == "finished"
    assert report.pruned.flops / report.dense.flops <= 0.5


@pytest.mark.slow
def test_a_resumed_run_makes_the_same_plans(folder: Path) -> None:
    def stop(trainer: Any) -> None:
        if trainer.epoch == 2:
            raise KeyboardInterrupt

    whole = train(folder, "whole", amp=False, device=0)
    with pytest.raises(KeyboardInterrupt):
        train(folder, "broken", amp=False, device=0, events={"on_train_batch_end": stop})
    YOLO(folder / "broken/weights/last.pt").train(resume=True)
    plans = [[row.plan for row in Report.load(run).rounds] for run in (whole, folder / "broken")]
    assert plans[0] == plans[1]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices here")
def test_two_gpus(folder: Path) -> None:
    run = train(folder, "two", amp=False, device="0,1")
    report = Report.load(run)
    assert report.status == "finished"
    assert report.pruned.params == sum(p.numel() for p in load_checkpoint(run / "weights/best.pt")[0].parameters())
