# SPDX-License-Identifier: AGPL-3.0-or-later
"""report.html and compare.html: what they show, what they leave out, and that nothing in them can do harm."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from small_data import IMGSZ, tiny
from test_clock import measured
from test_report import make_report
from ultralytics import YOLO
from ultralytics.engine.results import Results

import yolo_prune
from yolo_prune import cli
from yolo_prune.data import datasets
from yolo_prune.env import metrics
from yolo_prune.env.image_size import image_size
from yolo_prune.errors import PruneError
from yolo_prune.pages import compare_page, evaluate, run_page
from yolo_prune.report import (
    EpochRow,
    Figures,
    LayerRow,
    ProtectedRow,
    Report,
    RoundFitness,
    RoundRow,
    history_chart,
    svg,
)
from yolo_prune.report.compare import Candidate, comparison_table, render_comparison, short_names
from yolo_prune.report.data import LatencyRow
from yolo_prune.report.front import Front, FrontPoint
from yolo_prune.report.history import History, fitness_lines
from yolo_prune.report.measurement import Measurement, Parity, Tolerance
from yolo_prune.report.page import command, render
from yolo_prune.report.photos import Detection, Photo
from yolo_prune.report.scatter import Dot, front_dots, frontier, scatter

EVIL = "<script>alert('x')</script>&\"'"
PIXEL = bytes.fromhex("ffd8ffd9")
VOID = {"meta", "link", "br", "img"}


def guarded() -> Report:
    """A run whose second round was taken back."""
    report = make_report(starts=(0, 10), epochs=30)
    report.rounds[0].held, report.rounds[1].held = True, False
    report.rounds[1].flops = 2e9
    for row in report.epochs_log:
        row.flops = 2e9 if 10 < row.epoch <= 20 else report.rounds[0].flops
    return report


def front() -> Front:
    points = [
        FrontPoint(round=0, flops_kept=1.0, params_kept=1.0, fitness=0.612, held=True, weights="weights/round0.pt"),
        FrontPoint(round=1, flops_kept=0.75, fitness=0.61, held=True, delivered=True, weights="weights/best.pt"),
        FrontPoint(round=2, flops_kept=0.3, fitness=0.5, held=False, weights="weights/round3.pt"),
    ]
    return Front(limit=0.01, reference=0.612, points=points)


def full() -> Report:
    report = guarded()
    report.dense.classes, report.pruned.classes = {"cell": 0.7, "disc": 0.5}, {"cell": 0.6, "disc": 0.55}
    report.dense.latency_ms, report.pruned.latency_ms = 12.0, 7.5
    report.recipe = {"target": {"flops": 0.5}, "criterion": {"name": "obs"}}
    report.versions = {"torch": "2.9.9"}
    return report


def sparse() -> Report:
    """A run that cut channels and set weights to zero."""
    report = make_report()
    report.pruned.zeros, report.pruned.zipped_mb = 0.5, 0.71
    for row in report.layers:
        row.dense, row.pruned, row.zeros = 1024, 1000, 0.616
    return report


def failed() -> Report:
    report = Report(model="a.pt", data="d.yaml", epochs=9, status="failed", error="RunError: the disk is full")
    report.dense = Figures(flops=1e9, params=10_000, size_mb=1.0, fitness=0.5)
    report.epochs_log = [EpochRow(epoch=1, fitness=0.5, flops=1e9)]
    return report


def photo(name: str = "one.jpg", kind: str = "cell") -> Photo:
    mark = Detection(kind, 1, 0.9, ((0.1, 0.1), (0.5, 0.1), (0.5, 0.5), (0.1, 0.5)), ((0.3, 0.3),))
    return Photo(name, PIXEL, 200, 100, ((mark, mark), (mark,)))


def timed(*names: str) -> Measurement:
    """Two models in ONNX, of which the second does not agree with its checkpoint."""
    limits = Tolerance(scores=0.005, quality=0.002)
    found = measured(Parity(images=16, precision="fp32", boxes=6e-5, scores=0.2, quality=0.6, quality_torch=0.61))
    found.rows[1].parity.tolerance = limits
    found.failed = {"ncnn": f"The export to ncnn failed: {'x' * 90}"}
    return found.renamed(names or ("dense", "pruned"))


def comparison(name: str = "a", photos: tuple[Photo, ...] = (), measurement: Measurement | None = None) -> str:
    candidates = [
        Candidate(name, Figures(flops=2e9, params=2e6, size_mb=5.0, fitness=0.6, classes={"cell": 0.6}), 0.6, 0.8),
        Candidate("b", Figures(flops=1e9, params=1e6, size_mb=2.0, fitness=0.5, classes={"cell": 0.5}), 0.5, 0.7),
    ]
    return render_comparison(candidates, "data/cells.yaml", 320, photos, "yolo-prune compare a.pt b.pt", measurement)


class Page(HTMLParser):
    """Elements of a page; complains about those that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def sections(self) -> list[str]:
        return [a["id"] for tag, a in self.elements if a.get("id") and tag in ("section", "div")]  # type: ignore[misc]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


