# SPDX-License-Identifier: AGPL-3.0-or-later
"""A process that has imported everything and forks one child per training run; the children get killed.

Reads one JSON object a line from stdin (`train`: arguments of `YOLO.train`, `model`, `kill`), answers with the child's
exit status. `kill` says where the child sends itself a SIGKILL: the place, and which time it comes by
(at random: after how many milliseconds).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import torch
from ultralytics import YOLO
from ultralytics.engine import trainer as engine
from ultralytics.engine.validator import BaseValidator
from ultralytics.models.yolo.detect import DetectionTrainer

from yolo_prune.env import files
from yolo_prune.run import journal, live, rounds, trainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(owner: Any, name: str, when: str, count: int, which: Callable[..., bool] = lambda *a, **k: True) -> None:
    """Die before or after the `count`-th call of a function for which `which` holds."""
    stock, seen = getattr(owner, name), [0]

    def deadly(*args: Any, **kwargs: Any) -> Any:
        mine = which(*args, **kwargs)
        seen[0] += mine
        if mine and seen[0] == count and when == "before":
            die()
        result = stock(*args, **kwargs)
        if mine and seen[0] == count and when == "after":
            die()
        return result

    setattr(owner, name, deadly)


def half_written(name: str, count: int) -> None:
    """Die with half of a file on the disk."""
    stock, seen = files.write_bytes, [0]

    def write_bytes(path: Any, data: bytes) -> Any:
        seen[0] += os.path.basename(path).startswith(name)
        if os.path.basename(path).startswith(name) and seen[0] == count:
            real, files.os.fsync = os.fsync, lambda handle: (os.ftruncate(handle, len(data) // 2), real(handle), die())
        return stock(path, data)

    for module in (files, live, sys.modules["yolo_prune.run.resume"], sys.modules["yolo_prune.recover.rewind"]):
        module.write_bytes = write_bytes


PLACES: dict[str, Callable[[int], None]] = {
    "in a batch": lambda n: at(DetectionTrainer, "preprocess_batch", "after", n),
    "at an optimizer step": lambda n: at(engine.BaseTrainer, "optimizer_step", "before", n),
    "after an optimizer step": lambda n: at(engine.BaseTrainer, "optimizer_step", "after", n),
    "after validation": lambda n: at(engine.BaseTrainer, "validate", "after", n),
    "after a row of results.csv": lambda n: at(engine.BaseTrainer, "save_metrics", "after", n),
    "writing last.pt": lambda n: half_written("last.pt", n),
    "writing best.pt": lambda n: half_written("best.pt", n),
    "writing the state": lambda n: half_written("state-", n),
    "writing the early weights": lambda n: half_written("rewind.pt", n),
    "rewound": lambda n: at(live, "rewind", "after", n),
    "writing the report": lambda n: half_written("prune.json", n),
    "after last.pt": lambda n: at(engine.BaseTrainer, "save_model", "after", n),
    "before a cut": lambda n: at(live, "cut", "before", n),
    "after a cut": lambda n: at(live, "cut", "after", n),
    "recalibrating": lambda n: at(rounds, "_recalibrate", "after", n),
    "best.pt put aside": lambda n: at(live, "forget_best", "after", n),
    "kept aside": lambda n: at(live, "put_aside", "after", n),
    "gone back": lambda n: at(live, "go_back", "after", n),
    "the old best taken": lambda n: at(live, "take_for_best", "after", n),
    "judged": lambda n: at(rounds, "judge", "after", n),
    "round taken down": lambda n: at(journal, "log_round", "after", n),
    "after a round": lambda n: at(rounds, "perform", "after", n),
    "before the last validation": lambda n: at(trainer.KeepStructure, "strip", "before", n),
    "stripping": lambda n: at(trainer, "strip_optimizer", "after", n),
    "at random": lambda n: threading.Timer(n / 1000, die).start(),
    "report complete": lambda n: at(journal, "complete", "after", n),
    "ended": lambda n: at(trainer.KeepStructure, "tidy", "after", n),
}


def fitness_of_the_weights() -> None:
    """Tiny models detect nothing; so that there is a best epoch, and any wrong bit shows, hash the averaged weights.

    Where the run has a limit on the drop, the share of the FLOPs that is left comes first.
    """
    stock = BaseValidator.__call__

    def validate(self: Any, trainer: Any = None, model: Any = None) -> Any:
        result = stock(self, trainer, model)
        if trainer and result:
            total = sum(float(v.double().abs().sum()) for v in trainer.ema.ema.state_dict().values())
            result["fitness"] = round(total * 1e3 % 1, 5)
            if trainer.pruning.recipe.limit is not None:
                share = trainer.pruning.cost[0] / trainer.pruning.report.dense.flops
                result["fitness"] = round(share + result["fitness"] / 1000, 8)
        return result

    BaseValidator.__call__ = validate


def run(order: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    fitness_of_the_weights()
    if order["kill"]:
        place, count = order["kill"]
        PLACES[place](count)
    YOLO(order["model"]).train(**order["train"])


def main() -> None:
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
