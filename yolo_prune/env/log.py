# SPDX-License-Identifier: AGPL-3.0-or-later
"""What our lines in the log begin with, and progress bars as Ultralytics draws them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ultralytics.utils import TQDM, colorstr

PREFIX = colorstr("yolo-prune: ")


def bar(what: str, total: int | None = None) -> Callable[[Any], Any]:
    """Wraps what is gone through in a progress bar; `total` where it has no length."""
    return lambda items: TQDM(items, total=len(items) if hasattr(items, "__len__") else total, desc=what)
