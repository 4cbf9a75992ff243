# SPDX-License-Identifier: AGPL-3.0-or-later
"""What happens around `YOLO.train`: read our arguments, refuse what cannot work, choose the trainer."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.nn.modules.head import Detect
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, checks
from ultralytics.utils import __version__ as ULTRALYTICS
from ultralytics.utils.files import get_latest_run

from yolo_prune import _keys
from yolo_prune.cut.record import close_record, is_pruned, read_record
from yolo_prune.env import versions
from yolo_prune.env.log import PREFIX
from yolo_prune.env.releases import load_checkpoint, load_yaml, shares_callbacks
from yolo_prune.errors import ArgumentError, NothingToRemoveError, PruneError, RunError
from yolo_prune.graph.probes import stride
from yolo_prune.latency import search
from yolo_prune.planning import planner
from yolo_prune.recipe import Recipe, load_recipe
from yolo_prune.report import Report
from yolo_prune.run import journal, schedule
from yolo_prune.run.callback import PruneCallback
from yolo_prune.run.settings import further, said, unchosen, without
from yolo_prune.run.trainer import prune_trainer


def train(model: Any, stock_train: Callable[..., Any], trainer: Any, arguments: dict[str, Any]) -> Any:
    """`YOLO.train` with pruning: the stock one, given a prepared trainer class and callbacks.

    Args:
        model: the `YOLO` object.
        stock_train: Ultralytics' own `Model.train`.
        trainer: the trainer class the user passed, or None.
        arguments: what the user passed to `train`.

    Raises:
        PruneError: Before anything is written, if an argument is wrong or the recipe does not fit the model or the run;
            later, if the run cannot go on or ends without the pruned model.
    """
    model._check_is_pytorch_model()
    stock = _keys.without_pruning_keys(arguments)
    settings, explicit = _settings(model, stock)
    if settings["resume"]:
        callback = _resumed(model, arguments, settings)
        if callback is None and not _resumes_pruned(model, settings):
            return stock_train(model, trainer=trainer, **stock)
    else:
        callback = _callback(model, arguments, settings)
        _check_keeps_structure(model, settings)
        if callback is None:
            close_record(model.model)
            if not is_pruned(model.model):
                return stock_train(model, trainer=trainer, **stock)
            if isinstance(settings["epochs"], int) and not explicit & {"optimizer", "lr0", "time"}:
                better = said(without(explicit, further(settings["epochs"])))
                LOGGER.info(f"{PREFIX}the model is pruned, and trained already. To go up from there: {better}")
        elif callback.recipe.recover.distill:
            stock["distill_model"] = str(_origin(model))
        if callback and model.ckpt and settings.get("pretrained") is not False:
            ours = unchosen(callback.recipe, settings, explicit)
            given = said(ours)
            LOGGER.info(f"{PREFIX}as the model is trained already: {given}, where nothing else was asked for")
            stock |= ours
        if is_pruned(model.model) and not model.ckpt:
            model.ckpt = {"model": model.model}  # pruned in memory: train it, do not build it anew from YAML
    _check_devices(settings)
    trainer = prune_trainer(_trainer_class(trainer, model))
    held = model.model, model.ckpt
    if callback:
        callback.attach(model.callbacks)
    try:
        return stock_train(model, trainer=trainer, **stock)
    except BaseException as e:
        model.model, model.ckpt = held  # as it was, so that the run can be started once more
        journal.fail(model.trainer, e)
        if isinstance(e, subprocess.CalledProcessError) and getattr(model.trainer, "ddp", False):
            raise RunError(_failed_worker(model.trainer)) from e  # this process only started those that train
        raise
    finally:
        if callback:
            callback.detach(model.callbacks)


def _trainer_class(given: Any, model: Any) -> Any:
    if given is not None and not isinstance(given, type):
        raise RunError(f"trainer={given!r} is not a class. Pass a subclass of a trainer of Ultralytics.")
    return given or model._smart_load("trainer")


def _check_devices(settings: Mapping[str, Any]) -> None:
    device = settings.get("device")
    several = len(device) > 1 if isinstance(device, list | tuple) else "," in str(device)
    if several and not shares_callbacks():
        raise RunError(
            f"Ultralytics {ULTRALYTICS} does not hand callbacks to the processes of a run on several devices, so that "
            "they would neither prune nor keep a pruned structure. Train on one device, or pip install -U ultralytics."
        )


def _failed_worker(trainer: Any) -> str:
    try:
        reason = Report.load(trainer.save_dir).error
    except PruneError:
        reason = None
    return f"Training on {trainer.world_size} devices failed: {reason or 'see what the processes printed above'}"


def _settings(model: Any, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The run's settings as `Model.train` is about to resolve them, and which of them somebody chose."""
    cfg = arguments.get("cfg")
    base = load_yaml(checks.check_yaml(cfg)) if cfg else model.overrides
    return {**DEFAULT_CFG_DICT, **base, **arguments}, {*(base if cfg else ()), *arguments}


