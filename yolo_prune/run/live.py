# SPDX-License-Identifier: AGPL-3.0-or-later
"""Operations on a running Ultralytics trainer: cut, roll back, validate, save, draw training images."""

from __future__ import annotations

import hashlib
import io
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from yolo_prune.cut import masks, surgery
from yolo_prune.cut.masks import Masks
from yolo_prune.cut.plan import Keep, Plan, Shapes
from yolo_prune.cut.record import Record, read_record, student_of, write_record
from yolo_prune.data import datasets
from yolo_prune.data.calibration import Batch, Calibration, draw
from yolo_prune.env import ranks
from yolo_prune.env.files import move, write_bytes
from yolo_prune.env.releases import unwrap_model
from yolo_prune.recover.rewind import FILE as EARLY
from yolo_prune.recover.rewind import Early
from yolo_prune.run.resume import refill_mosaic
from yolo_prune.run.state import PruningTrainer


def model_of(trainer: PruningTrainer) -> nn.Module:
    """The live model: the module that is trained, without wrappers. In a distillation this is the student."""
    return _student(unwrap_model(trainer.model))


def average_of(trainer: PruningTrainer) -> nn.Module:
    """The moving average (EMA) of the live model. This model is validated, saved and delivered."""
    return _student(trainer.ema.ema)


def _student(model: nn.Module) -> nn.Module:
    for name in ("_teacher_feats", "_student_feats"):  # these features keep the autograd graph of the last batch
        getattr(model, name, {}).clear()
    return student_of(model)


def store_record(trainer: PruningTrainer, record: Record) -> None:
    """Store the record in the live model and in its average."""
    write_record(model_of(trainer), record)
    average_of(trainer).yaml = model_of(trainer).yaml


def frozen_modules(trainer: PruningTrainer) -> tuple[str, ...]:
    """Names of the modules that this run does not train (`freeze=`), without the DFL layer, which is never trained."""
    return tuple(
        name
        for name, module in model_of(trainer).named_modules()
        if (own := list(module.parameters(recurse=False)))
        and not any(p.requires_grad for p in own)
        and ".dfl" not in name
    )


def cut(trainer: PruningTrainer, plan: Plan) -> None:
    """Apply a plan to the live model, its average and the optimizer, between two batches."""
    with _replacing_parameters(trainer):
        _cut_with_average(trainer, plan, model_of(trainer), average_of(trainer))
        if projection := _projection(trainer, plan):
            _cut_with_average(trainer, projection, unwrap_model(trainer.model).projector, trainer.ema.ema.projector)


@contextmanager
def _replacing_parameters(trainer: PruningTrainer) -> Iterator[None]:
    """Inside, parameters may be replaced. References to the old parameters are removed before and after."""
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.loss = None  # it holds the autograd graph of the last batch
    yield
    trainer.ema._pairs = None  # a cache of the old tensors; with it, the average would no longer be updated
    _wrap_again(trainer)


def _cut_with_average(trainer: PruningTrainer, plan: Plan, model: nn.Module, averaged: nn.Module) -> None:
    replaced = surgery.apply(model, plan)
    surgery.apply_to_optimizer(trainer.optimizer, replaced, model, plan)
    surgery.apply(averaged, plan)


def _projection(trainer: PruningTrainer, plan: Plan) -> Plan | None:
    """The plan for the projection layers of `distill_model=`: they read the same channels as the student's head."""
    whole = unwrap_model(trainer.model)
    keep: Keep = {}
    shapes: Shapes = {}
    for level, layers in enumerate(getattr(whole, "projector", ())):
        reader = f"model.{whole.feats_idx[-1]}.cv2.{level}.0.conv.weight"
        if kept := plan.keep.get(reader, {}).get(1):
            name = f"{level}.0.weight"
            keep[name], shapes[name] = {1: kept}, tuple(layers[0].weight.shape)
    return Plan(keep, {}, shapes) if keep else None


