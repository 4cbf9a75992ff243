# SPDX-License-Identifier: AGPL-3.0-or-later
"""Versions of the packages that a run depends on: the installed ones, and those that this release was tested with."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata

PACKAGES = ("ultralytics", "torch", "torch-pruning")

TESTED = {
    "ultralytics": ("8.3.0", "8.4.190"),
    "torch": ("2.4.0", "2.15.0"),
    "torch-pruning": ("1.6.1", "1.6.1"),
}
"""Oldest and newest version, both included, that this release of yolo-prune was tested with."""


@dataclass(frozen=True)
class Component:
    """A distribution that is installed or missing.

    Attributes:
        name: Its name for `pip`.
        version: The installed version; `None` if it is not installed.
        required: Whether yolo-prune cannot work without it.
    """

    name: str
    version: str | None
    required: bool = True

    @property
    def tested(self) -> bool | None:
        """Whether the version lies in the tested range; `None` if there is no range, or no version."""
        if self.version is None or self.name not in TESTED:
            return None
        oldest, newest = TESTED[self.name]
        release = _release(self.version)
        return release is not None and _numbers(oldest) <= release <= _numbers(newest)

    @property
    def missing(self) -> bool:
        """Whether it is required and not installed."""
        return self.required and self.version is None


def installed() -> dict[str, str]:
    """`{package: version}` of the core packages and Python."""
    return {name: metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}


def untested() -> list[str]:
    """One warning for each installed version that this release was not tested with."""
    components = (Component(name, version_of(name)) for name in TESTED)
    return [warning for component in components if component.tested is False for warning in warnings_of([component])]


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def warnings_of(components: Sequence[Component]) -> Iterator[str]:
    """One text for each package that is missing or was not tested, with its remedy."""
    for component in components:
        name = component.name
        if component.missing:
            yield f"{name} is not installed, and yolo-prune needs it: pip install {name}"
        elif component.tested is False:
            oldest, newest = TESTED[name]
            span = oldest if oldest == newest else f"{oldest} to {newest}"
            yield (
                f"{name} {component.version}: this yolo-prune was tested with {span}. It may well work; "
                f"if it does not, pip install '{name}=={newest}'"
            )
    if absent := [c.name for c in components if not c.required and c.version is None]:
        yield f"not installed: {', '.join(absent)}; for ONNX export, pip install 'yolo-prune[export]'"


def _release(version: str) -> tuple[int, ...] | None:
    """The numbers of a final release, without its local part; `None` for development and pre-releases."""
    match = re.fullmatch(r"(\d+(?:\.\d+)*)(?:\.post\d+)?(?:\+.*)?", version)
    return _numbers(match[1]) if match else None


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in release.split("."))
