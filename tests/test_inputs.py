# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a run reads is still there after it, also if it lies where the run, or an export, writes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_data
import yaml
from small_runs import RECIPES, RUNS
from ultralytics import YOLO

import yolo_prune
from yolo_prune import cli
from yolo_prune.errors import RunError
from yolo_prune.report import Report
from yolo_prune.run import inputs

RUN: dict[str, Any] = {**RUNS["resume"], "recipe": RECIPES["resume"]}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data.tiny(tmp_path_factory.mktemp("inputs"), train=8)


@pytest.fixture
def weights(folder: Path, tmp_path: Path) -> Path:
    """The folder of weights of an earlier run, with its dense best.pt."""
    (tmp_path / "run/weights").mkdir(parents=True)
    shutil.copy(folder / "dense.pt", tmp_path / "run/weights/best.pt")
    return tmp_path / "run/weights"


def settings(folder: Path, weights: Path, **more: Any) -> dict[str, Any]:
    places = {"data": str(folder / "scenes/scenes.yaml"), "project": str(weights.parent.parent)}
    return {**RUN, **places, **more}


def test_a_model_in_the_folder_of_the_run_is_copied_first(folder: Path, weights: Path) -> None:
    dense = (folder / "dense.pt").read_bytes()
    copies: list[bytes] = []
    model = YOLO(weights / "best.pt")
    model.add_callback("on_pretrain_routine_end", lambda _: copies.append((weights / "input-best.pt").read_bytes()))
    model.train(**settings(folder, weights))
    assert copies == [dense]
    assert yolo_prune.is_pruned(weights / "best.pt")
    assert (weights / "input-best.pt").read_bytes() == dense
    assert Report.load(weights.parent).model == str(weights / "input-best.pt")
    assert yaml.safe_load((weights.parent / "args.yaml").read_text())["model"] == str(weights / "input-best.pt")

    pruned = (weights / "best.pt").read_bytes()
    YOLO(weights / "best.pt").train(**settings(folder, weights, recipe={**RUN["recipe"], "target": {"flops": 0.4}}))
    assert (weights / "input-best.pt").read_bytes() == dense
    assert (weights / "input-best-2.pt").read_bytes() == pruned


def test_a_copy_is_made_once(folder: Path, weights: Path) -> None:
    shutil.copy(weights / "best.pt", weights / "input-best.pt")
    YOLO(weights / "best.pt").train(**settings(folder, weights))
    YOLO(weights / "input-best.pt").train(**settings(folder, weights))
    assert sorted(path.name for path in weights.iterdir()) == ["best.pt", "input-best.pt", "last.pt", "round1.pt"]