def _callback(model: Any, arguments: Mapping[str, Any], settings: Mapping[str, Any]) -> PruneCallback | None:
    wanted = _keys.wants_pruning(arguments.get("callbacks"))
    if not wanted:
        if given := _recipe_keys(arguments):
            raise ArgumentError(f"'{given[0]}' has no effect by itself. Add callbacks='prune' to prune while training.")
        return None
    recipe = load_recipe(arguments.get("recipe"), _keys.overrides(arguments))
    for warning in versions.untested():
        LOGGER.warning(f"{PREFIX}{warning}")
    if (record := read_record(model.model)) and record.active and (model.ckpt or {}).get("optimizer"):
        LOGGER.warning(
            f"{PREFIX}{settings.get('model')} is of an unfinished pruning run; this begins a new one from it. To "
            "finish that one, use 'yolo train resume model=...'."
        )
    if schedule.sparsity(recipe) and recipe.schedule.start == 0:
        LOGGER.warning(
            f"{PREFIX}criterion.sparsity: with schedule.start 0 the first cut comes before any sparse training. Give a "
            "later start, or leave it out."
        )
    check_run(settings)
    _check_validates(recipe, settings)
    _check_teacher(model, recipe, settings)
    _check_fits(model.model, recipe, settings)
    return PruneCallback(recipe, str(settings.get("model") or model.model_name))


def _check_teacher(model: Any, recipe: Recipe, settings: Mapping[str, Any]) -> None:
    """Refuse a distillation that Ultralytics would only find impossible once the run has begun."""
    teacher = settings.get("distill_model")
    if not (recipe.recover.distill or teacher):
        return
    if "distill_model" not in DEFAULT_CFG_DICT:
        raise RunError(f"Distillation needs a later Ultralytics than {ULTRALYTICS}: pip install -U ultralytics.")
    key = "recover.distill" if recipe.recover.distill else "distill_model"
    if not _levels(model.model):
        raise RunError(f"{key} needs a model with a detection head, and this one is for {model.task}. Leave it out.")
    if recipe.recover.distill and teacher:
        raise RunError(f"recover.distill and distill_model={teacher} both name a teacher. Leave one of them out.")
    if recipe.recover.distill and not _origin(model):
        raise RunError(
            "recover.distill uses the checkpoint that the run starts from as teacher, and this model comes from no "
            "file. Save it and start from the .pt, or leave recover.distill out."
        )
    if teacher and Path(str(teacher)).is_file():  # else Ultralytics may know where to download it from
        levels = [_levels(module) for module in (model.model, load_checkpoint(teacher)[0])]
        if levels[0] != levels[1]:
            raise RunError(
                f"distill_model={teacher} cannot teach this model: it detects on {levels[1]} levels, the model on "
                f"{levels[0]}. Pass a checkpoint of the same family."
            )
    elif teacher and Path(str(teacher)).suffix != ".pt":
        raise RunError(f"distill_model='{teacher}' is no checkpoint. Pass the path of a .pt file.")


def _levels(module: Any) -> int:
    """Levels on which a model detects; 0 without a detection head."""
    return next((len(layer.f) for layer in module.model if isinstance(layer, Detect)), 0)


def _origin(model: Any) -> Path | None:
    """The file that a model was loaded from."""
    path = Path(str(getattr(model.model, "pt_path", None) or ""))
    return path.resolve() if path.is_file() else None


