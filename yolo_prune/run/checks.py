# SPDX-License-Identifier: AGPL-3.0-or-later
"""Checks before a run begins, when nothing is written yet. A refusal names the reason and an alternative."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.engine.model import Model
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.modules.head import Detect
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER
from ultralytics.utils import __version__ as ULTRALYTICS
from ultralytics.utils.checks import check_imgsz

from yolo_prune.cut import proof
from yolo_prune.cut.masks import Masks
from yolo_prune.cut.plan import Plan
from yolo_prune.cut.record import composed_plan, is_pruned, is_rebuilt
from yolo_prune.data import datasets
from yolo_prune.env import log
from yolo_prune.env.releases import load_checkpoint, shares_callbacks
from yolo_prune.errors import NothingToRemoveError, RunError
from yolo_prune.graph.probes import stride
from yolo_prune.planning import classes, planner
from yolo_prune.recipe import Recipe
from yolo_prune.run import schedule
from yolo_prune.zeros import planner as zeros


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings that pruning does not work with.

    Raises:
        RunError: If a setting does not work with pruning. The message names the setting, the reason and an alternative.
    """
    refused = {
        "compile": (
            bool(settings.get("compile")),
            "a compiled model cannot change shape",
            "leave compile out",
        ),
        "quantize": (
            settings.get("quantize") in (8, "8", "int8"),
            "quantization-aware training fixes the shapes",
            "prune first, then train the pruned checkpoint with quantize=8",
        ),
        "time": (
            settings.get("time") is not None,
            "the number of epochs is not known beforehand",
            "use epochs",
        ),
        "data": (
            isinstance(settings.get("data"), list | tuple),
            "rounds belong to one run",
            "pass one dataset",
        ),
    }
    for key, (wrong, why, remedy) in refused.items():
        if wrong:
            raise RunError(f"{key}={settings[key]!r} does not work with callbacks=prune: {why}. Instead, {remedy}.")
    if settings.get("save") is False:
        raise RunError("save=False does not work with callbacks=prune: the pruned model would be lost. Leave save out.")


def check_structure(recipe: Recipe) -> None:
    """Refuse a run that only removes classes: this needs no training."""
    if recipe.structure and recipe.target is None and recipe.sparsity is None:
        raise RunError(
            "structure: to remove classes, no training is needed. Remove them with 'yolo-prune apply model=... "
            "recipe.structure.keep_classes=[...] save=fewer.pt', then train fewer.pt on the same dataset: its labels "
            "are matched by name. To prune in the same run, add a target or sparsity."
        )


def without_classes(module: nn.Module, recipe: Recipe, imgsz: int) -> nn.Module | None:
    """The model that a run starts from if the recipe removes classes; None if it does not.

    Args:
        module: the model; it is not changed.
        recipe: the recipe of the run.
        imgsz: image size in pixels.
    """
    if recipe.structure is None:
        return None
    classes.refuse_other_tasks(module)
    graph = planner.survey(module, recipe, imgsz)
    plan = classes.plan_for(module, graph, recipe.structure)
    if recipe.proof:
        proof.prove(module, plan)
    LOGGER.info(f"{log.PREFIX}{plan.classes.describe() if plan.classes else ''}")
    return classes.removed(module, graph, plan)


def check_validates(recipe: Recipe, settings: Mapping[str, Any]) -> None:
    """Refuse a limit on the drop in a run that does not validate."""
    if recipe.limit is not None and settings.get("val") is False:
        raise RunError("A limit on the drop (max_drop) needs validation after each epoch. Leave val=False out.")


def check_validation_images(trainer: type[BaseTrainer], task: str | None, settings: Mapping[str, Any]) -> None:
    """Refuse a dataset without validation images. Ultralytics ends only after it has made the folder of the run.

    Args:
        trainer: the class of the trainer. If it has methods of the user's own that find images, nothing is checked.
        task: the task of the model.
        settings: the settings of the run.
    """
    finders = [getattr(trainer, name, None) for name in ("get_dataset", "get_dataloader", "build_dataset")]
    if any(finder and not finder.__module__.startswith("ultralytics.") for finder in finders):
        return
    data, split = settings.get("data"), str(settings.get("split") or "val")
    for each in data if isinstance(data, list | tuple) else [data]:
        if isinstance(each, str | Path) and datasets.lacks_images(each, task, split):
            raise RunError(
                f"data={each} has no images in its split '{split}', and Ultralytics needs validation images in every "
                "run. Move some of the training images there."
            )


def check_teacher(model: Model, recipe: Recipe, settings: Mapping[str, Any]) -> None:
    """Refuse a distillation that cannot work. Ultralytics would refuse it too, but only after the run has begun."""
    teacher = settings.get("distill_model")
    if not (recipe.recover.distill or teacher):
        return
    if "distill_model" not in DEFAULT_CFG_DICT:
        raise RunError(
            f"Distillation needs a newer release of Ultralytics than {ULTRALYTICS}: pip install -U ultralytics."
        )
    key = "recover.distill" if recipe.recover.distill else "distill_model"
    if not _levels(model.model):
        raise RunError(f"{key} needs a model with a detection head; this model is for {model.task}. Leave {key} out.")
    if recipe.recover.distill and teacher:
        raise RunError(f"recover.distill and distill_model={teacher} both name a teacher. Leave one of them out.")
    if recipe.recover.distill and not origin(model):
        raise RunError(
            "recover.distill uses the checkpoint that the run starts from as teacher, and this model was not loaded "
            "from a file. Save the model and start from the .pt file, or leave recover.distill out."
        )
    if teacher and Path(str(teacher)).is_file():  # otherwise Ultralytics may download the teacher
        levels = [_levels(module) for module in (model.model, load_checkpoint(teacher)[0])]
        if levels[0] != levels[1]:
            raise RunError(
                f"distill_model={teacher} cannot teach this model: the teacher detects on {levels[1]} levels, the "
                f"model on {levels[0]}. Pass a checkpoint of the same family."
            )
    elif teacher and Path(str(teacher)).suffix != ".pt":
        raise RunError(f"distill_model='{teacher}' is not a checkpoint. Pass the path of a .pt file.")


