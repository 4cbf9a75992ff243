# SPDX-License-Identifier: AGPL-3.0-or-later
"""Applies a plan to a model and its optimizer. No other module changes the structure of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy

import torch
from torch import Tensor, nn

from yolo_prune.cut import classes, masks
from yolo_prune.cut.masks import Masked
from yolo_prune.cut.plan import Plan
from yolo_prune.errors import PlanError

BATCH_NORM = nn.modules.batchnorm._NormBase  # instance norms as well


def apply(model: nn.Module, plan: Plan) -> dict[nn.Parameter, nn.Parameter]:
    """Cut `model` in place. Cut parameters become new `nn.Parameter`s; old autograd graphs keep the old parameters.

    `requires_grad` and the memory format stay the same. Gradients are dropped.

    Args:
        model: the model for which the plan was made, or one with the same shapes (its moving average, an early
            checkpoint).
        plan: the plan to apply.

    Returns:
        `{old parameter: new parameter}` for the parameters that changed, for `apply_to_optimizer`.

    Raises:
        PlanError: If a tensor is missing or has another shape. The model is then unchanged.
    """
    check(model, plan)
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for name in {**plan.keep, **plan.scale}:
        dims = plan.keep.get(name, {})
        layer_name, _, key = name.rpartition(".")
        layer = model.get_submodule(layer_name)
        old = getattr(layer, key)
        new = cut(old, dims)
        if name in plan.scale:
            rescale(new, plan.scale[name], dims.get(0))
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            replaced[old] = new
        setattr(layer, key, new)
        _update_widths(layer)
    for layer_name, values in plan.attributes.items():
        layer = model.get_submodule(layer_name)
        for key, value in values.items():
            setattr(layer, key, copy(value))
    if plan.classes:
        classes.set_on(model, plan.classes)
    masks.hold(model, plan.masks)
    return replaced


def check(model: nn.Module, plan: Plan) -> None:
    """Check that a plan was made for this model.

    Raises:
        PlanError: For the first tensor or attribute that differs.
    """
    plan.validate()
    if plan.classes:
        classes.check(model, plan.classes)
    state = model.state_dict(keep_vars=True)
    for name in {**plan.keep, **plan.scale}:
        if name not in state:
            raise PlanError(f"The plan was made for another model: this model has no '{name}'. Make a new plan.")
        shape = tuple(state[name].shape)
        if shape != plan.shapes[name]:
            raise PlanError(
                f"The plan was made for another model: '{name}' has shape {shape} here but {plan.shapes[name]} in the "
                "plan. Make a new plan for this model."
            )
    masks.check(model, {name: mask for name, mask in plan.masks.items() if name not in plan.keep})
    modules = dict(model.named_modules())
    for name in plan.keep:
        layer = modules[name.rpartition(".")[0]]
        direct = dict(layer.named_parameters(recurse=False)).get(name.rpartition(".")[2]) is not None
        if isinstance(layer, nn.MultiheadAttention) or not (direct or isinstance(layer, BATCH_NORM)):
            raise PlanError(
                f"'{name}' belongs to a {type(layer).__name__}, which this yolo-prune cannot cut. Make a new plan."
            )
    for name, values in plan.attributes.items():
        for key, value in values.items():
            if type(getattr(modules.get(name), key, None)) is not type(value):
                raise PlanError(
                    f"The plan was made for another model: '{name}' has no width '{key}' here. Make a new plan."
                )


def check_applied(model: nn.Module, plan: Plan) -> None:
    """Check that a model has the structure that it must have after `plan`.

    Raises:
        PlanError: For the first tensor that differs.
    """
    state = model.state_dict(keep_vars=True)
    if plan.classes and (count := len(classes.names_of(model))) != len(plan.classes.kept):
        raise PlanError(f"The model has {count} classes, but must have {len(plan.classes.kept)} after pruning.")
    for name in plan.keep:
        shape = tuple(state[name].shape) if name in state else None
        if shape != plan.shape_after(name):
            raise PlanError(f"'{name}' has shape {shape}, but must have {plan.shape_after(name)} after pruning.")


def apply_to_optimizer(
    optimizer: torch.optim.Optimizer,
    replaced: Mapping[nn.Parameter, nn.Parameter],
    model: nn.Module,
    plan: Plan,
) -> None:
    """Give `optimizer` the new parameters in the old order, and cut its per-parameter state in the same way.

    Args:
        optimizer: any optimizer whose state consists of tensors in the parameter's shape (momenta) and scalars.
        replaced: the result of `apply`.
        model: the cut model, for the parameters' names.
        plan: the plan that was applied.
    """
    names = {new: name for name, new in model.named_parameters()}
    _replace_parameters(optimizer, replaced)
    for old, new in replaced.items():
        if old not in optimizer.state:
            continue
        dims = plan.keep.get(names[new], {})
        state = optimizer.state.pop(old)
        optimizer.state[new] = {
            key: cut(value, dims) if isinstance(value, Tensor) and value.shape == old.shape else value
            for key, value in state.items()
        }
    Masked(model, plan.masks).hold(optimizer)


def become(model: nn.Module, other: nn.Module, plan: Plan) -> dict[nn.Parameter, nn.Parameter]:
    """Give `model` the structure and the weights of `other`. Tensors that only one of them has stay as they are.

    Args:
        model: the model to change, in place.
        other: the same architecture with other widths; it is not changed.
        plan: the composed plan of all cuts in which the two differ. One of them is the model after this plan.

    Returns:
        `{old parameter: new parameter}` for all parameters.
    """
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    source = dict(other.named_modules())
    for name, layer in model.named_modules():
        if name not in source:  # a loss with its own weights, for example
            continue
        tensors, others = _own_tensors(layer), _own_tensors(source[name])
        for key, old in tensors.items():
            if key not in others:
                continue
            new = others[key].detach().to(old, copy=True)
            if old.ndim == 4 and not old.is_contiguous():
                new = new.contiguous(memory_format=torch.channels_last)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
                replaced[old] = new
            setattr(layer, key, new)
        if tensors:
            _update_widths(layer)
    for layer_name, values in plan.attributes.items():
        for key in values:
            setattr(model.get_submodule(layer_name), key, copy(getattr(source[layer_name], key)))
    return replaced


def _own_tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}


def start_optimizer_anew(optimizer: torch.optim.Optimizer, replaced: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Give `optimizer` the new parameters in the old order, and delete its state (the momenta)."""
    _replace_parameters(optimizer, replaced)
    optimizer.state.clear()


