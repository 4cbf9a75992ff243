# SPDX-License-Identifier: AGPL-3.0-or-later
"""A copy of a model that has shapes but no weights, to be run on meta tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from yolo_prune.errors import UnsupportedModelError

# Sizes and grids that heads remember from the last image they saw; without them they make new ones.
CACHES = ("anchors", "strides", "valid_mask", "shape", "shapes")


def weightless(module: nn.Module, path: str = "", twins: dict[int, Any] | None = None) -> nn.Module:
    """A copy of a module tree whose tensors are on the meta device; hooks and a loss are left behind.

    What is in the tree twice is one in the copy, too.

    Raises:
        UnsupportedModelError: If a module's forward was replaced, as fusing for inference does.
    """
    twins = {} if twins is None else twins
    if id(module) in twins:
        known: nn.Module = twins[id(module)]
        return known
    if "forward" in module.__dict__:
        raise UnsupportedModelError(
            f"'{path}' does not run its class's forward any more; it was fused for inference, which cannot be undone. "
            "Pass the checkpoint that training wrote, as it was before fuse()."
        )
    twin = twins[id(module)] = copy.copy(module)
    for key in list(twin.__dict__):
        if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            twin.__dict__[key] = OrderedDict()
        elif key in CACHES or key == "criterion":
            del twin.__dict__[key]
        else:
            twin.__dict__[key] = _own(twin.__dict__[key])  # a forward may fill a list or a dictionary
    twin._parameters = {
        k: p if p is None else twins.setdefault(id(p), nn.Parameter(_meta(p), requires_grad=False))
        for k, p in module._parameters.items()
    }
    twin._buffers = {k: b if b is None else _meta(b) for k, b in module._buffers.items()}
    twin._modules = {
        k: c if c is None else weightless(c, f"{path}.{k}" if path else k, twins) for k, c in module._modules.items()
    }
    return twin


def _own(value: Any) -> Any:
    """Containers of one's own, with what they hold."""
    if type(value) in (list, set, tuple):
        return type(value)(map(_own, value))
    return {k: _own(v) for k, v in value.items()} if type(value) is dict else value


def _meta(tensor: Tensor) -> Tensor:
    """A tensor of the same shape without storage; what is not whole numbers is float32, as the image will be."""
    return torch.empty_like(tensor, device="meta", dtype=torch.float32 if tensor.is_floating_point() else None)
