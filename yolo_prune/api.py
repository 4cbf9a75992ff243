# SPDX-License-Identifier: AGPL-3.0-or-later
"""The Python API: plan, apply, prune, is_pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.engine.model import Model
from ultralytics.utils import LOGGER

from yolo_prune import _startup, recipe, recover
from yolo_prune.cut import proof, surgery
from yolo_prune.cut import record as records
from yolo_prune.cut.census import census, compressed_mb
from yolo_prune.cut.copies import bare_copy, checkpoint_bytes, make_ordinary
from yolo_prune.cut.plan import Plan
from yolo_prune.cut.record import Record, read_record, write_record
from yolo_prune.data import dataset_writer, datasets
from yolo_prune.data.calibration import Calibration
from yolo_prune.env import log, trained
from yolo_prune.env.checkpoints import open_model, save
from yolo_prune.env.files import unused
from yolo_prune.env.image_size import ImageSize, image_size
from yolo_prune.errors import NothingToRemoveError, PlanError, RunError, UnsupportedModelError
from yolo_prune.graph import Graph
from yolo_prune.latency import search
from yolo_prune.planning import classes, planner
from yolo_prune.recipe import Recipe
from yolo_prune.report import Report
from yolo_prune.report.data import FILE_NAME
from yolo_prune.zeros import planner as zeros

__all__ = ["apply", "describe", "is_pruned", "open_model", "plan", "prune", "save", "write_dataset"]

DESCRIPTIVE = ("train_args", "date", "version", "license", "docs", "git")


@torch.inference_mode(False)
def plan(
    model: Model | nn.Module | str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    *,
    imgsz: ImageSize | Sequence[int] | str | None = None,
    data: str | Path | None = None,
    **overrides: Any,
) -> Plan:
    """Make a plan of what a recipe would remove from a model: classes, channels, weights. The model is not changed.

    Args:
        model: a `YOLO` object, its module, or a path to a `.pt` or `.yaml` file.
        recipe: a bundled name, a path, a mapping or a `Recipe`; None is the default recipe, `half-flops`.
        imgsz: image size in pixels, at which FLOPs are counted and training images are read: one number, or height
            and width. None: the size that the model was trained with.
        data: the dataset, as for `model.train`, for criteria and allocations that look at training images. Without
            `data`, the criterion `magnitude` and the allocation `global` replace them.
        **overrides: single fields of the recipe, with dots: `**{"target.flops": 0.4}`.

    Returns:
        The plan. `print` shows a table of the groups, the protected parts and the predicted cost.

    Raises:
        PruneError: If the recipe is wrong, the target cannot be reached, or the model is not supported.

    Example:
        >>> import yolo_prune
        >>> plan = yolo_prune.plan("best.pt", "half-flops", imgsz=640, data="data.yaml")
        >>> print(plan)
        group ...
        >>> plan.predicted.flops_kept <= 0.5
        True
    """
    asked = _load(recipe, overrides)
    if isinstance(model, str | Path):
        model = open_model(model)
    known, asked = asked, asked if data else zeros.rehearsal(planner.rehearsal(asked))
    module, size = module_of(model), _size(model, imgsz)
    if asked.structure:
        classes.refuse_other_tasks(module)  # before the trace, which refuses some of them for another reason
    graph = planner.survey(module, asked, size, progress=log.bar("trying out blocks"))
    if asked.structure is None:
        return _channels_and_zeros(model, module, graph, known, asked, data)
    first = classes.plan_for(module, graph, asked.structure)
    if asked.target is None and asked.sparsity is None:
        return first
    after = classes.removed(module, graph, first)
    try:
        rest = _channels_and_zeros(model, after, planner.survey(after, asked, size), known, asked, data)
    except NothingToRemoveError as e:
        LOGGER.warning(f"{e} Only classes are removed.")
        return first
    return first.then(rest)


def _channels_and_zeros(
    model: Model | nn.Module, module: nn.Module, graph: Graph, known: Recipe, asked: Recipe, data: str | Path | None
) -> Plan:
    """The plan of the channels and the zeros of a recipe.

    Args:
        model: the `YOLO` object that reads the dataset, or its module.
        module: the module to plan for: that of `model`, or a copy with fewer classes.
        graph: the graph of `module`.
        known: the recipe.
        asked: the recipe, without data with a criterion and an allocation that need none.
        data: the dataset.
    """
    size = graph.imgsz
    trial = search.trial(module, graph, asked, size) if asked.metric == "latency" else None
    if not data:
        _warn_of_stand_ins(known)
    count = max(planner.images_for(asked), zeros.images_for(asked), asked.recover.refit if _two_steps(asked) else 0)
    calibration = _calibration(model, data, size, count, module) if data and count else None
    if asked.target is None:
        bar = log.bar("scoring weights")
        amount = asked.zeros(asked.keep or 0.0, 1.0)
        return zeros.plan_for(module, asked, amount, planner.standing(module, graph), (), calibration, bar)
    bar = log.bar("scoring channels")
    if trial is None:
        cut = planner.plan_for(module, graph, asked, calibration=calibration, progress=bar)
    else:
        weighed = planner.weigh(module, graph, asked, calibration, bar, trial.timing)
        cut = search.settle(module, weighed, asked.target, size, present=trial.present).plan
    return cut.then(_zeros_after(module, cut, asked, calibration)) if asked.sparsity else cut


def _two_steps(asked: Recipe) -> bool:
    """Whether weights become zero after channels are cut."""
    return asked.target is not None and asked.sparsity is not None


def _warn_of_stand_ins(asked: Recipe) -> None:
    """Tell which parts of a recipe need training images, and are replaced without data."""
    stand_ins = {
        (key, getattr(asked, key).name): f"{key} {planner.STAND_INS[key].name}" for key in planner.looks(asked)
    }
    if asked.sparsity and zeros.images_for(asked):
        stand_ins["sparsity.score", asked.sparsity.score] = "score magnitude"
    for (key, name), other in stand_ins.items():
        LOGGER.warning(
            f"{key} {name} needs training images, and data= was not given. This plan removes as much, but uses the "
            f"{other} instead. Pass data= to use {name}."
        )


def _zeros_after(module: nn.Module, cut: Plan, asked: Recipe, calibration: Calibration | None) -> Plan:
    """The zeros in what a cut leaves. Weights are scored after the refit, as in a run."""
    after = bare_copy(module)
    earlier = {name: mask.cut(cut.keep.get(name, {})) for name, mask in zeros.masks_of(module).items()}
    surgery.apply(after, cut)
    if calibration and asked.recover.refit:
        images = calibration.images(asked.recover.refit)
        recover.refit(
            bare_copy(module), after, replace(cut, masks=earlier), images, progress=log.bar("refitting layers")
        )
    amount, bar = asked.zeros(asked.keep or 0.0, 1.0), log.bar("scoring weights")
    return zeros.plan_after(cut, after, asked, amount, earlier, (), calibration, bar)


def changes_channels(plan: Plan) -> bool:
    """Whether a plan does more than remove classes, so that a refit can bring back accuracy."""
    return bool(plan.since(plan.class_part).keep or plan.masks)


@torch.inference_mode(False)
def apply(
    model: Model | nn.Module,
    plan: Plan,
    *,
    prove: bool = True,
    data: str | Path | None = None,
    imgsz: ImageSize | Sequence[int] | str | None = None,
    refit: int = 64,
) -> proof.Proof | None:
    """Cut a model in place, in one step, without training.

    The cut is proved on a copy first. If the proof fails, the model is unchanged. Zeros need no proof. With `data`, the
    remaining weights are then refitted, so that the output of each layer stays close to its output before the cut.
    Without `data`, the accuracy is low until the model is trained again (`model.train(...)` keeps the pruned structure,
    and the zeros).

    Args:
        model: a `YOLO` object or its module.
        plan: a plan made for this model.
        prove: whether to prove the cut on a copy first.
        data: the dataset, as for `model.train`. Its training images, not their labels, are used for the refit.
        imgsz: size of these images in pixels: one number, or height and width. None: the size that the model was
            trained with.
        refit: number of these images.

    Returns:
        The proof, with the largest difference as `error`; None with `prove=False`, and for a plan that only sets
        weights to zero.

    Raises:
        PlanError: If the plan was made for another model, or removes nothing.
        ProofError: If the pruned model would not compute what the masked reference computes.

    Example:
        >>> from ultralytics import YOLO
        >>> import yolo_prune
        >>> model = YOLO("best.pt")
        >>> plan = yolo_prune.plan(model, "half-flops", imgsz=640, data="data.yaml")
        >>> proof = yolo_prune.apply(model, plan, imgsz=640, data="data.yaml")
        >>> proof.error < 1e-8
        True
        >>> model.save("cut.pt")
    """
    _startup.install(force=True)  # a later `model.train(...)` must keep the pruned structure
    module, size = module_of(model), _size(model, imgsz)
    if not plan:
        raise PlanError("The plan removes nothing; there is nothing to apply.")
    surgery.check(module, plan)
    make_ordinary(module)
    record = read_record(module)
    proven = proof.prove(module, plan) if prove and plan.keep else None
    calibration = _calibration(model, data, size, refit) if data and refit and changes_channels(plan) else None
    widths = dense_widths(module, plan.forecast.imgsz if plan.forecast else size)
    whole = bare_copy(module) if calibration else None
    surgery.apply(module, plan)
    if calibration and whole:
        masks = (record.plan.then(plan) if record and record.plan else plan).masks
        surgery.apply(whole, plan.class_part)  # what removed classes did is no aim
        bar, rest = log.bar("refitting layers"), plan.since(plan.class_part)
        recover.refit(whole, module, replace(rest, masks=masks), calibration.images(refit), progress=bar)
    finish_cut(model, plan, record, widths, plan)
    return proven


def prune(
    model: Model | str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    **train_arguments: Any,
) -> Report:
    """Train and prune in one call of `model.train(callbacks="prune", recipe=...)`, and return the report of the run.

    Args:
        model: a `YOLO` object, or a path to a `.pt` or `.yaml` file. A `YOLO` object holds the pruned model afterwards.
        recipe: as for `plan`.
        overrides: single fields of the recipe, with dots: `{"target.flops": 0.4}`.
        **train_arguments: the arguments of `YOLO.train`: `data`, `epochs`, `imgsz`, ...

    Returns:
        The report with all measurements, as in `prune.json` in the run folder.

    Raises:
        PruneError: If an argument is wrong, the recipe does not fit, or the run did not end pruned.

    Example:
        >>> import yolo_prune
        >>> report = yolo_prune.prune("best.pt", "half-flops", data="data.yaml", epochs=60, imgsz=640)
        >>> report.pruned.flops / report.dense.flops <= 0.5
        True
    """
    _startup.install(force=True)
    if isinstance(model, str | Path):
        model = open_model(model)
    model.train(callbacks="prune", recipe=_load(recipe, overrides or {}), **train_arguments)
    trainer = model.trainer
    if trainer is None:
        raise RunError("The run ended, but the model has no trainer that names the run folder. Read prune.json there.")
    return Report.load(Path(trainer.save_dir) / FILE_NAME)


def is_pruned(model: Model | nn.Module | str | Path) -> bool:
    """Tell whether channels were removed from a model, or weights were set to zero.

    Args:
        model: a `YOLO` object, its module, or a path to a checkpoint.

    Example:
        >>> import yolo_prune
        >>> yolo_prune.is_pruned("best.pt"), yolo_prune.is_pruned("pruned.pt")
        (False, True)
    """
    return records.is_pruned(module_of(model))


def write_dataset(model: Model | str | Path, data: str | Path, folder: str | Path) -> Path:
    """Write a dataset with the classes that a model keeps, for Ultralytics without this package.

    With this package, training and validation match the labels of the original dataset by name, so no such dataset is
    needed. Images are links to the original files where the folder can have links, else copies.

    Args:
        model: a `YOLO` object or a checkpoint, from which classes were removed.
        data: a dataset with the classes of the dense model, as for `model.train`.
        folder: a new folder.

    Returns:
        What goes into `data=`: the path of the YAML file; for classification, the folder.

    Raises:
        PruneError: If no class was removed from the model, the folder has files, or the classes do not match.

    Example:
        >>> import yolo_prune
        >>> path = yolo_prune.write_dataset("fewer.pt", "coco.yaml", "written")
        >>> path.name
        'data.yaml'
    """
    return dataset_writer.write(open_model(model) if isinstance(model, str | Path) else model, data, folder)


def describe(model: Model | nn.Module | str | Path) -> str:
    """A readable summary of the pruning of a checkpoint: rounds, cost, and layers before and after."""
    module = module_of(model)
    record, size = read_record(module), trained.size(module)
    if not record or not record.plan:
        return "This model is not pruned."
    surgery.check_applied(module, record.plan)
    flops, params = planner.present_cost(module, size)
    dense = planner.dense_cost(module, record.plan, size)
    lines = [record.plan.classes.describe(), ""] if record.plan.classes else []
    lines += [
        f"{'':12}{'dense':>12}{'pruned':>12}{'kept':>10}",
        f"{'GFLOPs':12}{dense[0] / 1e9:12.3f}{flops / 1e9:12.3f}{flops / dense[0]:10.1%}   at imgsz {size}",
        f"{'parameters':12}{dense[1]:12,}{params:12,}{params / dense[1]:10.1%}",
    ]
    if masks := record.plan.masks:
        lines += _zeros_of(module)
    lines.append("")
    for r in record.rounds:
        when = f"before epoch {r.epoch + 1}" if r.epoch is not None else "in one shot"
        back = ", rolled back" if r.held is False else ""
        lines.append(f"round {r.number} {when}{back}: plan {r.plan[:12]}")
    lines += ["", f"{'layer':44}{'dense':>8}{'pruned':>8}" + f"{'zeros':>12}" * bool(masks)]
    for name, width in planner.layer_widths(module):
        before = record.plan.shapes.get(f"{name}.weight", (width,))[0]
        mask = masks.get(f"{name}.weight")
        zeros_of = f"{mask.zeros / mask.size if mask else 0:12.1%}" if masks else ""
        lines.append(f"{name:44}{before:8}{width:8}{zeros_of}" + ("" if before != width else "   ="))
    return "\n".join(lines)


def _zeros_of(module: nn.Module) -> list[str]:
    """The lines of `describe` on zeros."""
    counted = census(module)
    content = checkpoint_bytes(module)
    mb, zipped = len(content) / 1e6, compressed_mb(content)
    return [
        f"{'zeros':12}{'':12}{counted.zeros:12,}{counted.share:10.1%}   of the {counted.weights:,} weights of layers",
        f"{'MB':12}{'':12}{mb:12.2f}{'':10}   as a checkpoint; {zipped:.2f} if it is compressed",
        f"{'2:4 layers':12}{'':12}{len(counted.two_of_four):12}{'':10}   of {len(counted.layers)}: zeros that sparse "
        "tensor cores can use",
    ]


def _calibration(
    model: Model | nn.Module, data: str | Path, imgsz: ImageSize, count: int, module: nn.Module | None = None
) -> Calibration:
    """Training images for `module`, which may have fewer classes than the module of `model`."""
    if not isinstance(model, Model):
        raise RunError("data= needs the YOLO object, because its module cannot read a dataset. Pass the YOLO object.")
    model.model.float()
    return datasets.calibration(model, data, imgsz, count, kept=datasets.kept_classes(module or model.model))


def dense_widths(module: nn.Module, imgsz: ImageSize) -> Mapping[str, int]:
    """`{set name: channels}` of the dense model that a model was, or is. It is traced with images of `imgsz` pixels."""
    record = read_record(module)
    return record.widths if record and record.plan else planner.widths(module, imgsz=imgsz)


def finish_cut(
    model: Model | nn.Module, plan: Plan, record: Record | None, widths: Mapping[str, int], shown: Plan
) -> Record:
    """Write the record of a cut without training, and let a `YOLO` object follow.

    Args:
        model: a `YOLO` object or its module, after the cut.
        plan: the plan that was applied.
        record: the record before the cut.
        widths: `{set name: channels}` of the dense model.
        shown: the plan that is shown as the last round: `plan`, or the plan that several cuts in a row make.
    """
    module = module_of(model)
    new = records.after_cut(record, plan, widths, shown)
    write_record(module, new)
    loaded_from = getattr(module, "pt_path", None)
    _export_elsewhere(module)
    if isinstance(model, Model):
        model.ckpt_path = loaded_from or model.ckpt_path
        # train() takes the weights from `ckpt`, not from a YAML file. The optimizer and the epoch of the dense run are
        # left out, because they do not fit the pruned model.
        model.ckpt = {k: v for k, v in (model.ckpt or {}).items() if k in DESCRIPTIVE} | {"model": module}
        model.predictor = None
    return new


def _export_elsewhere(module: Any) -> None:
    """Give a model another name after a cut: an export must not replace that of the file it was loaded from.

    The exporter takes the folder and the name of its files from `pt_path`.
    """
    built_from = getattr(module, "yaml", {}).get("yaml_file") or "model.yaml"
    path = Path(getattr(module, "pt_path", None) or Path(built_from).name)
    if path.is_file() or not path.stem.endswith("-pruned"):
        module.pt_path = str(unused(path.with_name(f"{path.stem}-pruned.pt")))


def _size(model: Model | nn.Module, asked: ImageSize | Sequence[int] | str | None) -> ImageSize:
    return trained.size(model) if asked is None else image_size(asked)


INSTEAD = {
    "SAM": "Pass a segmentation model, for example YOLO('yolo26n-seg.pt').",
    "NAS": "Pass a detection model, for example YOLO('yolo26n.pt').",
    "FastSAM": "Open the same file with YOLO(...): it is a segmentation model, which can be pruned and trained.",
}


def module_of(model: Model | nn.Module | str | Path) -> nn.Module:
    """The module of a model."""
    if isinstance(model, str | Path):
        model = open_model(model)
    kind = type(model).__name__
    if kind in INSTEAD:
        raise UnsupportedModelError(
            f"Ultralytics cannot train {kind} models, so yolo-prune cannot prune them. {INSTEAD[kind]}"
        )
    module = model if isinstance(model, nn.Module) and not hasattr(model, "overrides") else model.model
    if not isinstance(module, nn.Module):
        raise UnsupportedModelError(
            f"'{module}' is an exported model, which cannot be pruned. Pass the .pt checkpoint it was exported from."
        )
    return module


def _load(source: str | Path | Mapping[str, Any] | Recipe | None, overrides: Mapping[str, Any]) -> Recipe:
    return recipe.load_recipe(source, {key.removeprefix("recipe."): value for key, value in overrides.items()})
