# SPDX-License-Identifier: AGPL-3.0-or-later
"""Checkpoints of other times and other makers: earlier Ultralytics are pruned, the rest is refused with the remedy."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import zoo
from torch import nn
from ultralytics.nn.tasks import load_checkpoint

import yolo_prune
from yolo_prune.api import open_model
from yolo_prune.errors import RunError, UnsupportedModelError

# Written by these releases themselves (thin models with random weights, compressed); fields were added, classes moved.
OLD = sorted((Path(__file__).parent / "checkpoints").glob("*.pt.gz"))
WIDE_OPEN = {"channels.round_to": 1, "channels.min": 1}


@pytest.mark.parametrize("packed", OLD, ids=lambda p: p.name.removesuffix(".pt.gz"))
def test_a_checkpoint_of_an_earlier_release_is_pruned_and_saved(packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    model = open_model(path)
    plan = yolo_prune.plan(model, "half-flops", imgsz=64, **WIDE_OPEN)
    proof = yolo_prune.apply(model, plan)
    assert proof
    assert proof.error < 1e-10
    model.save(tmp_path / "cut.pt")
    cut, _ = load_checkpoint(tmp_path / "cut.pt")
    assert yolo_prune.is_pruned(cut)
    assert cut(torch.rand(1, 3, 64, 64))[0].shape[0] == 1
    cut.args = zoo.get_cfg()
    cut.train().requires_grad_(True)
    loss = cut.loss(zoo.batch(cut, "yolov8"))[0].sum()
    loss.backward()
    assert torch.isfinite(loss)


def test_there_are_old_checkpoints() -> None:
    assert [p.name.removesuffix(".pt.gz") for p in OLD] == ["8.0.0", "8.0.100", "8.2.0", "8.3.0"]


def test_a_quantized_model_is_refused_with_the_two_steps() -> None:
    model = models.build("yolov8-tiny")
    model.model[3].quantizer = type("TensorQuantizer", (nn.Module,), {})()
    with pytest.raises(UnsupportedModelError, match=r"quantized.*Prune the checkpoint.*then train.*quantize=8"):
        yolo_prune.plan(model, "half-flops", imgsz=64)


def test_a_quantized_checkpoint_is_refused_where_it_cannot_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("modelopt", "modelopt.torch", "modelopt.torch.opt"):
        monkeypatch.setitem(sys.modules, name, None)  # as where nvidia-modelopt is not installed
    path = tmp_path / "qat.pt"
    state = {"modelopt": {}, "ranges": {}}
    torch.save({"model": models.build("yolov8-tiny").half(), "train_args": {}, "modelopt": state}, path)
    with pytest.raises(
        UnsupportedModelError, match=r"qat\.pt' cannot be loaded here.*from which it was quantized instead"
    ):
        open_model(path)


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [("SAM", "yolo26n-seg"), ("NAS", r"yolo26n\.pt"), ("FastSAM", r"Open the same file with YOLO")],
)
def test_models_that_ultralytics_only_predicts_with_are_refused(kind: str, remedy: str) -> None:
    model: Any = type(kind, (), {"model": models.shared("yolov8-tiny")})()
    with pytest.raises(UnsupportedModelError, match=rf"Ultralytics cannot train {kind} models.*{remedy}"):
        yolo_prune.plan(model, "half-flops")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("yolov8-rtdetr.yaml", "RTDETR"), ("yolov8-worldv2.yaml", "YOLOWorld"), ("yoloe-11.yaml", "YOLOE")],
)
def test_every_kind_of_model_object_can_be_cut_saved_and_opened_again(name: str, kind: str, tmp_path: Path) -> None:
    model = open_model(name)
    assert type(model).__name__ == kind
    yolo_prune.apply(model, yolo_prune.plan(model, "gentle", imgsz=64))
    assert model.ckpt
    assert model.ckpt["model"] is model.model
    model.save(tmp_path / "rtdetr-cut.pt" if kind == "RTDETR" else tmp_path / "cut.pt")
    (again,) = map(open_model, tmp_path.iterdir())
    assert type(again).__name__ == kind
    assert yolo_prune.is_pruned(again)


def test_fastsam_is_refused_as_the_class_it_is() -> None:
    from ultralytics import NAS, SAM, FastSAM

    assert {cls.__name__ for cls in (SAM, NAS, FastSAM)} == {"SAM", "NAS", "FastSAM"}


def test_a_state_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sam.pt"
    torch.save(models.shared("yolov8-tiny").state_dict(), path)
    with pytest.raises(UnsupportedModelError, match=r"holds no Ultralytics YOLO model.*'yolo train' wrote"):
        open_model(path)


@pytest.mark.parametrize("name", ["a.onnx", "a.engine", "a.torchscript", "a_openvino_model"])
def test_an_exported_model_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"cannot be pruned\. Pass a \.pt checkpoint"):
        open_model(name)


def test_a_fused_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fused.pt"
    model = models.build("yolov8-tiny").float().eval().fuse(verbose=False)
    torch.save({"model": model, "train_args": {}}, path)
    with pytest.raises(UnsupportedModelError, match=r"fused for inference.*before fuse\(\)"):
        yolo_prune.plan(path, "half-flops", imgsz=64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"'best\.pt' is empty\. Download or copy it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", r"only the pointer .* Run: git lfs pull"),
        (b"<html><body>404", r"is not a checkpoint: it begins with '<html><body>404'\. Download"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_told_by_its_content(content: bytes, message: str, clean_cwd: Path) -> None:
    Path("best.pt").write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=message):
        open_model("best.pt")


def test_other_models_of_torch_are_told_by_their_class(clean_cwd: Path) -> None:
    torch.save(models.build("yolov8-tiny"), "whole.pt")  # Ultralytics takes the attribute `model` of what is no dict
    torch.save({"model": nn.Linear(2, 2), "epoch": -1}, "other.pt")
    for name, kind in {"whole.pt": "Sequential", "other.pt": "Linear"}.items():
        with pytest.raises(UnsupportedModelError, match=rf"'{name}' holds a {kind}, which is no model of Ultralytics"):
            open_model(name)


def test_a_path_that_cannot_be_opened_is_told_with_the_right_one(clean_cwd: Path) -> None:
    Path("runs/weights").mkdir(parents=True)
    with pytest.raises(RunError, match=r"'runs' is a folder\. Pass a checkpoint\.$"):
        open_model("runs")
    Path("runs/weights/best.pt").touch()
    with pytest.raises(RunError, match=r"'runs' is a folder\. Pass a checkpoint: runs/weights/best\.pt\."):
        open_model("runs")
    with pytest.raises(RunError, match=r"'best\.PT'\. Rename it"):
        open_model("best.PT")