def _recipe_keys(arguments: Mapping[str, Any]) -> list[str]:
    return [key for key in arguments if _keys.is_pruning_key(key) and key != "callbacks"]


def _resumed(model: Any, arguments: Mapping[str, Any], settings: Mapping[str, Any]) -> PruneCallback | None:
    """A resumed run goes on with the recipe that its checkpoint carries, if it was pruning."""
    wanted = _keys.wants_pruning(arguments.get("callbacks"))
    last = getattr(model.trainer, "last", None)
    if settings["resume"] is True and last and last.exists() and not (model.ckpt or {}).get("optimizer"):
        raise RunError(f"'{model.ckpt_path}' is not the run that was interrupted. Resume that with YOLO('{last}').")
    record = read_record(_resume_source(model, settings))
    if record is None or not record.active:
        if wanted or _recipe_keys(arguments):
            raise RunError(
                "The checkpoint to resume is not of a run that was pruning, so pruning cannot be added to it. Start a "
                "new run from it instead: leave out resume."
            )
        return None
    if given := _recipe_keys(arguments):
        raise RunError(f"A resumed run keeps the recipe that it began with: leave out {', '.join(given)}.")
    if settings["resume"] is True and not (model.ckpt or {}).get("optimizer"):
        raise RunError(
            f"'{model.ckpt_path}' is of a run that has ended; there is nothing to resume. Leave out resume to train "
            "the pruned model further."
        )
    check_run(arguments)
    recipe = Recipe.model_validate(record.recipe)
    _check_validates(recipe, arguments)
    return PruneCallback(recipe)


def _check_validates(recipe: Recipe, settings: Mapping[str, Any]) -> None:
    if recipe.limit is not None and settings.get("val") is False:
        raise RunError("A limit on the drop (max_drop) needs validation after each epoch: leave val=False out.")


def _resumes_pruned(model: Any, settings: Mapping[str, Any]) -> bool:
    return is_pruned(_resume_source(model, settings))


def _resume_source(model: Any, settings: Mapping[str, Any]) -> nn.Module:
    resume = settings["resume"]
    module: nn.Module = model.model
    if isinstance(resume, str | Path):
        path = resume if Path(resume).exists() else get_latest_run()  # as Ultralytics goes on to
        module = load_checkpoint(path)[0] if path else module
    return module


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
        raise RunError("save=False does not work with callbacks=prune: the pruned model would be lost. Leave it out.")


def _check_fits(module: nn.Module, recipe: Recipe, settings: Mapping[str, Any]) -> None:
    """Try the whole recipe on the model that was named, before a run folder exists."""
    imgsz = settings["imgsz"]
    size = max(imgsz) if isinstance(imgsz, list | tuple) else int(imgsz)
    step = stride(module)  # Ultralytics rounds up to it, too
    freeze = settings.get("freeze")
    frozen = freeze if isinstance(freeze, list | tuple) else range(freeze) if isinstance(freeze, int) else ()
    names = [f"model.{layer}" for layer in frozen]
    try:
        size = max(1, -(-size // step)) * step
        graph = planner.survey(module, recipe, size, names)
        present = search.trial(module, graph, recipe, size).present
    except NothingToRemoveError as e:
        raise RunError(f"{e} Otherwise train without callbacks=prune: a pruned model stays pruned.") from e
    schedule.rounds(recipe, int(settings["epochs"]), present)


def _check_keeps_structure(model: Any, settings: Mapping[str, Any]) -> None:
    pretrained = settings.get("pretrained", True)
    if is_pruned(model.model):
        if pretrained not in (True, None):
            raise RunError(
                f"pretrained={pretrained!r} would rebuild the dense model and lose the pruned structure. Leave it out, "
                "or start from the dense checkpoint."
            )
    elif isinstance(pretrained, str | Path) and Path(pretrained).exists():
        weights, _ = load_checkpoint(pretrained)
        if is_pruned(weights):
            raise RunError(
                f"pretrained={pretrained} is a pruned model; copied into the dense one, its structure would be lost. "
                f"Pass it as the model instead: model={pretrained}."
            )
