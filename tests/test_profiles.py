# SPDX-License-Identifier: AGPL-3.0-or-later
"""Times that are kept on a machine, and profiles that go from one machine to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
from made_up_clock import install, made_up
from small_data import IMGSZ, tiny
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel

from yolo_prune import cli
from yolo_prune.data import datasets
from yolo_prune.env.image_size import ImageSize, Rectangle
from yolo_prune.errors import BenchError
from yolo_prune.latency import probe, target
from yolo_prune.latency.layers import distinct, layers_of
from yolo_prune.latency.profile import Table, model_key
from yolo_prune.measure import subjects
from yolo_prune.measure.subjects import Setting
from yolo_prune.recipe.schema import Target

SMALL = {"criterion": "magnitude", "channels.round_to": 2, "channels.min": 2}
SETTING = Setting.of(IMGSZ, threads=1)
PLACE = target.place_of("torch", SETTING).model_dump_json()


@pytest.fixture(autouse=True)
def made_up_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is really timed, and nothing is known of other runs."""
    install(monkeypatch, lambda f: 0.3 + 0.7 * f)
    monkeypatch.setattr(subjects, "busy", lambda: 0.0)
    monkeypatch.setattr(datasets, "MEMORY", tmp_path / "memory")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("profiles"), train=4)


def test_layers_are_kept_where_models_cannot_be_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> Any:
        raise BenchError("no luck")

    monkeypatch.setattr(target, "Stopwatch", fail)
    with pytest.raises(BenchError, match="no luck"):
        target.find(models.shared("short"), Target(latency=0.8, format="torch"), IMGSZ)
    kept = Table.load(next((tmp_path / "memory").glob("latency-*.json")))
    assert set(kept.layers) == {layer.key for layer in distinct(layers_of(models.shared("short"), IMGSZ))}


def test_two_runs_at_once_keep_what_both_have_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked, others = Target(latency=0.8, format="torch"), "short-c2f"
    with monkeypatch.context() as m:  # the other run begins and ends while this one times whole models
        clock = target.Stopwatch

        def stopwatch(*arguments: Any) -> Any:
            m.undo()
            assert target.find(models.shared(others), asked, IMGSZ)
            return clock(*arguments)

        m.setattr(target, "Stopwatch", stopwatch)
        assert target.find(models.shared("short"), asked, IMGSZ)
    kept = Table.load(next((tmp_path / "memory").glob("latency-*.json")))
    for name in ("short", others):
        assert kept.missing(layers_of(models.shared(name), IMGSZ)) == []
        assert model_key(layers_of(models.shared(name), IMGSZ), IMGSZ) in kept.wholes


