# SPDX-License-Identifier: AGPL-3.0-or-later
"""Cuts for a latency: corrected until the model takes as long as wanted, whatever the formula says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from clock import Clock, install, layers, table
from datasets import IMGSZ, tiny
from quick import QUICK
from torch import nn
from ultralytics import YOLO

import yolo_prune
from yolo_prune import cli, images, planner, subjects
from yolo_prune.errors import NothingToRemoveError, RunError, TargetError
from yolo_prune.metadata import Record
from yolo_prune.plans import Plan
from yolo_prune.recipe import Recipe
from yolo_prune.report import Report
from yolo_prune.timing import search

Law = Callable[[float], float]
LAWS: dict[str, Law] = {
    "as FLOPs": lambda f: f,
    "a part stays": lambda f: 0.3 + 0.7 * f,
    "slower": lambda f: f**0.5,
    "faster": lambda f: f**2,
    "in steps": lambda f: 0.2 + 0.8 * np.ceil(f * 30) / 30,
}
FINE = {"channels_round_to": 2, "channels_min": 2}


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Law], Clock]:
    """Nothing is really timed, nothing is known of other runs; models take as long as a law says."""
    monkeypatch.setattr(subjects, "busy", lambda: 0.0)
    monkeypatch.setattr(images, "MEMORY", tmp_path / "memory")

    def set_law(law: Law) -> Clock:
        install(monkeypatch, law)
        clock: Clock = search.Stopwatch  # type: ignore[assignment]
        return clock

    set_law(LAWS["a part stays"])
    return set_law


def recipe_for(keep: float, **fields: Any) -> Recipe:
    return models.recipe(target={"latency": keep, "format": "torch"}, **{**FINE, **fields})


def settle(model: nn.Module, recipe: Recipe) -> search.Hit:
    weighed = planner.weigh(
        model,
        planner.survey(model, recipe, IMGSZ),
        recipe,
        timing=table(name="yolo11-tiny").sums(layers("yolo11-tiny")),
    )
    return search.settle(model, weighed, recipe.target, IMGSZ)


def thinner(keep: float) -> nn.Module:
    model = models.build("yolo11-tiny")
    models.cut(model, models.plan_of("yolo11-tiny", target_flops=keep, **FINE))
    return model


@pytest.mark.parametrize("keep", [0.85, 0.6])
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_a_cut_is_corrected_until_it_takes_as_long_as_wanted(law: Law, keep: float, clock: Any) -> None:
    found, model = clock(law), models.build("yolo11-tiny")
    before = models.snapshot(model)
    hit = settle(model, recipe_for(keep))
    assert models.same_bits(before, models.snapshot(model))
    assert hit.row
    assert hit.row.ratio == pytest.approx(keep, rel=search.TOLERANCE)
    assert found.asked <= search.ATTEMPTS
    assert (hit.row.dense_ms, hit.row.imgsz) == (10.0, IMGSZ)
    forecast = hit.plan.predicted
    assert forecast.measured
    assert (forecast.present("latency"), forecast.kept("latency")) == (1.0, pytest.approx(hit.row.ratio))
    assert "measured" in str(hit.plan)
    assert Plan.from_dict(hit.plan.to_dict()).predicted == forecast


@pytest.mark.parametrize("share", [0.02, 0.1])
@pytest.mark.parametrize("law", ["slower", "faster", "in steps"])
def test_whatever_the_constraints_allow_is_found(law: str, share: float, clock: Any) -> None:
    clock(LAWS[law])
    limits = {"channels_max_removed": 0.5}
    model = models.build("yolo11-tiny")
    floor = settle(model, recipe_for(1e-3, **limits)).row
    assert floor
    assert floor.ratio
    keep = floor.ratio + share * (1 - floor.ratio)
    hit = settle(model, recipe_for(keep, **limits))
    assert hit.row
    assert hit.row.ratio == pytest.approx(keep, rel=search.TOLERANCE)


def test_noise_does_not_lead_astray(clock: Any) -> None:
    rng = np.random.default_rng(0)
    clock(lambda f: (0.3 + 0.7 * f) * (1 + 0.01 * rng.standard_normal()))
    for keep in (0.9, 0.6):
        row = settle(models.build("yolo11-tiny"), recipe_for(keep)).row
        assert row
        assert row.ratio == pytest.approx(keep, rel=search.TOLERANCE)


def test_what_cannot_be_hit_comes_as_near_as_it_can(clock: Any, caplog: pytest.LogCaptureFixture) -> None:
    clock(lambda f: 0.8 + 0.2 * f)
    model, recipe = models.build("yolo11-tiny"), recipe_for(0.6)
    hit = settle(model, recipe)
    assert hit.row
    assert hit.row.ratio
    assert 0.8 < hit.row.ratio < 0.83
    assert "is as near to 0.6 as the widths of this model allow" in caplog.text


def test_nothing_lies_between_two_widths(clock: Any, caplog: pytest.LogCaptureFixture) -> None:
    clock(lambda f: 1.0 if f > 0.62 else 0.5)
    hit = settle(models.build("yolo11-tiny"), recipe_for(0.7))
    assert hit.row
    assert hit.row.ratio == 0.5
    assert "0.500 is as near to 0.7 as the widths" in caplog.text


def begin(model: nn.Module, recipe: Recipe) -> search.Trial:
    return search.trial(model, planner.survey(model, recipe, IMGSZ), recipe, IMGSZ)


def test_before_any_work_a_target_out_of_reach_is_refused_by_what_was_measured(clock: Any) -> None:
    clock(lambda f: 0.5 + 0.5 * f)
    with pytest.raises(TargetError, match=r"target\.latency: 0\.4 of the dense.* takes 0\.5\d\d of it, as measured"):
        begin(models.build("yolo11-tiny"), recipe_for(0.4))
    assert begin(models.build("yolo11-tiny"), recipe_for(0.65)).present == 1.0


def test_a_formula_that_says_never_is_not_believed(clock: Any) -> None:
    clock(LAWS["faster"])
    limits = {"channels_max_removed": 0.5}
    model = models.build("yolo11-tiny")
    timed = begin(model, recipe_for(0.9, **limits)).timing
    assert timed
    recipe = recipe_for(0.9, **limits)
    weighed = planner.weigh(model, planner.survey(model, recipe, IMGSZ), recipe, timing=timed)
    keep = weighed.nearest("latency", 0.0).predicted.kept("latency") - 0.03
    with pytest.raises(TargetError):
        weighed.plan("latency", keep)
    found = begin(model, recipe_for(keep, **limits))
    assert found.plan.predicted.kept("latency") == pytest.approx(keep + 0.03)
    row = settle(model, recipe_for(keep, **limits)).row
    assert row
    assert row.ratio == pytest.approx(keep, rel=search.TOLERANCE)


def test_what_was_pruned_before_is_measured_first(clock: Any) -> None:
    model = thinner(0.6)
    clock(LAWS["slower"])  # 0.775 of the latency, where the formula says about 0.65
    found = begin(model, recipe_for(0.7))
    assert found.present == pytest.approx(0.6**0.5, rel=0.01)
    hit = settle(model, recipe_for(0.7))
    assert hit.row
    assert hit.row.ratio == pytest.approx(0.7, rel=search.TOLERANCE)
    assert hit.plan.predicted.present("latency") == pytest.approx(0.6**0.5, rel=0.01)
    clock(LAWS["faster"])  # 0.36
    for attempt in (begin, settle):
        with pytest.raises(NothingToRemoveError, match=r"already takes 0\.3\d\d of the dense.*as measured"):
            attempt(model, recipe_for(0.4))


def test_cuts_one_after_the_other_speak_of_one_dense_model(clock: Any) -> None:
    clock(LAWS["slower"])
    model = models.build("yolo11-tiny")
    first = settle(model, recipe_for(0.8)).plan
    models.cut(model, first)
    second = settle(model, recipe_for(0.6)).plan
    both = first.then(second).predicted
    assert both.present("latency") == 1.0
    assert both.kept("latency") == pytest.approx(0.6, rel=search.TOLERANCE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("search"), train=4)


def train(folder: Path, place: Path, source: Path | None = None, **fields: Any) -> Report:
    recipe = {
        "target": {"latency": 0.7, "format": "torch", "threads": 1},
        "channels": {"round_to": 2, "min": 2},
        "recover": {"refit": 4},
        "criterion": "magnitude",
        **fields,
    }
    model = YOLO(source or folder / "dense.pt")
    settings = {"data": str(folder / "scenes" / "scenes.yaml"), "imgsz": IMGSZ, "batch": 4, **QUICK, "epochs": 4}
    model.train(**settings, callbacks="prune", recipe=recipe, project=str(place), name="run", exist_ok=True)
    assert yolo_prune.is_pruned(model)
    return Report.load(model.trainer.save_dir)


def test_a_run(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = train(folder, tmp_path)
    assert "Optimizer stripped from" in caplog.text
    assert ".tmp" not in caplog.text.replace(str(tmp_path), "")
    assert "round 1 of 1: " in caplog.text
    row = report.rounds[0]
    assert report.status == "finished"
    assert row.target == {"latency": 0.7}
    assert row.latency
    assert row.latency.ratio == pytest.approx(0.7, rel=search.TOLERANCE)
    assert row.flops
    assert report.dense.flops
    assert row.latency.ratio == pytest.approx(0.3 + 0.7 * row.flops / report.dense.flops)  # of this very cut
    assert "torch" in row.latency.place
    assert (report.dense.latency_ms, report.pruned.latency_ms) == (row.latency.dense_ms, row.latency.ms)
    record = yolo_prune.metadata.read(YOLO(tmp_path / "run/weights/best.pt").model)  # type: ignore[arg-type]
    assert isinstance(record, Record)
    assert record.rounds[0]["keep"] == pytest.approx(row.latency.ratio)


@pytest.mark.parametrize("law", ["slower", "faster"])
def test_a_run_of_several_rounds_and_one_from_what_it_left(law: str, folder: Path, tmp_path: Path, clock: Any) -> None:
    clock(LAWS[law])
    ratios = [row.latency.ratio for row in train(folder, tmp_path, schedule={"rounds": 3}).rounds if row.latency]
    assert len(ratios) == 3
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] == pytest.approx(0.7, rel=search.TOLERANCE)
    target = {"latency": 0.6, "format": "torch", "threads": 1}
    further = train(folder, tmp_path / "further", tmp_path / "run/weights/best.pt", target=target)
    row = further.rounds[0].latency
    assert row
    assert row.ratio == pytest.approx(0.6, rel=search.TOLERANCE)
    with pytest.raises(RunError, match="leaves nothing to remove"):
        train(folder, tmp_path / "again", tmp_path / "run/weights/best.pt", target={**target, "latency": 0.8})


def test_the_command_line_shows_what_was_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["recipe.target.latency=0.8", "recipe.target.format=torch", "recipe.criterion=magnitude"]
    asked += ["recipe.channels.round_to=2", "recipe.channels.min=2"]
    arguments = [f"model={folder / 'dense.pt'}", f"imgsz={IMGSZ}", *asked]
    assert cli.main(["plan", *arguments, f"save={tmp_path / 'plan.json'}"]) == 0
    assert "measured" in capsys.readouterr().out
    kept = Plan.load(tmp_path / "plan.json").predicted.kept("latency")
    assert kept == pytest.approx(0.8, rel=search.TOLERANCE)
    assert cli.main(["apply", *arguments, f"save={tmp_path / 'cut.pt'}"]) == 0
    assert "measured" in capsys.readouterr().out
