# SPDX-License-Identifier: AGPL-3.0-or-later
"""Exports that compute something else than their checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ultralytics import YOLO

from yolo_prune.measure import exporter, subjects


def install(patch: pytest.MonkeyPatch) -> None:
    """Let one score of every exported model be another one."""

    def wrong(format: str, found: subjects.Subject, setting: subjects.Setting) -> Path:
        other = YOLO(found.path)
        with torch.no_grad():
            other.model.model[-1].cv3[0][-1].bias[0] += 0.1
        other.save(found.path.with_name("other.pt"))
        return exporter.export(YOLO(found.path.with_name("other.pt")), format, imgsz=setting.imgsz, device="cpu")

    patch.setattr(subjects, "exported", wrong)