def _wrap_again(trainer: PruningTrainer) -> None:
    """Make the wrapper for several devices again, with the same settings, because it still uses the old parameters."""
    old = trainer.model
    if not isinstance(old, DistributedDataParallel):
        return
    buffers = "forward_sync_buffers" if hasattr(old, "forward_sync_buffers") else "broadcast_buffers"
    settings = {
        "device_ids": old.device_ids,
        "find_unused_parameters": old.find_unused_parameters,
        "static_graph": old.static_graph,
        buffers: getattr(old, buffers),
    }
    old._remove_autograd_hooks()  # type: ignore[no-untyped-call]  # else unchanged parameters keep the old hooks
    trainer.model = DistributedDataParallel(old.module, **settings)


def structure_hash(trainer: PruningTrainer) -> str:
    """Hash of the names and shapes of all tensors of the live model and its average on this rank."""
    shapes = [(n, tuple(t.shape)) for m in (model_of(trainer), average_of(trainer)) for n, t in m.state_dict().items()]
    return hashlib.sha256(repr(shapes).encode()).hexdigest()


def go_back(trainer: PruningTrainer, source: nn.Module, plan: Plan) -> None:
    """Roll back: replace the live model and its average by an earlier model of this run, and reset the optimizer.

    Args:
        trainer: between two batches.
        source: the model of the earlier checkpoint; fewer channels were removed from it.
        plan: everything that was removed from the present model.
    """
    whole, other = unwrap_model(trainer.model), student_of(source)
    with _replacing_parameters(trainer):
        replaced = surgery.become(model_of(trainer), other, plan)
        surgery.become(average_of(trainer), other, plan)
        if hasattr(whole, "projector"):
            projector = source.get_submodule("projector")
            replaced |= surgery.become(whole.projector, projector, Plan({}, {}, {}))
            surgery.become(trainer.ema.ema.projector, projector, Plan({}, {}, {}))
        surgery.start_optimizer_anew(trainer.optimizer, replaced)
    trainer.fitness = None  # it belonged to the replaced model


def put_aside(trainer: PruningTrainer, aside: Path) -> None:
    """Move best.pt to the file `aside`, because the checkpoint that will replace best.pt has another structure.

    An existing file is kept: if the run was killed after this step, best.pt may be another checkpoint now.
    """
    if ranks.first() and trainer.best.exists() and trainer.best_fitness is not None and not aside.exists():
        move(trainer.best, aside)


def forget_best(trainer: PruningTrainer) -> None:
    """Start the search for the best epoch again, because the best model so far has another structure."""
    trainer.best_fitness = None
    _restart_patience(trainer, 0.0)


def _restart_patience(trainer: PruningTrainer, fitness: float) -> None:
    """Early stopping counts its patience from this epoch on, and expects a fitness above the given one."""
    trainer.stopper.best_fitness, trainer.stopper.best_epoch = fitness, trainer.epoch
    trainer.stopper.possible_stop = False


def take_for_best(trainer: PruningTrainer, path: Path, fitness: float, ended: bool) -> None:
    """Make a kept checkpoint the best one. If the run has not ended, later epochs must exceed its fitness."""
    if ranks.first():
        write_bytes(trainer.best, path.read_bytes())
    trainer.best_fitness = fitness
    if not ended:  # at the end, the stopper stays as it is, so that a resumed run knows why training stopped
        _restart_patience(trainer, fitness)


def take_average_for_best(trainer: PruningTrainer, fitness: float) -> None:
    """Make the averaged model the best one, right after its recovery, so that the run never delivers a worse model.

    Early stopping does not change, because its patience counts trained epochs only.
    """
    save_average(trainer, trainer.best)
    trainer.best_fitness = fitness


def save_average(trainer: PruningTrainer, path: Path) -> None:
    """Write the averaged model as a checkpoint, as Ultralytics does after an epoch, but without the optimizer."""
    if not ranks.first():
        return
    model = deepcopy(trainer.ema.ema).half()
    student_of(model).criterion = None  # type: ignore[assignment]  # Ultralytics' own
    buffer = io.BytesIO()
    facts = {"epoch": -1, "best_fitness": None, "updates": None, "optimizer": None}
    torch.save({**facts, "model": None, "ema": model, "train_args": vars(trainer.args)}, buffer)
    write_bytes(path, buffer.getvalue())


