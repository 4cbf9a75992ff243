# SPDX-License-Identifier: AGPL-3.0-or-later
"""`report.html`: the report of a run, on one page that needs no other file."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from yolo_prune._version import __version__
from yolo_prune.report import measurement_words
from yolo_prune.report.data import LayerRow, Report, RoundRow
from yolo_prune.report.front import Front
from yolo_prune.report.history import History
from yolo_prune.report.history_chart import history_chart
from yolo_prune.report.measurement import Measurement
from yolo_prune.report.photos import Photo
from yolo_prune.report.picture import model_name, title
from yolo_prune.report.scatter import cost_metric, front_dots, scatter
from yolo_prune.report.table import MISSING, difference, fitness, number, percent, target_text

PAGE = "report.html"
MINUS = "\N{MINUS SIGN}"
WIDE, NARROW = 1040.0, 350.0  # widths of charts, for large screens and for phones


@dataclass(frozen=True)
class Card:
    """A figure of the summary.

    `value` is the figure after pruning and `before` the one before pruning. `kept` is the share that was kept, for a
    bar, and `note` says the same or the change in words. If there is no pruned model (yet), `value` is that of the
    dense model and `before` is empty.
    """

    label: str
    value: str
    unit: str
    before: str
    note: str
    kept: float | None = None
    tone: str = ""


@dataclass(frozen=True)
class Bar:
    """A layer in the chart: its name within its module, its channels, and the lengths of its two bars in percent.

    `zeros` is the text for its share of zeros.
    """

    name: str
    dense: int
    pruned: int | None
    before: float
    after: float
    protected: bool
    zeros: str = ""


@dataclass(frozen=True)
class ClassRow:
    """A class, and its AP for each model; None if the class was not validated."""

    name: str
    values: tuple[float | None, ...]

    @property
    def change(self) -> str:
        """AP of the last model minus AP of the first model, as text."""
        return difference(self.values[-1], self.values[0]).replace("-", MINUS)

    @property
    def worse(self) -> bool:
        """Whether the last model is worse than the first."""
        first, last = self.values[0], self.values[-1]
        return first is not None and last is not None and last < first


def render(
    report: Report,
    front: Front | None = None,
    photos: Sequence[Photo] = (),
    folder: str | Path | None = None,
    names: Sequence[str] = ("dense", "pruned"),
    measurement: Measurement | None = None,
) -> str:
    """The page of a run. Parts whose data is missing are left out.

    Args:
        report: the report of the run.
        front: all models of a run with a limit on the drop.
        photos: images with the detections of two models, before and after pruning.
        folder: the folder of the run, for the command that repeats it.
        names: names of the two models.
        measurement: the latencies of the two models, under these names.
    """
    least = None if front is None else front.reference - front.limit
    history = History.of(report, least)
    return write(
        "report.html.j2",
        title=title(report),
        report=report,
        facts=_facts(report),
        cards=_cards(report, measurement),
        history=history,
        plots=_charts(history),
        searched=_search(front, least),
        rounds=_rounds(report),
        cut=any(row.fitness.cut is not None for row in report.rounds),
        recovered=any(row.fitness.recovered is not None for row in report.rounds),
        judged=any(row.held is not None for row in report.rounds),
        rolled_back=sum(row.held is False for row in report.rounds),
        modules=_modules(report.layers),
        protected=report.protected,
        classes=class_rows([report.dense.classes, report.pruned.classes]),
        photos=photos,
        names=names,
        bench=measurement,
        legend=legend(photos),
        command=command(report, folder),
        recipe=yaml.safe_dump(report.recipe, sort_keys=False) if report.recipe else "",
        versions={"yolo-prune": report.yolo_prune, **report.versions},
    )


def write(template: str, **content: Any) -> str:
    """Render a template. All content is escaped."""
    return _environment().get_template(template).render(version=__version__, **content)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["fitness"] = fitness
    environment.filters["percent"] = percent
    environment.filters["digits"] = lambda value, form: MISSING if value is None else form % value
    environment.filters["minus"] = lambda text: text.replace("-", MINUS)
    environment.globals["timing"] = measurement_words
    environment.filters["difference"] = lambda after, before: difference(after, before).replace("-", MINUS)
    return environment


def class_rows(classes: Sequence[Mapping[str, float]]) -> list[ClassRow]:
    """The classes of the models, in order; empty if fewer than two models have class accuracies."""
    if sum(map(bool, classes)) < min(2, len(classes)):
        return []
    names = dict.fromkeys(name for one in classes for name in one)
    return [ClassRow(name, tuple(one.get(name) for one in classes)) for name in names]


def legend(photos: Iterable[Photo]) -> list[tuple[int, str]]:
    """`(number, name)` of the classes that occur in photos."""
    return sorted({(m.kind, m.name) for photo in photos for marks in photo.detections for m in marks})


def command(report: Report, folder: str | Path | None) -> str:
    """The command that repeats the run."""
    recipe = Path(folder, "prune.yaml") if folder else Path("prune.yaml")
    values = {"model": report.model, "data": report.data, "epochs": report.epochs, "imgsz": report.imgsz}
    given = {k: v for k, v in {**values, **report.arguments}.items() if v not in (None, "")}
    words = ["yolo", "train", *(f"{k}={v}" for k, v in given.items()), "callbacks=prune", f"recipe={recipe}"]
    return shlex.join(words)


def _facts(report: Report) -> list[str]:
    rounds = len(report.rounds)
    facts = [Path(report.data).name, "" if report.imgsz is None else f"imgsz {report.imgsz}"]
    facts += ["" if report.epochs is None else f"{report.epochs} epoch{'s' * (report.epochs != 1)}"]
    facts += [report.kept_classes]
    facts += [f"{rounds} round{'s' * (rounds != 1)}" if rounds else ""]
    facts += [f"cuts timed in {report.timed.place}" if report.timed else ""]
    facts += [f"criterion {name}" if (name := (report.recipe.get("criterion") or {}).get("name")) else ""]
    return [fact for fact in facts if fact]


def _cards(report: Report, measurement: Measurement | None) -> list[Card]:
    dense, pruned = report.dense, report.pruned
    cards = []
    if dense.fitness is not None or pruned.fitness is not None:
        change = difference(pruned.fitness, dense.fitness)
        tone = "" if change in (MISSING, "+0.000") else "worse" if change.startswith("-") else "better"
        value = fitness(pruned.fitness if pruned.fitness is not None else dense.fitness)
        note = "" if change == MISSING else change.replace("-", MINUS)
        cards.append(Card("Fitness", value, "", _before(dense.fitness, pruned.fitness), note, None, tone))
    ratio, runtime = report.timed.ratio if report.timed else None, report.timed.runtime if report.timed else ""
    if measurement and measurement.ends:
        last = measurement.ends[1]
        ratio, runtime = last.ratio, measurement_words.runtime(last) + measurement_words.threads(measurement)
    for label, unit, before, after, scale in (
        ("FLOPs", "G", dense.flops, pruned.flops, 1e9),
        ("Parameters", "M", dense.params, pruned.params, 1e6),
        ("Checkpoint", "MB", dense.size_mb, pruned.size_mb, 1.0),
        (f"Latency{runtime and f', {runtime}'}", "ms", dense.latency_ms, pruned.latency_ms, 1.0),
    ):
        if before is None and after is None:
            continue
        kept = after / before if after is not None and before else None
        if kept and unit == "ms":
            kept = ratio or kept  # the ratio compares the same rounds, so it is more exact than the ratio of medians
        note = "" if kept is None else f"{percent(kept, 1)} kept"
        shown = after if after is not None else before
        cards.append(Card(label, number(shown, scale), unit, _before(before, after, scale), note, kept))
    if pruned.zeros is not None:
        zipped = "" if pruned.zipped_mb is None else f"{number(pruned.zipped_mb)} MB zipped"
        cards.append(Card("Zero weights", percent(pruned.zeros, 1), "", "0 %", zipped, None))
    return cards


def _before(dense: float | None, pruned: float | None, scale: float = 0.0) -> str:
    if pruned is None:
        return ""
    return number(dense, scale) if scale else fitness(dense)


def _charts(history: History) -> list[Markup]:
    """The chart of a run, once for wide and once for narrow screens."""
    if not history.epochs or not (history.measured or history.kept):
        return []
    return [history_chart(history, width=WIDE, height=430.0), history_chart(history, width=NARROW, height=380.0)]


COSTS = {"flops_kept": "FLOPs", "params_kept": "parameters", "weights_kept": "weights that are not zero"}


def _search(front: Front | None, least: float | None) -> list[Markup]:
    dots = front_dots(front) if front else []
    if len(dots) < 2 or front is None:
        return []
    cost = COSTS[cost_metric(front)]
    look: dict[str, Any] = {"title": f"Fitness against {cost} of the models that were tried", "up": "fitness"}
    look |= {"across": f"{cost} kept, %", "limit": least}
    return [
        scatter(dots, width=WIDE, height=380.0, **look),
        scatter(dots, width=NARROW, height=320.0, **look),
    ]


def _rounds(report: Report) -> list[dict[str, Any]]:
    dense = report.dense
    return [
        {
            "number": row.number,
            "epoch": row.epoch + 1,
            "target": (target_text(row) or MISSING) + _reached(row) + _zeros(row),
            "gflops": number(row.flops, 1e9),
            "flops_kept": percent(row.flops, dense.flops),
            "params": number(row.params, 1e6),
            "params_kept": percent(row.params, dense.params),
            "around": [fitness(v) for v in (row.fitness.before, row.fitness.cut, row.fitness.recovered)],
            "end": fitness(row.fitness.end),
            "held": row.held,
            "proof": _proof(row),
        }
        for row in report.rounds
    ]


def _reached(row: RoundRow) -> str:
    return f", reached {percent(row.latency.ratio, 1)}" if row.latency and row.latency.ratio else ""


def _zeros(row: RoundRow) -> str:
    return f", {percent(row.zeros, 1)} zeros" if row.zeros and "weights" not in row.target else ""


def _proof(row: RoundRow) -> str:
    error = row.proof.error if row.proof else None
    return MISSING if error is None else "exact" if error == 0 else f"{error:.0e}".replace("-", MINUS)


def _modules(layers: Sequence[LayerRow]) -> list[tuple[str, list[Bar]]]:
    """The bars of the layers for each top-level module, in the order of the architecture."""
    widest = max((row.dense for row in layers), default=1) or 1
    return [
        (name, [_bar(row, name, widest) for row in rows]) for name, rows in groupby(layers, lambda r: _module(r.name))
    ]


def _module(name: str) -> str:
    """`model.23` for `model.23.cv2.0.2`; for other names, their first part."""
    parts = name.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0]


def _bar(row: LayerRow, module: str, widest: int) -> Bar:
    name = row.name.removeprefix(module).strip(".").removesuffix(".conv") or row.name.rpartition(".")[2]
    after = row.dense if row.pruned is None else row.pruned
    zeros = f"{percent(row.zeros, 1)} zeros" if row.zeros else ""
    return Bar(name, row.dense, row.pruned, 100 * row.dense / widest, 100 * after / widest, row.protected, zeros)


__all__ = ["PAGE", "Card", "class_rows", "command", "legend", "model_name", "render", "write"]