PAGES = {
    "full": lambda: render(full(), front(), [photo()], "runs/train"),
    "nothing": lambda: render(Report()),
    "sparse": lambda: render(sparse()),
    "failed": lambda: render(failed()),
    "guarded": lambda: render(guarded(), front()),
    "no validation": lambda: render(make_report(fit=False)),
    "crowded": lambda: render(make_report(starts=tuple(range(20)), epochs=100, layers=250)),
    "comparison": lambda: comparison(photos=(photo(),)),
    "measured": lambda: render(full(), front(), measurement=timed()),
    "measured comparison": lambda: comparison(measurement=timed("a", "b")),
    "searched": lambda: render(*searched()),
    "late rounds": lambda: render(make_report(starts=(0, 1, 28, 29))),
    "many models": lambda: crowd(),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_needs_nothing_but_itself(name: str) -> None:
    text = PAGES[name]()
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!data:image/jpeg;base64,)", text)
    assert not {tag for tag, _ in page.elements} & {"script", "iframe", "object", "embed", "img", "base", "form"}
    assert [a for tag, a in page.elements if tag == "link"] == [{"rel": "icon", "href": "data:,"}]
    assert not [a for _, a in page.elements if any(key.startswith("on") or key == "src" for key in a)]
    assert not re.search(r"\bnan\b|\binf\b|\bNone\b|Undefined", page.text)
    assert not [a for _, a in page.elements if any(re.search(r"\bnan\b|\binf\b", v or "") for v in a.values())]


ALL = ["summary", "history", "search", "rounds", "layers", "protected", "classes", "images", "reproduce"]


def test_sections_are_there_where_there_is_data() -> None:
    assert Page(PAGES["full"]()).sections == ALL
    assert Page(PAGES["guarded"]()).sections == [s for s in ALL if s not in ("classes", "images")]
    assert Page(PAGES["nothing"]()).sections == ["reproduce"]
    assert Page(PAGES["failed"]()).sections == ["summary", "history", "reproduce"]
    assert Page(PAGES["comparison"]()).sections == ["models", "tradeoff", "classes", "images", "reproduce"]
    assert Page(comparison()).sections == ["models", "tradeoff", "classes", "reproduce"]
    wanted = [s for s in ALL if s != "images"]
    wanted[4:4] = ["latency", "parity"]
    assert Page(PAGES["measured"]()).sections == wanted
    found = Page(PAGES["measured comparison"]()).sections
    assert found == ["models", "tradeoff", "latency", "parity", "classes", "reproduce"]


def test_the_page_says_what_the_report_says() -> None:
    text = Page(PAGES["full"]()).text.replace("\N{MINUS SIGN}", "-")
    for said in (
        "dense/best pruned to 50.0 % of its FLOPs",
        *("0.600 dense 0.612 -0.012", "3.30 G dense 6.60 50.0 % kept", "7.50 ms dense 12.0 62.5 % kept"),
        *("round 2, rolled back", "limit 0.602", "0.020", "rolled back 1e-15"),
        *("task output 1 layer: model.21.m.87.conv", "cell 0.700 → 0.600 -0.100", "disc 0.500 → 0.550 +0.050"),
        *("one.jpg", "dense 2 found", "pruned 1 found", "torch 2.9.9", "criterion obs", "name: obs"),
        "callbacks=prune recipe=runs/train/prune.yaml",
    ):
        assert said in text, said


