# SPDX-License-Identifier: AGPL-3.0-or-later
"""Calls the exporter of Ultralytics without its output, and without installing packages."""

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
    """Export a model with `YOLO.export`, next to the file from which it was loaded.

    The exporter prints nothing and installs nothing.

    Args:
        model: a `YOLO` object that was loaded from a file.
        format: name of the format in Ultralytics.
        quantize: 32, 16 or 8. Releases without this argument get `half` or `int8` instead.
        **settings: arguments of the exporter: imgsz, batch, device, data, ...

    Raises:
        BenchError: If the exporter fails; the message has the last lines that the exporter wrote.
    """
    if "quantize" in DEFAULT_CFG_DICT:
        settings |= {"quantize": quantize} if quantize != 32 else {}
    else:
        settings |= {"half": quantize == 16, "int8": quantize == 8}
    with quietly(f"The export to {format}"), _same_gpus():
        exported = model.export(format=format, **settings)
    path = Path(exported)
    if not path.exists():
        raise BenchError(f"The export to {format} wrote no file '{exported}'. Export the model with 'yolo export'.")
    return path


@contextlib.contextmanager
def _same_gpus() -> Iterator[None]:
    """Keep all GPUs visible for this process: early Ultralytics releases hide them all for an export on the CPU."""
    before = os.environ.get(VISIBLE)
    torch.cuda.is_available()  # CUDA reads the variable only once: now, before the export
    torch.cuda.device_count()  # torch stores the result of the first call
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VISIBLE, None)
        else:
            os.environ[VISIBLE] = before
