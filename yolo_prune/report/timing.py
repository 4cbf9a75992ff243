# SPDX-License-Identifier: AGPL-3.0-or-later
"""What pages say of a measurement, beside its tables."""

from __future__ import annotations

from yolo_prune.report.latency import Measurement, TimingRow, busy_note

TIMES = "\N{MULTIPLICATION SIGN}"


def facts(found: Measurement) -> list[tuple[str, str]]:
    """How everything was measured: `(what, value)`."""
    said = [
        ("image", f"{found.imgsz} {TIMES} {found.imgsz}"),
        ("batch", str(found.batch)),
        ("hardware", found.hardware),
    ]
    if found.threads:
        said.append(("threads", f"{found.threads} of {found.cores} cores" if found.cores else str(found.threads)))
    for format, rows in found.formats.items():
        rounds = found.rounds.get(format, 0)
        said.append((format, f"{rows[0].runtime}, {rounds} round{'s' * (rounds != 1)}"))
    return said + [(name, version) for name, version in found.versions.items() if name not in ("python", "torch")]


def notes(found: Measurement) -> list[str]:
    """What to know before the figures are believed."""
    failed = [f"format={name} could not be measured: {why}" for name, why in found.failed.items()]
    return [*failed, *filter(None, [busy_note(found)])]


def failures(found: Measurement) -> list[str]:
    """What exports do not agree in with their checkpoints."""
    rows = [(f"{row.model} as {row.format} ({row.precision})", row.parity) for row in found.rows if row.parity]
    return [f"{name}: {failure}." for name, parity in rows for failure in parity.failures]


def runtime(row: TimingRow) -> str:
    """The name of what ran a model, and its format where that says more."""
    name = row.runtime.split()[0] if row.runtime else row.format
    return row.format if row.format == "torchscript" else name
