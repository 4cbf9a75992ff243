# SPDX-License-Identifier: AGPL-3.0-or-later
"""A torch operation with its arguments, and the registry of the operations' effects on labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from yolo_prune.env.registry import Registry
from yolo_prune.graph.labels import Labels, Tag, tag_of


@dataclass
class Call:
    """One call of an operation.

    Attributes:
        name: the name in `aten::add`, without the namespace and without the underscore of in-place variants.
        func: the operation.
        args: the positional arguments; tensors have their tags.
        kwargs: the keyword arguments; tensors have their tags.
        out: the result.
        labels: the labels of the model.
        trusted: the module that called the operation has a rule, so sizes in its code are safe.
        count: `(tensor with labels | None, parameter | None, MACs)` counts MACs.
    """

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    labels: Labels
    trusted: bool
    count: Callable[[Tensor | None, str | None, float], None]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operation's schema."""
        if name in self.kwargs:
            return self.kwargs[name]
        for position, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                return self.args[position] if position < len(self.args) else default
        return default

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, those in lists included."""
        flat: list[Any] = []
        for a in (*self.args, *self.kwargs.values()):
            flat.extend(a if isinstance(a, list | tuple) else [a])
        return [t for t in flat if isinstance(t, Tensor)]

    def pin_all(self, reason: str) -> None:
        """Pin the labels of all inputs of the operation."""
        for tag in filter(None, map(tag_of, self.tensors)):
            for plane in tag.planes:
                self.labels.pin(plane, reason)


Effect = Callable[[Call], None]
EFFECTS: Registry[str, Effect] = Registry("'{}' already has an effect.")


def effect(*names: str) -> Callable[[Effect], Effect]:
    """Register a function as the effect of the operations with these names.

    Raises:
        ValueError: If one of the operations already has an effect.
    """
    return EFFECTS.register(*names)


def first_tensor(out: Any) -> Tensor:
    """The first tensor of a result; the result itself if it is a tensor."""
    tensor: Tensor = out[0] if isinstance(out, list | tuple) else out
    return tensor


def first_input(call: Call) -> tuple[Tensor, Tag]:
    """The first input tensor of an operation, and its tag."""
    tensor = call.tensors[0]
    return tensor, tag_of(tensor) or Tag()
