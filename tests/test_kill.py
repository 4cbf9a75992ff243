# SPDX-License-Identifier: AGPL-3.0-or-later
"""kill -9, wherever it hurts: the resumed run ends as the unbroken one, to the last bit."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small_data
import torch
import yaml
from own_blocks import register, with_blocks
from small_runs import NEW, RECIPES, RUNS
from ultralytics import YOLO

from yolo_prune.cut.record import read_record
from yolo_prune.env.releases import load_checkpoint
from yolo_prune.report import Report

RUN: dict[str, Any] = {**RUNS["kill"], "recipe": RECIPES["kill"]}
# Where, and at which time after the start or resume. In this order every place is met in some epoch of the run.
KILLS: list[tuple[str, int]] = [
    ("in a batch", 3),  # nothing to resume yet: the run is started anew
    ("writing last.pt", 1),
    ("in a batch", 8),
    ("writing round1.pt", 1),  # the second cut: its best.pt is about to be put aside
    ("written round1.pt", 1),
    ("writing best.pt", 1),
    ("writing prune.json", 1),
    ("writing state-", 1),
    ("writing last.pt", 1),
    ("written last.pt", 1),
    ("after an optimizer step", 1),
    ("writing state-", 1),
    ("writing last.pt", 1),
    ("writing best.pt", 1),
    ("after a row of results.csv", 1),
    ("removed state-", 1),
    ("writing round2.pt", 1),  # the third cut
    ("written round2.pt", 1),
    ("written last.pt", 1),
    ("in a batch", 4),
    ("after validation", 1),
    ("writing last.pt", 1),
    ("in a batch", 9),  # in the last epoch
    ("written last.pt", 1),
    ("stripping best.pt", 1),
    ("written best.pt", 1),
    ("stripping round1.pt", 1),
    ("writing report.html", 1),
    ("stripping last.pt", 1),
]


class Zygote:
    """Runs trainings in children of one prepared process."""

    def __init__(self, folder: Path, data: str) -> None:
        self.folder, self.data = folder, data
        command = [sys.executable, "-u", str(Path(__file__).parent / "zygote.py")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder)

    def train(self, name: str, kill: tuple[str, int] | None, dense: str = "dense.pt", **settings: Any) -> int:
        """Start a run, or resume it where there is something to resume; returns the child's wait status."""
        last = self.folder / name / "weights/last.pt"
        arguments = (
            {"resume": True}
            if last.exists()
            else {
                **RUN,
                **settings,
                "data": self.data,
                "project": str(self.folder),
                "name": name,
                "exist_ok": True,
            }
        )
        model = last if last.exists() else self.folder / dense
        order = {"model": str(model), "train": arguments, "kill": kill, "log": str(self.folder / f"{name}.log")}
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(encoding="utf-8")[-3000:]


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    folder = tmp_path_factory.mktemp("kill")
    small_data.tiny(folder, train=18, **({"end2end": True, "reg_max": 1} if NEW else {}))
    zygote = Zygote(folder, str(folder / "scenes/scenes.yaml"))
    yield zygote
    zygote.process.kill()
    zygote.process.wait()


@pytest.fixture(scope="module")
def unbroken(zygote: Zygote) -> Path:
    assert zygote.train("unbroken", None) == 0, zygote.log("unbroken")
    record = read_record(load_checkpoint(zygote.folder / "unbroken/weights/best.pt")[0])
    assert record.plan.masks  # cuts and zeros
    return zygote.folder / "unbroken"


def train_killed(zygote: Zygote, name: str, kills: Iterable[tuple[str, int]], **settings: Any) -> None:
    """A run that is killed, resumed each time, and ends."""
    for kill in kills:
        status = zygote.train(name, kill, **settings)
        assert os.WIFSIGNALED(status), f"not killed {kill}: {zygote.log(name)}"
    assert zygote.train(name, None, **settings) == 0, zygote.log(name)


def rows(folder: Path) -> list[dict[str, str]]:
    table = csv.DictReader((folder / "results.csv").open())
    left_out = ("time",) if NEW else ("time", "metrics/")  # see below
    return [{k: v for k, v in row.items() if not k.strip().startswith(left_out)} for row in table]


def has_ended(folder: Path) -> bool:
    last = folder / "weights/last.pt"
    return last.exists() and load_checkpoint(last)[1].get("optimizer") is None


def assert_same_run(folder: Path, wanted: Path, rounds: int = 3) -> None:
    found, want = Report.load(folder), Report.load(wanted)
    assert found.status == "finished"
    assert [(r.number, r.epoch, r.plan) for r in found.rounds] == [(r.number, r.epoch, r.plan) for r in want.rounds]
    assert len(want.rounds) == rounds
    assert found.epochs_log == want.epochs_log
    if not NEW:  # where a validation without any hit leaves the figures of the one before
        found.rounds[-1].fitness.end = want.rounds[-1].fitness.end
    assert [r.fitness for r in found.rounds] == [r.fitness for r in want.rounds]
    assert rows(folder) == rows(wanted)
    for name in sorted(p.name for p in (wanted / "weights").glob("*.pt")):
        a, b = (load_checkpoint(f / "weights" / name)[0] for f in (folder, wanted))
        ours, theirs = read_record(a), read_record(b)
        assert (ours.plan and ours.plan.hash) == (theirs.plan and theirs.plan.hash), name
        assert ours.rounds == theirs.rounds
        for key, value in b.state_dict().items():
            assert torch.equal(a.state_dict()[key], value), f"{name}: {key}"
    assert sorted(p.name for p in (folder / "weights").iterdir()) == sorted(
        p.name for p in (wanted / "weights").iterdir()
    )


