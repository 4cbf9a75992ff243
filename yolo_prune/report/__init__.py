# SPDX-License-Identifier: AGPL-3.0-or-later
"""The measured results of a run: `prune.json` (data), `prune.png` (picture) and tables for the training log."""

from __future__ import annotations

from yolo_prune.report.data import EpochRow, Figures, LayerRow, Proof, ProtectedRow, Report, RoundFitness, RoundRow
from yolo_prune.report.table import rounds_table, summary_table

__all__ = [
    "EpochRow",
    "Figures",
    "LayerRow",
    "Proof",
    "ProtectedRow",
    "Report",
    "RoundFitness",
    "RoundRow",
    "rounds_table",
    "summary_table",
]