def test_a_failed_run_says_why() -> None:
    text = Page(PAGES["failed"]()).text
    assert "a: run failed" in text
    assert "The run ended with an error. RunError: the disk is full" in text
    assert "Fitness 0.500 dense FLOPs 1.00 G dense Parameters 0.010 M dense" in text  # there is no pruned one
    assert "right after a cut" not in text
    assert "right after a cut" in Page(PAGES["full"]()).text


def test_layers_stand_in_the_order_of_the_architecture_with_their_widths() -> None:
    report = Report(
        layers=[
            LayerRow(name="model.0.conv", dense=16, pruned=8),
            LayerRow(name="model.10.cv1.conv", dense=32, pruned=32),
            LayerRow(name="model.2.cv2", dense=3, pruned=3, protected=True),
            LayerRow(name="backbone.stage", dense=64, pruned=None),
        ]
    )
    assert "model.0 conv 16 → 8 model.10 cv1 32 model.2 cv2 3 backbone stage 64" in Page(render(report)).text
    bars = [a["style"] for tag, a in Page(render(report)).elements if tag == "i" and "width" in (a.get("style") or "")]
    assert [float(re.findall(r"[\d.]+", bar or "")[0]) for bar in bars] == [25, 12.5, 50, 50, 4.7, 100, 100]


def test_names_cannot_do_harm() -> None:
    report = full()
    report.model = report.data = report.error = EVIL
    report.versions = report.arguments = {EVIL: EVIL}
    report.recipe = {EVIL: EVIL, "criterion": {"name": EVIL}}
    report.layers = [LayerRow(name=f"{EVIL}.{EVIL}", dense=8, pruned=4)]
    report.protected = [ProtectedRow(layers=[EVIL], reason=EVIL)]
    report.dense.classes = report.pruned.classes = {EVIL: 0.5}
    report.rounds = [RoundRow(number=1, epoch=0, target={EVIL: 0.5}, fitness=RoundFitness(before=0.1))]
    harmless = photo(EVIL, EVIL)
    found = timed(EVIL, "b")
    found.hardware, found.versions, found.failed = EVIL, {EVIL: EVIL}, {EVIL: EVIL}
    found.rows[0].format = found.rows[0].precision = found.rows[0].runtime = EVIL
    texts = render(report, front(), [harmless], EVIL, (EVIL, EVIL), found), comparison(EVIL, (harmless,), found)
    for text in texts:
        page = Page(text)
        assert "<script" not in text
        assert "script" not in {tag for tag, _ in page.elements}
        assert not [key for _, a in page.elements for key in a if key.startswith("on")]
        assert EVIL in page.text


def test_the_command_does_the_run_again() -> None:
    report = Report(model="my models/best.pt", data="d.yaml", epochs=3, imgsz=64)
    report.arguments = {"batch": 8, "amp": False, "freeze": [0, 1]}
    said = command(report, "runs/detect/train")
    assert said.startswith("yolo train 'model=my models/best.pt' data=d.yaml epochs=3 imgsz=64 batch=8 amp=False ")
    assert said.endswith("'freeze=[0, 1]' callbacks=prune recipe=runs/detect/train/prune.yaml")
    assert command(Report(), None) == "yolo train callbacks=prune recipe=prune.yaml"


def test_lines_break_where_the_model_becomes_another_one() -> None:
    report = guarded()
    lines = fitness_lines(report)
    assert [(line[0][0], line[-1][0]) for line in lines] == [(0, 10), (10, 20), (21, 30)]
    assert lines[1][0] == (10, 0.31)
    assert History.of(report).back == ((10, 20),)
    report.epochs_log[4].fitness = None
    assert [(line[0][0], line[-1][0]) for line in fitness_lines(report)] == [(0, 4), (6, 10), (10, 20), (21, 30)]


def test_the_frontier_leaves_out_what_another_one_beats() -> None:
    assert frontier([(3, 0.5), (1, 0.4), (2, 0.3), (4, 0.5), (1, 0.2)]) == [(1, 0.4), (3, 0.5)]
    assert [dot.look for dot in front_dots(front())] == ["held", "delivered", "back"]


