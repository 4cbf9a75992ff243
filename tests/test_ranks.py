# SPDX-License-Identifier: AGPL-3.0-or-later
"""Two processes that train one model: real workers, started by Ultralytics' own launcher."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_data
from small_runs import RECIPES, RUNS
from ultralytics.nn.tasks import load_checkpoint

from yolo_prune.cut.record import composed_plan, is_pruned
from yolo_prune.report import Report

RUN = RUNS["ranks"]
PRUNE: dict[str, Any] = {"callbacks": "prune", "recipe": RECIPES["ranks"]}
PARENT = """
import json, os, sys
from cpu_ranks import CpuRanks
from ultralytics import YOLO
model, arguments = sys.argv[1], json.loads(sys.argv[2])
model = YOLO(model)
fail_in = arguments.pop("fail_in", None)

def weights(trainer):
    total = sum(p.detach().double().abs().sum().item() for p in trainer.model.parameters())
    os.write(1, f"epoch {trainer.epoch}: weights {total!r}\\n".encode())  # one piece: the other rank writes, too

def fail(trainer):
    if trainer.epoch == fail_in:
        raise RuntimeError("the power went off")

model.add_callback("on_train_batch_end", fail)
model.add_callback("on_train_epoch_end", weights)
model.train(trainer=CpuRanks, **arguments)
print("parent has", sum(p.numel() for p in model.model.parameters()))
"""


JUDGED = PARENT.replace(
    "model.train(",
    """
def judge(trainer):  # fitness is the share of the FLOPs that is left
    class Judge(type(trainer.validator)):
        def __call__(self, trainer=None, model=None):
            found = super().__call__(trainer, model)
            if trainer and found:
                found["fitness"] = trainer.pruning.cost[0] / trainer.pruning.report.dense.flops
            return found

    trainer.validator.__class__ = Judge

model.add_callback("on_pretrain_routine_end", judge)
model.train(""",
)


def launch(model: Path, arguments: dict[str, Any], script: str = PARENT) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(model), json.dumps(arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data.tiny(tmp_path_factory.mktemp("ranks"), train=18, val=6)


def parameters(path: Path) -> int:
    return sum(p.numel() for p in load_checkpoint(path)[0].parameters())


@pytest.fixture(scope="module")
def pruned(folder: Path) -> tuple[Path, str]:
    """A finished run of two ranks, and what the parent printed."""
    done = launch(folder / "dense.pt", {**RUN, **PRUNE, **places(folder), "name": "pruned"})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "pruned", done.stdout + done.stderr


def places(folder: Path) -> dict[str, str]:
    return {"data": str(folder / "scenes/scenes.yaml"), "project": str(folder)}


@pytest.mark.slow
def test_two_ranks_prune_alike_and_the_parent_gets_the_result(pruned: tuple[Path, str]) -> None:
    run, log = pruned
    held = re.findall(r"rank 0 holds plan (\w+), model (\w+); rank 1 holds plan (\w+), model (\w+)", log)
    assert len(held) == 2, log
    assert all((a, b) == (c, d) for a, b, c, d in held)
    report = Report.load(run)
    assert report.status == "finished"
    assert report.pruned.flops / report.dense.flops <= 0.6
    best = run / "weights/best.pt"
    plan = composed_plan(load_checkpoint(best)[0])
    assert plan
    assert plan.masks  # cuts and zeros
    assert f"parent has {parameters(best)}" in log
    assert report.pruned.params == parameters(best) < parameters(run.parent / "dense.pt")


@pytest.mark.long
def test_two_ranks_score_with_a_class_of_the_user(folder: Path) -> None:
    """Each of them checks the class before the run, and may import it because the parent may."""
    criterion = {"name": "torch_pruning", "importance": "cpu_ranks:Largest", "images": 2}
    arguments = {**RUN, "callbacks": "prune", "recipe": {**RECIPES["ranks"], "criterion": criterion}, **places(folder)}
    done = launch(folder / "dense.pt", {**arguments, "name": "own"})
    assert done.returncode == 0, done.stderr[-3000:]
    held = re.findall(
        r"rank 0 holds plan (\w+), model (\w+); rank 1 holds plan (\w+), model (\w+)", done.stdout + done.stderr
    )
    assert len(held) == 2
    assert all((a, b) == (c, d) for a, b, c, d in held)
    assert is_pruned(load_checkpoint(folder / "own/weights/best.pt")[0])


@pytest.mark.long
def test_a_pruned_model_stays_pruned_on_two_ranks(pruned: tuple[Path, str], folder: Path) -> None:
    best = pruned[0] / "weights/best.pt"
    again = launch(best, {**RUN, **places(folder), "epochs": 1, "name": "again"})
    assert again.returncode == 0, again.stderr[-3000:]
    assert parameters(folder / "again/weights/best.pt") == parameters(best)
    before, after = (composed_plan(load_checkpoint(path)[0]) for path in (best, folder / "again/weights/best.pt"))
    assert before == after  # which has the zeros that still are zero


@pytest.mark.long
def test_two_ranks_resume_and_end_alike(pruned: tuple[Path, str], folder: Path) -> None:
    failed = launch(folder / "dense.pt", {**RUN, **PRUNE, **places(folder), "name": "broken", "fail_in": 2})
    assert failed.returncode == 1
    last = "RunError: Training on 2 devices failed: RuntimeError: the power went off"
    assert failed.stderr.strip().splitlines()[-1].endswith(last)
    resumed = launch(folder / "broken/weights/last.pt", {"resume": True})
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    found, wanted = Report.load(folder / "broken"), Report.load(pruned[0])
    assert [r.plan for r in found.rounds] == [r.plan for r in wanted.rounds]
    assert found.epochs_log == wanted.epochs_log


@pytest.mark.long
def test_two_ranks_rewind_and_shrink_alike(folder: Path) -> None:
    recipe = {
        **PRUNE["recipe"],
        "criterion": {"name": "bn_scale", "sparsity": 0.1},
        "schedule": {"rounds": 1, "start": 2},
        "recover": {"batchnorm": 1, "rewind": {"epoch": 1}, "learning_rate": "rewind"},
    }
    done = launch(folder / "dense.pt", {**RUN, **PRUNE, "recipe": recipe, **places(folder), "name": "rewound"})
    assert done.returncode == 0, done.stderr[-3000:]
    for epoch in range(4):
        one, other = re.findall(rf"epoch {epoch}: weights (\S+)", done.stdout)
        assert one == other
    assert not (folder / "rewound/weights/rewind.pt").exists()


@pytest.mark.long
def test_two_ranks_go_back_alike_from_a_round_that_cost_too_much(folder: Path) -> None:
    recipe = {
        **PRUNE["recipe"],
        "target": {"flops": 0.4},
        "schedule": {"rounds": 3, "interval": 1, "curve": "linear"},
        "guard": {"max_drop": 0.32},
        "channels": {"round_to": 1, "min": 2},
    }
    done = launch(
        folder / "dense.pt",
        {**RUN, **places(folder), "callbacks": "prune", "recipe": recipe, "name": "guarded"},
        JUDGED,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = Report.load(folder / "guarded")
    assert [row.held for row in report.rounds] == [True, False, True]
    held = re.findall(r"rank 0 holds plan (\w+), model (\w+); rank 1 holds plan (\w+), model (\w+)", done.stdout)
    assert len(held) == 3
    assert all((a, b) == (c, d) for a, b, c, d in held)
    best = folder / "guarded/weights/best.pt"
    assert report.pruned.params == parameters(best)
    assert f"parent has {parameters(best)}" in done.stdout
