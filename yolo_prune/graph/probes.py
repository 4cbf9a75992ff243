# SPDX-License-Identifier: AGPL-3.0-or-later
"""The forward passes that run every part of a model: on meta tensors for a trace, on real tensors for a proof."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from yolo_prune.env.registry import Registry

Probe = Callable[[Any, Tensor], Any]
PROMPTS = 3  # more than one, because a trace ignores dimensions of size 1

PROBES: Registry[type[nn.Module], Probe] = Registry("{} already has a further forward pass.")
"""Additional forward passes by model class."""


def register_probe(cls: type[nn.Module]) -> Callable[[Probe], Probe]:
    """Register a further forward pass of a model class. It must run the parts that the plain pass does not run.

    Raises:
        ValueError: If the class already has a further forward pass.
    """
    return PROBES.register(cls)


def plain(model: Any, image: Tensor) -> Any:
    """The plain forward pass, which every model has."""
    return model(image)


def probes(model: nn.Module) -> Iterator[Probe]:
    """All forward passes to run with a model in training mode."""
    yield plain
    for cls, probe in PROBES.items():
        if isinstance(model, cls):
            yield probe


def outputs(out: Any) -> Iterator[Tensor]:
    """The tensors that a model returned, in a fixed order. Feature maps ("feats") in the result are not outputs."""
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
    """Put `model`, which is a copy, into training mode, but its batch norms and dropouts into evaluation mode.

    In training mode all branches run and no head decodes its outputs. Queries with noise on the targets of training
    are switched off, because there are no targets, and Ultralytics 8.3.0 does not check that.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
            module.eval()
        elif type(getattr(module, "num_denoising", None)) is int:
            module.num_denoising = 0  # type: ignore[assignment]
    return model


def image_channels(model: nn.Module) -> int | None:
    """Number of channels of a model's input images; None if the model has no convolution."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        return None
    yaml = getattr(model, "yaml", None)
    # The key is "ch" before Ultralytics 8.3.
    channels = yaml.get("channels", yaml.get("ch")) if isinstance(yaml, Mapping) else None
    return channels if isinstance(channels, int) else first.in_channels


def stride(model: nn.Module) -> int:
    """Stride of a model: image sizes must be multiples of it."""
    return max(32, int(max(getattr(model, "stride", torch.tensor([32.0])))))
