# SPDX-License-Identifier: AGPL-3.0-or-later
"""Helpers of the recovery steps: which modules they may change, and restoring the modes of modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def inside(name: str, modules: Sequence[str]) -> bool:
    """True if `name` is one of `modules`, or is inside one of them."""
    return any(name == m or name.startswith(f"{m}.") for m in modules)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore the training or evaluation mode of every module at the end of the context."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def with_less_memory(images: Tensor, work: Callable[[Tensor], object], undo: Callable[[], object] | None = None) -> int:
    """Do something with images. If the memory is too small, do it again with half of the images, and so on.

    Args:
        images: `(n, ...)`.
        work: what is done.
        undo: called after a failure, before the next attempt.

    Returns:
        Number of images used.

    Raises:
        RuntimeError: If the memory is too small even for one image, or of another kind.
    """
    while True:
        try:
            work(images)
            return len(images)
        except (RuntimeError, MemoryError) as e:
            if undo:
                undo()
            if len(images) == 1 or not _out_of_memory(e):
                raise
            del e
        images = images[: len(images) // 2]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _out_of_memory(error: BaseException) -> bool:
    said = str(error).lower()  # PyTorch has its own error class for some devices only
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said
