# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a cut takes back: the schedule of the learning rate, and the weights."""

from __future__ import annotations

import csv
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import small_data
import torch
from small_runs import RECIPES, RUNS
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint

from yolo_prune.cut import surgery
from yolo_prune.cut.plan import Plan
from yolo_prune.errors import RunError
from yolo_prune.recover.rewind import Early
from yolo_prune.report import Report
from yolo_prune.run import live

RUN, RECIPE = RUNS["rewind"], RECIPES["rewind"]
SPARSE: dict[str, Any] = {"criterion": {"name": "bn_scale", "sparsity": 0.5}}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data.tiny(tmp_path_factory.mktemp("rewind"), train=8)


class Interrupted(Exception):
    """What ends some of the runs here."""


def train(folder: Path, project: Path, recover: dict[str, Any], **settings: Any) -> Path:
    """A run; returns its folder."""
    recipe = {**RECIPE, **settings.pop("recipe", {}), "recover": recover}
    places = {"data": str(folder / "scenes/scenes.yaml"), "project": str(project)}
    YOLO(folder / "dense.pt").train(**{**RUN, "recipe": recipe, **places, **settings})
    return project / "run"


def rates(run: Path) -> list[float]:
    return [float(row["lr/pg0"]) for row in csv.DictReader((run / "results.csv").open())]


@pytest.mark.parametrize("cosine", [False, True])
def test_the_learning_rates_of_a_run_begin_anew_at_each_cut(cosine: bool, folder: Path, tmp_path: Path) -> None:
    run = train(folder, tmp_path, {"batchnorm": 0, "refit": 0, "learning_rate": "rewind"}, cos_lr=cosine)
    assert rates(run) == pytest.approx([0.01, 0.0055] * 3, rel=1e-5)


def test_a_warm_up_leads_to_the_learning_rate_that_was_rewound(folder: Path, tmp_path: Path) -> None:
    recover = {"batchnorm": 0, "refit": 0, "learning_rate": "rewind"}
    run = train(folder, tmp_path, recover, warmup_epochs=3.0, warmup_bias_lr=0.0)
    warm = (1 / 6, 3 / 6, 5 / 6, 1, 1, 1)  # of six batches of warm-up, after the last batch of each epoch
    assert rates(run) == pytest.approx([0.01 * w * f for w, f in zip(warm, (1, 0.55) * 3, strict=True)], rel=1e-5)