def hold_early_stopping(trainer: PruningTrainer) -> None:
    """Keep the run from stopping before its last round; the state of the run holds the patience to restore."""
    trainer.stopper.patience = math.inf


def save_last(trainer: PruningTrainer, ended: bool = False) -> None:
    """Write last.pt again with the present structure.

    At the start of an epoch, last.pt gets the number of the epoch before, so that NaN recovery and resume repeat this
    epoch. At the start of epoch 0 nothing is written, because there is no epoch to resume.

    Args:
        trainer: at the start of an epoch, or after the last one.
        ended: whether this is after the last epoch; last.pt then gets the number of the last epoch.
    """
    if (trainer.epoch == 0 and not ended) or not ranks.first():
        return
    fitness, period = trainer.fitness, trainer.save_period
    trainer.epoch -= not ended
    trainer.fitness = trainer.fitness or 0.0  # best_fitness is None after a cut: they differ, so best.pt is not written
    trainer.save_period = -1  # the file that save_period wrote for that epoch must stay
    try:
        trainer.save_model()
    finally:
        trainer.epoch += not ended
        trainer.fitness, trainer.save_period = fitness, period


def labelled(trainer: PruningTrainer) -> bool:
    """Whether the validation images have labels. Only the first rank has these images; the others return True."""
    return not ranks.first() or datasets.labelled(trainer.test_loader.dataset, trainer.args.task)


def fitness_of_epoch(trainer: PruningTrainer) -> float | None:
    """Fitness of the last epoch; None without labels, with which Ultralytics reports 0."""
    return trainer.fitness if labelled(trainer) else None


def validate(trainer: PruningTrainer) -> float | None:
    """Fitness of the averaged model, measured with the validator of the run. The state of the run does not change.

    None without labels, with which nothing is measured.
    With several ranks, all of them must call this function. Only the first rank gets the fitness; the others get None.
    """
    if not ranks.agree(lambda: labelled(trainer)):
        return None
    ranks.share(trainer.ema.ema.buffers())
    if not hasattr(trainer, "loss_items"):  # before the first batch the validator has no names for the losses
        loader = trainer.train_loader
        with torch.no_grad(), own_randomness(trainer.args.seed):
            batch = trainer.preprocess_batch(loader.collate_fn([loader.dataset[0]]))
            trainer.loss_items = trainer.ema.ema.loss(batch)[1]
    plots, trainer.validator.args.plots = trainer.validator.args.plots, False
    try:
        with own_randomness(trainer.args.seed):
            measured = trainer.validator(trainer)
    finally:
        trainer.validator.args.plots = plots
    return float(measured["fitness"]) if measured else None


def training_images(trainer: PruningTrainer, batches: int, seed: int) -> Iterator[Tensor]:
    """Batches of training images, prepared as for training, in an order that depends only on `seed`.

    Args:
        trainer: after its set-up.
        batches: largest number of batches; a small training set gives fewer.
        seed: the same seed gives the same images.
    """
    stock = trainer.train_loader
    generator, count = np.random.default_rng(seed), len(stock.dataset)
    # With rect=True, batches of consecutive images share a shape; then only the batches are shuffled.
    order = np.arange(count) if getattr(stock.dataset, "rect", False) else generator.permutation(count)
    chunks = [order[i : i + stock.batch_size].tolist() for i in range(0, count, stock.batch_size)]
    refill_mosaic(stock.dataset, seed)
    chosen = [chunks[i] for i in generator.permutation(len(chunks))[:batches]]
    loader = DataLoader(stock.dataset, batch_sampler=chosen, num_workers=stock.num_workers, collate_fn=stock.collate_fn)
    for batch in loader:
        yield trainer.preprocess_batch(batch)["img"]


def calibration(trainer: PruningTrainer, count: int) -> Calibration:
    """Training images, prepared as for validation, or as for training if the trainer cannot prepare them so.

    Args:
        trainer: after its set-up.
        count: largest number of images.
    """
    args, stock = trainer.args, trainer.train_loader

    def prepare(batch: Batch) -> Batch:
        scale, args.multi_scale = args.multi_scale, 0.0
        try:
            return trainer.preprocess_batch(batch)  # type: ignore[no-any-return]
        finally:
            args.multi_scale = scale

    def load() -> list[Batch]:
        with own_randomness(args.seed):
            items = draw(_as_validation(trainer), stock.collate_fn, count, args.seed)
            try:
                prepare(dict(items[0]))
            except (KeyError, TypeError):  # the model reads texts, which only its training set has
                items = draw(stock.dataset, stock.collate_fn, count, args.seed)
        return items

    return Calibration(load, prepare, args, datasets.MEMORY)


