# SPDX-License-Identifier: AGPL-3.0-or-later
"""Tiny datasets for every task, made from the scenes that the package draws."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from ultralytics import YOLO

from yolo_prune.demo.scenes import make_dataset

IMGSZ = 64
SHORT: dict[str, Any] = {
    "backbone": [
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "C3k2", [64, False, 0.25]],
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "Conv", [128, 3, 2]],
        [-1, 1, "SPPF", [128, 5]],
        [-1, 1, "C2PSA", [128]],
    ],
    "head": [
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 3], 1, "Concat", [1]],
        [-1, 1, "C3k2", [64, True]],
        [[9], 1, "Detect", ["nc"]],
    ],
}
"""A YOLO11 with what makes up one, but a third of its layers: for what does not depend on the architecture."""
SHORT_C2F: dict[str, Any] = {
    part: [[*layer[:2], "C2f", layer[3][:1]] if layer[2] == "C3k2" else layer for layer in layers]
    for part, layers in SHORT.items()
}
"""Another one of that size."""


def tiny(folder: Path, train: int, val: int = 4, **fields: Any) -> Path:
    """A folder with a small detection dataset, `scenes`, and a small untrained model for it, `dense.pt`.

    Args:
        folder: where.
        train: number of training images.
        val: number of validation images.
        fields: of the model's YAML, instead of those of `SHORT`.
    """
    make_dataset(folder / "scenes", train=train, val=val, imgsz=IMGSZ)
    short_checkpoint(folder, **fields)
    return folder


def short_checkpoint(folder: Path, **fields: Any) -> Path:
    """The untrained model of `tiny` alone, `dense.pt`."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**SHORT, **fields, "nc": 5}))
    torch.manual_seed(0)
    YOLO(folder / "tiny.yaml").save(folder / "dense.pt")
    return folder / "dense.pt"


def make(task: str, folder: Path, train: int = 8, val: int = 4) -> Path:
    """A dataset for a task; returns what goes into `data=`."""
    source = make_dataset(folder / "detect", train=train, val=val, imgsz=IMGSZ)
    if task == "detect":
        return source
    target = folder / task
    names = yaml.safe_load(source.read_text())["names"]
    if task == "classify":
        return _classify(source.parent, target)
    shutil.copytree(source.parent / "images", target / "images")
    extra: dict[str, object] = {"names": names}
    if task in LINES:
        for path in (source.parent / "labels").rglob("*.txt"):
            rows = [line.split() for line in path.read_text().splitlines()]
            out = target / path.relative_to(source.parent)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text("".join(LINES[task](c, *map(float, box)) + "\n" for c, *box in rows))
        extra |= {"kpt_shape": [2, 3], "flip_idx": [1, 0]} if task == "pose" else {}
    elif task == "semantic":
        extra["masks_dir"] = "masks"
        _maps(target, "masks", lambda size, rng: rng.integers(0, len(names), size).astype(np.uint8))
    elif task == "depth":
        extra |= {"names": {0: "depth"}, "nc": 1, "channels": 3}
        _maps(target, "depth", lambda size, rng: rng.integers(500, 5000, size).astype(np.uint16))
    path = target / "data.yaml"
    path.write_text(yaml.safe_dump({"path": str(target), "train": "images/train", "val": "images/val", **extra}))
    return path


def _corners(x: float, y: float, w: float, h: float) -> list[float]:
    left, right, top, bottom = x - w / 2, x + w / 2, y - h / 2, y + h / 2
    return [left, top, right, top, right, bottom, left, bottom]


def _polygon(c: str, x: float, y: float, w: float, h: float) -> str:
    return " ".join([c, *(f"{min(max(v, 0), 1):.4f}" for v in _corners(x, y, w, h))])


def _keypoints(c: str, x: float, y: float, w: float, h: float) -> str:
    return f"{c} {x} {y} {w} {h} {x - w / 4:.4f} {y:.4f} 2 {x + w / 4:.4f} {y:.4f} 2"


LINES: dict[str, Callable[..., str]] = {"segment": _polygon, "obb": _polygon, "pose": _keypoints}


def _maps(target: Path, name: str, draw: Callable[[tuple[int, int], np.random.Generator], np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    for image in sorted((target / "images").rglob("*.*")):
        out = (target / name / image.relative_to(target / "images")).with_suffix(".png")
        out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw((IMGSZ, IMGSZ), rng)).save(out)


def _classify(source: Path, target: Path) -> Path:
    for split in ("train", "val"):
        for number, image in enumerate(sorted((source / "images" / split).iterdir())):
            folder = target / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, folder / image.name)
    return target