@pytest.mark.parametrize(
    "values",
    [
        [0.0],
        [0.0, 0.0],
        [0.6],
        [0.6, 0.61],
        [1e-3, 0.9],
        [0.2, 0.200001],
        [1e9, 3e9],
        [-0.5, -0.3],
        [-0.1, 0.6],
        [-2.0],
    ],
)
def test_axes_hold_their_values_and_have_few_round_ticks(values: list[float]) -> None:
    figure = svg.blank(350, 300)
    axes = figure.subplots()
    axes.set_ylim(*svg.span(values))
    svg.round_ticks(axes.yaxis, most=5)
    figure.draw_without_rendering()
    low, high = axes.get_ylim()
    texts = [
        label.get_text()
        for label, at in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)
        if low <= at <= high
    ]
    assert low <= min(values) <= max(values) <= high
    assert low >= 0 or min(values) < 0
    assert 1 < len(texts) <= 6
    assert len(set(texts)) == len(texts)
    assert not [text for text in texts if "e" in text]


def test_noise_does_not_fill_an_axis() -> None:
    low, high = svg.span([0.6090, 0.6095], least=0.02)
    assert (0.6095 - 0.6090) / (high - low) < 0.05
    assert low < 0.6090 < 0.6095 < high
    assert svg.span([0.3, 0.6], least=0.02) == svg.span([0.3, 0.6])


def searched() -> tuple[Report, Front]:
    """A search that closes in on the limit, so that its models crowd there."""
    report = make_report(starts=tuple(range(0, 60, 6)), epochs=70)
    kept = [1.0, 0.83, 0.7, 0.6, 0.52, 0.47, 0.4, 0.44, 0.45, 0.42, 0.435]
    fit = [0.612, 0.611, 0.612, 0.609, 0.606, 0.6045, 0.58, 0.598, 0.603, 0.595, 0.599]
    points = [
        FrontPoint(round=i, flops_kept=k, fitness=f, held=f > 0.602, delivered=i == 8, weights="")
        for i, (k, f) in enumerate(zip(kept, fit, strict=True))
    ]
    return report, Front(limit=0.01, reference=0.612, points=points)


def crowd(count: int = 9) -> str:
    """A comparison of models of which the last two are almost the same."""
    steps = [*range(count - 1), count - 2.01]
    models = [
        Candidate(f"model {i}", Figures(flops=(9 - step) * 1e9, params=round((9 - step) * 1e6)), 0.6 - 0.01 * step)
        for i, step in enumerate(steps)
    ]
    return render_comparison(models, "data/cells.yaml", 320)


def test_every_point_is_drawn_and_says_what_it_is() -> None:
    page = Page(render(*searched()))
    assert page.text.count("round 8: 45.0 %, 0.603") == 2  # for wide and for narrow screens
    dots = front_dots(searched()[1])
    assert len(dots) == 11
    assert all(page.text.count(dot.tip) == 2 for dot in dots)
    assert all(Page(crowd()).text.count(f"model {i}: ") == 4 for i in range(9))


def test_axes_say_what_they_show_and_in_what_unit() -> None:
    text = Page(PAGES["full"]()).text
    for said in ("epochs finished", "FLOPs kept", "FLOPs kept, %", "50 %", "100 %"):
        assert text.count(said) >= 2, said  # for wide and for narrow screens
    assert {"GFLOPs", "million parameters", "mAP50-95", "ms, onnx"} <= set(Page(PAGES["measured comparison"]()).words)
    labels = [a["aria-label"] for tag, a in Page(PAGES["full"]()).elements if tag == "svg" and a.get("role") == "img"]
    assert labels.count("Fitness and FLOPs over the epochs of the run") == 2
    assert labels.count("Fitness against FLOPs of the models that were tried") == 2


