# SPDX-License-Identifier: AGPL-3.0-or-later
"""A limit on the drop: what the next cut aims at, the way back, the search for the smallest model that holds."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made_up_clock
import models
import pytest
import small_data
import torch
from small_runs import RECIPES, RUNS
from ultralytics import YOLO
from ultralytics.utils import DEFAULT_CFG_DICT

import yolo_prune
from yolo_prune.cut import surgery
from yolo_prune.cut.record import Record, RoundFacts, read_record, student_of, write_record
from yolo_prune.data import datasets
from yolo_prune.env.releases import load_checkpoint
from yolo_prune.errors import RecipeError, RunError
from yolo_prune.planning import planner
from yolo_prune.recipe import Schedule, load_recipe
from yolo_prune.report import Report, RoundRow
from yolo_prune.run import guard, journal
from yolo_prune.run import rounds as rounds_of_a_run
from yolo_prune.run.guard import Stage
from yolo_prune.run.schedule import lay_out

START = Stage(0, 1.0, 0.6, True)


@pytest.mark.parametrize(
    ("keeps", "wanted"),
    [
        ((), 0.6),  # halfway to the floor, 0.2
        (((0.6, True),), 0.4),
        (((0.6, False),), 0.8),
        (((0.6, True), (0.4, False)), 0.5),
        (((0.6, True), (0.4, False), (0.5, False)), 0.55),
        (((0.6, False), (0.8, True)), 0.7),
    ],
)
def test_a_search_goes_halfway_between_what_held_and_what_did_not(keeps: Any, wanted: float) -> None:
    found = [START, *(Stage(i, k, 0.6, held) for i, (k, held) in enumerate(keeps, 1))]
    assert guard.next_keep(found, None, 0.2, None) == pytest.approx(wanted)


def test_a_cut_comes_nearer_to_its_aim_than_to_what_failed() -> None:
    assert guard.tolerance([START], 0.6, 0.03) == 0.03
    failed = [START, Stage(1, 0.59, 0.2, False), Stage(2, 0.2, 0.1, False)]
    assert guard.tolerance(failed, 0.6, 0.03) == pytest.approx(0.005 / 0.6)
    assert guard.tolerance([START, Stage(1, 0.3, 0.2, False)], 0.6, 0.03) == 0.03


@pytest.mark.parametrize(
    ("keeps", "planned", "wanted"),
    [
        ((), 0.7, 0.7),
        (((0.7, True),), 0.5, 0.5),
        (((0.6, False),), 0.5, 0.8),  # half of the step from 1 to 0.6
        (((0.6, False), (0.8, True)), 0.5, 0.6),  # the same step again
        (((0.6, False), (0.8, False)), 0.5, 0.9),
        (((0.7, True), (0.5, False)), 0.5, 0.6),
        (((0.7, True), (0.5, False), (0.6, True)), 0.5, 0.5),
        (((0.7, True), (0.5, False), (0.55, True)), 0.5, 0.5),  # never beyond the target
    ],
)
def test_a_step_that_was_too_much_is_halved(keeps: Any, planned: float, wanted: float) -> None:
    found = [START, *(Stage(i, k, 0.6, held) for i, (k, held) in enumerate(keeps, 1))]
    assert guard.next_keep(found, planned, 0.2, 0.5) == pytest.approx(wanted)


def test_a_drop_of_exactly_the_limit_holds() -> None:
    assert guard.holds(0.59, 0.6, 0.01)
    assert not guard.holds(0.5899, 0.6, 0.01)


def test_what_the_record_says_makes_the_stages() -> None:
    facts = [
        RoundFacts(1, "a", keep=0.7, reference=0.6, end=0.6, held=True),
        RoundFacts(3, "b", keep=0.5, reference=0.6, end=0.4, held=False),
        RoundFacts(4, "c", keep=0.6, reference=0.6),  # not yet over
    ]
    found = guard.stages(1.0, facts)
    assert [(s.number, s.held) for s in found] == [(0, True), (1, True), (3, False)]
    assert guard.last_good(found).file == "round1.pt"
    assert guard.structure_changes([f.held for f in facts]) == 4


@pytest.mark.parametrize(
    ("keeps", "over", "fails"),
    [
        (((0.6, True),), False, False),
        (((0.6, True), (0.4, False)), False, False),
        (((0.6, True), (0.5, False)), False, True),
        (((0.503, True), (0.5, False)), True, True),
    ],
)
def test_a_search_ends_where_no_other_size_is_left(keeps: Any, over: bool, fails: bool) -> None:
    found = [START, *(Stage(i, k, 0.6, held) for i, (k, held) in enumerate(keeps, 1))]
    assert guard.search_is_over(found) is over
    assert guard.is_known_to_fail(found, 0.45) is fails


def test_rows_of_rounds_that_made_the_same_plan_are_told_apart(tmp_path: Path) -> None:
    facts = [RoundFacts(n, "same", epoch=n, held=n == 1, end=n / 10) for n in (1, 2)]
    rows = [RoundRow(number=n, epoch=n, plan="same", params=n) for n in (1, 2)]
    Report(rounds=rows).save(tmp_path / "prune.json")
    trainer: Any = SimpleNamespace(save_dir=tmp_path, start_epoch=3)
    found = journal.resumed_report(trainer, load_recipe(), Record({}, rounds=tuple(facts)))
    assert [(r.params, r.held, r.fitness.end) for r in found.rounds] == [(1, True, 0.1), (2, False, 0.2)]


def test_a_search_leaves_a_third_of_the_run_to_what_it_finds() -> None:
    laid = lay_out(Schedule(), None, 30)
    assert [(r.epoch, r.settles) for r in laid] == [*((e, False) for e in (0, 4, 8, 12, 16)), (20, True)]
    assert [r.epoch for r in lay_out(Schedule(rounds=2, interval=3, start=1), None, 30)] == [1, 4, 7]
    assert [r.epoch for r in lay_out(Schedule(), None, 6)] == [0, 1, 2, 3, 4, 5]
    with pytest.raises(RecipeError, match=r"5 rounds, and an epoch to train the result, from .* at most 4 rounds fit"):
        lay_out(Schedule(), None, 5)


def test_a_model_becomes_again_what_it_was() -> None:
    dense = models.shared("yolo11-tiny")
    first = models.plan_of("yolo11-tiny", target_flops=0.8)
    once = deepcopy(dense)
    surgery.apply(once, first)
    write_record(once, Record({}, first, planner.widths(dense)))
    twice = deepcopy(once)
    second = planner.make_plan(twice, models.recipe(target_flops=0.5), models.IMGSZ)
    surgery.apply(twice, second)
    for p in twice.parameters():
        p.data.zero_()
    twice.criterion = torch.nn.CrossEntropyLoss(weight=torch.ones(5))  # which no checkpoint has
    twice.train(False)
    replaced = surgery.become(twice, once, first.then(second))
    del twice.criterion
    assert set(replaced.values()) == set(twice.parameters())
    image = torch.rand(1, 3, models.IMGSZ, models.IMGSZ, dtype=torch.float64)
    assert torch.equal(twice.eval()(image)[0], once.eval()(image)[0])
    assert repr(twice) == repr(once)  # widths that layers remember


def test_limits_that_exclude_one_another_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"  guard.max_drop: target.max_drop already sets a limit"):
        load_recipe({"target": {"max_drop": 0.01}, "guard": {"max_drop": 0.01}})
    with pytest.raises(RecipeError, match="give exactly one of flops, params, latency and max_drop"):
        load_recipe({"target": {"max_drop": 0.01, "flops": 0.5}})
    with pytest.raises(RecipeError, match=r"target\.max_drop: a training run .* finds how small the model can get"):
        yolo_prune.plan(models.shared("yolo11-tiny"), {"target": {"max_drop": 0.01}, "criterion": "magnitude"})


RUN, RECIPE = RUNS["guard"], RECIPES["guard"]


class Judge:
    """The run's validator, but fitness is the share of the FLOPs that is left: what a limit allows is known."""

    per_epoch = 0.0  # what an epoch of training costs

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __call__(self, trainer: Any = None, model: Any = None) -> Any:
        found = self.stock(trainer, model)
        if trainer:
            run = trainer.pruning
            trained = len(run.report.epochs_log) + run.epoch_open
            share = run.cost[0] / run.report.dense.flops
            found["fitness"] = share - self.per_epoch * trained
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stock, name)


