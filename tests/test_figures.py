# SPDX-License-Identifier: AGPL-3.0-or-later
"""Latency and agreement on pages: measured on demand, shown where they were, refused where they are of others."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tampering
import torch
from small_data import IMGSZ, tiny
from test_clock import measured
from test_page import PAGES, Page, full, timed
from ultralytics import YOLO
from ultralytics.utils import LOGGER

import yolo_prune
from yolo_prune import cli
from yolo_prune.measure import benchmark, clock, parity_check, subjects
from yolo_prune.pages import run_page
from yolo_prune.planning import planner
from yolo_prune.report import Figures, Report
from yolo_prune.report.measurement import Measurement
from yolo_prune.report.page import render

CUT = {"criterion": "magnitude", "channels.round_to": 2, "channels.min": 4}


def test_the_page_says_what_was_measured() -> None:
    text = Page(PAGES["measured"]()).text.replace("\N{MINUS SIGN}", "-")
    for said in (
        "Latency, onnxruntime, 1 thread 7.50 ms dense 12.0 62.5 % kept",  # of rounds, here that of the medians too
        "image 320 \N{MULTIPLICATION SIGN} 320 batch 1 on A Processor threads 1 on 4 cores",
        "onnx, fp32 onnxruntime 1.20, 2 rounds",
        "dense 4.00 1.000 \N{EN DASH}",
        "pruned 2.50 0.625 0.600 \N{EN DASH} 0.650 3.50 \N{EN DASH} 4.50 0.500 - 83 of 88",
        "fewer than six rounds",
        "format=ncnn could not be measured: The export to ncnn failed",
        "Other programs kept 2.0 of 4 cores busy",
        "onnx, fp32 16 images pruned fails - 6e-05 2.0e-01 0.6100 0.6000 -0.0100",
        "pruned as onnx (fp32): scores differ by 0.2 (allowed: 0.005).",
        "pruned as onnx (fp32): mAP differ by 0.01 (allowed: 0.002).",
    ):
        assert said in text, said
    assert "there was no dataset" not in text
    assert "there was no dataset" in Page(render(full(), measurement=measured().renamed(("a", "b")))).text


def test_latency_is_what_the_ratio_of_the_rounds_says() -> None:
    found = timed()
    found.rows[1].ratio = 0.7
    assert (
        "Latency, onnxruntime, 1 thread 7.50 ms dense 12.0 70.0 % kept" in Page(render(full(), measurement=found)).text
    )


def test_a_comparison_has_latency_as_cost() -> None:
    elements = Page(PAGES["measured comparison"]()).elements
    plots = [a["aria-label"] for tag, a in elements if tag == "svg" and a.get("aria-label")]
    costs = ("ms, onnx", "GFLOPs", "million parameters")
    assert plots == [f"mAP50-95 against {cost}" for cost in costs for _ in ("wide", "narrow")]
    assert [a for tag, a in elements if a.get("class") == "whole"] == [{"class": "whole"}]


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset `scenes`, `dense.pt`, and a run without epochs that made half of it."""
    torch.set_num_threads(1)
    here = tiny(tmp_path_factory.mktemp("figures"), train=4)
    model = YOLO(here / "dense.pt")
    report = Report(model=str(here / "dense.pt"), data=str(here / "scenes/scenes.yaml"), imgsz=IMGSZ, epochs=1)
    report.dense = _figures(model)
    yolo_prune.apply(model, yolo_prune.plan(model, imgsz=IMGSZ, **CUT))
    report.pruned, report.status = _figures(model), "finished"
    (here / "run/weights").mkdir(parents=True)
    model.save(here / "run/weights/best.pt")
    report.save(here / "run/prune.json")
    return here


def _figures(model: YOLO) -> Figures:
    flops, params = planner.present_cost(model.model, IMGSZ)
    return Figures(flops=flops, params=params)


