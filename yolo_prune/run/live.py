# SPDX-License-Identifier: AGPL-3.0-or-later
"""What this package does to a running Ultralytics trainer."""

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

from yolo_prune.cut import surgery
from yolo_prune.cut.plan import Keep, Plan, Shapes
from yolo_prune.cut.record import Record, read_record, student_of, write_record
from yolo_prune.data import datasets
from yolo_prune.data.calibration import Batch, Calibration, draw
from yolo_prune.env import ranks
from yolo_prune.env.files import write_bytes
from yolo_prune.env.releases import unwrap_model
from yolo_prune.recover.rewind import FILE as EARLY
from yolo_prune.recover.rewind import Early
from yolo_prune.run.resume import refill_mosaic
from yolo_prune.run.state import PruningTrainer


def model_of(trainer: PruningTrainer) -> nn.Module:
    """The module that is trained, without wrappers; of a distillation, the student."""
    return _student(unwrap_model(trainer.model))


def average_of(trainer: PruningTrainer) -> nn.Module:
    """The moving average of `model_of`: what is validated, saved and delivered."""
    return _student(trainer.ema.ema)


def _student(model: nn.Module) -> nn.Module:
    for name in ("_teacher_feats", "_student_feats"):  # of the last batch, and with them its graph
        getattr(model, name, {}).clear()
    return student_of(model)


def keep_record(trainer: PruningTrainer, record: Record) -> None:
    """Put the record into the live model and its average."""
    write_record(model_of(trainer), record)
    average_of(trainer).yaml = model_of(trainer).yaml


def frozen_modules(trainer: PruningTrainer) -> tuple[str, ...]:
    """Names of the modules that this run does not train (`freeze=`); the box distribution never is."""
    return tuple(
        name
        for name, module in model_of(trainer).named_modules()
        if (own := list(module.parameters(recurse=False)))
        and not any(p.requires_grad for p in own)
        and ".dfl" not in name
    )


def cut(trainer: PruningTrainer, plan: Plan) -> None:
    """Apply a plan to the live model, its average and the optimizer, between two batches."""
    with _making_parameters_anew(trainer):
        _cut_and_follow(trainer, plan, model_of(trainer), average_of(trainer))
        if projection := _projection(trainer, plan):
            _cut_and_follow(trainer, projection, unwrap_model(trainer.model).projector, trainer.ema.ema.projector)


@contextmanager
def _making_parameters_anew(trainer: PruningTrainer) -> Iterator[None]:
    """Let go of what holds the old parameters."""
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.loss = None  # holds the last batch's graph
    yield
    trainer.ema._pairs = None  # caches the old tensors; left alone, the average would silently freeze
    _wrap_again(trainer)


def _cut_and_follow(trainer: PruningTrainer, plan: Plan, model: nn.Module, averaged: nn.Module) -> None:
    replaced = surgery.apply(model, plan)
    surgery.apply_to_optimizer(trainer.optimizer, replaced, model, plan)
    surgery.apply(averaged, plan)


def _projection(trainer: PruningTrainer, plan: Plan) -> Plan | None:
    """For `distill_model=`: the layers between student and teacher read what the student's head reads."""
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
    """A wrapper for several devices knows the parameters it was made with: make it anew, with the same settings."""
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
    old._remove_autograd_hooks()  # type: ignore[no-untyped-call]  # of the parameters that stayed the same
    trainer.model = DistributedDataParallel(old.module, **settings)


def structure(trainer: PruningTrainer) -> str:
    """Hash of the names and shapes of all that is trained and averaged on this rank."""
    shapes = [(n, tuple(t.shape)) for m in (model_of(trainer), average_of(trainer)) for n, t in m.state_dict().items()]
    return hashlib.sha256(repr(shapes).encode()).hexdigest()


