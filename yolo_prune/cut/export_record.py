# SPDX-License-Identifier: AGPL-3.0-or-later
"""Adds a summary of the pruning record to the metadata of an exported model."""

from __future__ import annotations

import json
from typing import Any

from yolo_prune.cut.record import KEY, Record, read_record


def on_export_start(exporter: Any) -> None:
    """Add the key `pruning` to the exporter's metadata, which every export format contains."""
    model = getattr(exporter, "model", None)
    if model is None:  # before Ultralytics 8.3.200 the exporter has no metadata at this event
        return
    record = read_record(model)
    if record and record.plan:
        exporter.metadata[KEY] = json.dumps(summary(record))


def summary(record: Record) -> dict[str, Any]:
    """A summary of the record that is short enough for a file header."""
    last = record.rounds[-1] if record.rounds else None
    return {
        "plan": record.plan.hash if record.plan else None,
        "target": record.recipe.get("target"),
        "sparsity": record.recipe.get("sparsity"),
        "rounds": len(record.rounds),
        "flops": last.flops if last else None,
        "params": last.params if last else None,
    }
