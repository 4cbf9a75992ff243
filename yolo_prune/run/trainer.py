# SPDX-License-Identifier: AGPL-3.0-or-later
"""The trainer class that keeps a pruned structure, and writes checkpoints that a kill cannot damage."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from ultralytics.cfg import get_save_dir
from ultralytics.engine import trainer as engine
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import strip_optimizer

from yolo_prune.cut.record import delete_record, is_pruned, student_of
from yolo_prune.data import datasets
from yolo_prune.data.relabel import Relabelled, refuse_single_class, relabelled, relabelling
from yolo_prune.env import ranks
from yolo_prune.env.files import WholeFile, move, write_bytes
from yolo_prune.env.log import PREFIX
from yolo_prune.env.releases import strip_qat, unwrap_model
from yolo_prune.errors import RunError
from yolo_prune.run import inputs, keep, resume, rounds, schedule
from yolo_prune.run.claim import Claim
from yolo_prune.run.keep import StockLevel
from yolo_prune.run.sparse import SparseTraining
from yolo_prune.run.state import PruningTrainer, RunState
from yolo_prune.run.warmup import RestartWarmUp
from yolo_prune.run.zeros import KeptZeros

if TYPE_CHECKING:  # at run time the protocol cannot be a base class: its methods would hide those of Ultralytics
    _Base = PruningTrainer
else:
    _Base = object


class KeepStructure(_Base):
    """Mixin for any Ultralytics trainer. It trains a pruned model as it is, and does not rebuild it from its YAML.

    Attributes:
        pruning: the state of the run; None if the run does not prune or is not set up yet.
        accumulation: the batches since the last step of the optimizer, which a resumed run restores.
        warm_up: the warm-up after a reset of the optimizer.
        sparse: sparse training, after each step of the optimizer.
        zeros: keeps zeros, after each step of the optimizer.
        stopped_early: whether the resumed run had already stopped early when it was killed.
        keeps: whether the run trains a model that was pruned before.
        claim: keeps other runs out of the folder of this run; None if this process does not write there.
        relabelled: how the dataset is read for a model with fewer classes; None if no class was removed.
    """

    data: Any
    lf: Any
    scheduler: Any
    stock_model: Any  # a method of `StockLevel`
    pruning: RunState | None = None
    stopped_early = False
    keeps = False
    claim: Claim | None = None
    relabelled: Relabelled | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
            self._claim_folder(self.save_dir)
            self.wdir, self.last, self.best = map(WholeFile, (self.wdir, self.last, self.best))  # type: ignore[has-type]
            inputs.protect(self)
        except BaseException:
            self.release_folder()
            raise
        if getattr(self, "ddp", False):  # the processes that this one starts claim the folder
            self.release_folder()
        self.accumulation = resume.GradientAccumulation()
        self.warm_up = RestartWarmUp()
        self.sparse = SparseTraining()
        self.zeros = KeptZeros()
        self._stripped: Path | None = None

    def check_resume(self, overrides: Any) -> None:
        """As in Ultralytics. Its `__init__` calls this before it writes anything, so the folder is claimed here."""
        super().check_resume(overrides)  # type: ignore[misc]
        self._claim_folder(Path(get_save_dir(self.args)))

    def _claim_folder(self, folder: Path) -> None:
        if ranks.first() and not self.claim:
            self.claim = Claim(folder)

    def release_folder(self) -> None:
        """The run has ended: another one may write into its folder."""
        if self.claim:
            self.claim.release()

    def get_model(self, cfg: Any = None, weights: Any = None, **options: Any) -> Any:
        """The model to train, from the user's trainer or Ultralytics' own. If `weights` is pruned, it stays pruned."""
        trained = isinstance(weights, nn.Module)
        if trained:
            self._read_by_name(weights)
        if trained and self.resume:
            keep.check_same_data(weights, self.data, self._by_name)
        if not trained or not is_pruned(weights):
            return super().get_model(cfg=cfg, weights=weights, **options)  # type: ignore[misc]
        if any("YOLOEPE" in cls.__name__ for cls in type(self).__mro__):
            raise RunError(
                "Linear probing rebuilds the head of YOLOE, which would lose the pruned structure. Probe first, then "
                "prune; or fine-tune the pruned model with the default trainer."
            )
        pruned = self._fitted(weights)
        given = self.kept = deepcopy(pruned)
        delete_record(given)  # else `load` of a dense model would refuse it; `adopt` corrects that model's structure
        try:
            built = super().get_model(cfg=deepcopy(given.yaml), weights=given, **options)  # type: ignore[misc]
        finally:
            self.kept = None
        stock = partial(self.stock_model, deepcopy(given.yaml))
        keep.adopt(built, pruned, edited=built is given, builder=_user_class(self).__name__, stock=stock)
        self.keeps = True
        return built

    def _read_by_name(self, model: nn.Module) -> None:
        """Let the dataset have the classes of the model if some were removed from it."""
        kept = datasets.kept_classes(student_of(model))
        if kept and self.relabelled is None:
            refuse_single_class(self.args)
            self.relabelled = relabelled(kept, self.data, self.args.data)
            self.data = dict(self.relabelled.facts)
            LOGGER.info(f"{PREFIX}{kept.describe()}; labels are matched by name")

    def build_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """As in Ultralytics, but labels of removed classes are left out, and the others renumbered."""
        build = partial(super().build_dataset, *args, **kwargs)  # type: ignore[misc]
        return self.relabelled.built(self, build) if self.relabelled else build()

    def get_validator(self) -> Any:
        """As in Ultralytics, for the classes of the model."""
        validator = super().get_validator()  # type: ignore[misc]
        if self.relabelled:
            validator.__class__ = relabelling(type(validator), self.relabelled.classes)
        return validator

    def _fitted(self, weights: Any) -> Any:
        """A copy of a pruned model, ready to be trained on the dataset of this run."""
        model = deepcopy(weights).float()
        strip_qat(model)  # a resumed quantize=8 run inserts its quantizers again
        model.criterion = None  # made again, with the arguments of this run
        keep.fit(model, self.data, self._by_name, self._dense)
        model.requires_grad_(True)  # the parameters in a checkpoint do not require gradients
        return model

    @property
    def _by_name(self) -> bool:
        """Whether classes keep their weights by name."""
        return bool(getattr(self.args, "cls_remap", True))

    def _dense(self, model: Any, **data: Any) -> nn.Module:
        """The dense model that the trainer builds for this run, with some values of the dataset replaced."""
        before = self.data
        self.data = {**before, **data}
        build = super().get_model  # type: ignore[misc]
        quiet = {"verbose": False} if "verbose" in inspect.signature(build).parameters else {}
        try:
            return build(cfg=deepcopy(model.yaml), weights=None, **quiet)  # type: ignore[no-any-return]
        finally:
            self.data = before

    def setup_model(self) -> Any:
        """As in Ultralytics, but a pruned model must not be replaced by a model with another structure."""
        keeps = self.keeps or (isinstance(self.model, nn.Module) and is_pruned(self.model))
        checkpoint = super().setup_model()  # type: ignore[misc]
        self._read_by_name(unwrap_model(self.model))  # in a run on several devices, each process gets the model here
        if (keeps or self.keeps) and not is_pruned(unwrap_model(self.model)):
            name = _user_class(self).__name__
            raise RunError(
                f"{name}.setup_model replaces the pruned model by a model with another structure. Change the model in "
                f"{name}.get_model instead, or leave its structure as it is."
            )
        return checkpoint

    def _setup_scheduler(self, *args: Any) -> None:
        """As in Ultralytics, but the schedule of the learning rate restarts at each cut if the recipe asks for it.

        The warm-up also reads the schedule from `self.lf`.
        """
        super()._setup_scheduler(*args)  # type: ignore[misc]
        stock = self.lf

        def lf(epoch: int) -> float:
            run = self.pruning  # None until the run is set up
            if run is None or run.recipe.recover.learning_rate == "run":
                return float(stock(epoch))
            return float(schedule.learning_rate_factor(epoch, run.rounds, self.epochs, stock))

        self.lf = lf
        self.scheduler.lr_lambdas = [lf for _ in self.optimizer.param_groups]

    def preprocess_batch(self, batch: Any) -> Any:
        """As in Ultralytics. A batch starts here: after the warm-up sets `accumulate`, before the loop reads it."""
        self.accumulation.batch_starts(self)
        return super().preprocess_batch(batch)  # type: ignore[safe-super]

    def optimizer_step(self) -> None:
        """As in Ultralytics, with the warm-up after a reset, sparse training and kept zeros. The step is counted."""
        with self.warm_up.short_steps(self.optimizer), self.sparse.after_step(self), self.zeros.after_step(self):
            super().optimizer_step()  # type: ignore[misc]
        self.accumulation.stepped()

    def save_model(self) -> Any:
        """As in Ultralytics, but files are never incomplete, and the state for last.pt is written before last.pt."""
        run = self.pruning
        self.zeros.check(self)
        if run and run.exact:
            resume.save(self, run.structure_changes)
        saved = super().save_model()  # type: ignore[safe-super]
        resume.delete_old_states(self, run.structure_changes if run else None)
        return saved

    def resume_training(self, ckpt: Any) -> None:
        """As in Ultralytics, but a run that was killed after its last epoch can be completed.

        Ultralytics refuses the checkpoint of the last epoch.
        """
        complete = bool(self.resume and ckpt and ckpt.get("epoch", -1) + 1 == self.epochs)
        self.epochs += complete
        super().resume_training(ckpt)  # type: ignore[misc]
        self.epochs -= complete
        if self.resume and ckpt:
            self.fitness = (ckpt.get("train_metrics") or {}).get("fitness")
            resume.copy_moved_files(self)
            if ranks.first() and self.fitness is not None and self.fitness == ckpt.get("best_fitness"):
                write_bytes(self.best, Path(self.args.resume).read_bytes())  # killed before writing best.pt

    def _setup_train(self, *args: Any) -> None:
        super()._setup_train(*args)  # type: ignore[misc]
        if self.start_epoch >= self.epochs or self.stopped_early:
            raise _AllTrained

    def final_eval(self) -> None:
        """As in Ultralytics, but only complete files replace checkpoints. last.pt is replaced at the end of the run."""
        if self.pruning:
            rounds.conclude(self, self.pruning)
        with _stripped_by(self.strip, self.wdir):
            super().final_eval()  # type: ignore[misc]

    def _do_train(self, *args: Any) -> None:
        """As in Ultralytics. If all epochs are trained already, only the steps after the last epoch follow."""
        try:
            self._train_all(*args)
            self.tidy()
        finally:
            self.release_folder()

    def _train_all(self, *args: Any) -> None:
        try:
            super()._do_train(*args)  # type: ignore[misc]
        except _AllTrained:
            self.epoch, self.epoch_time = self.start_epoch - 1, None
            self.final_eval()
            if ranks.first():
                if self.args.plots:
                    self.plot_metrics()  # type: ignore[attr-defined]
                self.run_callbacks("on_train_end")  # type: ignore[attr-defined]

    def tidy(self) -> None:
        """The run is complete: delete the files that only a resumed run needs."""
        if self._stripped and self._stripped.exists():
            move(self._stripped, self.last)
        if ranks.first() and self.pruning:
            resume.delete_old_states(self)

    def strip(self, path: Any, s: str = "", updates: Any = None) -> Any:
        """Ultralytics' `strip_optimizer` for a file of this run. The new file replaces the old one when complete."""
        target = Path(s or path)
        temporary = target.with_name(f".{target.name}.stripped.tmp")
        with _renamed_in_log(LOGGER, str(temporary), str(target)):
            result = strip_optimizer(path, s=str(temporary), **({"updates": updates} if updates else {}))
        if target == self.last:
            self._stripped = temporary
        elif temporary.exists():
            move(temporary, target)
        return result


