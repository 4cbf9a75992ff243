# SPDX-License-Identifier: AGPL-3.0-or-later
"""Opaque blocks are not traced. They keep all their channels, all that they read, and all that they put out."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from yolo_prune.graph import foreign
from yolo_prune.graph.copying import copy_tree
from yolo_prune.graph.tracer import Tracer


class Opaque(nn.Module):
    """Stands for a block in a twin: runs the block itself, on random numbers, to learn the shapes of its outputs.

    Attributes:
        reason: why the block is not traced.
        tracer: follows the labels of the model around the block. It must be set before the block runs.
    """

    tracer: Tracer

    def __init__(self, block: nn.Module, reason: str) -> None:
        super().__init__()
        copy = deepcopy(block) if isinstance(block, torch.jit.ScriptModule) else copy_tree(block, {})
        self._block = [copy.cpu().float()]  # in a list, so that it is no part of the model
        self.reason = reason

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Protect what the block reads, and run it."""
        inputs = (args, kwargs)
        tree_map(lambda value: self.tracer.pin(value, self.reason), inputs)
        block = self._block[0].train(self.training)
        counter: Any = nullcontext() if isinstance(block, torch.jit.ScriptModule) else FlopCounterMode(display=False)
        with self.tracer.paused(), torch.random.fork_rng(devices=[]), counter:
            real_args, real_kwargs = tree_map(_real, inputs)
            out = block(*real_args, **real_kwargs)
        self.tracer.count_fixed(counter.get_total_flops() / 2 if isinstance(counter, FlopCounterMode) else 0.0)
        return tree_map(_unreal, out)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the block, which code around it may read."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattribute__("__dict__")["_block"][0], name)


def _real(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_meta:
        return value
    random = torch.rand(value.shape) if value.is_floating_point() else torch.zeros(value.shape)
    return random.to(value.dtype)


def _unreal(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value


def may_be_opaque(model: nn.Module, path: str) -> bool:
    """Whether a block may be left out of the trace: a foreign one that is not the model and does not hold the head."""
    layers = getattr(model, "model", None)
    head = f"model.{len(layers) - 1}" if isinstance(layers, nn.Sequential) else ""
    holds_head = head == path or head.startswith(f"{path}.") or path.startswith(f"{head}.")
    return bool(path) and not holds_head and foreign.is_foreign(model.get_submodule(path))