def go_back(trainer: PruningTrainer, source: nn.Module, plan: Plan) -> None:
    """Make the live model and its average what a checkpoint of this run holds; the optimizer starts anew.

    Args:
        trainer: between two batches.
        source: the checkpoint's model, cut less.
        plan: everything that was removed from the model as it is.
    """
    whole, other = unwrap_model(trainer.model), student_of(source)
    with _making_parameters_anew(trainer):
        replaced = surgery.become(model_of(trainer), other, plan)
        surgery.become(average_of(trainer), other, plan)
        if hasattr(whole, "projector"):
            projector = source.get_submodule("projector")
            replaced |= surgery.become(whole.projector, projector, Plan({}, {}, {}))
            surgery.become(trainer.ema.ema.projector, projector, Plan({}, {}, {}))
        surgery.start_optimizer_anew(trainer.optimizer, replaced)
    trainer.fitness = None  # was that of another model


def put_aside(trainer: PruningTrainer, aside: Path) -> None:
    """Move the best checkpoint so far out of the way of one with another structure.

    What lies there already stays: a run that was killed after this may have another best checkpoint by now.
    """
    if ranks.first() and trainer.best.exists() and trainer.best_fitness is not None and not aside.exists():
        trainer.best.replace(aside)


def forget_best(trainer: PruningTrainer) -> None:
    """Start the search for the best epoch anew: what was best so far has another structure."""
    trainer.best_fitness = None
    _wait_from_here(trainer, 0.0)


def _wait_from_here(trainer: PruningTrainer, fitness: float) -> None:
    """Early stopping counts from this epoch on, for epochs that do not exceed a fitness."""
    trainer.stopper.best_fitness, trainer.stopper.best_epoch = fitness, trainer.epoch
    trainer.stopper.possible_stop = False


def take_for_best(trainer: PruningTrainer, path: Path, fitness: float, ended: bool) -> None:
    """Make a checkpoint kept aside the best one, which later epochs, if the run has not ended, have to exceed."""
    if ranks.first():
        write_bytes(trainer.best, path.read_bytes())
    trainer.best_fitness = fitness
    if not ended:  # else a resumed run has to know why
        _wait_from_here(trainer, fitness)


def take_average_for_best(trainer: PruningTrainer, fitness: float) -> None:
    """What was recovered without training is the best model so far: no run delivers less. Patience is for epochs."""
    save_average(trainer, trainer.best)
    trainer.best_fitness = fitness


def save_average(trainer: PruningTrainer, path: Path) -> None:
    """Write the averaged model as a checkpoint like those of epochs, but for the optimizer."""
    if not ranks.first():
        return
    model = deepcopy(trainer.ema.ema).half()
    student_of(model).criterion = None  # type: ignore[assignment]  # Ultralytics' own
    buffer = io.BytesIO()
    facts = {"epoch": -1, "best_fitness": None, "updates": None, "optimizer": None}
    torch.save({**facts, "model": None, "ema": model, "train_args": vars(trainer.args)}, buffer)
    write_bytes(path, buffer.getvalue())


def hold_early_stopping(trainer: PruningTrainer) -> float:
    """Keep the run from stopping before its last round; returns the patience to restore."""
    patience = trainer.stopper.patience
    trainer.stopper.patience = math.inf
    return float(patience)


def save_last(trainer: PruningTrainer, ended: bool = False) -> None:
    """Rewrite last.pt with the present structure, as of the epoch before: recovery and resume restart this epoch.

    At epoch 0 there is nothing that could be resumed, and nothing is written.

    Args:
        trainer: at the start of an epoch, or after the last one.
        ended: after the last one, which last.pt then is of.
    """
    if (trainer.epoch == 0 and not ended) or not ranks.first():
        return
    fitness, period = trainer.fitness, trainer.save_period
    trainer.epoch -= not ended
    trainer.fitness = trainer.fitness or 0.0  # never equal to the best fitness, None after a cut: best.pt stays
    trainer.save_period = -1  # what was saved for that epoch stays
    try:
        trainer.save_model()
    finally:
        trainer.epoch += not ended
        trainer.fitness, trainer.save_period = fitness, period