def _levels(module: Any) -> int:
    """Number of levels on which a model detects; 0 without a detection head."""
    return next((len(layer.f) for layer in module.model if isinstance(layer, Detect)), 0)


def image_size(module: nn.Module, settings: Mapping[str, Any]) -> int:
    """The image size of a run, as the trainer will find it."""
    step = stride(module)
    size: int = check_imgsz(settings["imgsz"], stride=step, floor=step, max_dim=1)
    return size


def check_fits(module: nn.Module, recipe: Recipe, settings: Mapping[str, Any]) -> None:
    """Try the whole recipe on the model before a run folder exists, to refuse a recipe that does not fit."""
    size = image_size(module, settings)
    freeze = settings.get("freeze")
    frozen = freeze if isinstance(freeze, list | tuple) else range(freeze) if isinstance(freeze, int) else ()
    names = [f"model.{layer}" for layer in frozen]
    try:
        graph = planner.survey(module, recipe, size, names, log.bar("trying out blocks"))
        present = zeros.trial(module, graph, recipe, size, names).present
    except NothingToRemoveError as e:
        raise RunError(f"{e} Or train without callbacks=prune: a pruned model keeps its structure.") from e
    schedule.rounds(recipe, int(settings["epochs"]), present)


def check_keeps_structure(model: Model, settings: Mapping[str, Any], cut: bool = False) -> None:
    """Refuse a run that would replace a pruned structure by a dense one, or a dense structure by a pruned one.

    Args:
        model: the `YOLO` object.
        settings: the settings of the run.
        cut: whether the run starts from a pruned copy of the model.
    """
    pretrained = settings.get("pretrained", True)
    if cut or is_pruned(model.model):
        if pretrained is False:
            raise RunError(
                "pretrained=False would rebuild the dense model and lose the pruned structure. Leave pretrained out. "
                "After reset_weights(), which sets it, pass pretrained=True: this trains the new weights in the pruned "
                "structure."
            )
        if pretrained not in (True, None):
            raise RunError(
                f"pretrained={pretrained!r} would rebuild the dense model and lose the pruned structure. Leave "
                "pretrained out, or start from the dense checkpoint."
            )
    elif isinstance(pretrained, str | Path) and Path(pretrained).exists():
        weights, _ = load_checkpoint(pretrained)
        if is_pruned(weights):
            raise RunError(
                f"pretrained={pretrained} is a pruned model. Copying its weights into the dense model would lose the "
                f"pruned structure. Pass it as the model instead: model={pretrained}."
            )
    if not model.ckpt and is_rebuilt(model.model):
        raise RunError(
            f"'{model.model_name}' describes a pruned model, but a YAML file always builds the dense model. Pass the "
            "pruned .pt checkpoint; or, for the dense model, remove the key 'pruning' from the file."
        )


def check_load(module: nn.Module, weights: nn.Module) -> Masks:
    """Refuse to load weights between a pruned model and a model with another structure.

    Ultralytics copies the tensors that fit, and leaves the others as they are.

    Returns:
        The masks of the weights of `module` that must be zero again after loading.
    """
    mine, theirs = composed_plan(module), composed_plan(weights)
    ours, others = mine or Plan({}, {}, {}), theirs or Plan({}, {}, {})
    alike = (ours.keep, ours.classes) == (others.keep, others.classes)
    if alike and others.masks in ({}, ours.masks):
        return ours.masks
    if alike:
        differ = "The weights to load have zeros, which this model would not keep"
    elif mine and theirs:
        differ = "This model and the weights to load were pruned differently"
    else:
        differ = f"This model is {'' if mine else 'not '}pruned, but the weights to load are{' not' if mine else ''}"
    file = getattr(weights, "pt_path", None)
    known = file and Path(str(file)).is_file()
    raise RunError(
        f"{differ}. "
        + ("" if alike else "Loading would mix two structures and damage the model. ")
        + "Instead, "
        + ("" if known else "save the model of the weights with its save(), and ")
        + f"start from the file of the weights: YOLO('{file if known else 'weights.pt'}').train(...)."
    )


def check_gradients() -> None:
    """Refuse to train where gradients are off. Ultralytics fails there too, but only at its first batch."""
    if not torch.is_grad_enabled():
        raise RunError(
            "Training needs gradients, and they are off here: this call is inside torch.inference_mode() or "
            "torch.no_grad(), or after torch.set_grad_enabled(False). Call train outside of it."
        )


def check_devices(settings: Mapping[str, Any]) -> None:
    """Refuse several devices if this release of Ultralytics does not pass callbacks to their processes."""
    device = settings.get("device")
    several = len(device) > 1 if isinstance(device, list | tuple) else "," in str(device)
    if several and not shares_callbacks():
        raise RunError(
            f"Ultralytics {ULTRALYTICS} does not pass callbacks to the processes of a run on several devices. These "
            "processes would neither prune nor keep a pruned structure. Train on one device, or pip install -U "
            "ultralytics."
        )


def origin(model: Model) -> Path | None:
    """The file that a model was loaded from; None if it was not loaded from a file."""
    # After a cut in memory, `pt_path` names no file, and `ckpt_path` is the file from before the cut.
    paths = (Path(str(path)) for path in (getattr(model.model, "pt_path", None), model.ckpt_path) if path)
    return next((path.resolve() for path in paths if path.is_file()), None)
