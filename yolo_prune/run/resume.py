# SPDX-License-Identifier: AGPL-3.0-or-later
"""Going on with a killed run as if it had never been killed.

Ultralytics' last.pt holds the average in half precision, the optimizer's state partly so, and nothing of the state of
random numbers. Here, every epoch of a pruning run draws its random numbers from the seed and its own number, and what
last.pt rounds is kept beside it, in `state-<epoch>-<rounds>.pt`. last.pt is written last: it only ever speaks of files
that are complete. `deterministic=False` turns all of this off.
"""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from ultralytics.utils import LOGGER

from yolo_prune.cut.record import student_of
from yolo_prune.env import ranks
from yolo_prune.env.files import write_bytes, write_text
from yolo_prune.env.releases import DAMAGED, closes_mosaic_late, unwrap_model
from yolo_prune.recover.rewind import FILE as EARLY
from yolo_prune.run.state import PruningTrainer

NEVER = 10**9
PATIENCE = ("best_fitness", "best_epoch", "possible_stop")
WEIGHTS = ("best.pt", "round*.pt", "state-*.pt", EARLY)
CARRIED = ("prune.json", "results.csv", *(f"weights/{name}" for name in WEIGHTS))


class Cadence:
    """When the optimizer steps: Ultralytics' loop counts batches since the last step in a variable of its own.

    Attributes:
        pending: batches whose gradients wait for the next step.
        gradients: of those batches, in a run that was resumed; Ultralytics clears them before its first epoch.
        nominal: batches per step to go back to, once a resumed run has caught up; None if it has.
    """

    def __init__(self) -> None:
        self.pending = 0
        self.gradients: dict[str, Tensor] = {}
        self.nominal: int | None = None

    def epoch_starts(self, trainer: PruningTrainer) -> None:
        """Put the gradients of a resumed run back."""
        parameters = dict(unwrap_model(trainer.model).named_parameters()) if self.gradients else {}
        for name, gradient in self.gradients.items():
            parameters[name].grad = gradient
        self.gradients = {}

    def batch_starts(self, trainer: PruningTrainer) -> None:
        """After a resume the loop would step at once: hold it until the unbroken run would have stepped."""
        if self.nominal is not None:
            if trainer.accumulate != NEVER:
                self.nominal = trainer.accumulate  # which a warm-up sets for every batch
            trainer.accumulate = NEVER if self.pending + 1 < self.nominal else self.nominal

    def batch_ends(self) -> None:
        """Its gradients are added up; `stepped` has been called in between if they were used."""
        self.pending += 1

    def stepped(self) -> None:
        """The optimizer has made a step, with the batch that is about to end."""
        self.pending, self.nominal = -1, None


def seed_epoch(trainer: PruningTrainer) -> None:
    """Make all that this epoch draws depend on the run's seed and the epoch alone."""
    attempt = getattr(trainer, "nan_recovery_attempts", 0)  # an epoch that ended in NaN is redone with other batches
    seed = (trainer.args.seed + 1) * 1_000_003 + trainer.epoch * 1009 + attempt * 101 + ranks.rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    loader = trainer.train_loader
    if getattr(loader, "generator", None) is None or not hasattr(loader, "reset"):
        return  # a loader of the user's own
    loader.generator.manual_seed(seed)
    _seed_albumentations(getattr(loader.dataset, "transforms", None), seed)
    refill_mosaic(loader.dataset, seed)
    loader.reset()


def _seed_albumentations(transforms: Any, seed: int) -> None:
    """They have random numbers of their own, which earlier releases seed but once."""
    for transform in getattr(transforms, "transforms", ()):
        _seed_albumentations(transform, seed)
        inner: Any = getattr(transform, "transform", None)
        if hasattr(inner, "set_random_seed"):
            inner.set_random_seed(seed % 2**32)


def refill_mosaic(dataset: Any, seed: int) -> None:
    """Mosaics are made of images that were loaded lately; which ones, only the process that loaded them knows."""
    length = getattr(dataset, "max_buffer_length", 0)
    if not length or getattr(dataset, "cache", None) == "ram":
        return
    for i in dataset.buffer:
        dataset.ims[i] = dataset.im_hw0[i] = dataset.im_hw[i] = None
    dataset.buffer = random.Random(seed).choices(range(len(dataset.ims)), k=max(length - 1, 1))


