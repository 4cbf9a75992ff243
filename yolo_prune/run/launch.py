# SPDX-License-Identifier: AGPL-3.0-or-later
"""The new `YOLO.train`: reads the arguments of this package, refuses runs that cannot work, chooses the trainer."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.engine.model import Model
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER
from ultralytics.utils import checks as ultralytics_checks
from ultralytics.utils.files import get_latest_run

from yolo_prune import _keys, criteria
from yolo_prune.cut.record import Record, close_record, composed_plan, forget_lost_zeros, is_pruned, read_record
from yolo_prune.env import versions
from yolo_prune.env.log import PREFIX
from yolo_prune.env.releases import load_checkpoint, load_yaml
from yolo_prune.errors import ArgumentError, PruneError, RunError
from yolo_prune.recipe import Recipe, code, load_recipe
from yolo_prune.report import Report
from yolo_prune.run import checks, leftovers, schedule
from yolo_prune.run.callback import PruneCallback
from yolo_prune.run.finish import fail
from yolo_prune.run.settings import as_arguments, fine_tuning, not_chosen, recommended
from yolo_prune.run.trainer import KeepStructure, prune_trainer

OF_THE_MODEL = ("model", "task", "mode", "cfg")
"""Arguments that Ultralytics does not take from a file `cfg=`."""


@dataclass(frozen=True)
class Request:
    """The arguments of a call of `train`, resolved.

    Attributes:
        ours: the arguments of this package: `callbacks`, `recipe`, `recipe.<field>`.
        stock: the arguments of Ultralytics.
        settings: all settings of the run, resolved in the same way as `Model.train` resolves them.
        explicit: keys of the settings that the user chose.
        prunes: whether `callbacks=prune` was passed.
    """

    ours: Mapping[str, Any]
    stock: Mapping[str, Any]
    settings: Mapping[str, Any]
    explicit: frozenset[str]
    prunes: bool

    @classmethod
    def of(cls, model: Model, arguments: Mapping[str, Any]) -> Request:
        """Resolve arguments as Ultralytics does: defaults, then `cfg=` or the model's overrides, then `arguments`.

        Raises:
            ArgumentError: If a callback is not known, or a key of this package is misspelt in the file `cfg=`.
        """
        cfg, stock = arguments.get("cfg"), _keys.without_pruning_keys(arguments)
        file = load_yaml(ultralytics_checks.check_yaml(cfg)) if cfg else {}
        _keys.check_spelling(file, DEFAULT_CFG_DICT)
        given = {**file, **arguments}
        explicit = _keys.without_pruning_keys(given)
        ours = {key: value for key, value in given.items() if key not in explicit}
        settings = {**DEFAULT_CFG_DICT, **({} if cfg else model.overrides), **explicit}
        if any(map(_keys.is_pruning_key, file)):
            stock = _instead_of_file(model, file, stock)
        return cls(ours, stock, settings, frozenset(explicit), _keys.wants_pruning(ours.get("callbacks")))

    @property
    def recipe_keys(self) -> list[str]:
        """The keys of this package, except `callbacks`."""
        return [key for key in self.ours if key != "callbacks"]


def _instead_of_file(model: Model, file: Mapping[str, Any], stock: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with the same effect as `cfg=`, for a file with keys of this package: Ultralytics would refuse them.

    With a file, Ultralytics leaves out the overrides of the model, and takes the model and its task from the model.
    """
    left_out = {k: DEFAULT_CFG_DICT[k] for k in model.overrides if k in DEFAULT_CFG_DICT and k != "data"}
    merged = {**left_out, **_keys.without_pruning_keys(file)}
    return {k: v for k, v in merged.items() if k not in OF_THE_MODEL} | {k: v for k, v in stock.items() if k != "cfg"}


@dataclass(frozen=True)
class Launch:
    """How to start a run that keeps a pruned structure.

    Attributes:
        callback: cuts the model while it trains; None if this run only keeps the structure.
        settings: arguments for Ultralytics, in addition to those of the user.
        resumed: the settings in the checkpoint from which a run is resumed; empty for a new run.
        start: the model to start from, if the recipe removes classes; None for the model as it is.
    """

    callback: PruneCallback | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    resumed: Mapping[str, Any] = field(default_factory=dict)
    start: nn.Module | None = None


