# SPDX-License-Identifier: AGPL-3.0-or-later
"""Datasets as people have them: without a split, without labels, with one or four channels."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import small_data
import yaml
from small_data import IMGSZ, SHORT
from small_runs import FINE, PLAIN, QUICK
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import ROOT

import yolo_prune
from yolo_prune import cli
from yolo_prune.data import datasets
from yolo_prune.data.datasets import pixels
from yolo_prune.demo.scenes import NAMES
from yolo_prune.errors import RunError
from yolo_prune.report import Report
from yolo_prune.run.checks import check_validation_images

RECIPE: dict[str, Any] = {**PLAIN, **FINE, "target": {"flops": 0.8}, "schedule": {"rounds": 1}}


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detection dataset and an untrained model for it."""
    return small_data.tiny(tmp_path_factory.mktemp("origin"), train=6)


@pytest.fixture
def folder(origin: Path, clean_cwd: Path) -> Path:
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(origin, clean_cwd / "data"))


def described(folder: Path, **fields: Any) -> str:
    """The file of the dataset with other fields; None removes one."""
    path = folder / "scenes/scenes.yaml"
    data = {**yaml.safe_load(path.read_text(encoding="utf-8")), "path": str(folder / "scenes"), **fields}
    path.write_text(yaml.safe_dump({k: v for k, v in data.items() if v != "gone"}), encoding="utf-8")
    return str(path)


