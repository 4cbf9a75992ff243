# SPDX-License-Identifier: AGPL-3.0-or-later
"""Calling the standard exporter, without a word and without installing anything."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ultralytics import utils
from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.engine.model import Model
from ultralytics.utils import checks

from yolo_prune.errors import BenchError, PruneError

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


@contextlib.contextmanager
def quietly(what: str) -> Iterator[None]:
    """Keep what is written meanwhile, by this process and by programs that it starts, and show it if this fails.

    Ultralytics is kept from installing packages as well.

    Raises:
        BenchError: For anything that is raised inside and is no PruneError; with the last lines that were written.
    """
    automatic = {module: module.AUTOINSTALL for module in (utils, checks) if hasattr(module, "AUTOINSTALL")}
    with tempfile.TemporaryFile() as log, open(os.devnull, "w", encoding="utf-8") as nowhere:
        failed: Exception | None = None
        handlers = list(logging.root.handlers)
        _flush()
        before = [os.dup(1), os.dup(2)]
        try:
            for module in automatic:
                module.AUTOINSTALL = False
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield
        except Exception as e:
            failed = e
        finally:
            _flush()
            for number, old in enumerate(before, start=1):
                os.dup2(old, number)
                os.close(old)
            for module, value in automatic.items():
                module.AUTOINSTALL = value
            logging.root.handlers[:] = handlers  # a first logging.warning makes one for a stream that is closed now
        if isinstance(failed, PruneError):
            raise failed
        if failed is not None:
            log.seek(0)
            lines = log.read().decode("utf-8", "replace").strip().splitlines()[-5:]
            said = "".join(f"\n  {line}" for line in lines)
            raise BenchError(f"{what} failed: {type(failed).__name__}: {failed}{said}") from failed


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # a notebook's streams may have none
            stream.flush()