@pytest.mark.slow
def test_a_run_killed_everywhere_ends_like_an_unbroken_one(zygote: Zygote, unbroken: Path) -> None:
    for kill in KILLS:
        status = zygote.train("killed", kill)
        assert os.WIFSIGNALED(status), f"not killed {kill}: {zygote.log('killed')}"
        assert not has_ended(zygote.folder / "killed"), kill
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert zygote.train("killed", None) == 0, zygote.log("killed")
    assert has_ended(zygote.folder / "killed")
    assert_same_run(zygote.folder / "killed", unbroken)
    assert zygote.train("killed", None) != 0
    assert "belongs to a run that has ended, so there is nothing to resume" in zygote.log("killed")


@pytest.mark.long
def test_a_run_killed_at_random_moments_ends_like_an_unbroken_one(zygote: Zygote, unbroken: Path) -> None:
    moments = random.Random(4)
    for _ in range(8):
        status = zygote.train("random", ("at random", moments.randint(1500, 4500)))
        if not status:
            break
        assert os.WIFSIGNALED(status), zygote.log("random")
        if has_ended(zygote.folder / "random"):  # killed while it took its leave
            break
    else:
        assert zygote.train("random", None) == 0, zygote.log("random")
    assert_same_run(zygote.folder / "random", unbroken)


@pytest.mark.long
def test_a_warm_up_steps_as_often_as_if_it_had_not_been_killed(zygote: Zygote) -> None:
    settings: dict[str, Any] = {"epochs": 5, "warmup_epochs": 4.0, "optimizer": "AdamW", "lr0": 0.001}
    settings["recipe"] = {**RUN["recipe"], "schedule": {"rounds": 1}}
    assert zygote.train("warm", None, **settings) == 0, zygote.log("warm")
    for batch in (12, 8, 8):  # three are looked at before the first epoch: in the second, third and fourth
        status = zygote.train("warming", ("in a batch", batch), **settings)
        assert os.WIFSIGNALED(status), f"not killed: {zygote.log('warming')}"
    assert zygote.train("warming", None, **settings) == 0, zygote.log("warming")
    assert_same_run(zygote.folder / "warming", zygote.folder / "warm", rounds=1)


@pytest.mark.long
def test_early_stopping_waits_across_kills_and_is_not_forgotten(zygote: Zygote) -> None:
    recipe = {**RUN["recipe"], "schedule": {"rounds": 1, "start": 1}}
    settings: dict[str, Any] = {"epochs": 30, "patience": 3, "close_mosaic": 0, "recipe": recipe}
    assert zygote.train("stopped", None, **settings) == 0, zygote.log("stopped")
    trained = len(rows(zygote.folder / "stopped"))
    assert trained < 30, "the run did not stop early"
    batches = 5 * (trained - 2)  # two epochs before its end, while it waits
    train_killed(
        zygote,
        "waiting",
        (("in a batch", batches + 2), ("in a batch", 7), ("stripping best.pt", 1), ("written best.pt", 1)),
        **settings,
    )
    assert_same_run(zygote.folder / "waiting", zygote.folder / "stopped", rounds=1)


@pytest.mark.long
def test_a_round_with_nothing_to_remove_is_resumed_like_any_other(zygote: Zygote) -> None:
    schedule = {"rounds": 7, "interval": 1, "curve": "linear"}
    recipe = {**RUN["recipe"], "target": {"flops": 0.9}, "schedule": schedule, "channels": {"round_to": 48}}
    recipe["sparsity"] = None  # zeros would be made in every round
    settings = {"epochs": 8, "recipe": recipe}
    assert zygote.train("skipping", None, **settings) == 0, zygote.log("skipping")
    performed = len(Report.load(zygote.folder / "skipping").rounds)
    assert performed < 7, "no round was skipped"
    train_killed(zygote, "skipped", (("in a batch", 28), ("in a batch", 8)), **settings)
    assert "continues from last.pt alone" not in zygote.log("skipped")
    assert_same_run(zygote.folder / "skipped", zygote.folder / "skipping", rounds=performed)


@pytest.mark.long
def test_rounds_that_look_at_data_and_refit_are_resumed_to_the_bit(zygote: Zygote) -> None:
    recipe = {
        **RUN["recipe"],
        "criterion": {"name": "fisher", "images": 4},
        "schedule": {"rounds": 2, "start": 1, "interval": 2},
        "recover": {"refit": 4},
    }
    settings: dict[str, Any] = {"epochs": 5, "recipe": recipe}
    assert zygote.train("fitted", None, **settings) == 0, zygote.log("fitted")
    train_killed(
        zygote,
        "refitted",
        (("in a batch", 8), ("writing round1.pt", 1), ("written last.pt", 1), ("in a batch", 3)),
        **settings,
    )
    assert_same_run(zygote.folder / "refitted", zygote.folder / "fitted", rounds=2)


