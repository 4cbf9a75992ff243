# SPDX-License-Identifier: AGPL-3.0-or-later
"""Cuts for a latency: corrected until the model takes as long as wanted, whatever the formula says."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import pytest
from made_up_clock import Clock, install, layers, table
from small_data import IMGSZ, tiny
from small_runs import RECIPES, RUNS
from torch import nn
from ultralytics import YOLO

import yolo_prune
from yolo_prune import cli
from yolo_prune.cut.plan import Plan
from yolo_prune.cut.record import Record, read_record
from yolo_prune.data import datasets
from yolo_prune.errors import NothingToRemoveError, RunError, TargetError
from yolo_prune.latency import search, stopwatch
from yolo_prune.latency.stopwatch import Measured
from yolo_prune.measure import subjects
from yolo_prune.measure.clock import Interval
from yolo_prune.measure.subjects import Setting
from yolo_prune.planning import planner
from yolo_prune.recipe import Recipe
from yolo_prune.recipe.schema import Target
from yolo_prune.report import Report

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
    monkeypatch.setattr(datasets, "MEMORY", tmp_path / "memory")

    def set_law(law: Law) -> Clock:
        install(monkeypatch, law)
        clock: Clock = search.Stopwatch  # type: ignore[assignment]
        return clock

    set_law(LAWS["a part stays"])
    return set_law


def recipe_for(keep: float, **fields: Any) -> Recipe:
    return models.recipe(target={"latency": keep, "format": "torch"}, **{**FINE, **fields})


@functools.cache
def timing() -> Any:
    """What the formula says: to be read only."""
    return table(name="short").sums(layers("short"))


def settle(model: nn.Module, recipe: Recipe, **known: float) -> search.Hit:
    weighed = planner.weigh(model, planner.survey(model, recipe, IMGSZ), recipe, timing=timing())
    return search.settle(model, weighed, recipe.target, IMGSZ, **known)


def thinner(keep: float) -> nn.Module:
    model = models.build("short")
    models.cut(model, models.plan_of("short", target_flops=keep, **FINE))
    return model


@pytest.mark.parametrize("keep", [0.85, 0.6])
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_a_cut_is_corrected_until_it_takes_as_long_as_wanted(law: Law, keep: float, clock: Any) -> None:
    found, model = clock(law), models.build("short")
    before = models.snapshot(model)
    hit = settle(model, recipe_for(keep))
    assert models.same_bits(before, models.snapshot(model))
    assert hit.row
    assert hit.row.ratio == pytest.approx(keep, rel=search.TOLERANCE)
    assert found.asked <= 5
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
    model = models.build("short")
    floor = settle(model, recipe_for(1e-3, **limits)).row
    assert floor
    assert floor.ratio
    keep = floor.ratio + share * (1 - floor.ratio)
    hit = settle(model, recipe_for(keep, **limits))
    assert hit.row
    assert hit.row.ratio == pytest.approx(keep, rel=search.TOLERANCE)


@dataclass(frozen=True)
class Size:
    """A forecast of which only the share that is kept is known, and what was measured."""

    share: float
    dense_ms: float = 0.0
    ms_before: float = 0.0
    ms_after: float = 0.0
    measured: bool = False

    def kept(self, metric: str) -> float:
        return self.share


@dataclass(frozen=True)
class Cut:
    """A plan of which only the size of what it leaves is known."""

    hash: int
    forecast: Size

    @property
    def predicted(self) -> Size:
        return self.forecast


class Cuts:
    """A model of which only sizes are known: stands in for what weighs, cuts and times one."""

    def __init__(self, law: Law, noise: float = 0.0, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.sizes = np.sort(rng.uniform(0.25, 0.99, 200))
        self.law, self.noise, self.rng, self.timed = law, noise, rng, 0

    def present(self, metric: str) -> float:
        return 1.0

    def deepest(self, metric: str) -> Any:
        return self.nearest(metric, 0.0)

    def nearest(self, metric: str, ask: float) -> Any:
        i = max(int(np.searchsorted(self.sizes, ask, side="right")) - 1, 0)
        return Cut(i, Size(float(self.sizes[i])))

    def __call__(self, *_: object) -> Any:
        return contextlib.nullcontext(self)  # the stopwatch of this model

    def measure(self, cuts: Any) -> list[Measured]:
        self.timed += 1
        ratio = self.law(cuts[0].predicted.kept("latency")) * (1 + self.noise * self.rng.standard_normal())
        return [Measured(10.0, 10 * ratio, Interval(ratio, ratio, ratio))]

    def may_hit(self, keep: float) -> bool:
        return min(abs(self.law(size) / keep - 1) for size in self.sizes) <= 0.6 * search.TOLERANCE


def crooked(seed: int, pieces: int) -> Law:
    """Any law at all, as long as less is not slower."""
    rng = np.random.default_rng(seed)
    at = np.concatenate([[0.0], np.sort(rng.random(pieces)), [1.0]])
    takes = np.concatenate([[0.05], np.sort(rng.random(pieces)), [1.0]])
    return lambda size: float(np.interp(size, at, takes))


@pytest.mark.parametrize(
    ("laws", "noise", "most_misses"),
    [
        ([lambda f: 0.3 + 0.7 * f], 0.01, 0),
        ([lambda f, a=a: f**a for a in (0.3, 0.5, 2, 3)], 0.0, 0),
        ([lambda f, a=a: f**a for a in (0.3, 0.5, 2, 3)], 0.01, 1),
        ([crooked(seed, 1) for seed in range(30)], 0.0, 3),
        ([crooked(seed, 8) for seed in range(30)], 0.0, 9),
    ],
)
def test_what_is_there_is_found(
    laws: list[Law], noise: float, most_misses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "cut_copy", lambda model, plan: plan)
    target = Target(latency=0.5, format="torch", threads=1)
    missed = asked = tried = 0
    for seed, law in enumerate(laws * (30 // len(laws))):
        for keep in (0.35, 0.5, 0.65, 0.8, 0.9):
            cuts: Any = Cuts(law, noise, seed)
            if cuts.may_hit(keep):
                monkeypatch.setattr(search, "Stopwatch", cuts)
                row = search.settle(nn.Identity(), cuts, target, IMGSZ, keep).row
                assert row
                assert row.ratio
                missed += abs(row.ratio / keep - 1) > search.TOLERANCE
                asked, tried = asked + 1, tried + cuts.timed
    assert asked > 50
    assert missed <= most_misses
    assert tried / asked < 4


def test_what_cannot_be_hit_comes_as_near_as_it_can(clock: Any, caplog: pytest.LogCaptureFixture) -> None:
    clock(lambda f: 0.8 + 0.2 * f)
    model, recipe = models.build("short"), recipe_for(0.6)
    hit = settle(model, recipe)
    assert hit.row
    assert hit.row.ratio
    assert 0.8 < hit.row.ratio < 0.83
    assert "not 0.6 (within 3%), because the allowed widths of this model permit no other cut" in caplog.text


def test_nothing_lies_between_two_widths(clock: Any, caplog: pytest.LogCaptureFixture) -> None:
    clock(lambda f: 1.0 if f > 0.62 else 0.5)
    hit = settle(models.build("short"), recipe_for(0.7))
    assert hit.row
    assert hit.row.ratio == 0.5
    assert "the best cut has a latency of 0.500, not 0.7 " in caplog.text


def test_a_busy_machine_is_named(clock: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    uncertain = [Measured(10.0, 6.0, Interval(0.6, 0.55, 0.65))]
    monkeypatch.setattr(Clock, "measure", lambda *_: uncertain)
    settle(models.build("short"), recipe_for(0.6))
    assert "the measured 0.600 is uncertain (0.550 to 0.650), because the machine is busy" in caplog.text


def test_timing_goes_on_where_it_is_uncertain(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets, times = [], iter([[1.0, 2.0]] * 4 + [[1.0, 1.0]] * 6)

    def interleave(runs: Any, rounds: Any) -> list[list[float]]:
        budgets.append(len(rounds))
        return [[1.0] * 40, next(times) * 20]

    monkeypatch.setattr(stopwatch.clock, "warm_up", lambda *_, **__: 0.1)
    monkeypatch.setattr(stopwatch.clock, "interleave", interleave)
    session = SimpleNamespace(run=None, prepare=lambda image: None)
    monkeypatch.setattr(stopwatch.checkpoints, "open_model", lambda path: None)
    monkeypatch.setattr(subjects, "exported", lambda *_: None)
    monkeypatch.setattr(subjects, "session", lambda *_: session)
    timed = stopwatch.Stopwatch(nn.Identity(), "torch", Setting.of(IMGSZ))
    with timed:
        assert timed.measure([nn.Identity()])[0].ratio.median == 1.0
    assert 4 < len(budgets) < 10
    assert set(budgets) == {50}


def search_deepest(model: nn.Module, recipe: Recipe) -> float:
    """What the deepest cut takes of the dense model's latency by `LAWS["a part stays"]`."""
    graph = planner.survey(model, recipe, IMGSZ)
    timing = search.find(model, recipe.target, IMGSZ)
    deepest = planner.weigh(model, graph, recipe, timing=timing).deepest("latency")
    assert deepest
    return LAWS["a part stays"](deepest.predicted.flops_kept)


