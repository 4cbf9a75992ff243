# SPDX-License-Identifier: AGPL-3.0-or-later
"""Files from others: recipes and plans are data, and whatever is wrong with a file is said once and clearly."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, plan_of
from ultralytics import YOLO

import yolo_prune
from yolo_prune import cli
from yolo_prune.cut import surgery
from yolo_prune.cut.plan import Plan
from yolo_prune.env import json_files
from yolo_prune.errors import PlanError, PruneError, RecipeError, RunError
from yolo_prune.latency.profile import Table
from yolo_prune.report import Report
from yolo_prune.report.front import Front
from yolo_prune.report.measurement import Measurement

CODE = [
    "!!python/object/apply:os.system ['touch {marker}']",
    "!!python/object/new:os.system ['touch {marker}']",
    "target: !!python/name:os.system ''",
    "target: {{flops: 0.5}}\nprotect: [!!python/object/apply:subprocess.run [['touch', '{marker}']]]",
]


@pytest.mark.parametrize("text", CODE)
def test_a_recipe_runs_no_code(text: str, tmp_path: Path) -> None:
    marker = tmp_path / "was-here"
    (tmp_path / "evil.yaml").write_text(text.format(marker=marker))
    with pytest.raises(RecipeError, match="could not determine a constructor"):
        yolo_prune.load_recipe(tmp_path / "evil.yaml")
    assert not marker.exists()


def test_a_pickle_in_place_of_a_plan_is_not_unpickled(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "was-here",)

    (tmp_path / "plan.json").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(PlanError, match="not valid JSON"):
        Plan.load(tmp_path / "plan.json")
    assert not (tmp_path / "was-here").exists()


def test_a_plan_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    body = plan_of("yolo11-tiny").to_dict()
    body["keep"] = {f"model.{i}.conv.weight": {"0": "0-999999"} for i in range(1000)}
    (tmp_path / "bomb.json").write_text(json.dumps(body))
    with pytest.raises(PlanError, match="more indices than any model has channels"):
        Plan.load(tmp_path / "bomb.json")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(json_files.MAX_BYTES + 1)  # sparse
    with pytest.raises(PlanError, match="larger than 64 MiB, so it is not a plan"):
        Plan.load(tmp_path / "huge.json")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 6 * 2**20  # KiB


FILES: list[tuple[str, Callable[[Path], object], str]] = [
    ("plan.json", Plan.load, "a plan"),
    ("prune.json", Report.load, "a pruning report"),
    ("bench.json", Measurement.load, "a measurement"),
    ("front.json", lambda path: Front.load(path.parent), "the front.json of a run with a limit"),
    ("pi.json", Table.load, "a profile"),
]


@pytest.mark.parametrize(("name", "load", "what"), FILES, ids=[name for name, *_ in FILES])
def test_every_json_file_is_bounded_and_its_damage_told_with_its_name(
    name: str, load: Callable[[Path], object], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    for content in (b"", b'{"version": 1, ', b"\xff\xfe\x00", b"[" * 100_000, b"[]"):
        path.write_bytes(content)
        with pytest.raises(PruneError, match=re.escape(name)):
            load(path)
    path.write_bytes(b" " * 100)
    monkeypatch.setattr(json_files, "MAX_BYTES", 99)
    with pytest.raises(PruneError, match=rf"{name}' is larger than 0 MiB, so it is not {what}\."):
        load(path)


@pytest.mark.parametrize("load", [Plan.load, Report.load, Measurement.load, Table.load])
def test_a_name_that_no_file_can_have_is_told_as_such(load: Callable[[str], object]) -> None:
    with pytest.raises(PruneError, match="null"):
        load("a\0b.json")


@pytest.mark.parametrize("key", ["__class__", "_forward_hooks", "a.b", "forward hooks"])
def test_a_plan_sets_widths_of_blocks_and_nothing_else(key: str) -> None:
    body = plan_of("yolo11-tiny").to_dict()
    body["attributes"]["model.2"] = {key: 4}
    with pytest.raises(PlanError, match="is not a width"):
        Plan.from_dict(body)
    body["attributes"]["model.2"] = {"training": 4}
    with pytest.raises(PlanError, match="has no width 'training' here"):
        surgery.check(build("yolo11-tiny"), Plan.from_dict(body))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "model..weight", "", "model.0.conv.weight\0"])
def test_names_in_a_plan_are_tensors_of_the_model_or_refused(name: str) -> None:
    body = plan_of("yolo11-tiny").to_dict()
    body["keep"] = {name: {"0": "0-3"}}
    body["shapes"] = {name: [8, 3, 3, 3]}
    with pytest.raises(PlanError, match="this model has no '"):
        yolo_prune.apply(build("yolo11-tiny"), Plan.from_dict(body))


def test_a_plan_for_another_model_is_refused_naming_the_first_tensor_that_differs() -> None:
    model = build("yolo26-tiny").float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = plan_of("yolo11-tiny")
    state = model.state_dict()
    first = next(n for n in plan.keep if n not in state or tuple(state[n].shape) != plan.shapes[n])
    with pytest.raises(PlanError, match=rf"made for another model: .*'{first}'"):
        yolo_prune.apply(model, plan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are not, or not completely, what their names say."""
    folder = tmp_path_factory.mktemp("files")
    YOLO("yolo11n.yaml").save(folder / "good.pt")
    good = (folder / "good.pt").read_bytes()
    (folder / "half.pt").write_bytes(good[: len(good) // 2])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    torch.save({"weights": torch.zeros(3)}, folder / "foreign.pt")
    torch.save(YOLO("yolo11n.yaml").model.state_dict(), folder / "state.pt")
    return folder


@pytest.mark.parametrize("name", ["half", "empty", "text", "foreign", "state", "missing"])
def test_a_damaged_or_foreign_checkpoint_gives_one_clear_error(
    name: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = files / f"{name}.pt"
    for look in (yolo_prune.plan, yolo_prune.is_pruned):
        with pytest.raises(PruneError, match=rf"{name}\.pt'") as error:
            look(path)
        assert len(str(error.value)) < 600
    assert cli.main(["plan", f"model={path}"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert f"{name}.pt" in said


@pytest.mark.parametrize("key", ["pretrained", "distill_model", "resume"])
def test_a_damaged_checkpoint_beside_the_model_is_refused_before_a_folder_exists(
    key: str, files: Path, tmp_path: Path
) -> None:
    arguments = {} if key == "resume" else {"callbacks": "prune"}
    with pytest.raises(RunError, match=r"half\.pt' is not a complete Ultralytics checkpoint"):
        YOLO(files / "good.pt").train(
            data="coco8.yaml", project=str(tmp_path), **{key: str(files / "half.pt")}, **arguments
        )
    assert list(tmp_path.iterdir()) == []
