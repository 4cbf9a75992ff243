# SPDX-License-Identifier: AGPL-3.0-or-later
"""Folders that refuse a part of writing, and results that cannot go where they should."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_data
from small_runs import RECIPES, RUNS
from ultralytics import YOLO

import yolo_prune
from yolo_prune import cli
from yolo_prune.cut.plan import Plan
from yolo_prune.demo import scenes
from yolo_prune.env import outputs
from yolo_prune.env.files import write_text
from yolo_prune.errors import OutputError
from yolo_prune.measure.subjects import Setting
from yolo_prune.report import Report
from yolo_prune.report.measurement import Measurement
from yolo_prune.run.claim import Claim

RUN: dict[str, Any] = {**RUNS["resume"], "recipe": RECIPES["resume"]}
OPTIONAL = ("chmod", "fchmod", "fsync", "link", "replace")
"""Functions of `os` that a folder may refuse: mounted buckets, exFAT and network shares do."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a dense model and a finished run, which started from it."""
    made = small_data.tiny(tmp_path_factory.mktemp("outputs"), train=8)
    train(made, made)
    return made


def train(folder: Path, project: Path, model: str = "dense.pt", **settings: Any) -> None:
    data = {"data": str(folder / "scenes/scenes.yaml"), "project": str(project)}
    YOLO(folder / model).train(**{**RUN, **data, **settings})


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the whole process, everything optional is refused."""

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    for name in OPTIONAL:
        monkeypatch.setattr(os, name, refuse)


def refuse_in(monkeypatch: pytest.MonkeyPatch, *places: Path, code: int = errno.ENOSPC) -> None:
    """No file in these folders can be written."""
    stock = Path.open

    def refuse(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode[0] in "wxa" and any(path.parent == place.resolve() for place in places):
            raise OSError(code, os.strerror(code), str(path))
        return stock(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)


def run(*words: str) -> None:
    assert cli.main(words) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("refusing")
def test_a_whole_run_is_written_into_a_folder_that_refuses_all_that_is_optional(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path)
    assert Report.load(tmp_path / "run").status == "finished"
    weights = tmp_path / "run/weights"
    assert yolo_prune.is_pruned(weights / "best.pt")
    assert sorted(path.name for path in weights.iterdir()) == ["best.pt", "last.pt", "round1.pt"]
    assert (tmp_path / "run/report.html").stat().st_size > 10_000
    data = {"data": str(folder / "scenes/scenes.yaml"), "project": str(tmp_path), "name": "further"}
    YOLO(weights / "best.pt").train(**{**RUNS["resume"], "callbacks": None, **data, "epochs": 1})
    assert yolo_prune.is_pruned(tmp_path / "further/weights/best.pt")


@pytest.mark.slow
@pytest.mark.usefixtures("refusing", "clean_cwd")
@pytest.mark.parametrize(
    ("command", "written"),
    [
        ("plan model={dense} imgsz=64 save=plan.json", "plan.json"),
        ("apply model={dense} data={data} imgsz=64 save=cut.pt", "cut.pt"),
        ("bench model={dense} format=torchscript imgsz=64 repeats=2 save=bench.json", "bench.json"),
        ("profile model={dense} format=torch imgsz=64", "profile.json"),
        ("report {run} save=page.html", "page.html"),
        ("compare {dense} {run}/weights/best.pt data={data} imgsz=64", "compare.html"),
        ("schema save=schema.json", "schema.json"),
    ],
)
def test_a_command_writes_into_a_folder_that_refuses_all_that_is_optional(
    command: str, written: str, folder: Path
) -> None:
    names = {"dense": folder / "dense.pt", "data": folder / "scenes/scenes.yaml", "run": folder / "run"}
    run(*command.format(**names).split())
    assert Path(written).stat().st_size > 900
    assert list(Path().iterdir()) == [Path(written)]


@pytest.mark.usefixtures("refusing")
def test_a_dataset_is_drawn_into_a_folder_that_refuses_all_that_is_optional(tmp_path: Path) -> None:
    for images in (2, 3):  # the second one replaces the first one
        assert scenes.make_dataset(tmp_path / "scenes", train=images, val=1, imgsz=64).is_file()
    assert len(list((tmp_path / "scenes/images/train").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


@pytest.mark.usefixtures("refusing")
def test_a_folder_that_cannot_delete_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "unlink", os.replace)  # which is refused
    outputs.check(tmp_path / "plan.json")
    for text in ("old", "new"):
        assert outputs.deliver(tmp_path / "plan.json", lambda path, text=text: write_text(path, text)).is_file()
    assert (tmp_path / "plan.json").read_text() == "new"
    Claim(tmp_path).release()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize(
    "words",
    [
        ["plan", "model=nowhere.pt", "save={}/plan.json"],
        ["apply", "model=nowhere.pt", "save={}/cut.pt"],
        ["apply", "model={}/nowhere.pt"],
        ["bench", "model=nowhere.pt", "save={}/bench.json"],
        ["profile", "model=nowhere.pt", "save={}/profile.json"],
        ["compare", "a.pt", "b.pt", "data=x.yaml", "save={}/page.html"],
        ["schema", "save={}/schema.json"],
        ["demo", "folder={}/new/demo"],
    ],
)
def test_a_place_that_cannot_be_written_is_told_before_the_work(
    words: list[str], code: int, clean_cwd: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = clean_cwd if words[-1].startswith("model=") else clean_cwd / "full"
    place.mkdir(exist_ok=True)
    refuse_in(monkeypatch, place, code=code)
    assert cli.main([word.format(place) for word in words]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(f"yolo-prune {words[0]}: ")
    assert err.endswith(f": {os.strerror(code)}. Choose another folder.\n")
    assert "nowhere-pruned.pt" in err or str(place) in err


@pytest.mark.slow
def test_a_report_is_not_begun_if_its_page_cannot_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse_in(monkeypatch, folder / "run", code=errno.EROFS)
    assert cli.main(["report", str(folder / "run"), "data=nowhere.yaml"]) == 1
    assert f"'{folder / 'run' / 'report.html'}' cannot be written: Read-only" in capsys.readouterr().err


def test_a_folder_or_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"'.*' is a folder\. Pass the name of a file"):
        outputs.check(tmp_path)
    with pytest.raises(OutputError, match=r"plan.json' cannot be written: '.*file' is not a folder"):
        outputs.check(tmp_path / "file/plan.json")
    with pytest.raises(OutputError, match=r"cannot be written: File name too long"):
        outputs.check(tmp_path / f"{'n' * 300}/plan.json")
    with pytest.raises(OutputError, match=r"MB of free space, and 10{11}\.0 MB are needed"):
        outputs.check(tmp_path / "plan.json", size=10**17)
    outputs.check(tmp_path / "new/folder/plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write protected files")
def test_a_protected_file_is_not_replaced(tmp_path: Path) -> None:
    write_text(tmp_path / "plan.json", "mine").chmod(0o444)
    with pytest.raises(OutputError, match="it is protected"):
        outputs.check(tmp_path / "plan.json")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder."""
    (tmp_path / "home").mkdir()
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    return tmp_path / "home"


