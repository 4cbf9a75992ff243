# SPDX-License-Identifier: AGPL-3.0-or-later
"""The synthetic dataset: the same bytes for the same seed, correct boxes, whole or absent."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from yolo_prune.demo import scenes
from yolo_prune.demo.scenes import NAMES, draw_scene, make_dataset
from yolo_prune.errors import PruneError


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path in `folder`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "scenes", train=6, val=3, imgsz=96).parent


def test_the_same_seed_gives_the_same_bytes(dataset: Path, tmp_path: Path) -> None:
    np.random.seed(7)  # the global state is neither read nor changed
    state = np.random.get_state()[1].copy()
    again = make_dataset(tmp_path / "again", train=6, val=3, imgsz=96).parent
    assert digest(again) == digest(dataset)
    assert (np.random.get_state()[1] == state).all()


def test_another_seed_and_another_split_give_other_images(dataset: Path, tmp_path: Path) -> None:
    other = digest(make_dataset(tmp_path / "other", train=6, val=3, imgsz=96, seed=1).parent)
    images = [*digest(dataset / "images").values(), *(v for k, v in other.items() if k.endswith("png"))]
    assert len(set(images)) == 18


def test_a_larger_dataset_begins_with_the_smaller(dataset: Path, tmp_path: Path) -> None:
    larger = digest(make_dataset(tmp_path / "larger", train=7, val=3, imgsz=96).parent)
    small = {k: v for k, v in digest(dataset).items() if k != scenes.STAMP_NAME}
    assert small.items() <= larger.items()


def test_layout_and_yaml(dataset: Path) -> None:
    found = yaml.safe_load((dataset / "scenes.yaml").read_text())
    assert found == {"train": "images/train", "val": "images/val", "names": dict(enumerate(NAMES))}
    for split, count in (("train", 6), ("val", 3)):
        names = [f"{index:05d}" for index in range(count)]
        assert sorted(p.stem for p in (dataset / "images" / split).iterdir()) == names
        assert sorted(p.stem for p in (dataset / "labels" / split).iterdir()) == names
    assert cv2.imread(str(dataset / "images/train/00000.png")).shape == (96, 96, 3)


def test_ultralytics_reads_it_wherever_it_lies(dataset: Path, tmp_path: Path, clean_cwd: Path) -> None:
    from ultralytics.data.utils import check_det_dataset, verify_image_label

    moved = tmp_path / "moved"
    shutil.copytree(dataset, moved)
    data = check_det_dataset(str(moved / "scenes.yaml"))
    assert Path(data["train"]) == moved / "images/train"
    image, label = moved / "images/train/00000.png", moved / "labels/train/00000.txt"
    _, boxes, _, _, _, missing, found, empty, corrupt, message = verify_image_label(
        (str(image), str(label), "", False, len(NAMES), 0, 0, False)
    )
    assert (missing, found, empty, corrupt, message) == (0, 1, 0, 0, "")
    assert len(boxes) == len(label.read_text().splitlines())


def test_every_kind_occurs_and_every_box_lies_inside() -> None:
    boxes = [box for index in range(20) for box in draw_scene(96, (0, 0, index))[1]]
    assert {box[0] for box in boxes} == set(range(len(NAMES)))
    for _, x, y, w, h in boxes:
        assert 0 <= x - w / 2
        assert 0 <= y - h / 2
        assert x + w / 2 <= 1
        assert y + h / 2 <= 1
        assert 2 * scenes.SIZES[0] * 0.7 < max(w, h) < 2 * scenes.SIZES[1] * 1.1


def test_boxes_hug_the_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    painted: list[np.ndarray] = []
    paint = scenes._paint

    def spy(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray, kind: int | None = None) -> None:
        if kind is not None:
            painted.append(mask)
        paint(rng, image, mask, kind)

    monkeypatch.setattr(scenes, "_paint", spy)
    _, boxes = draw_scene(128, (3, 0, 0))
    assert len(boxes) == len(painted) >= 2
    for (_, x, y, w, h), mask in zip(boxes, painted, strict=True):
        left, top, width, height = cv2.boundingRect((mask > 127).astype(np.uint8))
        assert np.allclose((x * 128, y * 128), (left + width / 2, top + height / 2))
        assert np.allclose((w * 128, h * 128), (width, height))


def test_a_complete_dataset_is_reused_and_a_broken_one_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "scenes"
    make_dataset(folder, train=2, val=1, imgsz=64)
    image = folder / "images/train/00001.png"
    image.write_bytes(b"kept")
    assert make_dataset(folder, train=2, val=1, imgsz=64) == folder / "scenes.yaml"
    assert image.read_bytes() == b"kept"
    image.unlink()
    make_dataset(folder, train=2, val=1, imgsz=64)
    assert cv2.imread(str(image)) is not None
    before = digest(folder / "images")
    make_dataset(folder, train=2, val=1, imgsz=64, seed=1)
    assert not set(before.values()) & set(digest(folder / "images").values())
    assert json.loads((folder / scenes.STAMP_NAME).read_text())["seed"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["scenes"]


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "draw_scene", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_dataset(tmp_path / "scenes", train=2, val=1, imgsz=64)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(PruneError, match="is not a scenes dataset; give another folder"):
        make_dataset(tmp_path, train=2, val=1, imgsz=64)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "value", "least"), [("train", 0, 1), ("val", 0, 1), ("imgsz", 32, 64), ("seed", -1, 0)]
)
def test_values_out_of_range(name: str, value: int, least: int, tmp_path: Path) -> None:
    with pytest.raises(PruneError, match=rf"{name}={value} is too small; give {least} or more"):
        make_dataset(tmp_path / "scenes", **{name: value})