def _as_validation(trainer: PruningTrainer) -> Any:
    """The training set, with images prepared as for validation."""
    args = trainer.args
    if not hasattr(trainer, "build_dataset"):
        return trainer.train_loader.dataset
    cache, args.cache = args.cache, False  # else the images would be in memory twice
    try:
        return trainer.build_dataset(getattr(trainer, "trainset", None) or trainer.data["train"], "val", 1)
    finally:
        args.cache = cache


def average_over(trainer: PruningTrainer, epochs: float) -> None:
    """Set the decay of the moving average (EMA) so that it reaches back over `epochs` epochs.

    The decay of Ultralytics' own EMA starts at 0 and needs about 2000 steps to rise. In a short run, that EMA is as
    noisy as the live model. After a refit, the first weights are already good, so the EMA can include them.
    """
    decay = 1 - 1 / max(epochs * steps_per_epoch(trainer), 1)
    trainer.ema.decay = lambda updates: decay


def steps_per_epoch(trainer: PruningTrainer) -> float:
    """Steps of the optimizer in an epoch, after the warm-up."""
    return len(trainer.train_loader) / batches_per_step(trainer)


def batches_per_step(trainer: PruningTrainer) -> int:
    """Batches for each step of the optimizer (gradient accumulation), after the warm-up."""
    batches: int = max(round(trainer.args.nbs / trainer.batch_size), 1)
    return batches


def start_from_average(trainer: PruningTrainer) -> None:
    """Copy the average of the first rank into the live model of every rank."""
    averaged = average_of(trainer).state_dict()
    ranks.share(averaged.values())
    model_of(trainer).load_state_dict(averaged)


def save_early_weights(trainer: PruningTrainer, epoch: int) -> None:
    """At the start of the given epoch, save the live weights for `rewind`.

    They are saved only once, because the weights may be different if the epoch is repeated.

    Raises:
        RunError: If the file cannot be written.
    """
    path = Path(trainer.wdir) / EARLY

    def keep() -> None:
        if not path.exists():
            record = read_record(model_of(trainer))
            Early.of(model_of(trainer), record.plan if record else None, trainer.ema.updates).write(path)

    if trainer.epoch == epoch:
        ranks.agree(keep)


def read_early_weights(trainer: PruningTrainer, plan: Plan, composed: Plan) -> Early:
    """Read the early weights, in the structure that the next cut gives to the model. Only the first rank has tensors.

    Args:
        trainer: before the cut, so that there is no cut if the file cannot be read.
        plan: plan of the cut.
        composed: everything removed so far, the cut included.

    Raises:
        RunError: On every rank, if the file is missing, is damaged, or belongs to another run.
    """
    state = average_of(trainer).state_dict()
    wanted = {n: plan.shape_after(n) if n in plan.keep else tuple(t.shape) for n, t in state.items()}
    early: list[Early] = []

    def recall() -> int:
        early.append(Early.read(Path(trainer.wdir) / EARLY).thinned(composed, wanted))
        return early[0].updates

    updates = ranks.agree(recall)
    return early[0] if early else Early({}, updates=updates)


def rewind(trainer: PruningTrainer, early: Early, zeros: Masks) -> None:
    """After the cut, load the early weights into the live model and its average, and reset the optimizer.

    Masked weights stay zero.
    """
    if ranks.first():
        average_of(trainer).load_state_dict(early.tensors)
        masks.hold(average_of(trainer), zeros)
    start_from_average(trainer)
    trainer.ema.updates = early.updates
    trainer.optimizer.state.clear()


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Inside, random numbers come from `seed`. Afterwards, the random state of the run is restored."""
    states = random.getstate(), np.random.get_state()
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = [torch.cuda.current_device()] if cuda else []
    with torch.random.fork_rng(devices):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
