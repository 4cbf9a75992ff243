# SPDX-License-Identifier: AGPL-3.0-or-later
"""The prefix of our log lines, and progress bars in the style of Ultralytics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ultralytics.utils import TQDM, colorstr

PREFIX = colorstr("yolo-prune: ")


def bar(label: str, total: int | None = None) -> Callable[[Any], Any]:
    """A function that shows a progress bar over an iterable. `total` is for iterables without a length."""
    return lambda items: TQDM(items, total=len(items) if hasattr(items, "__len__") else total, desc=label)
