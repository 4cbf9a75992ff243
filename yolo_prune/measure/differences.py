# SPDX-License-Identifier: AGPL-3.0-or-later
"""Compares the outputs of an exported model with those of its checkpoint: as arrays, and detection by detection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from yolo_prune.env.image_size import ImageSize, height_width
from yolo_prune.errors import BenchError

Array = npt.NDArray[Any]
CONFIDENCE = 0.25
"""Minimum score of a detection, as in `yolo predict`."""


class Detections(NamedTuple):
    """The detections of one image: boxes `(n, 4)` in pixels, scores `(n, classes)`."""

    boxes: Array
    scores: Array


@dataclass(frozen=True)
class Layout:
    """The layout of a detector's first output.

    Attributes:
        classes: number of classes.
        extra: numbers per detection besides box and classes (mask coefficients, keypoints, an angle).
        imgsz: image size in pixels.
        queries: the rows are queries of a transformer, with boxes as fractions of the image.
    """

    classes: int
    extra: int
    imgsz: ImageSize
    queries: bool = False

    def ordered(self, output: Array) -> bool:
        """True if the n-th detection has a fixed place in the image: those of two models then belong together."""
        return not self.queries and output.shape[1] == 4 + self.classes + self.extra

    def parts(self, output: Array, other: Array) -> list[tuple[Array, Array]]:
        """Boxes, scores and extra numbers of two outputs, as separate pairs because each has its own scale.

        The list is empty if the order of detections may differ.
        """
        if not self.ordered(output):
            return []
        ends = [4, 4 + self.classes]
        halves = (np.split(a, ends, axis=1) for a in (output, other))
        return [(a, b) for a, b in zip(*halves, strict=True) if a.size]

    def read(self, output: Array) -> Iterator[Detections]:
        """Detections of every image of a batch.

        Args:
            output: `(n, 4 + classes + extra, places)` from a head without NMS, `(n, rows, 6 + extra)` from an
                end-to-end head, or `(n, queries, 4 + classes)` from queries, `(n, queries, 6)` in later releases.
        """
        for rows in output:
            if self.queries:
                each = rows.shape[1] == 4 + self.classes and bool(
                    (rows[:, 5:6] % 1).any()
                )  # otherwise columns 4 and 5 are score and class
                height, width = height_width(self.imgsz)
                boxes = rows[:, :4] * np.array([width, height, width, height], rows.dtype)
                yield Detections(boxes, rows[:, 4:] if each else self._scores(rows))
            elif self.ordered(output):
                yield Detections(rows[:4].T, rows[4 : 4 + self.classes].T)
            else:
                yield Detections(rows[:, :4], self._scores(rows))

    def _scores(self, rows: Array) -> Array:
        """Scores per class, from rows with one score and one class after the box."""
        scores = np.zeros((len(rows), self.classes), rows.dtype)
        scores[np.arange(len(rows)), rows[:, 5].astype(int).clip(0, self.classes - 1)] = rows[:, 4]
        return scores


@dataclass
class Comparison:
    """Largest differences of all batches that were passed to `add`.

    Attributes:
        layout: layout of the first output; None if the task has no detections.
        confidence: minimum score of the compared detections.
        outputs: largest difference of raw outputs (boxes and scores separately), relative to the largest value of each;
            None if no outputs have the same order.
        boxes: largest difference of the boxes of detections, in pixels.
        scores: largest difference of the scores of detections.
        detections: number of compared detections of the reference.
    """

    layout: Layout | None = None
    confidence: float = CONFIDENCE
    outputs: float | None = None
    boxes: float | None = None
    scores: float | None = None
    detections: int = field(default=0)

    def add(self, reference: list[Array], exported: list[Array], count: int) -> None:
        """Compare the outputs for one batch.

        Args:
            reference: outputs of the checkpoint; there may be more than the export has, in any order.
            exported: outputs of the export.
            count: number of images to compare; the others only fill the batch.

        Raises:
            BenchError: If the checkpoint has no output in the shape of an output of the export.
        """
        pairs = [(a[:count], b[:count]) for a, b in _matched(reference, exported)]
        if self.layout:
            self._detections(*pairs[0])
            pairs = [*self.layout.parts(*pairs[0]), *pairs[1:]]
        for a, b in pairs:
            scale = float(np.abs(a).max(initial=0.0)) or 1.0
            self.outputs = _worst(self.outputs, _difference(a, b) / scale)

    def _detections(self, reference: Array, exported: Array) -> None:
        assert self.layout
        ordered = self.layout.ordered(reference)
        for wanted, got in zip(self.layout.read(reference), self.layout.read(exported), strict=True):
            for row in np.flatnonzero(wanted.scores.max(1) >= self.confidence).tolist():
                kind, box = int(wanted.scores[row].argmax()), wanted.boxes[row]
                other = row if ordered else _nearest(box, kind, got)
                self.detections += 1
                score = got.scores[other, kind] if other is not None else 0.0
                self.scores = _worst(self.scores, abs(float(wanted.scores[row, kind] - score)))
                if other is not None:
                    self.boxes = _worst(self.boxes, _difference(box, got.boxes[other]))


def _nearest(box: Array, kind: int, detections: Detections) -> int | None:
    """Row of the detection of class `kind` with the nearest box; None if there is no detection of this class."""
    rows = np.flatnonzero(detections.scores[:, kind] > 0)
    if not len(rows):
        return None
    return int(rows[np.abs(detections.boxes[rows] - box).max(1).argmin()])


def _matched(reference: list[Array], exported: list[Array]) -> list[tuple[Array, Array]]:
    left, pairs = list(reference), []
    for output in exported:
        index = next((i for i, a in enumerate(left) if a.shape == output.shape), None)
        if index is None:
            shapes = [tuple(a.shape) for a in reference]
            raise BenchError(
                f"The export has an output of shape {tuple(output.shape)}, but its checkpoint has {shapes}. Export the "
                "checkpoint again, without nms=True."
            )
        pairs.append((left.pop(index), output))
    return pairs


def _difference(a: Array, b: Array) -> float:
    """The largest absolute difference; infinite if only one of two values is NaN or infinite."""
    with np.errstate(invalid="ignore"):
        far = np.abs(a.astype(np.float64) - b.astype(np.float64))
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    worst = np.where(same, 0.0, np.nan_to_num(far, nan=np.inf))
    return float(worst.max(initial=0.0))


def _worst(before: float | None, now: float) -> float:
    return now if before is None else max(before, now)


def batches(images: Array, size: int) -> Iterator[tuple[Array, int]]:
    """`(batch, number of images that count)`: images `(n, ...)` in batches of equal size.

    The last batch is filled with copies of its last image.
    """
    for start in range(0, len(images), size):
        part = images[start : start + size]
        fill = [part[-1:]] * (size - len(part))
        yield np.ascontiguousarray(np.concatenate([part, *fill])), len(part)
