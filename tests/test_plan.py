# SPDX-License-Identifier: AGPL-3.0-or-later
"""Plans: plain data that survives files, composes over rounds and is refused when it is damaged."""

from __future__ import annotations

import errno
import json
import pickle
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yolo_prune.cut import surgery
from yolo_prune.cut.forecast import Forecast
from yolo_prune.cut.plan import GroupWidth, Plan, Protected
from yolo_prune.env.image_size import Rectangle
from yolo_prune.errors import PlanError
from yolo_prune.planning.planner import make_plan

SMALL = Plan(
    keep={"a.weight": {0: (0, 1, 2, 5)}, "a.bias": {0: (0, 1, 2, 5)}, "b.weight": {0: (1,), 1: (0, 1, 2, 5)}},
    attributes={"block": {"c": 2}},
    shapes={"a.weight": (6, 3, 1, 1), "a.bias": (6,), "b.weight": (2, 6, 3, 3)},
    groups=(GroupWidth("a", ("a",), 6, 4), GroupWidth("b", ("b",), 2, 1)),
    protected=(Protected(("head",), "task output"),),
    forecast=Forecast(64, 200.0, 200.0, 120.0, 60, 60, 30),
)


def tiny() -> Plan:
    return models.plan_of("yolo26-tiny", target_flops=0.6)


@pytest.mark.parametrize("plan", [SMALL, Plan({}, {}, {}), pytest.param(None, id="real")])
def test_a_plan_survives_a_file(plan: Plan | None, tmp_path: Path) -> None:
    plan = plan or tiny()
    path = plan.save(tmp_path / "new" / "plan.json")
    loaded = Plan.load(path)
    assert loaded == plan
    assert loaded.hash == plan.hash
    assert bool(loaded) == bool(plan)
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]


def test_since_undoes_then() -> None:
    tight = {"channels_round_to": 2, "channels_min": 2}
    first = models.plan_of("yolo26-tiny", target_flops=0.7, **tight)
    model = models.pruned("yolo26-tiny", target_flops=0.7, **tight)
    later = make_plan(model, models.recipe(target_flops=0.4, **tight), models.IMGSZ)
    composed = first.then(later)
    left = composed.since(first)
    assert (left.keep, left.shapes) == (later.keep, later.shapes)
    assert {g.name: (g.before, g.after) for g in left.groups} == {g.name: (g.before, g.after) for g in later.groups}
    assert first.then(left).keep == composed.keep
    assert not first.since(first)
    with pytest.raises(PlanError, match="do not follow one another: the earlier plan removes more channels of"):
        first.since(composed)


def test_since_by_hand() -> None:
    whole = Plan({"a.weight": {0: (1, 4), 1: (0, 2)}}, {}, {"a.weight": (6, 3)}, scale={"a.weight": {1: 3.0, 4: 2.0}})
    past = Plan({"a.weight": {0: (1, 2, 4)}}, {}, {"a.weight": (6, 3)}, scale={"a.weight": {1: 2.0, 4: 2.0}})
    left = whole.since(past)
    assert left.keep == {"a.weight": {0: (0, 2), 1: (0, 2)}}
    assert left.shapes == {"a.weight": (3, 3)}
    assert left.scale == {"a.weight": {0: 1.5}}


def test_a_plan_survives_pickling_and_plain_data() -> None:
    plan = tiny()
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = SMALL.save(tmp_path / "plan.json")
    monkeypatch.setattr("os.fsync", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        Plan({}, {}, {}).save(path)
    assert Plan.load(path) == SMALL
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.sets(st.integers(0, 200), min_size=1))
def test_kept_indices_survive_their_short_form(kept: set[int]) -> None:
    plan = Plan({"a": {0: tuple(sorted(kept))}}, {}, {"a": (201,)})
    assert Plan.from_dict(plan.to_dict()) == plan


def test_runs_of_indices_are_written_as_ranges() -> None:
    assert SMALL.to_dict()["keep"]["a.weight"] == {"0": "0-2,5"}


def test_the_hash_tells_what_a_plan_does_not_how_it_was_put() -> None:
    turned = Plan(
        dict(reversed(SMALL.keep.items())), SMALL.attributes, dict(reversed(SMALL.shapes.items())), forecast=None
    )
    assert turned.hash == SMALL.hash
    others = [
        replace(SMALL, keep={**SMALL.keep, "a.bias": {0: (0, 1, 2, 4)}}),
        replace(SMALL, attributes={"block": {"c": 3}}),
        replace(SMALL, shapes={**SMALL.shapes, "a.bias": (7,)}),
    ]
    assert len({SMALL.hash, *(o.hash for o in others)}) == 4


