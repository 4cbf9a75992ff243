# SPDX-License-Identifier: AGPL-3.0-or-later
"""The tables on sparse weights of docs/results.md, on a model and a dataset of yours.

    python benchmarks/sparse.py one-shot model=best.pt data=data.yaml imgsz=320
    python benchmarks/sparse.py trained  model=best.pt data=data.yaml imgsz=320 epochs=30 seeds=0,1
    python benchmarks/sparse.py lottery  model=yolo11n.yaml data=data.yaml imgsz=320 epochs=60 seeds=0,1,2

`one-shot` sets zeros without training, by torch alone and by this package, with and without the refit. `trained` is
`yolo train ... callbacks=prune` with the settings that the package chooses, and torch's zeros alone as control.
`lottery` compares the recipe of this name with random zeros. `only=` takes names of rows. Zeros are counted by torch in
the delivered file. Every row is printed and appended to `benchmarks/sparse.md` as soon as it is measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import accuracy
from torch import nn
from torch.nn.utils import prune
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint

import yolo_prune

TABLE = Path(__file__).with_suffix(".md")
DEFAULTS = {**accuracy.DEFAULTS, "epochs": "30"}
ONE_SHOT: dict[str, dict[str, Any]] = {
    **{
        f"{a}, {s}": {"sparsity": {"amount": a, "score": s}}
        for a in (0.5, 0.75, 0.9)
        for s in ("magnitude", "wanda", "obs")
    },
    **{f"{a}, magnitude, per layer": {"sparsity": {"amount": a, "scope": "layer"}} for a in (0.5, 0.75)},
    **{f"2:4, {s}": {"sparsity": {"pattern": "2:4", "score": s}} for s in ("magnitude", "wanda", "obs")},
    "half of the FLOPs": {"target": {"flops": 0.5}},
    "half of the FLOPs, 0.5": {"target": {"flops": 0.5}, "sparsity": {"amount": 0.5}},
}
TRAINED: dict[str, dict[str, Any]] = {
    "0.5": {"sparsity": {"amount": 0.5}},
    "0.75": {"sparsity": {"amount": 0.75}},
    "0.9": {"sparsity": {"amount": 0.9}},
    "2:4": {"sparsity": {"pattern": "2:4"}},
    "2:4, obs": {"sparsity": {"pattern": "2:4", "score": "obs"}},
    "half of the FLOPs, 0.5": {"target": {"flops": 0.5}, "sparsity": {"amount": 0.5}},
}


def layers(model: nn.Module) -> list[nn.Module]:
    """The layers that a user of torch.nn.utils.prune would prune."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return [m for n, m in model.named_modules() if isinstance(m, kinds) and ".dfl" not in n]


def zeros(model: nn.Module) -> float:
    """The share of zeros, counted by torch."""
    weights: list[Any] = [layer.weight for layer in layers(model)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def asked(ask: Mapping[str, str], name: str) -> bool:
    """Whether a row is asked for."""
    return not ask["only"] or name in ask["only"].split(";")


def by_torch(model: nn.Module, amount: float, everywhere: bool) -> None:
    """Zeros by torch alone: `global_unstructured`, or `l1_unstructured` of each layer."""
    if everywhere:
        prune.global_unstructured([(m, "weight") for m in layers(model)], prune.L1Unstructured, amount=amount)
    for layer in layers(model):
        if not everywhere:
            prune.l1_unstructured(layer, "weight", amount=amount)
        prune.remove(layer, "weight")


def one_shot(ask: dict[str, str]) -> Iterator[list[Any]]:
    """Zeros without training."""
    data, imgsz = ask["data"], int(ask["imgsz"])
    for amount in (0.5, 0.75):
        for everywhere in (False, True):
            name = f"torch alone, {amount}, {'global' if everywhere else 'per layer'}"
            if asked(ask, name):
                model = YOLO(ask["model"])
                model.model.float()
                by_torch(model.model, amount, everywhere)
                yield [name, zeros(model.model), *accuracy.measure(model, data, imgsz), 0.0]
    for name, recipe in ONE_SHOT.items():
        for refit in (64, 0):
            row = f"{name}, {'refitted' if refit else 'not refitted'}"
            if asked(ask, row):
                model, began = YOLO(ask["model"]), time.perf_counter()
                plan = yolo_prune.plan(model, recipe, imgsz=imgsz, data=data)
                yolo_prune.apply(model, plan, data=data, imgsz=imgsz, refit=refit)
                seconds = time.perf_counter() - began
                yield [row, zeros(model.model), *accuracy.measure(model, data, imgsz), seconds]


def trained(ask: dict[str, str]) -> Iterator[list[Any]]:
    """Zeros in a training run."""
    for name, recipe in TRAINED.items():
        if asked(ask, name):
            yield row(ask, name, recipe)


def lottery(ask: dict[str, str]) -> Iterator[list[Any]]:
    """Tickets against random zeros, from an untrained model."""
    for name, fields in {"lottery": {}, "lottery, random": {"recipe.sparsity.score": "random"}}.items():
        if asked(ask, name):
            yield row(ask, name, "lottery", fields)


def row(ask: dict[str, str], name: str, recipe: Any, fields: Mapping[str, Any] | None = None) -> list[Any]:
    """Train with every seed."""
    found, began, share = [], time.perf_counter(), 0.0
    for seed in map(int, ask["seeds"].split(",")):
        model = YOLO(ask["model"])
        settings = accuracy.settings(ask, int(ask["epochs"]), seed)
        seeded = {"recipe.sparsity.seed": seed} if "random" in name else {}
        model.train(**settings, callbacks="prune", recipe=recipe, **{**(fields or {}), **seeded})
        share = zeros(load_checkpoint(model.trainer.best)[0])
        found.append(accuracy.measure(YOLO(model.trainer.best), ask["data"], int(ask["imgsz"])))
    return [f"{name}, {ask['epochs']} epochs", share, *accuracy.together(found), time.perf_counter() - began]


KINDS = {"one-shot": one_shot, "trained": trained, "lottery": lottery}


if __name__ == "__main__":
    accuracy.tabulate(KINDS, DEFAULTS, TABLE, "zeros", __doc__)
