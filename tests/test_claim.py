# SPDX-License-Identifier: AGPL-3.0-or-later
"""Two runs do not write into one folder."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_data
from small_runs import RECIPES, RUNS
from ultralytics import YOLO

from yolo_prune.errors import RunError
from yolo_prune.report import Report
from yolo_prune.run import claim, trainer
from yolo_prune.run.claim import Claim

fcntl = pytest.importorskip("fcntl", reason="folders are not protected on Windows")

HOLD = """
import os, sys, time
from pathlib import Path
from yolo_prune.run.claim import Claim
held = Claim(Path(sys.argv[1]))
print("held", flush=True)
if "fork" in sys.argv and not os.fork():
    print(os.getpid(), flush=True)
    time.sleep(60)
sys.stdin.read()
"""


def test_a_folder_is_claimed_by_one_process_until_it_ends(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=r"Another run is writing into .*give this run another name="):
            Claim(tmp_path)
        other.kill()
    mine = Claim(tmp_path)
    mine.release()
    mine.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork processes")
def test_a_process_for_images_that_outlives_a_killed_run_does_not_hold_the_folder(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), "fork"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        child = int(other.stdout.readline())
        other.kill()
        other.wait()
        try:
            assert Claim(tmp_path)
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_run_that_cannot_begin_frees_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = small_data.tiny(tmp_path, train=4)
    monkeypatch.setattr(trainer.inputs, "protect", fail)
    for _ in range(2):
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            YOLO(folder / "dense.pt").train(
                **RUNS["resume"],
                data=str(folder / "scenes/scenes.yaml"),
                project=str(tmp_path),
                recipe=RECIPES["resume"],
            )


def test_a_folder_that_cannot_lock_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(claim.fcntl, "flock", refuse)
    claims = [Claim(tmp_path), Claim(tmp_path), Claim(tmp_path / "missing")]
    assert not any(claims)
    for each in claims:
        each.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_second_run_is_refused_and_the_first_one_ends_well(tmp_path: Path) -> None:
    folder = small_data.tiny(tmp_path, train=8)
    settings = {**RUNS["resume"], "data": str(folder / "scenes/scenes.yaml"), "project": str(tmp_path)}
    refused, run = [], tmp_path / "run"

    def second(_: Any) -> None:
        if not refused:
            before = (run / "args.yaml").read_text()
            with pytest.raises(RunError) as caught:
                YOLO(folder / "dense.pt").train(**{**settings, "epochs": 5}, recipe=RECIPES["resume"])
            refused.append(str(caught.value))
            assert (run / "args.yaml").read_text() == before

    model = YOLO(folder / "dense.pt")
    model.add_callback("on_train_epoch_end", second)
    for _ in range(2):  # afterwards the folder is free again
        model = model if not refused else YOLO(folder / "dense.pt")
        model.train(**settings, recipe=RECIPES["resume"])
        assert Report.load(run).status == "finished"
    assert refused[0].startswith("Another run is writing into")
    assert not (run / claim.FILE).exists()
