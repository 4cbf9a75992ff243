# SPDX-License-Identifier: AGPL-3.0-or-later
"""Comparing outputs, on arrays small enough to see what is right."""

from __future__ import annotations

import math

import numpy as np
import pytest

from yolo_prune.env.image_size import Rectangle
from yolo_prune.errors import BenchError
from yolo_prune.measure.differences import Comparison, Layout, batches

PLACES = Layout(classes=2, extra=0, imgsz=64)


def places() -> np.ndarray:
    """One image, three places; the first two are detections, of class 1 and 0."""
    boxes = [[10, 20, 30], [11, 21, 31], [4, 5, 6], [4, 5, 60]]
    return np.array([[*boxes, [0.1, 0.8, 0.01], [0.9, 0.2, 0.02]]], np.float32)


def test_the_same_outputs_agree() -> None:
    found = Comparison(PLACES)
    found.add([places()], [places()], 1)
    assert (found.outputs, found.boxes, found.scores, found.detections) == (0.0, 0.0, 0.0, 2)


def test_differences_are_counted_where_they_belong() -> None:
    other = places()
    other[0, 0, 1] += 3  # box of a detection
    other[0, 5, 0] -= 0.25  # score of its class
    other[0, 3, 2] -= 12  # a place without detection: raw outputs only
    found = Comparison(PLACES)
    found.add([places()], [other], 1)
    assert found.boxes == pytest.approx(3)
    assert found.scores == pytest.approx(0.25)
    assert found.outputs == pytest.approx(0.25 / 0.9)  # of scores; of boxes it is 12 / 60


def test_images_that_fill_up_a_batch_do_not_count() -> None:
    other = np.concatenate([places(), places() + 100])
    found = Comparison(PLACES)
    found.add([np.concatenate([places(), places()])], [other], 1)
    assert found.outputs == 0


def test_detections_of_an_end_to_end_head_may_come_in_another_order() -> None:
    rows = np.array([[[1, 1, 9, 9, 0.9, 1], [20, 20, 30, 30, 0.6, 0], [2, 2, 9, 9, 0.1, 1]]], np.float32)
    other = rows[:, [1, 0, 2]].copy()
    other[0, 0, 3] += 0.5
    found = Comparison(PLACES)
    found.add([rows], [other], 1)
    assert found.outputs is None
    assert (found.boxes, found.detections) == (0.5, 2)
    assert found.scores == 0


def test_a_detection_that_is_gone_counts_with_its_score() -> None:
    rows = np.array([[[1, 1, 9, 9, 0.75, 1]]], np.float32)
    other = np.array([[[1, 1, 9, 9, 0.75, 0]]], np.float32)
    found = Comparison(PLACES)
    found.add([rows], [other], 1)
    assert (found.scores, found.boxes) == (0.75, None)


def test_queries_are_matched_and_their_boxes_are_shares_of_the_image() -> None:
    rows = np.array([[[0.5, 0.5, 0.1, 0.1, 0.9, 0.0], [0.2, 0.2, 0.1, 0.1, 0.1, 0.8]]], np.float32)
    other = rows[:, ::-1].copy()
    other[0, 0, 0] += 1 / 64
    found = Comparison(Layout(2, 0, 64, queries=True))
    found.add([rows], [other], 1)
    assert found.boxes == pytest.approx(1, abs=1e-4)
    assert found.scores == 0


def test_queries_are_shares_of_both_sides_of_a_rectangle() -> None:
    rows = np.array([[[0.5, 0.5, 0.1, 0.1, 0.9, 0.0]]], np.float32)
    found = next(Layout(2, 0, Rectangle(64, 96), queries=True).read(rows))
    assert found.boxes[0] == pytest.approx([48, 32, 9.6, 6.4])  # x, y, width, height


def test_what_is_no_number_is_as_far_off_as_can_be() -> None:
    other = places()
    other[0, 2, 2] = math.nan
    found = Comparison(PLACES)
    found.add([places()], [other], 1)
    assert found.outputs == math.inf


def test_outputs_are_paired_by_shape() -> None:
    proto = np.ones((1, 4, 2, 2), np.float32)
    found = Comparison(PLACES)
    found.add([places(), np.zeros((1, 7), np.float32), proto], [places(), proto * 1.5], 1)
    assert found.outputs == pytest.approx(0.5)
    with pytest.raises(BenchError, match=r"has an output of shape \(1, 9\), but its checkpoint has"):
        Comparison(None).add([proto], [np.zeros((1, 9), np.float32)], 1)


def test_batches_are_filled_up() -> None:
    images = np.arange(5, dtype=np.float32).reshape(5, 1, 1, 1)
    found = [(part.ravel().tolist(), count) for part, count in batches(images, 2)]
    assert found == [([0, 1], 2), ([2, 3], 2), ([4, 4], 1)]
