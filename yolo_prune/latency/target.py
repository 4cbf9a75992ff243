# SPDX-License-Identifier: AGPL-3.0-or-later
"""What takes how long on the target device: measured here once, or read from the profile of another one."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path

from torch import nn
from ultralytics.engine.model import Model
from ultralytics.utils import LOGGER

from yolo_prune.cut.record import student_of
from yolo_prune.data import datasets
from yolo_prune.env.log import PREFIX, bar
from yolo_prune.env.versions import PACKAGES, installed
from yolo_prune.errors import BenchError, TargetError
from yolo_prune.graph import probes
from yolo_prune.latency import probe
from yolo_prune.latency.layers import Layer, layers_of
from yolo_prune.latency.profile import Place, Table, Whole, model_key
from yolo_prune.latency.stopwatch import Stopwatch, cut_copy, dense_twin
from yolo_prune.measure import runtimes, subjects
from yolo_prune.measure.subjects import Setting
from yolo_prune.planning import planner
from yolo_prune.planning.cost import Shapes, Timing
from yolo_prune.recipe import Recipe
from yolo_prune.recipe.schema import CriterionSpec, Target

DEPTHS = (0.5, 0.9)
"""How far models are cut that are timed to set the layers' times right, of what may be cut.

A choice: with the dense model they lie over the range that targets ask for. Fewer would leave the line between sums of
layers and whole models to one point; each costs an export and a budget of the stopwatch.
"""
METHOD = 1
"""Times that were taken in another way are not those of this one: to be raised with every such change."""


def setting_of(target: Target, imgsz: int) -> tuple[str, Setting]:
    """Format and setting that a target without a profile is measured with; `imgsz` is the run's.

    Raises:
        BenchError: If it cannot be measured here.
    """
    format, size, device = target.format or "onnx", target.imgsz or imgsz, target.device or "cpu"
    try:
        asked = Setting.of(size, target.batch or 1, device, target.threads, quantize=target.quantize)
        _check(format, asked)
    except BenchError as e:  # which speaks of arguments
        raise BenchError(f"recipe.target: {e}") from e
    return format, asked


def _check(format: str, setting: Setting) -> None:
    """Pass if layers can be timed like that here."""
    if setting.quantize == 8:
        raise BenchError("quantize=8 cannot be profiled, as layers alone have no images to be calibrated on.")
    if format == "torch" and setting.quantize == 16 and setting.device.type == "cpu":
        raise BenchError("format=torch computes in float32 on a CPU: leave quantize=16 out, or pass device=0.")
    runtimes.check([format], setting.quantize, setting.device)


@runtimes.undisturbed()
def find(model: nn.Module, target: Target, imgsz: int) -> Timing | None:
    """What takes how long, for a latency target; None for other targets.

    Measured on this machine where it was not before, or read from the profile of another device.

    Args:
        model: dense, or pruned before.
        target: of the recipe.
        imgsz: of the run, in pixels; a profile has its own.

    Raises:
        BenchError: If it cannot be measured here, or the profile is not of this model.
        TargetError: If the model cannot get any faster.
    """
    if target.latency is None:
        return None
    dense = dense_twin(model)
    if target.profile is not None:
        return _profiled(dense, target.profile, imgsz)
    format, setting = setting_of(target, imgsz)
    layers = layers_of(dense, setting.imgsz)
    table = measured(dense, layers, format, setting)
    key = table.find(layers, setting.imgsz)  # where only the classes are others, the models that were timed will do
    assert key
    timing = table.timing(layers, key)
    LOGGER.info(f"{PREFIX}{table.place.format} works in widths of {timing.multiple} there")
    return timing


def _profiled(dense: nn.Module, path: str, imgsz: int) -> Timing:
    """What takes how long by a profile, at the image size that it was measured at; where it has several, the run's."""
    table = Table.load(path)
    anew = f"On the device: yolo-prune profile model=... format={table.place.format} imgsz=..."
    sizes = {size: layers_of(dense, size) for size in table.sizes() if size % probes.stride(dense) == 0}
    keys = {size: key for size, layers in sizes.items() if (key := table.find(layers, size))}
    if not sizes:
        raise BenchError(
            f"target.profile: '{path}' ({table.place}) is of imgsz {', '.join(map(str, table.sizes()))}, which this "
            f"model cannot take: sizes must be multiples of {probes.stride(dense)}. {anew}"
        )
    if not keys:
        raise BenchError(f"target.profile: '{path}' ({table.place}) is of another model. {anew}")
    if len(keys) > 1 and imgsz not in keys:
        raise BenchError(
            f"target.profile: '{path}' ({table.place}) has this model at imgsz {', '.join(map(str, keys))}, and not at "
            f"{imgsz}, which is the run's. {anew}"
        )
    size = imgsz if imgsz in keys else next(iter(keys))
    layers = sizes[size]
    if missing := table.missing(layers):
        LOGGER.info(
            f"{PREFIX}the profile's model has another number of classes: the times of {len(missing)} layers of the "
            "head are estimated from those of the same layers at other widths."
        )
    return table.completed(layers).timing(layers, keys[size])


