# SPDX-License-Identifier: AGPL-3.0-or-later
"""The settings of all small runs, in one table: what `train` gets, and which recipe, by the file they are of."""

from __future__ import annotations

from typing import Any

from ultralytics.utils import ROOT

NEW = (ROOT / "cfg/models/26").exists()  # `nox -s releases` runs two of the files on releases before YOLO26, too

QUICK: dict[str, Any] = {"workers": 0, "amp": False, "plots": False, "device": "cpu"}
SMALL: dict[str, Any] = {**QUICK, "imgsz": 64, "batch": 4, "nbs": 4, "optimizer": "AdamW"}
PLAIN: dict[str, Any] = {"criterion": "magnitude", "recover": {"refit": 0, "batchnorm": 1}}
"""A recipe that looks at no data but for one batch."""
FINE: dict[str, Any] = {"channels": {"round_to": 2, "min": 2}}
"""So that small models have sizes enough."""
TWICE: dict[str, Any] = {"schedule": {"rounds": 2, "interval": 1}}
IN_PLACE: dict[str, Any] = {"name": "run", "exist_ok": True, "callbacks": "prune"}

RUNS: dict[str, dict[str, Any]] = {
    "cuda": {
        "epochs": 4,
        "imgsz": 128,
        "batch": 8,
        "nbs": 16,
        "workers": 2,
        "plots": False,
        "optimizer": "AdamW",
        "callbacks": "prune",
    },
    "distill": {**SMALL, "epochs": 3, "batch": 8, "nbs": 8},
    "gentle_settings": {**QUICK, "epochs": 2, "imgsz": 32, "batch": 4},
    "guard": {**SMALL, **IN_PLACE, "epochs": 7},
    "heads": {**SMALL, "epochs": 1, "lr0": 1e-6},
    "importances": {**SMALL, **IN_PLACE, "epochs": 1, "imgsz": 32, "optimizer": "SGD", "verbose": False},
    "kill": {
        **SMALL,
        "epochs": 7,
        "nbs": 12,  # three batches a step, five batches an epoch: gradients wait from one epoch to the next
        "optimizer": "MuSGD" if NEW else "SGD",
        "lr0": 0.01,
        "warmup_epochs": 0.0,
        "close_mosaic": 2,
        "callbacks": "prune",
    },
    "main_path": SMALL,
    "ranks": {**SMALL, "epochs": 4, "batch": 8, "nbs": 8, "exist_ok": True},
    "resume": {**SMALL, **IN_PLACE, "epochs": 3, "optimizer": "SGD"},
    "rewind": {
        **SMALL,
        **IN_PLACE,
        "epochs": 6,
        "imgsz": 32,
        "val": False,
        "optimizer": "SGD",
        "lr0": 0.01,
        "lrf": 0.1,
        "warmup_epochs": 0.0,
    },
    "run": {**SMALL, "batch": 8, "nbs": 8, "verbose": False, "lr0": 0.001, "warmup_epochs": 0},
    "search": {**SMALL, **IN_PLACE, "epochs": 4, "optimizer": "auto"},
    "settings": {**SMALL, "epochs": 3, "callbacks": "prune"},
    "sparse": {
        **QUICK,
        **IN_PLACE,
        "epochs": 4,
        "imgsz": 32,
        "batch": 4,
        "nbs": 8,  # two batches a step
        "val": False,
        "lr0": 0.01,
        "warmup_epochs": 1.0,
    },
    "tasks": {**SMALL, "verbose": False, "lr0": 0.001},
    "zeros": {**SMALL, "verbose": False, "lr0": 0.001, "imgsz": 32},
}

RECIPES: dict[str, dict[str, Any]] = {
    "cuda": {**TWICE, "target": {"flops": 0.5}, "criterion": "magnitude", "recover": {"refit": 0, "batchnorm": 2}},
    "distill": {**PLAIN, **TWICE, "target": {"flops": 0.5}, "channels": {"round_to": 1, "min": 1}},
    "guard": {**PLAIN, "channels": {"round_to": 1, "min": 2}, "measure": False},
    "importances": {
        **FINE,
        "target": {"flops": 0.6},
        "schedule": {"rounds": 1},
        "recover": PLAIN["recover"],
        "measure": False,
    },
    "kill": {
        **PLAIN,
        "target": {"flops": 0.6},
        "sparsity": {"amount": 0.5},
        "schedule": {"rounds": 3, "start": 1, "interval": 2},
    },
    "main_path": {**PLAIN, **TWICE, "target": {"flops": 0.5}},
    "ranks": {
        **PLAIN,
        "target": {"flops": 0.6},
        "sparsity": {"pattern": "1:2", "score": "obs", "images": 4},
        "schedule": {"rounds": 2, "interval": 2},
    },
    "resume": {**PLAIN, **TWICE, **FINE, "target": {"flops": 0.6}, "measure": False},
    "rewind": {
        **FINE,
        "criterion": "magnitude",
        "target": {"flops": 0.6},
        "schedule": {"rounds": 2, "start": 2, "interval": 2},
        "measure": False,
    },
    "run": {**FINE, **TWICE, "target": {"flops": 0.5}},
    "search": {**FINE, "criterion": "magnitude", "recover": {"refit": 4}},
    "settings": {**PLAIN, **TWICE, **FINE, "target": {"flops": 0.6}},
    "sparse": {
        **FINE,
        "target": {"flops": 0.6},
        "schedule": {"rounds": 2},
        "recover": {"batchnorm": 0, "average": 0},
        "measure": False,
    },
    "tasks": {
        "criterion": {"name": "fisher", "images": 4},  # gradients of the task's loss
        "target": {"flops": 0.7},
        "schedule": {"rounds": 1},
        "recover": {"refit": 4},
    },
}
