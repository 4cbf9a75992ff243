# SPDX-License-Identifier: AGPL-3.0-or-later
"""Pages about models: the report of a run, at its end or later, and comparisons of checkpoints."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultralytics.engine.model import Model
from ultralytics.utils import LOGGER

from yolo_prune import api, evaluate, images
from yolo_prune.errors import PruneError, RunError
from yolo_prune.files import write_text
from yolo_prune.report import Report
from yolo_prune.report.compare import Candidate, comparison_table, render_comparison, short_names
from yolo_prune.report.data import FILE_NAME
from yolo_prune.report.front import Front
from yolo_prune.report.page import PAGE, render
from yolo_prune.report.photos import Photo

FIRST = "weights/round0.pt"  # what a run that kept it started from


def at_end(folder: Path, report: Report, dataset: Any = None, device: Any = None) -> Path:
    """Write the page of a run that is over, into its folder.

    Args:
        folder: of the run.
        report: its figures.
        dataset: that it was validated on, for images; without it the page has none.
        device: to run the models on.
    """
    photos: list[Photo] = []
    names = ["dense", "pruned"]
    if dataset is not None and (start := _start(folder, report)):
        try:
            models = [api.open_model(start), api.open_model(_delivered(folder))]
            names[0] = _name(models[0])
            files = images.spread(dataset, evaluate.PHOTOS)
            photos = evaluate.photographs(models, files, report.imgsz or 640, device)
        except Exception as e:  # the page is worth having without them
            LOGGER.warning(f"{PAGE} has no images: {type(e).__name__}: {e}")
    return write_text(folder / PAGE, render(report, Front.load(folder), photos, folder, names))


def write_report(
    run: str | Path, *, data: str | None = None, model: str | None = None, save: str | Path | None = None
) -> Path:
    """Write the page of a run.

    Args:
        run: its folder, or its prune.json.
        data: the dataset, for images and for what the run did not measure; without it, the run's own if it is here.
        model: the dense checkpoint, where it is not at the place that the run knew it at.
        save: where the page goes; into the run's folder where None.

    Raises:
        PruneError: If the run, the dataset or a checkpoint cannot be read.
    """
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    report = Report.load(run)
    front = Front.load(folder)
    start = Path(model) if model else _start(folder, report)
    asked = data is not None or model is not None
    photos: list[Photo] = []
    names = ["dense", "pruned"]
    if asked and start is None:
        raise RunError(f"The dense model {report.model!r} of this run is not here. Say where it is with model=...")
    if start and report.status == "finished" and (asked or Path(report.data).is_file()):
        try:
            models = [api.open_model(start), api.open_model(_delivered(folder))]
            names[0] = _name(models[0])
            report, photos = _look(report, models, data or report.data, measure=data is not None)
        except PruneError as e:
            if asked:
                raise
            LOGGER.warning(f"The page has no images: {e}")
    return write_text(save or folder / PAGE, render(report, front, photos, folder, names))


def compare(models: Sequence[str | Path], data: str, imgsz: int, save: str | Path) -> str:
    """Validate checkpoints on a dataset, and write a page that compares them.

    Args:
        models: two or more checkpoints; the first is what the others are measured by.
        data: the dataset, as for `model.val`.
        imgsz: image size in pixels.
        save: where the page goes.

    Returns:
        The table of figures.

    Raises:
        PruneError: If a checkpoint or the dataset cannot be read, or their classes do not agree.
    """
    paths = [Path(model) for model in models]
    names = short_names(paths)
    opened = [api.open_model(path) for path in paths]
    tasks = {model.task for model in opened}
    if len(tasks) > 1:
        raise RunError(f"These models have different tasks, which cannot be compared: {', '.join(sorted(tasks))}.")
    files = [images.validation_files(model, data, imgsz, evaluate.PHOTOS) for model in opened]  # all are checked first
    candidates: list[Candidate] = []
    for name, model in zip(names, opened, strict=True):
        LOGGER.info(f"Validating {name} ({len(candidates) + 1} of {len(names)})")
        candidates.append(evaluate.measure(model, name, data, imgsz))
    photos = evaluate.photographs(opened, files[0], imgsz, None)
    words = shlex.join(["yolo-prune", "compare", *map(str, paths), f"data={data}", f"imgsz={imgsz}", f"save={save}"])
    write_text(save, render_comparison(candidates, data, imgsz, photos, words))
    return comparison_table(candidates)


def _look(report: Report, models: list[Model], data: str, measure: bool) -> tuple[Report, list[Photo]]:
    """Images of a dataset with what two models find; with `measure`, also the AP that the report lacks."""
    imgsz = report.imgsz if isinstance(report.imgsz, int) else max(report.imgsz or [640])
    files = images.validation_files(models[0], data, imgsz, evaluate.PHOTOS)
    report = report.model_copy(deep=True)
    for figures, model in zip((report.dense, report.pruned), models, strict=True):
        if measure and not figures.classes:
            figures.classes = evaluate.measure(model, "the model", data, imgsz).figures.classes
    return report, evaluate.photographs(models, files, imgsz, None)


def _start(folder: Path, report: Report) -> Path | None:
    """The checkpoint that a run started from, if it is here."""
    known = [folder / FIRST, Path(report.model)]
    own = [(folder / "weights" / name).resolve() for name in ("best.pt", "last.pt")]  # written over by the run
    return next((p for p in known if p.suffix == ".pt" and p.is_file() and p.resolve() not in own), None)


def _delivered(folder: Path) -> Path:
    found = [path for name in ("best", "last") if (path := folder / f"weights/{name}.pt").is_file()]
    if not found:
        raise RunError(
            f"{folder / 'weights'} holds neither best.pt nor last.pt. Pass the folder of a run ({FILE_NAME})."
        )
    return found[0]


def _name(model: Model) -> str:
    return "before this run" if api.is_pruned(model) else "dense"
