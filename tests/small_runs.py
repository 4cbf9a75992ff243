# SPDX-License-Identifier: AGPL-3.0-or-later
"""What all small runs have in common."""

from __future__ import annotations

from typing import Any

QUICK: dict[str, Any] = {"workers": 0, "amp": False, "plots": False, "device": "cpu"}