class Watched:
    """A run, and what was seen in it.

    Attributes:
        early: the live model as the epoch to rewind to began.
        plans: of the cuts.
        after: for each cut, states of live model and average, the optimizer's, and the steps it warms up for.
        kept: whether the early weights lay in the folder in each epoch.
    """

    def __init__(self, model: YOLO, epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.plans, self.after, self.kept = model, list[Plan](), list[Any](), list[bool]()
        stock = live.cut

        def cut(trainer: Any, plan: Plan) -> None:
            self.plans.append(plan)
            stock(trainer, plan)

        def begins(trainer: Any) -> None:
            if trainer.epoch == epoch and not self.plans:
                self.early = deepcopy(trainer.model)

        def trains(trainer: Any) -> None:
            if len(self.after) < len(self.plans):
                states = (trainer.model.state_dict(), trainer.ema.ema.state_dict())
                held = [{n: t.clone() for n, t in state.items()} for state in states]
                self.after.append((*held, len(trainer.optimizer.state), trainer.ema.updates, trainer.warm_up.total))

        def ends(trainer: Any) -> None:
            self.kept.append((trainer.wdir / "rewind.pt").exists())

        monkeypatch.setattr(live, "cut", cut)
        model.add_callback("on_train_epoch_start", begins)
        model.add_callback("on_train_batch_start", trains)
        model.add_callback("on_train_epoch_end", ends)


def test_after_each_cut_the_weights_are_those_of_the_early_epoch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a dense model, and from one that was pruned before."""
    start: Path = folder / "dense.pt"
    for target, epoch in ((0.6, 1), (0.45, 2)):
        watched = Watched(YOLO(start), epoch, monkeypatch)
        recipe = {**RECIPE, "target": {"flops": target}, "recover": {"batchnorm": 0, "rewind": {"epoch": epoch}}}
        places = {"data": str(folder / "scenes/scenes.yaml"), "project": str(tmp_path), "name": str(epoch)}
        watched.model.train(**{**RUN, "warmup_epochs": 0.5, "recipe": recipe, **places})
        assert len(watched.plans) == len(watched.after) == 2
        expected = watched.early
        for plan, (trained, average, state, updates, warm) in zip(watched.plans, watched.after, strict=True):
            surgery.apply(expected, plan)
            wanted = expected.state_dict()
            assert wanted.keys() == trained.keys() == average.keys()
            for name, value in wanted.items():
                assert torch.equal(trained[name], value), name
                assert torch.equal(average[name], value), name
            assert (state, updates, warm) == (0, 2 * epoch, 2)
        assert watched.kept == [i >= epoch for i in range(6)]
        start = tmp_path / str(epoch) / "weights/best.pt"
        assert not start.with_name("rewind.pt").exists()
        monkeypatch.undo()


def test_an_interrupted_run_rewinds_and_shrinks_as_the_unbroken_one(folder: Path, tmp_path: Path) -> None:
    recover = {"batchnorm": 1, "rewind": {"epoch": 1}, "learning_rate": "rewind"}
    wanted = train(folder, tmp_path / "unbroken", recover, recipe=SPARSE)
    run = interrupted(folder, tmp_path / "a", recover, before=4, **SPARSE)
    shutil.move(run, tmp_path / "moved")
    YOLO(tmp_path / "moved/weights/last.pt").train(resume=True)
    assert_same(tmp_path / "a/run", wanted)
    again = interrupted(folder, tmp_path / "b", recover, before=1, **SPARSE)
    last = again / "weights/last.pt"
    with pytest.raises(Interrupted):
        stopping(YOLO(last), 2).train(resume=True)
    YOLO(last).train(resume=True)
    assert_same(again, wanted)


def test_without_the_early_weights_a_resumed_run_stops_before_the_cut(folder: Path, tmp_path: Path) -> None:
    run = interrupted(folder, tmp_path, {"batchnorm": 0, "rewind": {"epoch": 1}}, before=4)
    early = run / "weights/rewind.pt"
    whole = early.read_bytes()
    for damage, message in (
        (early.unlink, r"rewind\.pt', is missing\. Restore the file of this run, or start the run again"),
        (lambda: early.write_bytes(whole[: len(whole) // 2]), r"rewind\.pt', is damaged"),
        (lambda: Early({"a": torch.ones(1)}).write(early), r"are not those of this run's model"),
    ):
        damage()
        with pytest.raises(RunError, match=message):
            YOLO(run / "weights/last.pt").train(resume=True)
    early.write_bytes(whole)
    YOLO(run / "weights/last.pt").train(resume=True)
    assert Report.load(run).status == "finished"


def stopping(model: YOLO, before: int) -> YOLO:
    """The model, whose run is interrupted as an epoch is about to begin."""

    def interrupt(trainer: Any) -> None:
        if trainer.epoch == before:
            raise Interrupted

    model.add_callback("on_train_epoch_start", interrupt)
    return model


def interrupted(folder: Path, project: Path, recover: dict[str, Any], before: int, **fields: Any) -> Path:
    """The folder of a run that was interrupted as an epoch was about to begin."""
    recipe = {**RECIPE, **fields, "recover": recover}
    places = {"data": str(folder / "scenes/scenes.yaml"), "project": str(project)}
    with pytest.raises(Interrupted):
        stopping(YOLO(folder / "dense.pt"), before).train(**RUN, recipe=recipe, **places)
    return project / "run"


def assert_same(run: Path, wanted: Path) -> None:
    """Two runs ended alike, to the bit."""
    assert [r.plan for r in Report.load(run).rounds] == [r.plan for r in Report.load(wanted).rounds]
    assert rates(run) == rates(wanted)
    for name in ("best.pt", "last.pt"):
        ours, theirs = (load_checkpoint(f / "weights" / name)[0].state_dict() for f in (run, wanted))
        assert ours.keys() == theirs.keys()
        assert [n for n, t in theirs.items() if not torch.equal(ours[n], t)] == []
    assert [sorted(p.name for p in (f / "weights").iterdir()) for f in (run, wanted)] == [["best.pt", "last.pt"]] * 2
