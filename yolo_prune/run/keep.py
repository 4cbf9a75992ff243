# SPDX-License-Identifier: AGPL-3.0-or-later
"""A pruned model in a run: it is fitted to the dataset, and what a user's `get_model` builds gets its structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from yolo_prune.cut import heads, masks, surgery
from yolo_prune.cut.plan import Plan
from yolo_prune.cut.record import composed_plan
from yolo_prune.errors import RunError
from yolo_prune.graph.probes import image_channels


class StockLevel:
    """Mixin between a user's trainer and Ultralytics' trainer: `super().get_model` in the user's trainer comes here.

    Attributes:
        kept: while `get_model` of the user's trainer runs, the pruned model of this run; else None.
    """

    kept: Any = None

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        """As in Ultralytics. But if `weights` is the pruned model, it is returned as it is."""
        if weights is None or weights is not self.kept:
            return super().get_model(cfg, weights, verbose)  # type: ignore[misc]
        _copy_dropout(self.stock_model(cfg), weights)  # the stock `get_model` also sets up the trainer
        return weights

    def stock_model(self, cfg: Any) -> Any:
        """The dense model that Ultralytics' own trainer builds for this run."""
        return super().get_model(cfg, None, verbose=False)  # type: ignore[misc]


def _copy_dropout(stock: nn.Module, model: nn.Module) -> None:
    """Copy the dropout of this run (`dropout=`) from the stock model into the pruned model."""
    wanted = {name: layer.p for name, layer in stock.named_modules() if isinstance(layer, nn.Dropout)}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Dropout) and name in wanted:
            layer.p = wanted[name]


def differences(model: Any, data: Mapping[str, Any], by_name: bool) -> dict[str, tuple[Any, Any]]:
    """What a model and a dataset differ in, as `{key of the dataset: (value of the model, value of the dataset)}`.

    Args:
        model: the model.
        data: the dataset, as Ultralytics' trainer reads it.
        by_name: whether classes in another order are a difference (`cls_remap=`).
    """
    found: dict[str, tuple[Any, Any]] = {}
    channels, wanted = image_channels(model), data.get("channels", 3)
    if channels and channels != wanted:
        found["channels"] = channels, wanted
    keypoints = getattr(model, "kpt_shape", None)
    if keypoints and "kpt_shape" in data and list(keypoints) != list(data["kpt_shape"]):
        found["kpt_shape"] = list(keypoints), list(data["kpt_shape"])
    old, names = _numbered(model.names), _numbered(data["names"])
    if len(old) != data["nc"] or (by_name and heads.same_names(old, names)):
        found["names"] = old, names
    return found


def _numbered(names: Any) -> Mapping[int, str]:
    """Names of classes by number. The `get_dataset` of a user may return a list."""
    return names if isinstance(names, Mapping) else dict(enumerate(names))


def check_same_data(model: Any, data: Mapping[str, Any], by_name: bool) -> None:
    """Refuse to resume a run with another dataset: the saved average and optimizer would not fit the new layers.

    Raises:
        RunError: If the dataset has other classes, keypoints or image channels than the checkpoint.
    """
    for key, (then, now) in differences(model, data, by_name).items():
        if key == "names":
            key, then, now = "classes", len(then), data["nc"]
        counts = f"{key}: {then} in the checkpoint, {now} in the dataset"
        changed = counts if then != now else "the order of the classes"
        raise RunError(
            f"The dataset was changed since this run began ({changed}), so the run cannot be resumed. Restore the "
            "dataset; or leave out resume, which starts a new run from the checkpoint."
        )


def fit(model: Any, data: Mapping[str, Any], by_name: bool, build: Callable[..., nn.Module]) -> None:
    """Give a pruned model the input channels, keypoints and classes of a dataset, in place.

    Args:
        model: a pruned model.
        data: the dataset, as Ultralytics' trainer reads it.
        by_name: whether classes keep their weights by name (`cls_remap=`).
        build: builds the dense model for this dataset, with some values of the dataset replaced.
    """
    changes = differences(model, data, by_name)
    if "channels" in changes:
        channels, wanted = changes["channels"]
        follow = heads.followers(lambda n: build(model, channels=n)).of(model, channels)
        heads.resize(model, follow, wanted, build(model, channels=wanted))
        model.yaml["channels"] = wanted
    if "kpt_shape" in changes:
        keypoints, (count, size) = changes["kpt_shape"]
        follow = heads.followers(lambda n: build(model, kpt_shape=[n, keypoints[1]]))
        renewed = heads.followers(lambda n: build(model, kpt_shape=[n, size]))
        stock = build(model, kpt_shape=[count, size])
        heads.resize(model, renewed.among(follow.of(model, keypoints[0])), count, stock)
        model.kpt_shape = model.model[-1].kpt_shape = model.yaml["kpt_shape"] = [count, size]
    if "names" in changes:
        old, names = changes["names"]
        rows = heads.same_names(old, names) if by_name else None
        follow = heads.followers(lambda n: build(model, nc=n)).of(model, len(old))
        heads.resize(model, follow, data["nc"], build(model, nc=data["nc"]), rows)
        model.yaml["nc"] = data["nc"]


def adopt(built: Any, pruned: Any, edited: bool, builder: str, stock: Callable[[], nn.Module]) -> None:
    """Give the model that `get_model` returned the structure and the weights of the pruned model, in place.

    Its class, its attributes and its hooks stay. A model that has the structure already keeps its weights, too.

    Args:
        built: the model that `get_model` returned.
        pruned: the pruned model.
        edited: whether `built` is the copy of the pruned model that `get_model` got. Its layers may be replaced by
            layers with other names, or with the widths of the dense or of the pruned model.
        builder: name of the class with this `get_model`, for the message.
        stock: builds the dense model of Ultralytics for this run. The hidden widths of its head may differ from those
            before pruning, because they come from the number of classes.

    Raises:
        RunError: If the pruned structure does not fit the model that was built.
    """
    if not isinstance(built, nn.Module):
        raise RunError(f"{builder}.get_model returned {built!r} instead of a model. Return the model to train.")
    plan = composed_plan(pruned) or Plan({}, {}, {})
    mine, theirs = _shapes(built), _shapes(pruned)
    wrong = {n: shape for n, shape in theirs.items() if mine.get(n, shape if edited else None) != shape}
    usual = _shapes(stock()) if wrong else {}
    for name, shape in wrong.items():
        dense = plan.shapes.get(name, shape)
        if mine.get(name) not in (dense, usual.get(name, dense)):
            found = f"has the shape {mine[name]} instead of {dense}" if name in mine else "is missing"
            raise RunError(
                f"{builder}.get_model builds another model than the one that was pruned: '{name}' {found}. Return "
                "super().get_model(cfg, weights), or build the model from cfg. To train another model, prune that "
                f"model with trainer={builder}."
            )
    if wrong:
        surgery.become(built, pruned, plan)
    masks.hold(built, plan.masks)  # a trainer of the user may have made new weights
    built.yaml = {**(getattr(built, "yaml", None) or {}), **pruned.yaml}  # type: ignore[assignment]


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