def begin(model: nn.Module, recipe: Recipe) -> search.Trial:
    return search.trial(model, planner.survey(model, recipe, IMGSZ), recipe, IMGSZ)


def test_before_any_work_a_target_out_of_reach_is_refused_by_what_was_measured(clock: Any) -> None:
    clock(lambda f: 0.5 + 0.5 * f)
    with pytest.raises(
        TargetError, match=r"target\.latency: 0\.4 of the dense.* has a measured latency of 0\.5\d\d of"
    ):
        begin(models.build("short"), recipe_for(0.4))
    assert begin(models.build("short"), recipe_for(0.65)).present == 1.0


def test_a_formula_that_says_never_is_not_believed(clock: Any) -> None:
    clock(LAWS["faster"])
    limits = {"channels_max_removed": 0.5}
    model = models.build("short")
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
    hit = settle(model, recipe_for(0.7), present=found.present)
    assert hit.row
    assert hit.row.ratio == pytest.approx(0.7, rel=search.TOLERANCE)
    assert hit.plan.predicted.present("latency") == pytest.approx(0.6**0.5, rel=0.01)
    clock(LAWS["faster"])  # 0.36
    for keep in (0.4, 0.352):  # within the tolerance is there
        with pytest.raises(NothingToRemoveError, match=r"measured latency is 0\.3\d\d of the dense.*nothing to remove"):
            begin(model, recipe_for(keep))
        with pytest.raises(NothingToRemoveError):
            settle(model, recipe_for(keep), present=0.36)


