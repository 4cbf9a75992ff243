# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the standard exporter is told about a pruned model."""

from __future__ import annotations

import json
from typing import Any

from yolo_prune.cut.record import KEY, Record, read_record


def on_export_start(exporter: Any) -> None:
    """Add one key, `pruning`, to the metadata that every export format carries."""
    model = getattr(exporter, "model", None)
    if model is None:  # before Ultralytics 8.3.200 the event comes before there is any metadata
        return
    record = read_record(model)
    if record and record.plan:
        exporter.metadata[KEY] = json.dumps(summary(record))


def summary(record: Record) -> dict[str, Any]:
    """What a reader of an exported model wants to know, short enough for a file header."""
    last = record.rounds[-1] if record.rounds else None
    return {
        "plan": record.plan.hash if record.plan else None,
        "target": record.recipe.get("target"),
        "rounds": len(record.rounds),
        "flops": last.flops if last else None,
        "params": last.params if last else None,
    }
