# SPDX-License-Identifier: AGPL-3.0-or-later
"""Several processes (ranks) that train one model: rank 0 decides, and all ranks follow its decision."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from yolo_prune.errors import PruneError, RunError

T = TypeVar("T")


def rank() -> int:
    """The number of this process among the processes that train together; 0 for a single process."""
    return max(int(os.environ.get("RANK", -1)), 0)


def first() -> bool:
    """True on the first rank, which writes all files, and in a single process."""
    return rank() == 0


def several() -> bool:
    """True if other processes train the same model."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def agree(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 only, and return its result on every rank.

    Raises:
        PruneError: On every rank, if `make` raised it on rank 0, so that no rank keeps waiting.
        RunError: On every rank, if `make` raised any other error.
    """
    if not several():
        return make()
    answer: list[Any] = [None]
    if first():
        try:
            answer = [(True, make())]
        except PruneError as e:
            answer = [(False, e)]
        except Exception as e:
            answer = [(False, RunError(f"Rank 0 failed: {type(e).__name__}: {e}"))]
    dist.broadcast_object_list(answer, src=0)
    worked, value = answer[0]
    if not worked:
        raise value
    return value  # type: ignore[no-any-return]  # what make returned


def share(tensors: Iterable[Tensor]) -> None:
    """Give every rank the values that rank 0 has."""
    if several():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather(value: T) -> list[T]:
    """The values of all ranks, in the order of the ranks."""
    if not several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
