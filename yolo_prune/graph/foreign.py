# SPDX-License-Identifier: AGPL-3.0-or-later
"""Tells blocks of users from those of torch and Ultralytics, and names them in messages."""

from __future__ import annotations

from torch import nn

STOCK = ("torch", "ultralytics")


def is_foreign(module: nn.Module) -> bool:
    """Whether the class of a module is neither torch's nor Ultralytics' own."""
    return type(module).__module__.partition(".")[0] not in STOCK


def block_around(model: nn.Module, path: str) -> str:
    """Name of the innermost foreign module that is, or contains, the module at `path`; `path` if there is none."""
    modules, name = dict(model.named_modules()), path
    while name and not is_foreign(modules[name]):
        name = name.rpartition(".")[0]
    return name or path


def shown(model: nn.Module, path: str) -> str:
    """A block as messages name it: path and class."""
    block = block_around(model, path)
    return f"'{block}' ({type(model.get_submodule(block)).__name__})" if block else "the model"


def said(error: BaseException | None) -> str:
    """An error in its own words, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