@contextmanager
def _stripped_by(strip: Callable[..., Any], folder: Path) -> Iterator[None]:
    """Inside, Ultralytics strips the checkpoints in `folder` with `strip`, and all others with its own function.

    `final_eval` calls a function of its own module, so this function has to be replaced in that module. The contract
    test checks that it exists.
    """
    stock = engine.strip_optimizer

    def strip_optimizer(f: Any, *args: Any, **kwargs: Any) -> Any:
        ours = Path(f).parent.resolve() == folder.resolve()
        return (strip if ours else stock)(f, *args, **kwargs)

    engine.strip_optimizer = strip_optimizer
    try:
        yield
    finally:
        engine.strip_optimizer = stock


@contextmanager
def _renamed_in_log(logger: logging.Logger, temporary: str, final: str) -> Iterator[None]:
    """Inside, log lines show the final name of a file instead of its temporary name."""

    def rename(record: logging.LogRecord) -> bool:
        record.msg = str(record.msg).replace(temporary, final)
        return True

    logger.addFilter(rename)
    try:
        yield
    finally:
        logger.removeFilter(rename)


class _AllTrained(Exception):
    """Raised if a resumed run needs no epoch: all were trained, or training had stopped early, before the kill."""


@cache
def prune_trainer(base: type[BaseTrainer]) -> type[BaseTrainer]:
    """`base` with `KeepStructure`. The name of the class contains "Trainer", because Ultralytics checks this.

    `KeepStructure` comes before the classes of the user, `StockLevel` after them and before Ultralytics' own. So all
    methods of the user run, and what they call with `super()` knows pruned models.
    """
    if issubclass(base, KeepStructure):
        return base
    name = f"Prune{base.__name__}"
    stock = next(cls for cls in base.__mro__ if _is_stock(cls))
    users = () if base is stock else (base,)
    described = {"__module__": __name__, "__qualname__": name, "__doc__": base.__doc__}
    return type(name, (KeepStructure, *users, StockLevel, stock), described)


def _is_stock(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "ultralytics"


def _user_class(trainer: Any) -> type:
    """The class of the trainer that the user passed, or Ultralytics' own."""
    classes = type(trainer).__mro__
    return next(cls for cls in classes[classes.index(KeepStructure) + 1 :] if cls is not StockLevel)
