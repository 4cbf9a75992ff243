# SPDX-License-Identifier: AGPL-3.0-or-later
"""An Ultralytics trainer whose ranks are processes on the CPU, started and fed by Ultralytics' own launcher.

Only what Ultralytics asks of CUDA is answered otherwise: which device a rank has, the backend (gloo), and that a
wrapped module on the CPU has no device number. Importable by the workers, which get the trainer class by name.
"""

from __future__ import annotations

import os
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch_pruning as tp
from torch import nn
from ultralytics.engine import validator
from ultralytics.models.yolo.detect import DetectionTrainer

RANKS = 2


class CpuRanks(DetectionTrainer):
    """`DetectionTrainer` on two processes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.world_size = RANKS
        self.ddp = "LOCAL_RANK" not in os.environ

    def _setup_ddp(self) -> None:
        torch.set_num_threads(1)
        stock = nn.parallel.DistributedDataParallel

        class OnCpu(stock):  # type: ignore[valid-type,misc]
            def __init__(self, module: nn.Module, device_ids: Any = None, **kwargs: Any) -> None:
                super().__init__(module, device_ids=None, **kwargs)

        nn.parallel.DistributedDataParallel = OnCpu
        backend = validator.AutoBackend
        validator.AutoBackend = lambda *a, **k: backend(*a, **{**k, "device": torch.device("cpu")})
        validator.get_torch_device_backend = lambda *a: SimpleNamespace(current_device=lambda: 0)
        dist.init_process_group(
            "gloo", timeout=timedelta(seconds=120), rank=int(os.environ["RANK"]), world_size=self.world_size
        )


class Largest(tp.importance.Importance):  # type: ignore[misc]
    """An importance as users write it: the largest weight of each filter, times the largest gradient in it."""

    def __call__(self, group: Any) -> torch.Tensor:
        dep, idxs = group[0]
        weight = dep.target.module.weight
        largest: torch.Tensor = (weight * weight.grad)[idxs].abs().flatten(1).amax(1)
        return largest
