# SPDX-License-Identifier: AGPL-3.0-or-later
"""`compare.html`: several checkpoints on the same dataset, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from yolo_prune.env.image_size import ImageSize
from yolo_prune.report.data import Figures
from yolo_prune.report.measurement import Measurement
from yolo_prune.report.page import NARROW, WIDE, ClassRow, class_rows, legend, write
from yolo_prune.report.photos import Photo
from yolo_prune.report.picture import model_name
from yolo_prune.report.scatter import Dot, scatter
from yolo_prune.report.table import align, fitness, number, percent

HALF = 500.0  # width of one of two plots side by side


@dataclass(frozen=True)
class Candidate:
    """A validated model. `map` is mAP50-95 and `map50` is mAP50; both are None for tasks without mAP."""

    name: str
    figures: Figures
    map: float | None = None
    map50: float | None = None

    @property
    def accuracy(self) -> float | None:
        """The value by which models are compared: mAP50-95, or the fitness for tasks without mAP."""
        return self.figures.fitness if self.map is None else self.map


def render_comparison(
    candidates: Sequence[Candidate],
    data: str,
    imgsz: ImageSize,
    photos: Sequence[Photo] = (),
    command: str = "",
    measurement: Measurement | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The page that compares models with the first of them.

    Args:
        candidates: one or more.
        data: the dataset.
        imgsz: image size in pixels.
        photos: images with the detections of each model.
        command: the command that made the page.
        measurement: the latencies of the models, under the names of the candidates.
        notes: what a reader must know to compare the models.
    """
    first = candidates[0]
    classes: list[ClassRow] = class_rows([c.figures.classes for c in candidates])
    return write(
        "compare.html.j2",
        title=f"{len(candidates)} models on {Path(data).stem or data}",
        facts=[Path(data).name, f"imgsz {imgsz}", *notes],
        candidates=candidates,
        first=first,
        measure=measure_name(candidates),
        plots=_plots(candidates, measurement),
        classes=classes,
        photos=photos,
        names=[c.name for c in candidates],
        bench=measurement,
        legend=legend(photos),
        command=command,
    )


def measure_name(candidates: Sequence[Candidate]) -> str:
    """The name of the metric in `Candidate.accuracy`."""
    return "mAP50-95" if any(c.map is not None for c in candidates) else "fitness"


def comparison_table(candidates: Sequence[Candidate]) -> str:
    """The comparison as a text table, for the terminal."""
    first = candidates[0].figures
    rows = [["", measure_name(candidates), "mAP50", "GFLOPs", "of first", "M params", "of first", "size, MB"]]
    for c in candidates:
        f = c.figures
        rows.append(
            [c.name, fitness(c.accuracy), fitness(c.map50), number(f.flops, 1e9), percent(f.flops, first.flops)]
        )
        rows[-1] += [number(f.params, 1e6), percent(f.params, first.params), number(f.size_mb)]
    return align(rows, left=1)


def short_names(paths: Sequence[Path]) -> list[str]:
    """A name for each checkpoint: short, but different from all others."""
    short = [model_name(str(path)) for path in paths]
    return [name if short.count(name) == 1 else _longer(path, paths) for name, path in zip(short, paths, strict=True)]


def _longer(path: Path, paths: Sequence[Path]) -> str:
    """The shortest ending of a path that no other path has."""
    others = [other.parts for other in paths if other != path]
    parts = path.parts
    for count in range(1, len(parts) + 1):
        if not any(other[-count:] == parts[-count:] for other in others):
            return "/".join(part for part in parts[-count:] if part not in ("weights", "/")).removesuffix(".pt")
    return path.as_posix()


def _plots(candidates: Sequence[Candidate], measurement: Measurement | None) -> list[list[Markup]]:
    """Charts of accuracy against each cost, for wide and for narrow screens. The first of an odd number is wide."""
    axes = [
        (unit, [None if (v := getattr(c.figures, what)) is None else v / scale for c in candidates])
        for what, unit, scale in (("flops", "GFLOPs", 1e9), ("params", "million parameters", 1e6))
    ]
    for format, rows in reversed(measurement.formats.items() if measurement else ()):
        times = {row.model: row.median_ms for row in rows}
        axes.insert(0, (f"ms, {format}", [times.get(c.name) for c in candidates]))
    name = measure_name(candidates)
    drawn = [(unit, dots) for unit, costs in axes if len(dots := _dots(candidates, costs, unit)) > 1]
    wide = len(drawn) % 2 * (len(drawn) > 1)
    return [
        [
            scatter(dots, width=w, height=330.0, title=f"{name} against {unit}", across=unit, up=name)
            for w in (WIDE if i < wide else HALF, NARROW)
        ]
        for i, (unit, dots) in enumerate(drawn)
    ]


def _dots(candidates: Sequence[Candidate], costs: Sequence[float | None], unit: str) -> list[Dot]:
    return [
        Dot(cost, c.accuracy, f"m{i % 8 + 1}", str(i + 1), f"{c.name}: {number(cost)} {unit}, {fitness(c.accuracy)}")
        for i, (c, cost) in enumerate(zip(candidates, costs, strict=True))
        if c.accuracy is not None and cost
    ]


__all__ = ["Candidate", "comparison_table", "measure_name", "render_comparison", "short_names"]
