# SPDX-License-Identifier: AGPL-3.0-or-later
"""Resume a killed run so that it ends in the same way as a run without interruption.

Ultralytics' last.pt holds the average and a part of the optimizer state in half precision, and no state of the random
numbers. In a pruning run, every epoch therefore draws its random numbers from the seed and the number of the epoch, and
the values that last.pt rounds are saved beside it, in `state-<epoch>-<changes>.pt`, where `changes` counts the changes
of the structure. last.pt is written last, so that the files that belong to it are always complete.
`deterministic=False` turns all of this off.
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
from yolo_prune.env.files import remove, write_bytes, write_text
from yolo_prune.env.releases import DAMAGED, closes_mosaic_late, unwrap_model
from yolo_prune.recover.rewind import FILE as EARLY
from yolo_prune.run.state import PruningTrainer

NEVER = 10**9
PATIENCE = ("best_fitness", "best_epoch", "possible_stop")
WEIGHTS = ("best.pt", "round*.pt", "state-*.pt", EARLY)
STATES = ("weights/state-*.pt", "weights/.*.tmp", ".*.tmp")
"""Patterns of the state files in the folder of a run, and of the incomplete files of a killed run."""
COPIED = ("prune.json", "results.csv", *(f"weights/{name}" for name in WEIGHTS))


class GradientAccumulation:
    """The batches since the last step of the optimizer, which Ultralytics' loop counts in a local variable only.

    Attributes:
        pending: batches whose gradients wait for the next step.
        gradients: the gradients of these batches in a resumed run, because Ultralytics clears them before its first
            epoch.
        nominal: batches per step, to restore after the first step of a resumed run; None after that.
    """

    def __init__(self) -> None:
        self.pending = 0
        self.gradients: dict[str, Tensor] = {}
        self.nominal: int | None = None

    def epoch_starts(self, trainer: PruningTrainer) -> None:
        """Restore the gradients of a resumed run."""
        parameters = dict(unwrap_model(trainer.model).named_parameters()) if self.gradients else {}
        for name, gradient in self.gradients.items():
            parameters[name].grad = gradient
        self.gradients = {}

    def batch_starts(self, trainer: PruningTrainer) -> None:
        """After a resume, delay the first step to the batch at which the run without interruption would have stepped.

        Without the delay, Ultralytics' loop would step at the first batch.
        """
        if self.nominal is not None:
            if trainer.accumulate != NEVER:
                self.nominal = trainer.accumulate  # a warm-up sets it again for every batch
            trainer.accumulate = NEVER if self.pending + 1 < self.nominal else self.nominal

    def batch_ends(self) -> None:
        """Count the batch. If its gradients were used in a step, `stepped` was called before."""
        self.pending += 1

    def stepped(self) -> None:
        """The optimizer has made a step. `batch_ends` follows for the same batch and sets `pending` to 0."""
        self.pending, self.nominal = -1, None


def seed_epoch(trainer: PruningTrainer) -> None:
    """Seed all random numbers of this epoch from the seed of the run and the number of the epoch."""
    attempt = getattr(trainer, "nan_recovery_attempts", 0)  # an epoch that ended in NaN is repeated with other batches
    seed = (trainer.args.seed + 1) * 1_000_003 + trainer.epoch * 1009 + attempt * 101 + ranks.rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    loader = trainer.train_loader
    if getattr(loader, "generator", None) is None or not hasattr(loader, "reset"):
        return  # a custom loader of the user
    loader.generator.manual_seed(seed)
    _seed_albumentations(getattr(loader.dataset, "transforms", None), seed)
    refill_mosaic(loader.dataset, seed)
    loader.reset()


def _seed_albumentations(transforms: Any, seed: int) -> None:
    """Seed Albumentations: its transforms have their own random state, which earlier releases seed only once."""
    for transform in getattr(transforms, "transforms", ()):
        _seed_albumentations(transform, seed)
        inner: Any = getattr(transform, "transform", None)
        if hasattr(inner, "set_random_seed"):
            inner.set_random_seed(seed % 2**32)


def refill_mosaic(dataset: Any, seed: int) -> None:
    """Fill the mosaic buffer again, with images that depend only on `seed`.

    Mosaics are made of images that were loaded recently, and only the process that loaded them knows which ones.
    """
    length = getattr(dataset, "max_buffer_length", 0)
    if not length or getattr(dataset, "cache", None) == "ram":
        return
    for i in dataset.buffer:
        dataset.ims[i] = dataset.im_hw0[i] = dataset.im_hw[i] = None
    dataset.buffer = random.Random(seed).choices(range(len(dataset.ims)), k=max(length - 1, 1))


def save(trainer: PruningTrainer, changes: int) -> None:
    """Write the state that last.pt does not hold, just before last.pt is written for `trainer.epoch`."""
    model, optimizer, accumulation = unwrap_model(trainer.model), trainer.optimizer, trainer.accumulation
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None} if accumulation.pending else {}
    state = {
        **{key: _without_teacher(module) for key, module in _modules(trainer).items()},
        "updates": trainer.ema.updates,
        "optimizer": optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "criterion": _loss_counters(student_of(model)),
        "stopper": {name: getattr(trainer.stopper, name) for name in PATIENCE},
        "stop": bool(trainer.stop),
        "pending": accumulation.pending,
        "restart": vars(trainer.warm_up),  # the name in files of 0.1.0
        "gradients": gradients,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path = _path(trainer, trainer.epoch, changes)
    try:
        write_bytes(path, buffer.getvalue())
    except OSError as e:  # a full disk must not end a long training
        LOGGER.warning(
            f"yolo-prune: {path.name} could not be written ({e}). If this run is resumed, the result will not be bit "
            "for bit the same."
        )


def restore(trainer: PruningTrainer, changes: int) -> None:
    """After Ultralytics has resumed from last.pt, restore the values that last.pt rounds, if they were saved."""
    path = _path(trainer, trainer.start_epoch - 1, changes)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        usable = all(
            _shapes(_without_teacher(module)) == _shapes(state[key]) for key, module in _modules(trainer).items()
        )
    except (*DAMAGED, ValueError, TypeError):
        usable = False
    if not usable:
        LOGGER.warning(
            f"yolo-prune: {path.name} is missing beside last.pt, or does not fit. The run continues from last.pt "
            "alone. It will be complete, but not bit for bit the same as a run without interruption."
        )
        return
    for key, module in _modules(trainer).items():
        module.load_state_dict(state[key], strict=False)  # not strict: the teacher's state is not saved
    for saved, group in zip(state["optimizer"]["param_groups"], trainer.optimizer.param_groups, strict=True):
        saved["fused"] = group.get("fused")  # as in Ultralytics, the present device decides
    trainer.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:
        trainer.scaler.load_state_dict(state["scaler"])
    _restore_loss_counters(student_of(unwrap_model(trainer.model)), state["criterion"])
    trainer.ema.updates = state["updates"]
    vars(trainer.stopper).update(state["stopper"])
    waited = trainer.start_epoch - trainer.stopper.best_epoch
    trainer.stopped_early = state["stop"] and waited >= trainer.stopper.patience  # a patience given now counts
    closes = trainer.epochs - trainer.args.close_mosaic
    if trainer.args.close_mosaic and trainer.start_epoch > closes and (closes >= 0 or closes_mosaic_late()):
        trainer._close_dataloader_mosaic()  # Ultralytics would do this later, after a cut at the start of this epoch
    vars(trainer.warm_up).update(state.get("restart", {}))
    accumulation = trainer.accumulation
    accumulation.pending = state["pending"]
    accumulation.gradients = {name: gradient.to(trainer.device) for name, gradient in state["gradients"].items()}
    accumulation.nominal = trainer.accumulate


def _modules(trainer: PruningTrainer) -> dict[str, Any]:
    return {"model": unwrap_model(trainer.model), "ema": trainer.ema.ema}


def _without_teacher(module: Any) -> dict[str, Tensor]:
    """The state of a module without the state of its teacher, because the teacher has its own file."""
    return {name: tensor for name, tensor in module.state_dict().items() if not name.startswith("teacher_model.")}


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _loss_counters(model: Any) -> dict[str, float]:
    """The counters of a loss. The loss of an end-to-end head counts how far the weight of its branches has moved."""
    criterion = getattr(model, "criterion", None)
    return {k: v for k, v in vars(criterion).items() if type(v) in (int, float)} if criterion else {}


def _restore_loss_counters(model: Any, counters: dict[str, float]) -> None:
    """Restore the counters of a loss, because releases before 8.4.60 reset those of an end-to-end head on resume."""
    if not counters:
        return
    model.criterion = getattr(model, "criterion", None) or model.init_criterion()
    vars(model.criterion).update(counters)


def copy_moved_files(trainer: PruningTrainer) -> None:
    """If the folder of the run was moved, copy the files beside last.pt into the folder that Ultralytics uses.

    Ultralytics continues in the folder in which the run began.
    """
    moved = Path(trainer.args.resume).resolve().parent.parent
    if not ranks.first() or moved == trainer.save_dir.resolve():
        return
    for path in (p for pattern in COPIED for p in moved.glob(pattern)):
        target = trainer.save_dir / path.relative_to(moved)
        if not target.exists():
            write_bytes(target, path.read_bytes())


def delete_old_states(trainer: PruningTrainer, keep: int | None = None) -> None:
    """Delete the state files that do not belong to last.pt, and the incomplete files of a killed run.

    Args:
        trainer: the trainer.
        keep: `changes` in the name of the state file to keep, for `trainer.epoch`; None if no state file is kept,
            because the run is over.
    """
    if keep is None:
        remove(trainer.wdir / EARLY)
    kept = None if keep is None else _path(trainer, trainer.epoch, keep)
    for path in (path for pattern in STATES for path in trainer.save_dir.glob(pattern)):
        if path != kept:
            remove(path)


def trim_results(path: Path, epochs: int) -> None:
    """Remove the rows of results.csv that the resumed run writes again, and an incomplete row."""
    if not path.exists():
        return
    header, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
    width = len(next(csv.reader([header]), []))
    complete = [
        r for r in rows if r.endswith("\n") and len(fields := r.split(",")) == width and int(fields[0]) <= epochs
    ]
    if complete != rows:
        write_text(path, header + "".join(complete))


def _path(trainer: PruningTrainer, epoch: int, changes: int) -> Path:
    return Path(trainer.wdir) / f"state-{epoch}-{changes}.pt"
