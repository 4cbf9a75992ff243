# SPDX-License-Identifier: AGPL-3.0-or-later
"""Adapt a pruned model to another dataset, with another number of classes, keypoints or image channels.

Only the tensors and attributes whose size depends on this number are made again; all others stay pruned. To find them,
two models that Ultralytics builds for two different numbers are compared. So this works for every head, also for a head
that this package does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from yolo_prune.cut.classes import placeholders
from yolo_prune.cut.masks import Mask
from yolo_prune.cut.record import Record, read_record, write_record
from yolo_prune.errors import UnsupportedModelError

K = TypeVar("K")
SMALL = (2, 3)
"""Numbers for the two models: smaller than any hidden width, so that no hidden width depends on them."""


@dataclass(frozen=True)
class Affine:
    """A size that depends on a number: `offset + factor * number`."""

    offset: int
    factor: int

    def at(self, number: int) -> int:
        """The size for a number."""
        return self.offset + self.factor * number


@dataclass(frozen=True)
class Followers:
    """The tensors and attributes whose size depends on a number.

    Attributes:
        tensors: `{tensor name: {dimension: size}}`.
        attributes: `{module name: {attribute: value}}`.
    """

    tensors: Mapping[str, Mapping[int, Affine]]
    attributes: Mapping[str, Mapping[str, Affine]]

    def of(self, model: nn.Module, number: int) -> Followers:
        """The entries that were not pruned: in `model`, made for `number`, they still have the size for this number."""
        state, modules = model.state_dict(), dict(model.named_modules())
        return Followers(
            _filtered(self.tensors, lambda name, dim, size: state[name].shape[dim] == size.at(number)),
            _filtered(self.attributes, lambda name, key, size: vars(modules[name]).get(key) == size.at(number)),
        )

    def among(self, others: Followers) -> Followers:
        """The entries that are in `others` as well, with the sizes of this object."""
        return Followers(
            _filtered(self.tensors, lambda name, dim, _: dim in others.tensors.get(name, ())),
            _filtered(self.attributes, lambda name, key, _: key in others.attributes.get(name, ())),
        )


def _filtered(
    table: Mapping[str, Mapping[K, Affine]], wanted: Callable[[str, K, Affine], bool]
) -> dict[str, dict[K, Affine]]:
    chosen = {n: {k: size for k, size in sizes.items() if wanted(n, k, size)} for n, sizes in table.items()}
    return {name: sizes for name, sizes in chosen.items() if sizes}


def followers(build: Callable[[int], nn.Module]) -> Followers:
    """Find the tensors and attributes whose size depends on a number.

    Args:
        build: makes the dense model for a number.
    """
    few, more = (build(n) for n in SMALL)
    states = few.state_dict(), more.state_dict()
    tensors = {
        name: {d: _affine(a, b) for d, (a, b) in enumerate(zip(t.shape, states[1][name].shape, strict=True)) if a != b}
        for name, t in states[0].items()
    }
    modules = dict(more.named_modules())
    attributes = {
        name: {
            key: _affine(value, vars(modules[name])[key])
            for key, value in vars(module).items()
            if type(value) is int and value != vars(modules[name]).get(key, value)
        }
        for name, module in few.named_modules()
    }
    return Followers({n: d for n, d in tensors.items() if d}, {n: a for n, a in attributes.items() if a})


def _affine(few: int, more: int) -> Affine:
    factor = (more - few) // (SMALL[1] - SMALL[0])
    return Affine(few - factor * SMALL[0], factor)


def resize(
    model: nn.Module,
    follow: Followers,
    number: int,
    stock: nn.Module,
    rows: Sequence[int | None] | None = None,
) -> None:
    """Resize everything that depends on a number, in place. Resized tensors get new weights, all others keep theirs.

    Args:
        model: a pruned model.
        follow: the tensors and attributes that depend on the number.
        number: the new number.
        stock: the dense model that Ultralytics builds for the new number. The new biases are its biases: with other
            biases, an untrained class would be detected everywhere.
        rows: for each of the `number` rows of an output layer, the old row to copy, or None for a new row.

    Raises:
        UnsupportedModelError: If a layer that depends on the number cannot be initialized again.
    """
    record = read_record(model)
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name in dict.fromkeys(tensor.rpartition(".")[0] for tensor in follow.tensors):
        layer = model.get_submodule(name)
        if not hasattr(layer, "reset_parameters"):
            raise UnsupportedModelError(
                f"'{name}' ({type(layer).__name__}) depends on the dataset, and this package cannot initialize it "
                "again. Train the dense model on this dataset first, then prune it."
            )
        for key, parameter in list(layer.named_parameters(recurse=False)):
            shape = _shape(parameter, follow.tensors.get(f"{name}.{key}", {}), number)
            setattr(layer, key, nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device=parameter.device)))
        layer.reset_parameters()  # type: ignore[operator]
        for key, parameter in layer.named_parameters(recurse=False):
            fresh = stock.get_parameter(f"{name}.{key}")
            if fresh.shape == parameter.shape:
                parameter.data.copy_(fresh)
    for name, values in follow.attributes.items():
        module = model.get_submodule(name)
        for key, size in values.items():
            setattr(module, key, size.at(number))
    _copy_kept_weights(model, before, follow, number, rows)
    if record:
        write_record(model, _updated_record(model, record, follow, number))


def _shape(tensor: Tensor, dims: Mapping[int, Affine], number: int) -> list[int]:
    shape = list(tensor.shape)
    for dim, size in dims.items():
        shape[dim] = size.at(number)
    return shape


@torch.no_grad()
def _copy_kept_weights(
    model: nn.Module,
    before: Mapping[str, Tensor],
    follow: Followers,
    number: int,
    rows: Sequence[int | None] | None,
) -> None:
    for name, tensor in model.state_dict(keep_vars=True).items():
        dims, old = follow.tensors.get(name, {}), before[name]
        if not dims:
            tensor.copy_(old)
        elif (
            1 in dims
        ):  # an input layer: grey images use the sum of the old filters, additional channels use new filters
            count = min(number, old.shape[1])
            tensor[:, :count] = old.sum(1, keepdim=True) if number == 1 else old[:, :count]
        elif rows is not None and dims[0] == Affine(0, 1):
            known = [i for i, row in enumerate(rows) if row is not None]
            tensor[known] = old[[row for row in rows if row is not None]]


def _updated_record(model: nn.Module, record: Record, follow: Followers, number: int) -> Record:
    """The record with the new shapes of the dense model: its resized layers have changed as well.

    New weights of resized layers are not zero; copied weights keep their zeros.
    """
    plan = record.plan
    if plan is None:
        return record
    shapes = {
        name: tuple(dims[d].at(number) if d in dims else n for d, n in enumerate(shape))
        for name, shape in plan.shapes.items()
        for dims in [follow.tensors.get(name, {})]
    }
    state = model.state_dict()
    resized = {n: Mask.of(state[n]) if n in follow.tensors else mask for n, mask in plan.masks.items()}
    masks = {name: mask for name, mask in resized.items() if mask.zeros}
    return replace(record, plan=replace(plan, shapes=shapes, masks=masks))


def same_names(old: Mapping[int, str], new: Mapping[int, str]) -> list[int | None] | None:
    """Match classes by name, as Ultralytics does.

    Args:
        old: names of the model's classes.
        new: names of the dataset's classes.

    Returns:
        For each new class, the index of the old class with the same name, or None if there is none. None instead of
        the list if all classes keep their index.
    """
    if len(old) == len(new) and placeholders(old) | placeholders(new):
        return None
    index = {plain(name): i for i, name in old.items()}
    matches = [index.get(plain(new[i])) for i in sorted(new)]
    if len(old) == len(new) and (not any(i is not None for i in matches) or matches == sorted(old)):
        return None
    return [None] * len(new) if placeholders(old) or placeholders(new) else matches


def plain(name: str) -> str:
    """A name of a class as Ultralytics compares it: without spaces around it, in small letters."""
    return str(name).strip().lower()
