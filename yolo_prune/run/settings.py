# SPDX-License-Identifier: AGPL-3.0-or-later
"""Training settings that keep the accuracy of a trained model after a cut, and improve it from there."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from yolo_prune.recipe import Recipe, Target

TRAINED: dict[str, Any] = {"warmup_bias_lr": 0.0}
"""For a trained model: all learning rates rise in the warm-up. In Ultralytics, the rate of biases falls from 0.1."""

GENTLE: dict[str, Any] = {**TRAINED, "cos_lr": True, "optimizer": "AdamW", "lr0": 0.001}
"""After a refit: the settings that gave the best result in experiments with `benchmarks/`."""

WARM_UP = 3.0
"""Epochs of the warm-up, as in Ultralytics. In a run of four epochs, only one epoch would follow this warm-up."""

DEEP = {"flops": 0.4, "latency": 0.4, "params": 0.15}
"""Largest fraction of the dense model for which the learning rate is doubled.

A model that is cut this far has more to learn again, and twice the learning rate gave better results. The same is true
for a search, which has few epochs for each size.
"""


def recommended(recipe: Recipe, settings: Mapping[str, Any], explicit: Set[str]) -> dict[str, Any]:
    """Settings that keep the accuracy of a trained model after a cut, without those that the user chose.

    Ultralytics' default learning rates are for training from scratch, in the warm-up (0.1 for biases) and later. They
    would destroy the refitted weights. A run without a warm-up would also destroy them, because AdamW's first steps
    move every weight by the whole learning rate. Mosaics are off, because the refit uses images without mosaics.

    Args:
        recipe: the recipe of the run.
        settings: the settings of the run, as Ultralytics would resolve them.
        explicit: keys of the settings that the user chose.
    """
    wanted = after_refit(recipe.target, int(settings["epochs"])) if recipe.recover.refit else TRAINED
    if "optimizer" in explicit and "Adam" not in str(settings["optimizer"]):
        explicit = explicit | {"lr0"}  # the value in GENTLE is for AdamW only
    return not_chosen(explicit, wanted)


def after_refit(target: Target | None, epochs: int) -> dict[str, Any]:
    """The settings of a run that refits the weights after its cuts.

    Args:
        target: the target of the recipe; None if it only sets weights to zero.
        epochs: number of epochs of the run.
    """
    deep = target is not None and (target.keep is None or target.keep <= DEEP[target.metric])
    return {**fine_tuning(epochs), "lr0": GENTLE["lr0"] * (2 if deep else 1)}


def fine_tuning(epochs: int) -> dict[str, Any]:
    """The settings of a run that fine-tunes a trained model.

    Args:
        epochs: number of epochs of the run. No epoch uses mosaics, and at most half of them are warm-up.
    """
    return {**GENTLE, "warmup_epochs": min(WARM_UP, epochs / 2), "close_mosaic": epochs}


def not_chosen(explicit: Set[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the user did not choose."""
    return {key: value for key, value in settings.items() if key not in explicit}


def as_arguments(settings: Mapping[str, Any]) -> str:
    """Settings as they are written on a command line."""
    return " ".join(f"{key}={value}" for key, value in settings.items())