def train(
    model: Model, stock_train: Callable[..., Any], trainer: type[BaseTrainer] | None, arguments: dict[str, Any]
) -> Any:
    """`YOLO.train` with pruning: calls Ultralytics' own `train` with a prepared trainer class and callbacks.

    Args:
        model: the `YOLO` object.
        stock_train: Ultralytics' own `Model.train`.
        trainer: the trainer class that the user passed, or None.
        arguments: the arguments that the user passed to `train`.

    Raises:
        PruneError: Before anything is written, if an argument is wrong or the recipe does not fit the model or the run;
            later, if the run cannot go on or ends without the pruned model.
        SyntaxError: If Ultralytics does not know an argument.
        TypeError: If an argument has a type that Ultralytics refuses. There are others for other values.
    """
    model._check_is_pytorch_model()
    request = Request.of(model, arguments)
    if forget_lost_zeros(model.model):
        LOGGER.warning(
            f"{PREFIX}the zeros of this model are not zero any more, so they are not kept: its weights were reset, or "
            "Ultralytics trained it without yolo-prune."
        )
    get_cfg(overrides={**request.settings, "mode": "train"})  # Ultralytics' own check of names and values comes first
    if request.settings["resume"]:
        launch = _resume(model, request)
    elif request.prunes:
        launch = _prune(model, request)
    else:
        launch = _keep_structure(model, request)
    if launch is None:
        return stock_train(model, trainer=trainer, **request.stock)
    checks.check_gradients()
    checks.check_devices(request.settings)
    stock = _trainer_class(trainer, model)
    checks.check_validation_images(stock, model.task, _data(request, launch))
    return _run(model, stock_train, prune_trainer(stock), request, launch)


def _data(request: Request, launch: Launch) -> Mapping[str, Any]:
    """The settings of a run that choose its images. A resumed run has those of its checkpoint."""
    known = launch.resumed or request.settings
    return {"data": request.settings["data"] or known.get("data"), "split": known.get("split")}


def _run(
    model: Model, stock_train: Callable[..., Any], trainer: type[BaseTrainer], request: Request, launch: Launch
) -> Any:
    """Train. If training fails, restore the model, so that the run can be started again."""
    before = model.model, model.ckpt
    if launch.start is not None:  # without the optimizer and the epoch of the model with all classes
        model.ckpt = {"model": launch.start, "train_args": (model.ckpt or {}).get("train_args", {})}
        model.model = launch.start
    elif is_pruned(model.model) and not model.ckpt:
        model.ckpt = {"model": model.model}  # the model was pruned in memory: do not train a new one from its YAML
    if launch.callback:
        launch.callback.attach(model.callbacks)
    try:
        return stock_train(model, trainer=trainer, **{**request.stock, **launch.settings})
    except BaseException as e:
        model.model, model.ckpt = before
        ran = model.trainer if isinstance(model.trainer, KeepStructure) else None
        if ran:
            fail(ran, e)
        if ran and isinstance(e, subprocess.CalledProcessError) and getattr(ran, "ddp", False):
            raise RunError(_failed_worker(ran)) from e  # this process only started the processes that train
        raise
    finally:
        if launch.callback:
            launch.callback.detach(model.callbacks)
        if isinstance(model.trainer, KeepStructure):
            model.trainer.release_folder()


def _failed_worker(trainer: BaseTrainer) -> str:
    try:
        reason = Report.load(trainer.save_dir).error
    except PruneError:
        reason = None
    return f"Training on {trainer.world_size} devices failed: {reason or 'see the output of the processes above'}"


def _trainer_class(given: type[BaseTrainer] | None, model: Model) -> Any:
    if given is not None and not isinstance(given, type):
        raise RunError(f"trainer={given!r} is not a class. Pass a subclass of an Ultralytics trainer.")
    return given or model._smart_load("trainer")


def _prune(model: Model, request: Request) -> Launch:
    """A new run that prunes."""
    settings = request.settings
    recipe = load_recipe(request.ours.get("recipe"), _keys.overrides(request.ours))
    _warn(model, recipe, settings)
    checks.check_structure(recipe)
    checks.check_settings(settings)
    checks.check_validates(recipe, settings)
    checks.check_teacher(model, recipe, settings)
    start = checks.without_classes(model.model, recipe, checks.image_size(model.model, settings))
    checks.check_fits(start or model.model, recipe, settings)
    checks.check_keeps_structure(model, settings, cut=start is not None)
    added: dict[str, Any] = {}
    if recipe.recover.distill:
        added["distill_model"] = str(checks.origin(model))
    if model.ckpt and settings.get("pretrained") is not False:
        gentle = recommended(recipe, settings, request.explicit)
        LOGGER.info(f"{PREFIX}the model is trained already, so these settings are used: {as_arguments(gentle)}")
        added |= gentle
    return Launch(PruneCallback(recipe), added, start=start)