def test_the_chart_shows_the_epochs_and_cuts_of_the_run() -> None:
    from matplotlib.figure import Figure

    report = guarded()
    above, below = Figure(figsize=(10, 5)).subplots(2)
    history_chart.draw_history(above, below, History.of(report, 0.6), svg.PAGE, svg.SIZE)
    drawn = {line.get_label(): line for line in (*above.lines, *below.lines)}
    shown = [point for line in above.lines if line.get_label() == "fitness" for point in line.get_xydata().tolist()]
    assert [[row.epoch, row.fitness] for row in report.epochs_log if [row.epoch, row.fitness] not in shown] == []
    assert [line.get_xdata()[0] for line in above.lines if line.get_label() == "recovered"] == [0, 10]
    foot = above.get_ylim()[0]
    assert [line.get_ydata()[0] for line in above.lines if line.get_label() == "right after the cut"] == [foot, foot]
    assert drawn["FLOPs kept"].get_xydata().round().tolist() == [[0, 100], [0, 75], [10, 30], [20, 75], [30, 75]]
    assert {"dense fitness", "limit 0.600"} <= drawn.keys()
    assert [[p.get_x(), p.get_x() + p.get_width()] for p in above.patches] == [[10, 20]]


def test_a_page_is_the_same_bytes_each_time_whatever_the_settings_of_matplotlib() -> None:
    import matplotlib
    from matplotlib import pyplot

    first = PAGES["full"](), comparison()
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        settings = dict(matplotlib.rcParams)
        assert (PAGES["full"](), comparison()) == first
        assert dict(matplotlib.rcParams) == settings
    assert pyplot.get_fignums() == []


def test_a_page_is_small_and_its_drawings_share_no_ids() -> None:
    for name, text in ((name, make()) for name, make in PAGES.items()):
        page = Page(text)
        assert len(text) < 250_000, name
        ids = [a["id"] for _, a in page.elements if "id" in a]
        assert len(set(ids)) == len(ids), name
        used = [a["href"].removeprefix("#") for tag, a in page.elements if tag == "use"]  # type: ignore[union-attr]
        assert set(used) <= set(ids), name


def test_names_that_xml_cannot_hold_are_shown_as_far_as_they_can_be() -> None:
    assert "a\N{REPLACEMENT CHARACTER}b: 2.00 GFLOPs, 0.600" in Page(comparison("a\x1bb")).text
    assert "a$b^$c: 2.00 GFLOPs, 0.600" in Page(comparison("a$b^$c")).text


def test_no_tooltip_of_a_page_has_a_character_that_stands_for_another() -> None:
    for name in PAGES:
        assert "\N{REPLACEMENT CHARACTER}" not in PAGES[name]()
    assert svg.printable("a\N{NO-BREAK SPACE}b\N{IDEOGRAPHIC SPACE}c") == "a\N{NO-BREAK SPACE}b\N{IDEOGRAPHIC SPACE}c"


def test_a_crowd_of_models_leaves_out_names_rather_than_heap_them() -> None:
    sizes: dict[str, Any] = {"width": 350, "height": 320, "title": "many", "across": "FLOPs kept, %", "up": "fitness"}
    drawing = scatter([Dot(50 + i % 7, 0.5 + 0.001 * i, "held", f"round {i}") for i in range(150)], **sizes)
    named = re.findall(r">(round \d+)</text>", drawing)
    asked = re.findall(r"<title>(round \d+)</title>", drawing)
    assert asked == [f"round {i}" for i in range(150)]
    assert 0 < len(named) < 150


def test_names_are_as_short_as_tells_models_apart() -> None:
    found = short_names(
        [Path(p) for p in ("yolo11n.pt", "/r/a/weights/best.pt", "/r/b/weights/best.pt", "/s/b/best.pt")]
    )
    assert found == ["yolo11n", "a/best", "b/best", "best"]
    assert short_names([Path("/x/t/weights/best.pt"), Path("/y/t/weights/best.pt")]) == ["x/t/best", "y/t/best"]


def test_ap_by_class_is_that_of_the_task() -> None:
    class Part:
        def __init__(self, *classes: int) -> None:
            self.ap_class_index, self.ap = np.array(classes), np.array([0.25] * len(classes))

    class Metrics:
        names = {0: "a", 2: "c"}  # noqa: RUF012
        box, seg = Part(0), Part(0, 2)

    assert metrics.class_ap(Metrics()) == {"a": 0.25, "c": 0.25}
    Metrics.seg = Part()
    assert metrics.class_ap(Metrics()) == {"a": 0.25}
    assert metrics.class_ap(None) == metrics.class_ap(object()) == {}


