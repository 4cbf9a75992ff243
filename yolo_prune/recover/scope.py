# SPDX-License-Identifier: AGPL-3.0-or-later
"""Helpers of the recovery steps: which modules they may change, and restoring the modes of modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


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
