# SPDX-License-Identifier: AGPL-3.0-or-later
"""The subjects of a measurement (the models), its settings, and the hardware."""

from __future__ import annotations

import hashlib
import inspect
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, Union

import torch
from ultralytics.engine.model import Model
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import get_cpu_info

from yolo_prune.env import checkpoints, outputs, trained
from yolo_prune.env.image_size import ImageSize, image_size, plain
from yolo_prune.errors import BenchError, PruneError
from yolo_prune.measure import runtimes
from yolo_prune.measure.exporter import export
from yolo_prune.measure.quiet import quietly
from yolo_prune.measure.runtimes import Session
from yolo_prune.planning import planner
from yolo_prune.report.measurement import PRECISIONS

BYTES = 16
"""Disk space for each parameter: a checkpoint in half precision, and its exports in single precision.

This value is a choice. The checkpoint of a YOLO11n, its TorchScript and its ONNX export have 10.3 bytes per parameter.
"""
Source: TypeAlias = Union[Model, str, Path]  # noqa: UP007  # evaluated at run time, when Model may be Any


@dataclass
class Subject:
    """A model to measure.

    Attributes:
        name: name in tables.
        model: the `YOLO` object, loaded from `path`.
        path: the checkpoint in a temporary folder, where exports are written too.
        flops: FLOPs of one image; None if the model cannot be traced.
        params: number of parameters; None if the model cannot be traced.
        quality: mAP in torch; None until it is measured.
        weights: fingerprint of the weights.
        labelled: whether the validation images have labels, without which no mAP can be measured.
    """

    name: str
    model: Model
    path: Path
    flops: float | None = None
    params: int | None = None
    quality: float | None = None
    weights: str | None = None
    labelled: bool = True


@dataclass(frozen=True)
class Setting:
    """The settings of a measurement, from the arguments of `bench`.

    Attributes:
        imgsz: image size in pixels.
        chosen: whether the user chose the image size.
    """

    imgsz: ImageSize
    batch: int
    device: torch.device
    threads: int
    repeats: int | None = None
    quantize: int = 32
    data: str | Path | None = None
    chosen: bool = True

    @classmethod
    def of(
        cls,
        imgsz: ImageSize | Sequence[int] | str | None = None,
        batch: int = 1,
        device: str | int = "cpu",
        threads: int | None = None,
        repeats: int | None = None,
        quantize: int | None = None,
        data: str | Path | None = None,
    ) -> Setting:
        """Check the user's arguments and make a setting from them. `sized` sets an image size that is left out.

        Raises:
            BenchError: For the first argument that is wrong.
        """
        whole = {"batch": batch, "threads": threads, "repeats": repeats}
        for key, value in whole.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise BenchError(f"{key}={value}: must be a whole number of at least 1.")
        if threads and threads > cores():
            raise BenchError(
                f"threads={threads}: must be at most {cores()}, the number of cores that this process may use."
            )
        size = image_size(trained.SIZE if imgsz is None else imgsz, error=BenchError)
        if quantize not in PRECISIONS:
            raise BenchError(f"quantize={quantize}: must be 32, 16 (half precision) or 8 (8 bit).")
        place = _device(device), threads or cores()
        return cls(size, batch, *place, repeats, quantize or 32, data, chosen=imgsz is not None)

    def sized(self, models: Sequence[Model]) -> Setting:
        """This setting; if the user chose no image size, with the size that the first model was trained with."""
        if self.chosen:
            return self
        sizes = [trained.size(model) for model in models]
        if len(set(sizes)) > 1:
            LOGGER.warning(
                f"The models were trained with imgsz {' and '.join(map(str, sizes))}. All are measured with imgsz "
                f"{sizes[0]}, that of the first. Pass imgsz= for another size."
            )
        return replace(self, imgsz=sizes[0], chosen=True)


