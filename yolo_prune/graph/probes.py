# SPDX-License-Identifier: AGPL-3.0-or-later
"""The forward passes that run every part of a model, on meta tensors for tracing or on real ones for a proof."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from yolo_prune.env.registry import Registry

Probe = Callable[[Any, Tensor], Any]
PROMPTS = 3  # more than one, so that a dimension of prompts is not taken for one without size

PROBES: Registry[type[nn.Module], Probe] = Registry("{} already has a further forward pass.")
"""Forward passes beside the plain one that a class of models has."""


def register_probe(cls: type[nn.Module]) -> Callable[[Probe], Probe]:
    """Register a further forward pass of a model class, for parts that a plain one leaves out.

    Raises:
        ValueError: If the class already has one.
    """
    return PROBES.register(cls)


def plain(model: Any, image: Tensor) -> Any:
    """What every model does with an image."""
    return model(image)


def probes(model: nn.Module) -> Iterator[Probe]:
    """All forward passes to be made with a model in training mode."""
    yield plain
    for cls, probe in PROBES.items():
        if isinstance(model, cls):
            yield probe


def outputs(out: Any) -> Iterator[Tensor]:
    """The tensors that a model returned, in a fixed order; feature maps that ride along are not outputs."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, dict):
        for key in sorted(out):
            if key != "feats":
                yield from outputs(out[key])
    elif isinstance(out, list | tuple):
        for item in out:
            yield from outputs(item)


def batch_norm_off(model: nn.Module) -> nn.Module:
    """`model` in training mode, where all branches run and nothing is decoded, but for its batch norms and dropouts."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
            module.eval()
    return model


def image_channels(model: nn.Module) -> int | None:
    """Channels of the images a model takes, or None if it has no convolution."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        return None
    yaml = getattr(model, "yaml", None)
    told = yaml.get("channels", yaml.get("ch")) if isinstance(yaml, Mapping) else None  # "ch" before Ultralytics 8.3
    return told if isinstance(told, int) else first.in_channels


def stride(model: nn.Module) -> int:
    """What image sizes have to be multiples of."""
    return max(32, int(max(getattr(model, "stride", torch.tensor([32.0])))))