@pytest.fixture(scope="module")
def bench(folder: Path) -> Measurement:
    """Of the models of the run, without a dataset."""
    models = [folder / "dense.pt", folder / "run/weights/best.pt"]
    return yolo_prune.bench(models, "torch", imgsz=IMGSZ, threads=1, repeats=2)


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "run", tmp_path / "run"))


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warming up takes no second here."""
    warm_up = clock.warm_up
    monkeypatch.setattr(clock, "warm_up", lambda runs: warm_up(runs, seconds=0.0, least=1))
    monkeypatch.setattr(subjects, "busy", lambda: 0.0)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(LOGGER, "warning", found.append)
    return found


def page_of(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


def edit(run: Path, name: str, **changes: Any) -> None:
    data = json.loads((run / name).read_text())
    (run / name).write_text(json.dumps({**data, **changes}))


def test_a_report_measures_once_and_shows_it_ever_after(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["format=torchscript,torch", "threads=1", "repeats=2"]
    assert cli.main(["report", str(run), *arguments]) == 0, capsys.readouterr().err
    found = Measurement.load(run / "bench.json")
    assert f"{found}\n\nsaved {run / 'report.html'}\n" in capsys.readouterr().out
    assert [(r.model, r.format) for r in found.rows] == [
        (model, format) for format in ("torchscript", "torch") for model in ("dense.pt", "best.pt")
    ]
    assert (found.imgsz, found.threads, found.rounds) == (IMGSZ, 1, {"torchscript": 2, "torch": 2})
    parity = found.row("best.pt", "torchscript").parity
    assert parity.quality is not None  # on the run's own dataset
    times = [f"{found.row(name, 'torchscript').median_ms:.3g}" for name in ("best.pt", "dense.pt")]
    monkeypatch.setattr(benchmark, "measure_models", lambda *_: pytest.fail("it was measured again"))
    before = (run / "bench.json").read_bytes()
    for again in (["report", str(run)], ["report", str(run / "prune.json")]):
        page = page_of(run)
        assert {"summary", "latency", "parity", "images"} <= set(page.sections)
        assert f"Latency, torchscript, 1 thread {times[0]}" in page.text
        assert f"dense {times[1]}" in page.text
        assert page.text.count("agrees") == 2
        (run / "report.html").unlink()
        assert cli.main(again) == 0
    assert (run / "bench.json").read_bytes() == before


def test_a_run_that_ends_shows_what_was_measured(run: Path, bench: Measurement, warnings: list[str]) -> None:
    report = Report.load(run)
    assert "latency" not in Page(run_page.at_end(run, report).read_text(encoding="utf-8")).sections
    bench.save(run / "bench.json")
    page = Page(run_page.at_end(run, report).read_text(encoding="utf-8"))
    assert "Latency, torch" in page.text
    assert "parity" not in page.sections
    assert report.pruned.latency_ms is None  # only the page's copy has it
    assert warnings == []


def test_a_measurement_of_other_models_is_not_shown(run: Path, bench: Measurement, warnings: list[str]) -> None:
    def told(found: Measurement, what: str) -> None:
        found.save(run / "bench.json")
        assert "latency" not in Page(run_page.write_report(run).page.read_text(encoding="utf-8")).sections
        assert [w for w in warnings if "has no latency" in w] == warnings
        assert len(warnings) == 1
        assert what in warnings.pop()

    other = "does not measure the model that this run started from and the model that it delivered, in this order"
    for rows in (bench.rows[:1], bench.rows[::-1], []):
        told(bench.model_copy(update={"rows": rows}), other)
    stranger = bench.model_copy(deep=True)
    stranger.rows[0].params += 1
    told(stranger, other)
    with torch.no_grad():  # trained anew in the same folder: the same sizes, other weights
        model = YOLO(run / "weights/best.pt")
        next(model.model.parameters()).add_(0.01)
    model.save(run / "weights/best.pt")
    told(bench, other)


def test_without_its_weights_a_run_goes_by_the_size_of_its_models(
    run: Path, bench: Measurement, warnings: list[str]
) -> None:
    bench.save(run / "bench.json")
    shutil.rmtree(run / "weights")
    edit(run, "prune.json", model="gone.pt", data="gone.yaml")
    assert "latency" in Page(run_page.write_report(run).page.read_text(encoding="utf-8")).sections
    edit(run, "prune.json", pruned={"params": bench.rows[1].params + 1})
    assert "latency" not in Page(run_page.write_report(run).page.read_text(encoding="utf-8")).sections
    assert "does not measure the model that this run started from" in warnings[0]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is not complete JSON"),
        ("[" * 100_000, "is not complete JSON"),
        ("[]", "is not a measurement"),
        ('"median_ms": NaN', "rows.0.median_ms: Input should be a finite number"),
    ],
)
def test_a_damaged_measurement_is_one_warning(
    text: str, why: str, run: Path, bench: Measurement, warnings: list[str]
) -> None:
    path = bench.save(run / "bench.json")
    said = json.dumps(json.loads(path.read_text())["rows"][0]["median_ms"])
    whole = path.read_text().replace(f'"median_ms": {said}', text)
    path.write_text(whole if "NaN" in text else text)
    assert "latency" not in Page(run_page.write_report(run).page.read_text(encoding="utf-8")).sections
    assert len(warnings) == 1
    assert why in warnings[0]


def test_what_a_run_started_from_may_have_been_pruned_before(
    folder: Path, run: Path, bench: Measurement, warnings: list[str]
) -> None:
    start = run / "weights/round0.pt"
    model = YOLO(folder / "run/weights/best.pt")
    model.save(start)
    yolo_prune.apply(model, yolo_prune.plan(model, imgsz=IMGSZ, **CUT, **{"target.flops": 0.4}))
    model.save(run / "weights/best.pt")
    yolo_prune.bench([start, run / "weights/best.pt"], "torch", imgsz=IMGSZ, repeats=2, save=run / "bench.json")
    page = Page(run_page.write_report(run).page.read_text(encoding="utf-8"))
    assert "before this run" in page.text
    assert " ms dense - " in page.text  # the dense model was not measured
    assert [w for w in warnings if "latency" in w] == []


def test_an_export_that_computes_something_else_is_shown_and_fails(
    folder: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tampering.install(monkeypatch)
    monkeypatch.setattr(parity_check, "validate", lambda *_: None)
    how = ["format=torchscript", "threads=1", "repeats=1"]
    assert cli.main(["report", str(run), *how]) == 1
    out, err = capsys.readouterr()
    assert f"saved {run / 'report.html'}" in out
    assert "yolo-prune report: Exports do not agree with their checkpoints: dense.pt as torchscript (fp32): " in err
    page = page_of(run)
    assert page.text.count(" fails ") == 2
    assert "pruned as torchscript (fp32): raw outputs differ by" in page.text
    assert cli.main(["report", str(run)]) == 1  # the page shows the same measurement
    out, err = capsys.readouterr()
    assert f"saved {run / 'report.html'}" in out
    assert "bench.json, measured before, is on the page and has failures: Exports do not agree" in err
    assert len(err.strip().splitlines()) == 1
    target = tmp_path / "compare.html"
    models = [str(folder / "dense.pt"), str(run / "weights/best.pt")]
    where = [f"data={folder / 'scenes/scenes.yaml'}", f"imgsz={IMGSZ}", f"save={target}"]
    assert cli.main(["compare", *models, *where, *how]) == 1
    assert "best as torchscript (fp32): raw outputs differ by" in capsys.readouterr().err
    assert Page(target.read_text(encoding="utf-8")).text.count(" fails ") == 2


def test_models_are_compared_by_their_latency(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    models = [str(folder / "dense.pt"), str(folder / "run/weights/best.pt")]
    target = tmp_path / "compare.html"
    where = [f"data={folder / 'scenes/scenes.yaml'}", f"imgsz={IMGSZ}", f"save={target}"]
    assert cli.main(["compare", *models, *where, "format=torchscript", "threads=1", "repeats=2"]) == 0
    out = capsys.readouterr().out
    assert "torchscript, fp32" in out
    assert out.count("agrees") == 2
    page = Page(target.read_text(encoding="utf-8"))
    assert {"latency", "parity"} <= set(page.sections)
    assert "format=torchscript threads=1 repeats=2" in page.text
    assert not list(folder.glob("*.torchscript"))


def test_the_dataset_of_a_run_that_has_other_classes_is_left_out(folder: Path, run: Path, warnings: list[str]) -> None:
    other = folder / "one.yaml"
    text = f"path: {folder / 'scenes'}\ntrain: images/train\nval: images/val\nnames: {{0: thing}}\n"
    other.write_text(text)
    edit(run, "prune.json", data=str(other))
    found = run_page.measure_run(run, ["torch"], repeats=1)
    assert found.row("best.pt", "torch").parity is None
    assert "Exports are not compared with torch" in warnings[0]
    with pytest.raises(yolo_prune.PruneError, match="has 1 classes, the model 5"):
        run_page.measure_run(run, ["torch"], data=str(other), repeats=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["format=opnvino"], "Did you mean 'openvino'?"),
        (["format=ncnn", "quantize=8"], "does not export format=ncnn with quantize=8"),
        (["format=torch", "imgsz=50"], "imgsz=50: must be a multiple of 32"),
        (["format=torch", "batch=0"], "batch=0: must be a whole number"),
        (["format=torch", "half=True", "quantize=8"], "half=True means quantize=16"),
        (["imgsz=64"], "imgsz= is for measuring, and format= is missing"),
        (["threads=1"], "threads= is for measuring, and format= is missing"),
        (["format=torch", "model=gone.pt"], "The model 'gone.pt' does not exist"),
        (["format=torch", "data=gone.yaml"], "data=gone.yaml: the dataset cannot be read"),
        (["format=torch", "device=gpu"], "device=gpu: must be cpu"),
    ],
)
def test_mistakes_are_told_before_any_work(
    arguments: list[str],
    message: str,
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    clean_cwd: Path,
) -> None:
    monkeypatch.setattr(subjects, "exported", lambda *_: pytest.fail("work was begun"))
    assert cli.main(["report", str(run), *arguments]) == 1
    out, err = capsys.readouterr()
    assert message in err
    assert "saved" not in out
    assert not (run / "bench.json").exists()
    assert not (run / "report.html").exists()


def test_a_missing_runtime_is_named_before_any_work(
    folder: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, clean_cwd: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ncnn" else object())
    monkeypatch.setattr(run_page, "open_model", lambda path: pytest.fail("work was begun"))
    models = [str(folder / "dense.pt"), str(run / "weights/best.pt")]
    for arguments in (["report", str(run)], ["compare", *models, "data=scenes.yaml"]):
        assert cli.main([*arguments, "format=torch,ncnn"]) == 1
        error = capsys.readouterr().err
        assert "format=ncnn needs ncnn, not installed here. Run: pip install 'yolo-prune[ncnn]'" in error
    assert list(clean_cwd.iterdir()) == []


def test_only_a_finished_run_whose_start_is_here_is_measured(run: Path, bench: Measurement) -> None:
    edit(run, "prune.json", model="gone.pt")
    with pytest.raises(yolo_prune.PruneError, match=r"The dense model 'gone.pt' of this run was not found"):
        run_page.measure_run(run, ["torch"])
    edit(run, "prune.json", status="failed")
    with pytest.raises(yolo_prune.PruneError, match=r"nothing to measure yet: the run in .* is failed, not finished"):
        run_page.measure_run(run, ["torch"])


def test_what_cannot_be_measured_at_all_leaves_an_earlier_measurement_alone(
    run: Path, bench: Measurement, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Path:
        raise yolo_prune.errors.BenchError("The export to torchscript failed: no luck")

    before = bench.save(run / "bench.json").read_bytes()
    monkeypatch.setattr(subjects, "exported", broken)
    assert cli.main(["report", str(run), "format=torchscript", "repeats=1"]) == 1
    assert "could not be measured: The export to torchscript failed: no luck" in capsys.readouterr().err
    assert (run / "bench.json").read_bytes() == before


def test_an_earlier_format_that_could_not_be_measured_is_not_hidden(
    run: Path, bench: Measurement, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.save(run / "bench.json")
    assert cli.main(["report", str(run)]) == 0
    edit(run, "bench.json", failed={"openvino": "no luck"})
    capsys.readouterr()
    assert cli.main(["report", str(run)]) == 1
    assert "format=openvino could not be measured: no luck. Measure again with format=" in capsys.readouterr().err
    edit(run, "bench.json", rows=[])  # of other models: it is not on the page
    assert cli.main(["report", str(run)]) == 0