@runtimes.undisturbed()
def measured(dense: nn.Module, layers: dict[str, list[Layer]], format: str, setting: Setting) -> Table:
    """The table of this machine, with the layers of a dense model and with the model itself; what is new is kept.

    A model that differs in its classes alone is as good as the model itself.
    """
    place = place_of(format, setting)
    path = _memory(place)
    table = _recall(path, place)
    key = table.find(layers, setting.imgsz)
    missing = table.missing(layers)
    if missing or not key:
        LOGGER.info(f"{PREFIX}timing layers and models: {place}. This is done once, and kept in {path}.")
        if (busy := subjects.busy()) is not None and busy > 0.25 * subjects.cores():
            LOGGER.warning(
                f"{PREFIX}other programs keep {busy:.1f} of {subjects.cores()} cores busy, which blurs what is timed. "
                "Delete that file, and start again on an idle machine, if the cut comes out worse than one by FLOPs."
            )
        if missing:
            table.layers |= probe.time_layers(missing, format, setting, bar(f"timing {len(missing)} layers"))
            _keep(table, path)  # minutes of work, that are not lost where a whole model cannot be timed
        if not key:
            table.wholes[model_key(layers, setting.imgsz)] = _wholes(dense, table, layers, format, setting)
            _keep(table, path)
    else:
        LOGGER.info(f"{PREFIX}the times of {place} are those kept in {path}; without that file they are taken anew")
    return table


@runtimes.undisturbed()
def profile(model: Model, format: str, setting: Setting, save: str | Path) -> Path:
    """Measure a model and its layers on this device, for a training machine.

    Args:
        model: the one that is to be pruned; dense, or pruned before.
        format: as `runtimes.parse` returns it.
        setting: imgsz, batch, device, threads and precision.
        save: the `.json` file to write.

    Raises:
        BenchError: If it cannot be measured here.
    """
    _check(format, setting)
    dense = dense_twin(student_of(model.model))
    layers = layers_of(dense, setting.imgsz)
    table = measured(dense, layers, format, setting)
    key = table.find(layers, setting.imgsz)
    assert key
    return table.only(layers, key).save(save)


def place_of(format: str, setting: Setting) -> Place:
    """Where something is measured."""
    return Place(
        format=format,
        runtime=runtimes.runtime(format),
        hardware=subjects.hardware(setting.device),
        device=str(setting.device),
        threads=setting.threads if setting.device.type == "cpu" else None,
        batch=setting.batch,
        quantize=setting.quantize,
    )


def _wholes(
    dense: nn.Module, table: Table, layers: dict[str, list[Layer]], format: str, setting: Setting
) -> list[Whole]:
    """The dense model and some that were cut from it, as their layers add up and as they really are."""
    recipe = Recipe(target=Target(latency=0.5), criterion=CriterionSpec(name="magnitude"))
    graph = planner.survey(dense, recipe, setting.imgsz)
    sums = table.sums(layers)
    weighed = planner.weigh(dense, graph, recipe, timing=sums)
    if not (deepest := weighed.deepest("latency")):
        raise TargetError("target.latency: no layer of this model can be cut so that it gets any faster here.")
    floor = deepest.predicted.kept("latency")
    plans = [weighed.nearest("latency", 1 - depth * (1 - floor)) for depth in DEPTHS]
    cuts = [cut_copy(dense, plan) for plan in plans]
    with Stopwatch(dense, format, setting) as stopwatch:
        found = stopwatch.measure(cuts)
    whole = found[0].dense_ms
    shapes = [_shapes(model) for model in (dense, *cuts)]
    ratios = [1.0, *(m.ratio.median for m in found)]
    return [Whole(layers=sums.total(s), measured=whole * ratio) for s, ratio in zip(shapes, ratios, strict=True)]


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _memory(place: Place) -> Path:
    """The file that keeps what is measured in a place, on this machine, of what these packages make of a model."""
    versions = {name: installed()[name] for name in PACKAGES}
    made = json.dumps([place.model_dump(), METHOD, versions, platform.node()])
    return datasets.MEMORY / f"latency-{hashlib.sha256(made.encode()).hexdigest()[:16]}.json"


def _recall(path: Path, place: Place) -> Table:
    """What was measured here before."""
    try:
        found = Table.load(path) if path.exists() else None
    except BenchError as e:
        LOGGER.warning(f"{PREFIX}{e} It is measured anew.")
        found = None
    return found if found and found.place == place else Table(place=place)


def _keep(table: Table, path: Path) -> None:
    """Save what was measured, beside what another run may have saved since this one began."""
    try:
        found = Table.load(path)
    except BenchError:  # not there yet, or damaged
        found = table
    layers, wholes = found.layers | table.layers, found.wholes | table.wholes
    try:
        table.model_copy(update={"layers": layers, "wholes": wholes}).save(path)
    except OSError as e:
        LOGGER.warning(f"{PREFIX}what was measured could not be kept in '{path}': {e}")
