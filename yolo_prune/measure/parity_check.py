# SPDX-License-Identifier: AGPL-3.0-or-later
"""An exported model beside its checkpoint: the same images through both, and the same validation."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from ultralytics.engine.model import Model

from yolo_prune.data.datasets import calibration, pixels
from yolo_prune.errors import BenchError, ParityError
from yolo_prune.measure import runtimes, subjects
from yolo_prune.measure.differences import CONFIDENCE, Array, Comparison, Layout, batches
from yolo_prune.measure.quiet import quietly
from yolo_prune.measure.runtimes import Session
from yolo_prune.measure.subjects import Setting, Source, Subject
from yolo_prune.report.measurement import PRECISIONS, TOLERANCES, Parity, Tolerance

IMAGES = 16
"""Images of a dataset that outputs are compared on.

A choice: what is exported wrongly is likely to show on any image; more of them take longer. mAP, which is compared as
well, takes all images of the dataset.
"""
HEADS = {"segment": "nm", "pose": "nk", "obb": "ne"}
"""Where the heads of tasks that detect more than boxes say how many numbers they add to each."""


@runtimes.undisturbed()
def parity(
    model: Source,
    exported: str | Path,
    images: Any,
    *,
    imgsz: int = 640,
    batch: int = 1,
    device: str | int = "cpu",
    quantize: int | None = None,
    tolerance: Tolerance | None = None,
    confidence: float = CONFIDENCE,
) -> Parity:
    """Compare an exported model with its checkpoint in torch, on the same images.

    Args:
        model: a `YOLO` object or a path to the checkpoint.
        exported: `.torchscript`, `.onnx`, `.engine`, `..._openvino_model` or `..._ncnn_model`.
        images: a folder, a list of files, or an array `(n, channels, imgsz, imgsz)` with values from 0 to 1.
        imgsz: image size of the export, in pixels.
        batch: batch size of the export.
        device: where both run.
        quantize: precision of the export: 16 or 8; None is 32. It decides which tolerance applies.
        tolerance: the limits, if not those of this precision.
        confidence: detections with at least this score are compared.

    Returns:
        All differences.

    Raises:
        BenchError: If the runtime is missing, or cannot run the file.
        ParityError: If a difference is larger than its limit. Its attribute `measurement` has all differences.

    Example:
        >>> import yolo_prune
        >>> found = yolo_prune.parity("pruned.pt", "pruned.onnx", "images/val", imgsz=640)
        >>> found.outputs < 0.001, found.failures
        (True, [])
    """
    path = Path(exported)
    format = _format_of(path)
    setting = Setting.of(imgsz, batch, device, quantize=quantize)
    runtimes.check([format], setting.quantize, setting.device)
    opened, pictures = subjects.open_source(model), pixels(images, imgsz)
    session = subjects.session(format, path, setting)
    with tempfile.TemporaryDirectory(prefix="yolo-prune-parity-") as folder:
        found = subjects.subject(opened, path.name, Path(folder))
        result = compare(found, session, pictures, setting, confidence)
    if tolerance:
        result.tolerance = tolerance
    if result.failures:
        raise ParityError(
            f"{exported} ({format}) does not agree with its checkpoint: {'; '.join(result.failures)}.", result
        )
    return result


def pictures_of(subject: Subject, setting: Setting) -> Array:
    """Images of the dataset as validation shows them, `(n, channels, imgsz, imgsz)`.

    Raises:
        RunError: If the dataset cannot be read, or has other classes.
    """
    assert setting.data
    with quietly(f"Reading {setting.data}"):
        found = calibration(subject.model, setting.data, setting.imgsz, IMAGES).images(IMAGES)
    shown: Array = found.cpu().numpy()
    return shown


def compare(
    subject: Subject, session: Session, pictures: Array, setting: Setting, confidence: float = CONFIDENCE
) -> Parity:
    """Run the same images through torch and an export.

    Raises:
        BenchError: If one of both does not take them.
    """
    reference = runtimes.open_session("torch", subject.path, setting.device, setting.threads)
    found = Comparison(_layout(subject.model, setting.imgsz), confidence)
    for part, count in batches(pictures, setting.batch):
        outputs = [_through(each, part, subject.name) for each in (reference, session)]
        found.add(outputs[0], outputs[1], count)
    precision = PRECISIONS[setting.quantize]
    if precision != "int8" and session.computed in TOLERANCES:
        precision = session.computed  # a runtime may compute in fewer bits than it was given
    return Parity(
        images=len(pictures),
        precision=precision,
        outputs=found.outputs,
        boxes=found.boxes,
        scores=found.scores,
        detections=found.detections,
        finite=all(math.isfinite(v) for v in (found.outputs, found.boxes, found.scores) if v is not None),
        tolerance=TOLERANCES[precision],
    )


def validate(subject: Subject, path: Path, setting: Setting, result: Parity) -> None:
    """Fill in how well checkpoint and export do on the validation images."""
    if subject.quality is None:
        subject.quality = _quality(subject, subject.path, setting)
    result.quality_torch = subject.quality
    result.quality = _quality(subject, path, setting)


def _quality(subject: Subject, path: Path, setting: Setting) -> float:
    """MAP50-95 on squares, as fixed exports need them; the fitness for tasks that do not have it."""
    half = setting.quantize == 16 and setting.device.type != "cpu" and path.suffix != ".pt"
    name = f"Validating {subject.name} as {path.name}"
    with tempfile.TemporaryDirectory(prefix="yolo-prune-val-") as folder, quietly(name):
        metrics = subjects.reopen(subject.model, path).val(
            data=str(setting.data),
            imgsz=setting.imgsz,
            batch=setting.batch,
            device=str(setting.device),
            project=folder,
            rect=False,
            plots=False,
            verbose=False,
            workers=0,
            **({"half": True} if half else {}),
        )
    results = metrics.results_dict
    return float(results.get("metrics/mAP50-95(B)", results.get("fitness", 0.0)))


def _through(session: Session, images: Array, name: str) -> list[Array]:
    try:
        session.prepare(images)
        session.run()
        return session.outputs()
    except Exception as e:  # every runtime has its own
        raise BenchError(
            f"{name} does not take images {tuple(images.shape)}: {type(e).__name__}: {' '.join(str(e).split())} "
            "Pass the imgsz and the batch that it was exported for."
        ) from e


def _layout(model: Model, imgsz: int) -> Layout | None:
    module: Any = model.model
    if model.task not in ("detect", *HEADS):
        return None
    head = module.model[-1]
    extra = int(getattr(head, HEADS.get(str(model.task), ""), 0))
    return Layout(len(module.names), extra, imgsz, queries="RTDETR" in type(head).__name__)


def _format_of(path: Path) -> str:
    if not path.exists():
        raise BenchError(f"'{path}' does not exist.")
    for format in ("openvino", "ncnn"):
        if path.name.lower().endswith(f"_{format}_model"):
            return format
    if path.suffix not in runtimes.SUFFIXES or path.suffix == ".pt":
        raise BenchError(f"'{path}' is no export that can be compared: {', '.join(list(runtimes.FORMATS)[1:])}.")
    return runtimes.SUFFIXES[path.suffix]
