# SPDX-License-Identifier: AGPL-3.0-or-later
"""A copy of a model with shapes but without weights, to run on meta tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from yolo_prune.errors import UnsupportedModelError

# Sizes and grids that heads store for the last image. A head computes them again if they are missing.
CACHES = ("anchors", "strides", "valid_mask", "shape", "shapes")


def weightless(module: nn.Module, path: str = "", twins: dict[int, Any] | None = None) -> nn.Module:
    """A copy of a module tree with all tensors on the meta device, without hooks and without the loss.

    A module that is in the tree twice is one module in the copy as well.

    Raises:
        UnsupportedModelError: If the forward of a module was replaced, as fusing for inference does.
    """
    twins = {} if twins is None else twins
    if id(module) in twins:
        known: nn.Module = twins[id(module)]
        return known
    if "forward" in module.__dict__:
        raise UnsupportedModelError(
            f"'{path}' does not run the forward of its class any more: it was fused for inference, and fusing cannot "
            "be undone. Pass the checkpoint that training wrote, from before fuse()."
        )
    twin = twins[id(module)] = copy.copy(module)
    for key in list(twin.__dict__):
        if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            twin.__dict__[key] = OrderedDict()
        elif key in CACHES or key == "criterion":
            del twin.__dict__[key]
        else:
            twin.__dict__[key] = _copy_containers(twin.__dict__[key])  # a forward may fill a list or a dictionary
    twin._parameters = {
        k: p if p is None else twins.setdefault(id(p), nn.Parameter(_meta(p), requires_grad=False))
        for k, p in module._parameters.items()
    }
    twin._buffers = {k: b if b is None else _meta(b) for k, b in module._buffers.items()}
    twin._modules = {
        k: c if c is None else weightless(c, f"{path}.{k}" if path else k, twins) for k, c in module._modules.items()
    }
    return twin


def _copy_containers(value: Any) -> Any:
    """A deep copy of lists, sets, tuples and dictionaries; other values are shared."""
    if type(value) in (list, set, tuple):
        return type(value)(map(_copy_containers, value))
    return {k: _copy_containers(v) for k, v in value.items()} if type(value) is dict else value


def _meta(tensor: Tensor) -> Tensor:
    """A tensor of the same shape without storage. Floating point tensors become float32, as the image is."""
    return torch.empty_like(tensor, device="meta", dtype=torch.float32 if tensor.is_floating_point() else None)
