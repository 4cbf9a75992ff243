# SPDX-License-Identifier: AGPL-3.0-or-later
"""The report: what is saved is what is read, the tables say it, the picture shows it without overlaps."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from matplotlib.text import Text

from yolo_prune.env import files
from yolo_prune.errors import PruneError
from yolo_prune.report import (
    EpochRow,
    Figures,
    LayerRow,
    Proof,
    ProtectedRow,
    Report,
    RoundFitness,
    RoundRow,
    rounds_table,
    summary_table,
)
from yolo_prune.report.picture import compose, draw
from yolo_prune.report.table import difference
from yolo_prune.run.journal import log_if_no_epoch_helped


def make_report(starts: tuple[int, ...] = (0, 5, 10), epochs: int = 30, layers: int = 88, fit: bool = True) -> Report:
    """A run such as one of yolo11n: `layers` convolutions in 22 modules, a cut at the start of each of `starts`."""
    dense = Figures(flops=6.6e9, params=2_624_080, size_mb=5.4, fitness=0.612 if fit else None)
    report = Report(model="runs/dense/weights/best.pt", data="data/coco8.yaml", imgsz=320, epochs=epochs, dense=dense)
    for number, epoch in enumerate(starts, start=1):
        keep = 1 - 0.5 * number / len(starts)
        fitness = RoundFitness(before=0.6, cut=0.02, recovered=0.31, end=0.58) if fit else RoundFitness()
        row = RoundRow(number=number, epoch=epoch, target={"flops": keep}, flops=keep * 6.6e9, params=1_400_000)
        row.proof, row.fitness, row.plan = Proof(error=1e-15, seconds=0.4), fitness, "5f" * 32
        report.rounds.append(row)
    for epoch in range(1, epochs + 1):
        flops = next((row.flops for row in reversed(report.rounds) if row.epoch < epoch), dense.flops)
        report.epochs_log.append(EpochRow(epoch=epoch, fitness=0.6 - 0.2 / epoch if fit else None, flops=flops))
    for index in range(layers):
        channels = 16 * 2 ** (index % 7)
        name = f"model.{index * 22 // layers}.m.{index}.conv"
        report.layers.append(LayerRow(name=name, dense=channels, pruned=channels // 2, protected=index % 9 == 8))
    report.protected = [ProtectedRow(layers=["model.21.m.87.conv"], reason="task output")]
    report.pruned = Figures(flops=3.3e9, params=1_312_040, size_mb=2.7, fitness=0.6 if fit else None)
    report.status = "finished"
    return report


REPORTS = {
    "three rounds": make_report(),
    "one epoch": make_report(starts=(0,), epochs=1),
    "no validation": make_report(fit=False),
    "crowded rounds": make_report(starts=tuple(range(20)), epochs=100),
    "late rounds": make_report(starts=(0, 1, 28, 29)),
    "250 layers": make_report(layers=250),
    "nothing yet": Report(),
    "widest figures": make_report().model_copy(
        update={
            "model": "an-experiment-with-a-very-long-name.pt",
            "data": "a-dataset-with-a-very-long-name-in-a-file-with-a-very-long-name-indeed.yaml",
            "dense": Figures(flops=0.258e9, params=0.259e6, size_mb=0.544, fitness=0.612),
            "pruned": Figures(flops=0.129e9, params=0.105e6, size_mb=0.241, fitness=0.6),
        }
    ),
    "module names": Report(
        layers=[LayerRow(name=f"backbone_stage{i}.conv", dense=64, pruned=32) for i in range(30)],
    ),
}


# ---- prune.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_a_report_survives_the_file(report: Report, tmp_path: Path) -> None:
    path = report.save(tmp_path / "prune.json")
    assert Report.load(path) == report
    assert Report.load(tmp_path) == report  # the run's folder will do


def test_the_file_has_the_documented_keys_in_order(tmp_path: Path) -> None:
    data = json.loads(make_report().save(tmp_path / "prune.json").read_text())
    assert list(data) == [
        *("version", "yolo_prune", "versions", "recipe", "model", "data", "imgsz", "epochs", "arguments"),
        *("status", "error"),
        *("dense", "pruned", "rounds", "epochs_log", "layers", "protected", "kept_classes"),
    ]
    assert list(data["rounds"][0]) == [
        *(
            "number",
            "epoch",
            "target",
            "flops",
            "params",
            "size_mb",
            "zeros",
            "plan",
            "held",
            "latency",
            "proof",
            "fitness",
            "seconds",
        )
    ]
    assert list(data["rounds"][0]["fitness"]) == ["before", "cut", "recovered", "end"]
    assert data["version"] == 1
    assert data["rounds"][0]["seconds"] is None


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (np.float32(0.5), 0.5),
        (torch.tensor(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (math.nan, None),
        (np.float32("nan"), None),
        (torch.tensor(math.inf), None),
        (None, None),
    ],
)
def test_scalars_become_plain_numbers_and_nan_null(value: Any, stored: float | None, tmp_path: Path) -> None:
    report = Report(dense=Figures(fitness=value), recipe={"list": [value], "path": tmp_path})
    report.pruned.fitness = value
    report.recipe["late"] = value
    data = json.loads(report.save(tmp_path / "prune.json").read_text())
    assert data["dense"]["fitness"] == data["pruned"]["fitness"] == stored
    assert data["recipe"] == {"list": [stored], "path": str(tmp_path), "late": stored}
    assert report.pruned.fitness is None or type(report.pruned.fitness) is float


def test_a_latency_has_a_row_where_it_was_measured() -> None:
    timed = Report(dense=Figures(latency_ms=16.5), pruned=Figures(latency_ms=9.65))
    assert summary_table(timed).splitlines()[-2].split() == ["latency,", "ms", "16.5", "9.65", "58.5", "%"]
    assert "latency" not in summary_table(Report())


@pytest.mark.parametrize("per_step", [1, 4])
@pytest.mark.parametrize(("later", "said"), [((0.5, 0.58), True), ((0.5, 0.61), False), ((), False)])
def test_training_that_gained_nothing_is_named(
    later: tuple[float, ...], said: bool, per_step: int, caplog: pytest.LogCaptureFixture
) -> None:
    row = RoundRow(number=1, epoch=2, target={"flops": 0.5}, fitness=RoundFitness(recovered=0.6))
    epochs = [EpochRow(epoch=i, fitness=f) for i, f in enumerate((0.7, 0.7, *later), 1)]
    with caplog.at_level("INFO", "ultralytics"):
        log_if_no_epoch_helped(Report(rounds=[row], epochs_log=epochs), batch=16, per_step=per_step)
    assert ("training after the last cut did not improve the model: its fitness was 0.600" in caplog.text) is said
    assert ("one step for each 4 batches; with nbs=16 there is one step for each batch" in caplog.text) is (
        said and per_step > 1
    )


def test_no_difference_has_no_sign_of_loss() -> None:
    assert [difference(0.60996, 0.61), difference(0.61, 0.60996), difference(0.5, 0.61)] == [
        "+0.000",
        "+0.000",
        "-0.110",
    ]


def test_a_failed_save_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_report().save(tmp_path / "prune.json")
    before = path.read_bytes()

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(OSError, match="no space left"):
        Report().save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["prune.json"]


def test_files_have_the_mode_of_ordinary_ones_and_the_mask_of_the_process_is_left_alone(tmp_path: Path) -> None:
    script = """
