# SPDX-License-Identifier: AGPL-3.0-or-later
"""A process that has imported everything and forks one child per training run; the children get killed.

Reads one JSON object a line from stdin (`train`: arguments of `YOLO.train`, `model`, `kill`), answers with the child's
exit status. `kill` says where the child sends itself a SIGKILL: a moment of `MOMENTS` or what happens to which file
("writing last.pt"), and which time it comes by (at random: after how many milliseconds). Only what is on the disk
outlives a process, so that all moments between two changes of files are alike.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import own_blocks
import torch
from ultralytics import YOLO
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.engine.validator import BaseValidator
from ultralytics.models.yolo.detect import DetectionTrainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(owner: Any, name: str, when: str, count: int, which: Callable[..., bool] = lambda *a, **k: True) -> None:
    """Die before or after the `count`-th call of a function for which `which` holds."""
    stock, seen = getattr(owner, name), [0]

    def deadly(*args: Any, **kwargs: Any) -> Any:
        seen[0] += (mine := which(*args, **kwargs))
        if mine and seen[0] == count and when == "before":
            die()
        result = stock(*args, **kwargs)
        if mine and seen[0] == count and when == "after":
            die()
        return result

    setattr(owner, name, deadly)


def at_half(count: int, which: Callable[..., bool]) -> None:
    """Die before a file takes its place, with half of it under its temporary name."""

    def halve(source: Any, target: Any, **_: Any) -> bool:
        seen[0] += (mine := which(source, target))
        if mine and seen[0] == count and str(source).endswith(".tmp"):  # else it is only moved
            os.truncate(source, os.path.getsize(source) // 2)
        return mine

    seen = [0]
    at(os, "replace", "before", count, halve)


def at_file(doing: str, name: str, count: int) -> None:
    """Die at the `count`-th change of a file of the run, whose name begins like this.

    Args:
        doing: "writing" or "stripping" (half of it is there, under its temporary name), "written", or "removed".
        name: how the name of the file begins.
        count: the first such change is 1.
    """

    def which(source: Any, target: Any = "", **_: Any) -> bool:
        mine = Path(target or source).name.startswith(name)
        if doing == "removed":
            return mine and os.path.exists(source)
        return mine and (doing == "written" or ("stripped" in str(source)) is (doing == "stripping"))

    if doing == "removed":
        at(os, "unlink", "after", count, which)
    elif doing == "written":
        at(os, "replace", "after", count, which)
    else:
        at_half(count, which)


MOMENTS: dict[str, tuple[Any, str, str]] = {
    "in a batch": (DetectionTrainer, "preprocess_batch", "after"),
    "after an optimizer step": (BaseTrainer, "optimizer_step", "after"),
    "after validation": (BaseTrainer, "validate", "after"),
    "after a row of results.csv": (BaseTrainer, "save_metrics", "after"),
}


def prepare_death(where: str, count: int) -> None:
    """Let this process be killed."""
    if where == "at random":
        threading.Timer(count / 1000, die).start()
    elif where in MOMENTS:
        at(*MOMENTS[where], count)
    else:
        at_file(*where.split(), count)


# By how many epochs are trained. So the best epoch is the same one on every machine; later epochs are no better.
FITNESS = (0.1, 0.2, 0.4, 0.3, 0.6, 0.5, 0.8, 0.7)


def fitness_of_the_weights() -> None:
    """Tiny models detect nothing. So that any wrong bit shows, the last digits of fitness are of the averaged weights.

    Where the run has a limit on the drop, the share of the FLOPs that is left comes first.
    """
    stock = BaseValidator.__call__

    def validate(self: Any, trainer: Any = None, model: Any = None) -> Any:
        result = stock(self, trainer, model)
        if trainer and result:
            run = trainer.pruning
            trained = len(run.report.epochs_log) + run.epoch_open
            wanted = (*FITNESS, 0.0)[min(trained, len(FITNESS))]
            total = sum(float(v.double().abs().sum()) for v in trainer.ema.ema.state_dict().values())
            found = wanted + total * 1e3 % 1 / 1000
            if run.recipe.limit is not None:
                found = run.cost[0] / run.report.dense.flops + found / 1000
            result["fitness"] = round(found, 8)
        return result

    BaseValidator.__call__ = validate


def run(order: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    fitness_of_the_weights()
    own_blocks.register()
    if order["kill"]:
        prepare_death(*order["kill"])
    YOLO(order["model"]).train(**order["train"])


PREPARED = (  # what a training imports on its way: done once, it is done for all children
    *("jinja2", "matplotlib.pyplot", "polars", "requests", "sympy", "thop", "torch._dynamo", "torchvision"),
    *("yolo_prune.pages.run_page", "yolo_prune.report.picture", "yolo_prune.run.launch", "yolo_prune.run.trainer"),
)


def main() -> None:
    for name in PREPARED:
        with contextlib.suppress(ImportError):  # not every release of Ultralytics needs all of them
            importlib.import_module(name)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                run(order)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
