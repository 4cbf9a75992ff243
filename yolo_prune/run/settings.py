# SPDX-License-Identifier: AGPL-3.0-or-later
"""Training settings that keep what is left of a trained model, and go up from there."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from yolo_prune.recipe import Recipe, Target

TRAINED: dict[str, Any] = {"warmup_bias_lr": 0.0}
"""For a trained model: in the warm-up every learning rate rises; that of biases fell from 0.1, in Ultralytics' own."""

GENTLE: dict[str, Any] = {**TRAINED, "cos_lr": True, "optimizer": "AdamW", "lr0": 0.001}
"""After a refit: what goes up from it, and ends best. Found by experiment, with `benchmarks/`."""

WARM_UP = 3.0
"""Epochs, as in Ultralytics; of four epochs, that would leave but one."""

DEEP = {"flops": 0.4, "latency": 0.4, "params": 0.15}
"""Where no more than this is to be left, there is more to learn anew: twice the learning rate ends better.

So it does where the size is searched for, with few epochs for each.
"""


def unchosen(recipe: Recipe, settings: Mapping[str, Any], explicit: Set[str]) -> dict[str, Any]:
    """Settings, of those nobody chose, that keep what a cut left of a trained model.

    Ultralytics' learning rates, of biases in the warm-up (0.1) as later, are for training from scratch and undo it. So
    does no warm-up at all: AdamW's first steps move every weight by the whole rate. Mosaics are not what the weights
    were refitted on.

    Args:
        recipe: of the run.
        settings: of the run, as Ultralytics would resolve them.
        explicit: keys of those that somebody chose.
    """
    wanted = after_refit(recipe.target, int(settings["epochs"])) if recipe.recover.refit else TRAINED
    if "optimizer" in explicit and "Adam" not in str(settings["optimizer"]):
        explicit = explicit | {"lr0"}  # which is AdamW's
    return without(explicit, wanted)


def after_refit(target: Target, epochs: int) -> dict[str, Any]:
    """The settings of a run after whose cuts the weights are refitted.

    Args:
        target: how much is to be left.
        epochs: of the run.
    """
    deep = target.keep is None or target.keep <= DEEP[target.metric]
    return {**further(epochs), "lr0": GENTLE["lr0"] * (2 if deep else 1)}


def further(epochs: int) -> dict[str, Any]:
    """The settings of a run that trains a trained model further.

    Args:
        epochs: of the run; none of them has mosaics, and no more than half of them warm up.
    """
    return {**GENTLE, "warmup_epochs": min(WARM_UP, epochs / 2), "close_mosaic": epochs}


def without(explicit: Set[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that nobody chose."""
    return {key: value for key, value in settings.items() if key not in explicit}


def said(settings: Mapping[str, Any]) -> str:
    """Settings as they are written on a command line."""
    return " ".join(f"{key}={value}" for key, value in settings.items())