def test_the_hash_is_the_same_in_every_version_that_reads_version_1() -> None:
    """Reports and checkpoints of earlier runs hold it."""
    assert SMALL.hash == "a3a553980151318c57845737f515bcdfb9d201f336063057ecbe6f70664da730"


def test_shapes_after_a_cut() -> None:
    assert {name: SMALL.shape_after(name) for name in SMALL.keep} == {
        "a.weight": (4, 3, 1, 1),
        "a.bias": (4,),
        "b.weight": (1, 4, 3, 3),
    }


def test_composing_by_hand() -> None:
    later = Plan(
        keep={"a.weight": {0: (1, 3)}, "b.weight": {1: (1, 3)}, "c.weight": {1: (0,)}},
        attributes={"block": {"c": 1}, "other": {"c": 4}},
        shapes={"a.weight": (4, 3, 1, 1), "b.weight": (1, 4, 3, 3), "c.weight": (5, 2, 1, 1)},
        groups=(GroupWidth("a", ("a",), 4, 2), GroupWidth("c", ("c",), 9, 3)),
        protected=(Protected(("head", "stem"), "task output"),),
        forecast=Forecast(64, 200.0, 120.0, 70.0, 60, 30, 20),
    )
    both = SMALL.then(later)
    assert both.keep == {
        "a.weight": {0: (1, 5)},
        "a.bias": {0: (0, 1, 2, 5)},
        "b.weight": {0: (1,), 1: (1, 5)},
        "c.weight": {1: (0,)},
    }
    assert both.attributes == {"block": {"c": 1}, "other": {"c": 4}}
    assert both.shapes == SMALL.shapes | {"c.weight": (5, 2, 1, 1)}
    assert both.groups == (
        GroupWidth("a", ("a",), 6, 2),
        GroupWidth("b", ("b",), 2, 1),
        GroupWidth("c", ("c",), 9, 3),
    )
    assert both.forecast == Forecast(64, 200.0, 200.0, 70.0, 60, 60, 20)
    assert both.protected == later.protected
    assert SMALL.keep["a.weight"] == {0: (0, 1, 2, 5)}


def test_plans_that_do_not_follow_one_another_are_refused() -> None:
    later = Plan({"a.weight": {0: (1, 3)}}, {}, {"a.weight": (6, 3, 1, 1)})
    with pytest.raises(
        PlanError, match=r"'a\.weight' has shape \(4, 3, 1, 1\) after the first plan but \(6, 3, 1, 1\) befor"
    ):
        SMALL.then(later)


@pytest.mark.parametrize("name", models.FAMILIES)
def test_two_rounds_composed_equal_one_after_the_other(name: str) -> None:
    model, rounds = models.build(name), []
    for keep in (0.7, 0.45):
        rounds.append(make_plan(model, models.recipe(target_flops=keep), models.IMGSZ))
        models.cut(model, rounds[-1])
    both = Plan.from_dict(rounds[0].then(rounds[1]).to_dict())
    at_once = models.build(name)
    surgery.apply(at_once, both)
    assert models.same_bits(models.snapshot(at_once), models.snapshot(model))
    for (path, one), other in zip(at_once.named_modules(), model.modules(), strict=True):
        assert numbers(one) == numbers(other), path


def numbers(layer: Any) -> dict[str, object]:
    return {k: v for k, v in vars(layer).items() if isinstance(v, int | float | tuple)}


