# SPDX-License-Identifier: AGPL-3.0-or-later
"""Compares an exported model with its checkpoint, on the same images and in the same validation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultralytics.engine.model import Model
from ultralytics.utils import LOGGER

from yolo_prune.data.datasets import calibration, labelled, pixels, validation_set
from yolo_prune.env import outputs, trained
from yolo_prune.env.image_size import ImageSize
from yolo_prune.errors import BenchError, ParityError
from yolo_prune.graph import probes
from yolo_prune.measure import runtimes, subjects
from yolo_prune.measure.differences import CONFIDENCE, Array, Comparison, Layout, batches
from yolo_prune.measure.quiet import quietly
from yolo_prune.measure.runtimes import Session
from yolo_prune.measure.subjects import Setting, Source, Subject
from yolo_prune.measure.validation import at_size
from yolo_prune.report.measurement import PRECISIONS, TOLERANCES, Parity, Tolerance

IMAGES = 16
"""Number of images of a dataset for the comparison of outputs.

This value is a choice: an error of the export probably shows on any image, and more images take longer. The mAP, which
is compared as well, uses all images of the dataset.
"""
HEADS = {"segment": "nm", "pose": "nk", "obb": "ne"}
"""For tasks with more than boxes: the attribute of the head that has the number of extra values per detection."""


@runtimes.undisturbed()
def parity(
    model: Source,
    exported: str | Path,
    images: Any,
    *,
    imgsz: ImageSize | Sequence[int] | str | None = None,
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
        images: a folder, a list of files, or an array `(n, channels, height, width)` with values from 0 to 1.
        imgsz: image size of the export, in pixels: one number, or height and width. None: the size that the model
            was trained with, which is also the default of Ultralytics' export.
        batch: batch size of the export.
        device: the device on which both models run.
        quantize: precision of the export: 16 or 8; None for 32. The limits depend on it.
        tolerance: the limits; None for those of the precision.
        confidence: minimum score of the detections to compare.

    Returns:
        All differences.

    Raises:
        BenchError: If the runtime is missing, or cannot run the file.
        ParityError: If a difference is larger than its limit. Its attribute `measurement` has all differences.

    Example:
        >>> import yolo_prune
        >>> parity = yolo_prune.parity("pruned.pt", "pruned.onnx", "images/val", imgsz=640)
        >>> parity.outputs < 0.001, parity.failures
        (True, [])
    """
    path = Path(exported)
    format = _format_of(path)
    setting = Setting.of(imgsz, batch, device, quantize=quantize)
    runtimes.check([format], setting.quantize, setting.device)
    opened = subjects.open_source(model)
    setting = setting.sized([opened])
    pictures = pixels(images, setting.imgsz, probes.image_channels(opened.model) or 3)
    session = subjects.session(format, path, setting)
    with outputs.scratch(subjects.room([opened.model])) as folder:
        measured_subject = subjects.subject(opened, path.name, Path(folder))
        result = compare(measured_subject, session, pictures, setting, confidence)
    if tolerance:
        result.tolerance = tolerance
    if result.failures:
        raise ParityError(
            f"{exported} ({format}) does not agree with its checkpoint: {'; '.join(result.failures)}.", result
        )
    return result


def check_labels(subject: Subject, setting: Setting) -> None:
    """Look for labels in the validation images; without labels, the mAP is not measured.

    Raises:
        RunError: If the dataset cannot be read, or has other classes.
    """
    assert setting.data
    with quietly(f"Reading {setting.data}"):
        images = validation_set(subject.model, setting.data, setting.imgsz)
    subject.labelled = labelled(images, subject.model.task)
    if not subject.labelled:
        LOGGER.warning(f"The mAP is not measured: no validation image of data={setting.data} has a label.")


def pictures_of(subject: Subject, setting: Setting) -> Array:
    """Images of the dataset, prepared as in validation: `(n, channels, height, width)`.

    Raises:
        RunError: If the dataset cannot be read, or has other classes.
    """
    assert setting.data
    with quietly(f"Reading {setting.data}"):
        images = calibration(subject.model, setting.data, setting.imgsz, IMAGES).images(IMAGES)
    shown: Array = images.cpu().numpy()
    return shown


