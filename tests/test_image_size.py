# SPDX-License-Identifier: AGPL-3.0-or-later
"""Image sizes as users write them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from yolo_prune.env.image_size import Rectangle, height_width, image_size, plain, rounded_up, stored_size
from yolo_prune.errors import BenchError, PruneError

NUMPY = [np.int64(64), np.int64(96)]
WRONG = (
    0,
    -64,
    100,
    64.0,
    True,
    None,
    "",
    "64x96",
    "64,",
    "64,96,3",
    (64, 96, 3),
    (),
    (64, 90),
    8224,
    {64, 96},
    [None],
)


@pytest.mark.parametrize("value", [(64, 96), [64, 96], "64,96", "[64, 96]", "(64,96)", " 64 , 96 ", NUMPY])
def test_ways_to_write_a_rectangle(value: Any) -> None:
    assert image_size(value) == Rectangle(height=64, width=96)


@pytest.mark.parametrize("value", [96, "96", (96,), [96], (96, 96), "96,96", np.int64(96), [np.int32(96)]])
def test_a_square_is_one_number(value: Any) -> None:
    size = image_size(value)
    assert size == 96
    assert type(size) is int
    assert height_width(size) == (96, 96)


@pytest.mark.parametrize("value", WRONG)
def test_what_no_model_takes_is_refused_in_one_way(value: Any) -> None:
    with pytest.raises(PruneError, match=r"imgsz=.*: must be a multiple of 32 between 32 and 8192, or two of them"):
        image_size(value)


def test_the_stride_of_the_model_and_the_class_of_the_error_are_the_callers() -> None:
    with pytest.raises(BenchError, match="must be a multiple of 64 between 64 and 8192"):
        image_size((64, 96), multiple=64, error=BenchError)


def test_a_stored_size_has_no_limit() -> None:
    assert stored_size(9001) == 9001
    assert stored_size([9024, 64], multiple=32) == Rectangle(9024, 64)
    assert rounded_up(9001) == 9024
    for value in (0, -1, None, "large", [1, 2, 3]):
        with pytest.raises(BenchError, match=r"imgsz=.*: must be a whole number of at least 1, or two of them"):
            stored_size(value, error=BenchError)
    with pytest.raises(PruneError, match="must be a multiple of 32 of at least 32"):
        stored_size(9001, multiple=32)


def test_a_rectangle_is_read_again_from_what_is_written() -> None:
    size = Rectangle(64, 96)
    assert image_size(str(size)) == size
    assert image_size(json.loads(json.dumps(plain(size)))) == size
    assert type(plain(size)) is list
    assert f"imgsz={size}" == "imgsz=64,96"