def test_what_cannot_get_any_smaller_is_refused_by_what_was_measured(clock: Any) -> None:
    clock(LAWS["slower"])
    limits = {"channels_max_removed": 0.5}
    model = models.build("short")
    models.cut(model, settle(model, recipe_for(1e-3, **limits)).plan)
    with pytest.raises(
        TargetError, match=r"0\.2 of the dense model's latency is out of reach.* has a measured latency of 0\.\d+"
    ):
        begin(model, recipe_for(0.2, **limits))
    with pytest.raises(NothingToRemoveError, match="no further cut of this model saves time"):
        settle(model, recipe_for(0.2, **limits), present=0.6)


def test_cuts_one_after_the_other_speak_of_one_dense_model(clock: Any) -> None:
    clock(LAWS["slower"])
    model = models.build("short")
    first = settle(model, recipe_for(0.8)).plan
    models.cut(model, first)
    second = settle(model, recipe_for(0.6), present=first.predicted.kept("latency")).plan
    both = first.then(second).predicted
    assert both.present("latency") == 1.0
    assert both.kept("latency") == pytest.approx(0.6, rel=search.TOLERANCE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("search"), train=4)


def train(folder: Path, place: Path, source: Path | None = None, **fields: Any) -> Report:
    target = {"latency": 0.7, "format": "torch", "threads": 1}
    model = YOLO(source or folder / "dense.pt")
    places = {"data": str(folder / "scenes" / "scenes.yaml"), "project": str(place)}
    model.train(**{**RUNS["search"], **places, "recipe": {**RECIPES["search"], "target": target, **fields}})
    assert yolo_prune.is_pruned(model)
    return Report.load(model.trainer.save_dir)


@pytest.mark.slow
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
    there = yolo_prune.load_recipe(tmp_path / "run/prune.yaml").target
    assert (there.format, there.device, there.threads, there.batch, there.quantize) == ("torch", "cpu", 1, 1, 32)
    assert report.recipe["target"] == there.model_dump(exclude_none=True)
    record = read_record(YOLO(tmp_path / "run/weights/best.pt").model)  # type: ignore[arg-type]
    assert isinstance(record, Record)
    assert record.rounds[0].keep == pytest.approx(row.latency.ratio)


@pytest.mark.slow
def test_a_run_of_several_rounds_and_one_from_what_it_left(folder: Path, tmp_path: Path, clock: Any) -> None:
    clock(LAWS["slower"])
    ratios = [row.latency.ratio for row in train(folder, tmp_path, schedule={"rounds": 3}).rounds if row.latency]
    assert len(ratios) > 1  # a round that the one before has come near enough to is left out
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] == pytest.approx(0.7, rel=search.TOLERANCE)
    target = {"latency": 0.6, "format": "torch", "threads": 1}
    further = train(folder, tmp_path / "further", tmp_path / "run/weights/best.pt", target=target)
    row = further.rounds[0].latency
    assert row
    assert row.ratio == pytest.approx(0.6, rel=search.TOLERANCE)
    with pytest.raises(RunError, match="leaves nothing to remove"):
        train(folder, tmp_path / "again", tmp_path / "run/weights/best.pt", target={**target, "latency": 0.8})


@pytest.mark.long
def test_rounds_that_have_nothing_left_to_remove_are_left_out(folder: Path, tmp_path: Path, clock: Any) -> None:
    limits = {"round_to": 2, "min": 2, "max_removed": 0.5}
    model = YOLO(folder / "dense.pt").model
    small = {"channels_max_removed": 0.5}
    deepest = search_deepest(model, recipe_for(0.5, **small))
    target = {"latency": 0.98 * deepest, "format": "torch", "threads": 1}
    report = train(folder, tmp_path, channels=limits, target=target, schedule={"rounds": 4})
    assert report.status == "finished"
    assert report.rounds[-1].latency
    assert report.rounds[-1].latency.ratio == pytest.approx(deepest, rel=0.01)


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
