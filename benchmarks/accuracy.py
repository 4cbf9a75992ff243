# SPDX-License-Identifier: AGPL-3.0-or-later
"""The accuracy tables of the README, on a model and a dataset of yours.

    python benchmarks/accuracy.py one-shot model=best.pt data=data.yaml imgsz=320
    python benchmarks/accuracy.py trained  model=best.pt data=data.yaml imgsz=320 seeds=3
    python benchmarks/accuracy.py control  data=data.yaml imgsz=320 width=0.14 epochs=70 seeds=1

`one-shot` cuts and refits without any training, with every criterion and with parts left out; `trained` goes through
`yolo train ... callbacks=prune`; `control` trains the same architecture at a smaller width from scratch. Every row is
printed, and appended to `benchmarks/accuracy.md`, as soon as it is measured: mAP50-95 on the splits val and test.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml
from ultralytics import YOLO
from ultralytics.nn.tasks import yaml_model_load

import yolo_prune
from yolo_prune import planner

KEEPS = (0.75, 0.5, 0.25)
EPOCHS = {0.75: 30, 0.5: 30, 0.25: 45}
CRITERIA = ("obs", "taylor", "fisher", "magnitude", "lamp", "bn_scale", "fpgm", "random")
TABLE = Path(__file__).with_suffix(".md")
DEFAULTS = {"model": "", "data": "", "imgsz": "640", "seeds": "1", "width": "0.14", "epochs": "70", "keeps": ""}


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
    settings = [(c, 64) for c in CRITERIA] + [("obs", 0), ("magnitude", 0)]
    for keep in keeps(ask):
        for criterion, refit in settings:
            model, began = YOLO(ask["model"]), time.perf_counter()
            recipe = {"target": {"flops": keep}, "criterion": criterion}
            plan = yolo_prune.plan(model, recipe, imgsz=imgsz, data=data)
            yolo_prune.apply(model, plan, data=data, imgsz=imgsz, refit=refit)
            seconds = time.perf_counter() - began
            name = f"{criterion}, {'refitted' if refit else 'not refitted'}"
            yield [name, plan.predicted.flops_kept, *measure(model, data, imgsz), seconds]


def trained(ask: dict[str, str]) -> Iterator[list[Any]]:
    """Through a training run, with the settings that the package chooses."""
    data, imgsz = ask["data"], int(ask["imgsz"])
    for keep in keeps(ask):
        found, began = [], time.perf_counter()
        for seed in range(int(ask["seeds"])):
            run = {"data": data, "imgsz": imgsz, "epochs": EPOCHS[keep], "batch": 16, "nbs": 16, "amp": False}
            model = YOLO(ask["model"])
            overrides: Any = {"recipe.target.flops": keep}
            model.train(**run, workers=2, seed=seed, plots=False, project=tempfile.mkdtemp(), callbacks="prune",
                        recipe="half-flops", **overrides)  # fmt: skip
            found.append(measure(YOLO(model.trainer.best), data, imgsz))
        yield [f"{EPOCHS[keep]} epochs", keep, *together(found), time.perf_counter() - began]


def control(ask: dict[str, str]) -> Iterator[list[Any]]:
    """The architecture at a smaller width, from scratch."""
    data, imgsz, width = ask["data"], int(ask["imgsz"]), float(ask["width"])
    folder = Path(tempfile.mkdtemp())
    family = yaml_model_load("yolo11n.yaml")
    (folder / "narrow.yaml").write_text(yaml.safe_dump({**family, "scales": {"n": [0.5, width, 1024]}}))
    found, began, flops = [], time.perf_counter(), 1.0
    for seed in range(int(ask["seeds"])):
        torch.manual_seed(seed)
        model = YOLO(folder / "narrow.yaml")
        model.train(data=data, imgsz=imgsz, epochs=int(ask["epochs"]), batch=16, nbs=16, optimizer="AdamW", lr0=1e-3,
                    amp=False, workers=2, seed=seed, plots=False, project=str(folder))  # fmt: skip
        best = YOLO(model.trainer.best)
        flops = planner.present_cost(best.model, imgsz)[0] / planner.present_cost(YOLO(ask["model"]).model, imgsz)[0]
        found.append(measure(best, data, imgsz))
    yield [f"width {width}, {ask['epochs']} epochs from scratch", flops, *together(found), time.perf_counter() - began]


def keeps(ask: dict[str, str]) -> tuple[float, ...]:
    """The targets asked for."""
    return tuple(float(k) for k in ask["keeps"].split(",")) if ask["keeps"] else KEEPS


def together(found: list[list[float]]) -> list[Any]:
    """Per split, the mean over seeds, with the standard deviation where there are several."""
    splits = list(zip(*found, strict=True))
    return [mean(s) if len(s) == 1 else f"{mean(s):.4f} ± {stdev(s):.4f}" for s in splits]


def main() -> None:
    """Print a table, row by row."""
    kind, *rest = sys.argv[1:] or ["help"]
    if kind not in ("one-shot", "trained", "control"):
        sys.exit(__doc__)
    ask = {**DEFAULTS, **dict(a.split("=", 1) for a in rest)}
    rows = {"one-shot": one_shot, "trained": trained, "control": control}[kind](ask)
    with TABLE.open("a", encoding="utf-8") as table:
        print(
            f"\n`{' '.join(sys.argv)}` with torch {torch.__version__} on {torch.get_num_threads()} CPU threads\n",
            file=table,
        )
        for line in ("| | FLOPs kept | val | test | seconds |", "|---|---|---|---|---|"):
            print(line, file=table)
        for row in rows:
            cells = [f"{c:.4f}" if isinstance(c, float) else str(c) for c in row[:-1]]
            line = f"| {' | '.join(cells)} | {row[-1]:.0f} |"
            print(line, file=table, flush=True)
            print(line, flush=True)


if __name__ == "__main__":
    main()
