# SPDX-License-Identifier: AGPL-3.0-or-later
"""`Mask`: which single weights of a tensor are zero. Masked weights are set to zero here, and nowhere else."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from yolo_prune.errors import PlanError


@dataclass(frozen=True)
class Mask:
    """Which weights of a tensor are kept; all others are zero.

    Attributes:
        shape: shape of the tensor.
        bits: one bit per weight in the order of the flattened tensor, 1 for a kept weight, 8 in a byte, the first one
            in the highest bit (`numpy.packbits`).
    """

    shape: tuple[int, ...]
    bits: bytes

    @classmethod
    def of(cls, kept: Tensor) -> Mask:
        """The mask with the kept weights `kept`, a tensor of bools or of zeros and other numbers."""
        flat = kept.detach().cpu().bool().contiguous().flatten().numpy()
        return cls(tuple(kept.shape), np.packbits(flat).tobytes())

    @cached_property
    def kept(self) -> Tensor:
        """The kept weights, as bools in the shape of the tensor, on the CPU. Do not change it."""
        flat = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=self.size)
        return torch.from_numpy(flat).bool().reshape(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @cached_property
    def zeros(self) -> int:
        """Number of weights that are zero."""
        return self.size - int(self.kept.sum())

    def cut(self, dims: Mapping[int, tuple[int, ...]]) -> Mask:
        """The mask of the part of the tensor that a plan keeps: `{dimension: kept indices}`."""
        kept = self.kept
        for dim, indices in dims.items():
            kept = kept.index_select(dim, torch.tensor(indices))
        return Mask.of(kept)

    def __and__(self, other: Mask) -> Mask:
        """The mask whose zeros are the zeros of both."""
        return Mask.of(self.kept & other.kept)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `from_dict` reads it."""
        return {"shape": list(self.shape), "kept": base64.b64encode(self.bits).decode("ascii")}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Mask:
        """Read what `to_dict` wrote.

        Raises:
            KeyError, TypeError: If a key is missing, or the data is no mapping.
            ValueError: If the bits do not fit the shape.
        """
        mask = cls(tuple(int(n) for n in data["shape"]), base64.b64decode(data["kept"], validate=True))
        if not all(n > 0 for n in mask.shape) or len(mask.bits) != -(-mask.size // 8):
            raise ValueError(f"a mask of the shape {mask.shape} cannot have {len(mask.bits)} bytes")
        return mask


Masks = Mapping[str, Mask]
"""`{tensor name: mask}`."""


class Masked:
    """The masked parameters of a model, to set their masked weights to zero again and again.

    Attributes:
        gone: `{parameter: its masked weights}`, bools on the device of the parameter.
    """

    def __init__(self, model: nn.Module, masks: Masks) -> None:
        """Find the parameters of a model.

        Args:
            model: the model. A tensor that it does not have is left out: fusing for inference removes some.
            masks: the masks.
        """
        self._model, layers = model, dict(model.named_modules(remove_duplicate=False))
        self._places: list[tuple[Any, str]] = []
        self.gone: dict[Tensor, Tensor] = {}
        for name, mask in masks.items():
            path, _, key = name.rpartition(".")
            tensor = getattr(layers.get(path), key, None)
            if tensor is not None:
                self._places.append((layers[path], key))
                self.gone[tensor] = (~mask.kept).to(tensor.device)

    def current(self, model: nn.Module) -> bool:
        """Whether this is the model, and the masked parameters still are its own. It is asked at every step."""
        return model is self._model and all(getattr(layer, key) in self.gone for layer, key in self._places)

    @torch.no_grad()
    def hold_gradients(self) -> None:
        """Set the gradients of the masked weights to zero, so that they do not count in the norm of the gradients."""
        for parameter, gone in self.gone.items():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(gone, 0)

    @torch.no_grad()
    def hold(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Set the masked weights to zero, and also their momenta in `optimizer`."""
        for parameter, gone in self.gone.items():
            parameter.masked_fill_(gone, 0)
            state = optimizer.state.get(parameter, {}) if optimizer else {}
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.masked_fill_(gone, 0)

    def holds(self) -> bool:
        """Whether all masked weights are zero."""
        return all(not parameter.detach()[gone].any() for parameter, gone in self.gone.items())


def hold(model: nn.Module, masks: Masks) -> None:
    """Set the masked weights of a model to zero."""
    Masked(model, masks).hold()


def check(model: nn.Module, masks: Masks) -> None:
    """Check that masks were made for this model.

    Raises:
        PlanError: For the first tensor that is missing, has another shape, or is no weight of a layer.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        shape = tuple(parameters[name].shape) if name in parameters else None
        if shape != mask.shape or len(mask.shape) < 2:
            has = f"has the shape {shape}" if shape else "is missing"
            raise PlanError(
                f"The plan was made for another model: it has zeros in '{name}' of shape {mask.shape}, which {has} "
                "here. Make a new plan for this model."
            )