def test_a_link_to_the_folder_of_the_run_is_followed(folder: Path, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.pt").symlink_to(weights / "best.pt")
    YOLO(tmp_path / "mine.pt").train(**settings(folder, weights))
    assert (weights / "input-best.pt").read_bytes() == (folder / "dense.pt").read_bytes()


def test_a_file_that_a_new_run_deletes_is_copied(folder: Path, weights: Path) -> None:
    (weights / "best.pt").rename(weights / "round1.pt")
    YOLO(weights / "round1.pt").train(**settings(folder, weights))
    assert (weights / "input-round1.pt").read_bytes() == (folder / "dense.pt").read_bytes()


def test_a_pruned_model_that_is_trained_further_in_its_own_folder_is_copied(folder: Path, weights: Path) -> None:
    YOLO(folder / "dense.pt").train(**settings(folder, weights))
    pruned = (weights / "best.pt").read_bytes()
    given = {k: v for k, v in settings(folder, weights, epochs=1).items() if k not in ("callbacks", "recipe")}
    YOLO(weights / "best.pt").train(**given)
    assert (weights / "input-best.pt").read_bytes() == pruned
    assert yolo_prune.is_pruned(weights / "best.pt")


def test_a_resumed_run_copies_nothing(folder: Path, weights: Path) -> None:
    class Killed(Exception):
        pass

    def kill(trainer: Any) -> None:
        if trainer.epoch == 1:
            raise Killed

    model = YOLO(folder / "dense.pt")
    model.add_callback("on_model_save", kill)
    with pytest.raises(Killed):
        model.train(**settings(folder, weights))
    YOLO(weights / "last.pt").train(resume=True)
    assert not list(weights.glob("input-*.pt"))


def test_a_teacher_in_the_folder_of_the_run_teaches_from_its_copy(folder: Path, weights: Path) -> None:
    model = YOLO(weights / "best.pt")
    model.train(**settings(folder, weights, recipe={**RUN["recipe"], "recover": {"distill": True, "refit": 0}}))
    assert model.trainer
    assert model.trainer.args.distill_model == str(weights / "input-best.pt")
    assert (weights / "input-best.pt").read_bytes() == (folder / "dense.pt").read_bytes()


def test_a_model_cut_in_memory_is_not_exported_over_the_dense_one(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "dense.pt", tmp_path / "best.pt")
    dense = Path(YOLO(tmp_path / "best.pt").export(format="torchscript", imgsz=64))
    content = dense.read_bytes()
    for name in ("best-pruned.torchscript", "best-pruned.torchscript"):
        model = YOLO(tmp_path / "best.pt")
        yolo_prune.apply(model, yolo_prune.plan(model, RECIPES["resume"], imgsz=64))
        assert Path(model.export(format="torchscript", imgsz=64)) == tmp_path / name
    assert dense.read_bytes() == content
    model.save(tmp_path / "best-pruned.pt")  # its export is of this file from now on
    model = YOLO(tmp_path / "best.pt")
    yolo_prune.apply(model, yolo_prune.plan(model, RECIPES["resume"], imgsz=64))
    assert Path(model.export(format="torchscript", imgsz=64)) == tmp_path / "best-pruned-2.torchscript"


def test_a_model_cut_in_memory_can_be_taught_by_the_file_it_is_from(folder: Path, weights: Path) -> None:
    model = YOLO(folder / "dense.pt")
    yolo_prune.apply(model, yolo_prune.plan(model, RECIPES["resume"], imgsz=64))
    recipe = {**RUN["recipe"], "target": {"flops": 0.4}, "recover": {"distill": True, "refit": 0}}
    model.train(**settings(folder, weights, recipe=recipe))
    assert model.trainer
    assert model.trainer.args.distill_model == str(folder / "dense.pt")


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_apply_does_not_write_onto_its_own_input_through_a_link(
    link: Any, folder: Path, clean_cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(folder / "dense.pt", "dense.pt")
    link("dense.pt", "linked.pt")
    assert cli.main(["apply", "model=dense.pt", "save=linked.pt", "imgsz=64"]) == 1
    assert "save=linked.pt would overwrite the model itself" in capsys.readouterr().err
    assert Path("dense.pt").read_bytes() == (folder / "dense.pt").read_bytes()


def test_a_result_is_written_through_a_link(folder: Path, clean_cwd: Path) -> None:
    Path("real.json").touch()
    Path("plan.json").symlink_to("real.json")
    assert cli.main(["plan", f"model={folder / 'dense.pt'}", "imgsz=64", "save=plan.json"]) == 0
    assert Path("plan.json").is_symlink()
    assert yolo_prune.Plan.load("real.json")


def test_a_run_on_several_devices_refuses_to_delete_what_it_reads(folder: Path, weights: Path, tmp_path: Path) -> None:
    """Ultralytics deletes the folder of such a run before the processes begin."""
    args = SimpleNamespace(resume=None, model=str(weights / "best.pt"), pretrained=True)
    trainer = SimpleNamespace(args=args, wdir=weights, save_dir=weights.parent, ddp=True)
    with pytest.raises(RunError, match=r"model=.*best\.pt is in the folder of this run.*would be deleted"):
        inputs.protect(trainer)
    inputs.protect(SimpleNamespace(**{**vars(trainer), "wdir": tmp_path / "other/weights"}))
    assert [path.name for path in weights.iterdir()] == ["best.pt"]