import os
os.umask(0o027)
del os.umask
from yolo_prune.env.files import write_text
write_text("a.json", "{}")
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert os.name == "nt" or stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640


def test_a_missing_report(tmp_path: Path) -> None:
    with pytest.raises(PruneError, match=r"No pruning report at .*prune\.json\. Pass the prune\.json of a run"):
        Report.load(tmp_path)


def test_a_truncated_report(tmp_path: Path) -> None:
    path = make_report().save(tmp_path / "prune.json")
    path.write_text(path.read_text()[:500])
    with pytest.raises(PruneError, match=r"prune\.json is not complete JSON .* incomplete or was edited"):
        Report.load(path)


def test_a_report_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "prune.json"
    path.write_text(json.dumps({"version": 2, "yolo_prune": "9.0"}))
    with pytest.raises(PruneError, match=r"format version 2, written by yolo-prune 9\.0; this .* reads version 1"):
        Report.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is not a pruning report"),
        ('{"epochs": 3}', "is not a pruning report"),
        ('{"version": 1, "rounds": [{"number": 1, "epoch": "soon"}]}', r"damaged report: rounds\.0\.epoch: .*'soon'"),
        ('{"version": 1, "status": "great"}', r"damaged report: status: .*'finished'.*'great'"),
    ],
)
def test_a_file_that_is_not_a_report(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "prune.json").write_text(text)
    with pytest.raises(PruneError, match=message):
        Report.load(tmp_path)


def test_unknown_keys_of_a_newer_release_are_left_out(tmp_path: Path) -> None:
    data = make_report().to_dict() | {"latency": {"ms": 3.0}}
    (tmp_path / "prune.json").write_text(json.dumps(data))
    assert Report.load(tmp_path) == make_report()


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_summary_table() -> None:
    assert summary_table(make_report()).splitlines() == [
        "          dense  pruned    kept",
        "GFLOPs     6.60    3.30  50.0 %",
        "M params   2.62    1.31  50.0 %",
        "size, MB   5.40    2.70  50.0 %",
        "fitness   0.612   0.600  -0.012",
    ]


def test_rounds_table_has_a_line_per_round_with_epochs_as_in_results_csv() -> None:
    lines = rounds_table(make_report()).splitlines()
    assert lines[1].split()[:3] == ["round", "epoch", "target"]
    assert lines[1].split()[-4:] == ["before", "cut", "recov.", "end"]
    assert [line.split()[:2] for line in lines[3:]] == [["1", "1"], ["2", "6"], ["3", "11"]]
    assert lines[3].split()[2:] == "83.3 % FLOPs 5.50 83.3 % 1.40 53.4 % 0.600 0.020 0.310 0.580".split()
    assert len({len(line) for line in lines[1:]}) == 1