def validate(trainer: PruningTrainer) -> float | None:
    """Fitness of the averaged model, measured as the run itself does; the run's bookkeeping is left alone.

    With several ranks, all of them must call it; only the first gets the fitness, the others None.
    """
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
    """Batches of training images as the model sees them, in an order of their own.

    Args:
        trainer: after its set-up.
        batches: at most this many; never more than the training set holds.
        seed: same seed, same images.
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
    """Training images as validation would show them; where the trainer cannot build that, as training does.

    Args:
        trainer: after its set-up.
        count: at most this many images.
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
            except (KeyError, TypeError):  # of models that read texts: only their training set has them
                items = draw(stock.dataset, stock.collate_fn, count, args.seed)
        return items

    return Calibration(load, prepare, args, datasets.MEMORY)


def _as_validation(trainer: PruningTrainer) -> Any:
    """The training set, read as validation reads its own."""
    args = trainer.args
    if not hasattr(trainer, "build_dataset"):
        return trainer.train_loader.dataset
    cache, args.cache = args.cache, False  # or the images would be in memory twice
    try:
        return trainer.build_dataset(getattr(trainer, "trainset", None) or trainer.data["train"], "val", 1)
    finally:
        args.cache = cache


def average_over(trainer: PruningTrainer, epochs: float) -> None:
    """Make the moving average reach back over some epochs.

    Ultralytics' own begins with hardly any memory and takes some 2000 steps to gain one, so that in a short run it is
    as noisy as the live model. After a refit there is something to remember.
    """
    decay = 1 - 1 / max(epochs * steps_per_epoch(trainer), 1)
    trainer.ema.decay = lambda updates: decay


def steps_per_epoch(trainer: PruningTrainer) -> float:
    """Steps that the optimizer takes in an epoch, once it is warm."""
    return len(trainer.train_loader) / batches_per_step(trainer)


def batches_per_step(trainer: PruningTrainer) -> int:
    """Batches whose gradients the optimizer gathers for a step, once it is warm."""
    batches: int = max(round(trainer.args.nbs / trainer.batch_size), 1)
    return batches


def start_from_average(trainer: PruningTrainer) -> None:
    """Make the live model what its average is, on every rank what it is on the first."""
    averaged = average_of(trainer).state_dict()
    ranks.share(averaged.values())
    model_of(trainer).load_state_dict(averaged)


def keep_early(trainer: PruningTrainer, epoch: int) -> None:
    """At the start of an epoch, keep the live weights for `rewind`.

    They are taken down once: when the epoch is redone, they may be others.

    Raises:
        RunError: If they cannot be written.
    """
    path = Path(trainer.wdir) / EARLY

    def keep() -> None:
        if not path.exists():
            record = read_record(model_of(trainer))
            Early.of(model_of(trainer), record.plan if record else None, trainer.ema.updates).write(path)

    if trainer.epoch == epoch:
        ranks.agree(keep)


def recall_early(trainer: PruningTrainer, plan: Plan, composed: Plan) -> Early:
    """The early weights in the structure that the model is about to get. Only the first rank holds the tensors.

    Args:
        trainer: before the cut, so that one that cannot be recovered from is not made.
        plan: the cut.
        composed: everything removed so far, the cut included.

    Raises:
        RunError: On every rank, if the file is missing, damaged or not of this run.
    """
    state = average_of(trainer).state_dict()
    wanted = {n: plan.shape_after(n) if n in plan.keep else tuple(t.shape) for n, t in state.items()}
    held: list[Early] = []

    def recall() -> int:
        held.append(Early.read(Path(trainer.wdir) / EARLY).thinned(composed, wanted))
        return held[0].updates

    updates = ranks.agree(recall)
    return held[0] if held else Early({}, updates=updates)


def rewind(trainer: PruningTrainer, early: Early) -> None:
    """After the cut: live model and average get the early weights, and the optimizer forgets what it gathered since."""
    if ranks.first():
        average_of(trainer).load_state_dict(early.tensors)
    start_from_average(trainer)
    trainer.ema.updates = early.updates
    trainer.optimizer.state.clear()


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Draw random numbers from `seed` inside, and leave the run's own sequence as it was."""
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
