# SPDX-License-Identifier: AGPL-3.0-or-later
"""Writes a dataset with the classes of a model, for Ultralytics without this package."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ultralytics.data.utils import img2label_paths
from ultralytics.engine.model import Model

from yolo_prune.data import datasets
from yolo_prune.data.relabel import Relabelled, relabelled
from yolo_prune.env import trained
from yolo_prune.env.files import link, write_text
from yolo_prune.env.releases import save_yaml
from yolo_prune.errors import RunError

SPLITS = ("train", "val", "test")
NOT_KEPT = ("path", "yaml_file", "names", "nc", "download", "minival", *SPLITS)
"""Keys of a dataset's file that are written anew, or that are for the original dataset only."""


def write(model: Model, data: str | Path, folder: str | Path) -> Path:
    """Write a dataset with the classes that a model keeps.

    Images are links to the original files where the folder can have links, else copies.

    Args:
        model: a model from which classes were removed.
        data: a dataset with the classes of the dense model, as for `model.train`.
        folder: a new folder.

    Returns:
        What goes into `data=`: the YAML file, or the folder for classification.

    Raises:
        RunError: If no class was removed from the model, the folder has files, or the classes do not match.
    """
    kept, folder = datasets.kept_classes(model.model), Path(folder)
    if kept is None:
        raise RunError("No class was removed from this model, so it needs no dataset of its own. Use the original one.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"'{folder}' is there already. Choose a new folder.")
    splits = {split: datasets.read(model, data, trained.size(model), split) for split in SPLITS}
    known = {split: each for split, each in splits.items() if each is not None}
    if model.task == "classify":
        for split, (dataset, _) in known.items():
            names = kept.kept_names
            placed = _named([sample[0] for sample in dataset.samples])
            for (file, name), sample in zip(placed, dataset.samples, strict=True):
                _place(Path(file), folder / split / names[sample[1]], name)
        return folder
    facts: dict[str, Any] = {}
    for split, (dataset, info) in known.items():
        other = relabelled(kept, info, data)
        facts = {**{k: v for k, v in info.items() if k not in NOT_KEPT}, "names": dict(other.facts["names"])}
        for file, name in _named(dataset.im_files):
            _place(Path(file), folder / "images" / split, name)
            label = Path(img2label_paths([file])[0])
            if label.is_file():
                text = _renumbered(label.read_text(encoding="utf-8"), other)
                write_text(folder / "labels" / split / f"{Path(name).stem}.txt", text)
    places = {split: f"images/{split}" for split in known}
    save_yaml(folder / "data.yaml", {"path": str(folder.resolve()), **places, **facts})
    return folder / "data.yaml"


def _named(files: list[str]) -> Iterator[tuple[str, str]]:
    """Files with new names: a name that several folders have gets a number. Labels have the name of their image."""
    counts = Counter(Path(file).stem for file in files)
    taken = set(counts)
    for number, file in enumerate(files):
        path, stem = Path(file), Path(file).stem
        if counts[stem] > 1:
            while stem in taken:  # another image may have such a name already
                stem = f"{stem}-{number}"
            taken.add(stem)
        yield file, f"{stem}{path.suffix}"


def _place(file: Path, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    link(file, folder / name)


def _renumbered(text: str, other: Relabelled) -> str:
    """The lines of a label file that belong to the model's classes, with its numbers."""
    numbers: Mapping[int, int] = other.numbers
    rows = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return "".join(f"{numbers[int(float(c))]} {rest}\n" for c, rest in rows if int(float(c)) in numbers)