def damaged(change: Any) -> dict[str, Any]:
    data = deepcopy(SMALL.to_dict())
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=4), "This plan has version 4; this yolo-prune reads versions 1 to 3"),
        (lambda d: d.pop("version"), "not a yolo-prune plan: KeyError: 'version'"),
        (lambda d: d.pop("keep"), "not a yolo-prune plan: KeyError: 'keep'"),
        (lambda d: d.pop("shapes"), "not a yolo-prune plan: KeyError: 'shapes'"),
        (lambda d: d.update(keep=[1]), "not a yolo-prune plan"),
        (lambda d: d.update(keep={"a.weight": 3}), "not a yolo-prune plan"),
        (lambda d: d["keep"].update({"a.weight": {"0": [0, 1]}}), "not a yolo-prune plan"),
        (lambda d: d["keep"].update({"a.weight": {"0": "0-x"}}), "not a yolo-prune plan"),
        (lambda d: d["keep"].update({"a.weight": {"zero": "0"}}), "not a yolo-prune plan"),
        (lambda d: d["keep"].update({"a.weight": {"0": ""}}), "not a yolo-prune plan"),
        (lambda d: d["keep"].update({"a.weight": {"0": "0-99999999"}}), "larger than any layer has"),
        (lambda d: d["keep"].update({"a.weight": {"0": "0-6"}}), r"'a\.weight', dimension 0, .* within 0\.\.5"),
        (lambda d: d["keep"].update({"a.weight": {"0": "3,1"}}), r"'a\.weight', dimension 0, must be ascending"),
        (lambda d: d["keep"].update({"a.weight": {"0": "1,1"}}), r"'a\.weight', dimension 0, must be ascending"),
        (lambda d: d["keep"].update({"a.weight": {"0": "5-3"}}), r"'a\.weight', dimension 0, must be ascending"),
        (lambda d: d["keep"].update({"a.weight": {"-1": "0"}}), r"'a\.weight', dimension -1"),
        (lambda d: d["keep"].update({"a.weight": {"4": "0"}}), r"'a\.weight', dimension 4"),
        (lambda d: d["keep"].update({"stranger": {"0": "0"}}), "damaged: .*'stranger'"),
        (lambda d: d.update(attributes={"block": 3}), "not a yolo-prune plan"),
        (lambda d: d.update(attributes={"block": {"c": "x"}}), "not a yolo-prune plan"),
        (lambda d: d.update(attributes={"block": {"c": 0}}), r"damaged: 'block\.c' must be at least 1, found 0"),
        (lambda d: d.update(shapes={"a.weight": [float("inf")]}), "not a yolo-prune plan"),
        (lambda d: d.update(shapes={"a.weight": None}), "not a yolo-prune plan"),
        (lambda d: d.update(groups=[["a"]]), "not a yolo-prune plan"),
        (lambda d: d.update(protected=3), "not a yolo-prune plan"),
        (lambda d: d.update(forecast={"imgsz": 64}), "not a yolo-prune plan"),
    ],
)
def test_damaged_data_is_refused_as_such(change: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_dict(damaged(change))


@pytest.mark.parametrize("data", [None, 3, "plan", [], {}])
def test_what_is_no_plan_is_refused(data: Any) -> None:
    with pytest.raises(PlanError, match="This is not a yolo-prune plan"):
        Plan.from_dict(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"version": 1, "keep"', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"PK\x03\x04 a zip, as checkpoints are", "not valid JSON"),
        (b"[1, 2]", "expected a mapping, found list"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"version": 1}', "KeyError: 'keep'"),
    ],
)
def test_a_file_that_is_no_plan_is_refused_naming_it(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=rf"mine\.json' .*not a yolo-prune plan: .*{message}"):
        Plan.load(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"Cannot read the plan '.*missing\.json': No such file"):
        Plan.load(tmp_path / "missing.json")
    with pytest.raises(PlanError, match="Cannot read the plan"):
        Plan.load(tmp_path)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_no_damage_gets_through_or_crashes(data: st.DataObject) -> None:
    """Whatever one piece of a plan is replaced by, it is refused, or it is a plan that can be used."""
    junk = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just([]) | st.just({})
    value = data.draw(junk)
    body: Any = SMALL.to_dict()
    place = body
    while isinstance(place, dict) and place:
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
            place[key] = value
            break
        place = place[key]
    try:
        plan = Plan.from_dict(body)
    except PlanError:
        return
    assert plan.hash
    assert str(plan)
    assert all(plan.shape_after(name) for name in plan.keep)


def test_the_table_tells_groups_protection_and_cost() -> None:
    text = str(SMALL)
    assert f"{'a':35} a " in text
    assert "67%" in text
    assert "protected (task output): head" in text
    assert "60.0%   at imgsz 64" in text
    assert "50.0%" in text
    assert "nothing is removed" in str(Plan({}, {}, {}))
    assert max(len(line) for line in str(tiny()).splitlines()) <= 100


def test_a_plan_of_rectangles_is_stored_as_plain_data_and_read_again(tmp_path: Path) -> None:
    forecast = replace(SMALL.predicted, imgsz=Rectangle(64, 96))
    plan = replace(SMALL, forecast=forecast)
    assert plan.to_dict()["forecast"]["imgsz"] == [64, 96]
    assert type(plan.to_dict()["forecast"]["imgsz"]) is list  # it is stored in checkpoints, too
    found = Plan.load(plan.save(tmp_path / "p.json"))
    assert found.forecast == forecast
    assert "60.0%   at imgsz 64,96" in str(found)
    body = plan.to_dict()
    body["forecast"]["imgsz"] = [64, 96, 3]
    with pytest.raises(PlanError, match=r"not a yolo-prune plan: ValueError: imgsz=\[64, 96, 3\]"):
        Plan.from_dict(body)


def test_a_plan_without_a_forecast_says_how_to_get_one() -> None:
    with pytest.raises(PlanError, match=r"no forecast. Make a plan with yolo_prune\.plan"):
        _ = Plan({}, {}, {}).predicted
