# SPDX-License-Identifier: AGPL-3.0-or-later
"""On a GPU: mixed precision and the channels_last layout survive a cut, resuming is exact, several GPUs agree.

What looks at data, refits, goes back, distils or times does so there as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import RECIPES, RUNS
from ultralytics import YOLO
from ultralytics.engine import trainer as engine

import yolo_prune
from yolo_prune import cli
from yolo_prune.demo.scenes import make_dataset
from yolo_prune.env.releases import load_checkpoint
from yolo_prune.errors import TargetError
from yolo_prune.report import Report
from yolo_prune.report.measurement import Measurement

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")

RUN: dict[str, Any] = {**RUNS["cuda"], "recipe": RECIPES["cuda"]}
DEFAULT: dict[str, Any] = {"target": {"flops": 0.5}, "recover": {"refit": 8}}


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ultralytics would download a model to see whether mixed precision works."""
    monkeypatch.setattr(engine, "check_amp", lambda model: True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    make_dataset(folder / "scenes", train=36, val=8, imgsz=128)
    torch.manual_seed(0)
    YOLO("yolo11n.yaml").save(folder / "dense.pt")
    return folder


def train(folder: Path, name: str, **settings: Any) -> Path:
    model = YOLO(settings.pop("model", folder / "dense.pt"))
    for event, function in settings.pop("events", {}).items():
        model.add_callback(event, function)
    places = {"data": str(folder / "scenes/scenes.yaml"), "project": str(folder), "name": name}
    model.train(**{**RUN, **places, **settings})
    return folder / name


@pytest.mark.slow
@pytest.mark.parametrize("amp", [True, "bf16", False])
def test_precision_and_layout_survive_a_cut(amp: bool | str, folder: Path) -> None:
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
@pytest.mark.parametrize("amp", [True, False])
@pytest.mark.parametrize("criterion", ["obs", "fisher", "taylor", "bn_scale"])
def test_every_look_at_data_works_in_every_precision(criterion: str, amp: bool, folder: Path) -> None:
    recipe = {**DEFAULT, "criterion": criterion}
    run = train(folder, f"{criterion}-{amp}", amp=amp, device=0, epochs=2, recipe=recipe)
    report = Report.load(run)
    assert report.status == "finished"
    assert report.pruned.flops / report.dense.flops <= 0.5
    model = load_checkpoint(run / "weights/best.pt")[0]
    assert all(bool(torch.isfinite(t).all()) for t in model.state_dict().values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"recover.distill": True},
        {"recover.rewind": {"epoch": 0}},
        {"allocation": {"name": "sensitivity", "images": 4}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_recoveries_and_allocations(changes: dict[str, Any], folder: Path) -> None:
    fields = {f"recipe.{key}": value for key, value in changes.items()}
    run = train(folder, next(iter(changes)), device=0, recipe=DEFAULT, **fields)
    assert Report.load(run).status == "finished"


@pytest.fixture(scope="module")
def learnt(folder: Path) -> Path:
    """A model of the dataset's own classes that is worth something."""
    settings = {k: v for k, v in RUN.items() if k not in ("callbacks", "recipe")}
    places = {"data": str(folder / "scenes/scenes.yaml"), "project": str(folder), "name": "learnt"}
    YOLO(folder / "dense.pt").train(**{**settings, **places, "epochs": 40, "amp": False, "device": 0})
    return folder / "learnt/weights/best.pt"


@pytest.mark.slow
def test_the_size_is_found_and_what_fails_is_taken_back(folder: Path, learnt: Path) -> None:
    recipe = {"target": {"max_drop": 0.1}, "criterion": "magnitude", "recover": {"refit": 8}}
    run = train(folder, "found", model=learnt, device=0, epochs=16, recipe=recipe)
    report = Report.load(run)
    assert report.status == "finished"
    assert {row.held for row in report.rounds} == {True, False}


@pytest.mark.slow
def test_one_shot_where_the_model_is(folder: Path, learnt: Path) -> None:
    model = YOLO(learnt).to("cuda")
    data = str(folder / "scenes/scenes.yaml")
    plan = yolo_prune.plan(model, DEFAULT, imgsz=128, data=data)
    proven = yolo_prune.apply(model, plan, data=data, imgsz=128, refit=8)
    assert proven
    assert proven.error <= 1e-9
    assert next(model.model.parameters()).device.type == "cuda"  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch", "torchscript"])
def test_a_latency_as_target(format: str, folder: Path) -> None:
    target = {"latency": 0.9, "format": format, "device": 0, "batch": 8}
    recipe = {"target": target, "criterion": "magnitude", "recover": {"refit": 4}}
    try:
        run = train(folder, f"latency-{format}", device=0, epochs=2, recipe=recipe)
    except TargetError as e:
        pytest.skip(f"so small a model gets no faster here: {e}")
    row = Report.load(run).rounds[0].latency
    assert row
    assert torch.cuda.get_device_name() in row.place


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [32, 16])
def test_models_are_timed_there(quantize: int, folder: Path, learnt: Path, clean_cwd: Path) -> None:
    measured = [f"model={learnt}", f"data={folder / 'scenes/scenes.yaml'}", "format=torch,torchscript", "imgsz=128"]
    assert cli.main(["bench", *measured, "device=0", "repeats=20", f"quantize={quantize}", "save=bench.json"]) == 0
    found = Measurement.load(clean_cwd / "bench.json")
    assert not found.failed
    assert {row.format for row in found.rows} == {"torch", "torchscript"}
    assert all(row.median_ms > 0 for row in found.rows)
    assert all(row.parity and not row.parity.failures for row in found.rows if row.format != "torch")


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [32, 16, 8])
def test_tensorrt(quantize: int, folder: Path, learnt: Path, clean_cwd: Path) -> None:
    pytest.importorskip("tensorrt", reason="TensorRT is not installed here")
    data = str(folder / "scenes/scenes.yaml")
    model = YOLO(learnt)
    yolo_prune.apply(model, yolo_prune.plan(model, DEFAULT, imgsz=128, data=data), data=data, imgsz=128, refit=8)
    model.save(clean_cwd / "cut.pt")
    measured = [f"model={learnt},cut.pt", f"data={data}", "format=engine", "imgsz=128", "device=0", "repeats=20"]
    assert cli.main(["bench", *measured, f"quantize={quantize}", "save=bench.json"]) == 0
    found = Measurement.load(clean_cwd / "bench.json")
    assert not found.failed
    assert [row.precision for row in found.rows] == [{32: "fp32", 16: "fp16", 8: "int8"}[quantize]] * 2
    assert all(row.parity and not row.parity.failures for row in found.rows)
    for row in found.rows:  # what reads an image and what puts out scores are no multiples
        assert row.convolutions
        assert row.aligned
        assert row.convolutions - row.aligned <= 5


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices here")
def test_two_gpus(folder: Path) -> None:
    run = train(folder, "two", amp=False, device="0,1")
    report = Report.load(run)
    assert report.status == "finished"
    assert report.pruned.params == sum(p.numel() for p in load_checkpoint(run / "weights/best.pt")[0].parameters())