@pytest.mark.parametrize("what", ["torch", "ultralytics", "machine", "method"])
def test_times_of_something_else_are_not_taken(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(target, "_wholes", lambda *_: [])
    model = models.shared("short")
    first = target.measured(model, layers_of(model, IMGSZ), "torch", SETTING)
    if what == "machine":
        monkeypatch.setattr("platform.node", lambda: "another")
    elif what == "method":
        monkeypatch.setattr(target, "METHOD", target.METHOD + 1)
    else:
        found = target.installed()
        monkeypatch.setattr(target, "installed", lambda: found | {what: "another"})
    second = target.measured(model, layers_of(model, IMGSZ), "torch", SETTING)
    assert len(list((tmp_path / "memory").glob("latency-*.json"))) == 2
    assert first.place == second.place  # what users are shown


def test_times_are_kept_when_a_package_that_runs_no_layer_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    place = target.place_of("torch", SETTING)
    before, found = target._storage_path(place), target.installed()
    monkeypatch.setattr(target, "installed", lambda: found | {"torch-pruning": "another"})
    assert target._storage_path(place) == before


def test_a_profile_of_another_device(folder: Path, clean_cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"model={folder / 'dense.pt'}", f"imgsz={IMGSZ}"]
    assert cli.main(["profile", *arguments, "format=torch", "threads=1", "save=pi.json"]) == 0
    assert "saved pi.json" in capsys.readouterr().out
    small = [f"recipe.{key}={value}" for key, value in SMALL.items()]
    wanted = [*small, "recipe.target.latency=0.8", "recipe.target.profile=pi.json"]
    assert cli.main(["plan", *arguments, *wanted]) == 0
    assert "predicted" in capsys.readouterr().out
    assert cli.main(["plan", *arguments, *wanted, f"imgsz={2 * IMGSZ}"]) == 0  # the profile has a size of its own
    assert "predicted" in capsys.readouterr().out
    YOLO("yolo11n.yaml").save("other.pt")
    assert cli.main(["plan", "model=other.pt", f"imgsz={IMGSZ}", *wanted]) == 1
    error = capsys.readouterr().err
    assert "'pi.json' (torch " in error
    assert "is the profile of another model" in error
    assert "yolo-prune profile model=... format=torch" in error


def profiled(model: nn.Module, path: Path, imgsz: ImageSize = IMGSZ) -> Table:
    """A profile that is written, and read again."""
    holder = YOLO("yolo11n.yaml")
    holder.model = model
    return Table.load(target.profile(holder, "torch", Setting.of(imgsz, threads=1), path))


def test_a_profile_holds_one_model_at_one_size(tmp_path: Path) -> None:
    model = models.shared("short")
    for other, size in ((models.shared("short-c2f"), IMGSZ), (model, 2 * IMGSZ)):
        target.find(other, Target(latency=0.8, format="torch", threads=1), size)
    found = profiled(model, tmp_path / "pi.json")
    assert found.sizes() == [IMGSZ]
    assert set(found.layers) == {layer.key for layer in distinct(layers_of(model, IMGSZ))}


def test_the_size_of_a_profile_is_its_own(tmp_path: Path) -> None:
    model, path = models.shared("short"), tmp_path / "pi.json"
    asked = Target(latency=0.8, profile=str(path))
    small, large = (profiled(model, path, size) for size in (IMGSZ, 2 * IMGSZ))
    there = target.find(model, asked, 5 * IMGSZ)
    assert there
    assert there == large.timing(layers_of(model, 2 * IMGSZ), next(iter(large.wholes)))
    both = {"layers": small.layers | large.layers, "wholes": small.wholes | large.wholes}
    small.model_copy(update=both).save(path)
    assert target.find(model, asked, 2 * IMGSZ) == there
    with pytest.raises(BenchError, match=rf"imgsz {IMGSZ}, {2 * IMGSZ}, but not for the run's imgsz {3 * IMGSZ}"):
        target.find(model, asked, 3 * IMGSZ)


def test_a_profile_of_rectangles(tmp_path: Path) -> None:
    model, path, size = models.shared("short"), tmp_path / "pi.json", Rectangle(IMGSZ, 2 * IMGSZ)
    found = profiled(model, path, size)
    assert found.sizes() == [size]
    assert found.wholes
    timing = target.find(model, Target(latency=0.8, profile=str(path)), 2 * IMGSZ)  # a run trains on squares
    assert timing == found.timing(layers_of(model, size), next(iter(found.wholes)))


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("yolo26n", 3, 80),
        *(
            pytest.param(name, before, after, marks=pytest.mark.long)
            for name, before, after in (
                *(("yolo11n", 80, 3), ("yolo11n", 3, 80), ("yolo26n", 80, 3), ("yolov8n", 80, 3), ("yolov8n", 3, 80)),
                *(("yolov10n", 80, 3), ("yolov10n", 3, 80)),
            )
        ),
    ],
)
def test_a_profile_holds_for_other_classes(
    name: str, before: int, after: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "pi.json"
    profile = profiled(DetectionModel(f"{name}.yaml", nc=before, verbose=False), path)
    model = DetectionModel(f"{name}.yaml", nc=after, verbose=False)
    layers = layers_of(model, IMGSZ)
    caplog.clear()
    timing = target.find(model, Target(latency=0.8, profile=str(path)), IMGSZ)
    assert timing
    assert f"the times of {len(profile.missing(layers))} head layers are estimated" in caplog.text
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    sums = profile.completed(layers).sums(layers).total(shapes)
    exact = sum(made_up(layer, (1, 1))[0][2] for same in layers.values() for layer in same)
    assert sums == pytest.approx(exact, rel=0.02)
    ((whole, *_),) = profile.wholes.values()
    assert timing.total(shapes) / sums == pytest.approx(whole.measured / whole.layers, rel=0.1)  # set right as it was


def test_a_model_of_other_classes_needs_its_head_timed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, timed = Target(latency=0.8, format="torch"), []
    time = probe._time
    monkeypatch.setattr(probe, "_time", lambda layer, *more: timed.append(layer.key) or time(layer, *more))
    assert target.find(DetectionModel("yolo11n.yaml", nc=80, verbose=False), asked, IMGSZ)
    whole = len(timed)
    monkeypatch.setattr(target, "Stopwatch", None)
    assert target.find(DetectionModel("yolo11n.yaml", nc=3, verbose=False), asked, IMGSZ)
    assert 0 < len(timed) - whole < 10


def test_a_profile_of_another_body_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pi.json"
    profile = profiled(models.shared("short"), path)
    model = models.shared("short-c2f")
    with pytest.raises(BenchError, match="is the profile of another model"):
        target.find(model, Target(latency=0.8, profile=str(path)), IMGSZ)
    with pytest.raises(BenchError, match="has no times of a layer like"):
        profile.model_copy(update={"layers": {}}).completed(layers_of(model, IMGSZ))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not a profile that"),
        ('{"version": 1}', r"\(place: Field required"),
        (f'{{"place": {PLACE}, "wholes": {{"all of them": []}}}}', r"\(wholes\.all of them"),
        (f'{{"place": {PLACE}, "layers": {{"conv": []}}}}', r"\(layers\.conv"),
    ],
)
def test_a_profile_that_is_none(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "pi.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BenchError, match=message):
        Table.load(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("format=onnx,ncnn",), "a profile is for one runtime"),
        (("format=onxn",), "Did you mean 'onnx'?"),
        (("format=torch", "quantize=8"), "quantize=8 cannot be profiled"),
        (("format=torch", "half=True"), "format=torch computes in float32 on a CPU"),
        (("format=torch", "imgsz=100"), "imgsz"),
        (("format=torch", "device=0"), "device=0 is not available"),
        (("format=torch", "save=pi.txt"), ".json"),
    ],
)
def test_bad_arguments_of_profile(
    arguments: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["profile", f"model={folder / 'dense.pt'}", *arguments]) == 1
    assert message in capsys.readouterr().err
