# SPDX-License-Identifier: AGPL-3.0-or-later
"""`Classes`: which classes of a model a plan keeps, and what a model stores about its classes beside its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from yolo_prune.errors import PlanError

PROMPTS = ("txt_feats", "pe")
"""Attributes in which YOLO-World and YOLOE store the embeddings of their classes: `(1, classes, width)`."""
COUNTS = ("nc", "no")
"""Attributes of a head that depend on the number of classes: classes, and outputs per position."""
NEVER = -1e9
"""The score, before the sigmoid or softmax, of a class that is never predicted."""


@dataclass(frozen=True)
class Classes:
    """The classes that a plan keeps.

    Attributes:
        names: names of all classes before the plan is applied, in the order of their numbers.
        kept: numbers of the kept classes, ascending.
        tensors: names of the tensors that have one row for each class: weights and biases of output layers, and
            embeddings.
    """

    names: tuple[str, ...]
    kept: tuple[int, ...]
    tensors: tuple[str, ...] = ()

    @property
    def unnamed(self) -> bool:
        """Whether the dense model has numbers in place of names."""
        return placeholders(dict(enumerate(self.names)))

    @property
    def kept_names(self) -> tuple[str, ...]:
        """Names of the kept classes."""
        return tuple(self.names[i] for i in self.kept)

    def then(self, later: Classes | None) -> Classes:
        """The classes that are kept by this plan and then by a later plan.

        Raises:
            PlanError: If the later plan was made for other classes.
        """
        if later is None:
            return self
        if len(later.names) != len(self.kept):
            raise PlanError(
                f"The plans do not follow one another: the first plan leaves {len(self.kept)} classes, and the second "
                f"was made for {len(later.names)}. Make the second plan again."
            )
        tensors = tuple(dict.fromkeys((*self.tensors, *later.tensors)))
        return Classes(self.names, tuple(self.kept[i] for i in later.kept), tensors)

    def since(self, earlier: Classes | None) -> Classes | None:
        """Undo `then`; None if the earlier plan keeps the same classes.

        Raises:
            PlanError: If the earlier plan removes a class that is kept here.
        """
        if earlier is None:
            return self
        if not set(self.kept) <= set(earlier.kept):
            raise PlanError("The plans do not follow one another: the earlier plan removes more classes.")
        if self.kept == earlier.kept:
            return None
        return Classes(earlier.kept_names, tuple(earlier.kept.index(i) for i in self.kept), self.tensors)

    def validate(self) -> None:
        """Check that the numbers are possible.

        Raises:
            PlanError: If they are not.
        """
        if (
            not self.kept
            or list(self.kept) != sorted(set(self.kept))
            or not 0 <= self.kept[0] <= self.kept[-1] < len(self.names)
        ):
            raise PlanError(
                f"The plan is damaged: kept classes must be ascending and within 0..{len(self.names) - 1}. Make the "
                "plan again."
            )

    def describe(self) -> str:
        """One line: `classes: 2 of 80 kept: person, car`."""
        shown = ", ".join(self.kept_names[:SHOWN])
        more = len(self.kept) - SHOWN
        return f"classes: {len(self.kept)} of {len(self.names)} kept: {shown}" + (f", +{more} more" if more > 0 else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `from_dict` reads it."""
        return {"names": list(self.names), "kept": list(self.kept), "tensors": list(self.tensors)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Classes:
        """Read what `to_dict` wrote.

        Raises:
            KeyError, TypeError, ValueError: If the data is something else.
        """
        return cls(tuple(map(str, data["names"])), tuple(map(int, data["kept"])), tuple(map(str, data["tensors"])))


SHOWN = 20  # classes that are named in a table


def placeholders(names: Mapping[int, str]) -> bool:
    """Whether names of classes are only their numbers."""
    return all(str(key) == str(name) for key, name in names.items())


def names_of(model: nn.Module) -> tuple[str, ...]:
    """Names of a model's classes, in the order of their numbers; empty for a model without names."""
    names = getattr(model, "names", None) or {}
    return tuple(str(names[i]) for i in sorted(names)) if isinstance(names, Mapping) else tuple(map(str, names))


def check(model: nn.Module, classes: Classes) -> None:
    """Check that a plan was made for the classes of this model.

    Raises:
        PlanError: If the model has other classes.
    """
    if names_of(model) != classes.names:
        raise PlanError(
            f"The plan was made for another model: it was made for the {len(classes.names)} classes "
            f"{_few(classes.names)}, and this model has the {len(names_of(model))} classes {_few(names_of(model))}. "
            "Make a new plan for this model."
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def set_on(model: Any, classes: Classes) -> None:
    """Let everything follow that a model stores about its classes beside its tensors, in place.

    These are the names, the number in the YAML, the embeddings of texts, the weights of classes in the loss, and the
    loss itself, which is made again when it is needed.
    """
    model.names = dict(enumerate(classes.kept_names))
    if isinstance(getattr(model, "yaml", None), Mapping) and "nc" in model.yaml:
        model.yaml = {**model.yaml, "nc": len(classes.kept)}
    for key in PROMPTS:
        if isinstance(prompts := getattr(model, key, None), Tensor) and prompts.shape[1] == len(classes.names):
            setattr(model, key, prompts[:, torch.tensor(classes.kept, device=prompts.device)])
    weights = getattr(model, "class_weights", None)
    if isinstance(weights, Tensor) and weights.shape == (len(classes.names),):
        model.class_weights = weights[torch.tensor(classes.kept, device=weights.device)]
    if getattr(model, "criterion", None) is not None:
        model.criterion = None


@torch.no_grad()
def never(model: nn.Module, classes: Classes) -> None:
    """Silence the removed classes of a model in place: they are never predicted."""
    gone = [i for i in range(len(classes.names)) if i not in set(classes.kept)]
    state = model.state_dict()
    for name in classes.tensors:
        if name.endswith(".bias"):
            state[name][gone] = NEVER
