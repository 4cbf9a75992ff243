# SPDX-License-Identifier: AGPL-3.0-or-later
"""What happens around `YOLO.train`: read our arguments, refuse what cannot work, choose the trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, YAML, checks

from yolo_prune import keys, metadata, planner, schedule
from yolo_prune.callback import PREFIX, PruneCallback
from yolo_prune.errors import NothingToRemoveError, RunError
from yolo_prune.recipe import Recipe, load_recipe
from yolo_prune.trainer import prune_trainer


def train(model: Any, stock_train: Callable[..., Any], trainer: Any, arguments: dict[str, Any]) -> Any:
    """`YOLO.train` with pruning: the stock one, given a prepared trainer class and callbacks.

    Args:
        model: the `YOLO` object.
        stock_train: Ultralytics' own `Model.train`.
        trainer: the trainer class the user passed, or None.
        arguments: what the user passed to `train`.

    Raises:
        PruneError: If the recipe does not fit the model or the run; nothing was written then.
        SyntaxError: For an unknown callback name.
    """
    model._check_is_pytorch_model()
    stock = keys.without_pruning_keys(arguments)
    settings = _settings(model, stock)
    callback = _callback(model, arguments, settings)
    if callback is None and not (settings["resume"] or metadata.is_pruned(model.model)):
        return stock_train(model, trainer=trainer, **stock)
    _check_keeps_structure(model, settings)
    if metadata.is_pruned(model.model) and not model.ckpt:
        model.ckpt = {"model": model.model}  # pruned in memory: train it, do not build it anew from YAML
    trainer = prune_trainer(trainer or model._smart_load("trainer"))
    before = model.callbacks
    model.callbacks = {event: list(functions) for event, functions in before.items()}
    if callback:
        callback.attach(model.callbacks)
        stock = _without_warmup(model, stock, settings)
    try:
        return stock_train(model, trainer=trainer, **stock)
    finally:
        model.callbacks = before


def _without_warmup(model: Any, stock: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A trained model needs no warm-up, and Ultralytics' (bias learning rate 0.1) undoes much of what a cut left."""
    chosen = "warmup_epochs" in stock or settings["warmup_epochs"] != DEFAULT_CFG_DICT["warmup_epochs"]
    if chosen or settings["resume"] or not model.ckpt:
        return stock
    LOGGER.info(f"{PREFIX}no warm-up, as the model is trained already; pass warmup_epochs= to have one")
    return {**stock, "warmup_epochs": 0.0}


def _settings(model: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The run's settings as `Model.train` is about to resolve them."""
    cfg = arguments.get("cfg")
    base = YAML.load(checks.check_yaml(cfg)) if cfg else model.overrides
    return {**DEFAULT_CFG_DICT, **base, **arguments}


def _callback(model: Any, arguments: Mapping[str, Any], settings: Mapping[str, Any]) -> PruneCallback | None:
    wanted = keys.wants_pruning(arguments.get("callbacks"))
    given = [k for k in arguments if k.startswith("recipe")]
    if settings["resume"]:
        return _resumed(model, settings["resume"], wanted or bool(given))
    if given and not wanted:
        raise SyntaxError(f"'{given[0]}' has no effect by itself. Add callbacks='prune' to prune while training.")
    if not wanted:
        return None
    recipe = load_recipe(arguments.get("recipe"), keys.overrides(arguments))
    check_run(settings)
    _check_fits(model.model, recipe, settings)
    return PruneCallback(recipe, str(settings.get("model") or model.model_name))


def _resumed(model: Any, resume: Any, wanted: bool) -> PruneCallback | None:
    """A resumed run goes on with the recipe that its checkpoint carries."""
    if isinstance(resume, str | Path) and Path(resume).exists():
        module, _ = load_checkpoint(resume)
    else:
        module = model.model
    record = metadata.read(module)
    if record is None and wanted:
        raise RunError(
            "The checkpoint to resume was not being pruned, so callbacks=prune cannot be added to its run. "
            "Start a new run from it instead: leave out resume."
        )
    return PruneCallback(Recipe.model_validate(record.recipe)) if record else None


def check_run(settings: Mapping[str, Any]) -> None:
    """Refuse settings that pruning does not work with yet.

    Raises:
        RunError: Names the setting, the reason and the way round.
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
        "distill_model": (
            settings.get("distill_model") is not None,
            "the student's connections to the teacher have fixed widths",
            "prune first, then train the pruned checkpoint with distill_model",
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
        "device": (
            len(str(settings.get("device") or "").strip("[]()").split(",")) > 1 or str(settings.get("device")) == "-2",
            "pruning on several GPUs is not supported yet",
            "pass one device, for example device=0",
        ),
    }
    for key, (wrong, why, remedy) in refused.items():
        if wrong:
            raise RunError(f"{key}={settings[key]!r} does not work with callbacks=prune: {why}. Instead, {remedy}.")
    if settings.get("save") is False:
        raise RunError("save=False does not work with callbacks=prune: the pruned model would be lost. Leave it out.")


def _check_fits(module: nn.Module, recipe: Recipe, settings: Mapping[str, Any]) -> None:
    """Try the whole recipe on the model that was named, before a run folder exists."""
    imgsz = settings["imgsz"]
    size = max(imgsz) if isinstance(imgsz, list | tuple) else int(imgsz)
    try:
        plan = planner.make_plan(module, recipe, max(32, size // 32 * 32))
    except NothingToRemoveError as e:
        raise RunError(f"{e} Otherwise train without callbacks=prune: a pruned model stays pruned.") from e
    present = plan.forecast.present(recipe.target.metric) if plan.forecast else 1.0
    schedule.rounds(recipe.schedule, recipe.target.keep, int(settings["epochs"]), present)


def _check_keeps_structure(model: Any, settings: Mapping[str, Any]) -> None:
    pretrained = settings.get("pretrained", True)
    if metadata.is_pruned(model.model) and not settings["resume"] and pretrained not in (True, None):
        raise RunError(
            f"pretrained={pretrained!r} would rebuild the dense model and lose the pruned structure. Leave it out, or "
            "start from the dense checkpoint."
        )
