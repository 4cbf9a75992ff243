# SPDX-License-Identifier: AGPL-3.0-or-later
"""Sparse training: the batch norm scales of channels that the model hardly needs shrink while the model trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from yolo_prune.graph import Graph
from yolo_prune.planning import planner
from yolo_prune.run import live, schedule
from yolo_prune.run.state import PruningTrainer, RunState


def scales_of(model: nn.Module, graph: Graph) -> dict[nn.Parameter, Tensor]:
    """The batch norm scales that may shrink: those of channels that may be cut.

    Args:
        model: the model that is trained.
        graph: the graph of the model, or of a model with the same structure.

    Returns:
        `{weight of a batch norm: mask of the channels that may shrink, bool (channels,)}`, without frozen weights.
    """
    norms = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    masks: dict[nn.Parameter, Tensor] = {}
    for slot in (slot for g in graph.groups if not g.protected for s in g.sets for slot in s.slots):
        norm = norms.get(slot.tensor)
        if norm is not None and norm.weight.requires_grad:
            mask = masks.setdefault(norm.weight, torch.zeros_like(norm.weight, dtype=torch.bool))
            mask[list(slot.index)] = True
    return masks


@torch.no_grad()
def shrink(optimizer: torch.optim.Optimizer, scales: dict[nn.Parameter, Tensor], sparsity: float) -> None:
    """The proximal step of the L1 norm: a scale `g` becomes `sign(g) * max(|g| - learning rate * sparsity, 0)`.

    The proximal step follows the step of the optimizer, so that momentum and gradient scaling do not affect it. The
    penalty is that of "Learning Efficient Convolutional Networks through Network Slimming" (Liu et al., ICCV 2017,
    arXiv:1708.06519), which takes subgradient steps.

    Args:
        optimizer: the optimizer, with the learning rates of the step that was made.
        scales: the result of `scales_of`.
        sparsity: weight of the L1 norm in the loss.
    """
    for group in optimizer.param_groups:
        for scale in (p for p in group["params"] if p in scales):
            shrunk = scale.sign() * (scale.abs() - group["lr"] * sparsity).clamp(min=0)
            scale.copy_(torch.where(scales[scale], shrunk, scale))


class SparseTraining:
    """Shrinks batch norm scales after each step of the optimizer until the last cut, if the criterion asks for it."""

    def __init__(self) -> None:
        self._sparsity: float | None = None
        self._scales: dict[nn.Parameter, Tensor] | None = None

    @contextmanager
    def after_step(self, trainer: PruningTrainer) -> Iterator[None]:
        """Inside, `shrink` follows a step of the optimizer, before the average is updated."""
        run: RunState | None = trainer.pruning
        if run is None or not self._asked(run) or run.over:
            yield
            return
        owned = {p for group in trainer.optimizer.param_groups for p in group["params"]}
        if self._scales is None or not self._scales.keys() <= owned:  # a cut replaces parameters
            self._scales = {p: mask for p, mask in self._find(trainer, run).items() if p in owned}
        hook = trainer.optimizer.register_step_post_hook(self._shrink)
        try:
            yield
        finally:
            hook.remove()

    def _asked(self, run: RunState) -> float:
        if self._sparsity is None:
            self._sparsity = schedule.sparsity(run.recipe)
        return self._sparsity

    def _shrink(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        shrink(optimizer, self._scales or {}, self._sparsity or 0.0)

    @staticmethod
    def _find(trainer: PruningTrainer, run: RunState) -> dict[nn.Parameter, Tensor]:
        with live.own_randomness(trainer.args.seed):
            graph = planner.survey(live.average_of(trainer), run.recipe, run.imgsz(trainer), run.frozen)
        return scales_of(live.model_of(trainer), graph)
