# SPDX-License-Identifier: AGPL-3.0-or-later
"""The results of a validation by Ultralytics, for all tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def average_precision(metrics: Any) -> Any:
    """The part of the metrics of a validation that holds AP: for masks, keypoints or boxes, depending on the task.

    None if the task has no AP, or if there were no detections.
    """
    parts = (getattr(metrics, name, None) for name in ("seg", "pose", "box"))
    return next((part for part in parts if part is not None and len(getattr(part, "ap_class_index", ()))), None)


def class_ap(metrics: Any) -> dict[str, float]:
    """`{class: AP}` of a validation (mAP50-95); empty if there is no AP."""
    part = average_precision(metrics)
    if part is None:
        return {}
    names = metrics.names if isinstance(metrics.names, Mapping) else dict(enumerate(metrics.names or ()))
    return {str(names.get(int(c), c)): float(ap) for c, ap in zip(part.ap_class_index, part.ap, strict=True)}
