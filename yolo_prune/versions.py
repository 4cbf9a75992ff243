# SPDX-License-Identifier: AGPL-3.0-or-later
"""Versions of what a run depends on, for reports."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = ("ultralytics", "torch")


def installed() -> dict[str, str]:
    """`{package: version}` of the core packages and Python."""
    return {name: metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
