# SPDX-License-Identifier: AGPL-3.0-or-later
"""Copies a model, silences its channels and measures the size of its checkpoint."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from yolo_prune.cut import classes
from yolo_prune.cut.plan import Plan
from yolo_prune.graph.copying import copy_tree
from yolo_prune.graph.structure import output_dimension


def lean_copy(model: nn.Module) -> nn.Module:
    """A `bare_copy` on the CPU."""
    return bare_copy(model).cpu()


def bare_copy(model: nn.Module) -> nn.Module:
    """A copy without the loss, which only training needs, and without hooks that belong to other code."""
    memo: dict[int, Any] = {}
    if getattr(model, "criterion", None) is not None:
        memo[id(model.criterion)] = None
    with _Detached():
        return copy_tree(model, memo)


class _Detached(TorchFunctionMode):
    """Lets tensors be copied that a block stored in a forward pass: torch does not copy what has a gradient."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            memo[id(tensor)] = copy = tensor.detach().clone()
            return copy
        return func(*args, **(kwargs or {}))


def make_ordinary(model: nn.Module) -> None:
    """Replace the tensors of a model that was made in `torch.inference_mode`: they cannot be trained or changed."""
    copies: dict[int, Tensor] = {}  # a tensor that two layers share stays shared
    for module in model.modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in places:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_inference():
                    tensors[name] = copies.setdefault(id(tensor), deepcopy(tensor))


def silence(model: nn.Module, removed: Mapping[str, Mapping[int, Collection[int]]]) -> None:
    """Silence channels in place: their outputs become 0. The layers that read them stay as they are.

    Args:
        model: the model; it is changed.
        removed: `{tensor name: {dimension: indices to silence}}`.
    """
    state, layers = model.state_dict(), dict(model.named_modules())
    for name, dims in removed.items():
        layer, _, key = name.rpartition(".")
        dim = _channel_dimension(layers[layer], key, state[name])
        if dim in dims and key not in ("running_mean", "running_var"):
            state[name].movedim(dim, 0)[list(dims[dim])] = 0


def _channel_dimension(layer: nn.Module, key: str, tensor: Tensor) -> int:
    """The dimension of a tensor whose indices are channels that the layer puts out."""
    if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear):
        return output_dimension(layer) if key == "weight" else 0
    per_channel = [dim for dim, size in enumerate(tensor.shape) if size == tensor.numel()]  # as (1, channels, 1, 1)
    return per_channel[0] if per_channel else 0


def silence_removed(model: nn.Module, plan: Plan) -> None:
    """Silence the channels that a plan removes, in place. Removed classes are never predicted."""
    shapes = {name: plan.shapes[name] for name in plan.keep}
    gone = {n: {d: set(range(shapes[n][d])) - set(k) for d, k in dims.items()} for n, dims in plan.keep.items()}
    silence(model, gone)
    if plan.classes:
        classes.never(model, plan.classes)


def size_mb(model: nn.Module) -> float:
    """Size of the model's checkpoint in megabytes, in half precision."""
    return len(checkpoint_bytes(model)) / 1e6


def checkpoint_bytes(model: nn.Module) -> bytes:
    """The model's checkpoint in half precision, without training state."""
    copy = lean_copy(model).half()
    buffer = io.BytesIO()
    torch.save({"model": copy}, buffer)
    return buffer.getvalue()