def judged(trainer: Any) -> None:
    trainer.validator = Judge(trainer.validator)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data.tiny(tmp_path_factory.mktemp("guard"), train=8)


def train(folder: Path, tmp_path: Path, recipe: dict[str, Any], begins: Any = judged, **settings: Any) -> Path:
    model = YOLO(folder / "dense.pt")
    model.add_callback("on_pretrain_routine_end", begins)
    places = {"data": str(folder / "scenes/scenes.yaml"), "project": str(tmp_path)}
    model.train(**{**RUN, **places, "recipe": {**RECIPE, **recipe}, **settings})
    return tmp_path / "run"


def kept(run: Path, name: str) -> float:
    model = load_checkpoint(run / "weights" / name)[0]
    record = read_record(student_of(model))
    assert record
    dense = planner.dense_cost(model, record.plan, 64)[0]
    return planner.present_cost(model, 64)[0] / dense


@pytest.mark.slow
def test_the_smallest_model_within_the_drop_is_found_and_delivered(folder: Path, tmp_path: Path) -> None:
    run = train(folder, tmp_path, {"target": {"max_drop": 0.3}})
    report = Report.load(run)
    front = json.loads((run / "front.json").read_text())
    points = front["points"]
    assert (front["limit"], front["reference"]) == (0.3, 1.0)
    assert [p["round"] for p in points] == [0, 1, 2, 3, 4, 5]
    assert [p["held"] for p in points] == [p["flops_kept"] >= 0.7 for p in points]
    assert {True, False} == {p["held"] for p in points[1:]}
    best = min((p for p in points if p["held"]), key=lambda p: p["flops_kept"])
    assert best["delivered"]
    assert 0.7 <= best["flops_kept"] < 0.75
    assert sum(p["delivered"] for p in points) == 1
    for point in points:
        assert kept(run, Path(point["weights"]).name) == pytest.approx(point["flops_kept"], abs=1e-6), point
    assert kept(run, "best.pt") == kept(run, "last.pt") == pytest.approx(report.pruned.flops / report.dense.flops)
    assert [row.flops for row in report.epochs_log[-2:]] == [report.pruned.flops] * 2
    assert report.status == "finished"