def test_comparison_table_has_shares_of_the_first() -> None:
    candidates = [Candidate("a", Figures(flops=2e9, fitness=0.6), 0.6, 0.8), Candidate("b", Figures(flops=1e9))]
    lines = comparison_table(candidates).splitlines()
    assert lines[1].split() == ["a", "0.600", "0.800", "2.00", "100.0", "%", "-", "-", "-"]
    assert lines[2].split() == ["b", "-", "-", "1.00", "50.0", "%", "-", "-", "-"]


# ---- runs and checkpoints --------------------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "epochs": 2,
    "imgsz": IMGSZ,
    "batch": 4,
    "nbs": 4,
    "workers": 0,
    "amp": False,
    "device": "cpu",
    "optimizer": "AdamW",
    "exist_ok": True,
    "val": True,
    "verbose": False,
}
RECIPE = {
    "target": {"flops": 0.6},
    "criterion": "magnitude",
    "channels": {"round_to": 1, "min": 2},
    "recover": {"refit": 0, "batchnorm": 1},
    "schedule": {"rounds": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a dense checkpoint and a pruning run on them."""
    torch.set_num_threads(1)
    folder = tiny(tmp_path_factory.mktemp("pages"), train=8)
    yolo_prune.prune(
        folder / "dense.pt", RECIPE, data=str(folder / "scenes/scenes.yaml"), project=str(folder), name="run", **RUN
    )
    return folder


def test_a_run_writes_its_page_with_images(folder: Path) -> None:
    page = Page((folder / "run/report.html").read_text(encoding="utf-8"))
    assert {"summary", "history", "rounds", "layers", "protected", "images", "reproduce"} <= set(page.sections)
    assert page.text.count(" found") == 2 * 4  # both models on all of the validation images
    assert f"model={folder / 'dense.pt'}" in page.text
    assert "device=cpu" in page.text


def test_a_page_that_cannot_be_written_costs_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(run_page, "at_end", fail)
    places = {"data": str(folder / "scenes/scenes.yaml"), "project": str(folder), "name": "full"}
    report = yolo_prune.prune(folder / "dense.pt", RECIPE, **places, **{**RUN, "epochs": 1, "plots": False})
    assert report.status == "finished"
    assert not (folder / "full/report.html").exists()


def test_the_page_of_a_run_can_be_made_again(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "again.html"
    assert cli.main(["report", str(folder / "run"), f"save={target}"]) == 0
    assert f"saved {target}" in capsys.readouterr().out
    assert "images" in Page(target.read_text(encoding="utf-8")).sections
    alone = tmp_path / "moved"
    alone.mkdir()
    data = json.loads((folder / "run/prune.json").read_text())
    (alone / "prune.json").write_text(json.dumps({**data, "model": "gone.pt", "data": "gone.yaml"}))
    assert cli.main(["report", str(alone / "prune.json")]) == 0
    sections = Page((alone / "report.html").read_text(encoding="utf-8")).sections
    assert "layers" in sections
    assert "images" not in sections


def test_a_model_that_the_run_has_written_over_is_not_shown_as_the_dense_one(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(folder / "run", own)
    report = Report.load(own)
    report.model = str(own / "weights/best.pt")
    report.save(own / "prune.json")
    assert "images" not in Page(run_page.write_report(own).page.read_text(encoding="utf-8")).sections
    shutil.copy(folder / "dense.pt", own / "weights/round0.pt")
    page = Page(run_page.write_report(own).page.read_text(encoding="utf-8"))
    assert "images" in page.sections
    assert "dense" in page.text


def test_what_an_older_run_did_not_measure_is_measured_where_data_is_given(folder: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(folder / "run", old)
    data = json.loads((old / "prune.json").read_text())
    for figures in ("dense", "pruned"):
        data[figures].pop("classes")
    (old / "prune.json").write_text(json.dumps(data))
    path, _ = run_page.write_report(old, data=str(folder / "scenes/scenes.yaml"), model=str(folder / "dense.pt"))
    assert {"classes", "images"} <= set(Page(path.read_text(encoding="utf-8")).sections)


def test_checkpoints_are_compared(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    models = [str(folder / "dense.pt"), str(folder / "run/weights/best.pt")]
    target = tmp_path / "compare.html"
    arguments = [f"data={folder / 'scenes/scenes.yaml'}", f"imgsz={IMGSZ}", f"save={target}"]
    assert cli.main(["compare", *models, *arguments]) == 0
    report = Report.load(folder / "run")
    table = capsys.readouterr().out
    page = Page(target.read_text(encoding="utf-8"))
    kept = f"{100 * report.pruned.flops / report.dense.flops:.1f} %"
    assert kept in table
    assert kept in page.text
    assert {"models", "images", "reproduce"} <= set(page.sections)
    assert f"{report.pruned.fitness:.3f}" in page.text  # validated as the run itself does
    assert not list(tmp_path.glob("runs"))


def test_checkpoints_are_compared_on_rectangles(folder: Path, tmp_path: Path) -> None:
    models = [folder / "dense.pt", folder / "run/weights/best.pt"]
    target = tmp_path / "compare.html"
    size = image_size("64,96")
    found = compare_page.compare(models, str(folder / "scenes/scenes.yaml"), size, target, ["torch"], repeats=1)
    assert found.measurement.imgsz == size
    page = Page(target.read_text(encoding="utf-8"))
    assert "imgsz 64,96" in page.text
    assert "64 \N{MULTIPLICATION SIGN} 96" in page.text
    assert "imgsz=64,96" in page.text  # in the command that makes the page again


def test_a_few_images_from_all_over_a_dataset() -> None:
    class Dataset:
        im_files = [f"{i}.jpg" for i in range(10)]  # noqa: RUF012

    assert [p.stem for p in datasets.spread(Dataset(), 4)] == ["0", "2", "5", "7"]
    assert len(datasets.spread(Dataset(), 99)) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report"], "no run was named; pass the folder of one"),
        (["report", "a", "b"], "2 runs were named"),
        (["report", "nowhere"], "No pruning report at nowhere"),
        (["report", "nowhere", "save=page.pdf"], "save=page.pdf: the name must end in .html"),
        (["report", "nowhere", "dat=x.yaml"], "Did you mean 'data'?"),
        (["compare", "a.pt", "data=x.yaml"], "pass two or more checkpoints to compare. Usage: yolo-prune compare"),
        (["compare", "a.pt", "b.pt"], "data= is missing: pass the dataset to validate on"),
        (["compare", "a.pt", "a.pt", "data=x.yaml"], "'a.pt' is named twice"),
        (["compare", "a.pt", "b.pt", "data=x.yaml"], "The model 'a.pt' does not exist"),
        (["compare", "a.pt", "b.onnx", "data=x.yaml", "imgsz=7"], "imgsz=7: must be a multiple of 32"),
    ],
)
def test_mistakes_are_one_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], clean_cwd: Path
) -> None:
    assert cli.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert list(clean_cwd.iterdir()) == []


def test_a_dataset_or_model_that_does_not_fit_is_one_message(folder: Path, tmp_path: Path) -> None:
    data = str(folder / "scenes/scenes.yaml")
    with pytest.raises(PruneError, match=r"data=nowhere\.yaml: the dataset cannot be read"):
        run_page.write_report(folder / "run", data="nowhere.yaml")
    other = tmp_path / "other.pt"
    YOLO("yolov8n.yaml").save(other)
    with pytest.raises(PruneError, match="has 5 classes, the model 80"):
        compare_page.compare([folder / "dense.pt", other], data, IMGSZ, tmp_path / "c.html")
    (tmp_path / "prune.json").write_text(json.dumps({**make_report().to_dict(), "model": "gone.pt"}))
    with pytest.raises(PruneError, match=r"The dense model 'gone.pt' of this run was not found.*model="):
        run_page.write_report(tmp_path, data=data)
    (tmp_path / "front.json").write_text("{")
    with pytest.raises(PruneError, match=r"front\.json is damaged: Invalid JSON.*Delete the file"):
        run_page.write_report(tmp_path)


def test_outlines_of_every_task_become_fractions_of_the_image() -> None:
    image, names = np.zeros((8, 16, 3), np.uint8), {0: "a"}
    box = torch.tensor([[4.0, 2, 12, 6, 0.5, 0]])
    corners = ((0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75))
    (mark,) = evaluate.detections(Results(image, "", names, boxes=box))
    assert mark == Detection("a", 0, 0.5, corners)
    (mark,) = evaluate.detections(Results(image, "", names, obb=torch.tensor([[8.0, 4, 8, 4, 0, 0.5, 0]])))
    assert set(mark.outline) == set(corners)
    mask = torch.zeros(1, 8, 16)
    mask[:, 2:6, 4:12] = 1
    (mark,) = evaluate.detections(Results(image, "", names, boxes=box, masks=mask))
    assert len(mark.outline) >= 4
    assert all(0.2 < value < 0.8 for point in mark.outline for value in point)
    (mark,) = evaluate.detections(Results(image, "", names, boxes=box, masks=torch.zeros(1, 8, 16)))
    assert mark.outline == corners
    dots = torch.tensor([[[8.0, 2, 1], [0, 0, 0]]])
    (mark,) = evaluate.detections(Results(image, "", names, boxes=box, keypoints=dots))
    assert mark.dots == ((0.5, 0.25),)
    assert evaluate.detections(Results(image, "", names, probs=torch.ones(1))) == ()


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    found = Browser(tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", PAGES)
def test_pages_fit_screens(browser: Browser, name: str, width: int, dark: bool, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(PAGES[name](), encoding="utf-8")
    browser.open(path, width, dark)
    assert browser.complaints() == []
    assert [u for u in browser.requests() if not u.startswith("data:")] == [path.as_uri()]
    assert browser.value("innerWidth") == width
    assert browser.value(
        "document.documentElement.scrollWidth <= innerWidth && document.body.scrollWidth <= innerWidth"
    )
    assert browser.value("document.body.innerText.length") > 100
    assert browser.value(INK) != browser.value(PAPER)
    assert browser.value(CLIPPED) == []
    assert browser.value(COVERED) == []
    assert browser.value("getComputedStyle(document.querySelector('.plot text') || document.body).fontSize") in SIZE
    colours = browser.value("[...document.querySelectorAll('.plot text')].map(t => getComputedStyle(t).fill)")
    assert not {"rgb(0, 0, 0)"} & set(colours)  # the page's, in light and in dark
    assert browser.value("[...document.querySelectorAll('.layers')].every(l => l.scrollWidth <= l.clientWidth)")
    assert browser.value("[...document.querySelectorAll('.layer .width')].every(w => w.scrollWidth <= w.clientWidth)")


INK, PAPER = "getComputedStyle(document.body).color", "getComputedStyle(document.body).backgroundColor"
CLIPPED = """
[...document.querySelectorAll('.plot text')].filter(text => {
  const plot = text.closest('svg').getBoundingClientRect(), box = text.getBoundingClientRect()
  return plot.width && box.width && (box.left < plot.left - 2 || box.right > plot.right + 2 || box.top < plot.top - 2)
}).map(text => text.textContent)
"""
SIZE = ("12px", "16px")
# Pairs of texts of a drawing, and names and dots, of which one covers the other.
COVERED = """
[...document.querySelectorAll('.plot svg')].flatMap(plot => {
  const box = element => ({name: element.textContent || element.parentNode.parentNode.textContent,
    box: element.getBoundingClientRect()})
  const texts = [...plot.querySelectorAll('text')].map(box).filter(({box}) => box.width)
  const dots = plot.closest('#history') ? [] : [...plot.querySelectorAll('title ~ g use')].map(box)
  const covers = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1.5 &&
    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2.5
  return texts.flatMap((one, i) => [...texts.slice(i + 1), ...dots].filter(two => covers(one.box, two.box))
    .map(two => one.name + ' covers ' + two.name))
})
"""


def test_a_latency_that_was_the_target_is_on_the_page() -> None:
    report = full()
    last = report.rounds[-1]
    last.target, last.held = {"latency": 0.6}, None
    last.latency = LatencyRow(place="onnxruntime 1.32.0 on a Pi", imgsz=320, dense_ms=10.0, ms=6.3, ratio=0.617)
    report.dense.latency_ms, report.pruned.latency_ms = 10.0, 6.3
    page = render(report)
    assert "of its latency" in page
    assert "Latency, onnxruntime" in page
    assert "61.7 % kept" in page  # round by round, as in the log; the medians would be 63.0 %
    assert "60 % latency, reached 61.7 %" in page
    assert "cuts timed in onnxruntime 1.32.0 on a Pi" in page
