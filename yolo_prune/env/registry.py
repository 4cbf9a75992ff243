# SPDX-License-Identifier: AGPL-3.0-or-later
"""Registries: an object is registered under a name or a class, and each name or class can be used only once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")


class Registry(dict[K, V]):
    """A dictionary that a decorator fills, in the order in which the modules are imported."""

    def __init__(self, taken: str) -> None:
        """Make an empty registry.

        Args:
            taken: the error message if a name or class is registered already; `{}` stands for the name.
        """
        super().__init__()
        self.taken = taken

    def register(self, *keys: K) -> Callable[[T], T]:
        """A decorator that registers an object under all of these keys, or under none of them.

        The object must be a `V`, and the decorator returns it unchanged. Its type is `T` here, because a decorated
        class must still be a class for the type checker. Public functions that call this method therefore declare
        the type that they accept.

        Raises:
            ValueError: If a key is registered already.
        """

        def decorate(thing: T) -> T:
            for key in keys:
                if key in self:
                    raise ValueError(self.taken.format(getattr(key, "__name__", key)))
            self.update(dict.fromkeys(keys, cast(V, thing)))
            return thing

        return decorate

    def copy(self) -> Registry[K, V]:
        """Another registry with the same content."""
        new: Registry[K, V] = Registry(self.taken)
        new.update(self)
        return new
