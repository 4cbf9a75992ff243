# SPDX-License-Identifier: AGPL-3.0-or-later
"""What this package does to an Ultralytics trainer, and the trainer class that keeps a pruned structure."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils.torch_utils import unwrap_model

from yolo_prune import metadata, surgery
from yolo_prune.errors import RunError
from yolo_prune.graph.probes import image_channels
from yolo_prune.plans import Plan


class KeepStructure:
    """Mixin over any Ultralytics trainer: a pruned model is trained as it is instead of being rebuilt from its YAML."""

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        """The model to train: a copy of `weights` if it is pruned, else what the stock trainer builds."""
        if not isinstance(weights, nn.Module) or not metadata.is_pruned(weights):
            return super().get_model(cfg, weights, verbose)  # type: ignore[misc]
        if getattr(self, "world_size", 0) > 1:
            raise RunError(
                "Training a pruned model on several GPUs is not supported yet. Pass one device, for example device=0."
            )
        if any("YOLOEPE" in cls.__name__ for cls in type(self).__mro__):
            raise RunError(
                "Linear probing rebuilds the head of YOLOE, which would lose the pruned structure. Probe first, then "
                "prune; or fine-tune the pruned model with the default trainer."
            )
        data = self.data  # type: ignore[attr-defined]
        _check_data(weights, data)
        stock = super().get_model(cfg, None, verbose=False)  # type: ignore[misc]  # for what else the trainer sets up
        model: Any = deepcopy(weights).float()
        model.criterion = None  # built anew for this run's arguments
        model.requires_grad_(True)  # checkpoints are saved frozen
        _take_over_dropout(stock, model)
        return model


@cache
def prune_trainer(base: type[BaseTrainer]) -> type[BaseTrainer]:
    """`base` with `KeepStructure`; the name has "Trainer" in it, by which Ultralytics knows trainers."""
    if issubclass(base, KeepStructure):
        return base
    name = f"Prune{base.__name__}"
    return type(name, (KeepStructure, base), {"__module__": __name__, "__qualname__": name, "__doc__": base.__doc__})


def _take_over_dropout(stock: nn.Module, model: nn.Module) -> None:
    """`dropout=` of this run."""
    wanted = {name: layer.p for name, layer in stock.named_modules() if isinstance(layer, nn.Dropout)}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Dropout) and name in wanted:
            layer.p = wanted[name]


def _check_data(model: Any, data: Mapping[str, Any]) -> None:
    """Refuse data that need other output layers than the pruned model has."""
    has: dict[str, Any] = {"classes": len(model.names), "input channels": image_channels(model)}
    needs = {"classes": data["nc"], "input channels": data.get("channels", 3)}
    if "kpt_shape" in data and getattr(model, "kpt_shape", None):
        has["keypoints"], needs["keypoints"] = tuple(model.kpt_shape), tuple(data["kpt_shape"])
    wrong = [f"{has[key]} {key}, the dataset {needs[key]}" for key in has if has[key] != needs[key]]
    if wrong:
        raise RunError(
            f"The pruned model has {'; '.join(wrong)}. Training a pruned model on other classes is not supported yet: "
            "train the dense model on this dataset first, then prune it."
        )
    before, now = dict(model.names), dict(data["names"])
    moved = [name for i, name in now.items() if before.get(i) != name and name in before.values()]
    if moved:
        raise RunError(
            f"The dataset lists the model's classes in another order ({', '.join(moved)}). Give its names the order of "
            f"the model: {', '.join(before.values())}."
        )


def live(trainer: BaseTrainer) -> nn.Module:
    """The module that is trained, without wrappers."""
    model: nn.Module = unwrap_model(trainer.model)
    return model


def frozen_modules(trainer: BaseTrainer) -> tuple[str, ...]:
    """Names of the modules that this run does not train (`freeze=`); the box distribution never is."""
    return tuple(
        name
        for name, module in live(trainer).named_modules()
        if (own := list(module.parameters(recurse=False)))
        and not any(p.requires_grad for p in own)
        and ".dfl" not in name
    )


def cut(trainer: BaseTrainer, plan: Plan) -> None:
    """Apply a plan to the live model, its average and the optimizer, between two batches."""
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.loss = None  # holds the last batch's graph, and with it the old parameters
    model = live(trainer)
    replaced = surgery.apply(model, plan)
    surgery.apply_to_optimizer(trainer.optimizer, replaced, model, plan)
    surgery.apply(trainer.ema.ema, plan)
    trainer.ema._pairs = None  # caches the old tensors; left alone, the average would silently freeze


def forget_best(trainer: BaseTrainer, aside: Path) -> None:
    """Start the search for the best epoch anew: what was best so far has another structure; it is moved `aside`."""
    if trainer.best.exists() and trainer.best_fitness is not None:
        trainer.best.replace(aside)
    trainer.best.unlink(missing_ok=True)  # of an earlier run in the same folder
    trainer.best_fitness = None
    trainer.stopper.best_fitness, trainer.stopper.best_epoch = 0.0, trainer.epoch
    trainer.stopper.possible_stop = False


def hold_early_stopping(trainer: BaseTrainer) -> float:
    """Keep the run from stopping before its last round; returns the patience to restore."""
    patience = trainer.stopper.patience
    trainer.stopper.patience = math.inf
    return float(patience)


def save_last(trainer: BaseTrainer) -> None:
    """Rewrite last.pt with the present structure, as of the epoch before: recovery and resume restart this epoch.

    At epoch 0 there is nothing that could be resumed, and nothing is written.
    """
    if trainer.epoch == 0 or not trainer.args.save:
        return
    fitness, period = trainer.fitness, trainer.save_period
    trainer.epoch -= 1
    trainer.fitness = trainer.fitness or 0.0  # never equal to the best fitness, None after a cut: best.pt stays
    trainer.save_period = -1  # what was saved for that epoch stays
    try:
        trainer.save_model()
    finally:
        trainer.epoch += 1
        trainer.fitness, trainer.save_period = fitness, period


def validate(trainer: BaseTrainer) -> float:
    """Fitness of the averaged model, measured as the run itself does; the run's bookkeeping is left alone."""
    if not hasattr(trainer, "loss_items"):  # before the first batch the validator has no names for the losses
        loader = trainer.train_loader
        with torch.no_grad(), own_randomness(trainer.args.seed):
            batch = trainer.preprocess_batch(loader.collate_fn([loader.dataset[0]]))
            trainer.loss_items = trainer.ema.ema.loss(batch)[1]
    plots, trainer.validator.args.plots = trainer.validator.args.plots, False
    try:
        with own_randomness(trainer.args.seed):
            return float(trainer.validator(trainer)["fitness"])
    finally:
        trainer.validator.args.plots = plots


def training_images(trainer: BaseTrainer, batches: int, seed: int) -> Iterator[Tensor]:
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
    chosen = [chunks[i] for i in generator.permutation(len(chunks))[:batches]]
    loader = DataLoader(stock.dataset, batch_sampler=chosen, num_workers=stock.num_workers, collate_fn=stock.collate_fn)
    for batch in loader:
        yield trainer.preprocess_batch(batch)["img"]


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Draw random numbers from `seed` inside, and leave the run's own sequence as it was."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
