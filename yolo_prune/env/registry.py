# SPDX-License-Identifier: AGPL-3.0-or-later
"""Things that are registered under a name or a class, each of which can be taken once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")


class Registry(dict[K, V]):
    """A dictionary that is filled by a decorator, in the order in which its modules are read."""

    def __init__(self, taken: str) -> None:
        """Remember what to say.

        Args:
            taken: the message where a name or class is taken; `{}` stands for it.
        """
        super().__init__()
        self.taken = taken

    def register(self, *keys: K) -> Callable[[T], T]:
        """Register what is decorated under all of these names or classes, or under none of them.

        What is decorated has to be a `V`. It comes back as what it is, so that a class still serves as a type: this is
        why `T` stands here, and why functions that call this one and are public say what they take.

        Raises:
            ValueError: If one is taken.
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
