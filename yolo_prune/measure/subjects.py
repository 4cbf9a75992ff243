# SPDX-License-Identifier: AGPL-3.0-or-later
"""The models that a measurement is about, how it is made, and where."""

from __future__ import annotations

import hashlib
import inspect
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, Union

import torch
from ultralytics.engine.model import Model
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import get_cpu_info

from yolo_prune.env import checkpoints
from yolo_prune.errors import BenchError, PruneError
from yolo_prune.measure import runtimes
from yolo_prune.measure.exporter import export
from yolo_prune.measure.quiet import quietly
from yolo_prune.measure.runtimes import Session
from yolo_prune.planning import planner
from yolo_prune.report.measurement import PRECISIONS

Source: TypeAlias = Union[Model, str, Path]  # noqa: UP007  # needed when this is run, and Model may be Any


@dataclass
class Subject:
    """A model to be measured.

    Attributes:
        name: in tables.
        model: loaded from `path`.
        path: its checkpoint in a temporary folder, beside which it is exported.
        flops: of one image; None where the model cannot be traced.
        params: parameters.
        quality: mAP in torch, once it was measured.
        weights: their fingerprint.
    """

    name: str
    model: Model
    path: Path
    flops: float | None = None
    params: int | None = None
    quality: float | None = None
    weights: str | None = None


@dataclass(frozen=True)
class Setting:
    """How everything is measured; what the arguments of `bench` mean."""

    imgsz: int
    batch: int
    device: torch.device
    threads: int
    repeats: int | None = None
    quantize: int = 32
    data: str | Path | None = None

    @classmethod
    def of(
        cls,
        imgsz: int = 640,
        batch: int = 1,
        device: str | int = "cpu",
        threads: int | None = None,
        repeats: int | None = None,
        quantize: int | None = None,
        data: str | Path | None = None,
    ) -> Setting:
        """Check arguments as a user gave them.

        Raises:
            BenchError: For the first that is wrong.
        """
        whole = {"batch": batch, "threads": threads, "repeats": repeats, "imgsz": imgsz}
        for key, value in whole.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise BenchError(f"{key}={value}: must be a whole number of at least 1.")
        if threads and threads > cores():
            raise BenchError(f"threads={threads}: this process may use {cores()} cores here, so at most that many.")
        if imgsz % 32:
            raise BenchError(f"imgsz={imgsz}: must be a multiple of 32.")
        if quantize not in PRECISIONS:
            raise BenchError(f"quantize={quantize}: must be 32, 16 (half precision) or 8 (8 bit).")
        return cls(imgsz, batch, _device(device), threads or cores(), repeats, quantize or 32, data)


def _device(name: str | int) -> torch.device:
    text = str(name).lower()
    if text == "cpu":
        return torch.device("cpu")
    number = text.removeprefix("cuda").removeprefix(":") or "0"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not number.isdigit():
        raise BenchError(f"device={name}: must be cpu, or the number of one NVIDIA GPU.")
    if int(number) >= count:
        raise BenchError(f"device={name} is not here: torch sees {count or 'no'} GPUs. Pass device=cpu.")
    return torch.device("cuda", int(number))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy() -> float | None:
    """Cores that others keep busy, seen over half a second in which this process does nothing."""
    try:
        import psutil
    except ImportError:
        time.sleep(0.5)  # what was busy with the export may come to rest all the same
        return None
    return float(psutil.cpu_percent(interval=0.5)) / 100 * (psutil.cpu_count() or 1)


def hardware(device: torch.device) -> str:
    """Name of the CPU or GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(get_cpu_info())


def open_source(source: Source) -> Model:
    """The `YOLO` object of what a user gave.

    Raises:
        PruneError: If it is no checkpoint that can be opened.
    """
    if not isinstance(source, str | Path):
        return source
    if Path(source).suffix not in (".pt", ".yaml", ".yml"):
        raise BenchError(f"'{source}' is no checkpoint: pass the .pt file; it is exported here.")
    return checkpoints.open_model(source)


def reopen(model: Model, path: Path) -> Model:
    """The same kind of `YOLO` object, for another file."""
    kind = type(model)
    named = {"task": model.task} if "task" in inspect.signature(kind).parameters else {}
    return kind(str(path), **named)


def names(sources: Sequence[Source]) -> list[str]:
    """Short names that differ."""
    given = [
        str(item) if isinstance(item, str | Path) else str(item.ckpt_path or item.model_name or "model")
        for item in sources
    ]
    short = [Path(name).name for name in given]
    found = given if len(set(short)) < len(short) and len(set(given)) == len(given) else short
    return [name if found.count(name) == 1 else f"{name} #{i}" for i, name in enumerate(found, start=1)]


def subject(model: Model, name: str, folder: Path) -> Subject:
    """Save a model where it may be exported: the exporter writes beside the file that a model was loaded from."""
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoints.save(model, folder / f"{Path(name).stem or 'model'}.pt")
    return Subject(name, reopen(model, path), path, weights=fingerprint(model))


def fingerprint(model: Model) -> str:
    """What tells the weights of a model from those of any other."""
    module: Any = model.model
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def count(found: Subject, imgsz: int) -> None:
    """Fill in FLOPs and parameters; a model that cannot be traced is measured without."""
    try:
        module: Any = found.model.model
        found.flops, found.params = planner.present_cost(module, imgsz)
    except PruneError as e:
        LOGGER.warning(f"yolo-prune: the FLOPs of {found.name} cannot be counted: {e}")


def exported(format: str, found: Subject, setting: Setting) -> Path:
    """Export a model; torch is the checkpoint itself."""
    if format == "torch":
        return found.path
    batch = runtimes.batch_of(format, setting.batch)
    settings: dict[str, Any] = {"imgsz": setting.imgsz, "batch": batch, "device": str(setting.device)}
    if setting.quantize == 8:
        settings["data"] = str(setting.data)
    return export(found.model, format, quantize=setting.quantize, verbose=False, **settings)


def session(format: str, path: Path, setting: Setting) -> Session:
    """Load an export into its runtime.

    Raises:
        BenchError: If the runtime does not take it.
    """
    with quietly(f"Loading '{path.name}' as {format}"):
        found = runtimes.open_session(format, path, setting.device, setting.threads, setting.quantize)
    if setting.device.type == "cpu":
        torch.set_num_threads(setting.threads)  # Ultralytics may have set its own number on the way
    return found
