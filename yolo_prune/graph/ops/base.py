# SPDX-License-Identifier: AGPL-3.0-or-later
"""An operation of torch as it ran, and the register of what each does to labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from yolo_prune.env.registry import Registry
from yolo_prune.graph.labels import Labels, Tag, tag_of


@dataclass
class Call:
    """One operation as it ran.

    Attributes:
        name: as in `aten::add`, without the namespace and, for in-place variants, the underscore.
        func: the operation.
        args: its arguments, tensors with their tags.
        kwargs: likewise.
        out: what it returned.
        labels: of the model.
        trusted: the module that ran it has a rule, which vouches for sizes that are written out.
        count: `(tensor that holds labels | None, parameter | None, MACs)` takes down work.
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
        """Pin whatever the operation read."""
        for tag in filter(None, map(tag_of, self.tensors)):
            for plane in tag.planes:
                self.labels.pin(plane, reason)


Effect = Callable[[Call], None]
EFFECTS: Registry[str, Effect] = Registry("'{}' already has an effect.")


def effect(*names: str) -> Callable[[Effect], Effect]:
    """Register what the operations with these names do.

    Raises:
        ValueError: If one of them already has an effect.
    """
    return EFFECTS.register(*names)


def first(out: Any) -> Tensor:
    """The (first) tensor of an output."""
    tensor: Tensor = out[0] if isinstance(out, list | tuple) else out
    return tensor


def first_input(call: Call) -> tuple[Tensor, Tag]:
    """The first tensor an operation read, and what it carries."""
    tensor = call.tensors[0]
    return tensor, tag_of(tensor) or Tag()
