# SPDX-License-Identifier: AGPL-3.0-or-later
"""The accuracy tables of docs/results.md, on a model and a dataset of yours.

    python benchmarks/accuracy.py one-shot   model=best.pt data=data.yaml imgsz=320
    python benchmarks/accuracy.py one-shot   model=best.pt data=data.yaml imgsz=320 keeps=0.5 only=fpgm,FPGM
    python benchmarks/accuracy.py allocation model=best.pt data=data.yaml imgsz=320 keeps=0.5
    python benchmarks/accuracy.py trained    model=best.pt data=data.yaml imgsz=320 seeds=0,1,2
    python benchmarks/accuracy.py ablation   model=best.pt data=data.yaml imgsz=320 keeps=0.5
    python benchmarks/accuracy.py ablation   model=best.pt data=data.yaml imgsz=320 keeps=0.5 only=distilled
    python benchmarks/accuracy.py plain      model=best.pt data=data.yaml imgsz=320
    python benchmarks/accuracy.py dense      model=best.pt data=data.yaml imgsz=320 epochs=30
    python benchmarks/accuracy.py control    model=best.pt data=data.yaml imgsz=320 width=0.14 epochs=100
    python benchmarks/accuracy.py control    model=best.pt data=data.yaml family=yolov8n.yaml width=0.16 amp=True

Without training: `one-shot` cuts and refits with every criterion, those of torch-pruning included, and with parts left
out, `allocation` with every allocation. With it: `trained` is `yolo train ... callbacks=prune` with the settings that
the package chooses, `ablation` the same with one part left out or exchanged at a time, `plain` what torch-pruning's
example does (uniform, L2, nothing recovered) with Ultralytics' own settings, `dense` the model itself trained further
with the settings of `trained`, and `control` the same architecture at a smaller width from scratch. Every row is
printed, and appended to `benchmarks/accuracy.md`, as soon as it is measured: mAP50-95 on the splits val and test.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml
from ultralytics import YOLO
from ultralytics.nn.tasks import yaml_model_load

import yolo_prune
from yolo_prune.planning import planner
from yolo_prune.recipe import load_recipe
from yolo_prune.run import live as live_trainer
from yolo_prune.run import settings as run_settings

KEEPS = (0.75, 0.5, 0.25)
EPOCHS = {0.75: 30, 0.5: 30, 0.25: 45}
OWN = ("obs", "taylor", "fisher", "magnitude", "lamp", "bn_scale", "fpgm", "random")
THEIRS = ("GroupMagnitude", "LAMP", "BNScale", "FPGM", "GroupTaylor", "GroupHessian", "OBDC", "Activation")
CRITERIA: dict[str, Any] = {name: name for name in OWN} | {
    name: {"name": "torch_pruning", "importance": f"{name}Importance"} for name in THEIRS
}
TABLE = Path(__file__).with_suffix(".md")
DEFAULTS = {
    "model": "",
    "data": "",
    "imgsz": "640",
    "seeds": "0",
    "family": "yolo11n.yaml",
    "width": "0.14",
    "epochs": "",
    "keeps": "",
    "only": "",
    "amp": "False",
}
STOCK = {
    "optimizer": "AdamW",
    "lr0": 0.001,
    "warmup_epochs": 3.0,
    "warmup_bias_lr": 0.1,
    "cos_lr": False,
    "close_mosaic": 10,
}
PLAIN = {
    **STOCK,
    "recipe.criterion": {"name": "magnitude", "norm": 2},
    "recipe.allocation": "uniform",
    "recipe.recover": {"refit": 0, "batchnorm": 0},
    "recipe.schedule": {"rounds": 1},
}
ABLATION: dict[str, dict[str, Any]] = {
    "all parts": {},
    **{f"criterion {name}": {"recipe.criterion": value} for name, value in CRITERIA.items() if name != "obs"},
    "allocation uniform": {"recipe.allocation": "uniform"},
    "allocation isomorphic": {"recipe.allocation": "isomorphic"},
    "batch norm instead of refit": {"recipe.recover.refit": 0},
    "nothing before training": {"recipe.recover": {"refit": 0, "batchnorm": 0}},
    "rewound instead of refit": {"recipe.recover": {"rewind": {"epoch": 3}}},
    "Ultralytics' average": {"recipe.recover.average": 0},
    "Ultralytics' settings": STOCK,
    "no warm-up": {"warmup_epochs": 0.0},
    "with mosaic": {"close_mosaic": 10},
    "three cuts": {"recipe.schedule.rounds": 3},
    "three cuts and learning rates": {"recipe.schedule.rounds": 3, "recipe.recover.learning_rate": "rewind"},
    "distilled": {"recipe.recover.distill": True},
    "distilled with dis=0.5": {"recipe.recover.distill": True, "dis": 0.5},
}


def measure(model: YOLO, data: str, imgsz: int) -> list[float]:
    """mAP50-95 on val and, where the dataset has it, on test."""
    splits = [s for s in ("val", "test") if yaml.safe_load(Path(data).read_text()).get(s)]
    folder = tempfile.mkdtemp()
    return [
        float(model.val(data=data, imgsz=imgsz, split=s, workers=0, plots=False, project=folder).results_dict[KEY])
        for s in splits
    ]


KEY = "metrics/mAP50-95(B)"


def one_shot(ask: dict[str, str]) -> Iterator[list[Any]]:
    """Cut and refit, no training."""
    data, imgsz = ask["data"], int(ask["imgsz"])
    yield ["dense", 1.0, *measure(YOLO(ask["model"]), data, imgsz), 0.0]
    for keep in keeps(ask):
        for criterion, refit in [(c, 64) for c in CRITERIA] + [("obs", 0), ("magnitude", 0)]:
            if not ask["only"] or criterion in ask["only"].split(","):
                name = f"{criterion}, {'refitted' if refit else 'not refitted'}"
                yield cut(ask, name, keep, refit, {"criterion": CRITERIA[criterion]})


def cut(ask: dict[str, str], name: str, keep: float, refit: int, fields: Mapping[str, Any]) -> list[Any]:
    """One cut, measured."""
    data, imgsz = ask["data"], int(ask["imgsz"])
    model, began = YOLO(ask["model"]), time.perf_counter()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    plan = yolo_prune.plan(model, {"target": {"flops": keep}, **fields}, imgsz=imgsz, data=data)
    yolo_prune.apply(model, plan, data=data, imgsz=imgsz, refit=refit)
    seconds = time.perf_counter() - began
    return [name, plan.predicted.flops_kept, *measure(model, data, imgsz), seconds]


def allocation(ask: dict[str, str]) -> Iterator[list[Any]]:
    """Cut and refit with every allocation, no training."""
    for keep in keeps(ask):
        for name in ("global", "isomorphic", "uniform", "sensitivity"):
            for criterion in ("obs", "magnitude"):
                yield cut(ask, f"{name}, {criterion}", keep, 64, {"criterion": criterion, "allocation": name})


def trained(ask: dict[str, str]) -> Iterator[list[Any]]:
    """Through a training run, with the settings that the package chooses."""
    for keep in keeps(ask):
        yield row(ask, keep, "as it comes", {})


def ablation(ask: dict[str, str]) -> Iterator[list[Any]]:
    """The same, with one part left out or exchanged."""
    for keep in keeps(ask):
        target = load_recipe({"target": {"flops": keep}}).target
        refitted = {**run_settings.after_refit(target, epochs_of(ask, keep)), "recipe.schedule.rounds": 1}
        for name, changes in ABLATION.items():
            if not ask["only"] or name in ask["only"].split(","):
                yield row(ask, keep, name, {**refitted, **changes})


def plain(ask: dict[str, str]) -> Iterator[list[Any]]:
    """What torch-pruning's example does, and Ultralytics' own settings."""
    for keep in keeps(ask):
        yield row(ask, keep, "uniform L2, nothing recovered, Ultralytics' settings", PLAIN)


def row(ask: dict[str, str], keep: float, name: str, changes: Mapping[str, Any]) -> list[Any]:
    """Train and prune, for every seed."""
    found, began = [], time.perf_counter()
    epochs = epochs_of(ask, keep)
    for seed in map(int, ask["seeds"].split(",")):
        model = YOLO(ask["model"])
        recipe: Any = {"recipe": "half-flops", "recipe.target.flops": keep}
        model.train(**settings(ask, epochs, seed), callbacks="prune", **{**recipe, **changes})
        found.append(measure(YOLO(model.trainer.best), ask["data"], int(ask["imgsz"])))
    return [f"{name}, {epochs} epochs", keep, *together(found), time.perf_counter() - began]


def settings(ask: dict[str, str], epochs: int, seed: int) -> dict[str, Any]:
    """What every run here has in common."""
    shared = {"batch": 16, "nbs": 16, "workers": 2, "plots": False, "project": tempfile.mkdtemp()}
    return {
        "data": ask["data"],
        "amp": ask["amp"] == "True",
        "imgsz": int(ask["imgsz"]),
        "epochs": epochs,
        "seed": seed,
        **shared,
    }


def dense(ask: dict[str, str]) -> Iterator[list[Any]]:
    """The model itself, trained further as pruned ones are."""

    def average(trainer: Any) -> None:
        live_trainer.average_over(trainer, load_recipe().recover.average * trainer.epochs)

    found, began, epochs = [], time.perf_counter(), int(ask["epochs"] or 30)
    for seed in map(int, ask["seeds"].split(",")):
        model = YOLO(ask["model"])
        model.add_callback("on_train_epoch_start", average)
        model.train(**settings(ask, epochs, seed), **run_settings.fine_tuning(epochs))
        found.append(measure(YOLO(model.trainer.best), ask["data"], int(ask["imgsz"])))
    yield [f"dense, {epochs} epochs more", 1.0, *together(found), time.perf_counter() - began]


def control(ask: dict[str, str]) -> Iterator[list[Any]]:
    """The architecture at a smaller width, from scratch."""
    imgsz, width, epochs = int(ask["imgsz"]), float(ask["width"]), int(ask["epochs"] or 100)
    folder = Path(tempfile.mkdtemp())
    family = yaml_model_load(ask["family"])
    depth, _, most = family["scales"][family["scale"]]
    scales = {family["scale"]: [depth, width, most]}
    (folder / "narrow.yaml").write_text(yaml.safe_dump({**family, "scales": scales}))
    found, began, flops = [], time.perf_counter(), 1.0
    for seed in map(int, ask["seeds"].split(",")):
        torch.manual_seed(seed)
        model = YOLO(folder / "narrow.yaml")
        model.train(**settings(ask, epochs, seed), optimizer="AdamW", lr0=1e-3)
        best = YOLO(model.trainer.best)
        flops = planner.present_cost(best.model, imgsz)[0] / planner.present_cost(YOLO(ask["model"]).model, imgsz)[0]
        found.append(measure(best, ask["data"], imgsz))
    yield [f"width {width}, {epochs} epochs from scratch", flops, *together(found), time.perf_counter() - began]


KINDS = {
    "one-shot": one_shot,
    "allocation": allocation,
    "trained": trained,
    "ablation": ablation,
    "plain": plain,
    "dense": dense,
    "control": control,
}


def keeps(ask: dict[str, str]) -> tuple[float, ...]:
    """The targets asked for."""
    return tuple(float(k) for k in ask["keeps"].split(",")) if ask["keeps"] else KEEPS


def epochs_of(ask: dict[str, str], keep: float) -> int:
    """The epochs asked for, or those that such a cut gets."""
    return int(ask["epochs"] or EPOCHS[keep])


def together(found: list[list[float]]) -> list[Any]:
    """Per split, the mean over seeds, with the standard deviation where there are several."""
    splits = list(zip(*found, strict=True))
    return [mean(s) if len(s) == 1 else f"{mean(s):.4f} ± {stdev(s):.4f}" for s in splits]


def where() -> str:
    """What all of this runs on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"


