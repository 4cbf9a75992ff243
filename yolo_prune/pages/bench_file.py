# SPDX-License-Identifier: AGPL-3.0-or-later
"""The measurement in a run's folder: what it is made with, and whether it is about the models of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultralytics.engine.model import Model
from ultralytics.utils import LOGGER

from yolo_prune.cut.record import is_pruned
from yolo_prune.data import datasets
from yolo_prune.env.checkpoints import open_model
from yolo_prune.errors import BenchError, PruneError
from yolo_prune.measure import subjects
from yolo_prune.planning import planner
from yolo_prune.report import Report
from yolo_prune.report.measurement import BENCH, Measurement, TimingRow
from yolo_prune.report.page import PAGE

DENSE, EARLIER = "dense", "before this run"


def side(report: Report) -> int:
    """The image size of a run, as exports can have it: a multiple of 32, in pixels."""
    size = report.imgsz if isinstance(report.imgsz, int) else max(report.imgsz or [640])
    return -(-size // 32) * 32


def dataset(models: Sequence[Model], asked: str | None, report: Report, imgsz: int) -> str | None:
    """What exports are checked on: the dataset that was asked for, or the run's own, if it is here and fits.

    Raises:
        RunError: If the dataset that was asked for cannot be read, or has other classes than the models.
    """
    if not asked and not (report.data and Path(report.data).exists()):
        return None
    try:
        for model in models:
            datasets.validation_files(model, asked or report.data, imgsz, 1)
    except PruneError as e:
        if asked:
            raise
        LOGGER.warning(f"Exports are not compared with torch: {e}")
        return None
    return asked or report.data


def load(folder: Path, report: Report, start: Path | None, result: Path | None) -> Measurement | None:
    """The measurement in a run's folder; None where there is none, or it is damaged or about other models.

    Args:
        folder: of the run.
        report: of the run.
        start: the checkpoint that it started from, if that is here.
        result: the checkpoint that it delivered, likewise.
    """
    path = folder / BENCH
    if not path.exists():
        return None
    try:
        found = Measurement.load(path)
        rows = [next(row for row in found.rows if row.model == model) for model in found.models]
        if len(rows) != 2 or not (_started(rows[0], report, start) and _delivered(rows[1], report, result)):
            raise BenchError(
                f"{path} is not about what this run started from and what it delivered, in this order. Measure anew "
                "with format=..., or delete it."
            )
    except PruneError as e:
        LOGGER.warning(f"{PAGE} has no latency: {e}")
        return None
    return found


def _started(row: TimingRow, report: Report, start: Path | None) -> bool:
    """By size: what a run keeps of its start is not bit for bit the same checkpoint."""
    if row.params == report.dense.params:
        return True
    module: Any = open_model(start).model if start else None  # pruned already, or with other classes
    return module is not None and row.params == planner.present_cost(module, side(report))[1]


def _delivered(row: TimingRow, report: Report, result: Path | None) -> bool:
    if result is None:
        return row.params == report.pruned.params
    return row.weights == subjects.fingerprint(open_model(result))


def first_name(start: Path | None) -> str:
    """What a page calls the model that a run started from."""
    try:
        return EARLIER if start and is_pruned(open_model(start).model) else DENSE
    except PruneError:  # told where it is needed
        return DENSE


def timed(report: Report, found: Measurement) -> Report:
    """A copy of a report with the latencies of a measurement; what is not the dense model leaves that one unknown."""
    report = report.model_copy(deep=True)
    if found.ends:
        first, last = found.ends
        report.dense.latency_ms = None if first.model == EARLIER else first.median_ms
        report.pruned.latency_ms = last.median_ms
    return report