def _replace_parameters(optimizer: torch.optim.Optimizer, replaced: Mapping[nn.Parameter, nn.Parameter]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [replaced.get(p, p) for p in group["params"]]


@torch.no_grad()
def cut(tensor: Tensor, dims: Mapping[int, tuple[int, ...]]) -> Tensor:
    """The kept part of a tensor, detached, in the same memory format."""
    nhwc = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    nhwc = nhwc and not tensor.is_contiguous()
    kept = tensor.detach()
    for dim, keep in dims.items():
        kept = kept.index_select(dim, torch.tensor(keep, device=tensor.device))
    return kept.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)


@torch.no_grad()
def rescale(tensor: Tensor, factors: Mapping[int, float], kept: Sequence[int] | None) -> None:
    """Multiply rows in place. The keys of `factors` are row indices before the cut; `kept` are the kept indices."""
    rows = range(len(tensor)) if kept is None else kept
    factor = torch.tensor([factors.get(i, 1.0) for i in rows], dtype=torch.float64)
    tensor.mul_(factor.to(tensor).view(-1, *[1] * (tensor.ndim - 1)))


def _update_widths(layer: nn.Module) -> None:
    """Set the width attributes of a torch layer to the sizes of its tensors."""
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        inputs, per_group = layer.weight.shape[:2]
        layer.groups = inputs if layer.groups == layer.in_channels else layer.groups
        layer.in_channels, layer.out_channels = inputs, per_group * layer.groups
    elif isinstance(layer, nn.modules.conv._ConvNd):
        out, per_group = layer.weight.shape[:2]
        if layer.groups == layer.in_channels > 1:  # depthwise
            layer.groups = out * layer.groups // layer.out_channels
        layer.out_channels, layer.in_channels = out, per_group * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = layer.weight.shape
    elif isinstance(layer, BATCH_NORM):
        layer.num_features = len(layer.running_mean if layer.weight is None else layer.weight)