def compare(
    subject: Subject, session: Session, pictures: Array, setting: Setting, confidence: float = CONFIDENCE
) -> Parity:
    """Run the same images through the checkpoint in torch and through an export.

    Raises:
        BenchError: If one of the two cannot run these images.
    """
    reference = runtimes.open_session("torch", subject.path, setting.device, setting.threads)
    comparison = Comparison(_layout(subject.model, setting.imgsz), confidence)
    for part, count in batches(pictures, setting.batch):
        outputs = [_through(each, part, subject.name) for each in (reference, session)]
        comparison.add(outputs[0], outputs[1], count)
    precision = PRECISIONS[setting.quantize]
    if precision != "int8" and session.computed in TOLERANCES:
        precision = session.computed  # a runtime may compute in a lower precision than that of the export
    return Parity(
        images=len(pictures),
        precision=precision,
        outputs=comparison.outputs,
        boxes=comparison.boxes,
        scores=comparison.scores,
        detections=comparison.detections,
        finite=all(
            math.isfinite(v) for v in (comparison.outputs, comparison.boxes, comparison.scores) if v is not None
        ),
        tolerance=TOLERANCES[precision],
    )


def validate(subject: Subject, path: Path, setting: Setting, result: Parity) -> None:
    """Add the mAP of checkpoint and export on the validation images to `result`, if these images have labels."""
    if not subject.labelled:
        return
    if subject.quality is None:
        subject.quality = _quality(subject, subject.path, setting)
    result.quality_torch = subject.quality
    result.quality = _quality(subject, path, setting)


def _quality(subject: Subject, path: Path, setting: Setting) -> float:
    """MAP50-95 on images of one size, which exports need; the fitness for tasks without mAP50-95."""
    half = setting.quantize == 16 and setting.device.type != "cpu" and path.suffix != ".pt"
    name = f"Validating {subject.name} as {path.name}"
    with outputs.scratch() as folder, quietly(name):
        settings = {**trained.settings(subject.model), "rect": False, **at_size(subject.model, setting.imgsz)}
        metrics = subjects.reopen(subject.model, path).val(
            data=str(setting.data),
            batch=setting.batch,
            device=str(setting.device),
            project=folder,
            plots=False,
            verbose=False,
            workers=0,
            **settings,
            **({"half": True} if half else {}),
        )
    results = metrics.results_dict
    return float(results.get("metrics/mAP50-95(B)", results.get("fitness", 0.0)))


def _through(session: Session, images: Array, name: str) -> list[Array]:
    try:
        session.prepare(images)
        session.run()
        return session.outputs()
    except Exception as e:  # every runtime has its own errors
        raise BenchError(
            f"{name} cannot run images of shape {tuple(images.shape)}: {type(e).__name__}: {' '.join(str(e).split())} "
            "Pass the imgsz and the batch of the export."
        ) from e


def _layout(model: Model, imgsz: ImageSize) -> Layout | None:
    module: Any = model.model
    if model.task not in ("detect", *HEADS):
        return None
    head = module.model[-1]
    extra = int(getattr(head, HEADS.get(str(model.task), ""), 0))
    return Layout(len(module.names), extra, imgsz, queries="RTDETR" in type(head).__name__)


def _format_of(path: Path) -> str:
    if not path.exists():
        raise BenchError(f"'{path}' does not exist. Pass the path of an exported model.")
    for format in ("openvino", "ncnn"):
        if path.name.lower().endswith(f"_{format}_model"):
            return format
    if path.suffix not in runtimes.SUFFIXES or path.suffix == ".pt":
        raise BenchError(
            f"'{path}' is not an export that can be compared. Pass a file of one of these formats: "
            f"{', '.join(list(runtimes.FORMATS)[1:])}."
        )
    return runtimes.SUFFIXES[path.suffix]
