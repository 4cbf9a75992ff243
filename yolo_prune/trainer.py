# SPDX-License-Identifier: AGPL-3.0-or-later
"""The trainer class that keeps a pruned structure and whose checkpoints a kill cannot damage."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.engine import trainer as engine
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils.torch_utils import strip_optimizer

from yolo_prune import metadata, ranks, resume
from yolo_prune.errors import RunError
from yolo_prune.files import WholeFile
from yolo_prune.graph.probes import image_channels


class KeepStructure:
    """Mixin over any Ultralytics trainer: a pruned model is trained as it is instead of being rebuilt from its YAML.

    Attributes:
        cadence: when the optimizer steps; a resumed run takes it up where it was.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.wdir, self.last, self.best = map(WholeFile, (self.wdir, self.last, self.best))  # type: ignore[has-type]
        self.cadence = resume.Cadence()
        self._stripped: Path | None = None

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        """The model to train: a copy of `weights` if it is pruned, else what the stock trainer builds."""
        if not isinstance(weights, nn.Module) or not metadata.is_pruned(weights):
            return super().get_model(cfg, weights, verbose)  # type: ignore[misc]
        if any("YOLOEPE" in cls.__name__ for cls in type(self).__mro__):
            raise RunError(
                "Linear probing rebuilds the head of YOLOE, which would lose the pruned structure. Probe first, then "
                "prune; or fine-tune the pruned model with the default trainer."
            )
        data = self.data  # type: ignore[attr-defined]
        _check_data(weights, data)
        stock = super().get_model(cfg, None, verbose=False)  # type: ignore[misc]  # for what else the trainer sets up
        model: Any = deepcopy(weights).float()
        model.criterion = None  # built anew for this run's arguments
        model.requires_grad_(True)  # checkpoints are saved frozen
        _take_over_dropout(stock, model)
        return model

    def optimizer_step(self) -> None:
        """Stock; counted."""
        super().optimizer_step()  # type: ignore[misc]
        self.cadence.stepped()

    def save_model(self) -> Any:
        """Stock, but files appear whole, and last.pt after all that it speaks of."""
        last, held = self.last, _Held()
        self.last = held  # type: ignore[assignment]  # only written to
        try:
            saved = super().save_model()  # type: ignore[misc]
        finally:
            self.last = last
        run = getattr(self, "pruning", None)
        if run and run.exact:
            resume.save(self, run.done, self.cadence)
        if held.data:
            last.write_bytes(held.data)
        if run:
            resume.forget(self, run.done)
        return saved

    def resume_training(self, ckpt: Any) -> None:
        """Stock, which refuses a checkpoint of the last epoch; a run killed after that one can be completed, too."""
        epochs = self.epochs  # type: ignore[attr-defined]
        complete = bool(self.resume and ckpt and ckpt.get("epoch", -1) + 1 == epochs > 1)  # type: ignore[attr-defined]
        super().resume_training({**ckpt, "epoch": epochs - 2} if complete else ckpt)  # type: ignore[misc]
        if self.resume and ckpt:  # type: ignore[attr-defined]
            self.fitness = (ckpt.get("train_metrics") or {}).get("fitness")
        if complete:
            self.start_epoch = epochs

    def _setup_train(self, *args: Any) -> None:
        super()._setup_train(*args)  # type: ignore[misc]
        if self.start_epoch >= self.epochs:  # type: ignore[attr-defined]
            raise _AllTrained

    def final_eval(self) -> None:
        """Stock, on checkpoints that are replaced when they are complete, last.pt at the very end of the run."""
        engine.strip_optimizer = self.strip
        try:
            super().final_eval()  # type: ignore[misc]
        finally:
            engine.strip_optimizer = strip_optimizer

    def _do_train(self, *args: Any) -> None:
        """Stock; where all epochs are trained already, only what comes after them."""
        try:
            super()._do_train(*args)  # type: ignore[misc]
        except _AllTrained:
            self.epoch = self.epochs - 1  # type: ignore[attr-defined]
            self.final_eval()
            if ranks.first():
                self.run_callbacks("on_train_end")  # type: ignore[attr-defined]
        if self._stripped and self._stripped.exists():
            os.replace(self._stripped, self.last)
        if ranks.first() and hasattr(self, "pruning"):
            resume.forget(self)

    def strip(self, path: Any, s: str = "", updates: Any = None) -> Any:
        """Ultralytics' `strip_optimizer` for a file of this run; it is replaced once the new one is complete."""
        target = Path(s or path)
        temporary = target.with_name(f".{target.name}.stripped.tmp")
        result = strip_optimizer(path, s=str(temporary), **({"updates": updates} if updates else {}))
        if target == self.last:
            self._stripped = temporary
        elif temporary.exists():
            os.replace(temporary, target)
        return result


class _Held:
    """Takes what is written to a file, to write it later."""

    data = b""

    def write_bytes(self, data: bytes) -> int:
        self.data = data
        return len(data)


class _AllTrained(Exception):
    """Every epoch of a resumed run was trained before it was killed."""


@cache
def prune_trainer(base: type[BaseTrainer]) -> type[BaseTrainer]:
    """`base` with `KeepStructure`; the name has "Trainer" in it, by which Ultralytics knows trainers."""
    if issubclass(base, KeepStructure):
        return base
    name = f"Prune{base.__name__}"
    return type(name, (KeepStructure, base), {"__module__": __name__, "__qualname__": name, "__doc__": base.__doc__})


def _take_over_dropout(stock: nn.Module, model: nn.Module) -> None:
    """`dropout=` of this run."""
    wanted = {name: layer.p for name, layer in stock.named_modules() if isinstance(layer, nn.Dropout)}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Dropout) and name in wanted:
            layer.p = wanted[name]


def _check_data(model: Any, data: Mapping[str, Any]) -> None:
    """Refuse data that need other output layers than the pruned model has."""
    has: dict[str, Any] = {"classes": len(model.names), "input channels": image_channels(model)}
    needs = {"classes": data["nc"], "input channels": data.get("channels", 3)}
    if "kpt_shape" in data and getattr(model, "kpt_shape", None):
        has["keypoints"], needs["keypoints"] = tuple(model.kpt_shape), tuple(data["kpt_shape"])
    wrong = [f"{has[key]} {key}, the dataset {needs[key]}" for key in has if has[key] != needs[key]]
    if wrong:
        raise RunError(
            f"The pruned model has {'; '.join(wrong)}. Training a pruned model on other classes is not supported yet: "
            "train the dense model on this dataset first, then prune it."
        )
    before, now = dict(model.names), dict(data["names"])
    moved = [name for i, name in now.items() if before.get(i) != name and name in before.values()]
    if moved:
        raise RunError(
            f"The dataset lists the model's classes in another order ({', '.join(moved)}). Give its names the order of "
            f"the model: {', '.join(before.values())}."
        )