def _device(name: str | int) -> torch.device:
    text = str(name).lower()
    if text == "cpu":
        return torch.device("cpu")
    number = text.removeprefix("cuda").removeprefix(":") or "0"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not number.isdigit():
        raise BenchError(f"device={name}: must be cpu, or the number of one NVIDIA GPU.")
    if int(number) >= count:
        raise BenchError(f"device={name} is not available: torch sees {count or 'no'} GPUs. Pass device=cpu.")
    return torch.device("cuda", int(number))


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy() -> float | None:
    """Number of cores that other processes use, measured for half a second in which this process only waits."""
    try:
        import psutil
    except ImportError:
        time.sleep(0.5)  # threads of the export can still finish in this time
        return None
    return float(psutil.cpu_percent(interval=0.5)) / 100 * (psutil.cpu_count() or 1)


def hardware(device: torch.device) -> str:
    """Name of the CPU or GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(get_cpu_info())


def open_source(source: Source) -> Model:
    """The `YOLO` object for a user's argument, which may be a path.

    Raises:
        PruneError: If a path is not a checkpoint that can be opened.
    """
    if not isinstance(source, str | Path):
        return source
    if Path(source).suffix not in (".pt", ".yaml", ".yml"):
        raise BenchError(f"'{source}' is not a checkpoint. Pass the .pt file; it is exported for the measurement.")
    return checkpoints.open_model(source)


def reopen(model: Model, path: Path) -> Model:
    """A `YOLO` object of the same class, loaded from another file."""
    kind = type(model)
    named = {"task": model.task} if "task" in inspect.signature(kind).parameters else {}
    return kind(str(path), **named)


def names(sources: Sequence[Source]) -> list[str]:
    """Short names of the models, made unique."""
    given = [
        str(item) if isinstance(item, str | Path) else str(item.ckpt_path or item.model_name or "model")
        for item in sources
    ]
    short = [Path(name).name for name in given]
    chosen = given if len(set(short)) < len(short) and len(set(given)) == len(given) else short
    return [name if chosen.count(name) == 1 else f"{name} #{i}" for i, name in enumerate(chosen, start=1)]


def room(modules: Iterable[Any]) -> int:
    """The free space in bytes that the checkpoints and exports of models need, estimated from the parameters."""
    numbers: int = sum(p.numel() for module in modules for p in module.parameters())
    return outputs.LITTLE + BYTES * numbers


def subject(model: Model, name: str, folder: Path) -> Subject:
    """Save a model to a folder for exports: the exporter writes into the folder from which the model was loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoints.save(model, folder / f"{Path(name).stem or 'model'}.pt")
    return Subject(name, reopen(model, path), path, weights=fingerprint(model))


def fingerprint(model: Model) -> str:
    """A hash of the weights of a model."""
    module: Any = model.model
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def count(measured_subject: Subject, imgsz: ImageSize) -> None:
    """Add FLOPs and parameters to a subject; warn if its model cannot be traced, and leave them out."""
    try:
        module: Any = measured_subject.model.model
        measured_subject.flops, measured_subject.params = planner.present_cost(module, imgsz)
    except PruneError as e:
        LOGGER.warning(f"yolo-prune: the FLOPs of {measured_subject.name} cannot be counted: {e}")


def exported(format: str, measured_subject: Subject, setting: Setting) -> Path:
    """Export a model and return the path; for the format torch, this is the path of the checkpoint."""
    if format == "torch":
        return measured_subject.path
    batch = runtimes.batch_of(format, setting.batch)
    settings: dict[str, Any] = {"imgsz": plain(setting.imgsz), "batch": batch, "device": str(setting.device)}
    if setting.quantize == 8:
        settings["data"] = str(setting.data)
    return export(measured_subject.model, format, quantize=setting.quantize, verbose=False, **settings)


def session(format: str, path: Path, setting: Setting) -> Session:
    """Load an export into its runtime.

    Raises:
        BenchError: If the runtime cannot load the export.
    """
    with quietly(f"Loading '{path.name}' as {format}"):
        loaded = runtimes.open_session(format, path, setting.device, setting.threads, setting.quantize)
    if setting.device.type == "cpu":
        torch.set_num_threads(setting.threads)  # loading with Ultralytics may have changed the number
    return loaded
