# SPDX-License-Identifier: AGPL-3.0-or-later
"""Rounds over epochs."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any, Literal, get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from ultralytics.utils.torch_utils import one_cycle

from yolo_prune.errors import ScheduleError
from yolo_prune.recipe import Schedule, load_recipe
from yolo_prune.run import schedule as run_schedule
from yolo_prune.run.schedule import lay_out, learning_rate_factor

Curve = Literal["linear", "cubic"]


def test_left_out_the_rounds_are_spread_over_the_first_half() -> None:
    assert [r.epoch for r in lay_out(Schedule(), 0.5, 30)] == [0, 5, 10]
    assert [r.epoch for r in lay_out(Schedule(rounds=4), 0.5, 100)] == [0, 12, 25, 37]
    assert [r.epoch for r in lay_out(Schedule(start=10), 0.5, 60)] == [10, 16, 23]


def test_when_the_first_half_is_too_short_the_rounds_take_an_epoch_each() -> None:
    assert [r.epoch for r in lay_out(Schedule(), 0.5, 3)] == [0, 1, 2]
    assert [r.epoch for r in lay_out(Schedule(start=25), 0.5, 30)] == [25, 26, 27]


def test_start_and_interval_are_taken_at_their_word() -> None:
    assert [r.epoch for r in lay_out(Schedule(rounds=3, start=2, interval=7), 0.5, 30)] == [2, 9, 16]


@pytest.mark.parametrize(
    ("curve", "keeps"),
    [("linear", [0.75, 0.5]), ("cubic", [1 - 0.5 * (1 - 0.5**3), 0.5])],
)
def test_curves(curve: Curve, keeps: list[float]) -> None:
    assert [r.keep for r in lay_out(Schedule(rounds=2, curve=curve), 0.5, 20)] == pytest.approx(keeps)


def test_the_default_is_three_cubic_rounds() -> None:
    assert [r.keep for r in lay_out(Schedule(), 0.1, 30)] == pytest.approx(
        [1 - 0.9 * (1 - (2 / 3) ** 3), 1 - 0.9 * (1 - (1 / 3) ** 3), 0.1]
    )


@pytest.mark.parametrize(("interval", "last"), [(14, 28), (None, 10)])
def test_the_last_round_has_an_epoch_after_it(interval: int | None, last: int) -> None:
    assert lay_out(Schedule(rounds=3, interval=interval), 0.5, 30)[-1].epoch == last
    assert lay_out(Schedule(rounds=3, interval=14), 0.5, 29)[-1].epoch == 28


@pytest.mark.parametrize("schedule", [Schedule(rounds=1), Schedule(curve="one-shot"), Schedule(rounds=1, interval=9)])
def test_one_epoch_holds_one_round(schedule: Schedule) -> None:
    assert [(r.number, r.epoch, r.keep) for r in lay_out(schedule, 0.4, 1)] == [(1, 0, 0.4)]


def test_one_shot_is_one_round_at_the_target() -> None:
    (only,) = lay_out(Schedule(curve="one-shot"), 0.3, 1)
    assert (only.number, only.epoch, only.keep) == (1, 0, 0.3)


def test_rounds_go_on_from_what_is_left_of_a_pruned_model() -> None:
    keeps = [r.keep for r in lay_out(Schedule(curve="linear"), 0.2, 20, present=0.5)]
    assert keeps == pytest.approx([0.4, 0.3, 0.2])


@pytest.mark.parametrize(
    ("schedule", "epochs", "message"),
    [
        (Schedule(), 2, "3 rounds from epoch 0 need at least 3 epochs, and the run has 2; at most 2 rounds fit"),
        (Schedule(start=30), 30, "no round fits"),
        (Schedule(), 1, "3 rounds from epoch 0 need at least 3 epochs, and the run has 1"),
        (Schedule(rounds=4, start=8), 10, "4 rounds from epoch 8 need at least 12 epochs, and the run has 10"),
        (Schedule(curve="one-shot"), 0, "no round fits"),
        (Schedule(rounds=3, interval=14), 28, "falls on epoch 28.* Set the interval to at most 13"),
        (Schedule(interval=20), 30, "falls on epoch 40.* Set the interval to at most 14"),
    ],
)
def test_rounds_that_do_not_fit_are_refused_with_what_would(schedule: Schedule, epochs: int, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        lay_out(schedule, 0.5, epochs)


def test_what_has_to_come_before_the_first_cut_does() -> None:
    def first(epochs: int, **fields: object) -> int:
        recipe = load_recipe("half-flops", {"schedule.rounds": 2, **fields})
        return run_schedule.rounds(recipe, epochs)[0].epoch

    assert first(40) == 0
    assert first(40, **{"recover.rewind.epoch": 3}) == 10
    assert first(40, **{"recover.rewind.epoch": 12}) == 13
    assert first(40, **{"recover.rewind.epoch": 3, "schedule.start": 3}) == 3
    assert first(3, **{"recover.rewind.epoch": 0}) == 1
    sparse = {"criterion": {"name": "bn_scale", "sparsity": 1e-4}}
    assert first(40, **sparse) == 10
    assert first(3, **sparse) == 1
    assert first(40, **sparse, **{"recover.rewind.epoch": 10}) == 11
    assert first(40, **sparse, **{"schedule.start": 0}) == 0
    assert first(40, criterion="bn_scale") == 0
    with pytest.raises(ScheduleError, match=r"rewind.epoch: 39, counted from 0, leaves no epoch .* at most 38"):
        first(40, **{"recover.rewind.epoch": 39})


def test_the_learning_rate_begins_anew_at_each_cut_and_runs_down_to_the_next() -> None:
    plan = lay_out(Schedule(rounds=2, start=4, interval=2), 0.5, 10)
    factors = [learning_rate_factor(epoch, plan, 10, lambda x: 1 - x / 10) for epoch in range(10)]
    assert factors == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4, 1, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4])
    cosine = [learning_rate_factor(epoch, plan, 10, one_cycle(1, 0.1, 10)) for epoch in range(4, 8)]
    assert cosine == pytest.approx([1, 0.55, 1, 1 + (0.1 - 1) * (1 - 0.5**0.5) / 2])


@given(start=st.integers(0, 30), epochs=st.integers(31, 300))
def test_with_one_cut_at_the_start_the_learning_rate_is_that_of_the_run(start: int, epochs: int) -> None:
    assert learning_rate_factor(start, lay_out(Schedule(rounds=1), 0.5, epochs), epochs, lambda x: x) == start
    assert learning_rate_factor(start, lay_out(Schedule(rounds=1, start=start), 0.5, epochs), epochs, lambda x: x) == 0


@given(
    count=st.integers(1, 100),
    spare=st.integers(0, 300),
    start=st.integers(0, 30),
    target=st.floats(0.05, 0.95),
    pruned=st.floats(0.01, 0.9),
    curve=st.sampled_from(get_args(Curve)),
)
def test_rounds_are_distinct_ascending_within_the_run_and_end_at_the_target(
    count: int, spare: int, start: int, target: float, pruned: float, curve: Curve
) -> None:
    epochs, present = start + count + spare, 1 - pruned * (1 - target)
    plan = lay_out(Schedule(rounds=count, start=start, curve=curve), target, epochs, present)
    assert [r.number for r in plan] == list(range(1, count + 1))
    assert all(a.epoch < b.epoch and a.keep > b.keep for a, b in pairwise(plan))
    assert plan[0].epoch == start
    assert plan[-1].epoch <= epochs - 1
    assert plan[0].keep < present
    assert plan[-1].keep == target


@given(count=st.integers(1, 100), epochs=st.integers(1, 400))
def test_left_out_the_rounds_stay_in_the_first_half_if_it_has_room(count: int, epochs: int) -> None:
    assume(epochs >= 2 * count)
    cuts = [r.epoch for r in lay_out(Schedule(rounds=count), 0.5, epochs)]
    assert cuts[-1] < epochs / 2
    gaps = [b - a for a, b in pairwise(cuts)]
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


@given(count=st.integers(2, 40), start=st.integers(0, 30), interval=st.integers(1, 30), epochs=st.integers(1, 300))
def test_an_interval_fits_or_the_one_that_is_named_does(count: int, start: int, interval: int, epochs: int) -> None:
    assume(count <= epochs - start)
    schedule = Schedule(rounds=count, start=start, interval=interval)
    if start + (count - 1) * interval <= epochs - 1:
        assert [r.epoch for r in lay_out(schedule, 0.5, epochs)] == [start + i * interval for i in range(count)]
        return
    with pytest.raises(ScheduleError, match="Set the interval to at most") as error:
        lay_out(schedule, 0.5, epochs)
    longest = int(re.findall(r"at most (\d+)", str(error.value))[0])
    assert lay_out(Schedule(rounds=count, start=start, interval=longest), 0.5, epochs)
    with pytest.raises(ScheduleError):
        lay_out(Schedule(rounds=count, start=start, interval=longest + 1), 0.5, epochs)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, [0]),  # the weights are refitted
        ({"recover.refit": 0}, [0, 5, 10]),
        ({"guard.max_drop": 0.02}, [0, 5, 10]),  # there must be something to go back to
        ({"schedule.rounds": 2}, [0, 7]),
        ({"target.max_drop": 0.01}, [0, 4, 8, 12, 16, 20]),
    ],
)
def test_how_many_rounds_there_are_where_the_recipe_does_not_say(fields: dict[str, Any], wanted: list[int]) -> None:
    assert [r.epoch for r in run_schedule.rounds(load_recipe("half-flops", fields), 30)] == wanted