@pytest.mark.slow
def test_cuts_for_a_latency_are_taken_back_too(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up_clock.install(monkeypatch, lambda flops: 0.3 + 0.7 * flops)
    monkeypatch.setattr(datasets, "MEMORY", tmp_path / "memory")
    target = {"latency": 0.65, "format": "torch", "threads": 1}
    run = train(folder, tmp_path, {"target": target, "schedule": {"rounds": 3}, "guard": {"max_drop": 0.45}})
    rows = Report.load(run).rounds
    assert [row.held for row in rows] == [True, False, True]
    ratios = [row.latency.ratio for row in rows if row.latency and row.latency.ratio]
    assert ratios[2] == pytest.approx((ratios[0] + ratios[1]) / 2, rel=0.04)
    assert kept(run, "best.pt") == pytest.approx((ratios[2] - 0.3) / 0.7)


@pytest.mark.slow
def test_a_round_that_costs_too_much_is_taken_back_and_half_of_it_tried_in_short_steps(
    folder: Path, tmp_path: Path
) -> None:
    taken: list[tuple[int, float]] = []

    def watch(trainer: Any) -> None:
        judged(trainer)

        def stepped(optimizer: Any, *_: Any) -> None:
            group = optimizer.param_groups[0]
            taken.append((trainer.epoch, group["lr"] / group["initial_lr"] / trainer.lf(trainer.epoch)))

        trainer.optimizer.register_step_post_hook(stepped)

    recipe = {
        "target": {"flops": 0.4},
        "schedule": {"rounds": 3, "curve": "linear", "interval": 2},
        "guard": {"max_drop": 0.32},
    }
    report = Report.load(train(folder, tmp_path, recipe, begins=watch, warmup_epochs=1.0))
    assert [round(row.target["flops"], 1) for row in report.rounds] == [0.8, 0.6, 0.7]
    assert [row.held for row in report.rounds] == [True, False, True]
    assert 0.69 < kept(tmp_path / "run", "best.pt") <= 0.7
    shares = {0: [0, 0.5], 4: [0, 0.5]}  # the run's own warm-up, and that after the second round is taken back
    expected = [(epoch, share) for epoch in range(7) for share in shares.get(epoch, [1, 1])]
    assert taken == [(epoch, pytest.approx(share)) for epoch, share in expected]


@pytest.mark.slow
@pytest.mark.parametrize(("start", "epochs"), [(0, 4), pytest.param(1, 5, marks=pytest.mark.long)])
def test_what_is_delivered_holds_also_when_the_last_round_did_not(
    folder: Path, tmp_path: Path, start: int, epochs: int, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = {
        "target": {"flops": 0.6},
        "schedule": {"rounds": 2, "curve": "linear", "interval": 2, "start": start},
        "guard": {"max_drop": 0.3},
    }
    run = train(folder, tmp_path, recipe, epochs=epochs)
    assert [row.held for row in Report.load(run).rounds] == [True, False]
    assert 0.78 < kept(run, "best.pt") == kept(run, "last.pt") <= 0.8
    assert kept(run, "round2.pt") <= 0.6
    assert kept(run, "round0.pt") == 1.0
    assert "round 2 exceeded the limit" in caplog.text


@pytest.mark.slow
def test_a_guard_that_stops_cuts_no_further(folder: Path, tmp_path: Path) -> None:
    recipe = {
        "target": {"flops": 0.4},
        "schedule": {"rounds": 3, "curve": "linear", "interval": 1},
        "guard": {"max_drop": 0.3, "on_breach": "stop"},
    }
    report = Report.load(train(folder, tmp_path, recipe, epochs=4))
    assert [row.held for row in report.rounds] == [True, False]
    assert [round(row.flops / report.dense.flops, 1) for row in report.epochs_log] == [0.8, 0.6, 0.8, 0.8]


@pytest.mark.slow
def test_a_limit_that_no_cut_stays_within_is_an_error_that_names_the_nearest(folder: Path, tmp_path: Path) -> None:
    recipe = {"target": {"max_drop": 0.001}, "schedule": {"rounds": 2, "interval": 1}}
    with pytest.raises(
        RunError, match=r"No cut stayed within a drop of 0.001: the nearest model keeps 0.\d+ .*round2.pt"
    ):
        train(folder, tmp_path, recipe, epochs=4)
    assert Report.load(tmp_path / "run").status == "failed"
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "The run ended with an error." in page
    assert "No cut stayed within a drop of 0.001" in page
    assert page.count("rolled back") >= 2
    assert (tmp_path / "run/prune.png").exists()
    points = json.loads((tmp_path / "run/front.json").read_text())["points"]
    assert [(p["held"], (tmp_path / "run" / p["weights"]).exists()) for p in points] == [
        (True, True),
        (False, True),
        (False, True),
    ]


@pytest.mark.slow
def test_a_model_that_has_nothing_to_lose_is_refused_before_it_is_cut(folder: Path, tmp_path: Path) -> None:
    places = {"data": str(folder / "scenes/scenes.yaml"), "project": str(tmp_path)}
    recipe = {**RECIPE, "target": {"max_drop": 0.01}}
    with pytest.raises(RunError, match=r"has a fitness of 0.00\d+, which is no more than the allowed drop"):
        YOLO(folder / "dense.pt").train(**{**RUN, **places, "recipe": recipe})
    assert Report.load(tmp_path / "run").rounds == []


@pytest.mark.slow
def test_what_training_before_the_first_cut_costs_counts_as_well(folder: Path, tmp_path: Path) -> None:
    def falling(trainer: Any) -> None:
        judged(trainer)
        trainer.validator.per_epoch = 0.2

    recipe = {"target": {"flops": 0.9}, "guard": {"max_drop": 0.25}, "schedule": {"rounds": 1, "start": 1}}
    with pytest.raises(RunError, match=r"No cut stayed within a drop of 0.25: .* a fitness of 0\.[67]"):
        train(folder, tmp_path, recipe, begins=falling, epochs=2)
    assert json.loads((tmp_path / "run/front.json").read_text())["reference"] == 1.0


@pytest.mark.slow
def test_a_run_that_stopped_early_and_went_back_has_ended(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"target": {"flops": 0.6}, "schedule": {"rounds": 2, "curve": "linear", "interval": 1}}
    recipe["guard"] = {"max_drop": 0.3}
    whole = train(folder, tmp_path / "whole", recipe, epochs=9, patience=2)

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(rounds_of_a_run, "check_delivers", kill)
        with pytest.raises(KeyboardInterrupt):
            train(folder, tmp_path / "killed", recipe, epochs=9, patience=2)
    model = YOLO(tmp_path / "killed/run/weights/last.pt")
    model.add_callback("on_pretrain_routine_end", judged)
    model.train(resume=True)
    lengths = [len(Report.load(folder).epochs_log) for folder in (whole, tmp_path / "killed/run")]
    assert lengths[0] == lengths[1] < 9
    assert kept(whole, "best.pt") == kept(tmp_path / "killed/run", "best.pt") > 0.75


@pytest.mark.slow
def test_a_limit_needs_validation_in_a_resumed_run_as_well(folder: Path, tmp_path: Path) -> None:
    def stop(trainer: Any) -> None:
        if trainer.epoch == 1:
            raise KeyboardInterrupt

    model = YOLO(folder / "dense.pt")
    model.add_callback("on_pretrain_routine_end", judged)
    model.add_callback("on_train_batch_end", stop)
    places = {"data": str(folder / "scenes/scenes.yaml"), "project": str(tmp_path)}
    with pytest.raises(KeyboardInterrupt):
        model.train(**{**RUN, **places, "recipe": {**RECIPE, "target": {"max_drop": 0.3}}})
    with pytest.raises(RunError, match="needs validation after each epoch"):
        YOLO(tmp_path / "run/weights/last.pt").train(resume=True, val=False)


def test_a_limit_needs_validation(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"needs validation after each epoch\. Leave val=False out"):
        train(folder, tmp_path, {"target": {"max_drop": 0.1}}, val=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif("distill_model" not in DEFAULT_CFG_DICT, reason="this Ultralytics does not distill yet")
def test_the_layers_that_lead_to_a_teacher_go_back_as_well(folder: Path, tmp_path: Path) -> None:
    recipe = {
        "target": {"flops": 0.4},
        "schedule": {"rounds": 3, "curve": "linear", "interval": 1},
        "guard": {"max_drop": 0.32},
        "recover": {**RECIPE["recover"], "distill": True},
    }
    report = Report.load(train(folder, tmp_path, recipe, epochs=4, freeze=1))
    assert [row.held for row in report.rounds] == [True, False, True]
    assert 0.69 < kept(tmp_path / "run", "best.pt") <= 0.7


@pytest.mark.long
def test_a_drop_counts_from_the_model_that_the_run_starts_from(folder: Path, tmp_path: Path) -> None:
    schedule = {"rounds": 1, "start": 0}
    first = train(folder, tmp_path / "first", {"target": {"flops": 0.8}, "schedule": schedule}, epochs=1)
    model = YOLO(first / "weights/best.pt")
    model.add_callback("on_pretrain_routine_end", judged)
    recipe = {**RECIPE, "target": {"max_drop": 0.2}, "schedule": {"rounds": 3, "interval": 1}}
    places = {"data": str(folder / "scenes/scenes.yaml"), "project": str(tmp_path / "second")}
    model.train(**{**RUN, **places, "recipe": recipe, "epochs": 4})
    front = json.loads((tmp_path / "second/run/front.json").read_text())
    assert front["reference"] == pytest.approx(0.8, abs=0.01)
    assert front["points"][0]["flops_kept"] == pytest.approx(0.8, abs=0.01)
    assert front["points"][0]["params_kept"] is None
    delivered = next(p for p in front["points"] if p["delivered"])
    assert front["reference"] - 0.2 <= delivered["flops_kept"] < 0.75
    assert kept(tmp_path / "second/run", "best.pt") == pytest.approx(delivered["flops_kept"], abs=1e-6)
    assert kept(tmp_path / "second/run", "round0.pt") == pytest.approx(0.8, abs=0.01)


def test_a_record_without_what_a_verdict_needs_is_refused() -> None:
    judged = RoundFacts(1, "a", keep=None, reference=0.6, end=0.6, held=True)
    with pytest.raises(RunError, match=r"record of this run is damaged: a round has no 'keep'.*start the run again"):
        guard.stages(1.0, [judged])