def test_rounds_table_says_which_rounds_held() -> None:
    report = make_report()
    report.rounds[0].held, report.rounds[1].held = True, False
    lines = rounds_table(report).splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["held", "-", "yes", "no", "-"]


def test_tables_show_what_was_not_measured_as_a_dash() -> None:
    assert [line.split()[-3:] for line in summary_table(Report()).splitlines()[1:]] == [["-", "-", "-"]] * 4
    assert rounds_table(make_report(fit=False)).splitlines()[3].split()[-4:] == ["-"] * 4


# ---- prune.png -------------------------------------------------------------------------------------------------------


def texts(report: Report) -> dict[str, Any]:
    """Every visible text of the picture, numbered where it occurs twice, and its extent in pixels."""
    figure = compose(report)
    figure.canvas.draw()
    found: dict[str, Any] = {}
    undrawn = {  # ticks that matplotlib keeps ready outside the axes
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if not axis.get_view_interval()[0] <= tick.get_loc() <= axis.get_view_interval()[1]
        for label in (tick.label1, tick.label2)
    }
    for artist in figure.findobj(Text):
        if artist not in undrawn and artist.get_visible() and artist.get_text().strip():
            key = artist.get_text()
            found[f"{key} #{len(found)}" if key in found else key] = artist.get_window_extent()
    return found


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_no_text_covers_another_or_leaves_the_picture(report: Report) -> None:
    found = texts(report)
    for name, box in found.items():
        assert box.x0 >= 0, name
        assert box.y0 >= 0, name
        assert box.x1 <= 1600, name
        assert box.y1 <= 900, name
    for (one, a), (two, b) in itertools.combinations(found.items(), 2):
        apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0
        assert apart, f"{one!r} covers {two!r}"


def test_the_picture_says_what_the_report_says() -> None:
    found = texts(make_report())
    assert "dense/best pruned to 50.0 % of its FLOPs" in found
    assert "coco8.yaml,  imgsz 320,  3 rounds,  30 epochs" in found
    assert {"6.60 → 3.30", "2.62 → 1.31", "5.40 → 2.70", "0.612 → 0.600", "\N{MINUS SIGN}0.012"} <= found.keys()
    assert {"round 1 → 83.3 % FLOPs", "round 2 → 66.7 % FLOPs", "round 3 → 50 % FLOPs"} <= found.keys()
    assert {"protected, unchanged", "right after the cut", "recovered"} <= found.keys()


def test_rounds_without_room_share_a_label() -> None:
    found = texts(make_report(starts=(0, 1, 28, 29), epochs=100))
    assert {"rounds 1-2 → 75 %", "rounds 3-4 → 50 %"} <= found.keys()


def test_unmeasured_fitness_is_said_and_not_drawn() -> None:
    found = texts(make_report(fit=False))
    assert "FLOPs kept (fitness was not measured)" in found
    assert not {"fitness while training", "right after the cut", "dense fitness"} & found.keys()


def test_bars_and_lines_have_the_heights_of_the_report() -> None:
    report = make_report()
    report.epochs_log[19].fitness = None
    layers, history, cost = compose(report).axes
    free = [row for row in report.layers if not row.protected]
    kept = [row for row in report.layers if row.protected]
    bars = [[bar.get_height() for bar in container.patches] for container in layers.containers]
    assert bars == [[r.dense for r in free], [r.pruned for r in free], [r.pruned for r in kept]]
    fitness = [line for line in history.lines if line.get_label() == "fitness"]
    assert [[x[0], x[-1]] for x in (line.get_xdata().tolist() for line in fitness)] == [
        [0, 5],
        [5, 10],
        [10, 19],
        [21, 30],
    ]
    assert fitness[1].get_xydata()[0].tolist() == [5, 0.31]  # a stretch begins where recalibration left it
    (steps,) = (line for line in cost.lines if line.get_label() == "FLOPs kept")
    assert steps.get_xydata()[1:].round(1).tolist() == [[0, 83.3], [5, 66.7], [10, 50.0], [30, 50.0]]


def test_draw_writes_a_slide_and_leaves_pyplot_alone(tmp_path: Path) -> None:
    from matplotlib import pyplot

    settings = dict(matplotlib.rcParams)
    path = draw(make_report(), tmp_path / "new" / "prune.png")
    assert imread(path).shape[:2] == (900, 1600)
    assert pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == settings
    assert draw(make_report(), tmp_path / "again.png").read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["again.png", "prune.png"]


def test_a_way_back_is_a_step_up_in_the_cost() -> None:
    report = make_report()
    for row in report.epochs_log:
        row.flops = report.rounds[-1].flops if row.epoch < 18 else 6.0e9
    line = next(x for axes in compose(report).axes for x in axes.get_lines() if x.get_label() == "FLOPs kept")
    assert [(x, round(y)) for x, y in zip(*line.get_data(), strict=True)][-2:] == [(17.0, 91), (30.0, 91)]
