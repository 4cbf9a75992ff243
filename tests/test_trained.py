# SPDX-License-Identifier: AGPL-3.0-or-later
"""The settings that a checkpoint stores hold wherever the model is validated, measured or cut."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from small_data import IMGSZ, SHORT
from ultralytics import YOLO
from ultralytics.engine.model import Model
from ultralytics.utils import DEFAULT_CFG_DICT

import yolo_prune
from yolo_prune import api, cli
from yolo_prune.data import datasets
from yolo_prune.demo.scenes import NAMES, make_dataset
from yolo_prune.env import trained
from yolo_prune.env.image_size import Rectangle
from yolo_prune.errors import RunError
from yolo_prune.pages import run_page
from yolo_prune.report import Figures, Report

RECIPE = {"target": {"flops": 0.7}, "channels": {"round_to": 2, "min": 2}, "criterion": {"name": "taylor", "images": 4}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_dataset(tmp_path_factory.mktemp("data") / "scenes", train=6, val=4, imgsz=IMGSZ))


def checkpoint(path: Path, **arguments: Any) -> Path:
    """An untrained model that stores these arguments of a training."""
    single = arguments.get("single_cls", False)
    path.with_suffix(".yaml").write_text(yaml.safe_dump({**SHORT, "nc": 1 if single else len(NAMES)}))
    torch.manual_seed(0)
    model = YOLO(path.with_suffix(".yaml"))
    module: Any = model.model
    module.names = {0: "item"} if single else dict(enumerate(NAMES))
    model.ckpt = {"train_args": {**DEFAULT_CFG_DICT, "imgsz": IMGSZ, **arguments}}
    model.save(path)
    return path


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "single.pt", single_cls=True)


@pytest.mark.parametrize(
    ("stored", "size"),
    [
        (96, 96),
        ("96", 96),
        (70, 96),
        ([64, 96], Rectangle(64, 96)),
        ([40, 40], 64),
        (None, 640),
        (0, 640),
        (9000, 9024),  # Ultralytics has no limit
    ],
)
def test_the_stored_image_size_is_taken_as_a_model_needs_it(stored: Any, size: Any, tmp_path: Path) -> None:
    model = YOLO(checkpoint(tmp_path / "model.pt", imgsz=stored))
    assert trained.size(model) == size


def test_the_size_of_a_run_is_one_that_exports_can_have() -> None:
    sizes = (320, 100, [64, 90], 9000, None)
    assert [trained.usable(Report(imgsz=size).imgsz) for size in sizes] == [320, 128, (64, 96), 9024, 640]


def test_a_stored_image_size_has_no_limit_in_any_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = YOLO(checkpoint(tmp_path / "large.pt", imgsz=9000))
    assert (
        cli.main(["plan", f"model={tmp_path / 'large.pt'}", "recipe.target.flops=0.8", "recipe.criterion=magnitude"])
        == 0
    )
    assert "at imgsz 9024" in capsys.readouterr().out
    yolo_prune.apply(model, yolo_prune.plan(model, {**RECIPE, "criterion": "magnitude"}))
    model.save(tmp_path / "cut.pt")
    assert cli.main(["show", f"model={tmp_path / 'cut.pt'}"]) == 0
    assert "at imgsz 9024" in capsys.readouterr().out
    assert cli.main(["plan", f"model={tmp_path / 'large.pt'}", "imgsz=9024"]) == 1  # mistyped, perhaps
    assert "must be a multiple of 32 between 32 and 8192" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ({"fraction": 0.05}, {"fraction": 1.0}, []),
        ({"fraction": [0.05, 1.0]}, {"fraction": 0.5}, []),
        ({"fraction": [1.0, 0.5]}, {"fraction": 1.0}, ["fraction (0.5, 1.0)"]),
        ({"fraction": [1.0]}, {}, []),
        ({"fraction": 0.05, "split": "train"}, {"fraction": 1, "split": "train"}, ["fraction (0.05, 1.0)"]),
        ({"overlap_mask": False, "mask_ratio": 2}, {}, []),
    ],
)
def test_only_settings_with_an_effect_on_the_validation_differ(
    first: dict[str, Any], second: dict[str, Any], told: list[str]
) -> None:
    models = [YOLO("yolo11n.yaml") for _ in range(2)]
    for model, stored in zip(models, (first, second), strict=True):
        model.ckpt = {"train_args": {**DEFAULT_CFG_DICT, **stored}}
    assert trained.differences(models) == told


def test_settings_of_masks_have_an_effect_in_segmentation() -> None:
    models = [YOLO("yolo11n-seg.yaml") for _ in range(2)]
    models[0].ckpt = {"train_args": {"overlap_mask": False}}
    assert trained.differences(models) == ["overlap_mask (False, True)"]


def test_a_module_stores_its_arguments_itself() -> None:
    module = torch.nn.Identity()
    assert trained.size(module) == trained.SIZE
    for arguments in ({"imgsz": 96, "classes": [1]}, SimpleNamespace(imgsz=96, classes=[1])):
        module.args = arguments  # type: ignore[assignment]
        assert trained.size(module) == 96
        assert trained.settings(module) == {"classes": [1]}


def test_a_model_that_was_never_trained_has_the_defaults() -> None:
    model = YOLO("yolo11n.yaml")
    assert trained.settings(model) == {}
    assert trained.size(model) == DEFAULT_CFG_DICT["imgsz"] == 640


def test_labels_are_read_as_in_training(single: Path, data: str, tmp_path: Path) -> None:
    def classes(model: Path) -> set[float]:
        return {
            float(c) for item in datasets.calibration(YOLO(model), data, IMGSZ, 6).items for c in item["cls"].flatten()
        }

    assert len(classes(checkpoint(tmp_path / "all.pt"))) > 2
    assert classes(checkpoint(tmp_path / "some.pt", classes=[1, 2])) == {1, 2}
    assert classes(single) == {0}


def test_the_loss_has_the_weights_of_the_training(data: str, tmp_path: Path) -> None:
    model = YOLO(checkpoint(tmp_path / "model.pt", box=3.5, mosaic=0.2, augment=True, rect=True, batch=7))
    settings = datasets.calibration(model, data, IMGSZ, 1).settings
    assert (settings.box, settings.rect, settings.augment, settings.batch) == (3.5, False, False, 1)


def test_the_images_of_the_training_are_used(data: str, tmp_path: Path) -> None:
    half = YOLO(checkpoint(tmp_path / "half.pt", fraction=0.5))
    assert len(datasets.calibration(half, data, IMGSZ, 99)) == 3
    assert len(datasets.validation_set(half, data, IMGSZ)) == 4
    on_train = YOLO(checkpoint(tmp_path / "train.pt", split="train"))
    assert len(datasets.validation_set(on_train, data, IMGSZ)) == 6


def test_one_shot_pruning_of_a_single_class_run(
    single: Path, data: str, capsys: pytest.CaptureFixture[str], clean_cwd: Path
) -> None:
    model = YOLO(single)
    plan = yolo_prune.plan(model, RECIPE, data=data)
    assert plan.forecast
    assert plan.forecast.imgsz == IMGSZ
    assert yolo_prune.apply(model, plan, data=data, refit=4)
    model.save("cut.pt")
    assert trained.settings(YOLO("cut.pt"))["single_cls"] is True
    assert cli.main(["show", "model=cut.pt"]) == 0
    assert f"at imgsz {IMGSZ}" in capsys.readouterr().out
    assert cli.main(["plan", f"model={single}", "recipe=gentle"]) == 0
    assert f"at imgsz {IMGSZ}" in capsys.readouterr().out


def test_an_image_size_that_is_passed_wins(single: Path) -> None:
    for imgsz in (96, "96", [96, 96]):
        forecast = yolo_prune.plan(single, "gentle", imgsz=imgsz).forecast
        assert forecast
        assert forecast.imgsz == 96


def test_other_classes_are_still_refused(data: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "single.pt", single_cls=True)
    model = YOLO(tmp_path / "single.pt")
    assert model.ckpt
    model.ckpt["train_args"]["single_cls"] = False
    with pytest.raises(RunError, match="has 5 classes, the model 1"):
        datasets.calibration(model, data, IMGSZ, 1)


@pytest.fixture
def validations(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every validation."""
    seen: list[dict[str, Any]] = []
    stock = Model.val

    def val(self: Model, *args: Any, **arguments: Any) -> Any:
        seen.append(arguments)
        return stock(self, *args, **arguments)

    monkeypatch.setattr(Model, "val", val)
    return seen