def _warn(model: Model, recipe: Recipe, settings: Mapping[str, Any]) -> None:
    for warning in versions.untested():
        LOGGER.warning(f"{PREFIX}{warning}")
    if (record := read_record(model.model)) and record.active and (model.ckpt or {}).get("optimizer"):
        LOGGER.warning(
            f"{PREFIX}{settings.get('model')} belongs to an unfinished pruning run, and this command starts a new run "
            "from it. To finish the old run instead, use 'yolo train resume model=...'."
        )
    if schedule.sparsity(recipe) and recipe.schedule.start == 0:
        LOGGER.warning(
            f"{PREFIX}criterion.sparsity: with schedule.start 0 the first cut comes before any sparse training. Set a "
            "later schedule.start, or leave schedule.start out."
        )


def _keep_structure(model: Model, request: Request) -> Launch | None:
    """A run without our keys. A pruned model keeps its structure; for a model that is not pruned, returns None."""
    if request.recipe_keys:
        raise ArgumentError(
            f"'{request.recipe_keys[0]}' has no effect by itself. Add callbacks='prune' to prune while training."
        )
    checks.check_keeps_structure(model, request.settings)
    close_record(model.model)
    if not is_pruned(model.model):
        return None
    if (plan := composed_plan(model.model)) and plan.masks:
        LOGGER.info(f"{PREFIX}{sum(mask.zeros for mask in plan.masks.values()):,} zeros stay zero")
    epochs = request.settings["epochs"]
    if isinstance(epochs, int) and not request.explicit & {"optimizer", "lr0", "time"}:
        better = as_arguments(not_chosen(request.explicit, fine_tuning(epochs)))
        LOGGER.info(f"{PREFIX}the model is pruned and already trained. Settings that keep its accuracy: {better}")
    return Launch()


def _resume(model: Model, request: Request) -> Launch | None:
    """Resume an interrupted run. If the run was pruning, it continues with the recipe in its checkpoint."""
    settings = request.settings
    last = getattr(model.trainer, "last", None)
    if settings["resume"] is True and last and last.exists() and not (model.ckpt or {}).get("optimizer"):
        raise RunError(
            f"'{model.ckpt_path}' is not the checkpoint of the interrupted run. Resume that run with YOLO('{last}')."
        )
    path, source, checkpoint = _resume_source(model, settings)
    record, resumed = read_record(source), checkpoint.get("train_args") or {}
    if record is None or not record.active:
        if request.prunes or request.recipe_keys:
            raise RunError(
                "The checkpoint to resume belongs to a run without pruning, and pruning cannot be added to that run. "
                "Leave out resume: this starts a new run from the checkpoint."
            )
        return Launch(resumed=resumed) if is_pruned(source) else None
    if not checkpoint.get("optimizer"):
        leftovers.delete(Path(path).parent.parent)
        raise RunError(
            f"'{path}' belongs to a run that has ended, so there is nothing to resume. Leave out resume to train the "
            "pruned model further."
        )
    recipe = _recorded(record, request)
    checks.check_settings(request.stock)
    checks.check_validates(recipe, request.stock)
    return Launch(PruneCallback(recipe), resumed=resumed)


def _recorded(record: Record, request: Request) -> Recipe:
    """The recipe in a checkpoint. Code that it names is allowed only if the user names the same code again."""
    recipe, key = Recipe.model_validate(record.recipe), f"recipe.{code.FIELD}"
    named, given = code.named_in(recipe), request.ours.get(key)
    if others := [k for k in request.recipe_keys if not (named and k == key)]:
        raise RunError(f"A resumed run keeps the recipe that it began with. Leave out {', '.join(others)}.")
    if named and given is None:
        raise RunError(
            f"This run scores channels with '{named}', which is code, and a checkpoint must not import code by itself. "
            f"If you trust the code, pass {key}={named} beside resume."
        )
    if named and given != named:
        raise RunError(f"This run began with {key}={named}, not with {given}. Pass {key}={named}.")
    code.allow(recipe)
    criteria.create(recipe.criterion.name, recipe.criterion.options)  # code that is missing now is an error now
    return recipe


def _resume_source(model: Model, settings: Mapping[str, Any]) -> tuple[str | Path, nn.Module, Mapping[str, Any]]:
    """The checkpoint that a run is resumed from: its path, its model, and its content."""
    resume = settings["resume"]
    if isinstance(resume, str | Path):
        path = resume if Path(resume).exists() else get_latest_run()  # the same file that Ultralytics uses
        if path:
            return path, *load_checkpoint(path)
    return str(model.ckpt_path), model.model, model.ckpt or {}