# Fitness is about the share of the FLOPs that is left: some rounds hold, others do not.
LIMITS: dict[str, tuple[dict[str, Any], list[tuple[str, int]]]] = {
    "search": (
        {"target": {"max_drop": 0.3}, "schedule": {"rounds": 3, "interval": 2}},
        [
            ("written round0.pt", 1),
            ("in a batch", 12),
            ("writing front.json", 1),
            ("written front.json", 1),
            ("written best.pt", 1),
            ("writing state-", 1),
            ("writing last.pt", 1),
            ("written last.pt", 1),
            ("in a batch", 9),
        ],
    ),
    "guard": (
        {
            "target": {"flops": 0.5},
            "schedule": {"rounds": 3, "interval": 2, "curve": "linear"},
            "guard": {"max_drop": 0.15},
        },
        [
            ("written front.json", 1),
            ("written last.pt", 1),
            ("in a batch", 8),
            ("written last.pt", 2),
            ("written best.pt", 1),
            ("writing front.json", 1),
            ("stripping last.pt", 1),
        ],
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", LIMITS)
def test_a_run_with_a_limit_goes_the_same_way_however_often_it_is_killed(zygote: Zygote, kind: str) -> None:
    fields, kills = LIMITS[kind]
    recipe = {**RUN["recipe"], **fields, "sparsity": None}  # a search has no zeros
    settings: dict[str, Any] = {"epochs": 8, "warmup_epochs": 1.0, "recipe": recipe}
    assert zygote.train(f"{kind}-whole", None, **settings) == 0, zygote.log(f"{kind}-whole")
    whole = Report.load(zygote.folder / f"{kind}-whole")
    assert {row.held for row in whole.rounds} == {True, False}
    train_killed(zygote, f"{kind}-killed", kills, **settings)
    assert "continues from last.pt alone" not in zygote.log(f"{kind}-killed")
    killed = zygote.folder / f"{kind}-killed"
    assert_same_run(killed, zygote.folder / f"{kind}-whole", rounds=len(whole.rounds))
    assert (killed / "front.json").read_text() == (zygote.folder / f"{kind}-whole/front.json").read_text()


@pytest.mark.long
def test_rounds_that_rewind_are_resumed_to_the_bit(zygote: Zygote) -> None:
    recipe = {
        **RUN["recipe"],
        "criterion": {"name": "bn_scale", "sparsity": 0.1},
        "schedule": {"rounds": 2, "start": 2, "interval": 1},
        "recover": {"batchnorm": 1, "rewind": {"epoch": 1}, "learning_rate": "rewind"},
    }
    settings: dict[str, Any] = {"epochs": 4, "warmup_epochs": 1.0, "recipe": recipe}
    assert zygote.train("rewound", None, **settings) == 0, zygote.log("rewound")
    train_killed(
        zygote,
        "rewinding",
        (
            ("writing rewind.pt", 1),
            ("in a batch", 3),
            ("writing round0.pt", 1),
            ("written last.pt", 1),
            ("in a batch", 8),
            ("writing last.pt", 1),
        ),
        **settings,
    )
    assert_same_run(zygote.folder / "rewinding", zygote.folder / "rewound", rounds=2)


@pytest.mark.long
def test_a_run_over_blocks_of_users_is_resumed_to_the_bit(zygote: Zygote) -> None:
    """By chance they leave branches out, add constants, refuse images and widths; one of them stays as it is."""
    register()
    names = zygote.folder / "blocks.yaml"
    names.write_text(yaml.safe_dump({**with_blocks(), "nc": 5}))
    torch.manual_seed(0)
    YOLO(names).save(zygote.folder / "blocks.pt")
    recipe = {**RUN["recipe"], "sparsity": None, "schedule": {"rounds": 2, "start": 1, "interval": 2}}
    settings: dict[str, Any] = {"dense": "blocks.pt", "epochs": 5, "recipe": recipe}
    assert zygote.train("own", None, **settings) == 0, zygote.log("own")
    train_killed(
        zygote,
        "owned",
        (("in a batch", 8), ("writing round1.pt", 1), ("written last.pt", 1), ("in a batch", 3)),
        **settings,
    )
    assert_same_run(zygote.folder / "owned", zygote.folder / "own", rounds=2)
    best = load_checkpoint(zygote.folder / "owned/weights/best.pt")[0]
    plan = read_record(best).plan
    assert plan.opaque.keys() == {"model.11"}
    assert plan.opaque["model.11"].startswith(
        "'model.11' (KnowsItsWidth) does not work with fewer channels: ValueError"
    )
    widths = {type(block).__name__: block.a.out_channels for block in best.model[7:12] if hasattr(block, "a")}
    assert widths.pop("KnowsItsWidth") == 128
    assert max(widths["DropPath"], widths["OnlySquares"]) < 128