def without_labels(folder: Path) -> str:
    shutil.rmtree(folder / "scenes/labels/val")
    return described(folder)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message of a command that is refused."""
    assert cli.main(words) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def classifier(path: Path) -> Path:
    described = yaml.safe_load((ROOT / "cfg/models/11/yolo11-cls.yaml").read_text(encoding="utf-8"))
    path.with_suffix(".yaml").write_text(
        yaml.safe_dump({**described, "nc": 2, "scales": {"n": described["scales"]["n"]}})
    )
    model = YOLO(path.with_suffix(".yaml"))
    module: Any = model.model
    module.names = {0: "a", 1: "b"}
    model.save(path)
    return path


# ---- splits ------------------------------------------------------------------------------------------------------


def test_a_classification_dataset_without_val_is_validated_on_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, model = small_data.make("classify", tmp_path), classifier(tmp_path / "one.pt")
    shutil.copy(model, tmp_path / "two.pt")
    words = ["compare", str(model), str(tmp_path / "two.pt"), f"data={data}", "imgsz=64", f"save={tmp_path / 'c.html'}"]
    (data / "val").rename(data / "test")
    assert len(datasets.validation_set(YOLO(model), data, IMGSZ)) == 4
    assert cli.main(words) == 0
    capsys.readouterr()
    emptied(data, "classify")  # the folders of the classes remain
    shutil.rmtree(data / "test")
    (data / "val/a").mkdir(parents=True)
    message = f"data={data} has no images in its split 'val'"
    assert message in said(capsys, *words)
    assert message in said(capsys, "bench", f"model={model}", f"data={data}", "imgsz=64", "format=torch")
    assert cli.main(["plan", f"model={model}", f"data={data}", "imgsz=64", "recipe.target.flops=0.9"]) == 0


def cut(model: Path, path: Path) -> Path:
    """A pruned copy of a model."""
    loaded = YOLO(model)
    yolo_prune.apply(loaded, yolo_prune.plan(loaded, RECIPE, imgsz=IMGSZ))
    loaded.save(path)
    return path


class Stop(Exception):
    """Ends a run that is resumed."""


def interrupted(model: Path, data: str, project: Path, **settings: Any) -> Path:
    """`last.pt` of a run that was interrupted after its first epoch."""

    def stop(trainer: Any) -> None:
        raise Stop

    loaded = YOLO(model)
    loaded.add_callback("on_model_save", stop)
    with pytest.raises(Stop):
        loaded.train(data=data, project=str(project), **{**SETTINGS, "name": "first", **settings})
    return project / "first/weights/last.pt"


def emptied(data: Path, task: str) -> None:
    """Delete the validation images of a dataset."""
    for image in (data / "val" if task == "classify" else data.parent / "images/val").rglob("*.png"):
        image.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classify", "detect"])
def test_no_run_of_this_package_begins_without_validation_images(task: str, tmp_path: Path) -> None:
    data = small_data.make(task, tmp_path)
    dense = classifier(tmp_path / "dense.pt") if task == "classify" else small_data.short_checkpoint(tmp_path)
    pruned, places = cut(dense, tmp_path / "cut.pt"), {"data": str(data), "project": str(tmp_path)}
    further = {**SETTINGS, "callbacks": None}
    last = interrupted(pruned, str(data), tmp_path, callbacks=None)
    pruning = interrupted(dense, str(data), tmp_path / "pruning", recipe=RECIPE)
    emptied(data, task)
    message = r"has no images in its split 'val', and Ultralytics needs validation images in every run\."
    for again in range(2 if task == "classify" else 1):
        if again:
            shutil.rmtree(data / "val")
        with pytest.raises(RunError, match=message):
            YOLO(dense).train(recipe=RECIPE, **places, **SETTINGS)
        with pytest.raises(RunError, match=message):
            YOLO(pruned).train(**places, **further)
        for path in (last, pruning):
            with pytest.raises(RunError, match=message):
                YOLO(path).train(resume=True)
            with pytest.raises(RunError, match=message):
                YOLO(dense).train(resume=str(path))
    assert not (tmp_path / "run").exists()


def test_a_trainer_that_finds_its_own_images_is_not_asked(folder: Path) -> None:
    class Own(DetectionTrainer):
        def get_dataset(self) -> Any:
            return super().get_dataset()

    data = described(folder)
    emptied(Path(data), "detect")
    check_validation_images(Own, "detect", {"data": data})
    with pytest.raises(RunError, match="has no images in its split 'val'"):
        check_validation_images(DetectionTrainer, "detect", {"data": data})


def test_what_counts_as_a_split_with_images(folder: Path) -> None:
    images = folder / "scenes/images"
    data = described(folder, test="images/train")
    assert not datasets.lacks_images(data, "detect", "val")
    assert not datasets.lacks_images(folder / "scenes", "detect", "val")  # the folder with the file
    listed = folder / "scenes/list.txt"
    for text, lacks in (("./images/val/00000.png\r\n", False), ("\n", True)):
        listed.write_text(text)
        assert datasets.lacks_images(described(folder, val="list.txt"), "detect", "val") is lacks
        assert not datasets.lacks_images(described(folder, val=["list.txt", "images/train"]), "detect", "val")
    described(folder, val="images/val")
    emptied(Path(data), "detect")
    assert datasets.lacks_images(data, "detect", "val")
    assert not datasets.lacks_images(data, "detect", "test")
    (images / "val").rmdir()
    (images / "val").symlink_to(images / "train")
    assert not datasets.lacks_images(data, "detect", "val")
    # All that is not on this machine, or that Ultralytics will refuse by itself.
    for other in ("no.yaml", "coco.ndjson", "https://example.com/data.yaml", "ul://someone/datasets/one", "no"):
        assert not datasets.lacks_images(other, "detect", "val")
        assert not datasets.lacks_images(other, "classify", "val")


def test_an_ndjson_dataset_is_converted_as_in_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def convert(data: str, fraction: Any = 1.0, *, split: str | None = None) -> str:
        seen.append((data, fraction, split))
        return described(folder)

    monkeypatch.setattr("ultralytics.data.utils.convert_ndjson_to_yolo_if_needed", convert)
    model = YOLO(folder / "dense.pt")
    model.ckpt = {"train_args": {"fraction": 0.5}}
    assert len(datasets.validation_set(model, "scenes.ndjson", IMGSZ)) == 4
    assert len(datasets.calibration(model, "scenes.ndjson", IMGSZ, 9)) == 3
    assert seen == [("scenes.ndjson", 0.5, "val")] * 2  # one dataset, that of the training


def test_an_ndjson_dataset_that_cannot_be_converted_is_one_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(data: str, fraction: Any = 1.0, *, split: str | None = None) -> str:
        raise ModuleNotFoundError("No module named 'aiohttp'")

    monkeypatch.setattr("ultralytics.data.utils.convert_ndjson_to_yolo_if_needed", convert)
    message = r"data=scenes\.ndjson: the dataset cannot be read: No module named 'aiohttp'"
    with pytest.raises(RunError, match=message):
        datasets.validation_set(YOLO(folder / "dense.pt"), "scenes.ndjson", IMGSZ)


def test_a_split_without_images_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = f"model={folder / 'dense.pt'}"
    data = described(folder, val=None, test="images/val")
    assert "has no images in its split 'val'" in said(capsys, "bench", model, f"data={data}", "format=torch")
    data = described(folder, val="images/val", train=None)
    assert "has no images in its split 'train'" in said(capsys, "plan", model, f"data={data}")
    data = described(folder, train="images/train", val="gone")
    assert "'train' and 'val' are required" in said(capsys, "plan", model, f"data={data}")
    data = described(folder, val="images/val")
    for image in (folder / "scenes/images/val").iterdir():
        image.unlink()
    message = "has no images in its split 'val', and this command needs them"
    assert message in said(capsys, "bench", model, f"data={data}", "format=torchscript")
    shutil.copy(folder / "dense.pt", folder / "other.pt")
    words = ["compare", str(folder / "dense.pt"), str(folder / "other.pt"), f"data={data}", f"imgsz={IMGSZ}"]
    assert message in said(capsys, *words)


@pytest.mark.parametrize("val", ["images/val", ["images/val", "images/train"]])
def test_splits_may_be_lists_and_images_may_be_links(val: Any, folder: Path) -> None:
    images = folder / "scenes/images"
    images.rename(folder / "elsewhere")
    for image in (folder / "elsewhere").rglob("*.png"):
        link = images / image.relative_to(folder / "elsewhere")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(image)
    read = datasets.validation_set(YOLO(folder / "dense.pt"), described(folder, val=val), IMGSZ)
    assert len(read) == (4 if isinstance(val, str) else 10)
    assert datasets.labelled(read, "detect")


def test_a_dataset_with_more_classes_than_the_model_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = described(folder, names={i: i for i in range(7)})  # classes that are named by numbers
    message = "has 7 classes, the model 5"
    assert message in said(capsys, "plan", f"model={folder / 'dense.pt'}", f"data={data}")


# ---- labels ------------------------------------------------------------------------------------------------------


def test_validation_without_labels_is_not_measured_as_zero(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, model = without_labels(folder), folder / "dense.pt"
    shutil.copy(model, folder / "other.pt")
    words = ["compare", str(model), str(folder / "other.pt"), f"data={data}", f"imgsz={IMGSZ}"]
    assert "No validation image of data=" in said(capsys, *words)
    measurement = yolo_prune.bench(model, "torchscript", data=data, imgsz=IMGSZ, repeats=1, threads=1)
    parity = measurement.rows[0].parity
    assert parity
    assert parity.outputs is not None
    assert (parity.quality, parity.quality_torch, parity.failures) == (None, None, [])


def test_images_whose_labels_are_all_filtered_have_none(folder: Path) -> None:
    model = YOLO(folder / "dense.pt")
    for classes, labels in (([0, 1, 2, 3, 4], True), ([99], False)):
        model.ckpt = {"train_args": {"classes": classes}}
        assert datasets.labelled(datasets.validation_set(model, described(folder), IMGSZ), "detect") is labels


def test_some_images_may_lack_labels(folder: Path) -> None:
    for label in sorted((folder / "scenes/labels/val").iterdir())[1:]:
        label.write_text("")
    data = datasets.validation_set(YOLO(folder / "dense.pt"), described(folder), IMGSZ)
    assert datasets.labelled(data, "detect")


def test_training_images_without_labels_are_warned_about(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr("yolo_prune.data.datasets.LOGGER.warning", warned.append)
    message = "No training image of data="
    model = YOLO(folder / "dense.pt")
    datasets.calibration(model, described(folder), IMGSZ, 1)
    assert message not in "".join(warned)
    shutil.rmtree(folder / "scenes/labels/train")
    datasets.calibration(model, described(folder), IMGSZ, 1)
    assert message in "".join(warned)


def test_other_datasets_count_as_labelled() -> None:
    assert datasets.labelled(object(), "classify")
    assert datasets.labelled(object(), "detect")  # a user's own, whose labels are not known


SETTINGS: dict[str, Any] = {**QUICK, "imgsz": IMGSZ, "batch": 4, "epochs": 2, "name": "run", "callbacks": "prune"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "limit", [{"guard": {"max_drop": 0.1}}, {"target": {"max_drop": 0.1}}], ids=["guard", "target"]
)
def test_a_limit_on_the_drop_needs_labels(limit: dict[str, Any], folder: Path) -> None:
    places = {"data": without_labels(folder), "project": str(folder)}
    with pytest.raises(RunError, match=r"No validation image of data=.* has a label .* leave max_drop out"):
        YOLO(folder / "dense.pt").train(recipe={**RECIPE, **limit}, **places, **SETTINGS)
    assert not (folder / "run/prune.json").exists()
    assert not (folder / "run/weights/last.pt").exists()


@pytest.mark.slow
def test_a_run_without_labels_reports_no_fitness(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, model, validations = without_labels(folder), YOLO(folder / "dense.pt"), list[int]()
    model.add_callback("on_val_start", lambda validator: validations.append(1))
    model.train(recipe={**RECIPE, "measure": True}, data=data, project=str(folder), **SETTINGS)
    assert len(validations) == 3  # two epochs and the end: Ultralytics' own
    report = Report.load(folder / "run")
    assert report.status == "finished"
    assert [row.fitness for row in report.epochs_log] == [None, None]
    assert [value for _, value in report.rounds[0].fitness] == [None] * 4
    assert (report.dense.fitness, report.pruned.fitness) == (None, None)
    assert yolo_prune.is_pruned(folder / "run/weights/best.pt")
    assert cli.main(["report", str(folder / "run"), f"data={data}"]) == 0
    assert ">0.000<" not in (folder / "run/report.html").read_text(encoding="utf-8")


# ---- channels ----------------------------------------------------------------------------------------------------


def with_channels(folder: Path, channels: int) -> tuple[Path, str]:
    """A model for images of this many channels, and the dataset with such images."""
    for path in list((folder / "scenes/images").rglob("*.png")):
        picture = cv2.imread(str(path))
        assert picture is not None
        planes = [np.ascontiguousarray(picture[..., i % 3]) for i in range(channels)]
        path.unlink()
        if channels == 1:
            cv2.imwrite(str(path), planes[0])
        else:
            cv2.imwritemulti(str(path.with_suffix(".tiff")), planes)
    model = YOLO(folder / "tiny.yaml")
    args = model.model.args
    module: Any = DetectionModel({**SHORT, "nc": len(NAMES)}, ch=channels, verbose=False)
    module.args, module.names, model.model = args, dict(enumerate(NAMES)), module
    model.save(folder / "channels.pt")
    return folder / "channels.pt", described(folder, channels=channels)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_have_the_channels_of_the_model(channels: int, folder: Path) -> None:
    model, data = with_channels(folder, channels)
    exported = YOLO(model).export(format="torchscript", imgsz=IMGSZ)
    images = folder / "scenes/images/val"
    assert yolo_prune.parity(model, exported, images, imgsz=IMGSZ).failures == []
    read, trained_on = pixels(images, IMGSZ, channels), datasets.validation_set(YOLO(model), data, IMGSZ)
    for i, path in enumerate(sorted(images.iterdir())):
        assert Path(trained_on.im_files[i]) == path
        np.testing.assert_allclose(read[i], trained_on[i]["img"].numpy() / 255, atol=1e-6)
    plan = yolo_prune.plan(model, {**RECIPE, "criterion": {"name": "taylor", "images": 2}}, data=data, imgsz=IMGSZ)
    assert plan
    with pytest.raises(RunError, match=rf"must be \(n, {channels}, height, width\) here, not \(2, 3, 64, 64\)"):
        yolo_prune.parity(model, exported, np.zeros((2, 3, IMGSZ, IMGSZ), np.float32), imgsz=IMGSZ)


def test_an_image_with_other_channels_is_named(folder: Path) -> None:
    picture = folder / "scenes/images/val/00000.png"
    assert pixels(picture, IMGSZ).shape == (1, 3, IMGSZ, IMGSZ)
    assert pixels(picture, IMGSZ, 1).shape == (1, 1, IMGSZ, IMGSZ)
    with pytest.raises(RunError, match=r"00000.png' has 3 channels, and the model takes 4"):
        pixels(picture, IMGSZ, 4)


def test_a_dataset_with_other_channels_is_refused(folder: Path) -> None:
    data = described(folder, channels=1)
    with pytest.raises(RunError, match=r"has images of 1 channels, the model takes 3\. Set 'channels: 3'"):
        datasets.calibration(YOLO(folder / "dense.pt"), data, IMGSZ, 1)
