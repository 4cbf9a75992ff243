# SPDX-License-Identifier: AGPL-3.0-or-later
"""Copies of a module tree that run as the original does."""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from yolo_prune.errors import UnsupportedModelError
from yolo_prune.graph import foreign

PLAIN = (bool, int, float, str, bytes, type(None), type, torch.dtype, torch.device)
CODE = (FunctionType, BuiltinFunctionType, ModuleType)
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def copy_tree(root: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a module tree.

    Functions that a block stores, and forward hooks, are bound to the copy if they refer to the tree only. Other hooks
    belong to other code and are left out.

    Args:
        root: the module; it is not changed.
        memo: `{id of an object: what stands for it in the copy}`, as for `copy.deepcopy`. It is filled.

    Raises:
        UnsupportedModelError: If an attribute of a module cannot be copied; the message names it.
    """
    modules = list(root.modules())
    for module in modules:
        memo |= {id(getattr(module, key)): OrderedDict() for key in HOOKS}
    try:
        copy: nn.Module = deepcopy(root, memo)
    except Exception as e:  # an attribute may be an object of the user
        raise UnsupportedModelError(
            f"{_culprit(root)} cannot be copied: {foreign.said(e)}. Ultralytics copies models in training, too. "
            "Keep such an object outside of the model, or give its class a method __deepcopy__."
        ) from e
    for module in modules:
        twin = memo.get(id(module))
        if type(twin) is not type(module):  # something else stands for it, or it copies itself in its own way
            continue
        for key in HOOKS:
            for number, hook in getattr(module, key).items():
                if (own := _rebound(hook, memo)) is not None:
                    getattr(twin, key)[number] = own
        for name, value in vars(module).items():
            if isinstance(value, FunctionType) and (own := _rebound(value, memo)) is not None:
                vars(twin)[name] = own
    return copy


def _culprit(root: nn.Module) -> str:
    """The first attribute in a module tree that cannot be copied, as messages name it."""
    for path, module in root.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, nn.Module) or name in (*HOOKS, "_modules", "_parameters", "_buffers", "criterion"):
                continue
            try:
                deepcopy(value)
            except Exception:
                return f"'{path}.{name}'" if path else f"The model's attribute '{name}'"
    return "The model"


def _rebound(function: Any, memo: dict[int, Any]) -> Any:
    """A function that does to the copy what `function` does to the tree; None if it refers to anything else."""
    if id(function) in memo:
        return memo[id(function)]
    if isinstance(function, MethodType):
        owner = memo.get(id(function.__self__))
        return None if owner is None else MethodType(function.__func__, owner)
    if isinstance(function, partial):
        inner = _rebound(function.func, memo)
        values = [_counterpart(v, memo) for v in (*function.args, *function.keywords.values())]
        if inner is None or any(v is _OTHER for v in values):
            return None
        count = len(function.args)
        return partial(inner, *values[:count], **dict(zip(function.keywords, values[count:], strict=True)))
    if isinstance(function, FunctionType) and function.__closure__:
        values = [_counterpart(_content(cell), memo) for cell in function.__closure__]
        if any(v is _OTHER for v in values):
            return None
        cells = tuple(map(CellType, values))
        own = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
        own.__kwdefaults__ = function.__kwdefaults__
        return own
    return None


_OTHER = object()  # stands for an object outside of the tree


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the variable has no value yet
        return _OTHER


def _counterpart(value: Any, memo: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    return value if isinstance(value, PLAIN + CODE) else _OTHER
