# SPDX-License-Identifier: AGPL-3.0-or-later
"""Labels of a dataset for a model with fewer classes: they are matched by name and renumbered."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from ultralytics.data.dataset import ClassificationDataset

from yolo_prune.cut.classes import Classes
from yolo_prune.cut.heads import plain
from yolo_prune.errors import RunError


@dataclass(frozen=True)
class Relabelled:
    """How a dataset is read for a model with fewer classes.

    Attributes:
        classes: the classes of the dense model, and those that the model keeps.
        original: the dataset as its file describes it.
        facts: the same, with the names and the number of the model's classes.
        numbers: `{class in the dataset: class in the model}`; other classes have no entry.
    """

    classes: Classes
    original: Mapping[str, Any]
    facts: Mapping[str, Any]
    numbers: Mapping[int, int]

    def built(self, owner: Any, build: Callable[[], Any]) -> Any:
        """Build an Ultralytics dataset with the labels of the model's classes.

        Labels are read with all classes of the dataset, because Ultralytics refuses numbers without a name.

        Args:
            owner: the trainer or validator whose `data` and `names` the dataset reads.
            build: builds the dataset.
        """
        classify = owner.args.task == "classify"
        if classify:
            _check_folders()
            owner.names = dict(self.facts["names"])
        before, owner.data = owner.data, dict(self.facts if classify else self.original)
        try:
            dataset = build()
        finally:
            owner.data = before
        if not classify:
            for part in getattr(dataset, "datasets", [dataset]):
                self.relabel(part)
        return dataset

    def relabel(self, dataset: Any) -> None:
        """Remove the labels of other classes, and renumber the rest, in place."""
        dataset.update_labels(include_class=sorted(self.numbers))
        place = np.full(max(self.numbers) + 1, -1.0, np.float32)
        for old, new in self.numbers.items():
            place[old] = new
        for label in dataset.labels:
            label["cls"] = place[label["cls"].astype(int)]
        dataset.data = dict(self.facts)


def relabelling(stock: Any, classes: Classes) -> Any:
    """The class of a validator that reads the labels of a model's classes, from Ultralytics' or the user's class."""
    if getattr(stock, "kept_classes", None) == classes:
        return stock

    class Relabelling(stock):  # type: ignore[misc]
        kept_classes = classes
        data: Any

        def build_dataset(self, *args: Any, **kwargs: Any) -> Any:
            refuse_single_class(self.args)
            other = relabelled(classes, self.data, self.args.data)
            dataset = other.built(self, partial(super().build_dataset, *args, **kwargs))
            self.data = dict(other.facts)
            return dataset

        def init_metrics(self, model: Any) -> None:
            """As in Ultralytics, but the evaluation of COCO and LVIS, by their own numbers of classes, is left out."""
            asked = self.args.save_json
            super().init_metrics(model)
            if getattr(self, "is_coco", False) or getattr(self, "is_lvis", False):
                self.is_coco = self.is_lvis = False
                self.args.save_json, self.class_map = asked, list(range(1, len(model.names) + 1))

    Relabelling.__name__, Relabelling.__qualname__ = stock.__name__, stock.__qualname__
    return Relabelling


def refuse_single_class(args: Any) -> None:
    """Refuse `single_cls`: Ultralytics gives all labels one class before those of removed classes can be left out.

    Raises:
        RunError: If the settings have it.
    """
    if getattr(args, "single_cls", False):
        raise RunError(
            "single_cls=True does not work with a model from which classes were removed: labels of removed classes "
            "would count, too. Write a dataset with the classes of the model first: yolo-prune dataset model=... "
            "data=... save=folder, and train or validate on it with YOLO_PRUNE_HOOK=0."
        )


def relabelled(classes: Classes, data: Mapping[str, Any], shown: Any) -> Relabelled:
    """Match the classes of a dataset with those of a model by name.

    Args:
        classes: all classes of the dense model, and those that were kept.
        data: the dataset, as Ultralytics reads it.
        shown: the dataset, as the user gave it, for messages.

    Raises:
        RunError: If a name of the dataset is none of the dense model, or a class of the model is not in the dataset.
    """
    found: Mapping[int, str] = data["names"] if isinstance(data["names"], Mapping) else dict(enumerate(data["names"]))
    numbers = _by_number(classes, found) or _by_name(classes, found, shown)
    names = dict(enumerate(classes.kept_names))
    if classes.unnamed:  # the names are those of the dataset
        names = {new: found[old] for old, new in sorted(numbers.items(), key=lambda item: item[1])}
    return Relabelled(classes, data, {**data, "names": names, "nc": len(names)}, numbers)


def _by_number(classes: Classes, found: Mapping[int, str]) -> dict[int, int] | None:
    """The numbers for a model without names; None if it has names."""
    if not classes.unnamed:
        return None
    if len(found) == len(classes.names):
        return {old: new for new, old in enumerate(classes.kept)}
    return {i: i for i in range(len(found))} if len(found) == len(classes.kept) else None


def _by_name(classes: Classes, found: Mapping[int, str], shown: Any) -> dict[int, int]:
    known, kept = [plain(name) for name in classes.names], [plain(name) for name in classes.kept_names]
    given = {number: plain(name) for number, name in found.items()}
    unknown = [found[number] for number, name in given.items() if name not in known]
    missing = [classes.names[i] for i in classes.kept if plain(classes.names[i]) not in given.values()]
    twice = [found[n] for n, name in given.items() if name in kept and [*given.values(), *known].count(name) > 2]
    for wrong, what in (
        (unknown, f"has the class{'es' * (len(unknown) > 1)} {_few(unknown)}, which the dense model did not have"),
        (missing, f"lacks the class{'es' * (len(missing) > 1)} {_few(missing)}, which this model has"),
        (twice, f"has several classes named {_few(twice)}"),
    ):
        if wrong:
            raise RunError(
                f"data={shown} {what}. This model keeps {len(kept)} of {len(known)} classes "
                f"({_few(classes.kept_names)}), and labels are matched by name. Correct the names in the dataset; or, "
                "for other classes, start from the dense model."
            )
    return {number: kept.index(name) for number, name in given.items() if name in kept}


def _few(names: Any) -> str:
    shown = [f"'{name}'" for name in names[:5]]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check_folders() -> None:
    """Refuse releases of Ultralytics that number the folders of a classification dataset without the model's names."""
    if "names" not in inspect.signature(ClassificationDataset.__init__).parameters:
        raise RunError(
            "A classifier with fewer classes reads the folders of its dataset by name, and this release of Ultralytics "
            "numbers them. pip install -U ultralytics, or write a dataset with the classes of the model "
            "(yolo_prune.write_dataset)."
        )
