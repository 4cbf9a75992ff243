# SPDX-License-Identifier: AGPL-3.0-or-later
"""The benchmark: exports models, times them in turn, and compares the exports with torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ultralytics.utils import LOGGER

from yolo_prune.cut.census import census, compressed_file_mb
from yolo_prune.env import outputs, trained
from yolo_prune.env.image_size import ImageSize, height_width
from yolo_prune.env.log import bar
from yolo_prune.env.versions import installed
from yolo_prune.errors import BenchError
from yolo_prune.graph import probes
from yolo_prune.measure import clock, parity_check, runtimes, subjects
from yolo_prune.measure.alignment import alignment
from yolo_prune.measure.differences import Array
from yolo_prune.measure.runtimes import Session
from yolo_prune.measure.subjects import Setting, Source, Subject
from yolo_prune.report.measurement import PRECISIONS, Measurement, TimingRow

BUDGET = 30.0
"""Seconds for the rounds of one format, if the number of rounds is not given.

This value is a choice: a time that a user accepts to wait. A model of 17 ms and a pruned model then run `clock.MOST`
rounds, which gave a ratio to +- 0.004 (see docs/).
"""

SPARSE = 0.01
"""Share of zeros from which on the table shows them: a dense model has a few by chance, in half precision."""


@runtimes.undisturbed()
def bench(
    models: Source | Sequence[Source],
    format: str | Sequence[str] = "onnx",
    *,
    imgsz: ImageSize | Sequence[int] | str | None = None,
    batch: int = 1,
    device: str | int = "cpu",
    threads: int | None = None,
    repeats: int | None = None,
    quantize: int | None = None,
    data: str | Path | None = None,
    save: str | Path | None = None,
) -> Measurement:
    """Export models and time them side by side, in the runtimes that Ultralytics uses.

    Args:
        models: `YOLO` objects or paths to checkpoints. Ratios refer to the first.
        format: one or several of torch, torchscript, onnx, openvino, ncnn, engine.
        imgsz: image size of the exports, in pixels: one number, or height and width. None: the size that the first
            model was trained with.
        batch: images per pass.
        device: cpu, or the number of a GPU.
        threads: CPU threads per runtime; None for one per core.
        repeats: number of rounds; None for as many as fit into half a minute per format, between 10 and 300.
        quantize: 16 exports in half precision, 8 in 8 bit. The format torch on a CPU ignores it.
        data: dataset. With a dataset, every export is compared with its checkpoint. 8 bit needs one for calibration.
        save: a `.json` file to write. It is also written if an export does not agree with its checkpoint.

    Returns:
        All figures. `print` shows the tables.

    Raises:
        BenchError: If something cannot be measured here; if possible, before any work is done.
        ParityError: If an export does not agree with its checkpoint. Its attribute `measurement` has all figures.

    Example:
        >>> import yolo_prune
        >>> measurement = yolo_prune.bench(["best.pt", "pruned.pt"], format="onnx", imgsz=640, threads=1)
        >>> print(measurement)
        imgsz ...
        >>> pruned = measurement.rows[1]
        >>> pruned.flops_ratio < 1, pruned.ratio > 0
        (True, True)
    """
    given = list(models) if isinstance(models, Sequence) and not isinstance(models, str) else [models]
    setting = Setting.of(imgsz, batch, device, threads, repeats, quantize, data)
    if save:
        outputs.check(save)
    measurement = measure_models(given, runtimes.parse(format), setting)
    if save:
        outputs.deliver(save, measurement.save)
    measurement.check()
    return measurement


def measure_models(models: Sequence[Source], formats: Sequence[str], setting: Setting) -> Measurement:
    """Measure like `bench`, but without an error if an export does not agree with its checkpoint.

    Args:
        models: the models, as for `bench`.
        formats: format names from `runtimes.parse`.
        setting: all other settings.

    Raises:
        BenchError: If something cannot be measured here.
    """
    if not models:
        raise BenchError("There is no model to measure. Pass one or more models.")
    runtimes.check(formats, setting.quantize, setting.device)
    if setting.quantize == 8 and not setting.data:
        raise BenchError("quantize=8 needs images for the calibration. Pass a dataset with data=.")
    opened = [subjects.open_source(item) for item in models]
    setting = setting.sized(opened)
    if setting.data and (different := trained.differences(opened)):
        LOGGER.warning(
            f"The mAP of these models cannot be compared, because they were trained "
            f"and validated with different {', '.join(different)}."
        )
    with outputs.scratch(subjects.room(model.model for model in opened)) as folder:
        pairs = enumerate(zip(opened, subjects.names(models), strict=True))
        measured_subjects = [subjects.subject(model, name, Path(folder) / str(i)) for i, (model, name) in pairs]
        for subject in measured_subjects:
            subjects.count(subject, setting.imgsz)
        for subject in measured_subjects if setting.data else ():
            parity_check.check_labels(subject, setting)
        pictures = [parity_check.pictures_of(subject, setting) for subject in measured_subjects] if setting.data else []
        result = Measurement(
            versions=installed(),
            device=str(setting.device),
            hardware=subjects.hardware(setting.device),
            cores=subjects.cores(),
            threads=setting.threads if setting.device.type == "cpu" else None,
            imgsz=setting.imgsz,
            batch=setting.batch,
        )
        for format in formats:
            try:
                _measure_format(format, measured_subjects, pictures, setting, result)
            except BenchError as e:  # the results of other formats are kept
                result.failed[format] = str(e)
    return result


def _measure_format(
    format: str, measured_subjects: list[Subject], pictures: list[Array], setting: Setting, result: Measurement
) -> None:
    show = bar(f"exporting to {format}") if format != "torch" else iter
    paths = [subjects.exported(format, subject, setting) for subject in show(measured_subjects)]
    sessions = [subjects.session(format, path, setting) for path in paths]
    for subject, session in zip(measured_subjects, sessions, strict=True):
        session.prepare(_noise(subject, setting))
    runs = [session.run for session in sessions]
    busy = subjects.busy()
    result.busy = max((value for value in (result.busy, busy) if value is not None), default=None)
    rounds = setting.repeats or clock.rounds_for(clock.warm_up(runs), BUDGET)
    if setting.repeats:
        clock.warm_up(runs)
    times = clock.interleave(runs, bar(f"timing {format}")(range(rounds)))
    result.rounds[format] = rounds
    checked = bool(pictures) and format != "torch"
    look = bar(f"comparing {format} with torch") if checked else iter
    zeros = [census(subject.model.model).share for subject in measured_subjects]
    for index, subject in enumerate(look(measured_subjects)):
        row = _row(format, subject, paths[index], sessions[index], setting)
        _fill(row, times[index], times[0])
        if max(zeros) >= SPARSE:
            row.zeros, row.zipped_mb = zeros[index], compressed_file_mb(paths[index])
        row.flops_ratio = (
            subject.flops / measured_subjects[0].flops if subject.flops and measured_subjects[0].flops else None
        )
        if checked:
            row.parity = parity_check.compare(subject, sessions[index], pictures[index], setting)
            parity_check.validate(subject, paths[index], setting, row.parity)
        result.rows.append(row)


def _row(format: str, subject: Subject, path: Path, session: Session, setting: Setting) -> TimingRow:
    plain = format == "torch" and (setting.device.type == "cpu" or setting.quantize == 8)
    row = TimingRow(
        model=subject.name,
        format=format,
        precision=PRECISIONS[32 if plain else setting.quantize],
        computed=session.computed,
        runtime=runtimes.runtime(format),
        flops=subject.flops,
        params=subject.params,
        weights=subject.weights,
        size_mb=sum(f.stat().st_size for f in [path, *path.rglob("*")] if f.is_file()) / 1e6,
    )
    graph = path.with_suffix(".onnx")  # a TensorRT engine has its ONNX file beside it
    if format in ("onnx", "engine") and graph.is_file():
        channels = alignment(graph)
        row.convolutions, row.aligned = channels.convolutions, channels.aligned
    return row


def _fill(row: TimingRow, times: list[float], first: list[float]) -> None:
    middle, ratio = clock.quartiles(times), clock.paired_ratio(times, first)
    row.times_ms = [1000 * t for t in times]
    row.median_ms, row.quartiles_ms = 1000 * middle.median, (1000 * middle.low, 1000 * middle.high)
    row.ratio, row.ratio_interval = ratio.median, (ratio.low, ratio.high)


def _noise(subject: Subject, setting: Setting) -> Array:
    module: Any = subject.model.model
    shape = (setting.batch, probes.image_channels(module) or 3, *height_width(setting.imgsz))
    return np.random.default_rng(0).random(shape, dtype=np.float32)