def save(trainer: PruningTrainer, rounds: int, cadence: Cadence) -> None:
    """Write what last.pt, which is about to be written for `trainer.epoch`, leaves out."""
    model, optimizer = unwrap_model(trainer.model), trainer.optimizer
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None} if cadence.pending else {}
    state = {
        **{key: _trained(module) for key, module in _modules(trainer).items()},
        "updates": trainer.ema.updates,
        "optimizer": optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "criterion": _numbers(student_of(model)),
        "stopper": {name: getattr(trainer.stopper, name) for name in PATIENCE},
        "stop": bool(trainer.stop),
        "pending": cadence.pending,
        "restart": vars(trainer.warm_up),
        "gradients": gradients,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path = _path(trainer, trainer.epoch, rounds)
    try:
        write_bytes(path, buffer.getvalue())
    except OSError as e:  # a full disk must not cost a night of training
        LOGGER.warning(f"yolo-prune: {path.name} could not be written ({e}); a resumed run will not be bit for bit it")


def restore(trainer: PruningTrainer, rounds: int, cadence: Cadence) -> None:
    """After Ultralytics has resumed from last.pt: put back what it rounded, if that was kept."""
    path = _path(trainer, trainer.start_epoch - 1, rounds)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        usable = all(_shapes(_trained(module)) == _shapes(state[key]) for key, module in _modules(trainer).items())
    except (*DAMAGED, ValueError, TypeError):
        usable = False
    if not usable:
        LOGGER.warning(
            f"yolo-prune: there is no {path.name} beside last.pt that fits it; going on from last.pt alone. The run "
            "will be complete, but not bit for bit the one that was interrupted."
        )
        return
    for key, module in _modules(trainer).items():
        module.load_state_dict(state[key], strict=False)  # but for a teacher, all of it: see above
    for saved, group in zip(state["optimizer"]["param_groups"], trainer.optimizer.param_groups, strict=True):
        saved["fused"] = group.get("fused")  # the device of today decides, as in Ultralytics
    trainer.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:
        trainer.scaler.load_state_dict(state["scaler"])
    _continue_criterion(student_of(unwrap_model(trainer.model)), state["criterion"])
    trainer.ema.updates = state["updates"]
    vars(trainer.stopper).update(state["stopper"])
    waited = trainer.start_epoch - trainer.stopper.best_epoch
    trainer.stopped_early = state["stop"] and waited >= trainer.stopper.patience  # today's, if it was given
    closes = trainer.epochs - trainer.args.close_mosaic
    if trainer.args.close_mosaic and trainer.start_epoch > closes and (closes >= 0 or closes_mosaic_late()):
        trainer._close_dataloader_mosaic()  # Ultralytics does so only after a cut at the start of this epoch
    vars(trainer.warm_up).update(state.get("restart", {}))
    cadence.pending = state["pending"]
    cadence.gradients = {name: gradient.to(trainer.device) for name, gradient in state["gradients"].items()}
    cadence.nominal = trainer.accumulate


def _modules(trainer: PruningTrainer) -> dict[str, Any]:
    return {"model": unwrap_model(trainer.model), "ema": trainer.ema.ema}


def _trained(module: Any) -> dict[str, Tensor]:
    """The state of a module, without that of a teacher, which has a file of its own."""
    return {name: tensor for name, tensor in module.state_dict().items() if not name.startswith("teacher_model.")}


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _numbers(model: Any) -> dict[str, float]:
    """What a loss counts: of end-to-end heads, how far one branch has taken over from the other."""
    criterion = getattr(model, "criterion", None)
    return {k: v for k, v in vars(criterion).items() if type(v) in (int, float)} if criterion else {}


def _continue_criterion(model: Any, numbers: dict[str, float]) -> None:
    """Releases before 8.4.60 begin anew with the loss of an end-to-end head when they resume."""
    if not numbers:
        return
    model.criterion = getattr(model, "criterion", None) or model.init_criterion()
    vars(model.criterion).update(numbers)


def bring_along(trainer: PruningTrainer) -> None:
    """Ultralytics goes on in the folder that the run began in; if it was moved, fetch what lies beside last.pt."""
    found = Path(trainer.args.resume).resolve().parent.parent
    if not ranks.first() or found == trainer.save_dir.resolve():
        return
    for path in (p for pattern in CARRIED for p in found.glob(pattern)):
        target = trainer.save_dir / path.relative_to(found)
        if not target.exists():
            write_bytes(target, path.read_bytes())


def forget(trainer: PruningTrainer, keep: int | None = None) -> None:
    """Delete the states that last.pt no longer speaks of, and what a kill left half written.

    Args:
        trainer: the trainer.
        keep: number of rounds of the state for `trainer.epoch`, which stays; None: the run is over, nothing does.
    """
    if keep is None:
        (trainer.wdir / EARLY).unlink(missing_ok=True)
    kept = None if keep is None else _path(trainer, trainer.epoch, keep)
    for path in (*trainer.wdir.glob("state-*.pt"), *trainer.wdir.glob(".*.tmp"), *trainer.save_dir.glob(".*.tmp")):
        if path != kept:
            path.unlink(missing_ok=True)


def trim_results(path: Path, epochs: int) -> None:
    """Take rows out of results.csv that the resumed run is about to write again, and what is half a row."""
    if not path.exists():
        return
    header, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
    width = len(next(csv.reader([header]), []))
    whole = [r for r in rows if r.endswith("\n") and len(fields := r.split(",")) == width and int(fields[0]) <= epochs]
    if whole != rows:
        write_text(path, header + "".join(whole))


def _path(trainer: PruningTrainer, epoch: int, rounds: int) -> Path:
    return Path(trainer.wdir) / f"state-{epoch}-{rounds}.pt"
