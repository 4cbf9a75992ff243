# SPDX-License-Identifier: AGPL-3.0-or-later
"""Runs finished models for a page: their cost, their accuracy, their latency and their detections in images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
from ultralytics.engine.model import Model
from ultralytics.engine.results import Results

from yolo_prune.cut.copies import size_mb
from yolo_prune.data.datasets import WITH_BOXES
from yolo_prune.env import outputs, trained
from yolo_prune.env.image_size import ImageSize, plain
from yolo_prune.env.metrics import average_precision, class_ap
from yolo_prune.errors import RunError
from yolo_prune.measure import benchmark
from yolo_prune.measure.subjects import Setting
from yolo_prune.measure.validation import at_size
from yolo_prune.planning import planner
from yolo_prune.report import Figures
from yolo_prune.report.compare import Candidate
from yolo_prune.report.measurement import Measurement
from yolo_prune.report.photos import Detection, Photo

PHOTOS = 8
SIDE = 480  # longest side of an image in a page, in pixels
CORNERS = 80  # largest number of corners in the outline of a mask
CONFIDENCE = 0.25


def validate_once(
    model: Model, name: str, data: str | Path, imgsz: ImageSize, settings: Mapping[str, Any] | None = None
) -> Candidate:
    """Validate a model once, and compute its cost.

    Args:
        model: a `YOLO` object; it may be fused afterwards.
        name: the name of the model on the page.
        data: the dataset, as for `model.val`.
        imgsz: image size in pixels.
        settings: more arguments for `model.val`; None: those that the model was trained with.

    Raises:
        RunError: If the dataset cannot be read.
    """
    module: Any = model.model
    flops, params = planner.present_cost(module.float(), imgsz)
    size = size_mb(module)
    with outputs.scratch() as folder:
        places = {"project": folder, "name": "val", "exist_ok": True}
        how = {**(trained.settings(model) if settings is None else settings), **at_size(model, imgsz)}
        try:
            metrics: Any = model.val(data=str(data), plots=False, verbose=False, workers=0, **places, **how)
        except (OSError, RuntimeError, SyntaxError, KeyError, IndexError, ValueError, TypeError) as e:
            raise RunError(f"{name} cannot be validated on data={data}: {type(e).__name__}: {e}") from e
    part = average_precision(metrics)
    fitness = float(metrics.fitness)
    figures = Figures(flops=flops, params=params, size_mb=size, fitness=fitness, classes=class_ap(metrics))
    accuracy = (None, None) if part is None else (float(part.map), float(part.map50))
    return Candidate(name, figures, *accuracy)


def time_all(models: Sequence[Model], formats: Sequence[str], setting: Setting) -> Measurement:
    """Time models in some formats, for a page. A format that fails is listed beside the results of the others.

    Raises:
        PruneError: If no format could be measured.
    """
    measurement = benchmark.measure_models(models, formats, setting)
    if not measurement.rows:
        measurement.check()
    return measurement


def photographs(models: Sequence[Model], files: Sequence[Path], imgsz: ImageSize, device: Any) -> list[Photo]:
    """Images with the detections of models; empty for tasks whose results have no outlines.

    Args:
        models: `YOLO` objects.
        files: the images.
        imgsz: image size in pixels.
        device: device for the models.
    """
    if any(model.task not in WITH_BOXES for model in models):
        return []
    size, quiet = plain(imgsz), {"verbose": False, "save": False}
    settings: dict[str, Any] = {"imgsz": size, "conf": CONFIDENCE, "device": device, **quiet}
    by_model = [[model.predict(str(file), **settings)[0] for file in files] for model in models]
    return [_photo(file, results) for file, *results in zip(files, *by_model, strict=True)]


def _photo(file: Path, results: Sequence[Results]) -> Photo:
    image = results[0].orig_img
    image = image if image.ndim == 2 or image.shape[2] in (1, 3) else image[..., :3]
    height, width = image.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image
    done, jpeg = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 82])
    if not done:
        raise RunError(f"{file} cannot be encoded as JPEG. Check the installation of OpenCV.")
    return Photo(file.name, jpeg.tobytes(), *size, tuple(detections(result) for result in results))


def detections(result: Results) -> tuple[Detection, ...]:
    """The detections of a model in an image, from Ultralytics' `Results`."""
    turned = getattr(result, "obb", None)
    boxes = result.boxes if turned is None else turned
    if boxes is None:
        return ()
    outlines = [_corners(box) for box in boxes.xyxyn.tolist()] if turned is None else boxes.xyxyxyxyn.tolist()
    if result.masks is not None:
        outlines = [line[:: len(line) // CORNERS + 1].tolist() or box for line, box in zip(result.masks.xyn, outlines)]  # noqa: B905  # a mask may be missing
    points: list[Any] = [[] for _ in outlines] if result.keypoints is None else result.keypoints.xyn.tolist()
    return tuple(
        Detection(result.names[int(kind)], int(kind), float(score), _pairs(outline), _pairs(p for p in dots if any(p)))
        for kind, score, outline, dots in zip(boxes.cls, boxes.conf, outlines, points, strict=True)
    )


def _corners(box: Sequence[float]) -> list[tuple[float, float]]:
    left, top, right, bottom = box
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _pairs(points: Any) -> tuple[tuple[float, float], ...]:
    return tuple((float(x), float(y)) for x, y, *_ in points)
