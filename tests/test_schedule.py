# SPDX-License-Identifier: AGPL-3.0-or-later
"""Rounds over epochs."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolo_prune.errors import ScheduleError
from yolo_prune.recipe import Schedule
from yolo_prune.schedule import rounds


def test_left_out_the_rounds_are_spread_over_the_first_half() -> None:
    assert [r.epoch for r in rounds(Schedule(), 0.5, 30)] == [0, 5, 10]
    assert [r.epoch for r in rounds(Schedule(rounds=4), 0.5, 100)] == [0, 12, 25, 37]
    assert [r.epoch for r in rounds(Schedule(start=10), 0.5, 60)] == [10, 16, 23]


def test_start_and_interval_are_taken_at_their_word() -> None:
    assert [r.epoch for r in rounds(Schedule(rounds=3, start=2, interval=7), 0.5, 30)] == [2, 9, 16]


@pytest.mark.parametrize(
    ("curve", "keeps"),
    [("linear", [0.75, 0.5]), ("cubic", [1 - 0.5 * (1 - 0.5**3), 0.5])],
)
def test_curves(curve: str, keeps: list[float]) -> None:
    assert [r.keep for r in rounds(Schedule(rounds=2, curve=curve), 0.5, 20)] == pytest.approx(keeps)


def test_one_shot_is_one_round_at_the_target() -> None:
    (only,) = rounds(Schedule(curve="one-shot"), 0.3, 1)
    assert (only.number, only.epoch, only.keep) == (1, 0, 0.3)


def test_rounds_go_on_from_what_is_left_of_a_pruned_model() -> None:
    keeps = [r.keep for r in rounds(Schedule(curve="linear"), 0.2, 20, present=0.5)]
    assert keeps == pytest.approx([0.4, 0.3, 0.2])


@pytest.mark.parametrize(
    ("schedule", "epochs", "message"),
    [
        (Schedule(), 2, "3 rounds from epoch 0 need at least 3 epochs, the run has 2; at most 2 rounds fit"),
        (Schedule(start=30), 30, "no round fits"),
        (Schedule(interval=20), 30, "falls on epoch 40.* interval can be at most 14"),
    ],
)
def test_rounds_that_do_not_fit_are_refused_with_what_would(schedule: Schedule, epochs: int, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        rounds(schedule, 0.5, epochs)


@given(
    count=st.integers(1, 20),
    spare=st.integers(0, 100),
    start=st.integers(0, 30),
    target=st.floats(0.05, 0.95),
    curve=st.sampled_from(["linear", "cubic"]),
)
def test_rounds_are_distinct_ascending_within_the_run_and_end_at_the_target(
    count: int, spare: int, start: int, target: float, curve: str
) -> None:
    epochs = start + count + spare
    plan = rounds(Schedule(rounds=count, start=start, curve=curve), target, epochs)
    assert [r.number for r in plan] == list(range(1, count + 1))
    assert all(a.epoch < b.epoch and a.keep > b.keep for a, b in pairwise(plan))
    assert start <= plan[0].epoch
    assert plan[-1].epoch <= epochs - 1
    assert plan[-1].keep == target
