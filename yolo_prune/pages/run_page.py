# SPDX-License-Identifier: AGPL-3.0-or-later
"""`yolo-prune report`: the page of a run, written at the end of the run or later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ultralytics.engine.model import Model
from ultralytics.utils import LOGGER

from yolo_prune.data import datasets
from yolo_prune.env import outputs, trained
from yolo_prune.env.checkpoints import open_model
from yolo_prune.env.files import write_text
from yolo_prune.env.image_size import ImageSize
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

START = "weights/round0.pt"  # the model that a run started from, if the run kept it


class Written(NamedTuple):
    """The page of a run, and the measurement that it shows; None if there is none."""

    page: Path
    measurement: Measurement | None


def at_end(folder: Path, report: Report, dataset: Any = None, device: Any = None) -> Path:
    """At the end of a run, write its page into its folder.

    Args:
        folder: the folder of the run.
        report: the report of the run.
        dataset: the validation dataset, for images; without it the page has no images.
        device: device for the models.
    """
    photos: list[Photo] = []
    start = _start(folder, report)
    if dataset is not None and start:
        try:
            models = [open_model(start), open_model(_delivered(folder))]
            files = datasets.spread(dataset, evaluate.PHOTOS)
            photos = evaluate.photographs(models, files, trained.usable(report.imgsz), device)
        except Exception as e:  # the page is also useful without images
            LOGGER.warning(f"{PAGE} has no images: {type(e).__name__}: {e}")
    return _write(folder, report, start, photos).page


def write_report(
    run: str | Path,
    *,
    data: str | None = None,
    model: str | None = None,
    save: str | Path | None = None,
    measurement: Measurement | None = None,
) -> Written:
    """Write the page of a run.

    Args:
        run: the folder of the run, or its prune.json.
        data: the dataset for images and for class accuracies that the run did not measure; None: the dataset of the
            run, if it exists.
        model: the dense checkpoint, if it was moved since the run.
        save: path of the page; None: in the folder of the run.
        measurement: the measurement to show; None: that in the folder of the run, if there is one.

    Raises:
        PruneError: If the run, the dataset or a checkpoint cannot be read.
    """
    folder, report, start = _open(run, model)
    outputs.check(save or folder / PAGE)
    asked = data is not None or model is not None
    photos: list[Photo] = []
    if asked and start is None:
        raise _no_start_model(report)
    if start and report.status == "finished" and (asked or Path(report.data).is_file()):
        try:
            models = [open_model(start), open_model(_delivered(folder))]
            report, photos = _photos_and_classes(report, models, data or report.data, measure=data is not None)
        except PruneError as e:
            if asked:
                raise
            LOGGER.warning(f"The page has no images: {e}")
    return _write(folder, report, start, photos, save, measurement)


def measure_run(
    run: str | Path,
    formats: Sequence[str],
    *,
    data: str | None = None,
    model: str | None = None,
    imgsz: ImageSize | None = None,
    **how: Any,
) -> Measurement:
    """Measure the start model and the delivered model of a run in turn, and save the result in its folder.

    The file is `bench.json`.

    Args:
        run: the folder of the run, or its prune.json.
        formats: formats to measure, as `runtimes.parse` returns them.
        data: the dataset on which exports are checked; None: the dataset of the run, if it exists and fits both models.
        model: the dense checkpoint, if it was moved since the run.
        imgsz: image size in pixels; None: the image size of the run.
        how: more arguments for `Setting.of`.

    Raises:
        PruneError: If there is nothing to measure, or the measurement is not possible here. As far as possible, this is
            checked before any work.
    """
    folder, report, start = _open(run, model)
    if report.status != "finished":
        raise RunError(
            f"There is nothing to measure yet: the run in {folder} is {report.status}, not finished. Resume "
            "the run, or pass a finished run."
        )
    if start is None:
        raise _no_start_model(report)
    setting = Setting.of(imgsz or trained.usable(report.imgsz), **how)
    runtimes.check(formats, setting.quantize, setting.device)
    models = [open_model(start), open_model(_delivered(folder))]
    dataset = bench_file.dataset(models, data, report, setting.imgsz)
    measurement = evaluate.time_all(models, formats, replace(setting, data=dataset))
    outputs.deliver(folder / BENCH, measurement.save)
    return measurement


def _open(run: str | Path, model: str | None) -> tuple[Path, Report, Path | None]:
    """The folder of a run, its report, and the checkpoint that it started from, if the file exists."""
    folder, report = folder_of(run), Report.load(run)
    Front.load(folder)  # a damaged file is reported before any work
    return folder, report, Path(model) if model else _start(folder, report)


def folder_of(run: str | Path) -> Path:
    """The folder of a run, from this folder or its prune.json."""
    return Path(run) if Path(run).is_dir() else Path(run).parent


def _no_start_model(report: Report) -> RunError:
    return RunError(f"The dense model {report.model!r} of this run was not found. Pass its path with model=...")


def _write(
    folder: Path,
    report: Report,
    start: Path | None,
    photos: Sequence[Photo],
    save: str | Path | None = None,
    measurement: Measurement | None = None,
) -> Written:
    """Write the page of a run, with a measurement: the given one, or that in the folder of the run."""
    names = [bench_file.start_name(start), "pruned"]
    measurement = measurement or bench_file.load(folder, report, start, _result(folder))
    if measurement:
        measurement = measurement.renamed(names)
        report = bench_file.with_latencies(report, measurement)
    page = render(report, Front.load(folder), photos, folder, names, measurement)
    return Written(outputs.deliver(save or folder / PAGE, lambda path: write_text(path, page)), measurement)


def _photos_and_classes(report: Report, models: list[Model], data: str, measure: bool) -> tuple[Report, list[Photo]]:
    """Images with the detections of two models, and a copy of the report.

    With `measure`, class accuracies that the report lacks are measured and added to the copy.
    """
    imgsz, settings = trained.usable(report.imgsz), trained.held(report.arguments)
    images = datasets.validation_set(models[1], data, imgsz)
    measure = measure and datasets.labelled(images, models[1].task)
    report = report.model_copy(deep=True)
    for figures, model in zip((report.dense, report.pruned), models, strict=True):
        if measure and not figures.classes:
            figures.classes = evaluate.validate_once(model, "the model", data, imgsz, settings).figures.classes
    return report, evaluate.photographs(models, datasets.spread(images, evaluate.PHOTOS), imgsz, None)


def _start(folder: Path, report: Report) -> Path | None:
    """The checkpoint that a run started from, if the file exists."""
    known = [folder / START, Path(report.model)]
    own = [(folder / "weights" / name).resolve() for name in ("best.pt", "last.pt")]  # the run overwrites these files
    return next((p for p in known if p.suffix == ".pt" and p.is_file() and p.resolve() not in own), None)


def _delivered(folder: Path) -> Path:
    result = _result(folder)
    if result is None:
        raise RunError(
            f"{folder / 'weights'} holds neither best.pt nor last.pt. Pass the folder of a run ({FILE_NAME})."
        )
    return result


def _result(folder: Path) -> Path | None:
    """The checkpoint that a run delivered, if the file exists."""
    places = [folder / "weights" / f"{name}.pt" for name in ("best", "last")]
    return next((path for path in places if path.is_file()), None)
