# SPDX-License-Identifier: AGPL-3.0-or-later
"""The prefix of our log lines, and progress bars in the style of Ultralytics."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ultralytics.utils import TQDM, colorstr

PREFIX = colorstr("yolo-prune: ")


def bar(label: str, total: int | None = None) -> Callable[[Any], Any]:
    """A function that shows a progress bar over an iterable. `total` is for iterables without a length."""
    if sys.stdout is None:  # no terminal, as in `pythonw`; Ultralytics' bars need one
        return lambda items: items
    return lambda items: TQDM(items, total=len(items) if hasattr(items, "__len__") else total, desc=label)
