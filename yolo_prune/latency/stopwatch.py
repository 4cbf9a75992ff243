# SPDX-License-Identifier: AGPL-3.0-or-later
"""Times whole models against the dense model from which they were cut. All are exported, and run in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from yolo_prune.cut import surgery
from yolo_prune.cut.copies import bare_copy, lean_copy
from yolo_prune.cut.plan import Plan
from yolo_prune.cut.record import KEY, read_record, student_of
from yolo_prune.env import checkpoints, outputs
from yolo_prune.env.image_size import height_width
from yolo_prune.errors import BenchError
from yolo_prune.graph import probes
from yolo_prune.measure import clock, runtimes, subjects
from yolo_prune.measure.clock import Interval
from yolo_prune.measure.runtimes import Session
from yolo_prune.measure.subjects import Setting

BUDGET = 5.0
"""Seconds of timing, for at most `clock.MOST` rounds; several times as long if a ratio is uncertain.

This value is a choice: the eight attempts of a search then take 40 seconds of timing on an idle machine.
"""
CERTAIN, UNCERTAIN = 0.01, 0.03
"""Limits for half the width of a ratio's 95 % interval, as a fraction of the ratio.

Timing goes on until the interval is below `CERTAIN`, for up to three budgets; then until it is below `UNCERTAIN`, for
up to ten budgets. `UNCERTAIN` is `search.TOLERANCE`: a wider interval does not show whether the target is met.
`CERTAIN` is a third of it, so that the decision seldom depends on chance.
"""

MODELS = 10  # the dense model and the attempts of a search: a stopwatch keeps all its exports until it is closed


class Measured(NamedTuple):
    """Latency of a model and of the dense model in the same rounds, in milliseconds, and their ratio."""

    dense_ms: float
    ms: float
    ratio: Interval


class Stopwatch:
    """Times models that were cut from a dense model. It is a context manager with a temporary folder for exports."""

    def __init__(self, dense: nn.Module, format: str, setting: Setting) -> None:
        """Store the dense model and the settings.

        Args:
            dense: the dense model; it is exported when the context is entered.
            format: a format name from `runtimes.parse`.
            setting: imgsz, batch, device, threads and precision.
        """
        self.dense, self.format, self.setting = dense, format, setting

    def __enter__(self) -> Stopwatch:
        with contextlib.ExitStack() as stack:
            stack.enter_context(runtimes.undisturbed())
            self._folder = Path(stack.enter_context(outputs.scratch(subjects.room([self.dense] * MODELS))))
            self._count = 0
            self._reference = self._open(self.dense)
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        del self._reference
        self._entered.close()

    def measure(self, models: Sequence[nn.Module]) -> list[Measured]:
        """Export models and time them in turn with the dense model.

        Raises:
            BenchError: If a model cannot be exported or run.
        """
        runs = [self._reference.run, *(self._open(model).run for model in models)]
        rounds = clock.rounds_for(clock.warm_up(runs, seconds=0.5), BUDGET)
        times: list[list[float]] = [[] for _ in runs]
        for budgets in range(1, 11):
            for own_times, more in zip(times, clock.interleave(runs, range(rounds)), strict=True):
                own_times += more
            ratios = [clock.paired_ratio(own_times, times[0]) for own_times in times[1:]]
            doubt = max(((r.high - r.low) / 2 / r.median for r in ratios), default=0.0)
            if doubt <= (CERTAIN if budgets < 3 else UNCERTAIN):
                break
        dense, *others = (1000 * clock.quartiles(own_times).median for own_times in times)
        return [Measured(dense, ms, ratio) for ms, ratio in zip(others, ratios, strict=True)]

    def _open(self, model: nn.Module) -> Session:
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        kind = "rtdetr" if "RTDETR" in type(model).__name__ else "model"
        path = folder / f"{kind}.pt"
        torch.save({"model": lean_copy(model), "train_args": {}}, path)
        subject = subjects.Subject(path.name, checkpoints.open_model(path), path)
        session = subjects.session(self.format, subjects.exported(self.format, subject, self.setting), self.setting)
        size = (self.setting.batch, probes.image_channels(model) or 3, *height_width(self.setting.imgsz))
        session.prepare(np.random.default_rng(0).random(size, dtype=np.float32))
        return session


def cut_copy(model: nn.Module, plan: Plan) -> nn.Module:
    """A cut copy of a model, for timing only: it has no record of the cut."""
    cut = bare_copy(model)
    surgery.apply(cut, plan)
    return cut


def dense_twin(model: nn.Module) -> nn.Module:
    """A model with the widths of the dense model from which `model` was pruned; `model` itself if it is dense.

    The weights of the new model are random: it can only be timed.

    Raises:
        BenchError: If its architecture cannot be built again.
    """
    record = read_record(model)
    if record is None or record.plan is None:
        return model
    student: Any = student_of(model)
    architecture = {key: value for key, value in deepcopy(student.yaml).items() if key != KEY}
    try:
        with torch.random.fork_rng(devices=[]):
            twin: nn.Module = type(student)(architecture, verbose=False)
    except Exception as e:  # the constructor may be the user's code
        raise BenchError(
            f"The dense model cannot be built again to time it: {type(e).__name__}: {e}. Set target.flops or "
            "target.params instead of target.latency."
        ) from e
    state = twin.state_dict()
    wrong = [name for name, shape in record.plan.shapes.items() if name not in state or state[name].shape != shape]
    if wrong:
        raise BenchError(
            f"The dense model cannot be built again to time it: '{wrong[0]}' gets another shape. Set target.flops or "
            "target.params instead of target.latency."
        )
    return twin.eval()
