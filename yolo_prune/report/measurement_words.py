# SPDX-License-Identifier: AGPL-3.0-or-later
"""The texts about a measurement on a page, beside its tables."""

from __future__ import annotations

from yolo_prune.env.image_size import height_width
from yolo_prune.report.measurement import Measurement, TimingRow, busy_note

FEW = 6  # fewest rounds that allow a confidence interval
TIMES = "\N{MULTIPLICATION SIGN}"


def facts(measurement: Measurement) -> list[tuple[str, str]]:
    """The settings of the measurement: `(name, value)`."""
    rows = [
        ("image", f" {TIMES} ".join(map(str, height_width(measurement.imgsz)))),
        ("batch", str(measurement.batch)),
        ("on", measurement.hardware),
    ]
    if measurement.threads:
        rows.append(
            (
                "threads",
                f"{measurement.threads} on {measurement.cores} cores"
                if measurement.cores
                else str(measurement.threads),
            )
        )
    return rows + [(name, version) for name, version in measurement.versions.items() if name != "python"]


def precision(row: TimingRow) -> str:
    """The precision of an export, and the precision of its computation if it is different."""
    return row.precision if row.computed in (None, row.precision) else f"{row.precision} run in {row.computed}"


def runtime_and_rounds(measurement: Measurement, row: TimingRow) -> str:
    """The runtime of a format, and the number of rounds."""
    rounds = measurement.rounds.get(row.format, 0)
    return f"{row.runtime}, {rounds} round{'s' * (rounds != 1)}"


def checked(measurement: Measurement) -> list[list[TimingRow]]:
    """The rows of each format whose exports were compared with torch."""
    kept = ([row for row in rows if row.parity] for rows in measurement.formats.values())
    return [rows for rows in kept if rows]


def notes(measurement: Measurement) -> list[str]:
    """Notes about the figures: failed formats, few rounds, missing checks, a busy machine."""
    texts = [f"format={name} could not be measured: {why}" for name, why in measurement.failed.items()]
    if any(measurement.rounds.get(format, 0) < FEW for format in measurement.formats):
        texts.append("With fewer than six rounds, the interval is from the smallest to the largest ratio.")
    if not checked(measurement) and set(measurement.formats) - {"torch"}:
        texts.append("The exports were not compared with their checkpoints, because there was no dataset.")
    return [*texts, *filter(None, [busy_note(measurement)])]


def failures(measurement: Measurement) -> list[str]:
    """One text for each difference between an export and its checkpoint that exceeds the tolerance."""
    rows = [(f"{row.model} as {row.format} ({row.precision})", row.parity) for row in measurement.rows if row.parity]
    return [f"{name}: {failure}." for name, parity in rows for failure in parity.failures]


def threads(measurement: Measurement) -> str:
    """The number of threads of the runtimes, as the end of a label; empty if it is unknown."""
    return f", {measurement.threads} thread{'s' * (measurement.threads > 1)}" if measurement.threads else ""


def runtime(row: TimingRow) -> str:
    """The name of the runtime of a row, or its format if that is more precise."""
    name = row.runtime.split()[0] if row.runtime else row.format
    return row.format if row.format == "torchscript" else name
