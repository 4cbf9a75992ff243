# SPDX-License-Identifier: AGPL-3.0-or-later
"""torch-pruning's high-level pruners on our graph.

A constructor of torch-pruning takes no graph: it traces `model` halfway. So it gets a stand-in to trace, and what it
then assigns to `self.model` and `self.DG` is left aside for the model and our graph, on which all the rest works.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from yolo_prune import api
from yolo_prune.errors import ArgumentError
from yolo_prune.interop.dependency import DependencyGraph

OF_THEIR_TRACE = ("customized_pruners", "unwrapped_parameters", "forward_fn", "output_transform")
COUPLINGS = ("in_channel_groups", "out_channel_groups", "num_heads", "channel_groups")
WITH_HEADS = ("prune_num_heads", "head_pruning_ratio", "head_pruning_ratio_dict")


class _OnOurGraph:
    """What all pruners have in common. `heads` is as in `yolo_prune.dependency_graph`."""

    def __init__(
        self, model: Any, example_inputs: Any, importance: Any, *args: Any, heads: str = "dims", **options: Any
    ) -> None:
        construct: Any = super().__init__
        given = inspect.signature(construct).bind(model, example_inputs, importance, *args, **options).arguments
        _refuse(given)
        self._model = api.module_of(model)
        _check(given, self._model)
        ignored = [p for p in given.get("ignored_layers") or () if isinstance(p, nn.Parameter)]
        self._graph = DependencyGraph().build_dependency(model, example_inputs, heads=heads, ignored_params=ignored)
        # New dicts: the defaults of torch-pruning are shared by all pruners of a process.
        given |= {name: {} for name in COUPLINGS}
        given |= {"model": nn.Conv2d(1, 1, 1), "example_inputs": torch.zeros(1, 1, 1, 1)}
        with torch.enable_grad():
            construct(**given)
        # Our groups are coupled already, so no layer needs further groups of channels.
        self.in_channel_groups: dict[nn.Module, int] = {}
        self.out_channel_groups: dict[nn.Module, int] = {}

    @property
    def model(self) -> nn.Module:
        """The model that is pruned."""
        return self._model

    @model.setter
    def model(self, stand_in: nn.Module) -> None: ...

    @property
    def DG(self) -> DependencyGraph:
        """Our graph of the model."""
        return self._graph

    @DG.setter
    def DG(self, of_stand_in: tp.DependencyGraph) -> None: ...


class BasePruner(_OnOurGraph, tp.BasePruner):  # type: ignore[misc]  # torch-pruning has no types
    """torch-pruning's `BasePruner` on our graph."""


MetaPruner = MagnitudePruner = BasePruner  # older names, as in torch-pruning


class _OfWeights(_OnOurGraph):
    """A regularizer of weights, without those that torch-pruning 1.6.1 reads wrongly.

    It takes the first dimension of every weight for all outputs and the second for all inputs. For a transposed
    convolution, and for the inputs of a convolution with groups, it would regularize other channels than those that it
    scored, or fail.
    """

    _groups: list[Any]

    def regularize(self, model: nn.Module, *args: Any, **options: Any) -> None:
        """Add the regularizer to the gradients of weights."""
        whole = [(group, group.items) for group in self._groups]
        for group, items in whole:
            group._group = [item for item in items if _is_plain(item.dep)]
        regularize: Any = super().regularize  # type: ignore[misc]  # of torch-pruning's pruner
        try:
            regularize(model, *args, **options)
        finally:
            for group, items in whole:
                group._group = items


class GroupNormPruner(_OfWeights, tp.GroupNormPruner):  # type: ignore[misc]
    """torch-pruning's `GroupNormPruner` on our graph."""


class GrowingRegPruner(_OfWeights, tp.GrowingRegPruner):  # type: ignore[misc]
    """torch-pruning's `GrowingRegPruner` on our graph."""


class BNScalePruner(_OnOurGraph, tp.BNScalePruner):  # type: ignore[misc]
    """torch-pruning's `BNScalePruner` on our graph."""

    @torch.no_grad()
    def regularize(self, model: nn.Module, reg: float | None = None, bias: bool = False) -> None:
        """Add the regularizer to the gradients of batch norms.

        With `group_lasso`, torch-pruning 1.6.1 takes for granted that a batch norm lies in one group as a whole.
        Ours may lie in several (queries and values of an attention), and groups may have none.
        """
        if not self.group_lasso:
            super().regularize(model, reg, bias)
            return
        for group in self._groups:
            norms = self._l2_imp(group)
            if norms is None or torch.isnan(norms).any():
                continue
            gamma = (self.reg if reg is None else reg) / (norms + 1e-9).sqrt()
            for item in group:
                layer = item.dep.layer
                if not isinstance(layer, nn.modules.batchnorm._BatchNorm) or layer in self.ignored_layers:
                    continue
                if layer.weight is not None and layer.weight.grad is not None:
                    layer.weight.grad[item.idxs] += gamma[item.root_idxs] * layer.weight[item.idxs]


def _is_plain(dependency: Any) -> bool:
    """Whether the indices of a dependency are those of a dimension of the weight: first outputs, then inputs."""
    layer = dependency.layer
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return True
    return not layer.transposed and (layer.groups == 1 or dependency.handler != tp.prune_conv_in_channels)


def _refuse(given: dict[str, Any]) -> None:
    """Refuse arguments that would have no effect, or a wrong one.

    Raises:
        ArgumentError: For the first such argument.
    """
    for name in (*OF_THEIR_TRACE, *COUPLINGS, *WITH_HEADS):
        if given.get(name):
            raise ArgumentError(
                f"{name}: leave it out. "
                + (
                    "It is for torch-pruning's own trace, which is not used here."
                    if name in OF_THEIR_TRACE
                    else "The graph of yolo-prune has coupled heads and halves already."
                    if name in COUPLINGS
                    else "Pass heads='heads' instead, so that groups consist of whole heads."
                )
            )


def _check(given: dict[str, Any], model: nn.Module) -> None:
    """Check arguments that torch-pruning does not check.

    Raises:
        ArgumentError: For the first argument that is wrong.
    """
    importance, ratio, steps = given["importance"], given.get("pruning_ratio", 0.5), given.get("iterative_steps", 1)
    if isinstance(importance, type) or not callable(importance):
        raise ArgumentError(
            f"importance={importance!r}: must be an importance, such as tp.importance.GroupMagnitudeImportance()."
        )
    if isinstance(ratio, int | float) and not 0 <= ratio < 1:
        raise ArgumentError(f"pruning_ratio={ratio}: must be a number from 0 to below 1.")
    if isinstance(steps, int) and steps < 1:
        raise ArgumentError(f"iterative_steps={steps}: must be a whole number of at least 1.")
    own = {id(part) for part in (*model.modules(), *model.parameters())}
    if others := [part for part in given.get("ignored_layers") or () if id(part) not in own]:
        what = repr(others[0]) if isinstance(others[0], str) else f"a {type(others[0]).__name__}"
        raise ArgumentError(f"ignored_layers: {what} is no module or parameter of this model. Take it from this model.")
