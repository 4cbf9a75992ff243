# SPDX-License-Identifier: AGPL-3.0-or-later
"""A copy of a model that has shapes but no weights, to be run on meta tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn

from yolo_prune.errors import UnsupportedModelError

# Sizes and grids that heads remember from the last image they saw; without them they make new ones.
CACHES = ("anchors", "strides", "valid_mask", "shape", "shapes")


def weightless(module: nn.Module, path: str = "") -> nn.Module:
    """A copy of a module tree whose tensors are on the meta device; hooks and a loss are left behind.

    Raises:
        UnsupportedModelError: If a module's forward was replaced, as fusing for inference does.
    """
    if "forward" in module.__dict__:
        raise UnsupportedModelError(
            f"'{path}' does not run its class's forward any more; it was fused for inference, which cannot be undone. "
            "Pass the checkpoint that training wrote, as it was before fuse()."
        )
    twin = copy.copy(module)
    for key in list(twin.__dict__):
        if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            twin.__dict__[key] = OrderedDict()
        elif key in CACHES or key == "criterion":
            del twin.__dict__[key]
    twin._parameters = {
        k: p if p is None else nn.Parameter(_meta(p), requires_grad=False) for k, p in module._parameters.items()
    }
    twin._buffers = {k: b if b is None else _meta(b) for k, b in module._buffers.items()}
    twin._modules = {
        k: c if c is None else weightless(c, f"{path}.{k}" if path else k) for k, c in module._modules.items()
    }
    return twin


def _meta(tensor: Tensor) -> Tensor:
    """A tensor of the same shape without storage; what is not whole numbers is float32, as the image will be."""
    return torch.empty_like(tensor, device="meta", dtype=torch.float32 if tensor.is_floating_point() else None)
