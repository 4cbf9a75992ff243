# SPDX-License-Identifier: AGPL-3.0-or-later
"""Does an exported model say what its checkpoint says? Outputs are compared as arrays, detection by detection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from yolo_prune.errors import BenchError

Array = npt.NDArray[Any]
CONFIDENCE = 0.25
"""Score from which something counts as detected, as in `yolo predict`."""


class Detections(NamedTuple):
    """What one image shows: boxes `(n, 4)` in pixels, scores `(n, classes)`."""

    boxes: Array
    scores: Array


@dataclass(frozen=True)
class Layout:
    """How to read the first output of a detector.

    Attributes:
        classes: how many.
        extra: numbers per detection beside box and classes (mask coefficients, keypoints, an angle).
        imgsz: size of the image in pixels.
        queries: the rows are a transformer's queries, with boxes as shares of the image.
    """

    classes: int
    extra: int
    imgsz: int
    queries: bool = False

    def ordered(self, output: Array) -> bool:
        """True if the n-th detection of one model is the n-th of the other: they are at fixed places of the image."""
        return not self.queries and output.shape[1] == 4 + self.classes + self.extra

    def parts(self, output: Array, other: Array) -> list[tuple[Array, Array]]:
        """Boxes, scores and what else there is, of two outputs: each has a scale of its own.

        Nothing where the order of detections may differ.
        """
        if not self.ordered(output):
            return []
        ends = [4, 4 + self.classes]
        halves = (np.split(a, ends, axis=1) for a in (output, other))
        return [(a, b) for a, b in zip(*halves, strict=True) if a.size]

    def read(self, output: Array) -> Iterator[Detections]:
        """Detections of every image of a batch.

        Args:
            output: `(n, 4 + classes + extra, places)` as a head without NMS puts it out, `(n, rows, 6 + extra)` as an
                end-to-end head does, or of queries `(n, queries, 4 + classes)`, in later
                releases `(n, queries, 6)`.
        """
        for found in output:
            if self.queries:
                each = found.shape[1] == 4 + self.classes and bool((found[:, 5:6] % 1).any())  # else score and class
                yield Detections(found[:, :4] * self.imgsz, found[:, 4:] if each else self._scores(found))
            elif self.ordered(output):
                yield Detections(found[:4].T, found[4 : 4 + self.classes].T)
            else:
                yield Detections(found[:, :4], self._scores(found))

    def _scores(self, found: Array) -> Array:
        """Scores per class of rows that hold one score and one class after the box."""
        scores = np.zeros((len(found), self.classes), found.dtype)
        scores[np.arange(len(found)), found[:, 5].astype(int).clip(0, self.classes - 1)] = found[:, 4]
        return scores


@dataclass
class Comparison:
    """Largest differences so far; feed it with `add`.

    Attributes:
        layout: of the first output; None where the task detects nothing.
        outputs: of raw outputs (boxes and scores apart), relative to the largest of each; None where nothing can be
            compared in order.
        boxes: of boxes of what the reference detects, in pixels.
        scores: of their scores.
        detections: that were looked at.
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
            reference: of the checkpoint; may be more than the export has, in any order.
            exported: of the export.
            count: images of the batch that count; the others fill it up.

        Raises:
            BenchError: If an output of the export has no counterpart of its shape.
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


def _nearest(box: Array, kind: int, found: Detections) -> int | None:
    """The detection of a class whose box is nearest; None where there is none of this class."""
    rows = np.flatnonzero(found.scores[:, kind] > 0)
    if not len(rows):
        return None
    return int(rows[np.abs(found.boxes[rows] - box).max(1).argmin()])


def _matched(reference: list[Array], exported: list[Array]) -> list[tuple[Array, Array]]:
    left, pairs = list(reference), []
    for output in exported:
        index = next((i for i, a in enumerate(left) if a.shape == output.shape), None)
        if index is None:
            shapes = [tuple(a.shape) for a in reference]
            raise BenchError(f"The export puts out {tuple(output.shape)}, its checkpoint {shapes}: nothing to compare.")
        pairs.append((left.pop(index), output))
    return pairs


def _difference(a: Array, b: Array) -> float:
    """The largest absolute difference; infinite where one of both is not a number, or infinite, and the other not."""
    with np.errstate(invalid="ignore"):
        far = np.abs(a.astype(np.float64) - b.astype(np.float64))
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    worst = np.where(same, 0.0, np.nan_to_num(far, nan=np.inf))
    return float(worst.max(initial=0.0))


def _worst(before: float | None, now: float) -> float:
    return now if before is None else max(before, now)


def batches(images: Array, size: int) -> Iterator[tuple[Array, int]]:
    """Images `(n, ...)` in batches of one size; the last is filled up with its last image. Each with how many count."""
    for start in range(0, len(images), size):
        part = images[start : start + size]
        fill = [part[-1:]] * (size - len(part))
        yield np.ascontiguousarray(np.concatenate([part, *fill])), len(part)
