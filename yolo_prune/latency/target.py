# SPDX-License-Identifier: AGPL-3.0-or-later
"""The latency as a function of widths: measured on this machine once, or read from the profile of another device."""

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
from yolo_prune.env import outputs
from yolo_prune.env.image_size import ImageSize, height_width
from yolo_prune.env.log import PREFIX, bar
from yolo_prune.env.versions import installed
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
"""Depths of the cut models whose times correct the sums of layers, as fractions of the deepest cut.

This value is a choice: together with the dense model, these depths cover the usual targets. With one depth less, the
line from sums of layers to times of models would depend on a single point. Each depth takes an export and a budget of
the stopwatch.
"""
METHOD = 1
"""Version of the measuring method. Increase it with every change of the method, because times then differ."""


def setting_of(target: Target, imgsz: ImageSize) -> tuple[str, Setting]:
    """Format and setting of the measurement for a target without a profile; `imgsz` is the image size of the run.

    Raises:
        BenchError: If this machine cannot measure with this format and setting.
    """
    format, size, device = target.format or "onnx", target.imgsz or imgsz, target.device or "cpu"
    try:
        asked = Setting.of(size, target.batch or 1, device, target.threads, quantize=target.quantize)
        _check(format, asked)
    except BenchError as e:  # its message names arguments, not fields of a recipe
        raise BenchError(f"recipe.target: {e}") from e
    return format, asked


def written_out(target: Target, imgsz: ImageSize) -> Target:
    """A target with all settings of its measurement, so that another machine measures in the same way.

    Their defaults depend on the machine: without `threads`, a runtime gets one thread for each core.
    """
    if target.latency is None or target.profile is not None:
        return target
    format, setting = setting_of(target, imgsz)
    settings = {
        "format": format,
        "device": target.device or "cpu",
        "batch": setting.batch,
        "threads": setting.threads if setting.device.type == "cpu" else target.threads,
        "quantize": setting.quantize,
    }
    return target.model_copy(update=settings)


def _check(format: str, setting: Setting) -> None:
    """Check that layers can be timed here with this format and setting.

    Raises:
        BenchError: If they cannot be timed.
    """
    if setting.quantize == 8:
        raise BenchError(
            "quantize=8 cannot be profiled: single layers have no images for the calibration. Pass quantize=16 or 32."
        )
    if format == "torch" and setting.quantize == 16 and setting.device.type == "cpu":
        raise BenchError("format=torch computes in float32 on a CPU. Leave quantize=16 out, or pass device=0.")
    runtimes.check([format], setting.quantize, setting.device)


@runtimes.undisturbed()
def find(model: nn.Module, target: Target, imgsz: ImageSize) -> Timing | None:
    """The latency as a function of widths, for a latency target; None for other targets.

    If the target has a profile, the times are read from it. Otherwise they are measured on this machine, unless this
    was done before.

    Args:
        model: the model; dense or pruned before.
        target: the target of the recipe.
        imgsz: image size of the run, in pixels; a profile has its own image size.

    Raises:
        BenchError: If this machine cannot measure it, or the profile is not of this model.
        TargetError: If no cut makes the model faster.
    """
    if target.latency is None:
        return None
    dense = dense_twin(model)
    if target.profile is not None:
        return _profiled(dense, target.profile, imgsz)
    format, setting = setting_of(target, imgsz)
    layers = layers_of(dense, setting.imgsz)
    table = measured(dense, layers, format, setting)
    key = table.find(layers, setting.imgsz)  # times of models with other classes are used as well
    assert key
    timing = table.timing(layers, key)
    LOGGER.info(f"{PREFIX}{table.place.format} processes channels in steps of {timing.multiple} on this device")
    return timing


def _profiled(dense: nn.Module, path: str, imgsz: ImageSize) -> Timing:
    """The latency as a function of widths from a profile; of several image sizes, that of the run is used."""
    table = Table.load(path)
    remedy = f"Run on the device: yolo-prune profile model=... format={table.place.format} imgsz=..."
    step = probes.stride(dense)
    sizes = {size: layers_of(dense, size) for size in table.sizes() if not any(s % step for s in height_width(size))}
    keys = {size: key for size, layers in sizes.items() if (key := table.find(layers, size))}
    if not sizes:
        raise BenchError(
            f"target.profile: '{path}' ({table.place}) was measured with imgsz {', '.join(map(str, table.sizes()))}, "
            f"but the image size of this model must be a multiple of {step}. {remedy}"
        )
    if not keys:
        raise BenchError(f"target.profile: '{path}' ({table.place}) is the profile of another model. {remedy}")
    if len(keys) > 1 and imgsz not in keys:
        raise BenchError(
            f"target.profile: '{path}' ({table.place}) has times of this model for imgsz {', '.join(map(str, keys))}, "
            f"but not for the run's imgsz {imgsz}. {remedy}"
        )
    size = imgsz if imgsz in keys else next(iter(keys))
    layers = sizes[size]
    if missing := table.missing(layers):
        LOGGER.info(
            f"{PREFIX}the profile's model has another number of classes, so the times of {len(missing)} head layers "
            "are estimated from the times of the same layers with other widths."
        )
    return table.completed(layers).timing(layers, keys[size])