def tabulate(
    kinds: Mapping[str, Any], defaults: Mapping[str, str], table: Path, measured: str, usage: str | None
) -> None:
    """Print a table and append it to a file, row by row.

    Args:
        kinds: `{first argument: function that yields rows}`.
        defaults: of the arguments.
        table: the file.
        measured: head of the second column.
        usage: what is printed if the arguments are wrong.
    """
    kind, *rest = sys.argv[1:] or ["help"]
    if kind not in kinds or not all("=" in a for a in rest):
        sys.exit(usage)
    rows = kinds[kind]({**defaults, **dict(a.split("=", 1) for a in rest)})
    with table.open("a", encoding="utf-8") as file:
        print(f"\n`{' '.join(sys.argv)}` with torch {torch.__version__} on {where()}\n", file=file)
        for line in (f"| | {measured} | val | test | seconds |", "|---|---|---|---|---|"):
            print(line, file=file)
        for row in rows:
            cells = [f"{c:.4f}" if isinstance(c, float) else str(c) for c in row[:-1]]
            line = f"| {' | '.join(cells)} | {row[-1]:.0f} |"
            print(line, file=file, flush=True)
            print(line, flush=True)


if __name__ == "__main__":
    tabulate(KINDS, DEFAULTS, TABLE, "FLOPs kept", __doc__)
