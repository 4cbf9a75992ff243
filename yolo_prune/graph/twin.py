# SPDX-License-Identifier: AGPL-3.0-or-later
"""A copy of a model with shapes but without weights, to run on meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from yolo_prune.errors import UnsupportedModelError
from yolo_prune.graph import foreign
from yolo_prune.graph.copying import copy_tree

# Sizes and grids that heads store for the last image. A head computes them again if they are missing.
CACHES = ("anchors", "strides", "valid_mask", "shape", "shapes")


def _none(path: str, module: nn.Module) -> None:
    """No module stands for another one."""


def weightless(model: nn.Module, stand_in: Callable[[str, nn.Module], nn.Module | None] = _none) -> nn.Module:
    """A copy of a model with all parameters and buffers on the meta device, without the loss.

    Everything else is as in the original: a module that is in the tree twice is one module in the copy as well, and
    bound methods, lists of children and hooks of the model's own refer to the copy.

    Args:
        model: the model; it is not changed.
        stand_in: `(path, module) -> module`: what stands for a module in the copy; None for a copy of the module.

    Raises:
        UnsupportedModelError: If the forward of a module was replaced, as fusing for inference does.
    """
    for path, module in model.named_modules():
        if _is_fused(module):
            raise UnsupportedModelError(
                f"'{path}' does not run the forward of its class any more: it was fused for inference, and fusing "
                "cannot be undone. Pass the checkpoint that training wrote, from before fuse()."
            )
    memo = _stand_ins(model, stand_in)
    with _Constants():
        twin = copy_tree(model, memo)
    for module in twin.modules():
        for key in CACHES:
            if key in vars(module) and hasattr(type(module), key):
                del vars(module)[key]
    return twin


def _is_fused(module: nn.Module) -> bool:
    """Whether the forward of a module was replaced. A block of a user may choose its forward itself."""
    forward = vars(module).get("forward")
    if forward is None or isinstance(module, torch.jit.ScriptModule):
        return False
    chosen = isinstance(forward, MethodType) and forward.__self__ is module and "fuse" not in forward.__name__
    return not (chosen and foreign.is_foreign(module))


def _stand_ins(model: nn.Module, stand_in: Callable[[str, nn.Module], nn.Module | None]) -> dict[int, Any]:
    """What stands for parameters, buffers, some modules and the loss in the copy: `{id of the original: copy}`."""
    memo: dict[int, Any] = {}
    if getattr(model, "criterion", None) is not None:
        memo[id(model.criterion)] = None
    for path, module in model.named_modules():
        if (other := stand_in(path, module)) is not None:
            memo[id(module)] = other
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):  # its tensors are copies
            continue
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = nn.Parameter(_meta(parameter), requires_grad=False)
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                memo[id(buffer)] = _meta(buffer)
    return memo


class _Constants(TorchFunctionMode):
    """Copies the tensors that are neither parameters nor buffers: with their values, on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            memo[id(tensor)] = copy = _as_image(tensor.detach().to("cpu", copy=True))
            return copy
        if func is Tensor.clone:  # of a parameter that is not registered
            return _as_image(args[0].detach().to("cpu", copy=True))
        return func(*args, **(kwargs or {}))


def _as_image(tensor: Tensor) -> Tensor:
    """Floating point tensors in float32, as the image is."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _meta(tensor: Tensor) -> Tensor:
    """A tensor of the same shape without storage. Floating point tensors become float32, as the image is."""
    return torch.empty_like(tensor, device="meta", dtype=torch.float32 if tensor.is_floating_point() else None)