@runtimes.undisturbed()
def measured(dense: nn.Module, layers: dict[str, list[Layer]], format: str, setting: Setting) -> Table:
    """The table of this machine, with times of a dense model and of its layers. New times are measured and stored.

    The times of a model that differs only in its classes are used as well.
    """
    place = place_of(format, setting)
    path = _storage_path(place)
    table = _load_stored(path, place)
    key = table.find(layers, setting.imgsz)
    missing = table.missing(layers)
    if missing or not key:
        LOGGER.info(f"{PREFIX}timing layers and models: {place}. This is done once; the times are stored in {path}.")
        if (busy := subjects.busy()) is not None and busy > 0.25 * subjects.cores():
            LOGGER.warning(
                f"{PREFIX}other programs use {busy:.1f} of {subjects.cores()} cores, so the times are less exact. If "
                "the latency of the pruned model is not good, delete that file and start again on an idle machine."
            )
        if missing:
            table.layers |= probe.time_layers(missing, format, setting, bar(f"timing {len(missing)} layers"))
            _store(table, path)  # timing a model may fail, and timing the layers took minutes
        if not key:
            table.wholes[model_key(layers, setting.imgsz)] = _wholes(dense, table, layers, format, setting)
            _store(table, path)
    else:
        LOGGER.info(f"{PREFIX}using the times of {place} from {path}; delete this file to measure again")
    return table


@runtimes.undisturbed()
def profile(model: Model, format: str, setting: Setting, save: str | Path) -> Path:
    """Measure a model and its layers on this device, and write a profile for the training machine.

    Args:
        model: the model to prune; dense or pruned before.
        format: a format name from `runtimes.parse`.
        setting: imgsz, batch, device, threads and precision.
        save: the `.json` file to write.

    Raises:
        BenchError: If this machine cannot measure with this format and setting.
        OutputError: If the file cannot be written.
    """
    _check(format, setting)
    outputs.check(save)
    dense = dense_twin(student_of(model.model))
    layers = layers_of(dense, setting.imgsz)
    table = measured(dense, layers, format, setting)
    key = table.find(layers, setting.imgsz)
    assert key
    return outputs.deliver(save, table.only(layers, key).save)


def place_of(format: str, setting: Setting) -> Place:
    """The place of a measurement: runtime, device and settings."""
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
    """Sums of layers and measured times, of the dense model and of models that are cut from it."""
    recipe = Recipe(target=Target(latency=0.5), criterion=CriterionSpec(name="magnitude"))
    graph = planner.survey(dense, recipe, setting.imgsz)
    sums = table.sums(layers)
    weighed = planner.weigh(dense, graph, recipe, timing=sums)
    if not (deepest := weighed.deepest("latency")):
        other = "Set target.flops or target.params instead." if weighed.deepest("flops") else ""
        raise TargetError(
            "target.latency: no cut makes this model faster on this device. "
            f"{other or weighed.limits.advice('latency', 1.0)}".rstrip()
        )
    floor = deepest.predicted.kept("latency")
    plans = [weighed.nearest("latency", 1 - depth * (1 - floor)) for depth in DEPTHS]
    cuts = [cut_copy(dense, plan) for plan in plans]
    with Stopwatch(dense, format, setting) as stopwatch:
        measurements = stopwatch.measure(cuts)
    whole = measurements[0].dense_ms
    shapes = [_shapes(model) for model in (dense, *cuts)]
    ratios = [1.0, *(m.ratio.median for m in measurements)]
    return [Whole(layers=sums.total(s), measured=whole * ratio) for s, ratio in zip(shapes, ratios, strict=True)]


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _storage_path(place: Place) -> Path:
    """The file for the times of a place on this machine; its name depends on the packages that run layers."""
    versions = {name: installed()[name] for name in ("ultralytics", "torch")}
    made = json.dumps([place.model_dump(), METHOD, versions, platform.node()])
    return datasets.MEMORY / f"latency-{hashlib.sha256(made.encode()).hexdigest()[:16]}.json"


def _load_stored(path: Path, place: Place) -> Table:
    """The times that were measured here before."""
    try:
        table = Table.load(path) if path.exists() else None
    except BenchError as e:
        LOGGER.warning(f"{PREFIX}{e} The times are measured again.")
        table = None
    return table if table and table.place == place else Table(place=place)


def _store(table: Table, path: Path) -> None:
    """Save the times, together with the times that another run may have saved in the meantime."""
    try:
        saved = Table.load(path)
    except BenchError:  # not there yet, or damaged
        saved = table
    layers, wholes = saved.layers | table.layers, saved.wholes | table.wholes
    try:
        table.model_copy(update={"layers": layers, "wholes": wholes}).save(path)
    except OSError as e:
        LOGGER.warning(f"{PREFIX}the measured times could not be written to '{path}': {e}")
