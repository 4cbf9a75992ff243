# SPDX-License-Identifier: AGPL-3.0-or-later
"""Calling the standard exporter, without a word and without installing anything."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.engine.model import Model

from yolo_prune.errors import BenchError
from yolo_prune.measure.quiet import quietly

VISIBLE = "CUDA_VISIBLE_DEVICES"


def export(model: Model, format: str, *, quantize: int = 32, **settings: Any) -> Path:
    """Export a model with `YOLO.export`, next to the file it was loaded from, without a word and without installing.

    Args:
        model: a `YOLO` object that was loaded from a file.
        format: as Ultralytics calls it.
        quantize: 32, 16 or 8; `half` and `int8` in releases that do not know it.
        **settings: of the exporter: imgsz, batch, device, data, ...

    Raises:
        BenchError: If the exporter fails; with the last lines that it wrote.
    """
    if "quantize" in DEFAULT_CFG_DICT:
        settings |= {"quantize": quantize} if quantize != 32 else {}
    else:
        settings |= {"half": quantize == 16, "int8": quantize == 8}
    with quietly(f"The export to {format}"), _same_gpus():
        exported = model.export(format=format, **settings)
    path = Path(exported)
    if not path.exists():
        raise BenchError(f"The export to {format} left nothing at '{exported}'.")
    return path


@contextlib.contextmanager
def _same_gpus() -> Iterator[None]:
    """Leave the GPUs that this process sees as they are: early releases hide all of them where one uses the CPU."""
    before = os.environ.get(VISIBLE)
    torch.cuda.is_available()  # CUDA reads the variable once, so it has to be before the export
    torch.cuda.device_count()  # torch remembers the first count that it makes
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VISIBLE, None)
        else:
            os.environ[VISIBLE] = before
