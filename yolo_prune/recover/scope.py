# SPDX-License-Identifier: AGPL-3.0-or-later
"""What recovery may touch, and what is as before afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


def inside(name: str, modules: Sequence[str]) -> bool:
    """True for the name of one of `modules`, or of something in one of them."""
    return any(name == m or name.startswith(f"{m}.") for m in modules)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put every module back into training or evaluation mode at the end, as it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