def filling(result: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, *places: Path) -> Callable[..., Any]:
    """A function that also fills the disks of these folders, after it was called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        made = result(*args, **kwargs)
        refuse_in(monkeypatch, *places)
        return made

    return call


def test_a_result_goes_to_the_first_folder_that_can_be_written(
    clean_cwd: Path, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outputs.LOGGER, "propagate", True)
    full = clean_cwd / "full"
    (clean_cwd / "a.txt").write_text("mine")

    def write(path: Path) -> None:
        write_text(path, "result")

    assert outputs.deliver(full / "a.txt", write) == full / "a.txt"
    refuse_in(monkeypatch, full)
    assert outputs.deliver(full / "a.txt", write) == clean_cwd / "a-2.txt"
    assert (clean_cwd / "a.txt").read_text() == "mine"
    assert (clean_cwd / "a-2.txt").read_text() == "result"
    assert caplog.messages[-1].endswith(
        f"yolo-prune: '{full / 'a.txt'}' could not be written: No space left on device. The result is in "
        f"'{clean_cwd / 'a-2.txt'}' instead."
    )
    refuse_in(monkeypatch, full, clean_cwd)
    assert outputs.deliver(full / "a.txt", write) == home / "a.txt"
    refuse_in(monkeypatch, full, clean_cwd, home)
    with pytest.raises(OutputError, match=r"'.*a\.txt' could not be written: No space left.*so the result is lost"):
        outputs.deliver(full / "a.txt", write)


def test_a_file_name_that_is_taken_by_a_folder_gets_a_number(clean_cwd: Path) -> None:
    Path("a.txt").mkdir()
    assert outputs.deliver("a.txt", lambda path: write_text(path, "result")) == Path("a-2.txt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "made", "load"),
    [
        ("plan model={dense} imgsz=64 save={full}/out.json", "yolo_prune.planning.planner.plan_for", Plan.load),
        ("apply model={dense} imgsz=64 save={full}/out.pt", "yolo_prune.api.apply", yolo_prune.is_pruned),
        (
            "bench model={dense} format=torch imgsz=64 repeats=2 save={full}/out.json",
            "yolo_prune.measure.benchmark.measure_models",
            Measurement.load,
        ),
        (
            "profile model={dense} format=torch imgsz=64 save={full}/out.json",
            "yolo_prune.latency.target.measured",
            lambda path: Path(path).stat().st_size,
        ),
        (
            "compare {dense} {run}/weights/best.pt data={data} imgsz=64 save={full}/out.html",
            "yolo_prune.pages.evaluate.validate_once",
            lambda path: Path(path).stat().st_size,
        ),
        (
            "report {run} save={full}/out.html",
            "yolo_prune.pages.evaluate.photographs",
            lambda path: Path(path).stat().st_size,
        ),
    ],
)
def test_a_disk_that_gets_full_during_the_work_does_not_lose_the_result(
    command: str,
    made: str,
    load: Callable[[str], Any],
    folder: Path,
    clean_cwd: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    full = clean_cwd / "full"
    full.mkdir()
    module, _, name = made.rpartition(".")
    stock = getattr(__import__(module, fromlist=[name]), name)
    monkeypatch.setattr(made, filling(stock, monkeypatch, full))
    names = {"dense": folder / "dense.pt", "data": folder / "scenes/scenes.yaml", "run": folder / "run", "full": full}
    assert cli.main(command.format(**names).split()) == 1
    (kept,) = (path for path in clean_cwd.iterdir() if path != full)
    assert f"The result is in '{kept}' instead." in caplog.text
    assert f"saved {kept}" in capsys.readouterr().out
    assert load(str(kept))
    assert list(full.iterdir()) == []


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's folder for temporary files."""
    folder = tmp_path / "small"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_temporary_files_go_where_there_is_space(
    clean_cwd: Path, home: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with outputs.scratch() as made:
        assert Path(made).parent == small
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage(p)._replace(free=10**6) if Path(p) == small else usage(p))
    with outputs.scratch() as made:
        assert Path(made).parent == clean_cwd
    refuse_in(monkeypatch, clean_cwd)
    with outputs.scratch() as made:
        assert Path(made).parent == home
    refuse_in(monkeypatch, clean_cwd, home)
    with pytest.raises(OutputError, match=r"no folder with 4 MB of free space.*TMPDIR"):
        outputs.scratch()


@pytest.mark.slow
def test_a_measurement_needs_no_space_in_the_usual_temporary_folder(
    folder: Path, clean_cwd: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_in(monkeypatch, small)
    measurement = yolo_prune.bench(
        [folder / "dense.pt", folder / "run/weights/best.pt"],
        format=["torchscript"],
        imgsz=64,
        repeats=2,
        data=folder / "scenes/scenes.yaml",
    )
    assert not measurement.failed
    assert list(small.iterdir()) == list(clean_cwd.iterdir()) == []


def test_the_space_for_a_measurement_is_checked_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(place)._replace(free=10**6))
    with pytest.raises(OutputError, match="There is no folder with"):
        yolo_prune.bench(folder / "dense.pt", format="torch", imgsz=Setting.of(64).imgsz)
