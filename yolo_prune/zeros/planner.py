# SPDX-License-Identifier: AGPL-3.0-or-later
"""Makes a plan of the zeros that a recipe asks for: finds the layers, scores their weights and selects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.utils import LOGGER

from yolo_prune.cut.forecast import Forecast
from yolo_prune.cut.masks import Mask, Masks
from yolo_prune.cut.plan import Plan, Protected
from yolo_prune.cut.record import composed_plan
from yolo_prune.data.calibration import Calibration, Progress
from yolo_prune.env.image_size import ImageSize
from yolo_prune.errors import NothingToRemoveError, RecipeError, TargetError
from yolo_prune.graph import Graph, named
from yolo_prune.latency import search
from yolo_prune.latency.search import Trial
from yolo_prune.planning import planner
from yolo_prune.recipe import Recipe
from yolo_prune.recipe.schema import Sparsity
from yolo_prune.recover.scope import inside
from yolo_prune.zeros import scores as scoring
from yolo_prune.zeros.layers import Found, SparseLayer, find
from yolo_prune.zeros.patterns import Pattern, lowest

IMAGES = 64
"""Default number of training images for a score that looks at inputs; a choice, as for the criteria."""


def images_for(recipe: Recipe) -> int:
    """Number of training images that the scores of a recipe need; 0 if they use weights only."""
    asked = recipe.sparsity
    return (asked.images or IMAGES) if asked and asked.score in scoring.FROM_INPUTS else 0


def rehearsal(recipe: Recipe) -> Recipe:
    """The recipe with scores that need no images. Its plans have as many zeros."""
    if recipe.sparsity is None or not images_for(recipe):
        return recipe
    stand_in = recipe.sparsity.model_copy(update={"score": "magnitude", "images": None})
    return recipe.model_copy(update={"sparsity": stand_in})


def trial(model: nn.Module, graph: Graph, recipe: Recipe, imgsz: ImageSize, frozen: Sequence[str] = ()) -> Trial:
    """Try a recipe on a model before any work is done; see `latency.search.trial`.

    Raises:
        PruneError: Also if no layer may have the zeros that the recipe asks for.
    """
    if recipe.sparsity is None:
        return search.trial(model, graph, recipe, imgsz)
    if recipe.target is not None:
        _own_amounts(model, found_in(model, recipe, frozen), recipe.sparsity)
        return search.trial(model, graph, recipe, imgsz)
    plan = plan_for(model, rehearsal(recipe), recipe.sparsity.fixed, planner.standing(model, graph), frozen)
    return Trial(plan, plan.predicted.present("weights"), None)


def plan_for(
    model: nn.Module,
    recipe: Recipe,
    amount: float,
    present: Forecast,
    frozen: Sequence[str] = (),
    calibration: Calibration | None = None,
    progress: Progress = iter,
    earlier: Masks | None = None,
) -> Plan:
    """Plan the zeros of a model. The model is not changed.

    Args:
        model: the model.
        recipe: with `sparsity`.
        amount: fraction of the weights that are zero afterwards.
        present: the cost of the model.
        frozen: names of modules that are not trained and therefore stay as they are.
        calibration: training images, for scores that look at inputs.
        progress: wraps an iterable to show a progress bar.
        earlier: masks of weights that are zero already, and stay zero; None: those in the record of the model.

    Raises:
        NothingToRemoveError: If the model has as many zeros already.
        TargetError: If no layer may have zeros.
        RecipeError: If a pattern matches no layer, or images are missing.
    """
    asked, found = _asked(recipe), found_in(model, recipe, frozen)
    own = _own_amounts(model, found, asked)
    scores = _scores(model, found.layers, asked, calibration, progress)
    still = [layer for layer in found.layers if layer.tensor not in scores]
    layers = [layer for layer in found.layers if layer.tensor in scores]
    kept = _kept(layers, masks_of(model) if earlier is None else earlier)
    chosen = _select(layers, asked, amount, scores, kept, {name: own[name] for name in own if name in scores})
    masks = {name: mask & kept[name] for name, mask in chosen.items()}
    forecast = replace(present, **_counts(kept, masks))
    if forecast.zeros_after == forecast.zeros_before:
        raise NothingToRemoveError(
            f"sparsity: {1 - forecast.present('weights'):.3f} of the weights are zero already, so an amount of "
            f"{amount:g} leaves nothing to remove. Set a larger amount."
        )
    if dead := [name.removesuffix(".weight") for name, mask in masks.items() if not mask.any()]:
        LOGGER.warning(
            f"All weights of {', '.join(dead)} are zero: their outputs no longer depend on the image. To keep some, "
            "give these layers an amount of their own in sparsity.layers, or name them in protect."
        )
    for layer in layers:
        if layer.merged:
            masks[f"{layer.merged[0]}.weight"] = layer.centre(masks[layer.tensor])
    skipped = {**found.skipped, "the layer did not run on the images": [layer.name for layer in still]}
    protected = tuple(Protected(tuple(names), f"no zeros: {reason}") for reason, names in skipped.items() if names)
    stored = {name: Mask.of(mask) for name, mask in masks.items() if not mask.all()}
    return Plan({}, {}, {}, protected=protected, forecast=forecast, masks=stored)


def plan_after(
    cut: Plan,
    model: nn.Module,
    recipe: Recipe,
    amount: float,
    earlier: Masks,
    frozen: Sequence[str] = (),
    calibration: Calibration | None = None,
    progress: Progress = iter,
) -> Plan:
    """Plan the zeros in what a cut leaves. The plan has no masks if there is nothing to remove.

    Args:
        cut: the plan of the cut, with its forecast.
        model: the model after the cut.
        recipe: with `sparsity`.
        amount: fraction of the weights that are zero afterwards.
        earlier: masks of weights that are zero already, in the shapes after the cut.
        frozen: as for `plan_for`.
        calibration: as for `plan_for`.
        progress: as for `plan_for`.
    """
    present = cut.predicted.after
    try:
        return plan_for(model, recipe, amount, present, frozen, calibration, progress, earlier)
    except TargetError as e:
        LOGGER.warning(f"{e} After the cut, there are no zeros.")
        return Plan({}, {}, {}, forecast=present)
    except NothingToRemoveError:
        kept = _kept(found_in(model, recipe, frozen).layers, earlier)
        return Plan({}, {}, {}, forecast=replace(present, **_counts(kept, kept)))


def share_of(model: nn.Module, recipe: Recipe, frozen: Sequence[str] = ()) -> float:
    """Share of zeros, by earlier plans, among the weights that may be zero."""
    kept = _kept(found_in(model, recipe, frozen).layers, masks_of(model))
    counts = _counts(kept, kept)
    return float(counts["zeros_after"] / counts["weights"])


def _kept(layers: Sequence[SparseLayer], masks: Masks) -> dict[str, Tensor]:
    """`{tensor name: weights that are not masked, as bools}`."""
    whole = {layer.tensor: torch.ones(layer.weight.shape, dtype=torch.bool) for layer in layers}
    return {name: masks[name].kept if name in masks else ones for name, ones in whole.items()}


def _counts(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Any]:
    """The numbers of a forecast: weights that may be zero, and zeros among them before and after."""
    return {
        "weights": sum(mask.numel() for mask in before.values()),
        "zeros_before": sum(int((~mask).sum()) for mask in before.values()),
        "zeros_after": sum(int((~mask).sum()) for mask in after.values()),
    }


def masks_of(model: nn.Module) -> Masks:
    """The masks of the weights that earlier plans set to zero."""
    plan = composed_plan(model)
    return plan.masks if plan else {}


def found_in(model: nn.Module, recipe: Recipe, frozen: Sequence[str] = ()) -> Found:
    """The layers of a model in which the recipe may set weights to zero.

    Raises:
        RecipeError: If a pattern of `protect` matches no module.
        TargetError: If there is no such layer.
    """
    asked = _asked(recipe)
    found = find(model, Pattern.read(asked.pattern), recipe.protect, frozen, asked.score in scoring.FROM_INPUTS)
    if not found.layers:
        reasons = "; ".join(f"{len(names)} layers: {reason}" for reason, names in found.skipped.items())
        raise TargetError(f"sparsity: no layer of this model can have these zeros ({reasons}). Change the pattern.")
    return found


def _asked(recipe: Recipe) -> Sparsity:
    if recipe.sparsity is None:
        raise RecipeError("sparsity: is missing; add it, for example 'sparsity: {amount: 0.5}'.")
    return recipe.sparsity


def _own_amounts(model: nn.Module, found: Found, asked: Sparsity) -> dict[str, float]:
    """`{tensor name: amount}` of the layers that have an amount of their own; the last pattern that matches counts."""
    amounts: dict[str, float] = {}
    for pattern, of_layers in asked.layers.items():
        modules = named(model, pattern, "sparsity.layers")
        hits = [layer.tensor for layer in found.layers if inside(layer.name, modules)]
        if not hits:
            raise RecipeError(f"sparsity.layers: '{pattern}' matches no layer that may have zeros. Leave it out.")
        amounts.update(dict.fromkeys(hits, of_layers.amount))
    return amounts


def _scores(
    model: nn.Module,
    layers: Sequence[SparseLayer],
    asked: Sparsity,
    calibration: Calibration | None,
    progress: Progress,
) -> Mapping[str, Tensor]:
    if asked.score == "random":
        return {layer.tensor: scoring.random(layer, asked.seed or 0) for layer in layers}
    if asked.score == "magnitude":
        return {layer.tensor: scoring.magnitude(layer) for layer in layers}
    if calibration is None:
        raise RecipeError(
            f"sparsity: the score {asked.score} needs training images. Pass a dataset, for example data=coco8.yaml, or "
            "use recipe.sparsity.score=magnitude."
        )
    images = calibration.images(asked.images or IMAGES)
    scores = scoring.from_inputs(model, layers, images, asked.score, asked.scope == "global", progress)
    if not scores:
        raise TargetError(f"sparsity: no layer ran on the images, which the score {asked.score} needs.")
    return scores


def _select(
    layers: Sequence[SparseLayer],
    asked: Sparsity,
    amount: float,
    scores: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    own: Mapping[str, float],
) -> dict[str, Tensor]:
    """`{tensor name: kept weights, as bools}`."""
    pattern, share = Pattern.read(asked.pattern), amount / asked.fixed
    allowed = {layer.tensor: pattern.allowed(scores[layer.tensor], kept[layer.tensor]) for layer in layers}
    ranked = {
        name: torch.where(kept[name], scores[name].double(), 0.0).masked_fill(~allowed[name], torch.inf)
        for name in scores
    }
    chosen: dict[str, Tensor] = {}
    pool = [name for name in ranked if name not in own]
    for name in own if asked.scope == "global" else ranked:
        wanted = own[name] * share if name in own else amount
        chosen[name] = lowest(ranked[name], _count(pattern, wanted, share, [allowed[name]]))
    if asked.scope == "global" and pool:
        together = torch.cat([ranked[name].flatten() for name in pool])
        mask = lowest(together, _count(pattern, amount, share, [allowed[name] for name in pool]))
        parts = torch.split(mask, [ranked[name].numel() for name in pool])
        chosen |= {name: part.reshape(ranked[name].shape) for name, part in zip(pool, parts, strict=True)}
    return chosen


def _count(pattern: Pattern, amount: float, share: float, allowed: Sequence[Tensor]) -> int:
    """Number of zeros. With a pattern N:M, a round before the last one has a share of the zeros of the pattern."""
    if pattern.of:
        return round(min(share, 1.0) * sum(int(mask.sum()) for mask in allowed))
    return round(amount * sum(mask.numel() for mask in allowed))
