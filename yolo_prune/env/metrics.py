# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a validation of Ultralytics measured, whatever the task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def average_precision(metrics: Any) -> Any:
    """The part of the metrics of a validation that holds AP: of masks or keypoints where the task has them, else boxes.

    None where the task has none, or nothing was found.
    """
    parts = (getattr(metrics, name, None) for name in ("seg", "pose", "box"))
    return next((part for part in parts if part is not None and len(getattr(part, "ap_class_index", ()))), None)


def class_ap(metrics: Any) -> dict[str, float]:
    """`{class: AP}` of a validation (mAP50-95); empty where there is no AP."""
    part = average_precision(metrics)
    if part is None:
        return {}
    names = metrics.names if isinstance(metrics.names, Mapping) else dict(enumerate(metrics.names or ()))
    return {str(names.get(int(c), c)): float(ap) for c, ap in zip(part.ap_class_index, part.ap, strict=True)}