def test_bench_validates_exports_as_the_training_did(
    single: Path, data: str, validations: list[dict[str, Any]]
) -> None:
    measurement = yolo_prune.bench(single, "torchscript", data=data, repeats=1, threads=1)
    assert measurement.imgsz == IMGSZ
    assert [v["single_cls"] for v in validations] == [True, True]  # checkpoint and export
    assert [v["imgsz"] for v in validations] == [IMGSZ, IMGSZ]


def test_parity_takes_the_size_of_the_export(single: Path, data: str) -> None:
    exported = YOLO(single).export(format="torchscript")  # at the stored size, as is the default of Ultralytics
    images = Path(data).parent / "images/val"
    assert yolo_prune.parity(single, exported, images).images == 4


def test_models_of_different_sizes_are_measured_at_that_of_the_first(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr("yolo_prune.measure.subjects.LOGGER.warning", warned.append)
    larger = checkpoint(tmp_path / "larger.pt", imgsz=96)
    assert yolo_prune.bench([single, larger], "torch", repeats=1, threads=1).imgsz == IMGSZ
    assert "trained with imgsz 64 and 96. All are measured with imgsz 64" in "".join(warned)
    warned.clear()
    assert yolo_prune.bench([single, larger], "torch", imgsz=96, repeats=1, threads=1).imgsz == 96
    assert warned == []


def test_compare_says_which_settings_differ(
    single: Path,
    data: str,
    tmp_path: Path,
    validations: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    clean_cwd: Path,
) -> None:
    plain = checkpoint(tmp_path / "plain.pt", box=3.0)
    assert cli.main(["compare", str(single), str(plain), f"data={data}"]) == 0
    told = "trained and validated with different single_cls (True, False)"
    assert told in capsys.readouterr().out
    page = Path("compare.html").read_text(encoding="utf-8")
    assert told in page
    assert f"imgsz={IMGSZ}" in page
    assert [v["single_cls"] for v in validations] == [True, False]
    assert {v["imgsz"] for v in validations} == {IMGSZ}
    again = checkpoint(tmp_path / "again.pt")
    assert cli.main(["compare", str(again), str(plain), f"data={data}", "imgsz=96"]) == 0
    out = capsys.readouterr().out
    assert "different" not in out
    assert "imgsz 96" in out


def test_a_report_validates_both_models_as_the_run_did(single: Path, data: str, tmp_path: Path) -> None:
    report = Report(dense=Figures(), pruned=Figures(), arguments={"single_cls": True, "lr0": 0.1}, imgsz=IMGSZ)
    models = [api.open_model(checkpoint(tmp_path / "dense.pt")), api.open_model(single)]
    measured, photos = run_page._photos_and_classes(report, models, data, measure=True)
    assert len(photos) == 4
    assert [len(figures.classes) for figures in (measured.dense, measured.pruned)] == [1, 1]
