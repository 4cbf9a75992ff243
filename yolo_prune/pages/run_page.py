# SPDX-License-Identifier: AGPL-3.0-or-later
"""`yolo-prune report`: the page of a run, at its end or later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ultralytics.engine.model import Model
from ultralytics.utils import LOGGER

from yolo_prune.data import datasets
from yolo_prune.env.checkpoints import open_model
from yolo_prune.env.files import write_text
from yolo_prune.errors import PruneError, RunError
from yolo_prune.measure import runtimes
from yolo_prune.measure.subjects import Setting
from yolo_prune.pages import bench_file, evaluate
from yolo_prune.report import Report
from yolo_prune.report.data import FILE_NAME
from yolo_prune.report.front import Front
from yolo_prune.report.measurement import BENCH, Measurement
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
    start = _start(folder, report)
    if dataset is not None and start:
        try:
            models = [open_model(start), open_model(_delivered(folder))]
            files = datasets.spread(dataset, evaluate.PHOTOS)
            photos = evaluate.photographs(models, files, report.imgsz or 640, device)
        except Exception as e:  # the page is worth having without them
            LOGGER.warning(f"{PAGE} has no images: {type(e).__name__}: {e}")
    return _write(folder, report, start, photos)


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
    folder, report, start = _open(run, model)
    asked = data is not None or model is not None
    photos: list[Photo] = []
    if asked and start is None:
        raise _gone(report)
    if start and report.status == "finished" and (asked or Path(report.data).is_file()):
        try:
            models = [open_model(start), open_model(_delivered(folder))]
            report, photos = _look(report, models, data or report.data, measure=data is not None)
        except PruneError as e:
            if asked:
                raise
            LOGGER.warning(f"The page has no images: {e}")
    return _write(folder, report, start, photos, save)


def measure_run(
    run: str | Path,
    formats: Sequence[str],
    *,
    data: str | None = None,
    model: str | None = None,
    imgsz: int | None = None,
    **how: Any,
) -> Measurement:
    """Measure what a run started from and what it delivered, in turn, and save that in its folder as `bench.json`.

    Args:
        run: its folder, or its prune.json.
        formats: as `runtimes.parse` returns them.
        data: the dataset that exports are checked on; without it, the run's own if it is here and fits both models.
        model: the dense checkpoint, where it is not at the place that the run knew it at.
        imgsz: image size in pixels; that of the run where None.
        how: what else `Setting.of` takes.

    Raises:
        PruneError: If there is nothing to measure, or it cannot be measured here: before any work, where that can be
            told.
    """
    folder, report, start = _open(run, model)
    if report.status != "finished":
        raise RunError(f"There is nothing to measure yet: the run in {folder} is {report.status}, not finished.")
    if start is None:
        raise _gone(report)
    setting = Setting.of(imgsz or bench_file.side(report), **how)
    runtimes.check(formats, setting.quantize, setting.device)
    models = [open_model(start), open_model(_delivered(folder))]
    dataset = bench_file.dataset(models, data, report, setting.imgsz)
    found = evaluate.time_all(models, formats, replace(setting, data=dataset))
    found.save(folder / BENCH)
    return found


def _open(run: str | Path, model: str | None) -> tuple[Path, Report, Path | None]:
    """The folder of a run, its report, and the checkpoint it started from if that is here."""
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    report = Report.load(run)
    Front.load(folder)  # damage is told before any work
    return folder, report, Path(model) if model else _start(folder, report)


def _gone(report: Report) -> RunError:
    return RunError(f"The dense model {report.model!r} of this run is not here. Say where it is with model=...")


def _write(
    folder: Path, report: Report, start: Path | None, photos: Sequence[Photo], save: str | Path | None = None
) -> Path:
    """The page of a run, with the measurement that lies in its folder."""
    names = [bench_file.first_name(start), "pruned"]
    found = bench_file.load(folder, report, start, _result(folder))
    if found:
        found = found.renamed(names)
        report = bench_file.timed(report, found)
    return write_text(save or folder / PAGE, render(report, Front.load(folder), photos, folder, names, found))


def _look(report: Report, models: list[Model], data: str, measure: bool) -> tuple[Report, list[Photo]]:
    """Images of a dataset with what two models find; with `measure`, also the AP that the report lacks."""
    imgsz = report.imgsz if isinstance(report.imgsz, int) else max(report.imgsz or [640])
    files = datasets.validation_files(models[0], data, imgsz, evaluate.PHOTOS)
    report = report.model_copy(deep=True)
    for figures, model in zip((report.dense, report.pruned), models, strict=True):
        if measure and not figures.classes:
            figures.classes = evaluate.validate_once(model, "the model", data, imgsz).figures.classes
    return report, evaluate.photographs(models, files, imgsz, None)


def _start(folder: Path, report: Report) -> Path | None:
    """The checkpoint that a run started from, if it is here."""
    known = [folder / FIRST, Path(report.model)]
    own = [(folder / "weights" / name).resolve() for name in ("best.pt", "last.pt")]  # written over by the run
    return next((p for p in known if p.suffix == ".pt" and p.is_file() and p.resolve() not in own), None)


def _delivered(folder: Path) -> Path:
    found = _result(folder)
    if found is None:
        raise RunError(
            f"{folder / 'weights'} holds neither best.pt nor last.pt. Pass the folder of a run ({FILE_NAME})."
        )
    return found


def _result(folder: Path) -> Path | None:
    """The checkpoint that a run delivered, if it is here."""
    places = [folder / "weights" / f"{name}.pt" for name in ("best", "last")]
    return next((path for path in places if path.is_file()), None)
