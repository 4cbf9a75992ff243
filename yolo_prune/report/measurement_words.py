# SPDX-License-Identifier: AGPL-3.0-or-later
"""What pages say of a measurement, beside its tables."""

from __future__ import annotations

from yolo_prune.report.measurement import Measurement, TimingRow, busy_note

FEW = 6  # rounds that allow an interval, at least
TIMES = "\N{MULTIPLICATION SIGN}"


def facts(found: Measurement) -> list[tuple[str, str]]:
    """How everything was measured: `(what, value)`."""
    said = [("image", f"{found.imgsz} {TIMES} {found.imgsz}"), ("batch", str(found.batch)), ("on", found.hardware)]
    if found.threads:
        said.append(("threads", f"{found.threads} on {found.cores} cores" if found.cores else str(found.threads)))
    return said + [(name, version) for name, version in found.versions.items() if name != "python"]


def precision(row: TimingRow) -> str:
    """Of an export, and of its arithmetic where that is another one."""
    return row.precision if row.computed in (None, row.precision) else f"{row.precision} run in {row.computed}"


def ran(found: Measurement, row: TimingRow) -> str:
    """What a format ran in, and how often."""
    rounds = found.rounds.get(row.format, 0)
    return f"{row.runtime}, {rounds} round{'s' * (rounds != 1)}"


def checked(found: Measurement) -> list[list[TimingRow]]:
    """The rows of each format that were compared with torch."""
    kept = ([row for row in rows if row.parity] for rows in found.formats.values())
    return [rows for rows in kept if rows]


def notes(found: Measurement) -> list[str]:
    """What to know before the figures are believed."""
    said = [f"format={name} could not be measured: {why}" for name, why in found.failed.items()]
    if any(found.rounds.get(format, 0) < FEW for format in found.formats):
        said.append("Where there are fewer than six rounds, the interval is the smallest and the largest ratio.")
    if not checked(found) and set(found.formats) - {"torch"}:
        said.append("Whether the exports agree with their checkpoints was not looked at: there was no dataset.")
    return [*said, *filter(None, [busy_note(found)])]


def failures(found: Measurement) -> list[str]:
    """What exports do not agree in with their checkpoints."""
    rows = [(f"{row.model} as {row.format} ({row.precision})", row.parity) for row in found.rows if row.parity]
    return [f"{name}: {failure}." for name, parity in rows for failure in parity.failures]


def threads(found: Measurement) -> str:
    """How many of them a runtime had, where that was said."""
    return f", {found.threads} thread{'s' * (found.threads > 1)}" if found.threads else ""


def runtime(row: TimingRow) -> str:
    """The name of what ran a model, and its format where that says more."""
    name = row.runtime.split()[0] if row.runtime else row.format
    return row.format if row.format == "torchscript" else name
