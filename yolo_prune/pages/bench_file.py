# SPDX-License-Identifier: AGPL-3.0-or-later
"""`bench.json` in the folder of a run: settings for the measurement, and a check that it fits the models of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultralytics.engine.model import Model
from ultralytics.utils import LOGGER

from yolo_prune.cut.record import is_pruned
from yolo_prune.data import datasets
from yolo_prune.env import trained
from yolo_prune.env.checkpoints import open_model
from yolo_prune.env.image_size import ImageSize
from yolo_prune.errors import BenchError, PruneError
from yolo_prune.measure import subjects
from yolo_prune.planning import planner
from yolo_prune.report import Report
from yolo_prune.report.measurement import BENCH, Measurement, TimingRow
from yolo_prune.report.page import PAGE

DENSE, EARLIER = "dense", "before this run"


def dataset(models: Sequence[Model], asked: str | None, report: Report, imgsz: ImageSize) -> str | None:
    """The dataset on which exports are checked: the user's, or the dataset of the run if it exists and fits.

    Raises:
        RunError: If the dataset that the user names cannot be read, or has other classes than the models.
    """
    if not asked and not (report.data and Path(report.data).exists()):
        return None
    try:
        for model in models:
            datasets.validation_set(model, asked or report.data, imgsz)
    except PruneError as e:
        if asked:
            raise
        LOGGER.warning(f"Exports are not compared with torch: {e}")
        return None
    return asked or report.data


def load(folder: Path, report: Report, start: Path | None, result: Path | None) -> Measurement | None:
    """The measurement in the folder of a run; None if it is missing, damaged, or about other models.

    Args:
        folder: the folder of the run.
        report: the report of the run.
        start: the checkpoint that the run started from, if the file exists.
        result: the checkpoint that the run delivered, if the file exists.
    """
    path = folder / BENCH
    if not path.exists():
        return None
    try:
        measurement = Measurement.load(path)
        rows = [next(row for row in measurement.rows if row.model == model) for model in measurement.models]
        if len(rows) != 2 or not (_is_start(rows[0], report, start) and _is_result(rows[1], report, result)):
            raise BenchError(
                f"{path} does not measure the model that this run started from and the model that it delivered, in "
                "this order. Measure again with format=..., or delete the file."
            )
    except PruneError as e:
        LOGGER.warning(f"{PAGE} has no latency: {e}")
        return None
    return measurement


def _is_start(row: TimingRow, report: Report, start: Path | None) -> bool:
    """Whether a row measures the model that the run started from.

    Only the sizes are compared, because the start model that a run keeps is not bit for bit the same checkpoint.
    """
    if row.params == report.dense.params:
        return True
    module: Any = open_model(start).model if start else None  # a pruned model, or other classes
    return module is not None and row.params == planner.present_cost(module, trained.usable(report.imgsz))[1]


def _is_result(row: TimingRow, report: Report, result: Path | None) -> bool:
    """Whether a row measures the model that the run delivered."""
    if result is None:
        return row.params == report.pruned.params
    return row.weights == subjects.fingerprint(open_model(result))


def start_name(start: Path | None) -> str:
    """The name on a page for the model that a run started from."""
    try:
        return EARLIER if start and is_pruned(open_model(start).model) else DENSE
    except PruneError:  # the error is reported when the checkpoint is needed
        return DENSE


def with_latencies(report: Report, measurement: Measurement) -> Report:
    """A copy of a report with the latencies of a measurement.

    The dense latency stays unknown if the run started from a pruned model.
    """
    report = report.model_copy(deep=True)
    if measurement.ends:
        first, last = measurement.ends
        report.dense.latency_ms = None if first.model == EARLIER else first.median_ms
        report.pruned.latency_ms = last.median_ms
    return report
