# SPDX-License-Identifier: AGPL-3.0-or-later
"""The environment of every test: offline, headless, and away from the user's own Ultralytics settings."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

_CONFIG_DIR = tempfile.TemporaryDirectory(prefix="yolo-prune-tests-")  # removed at exit

# Ultralytics and torch read these once, when they are first imported: so here, not in a fixture.
os.environ.update(
    {
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",  # faster for models this small, and the other cores run other tests
        "YOLO_AUTOINSTALL": "false",
        "YOLO_CONFIG_DIR": _CONFIG_DIR.name,
        "YOLO_OFFLINE": "1",
    }
)
os.environ.pop("YOLO_PRUNE_HOOK", None)


@pytest.fixture
def clean_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder for the test, and its path."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


LONGEST = (  # files, the longest first
    *("guides", "oracle", "kill", "tasks", "ranks", "support", "run", "search", "profiles", "resume", "guard"),
    *("rewind", "heads", "cli", "main_path", "bench", "settings", "timing"),
)


@pytest.hookimpl(tryfirst=True)  # before -m leaves tests out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest is begun first: a process that got the longest file last would be waited for."""
    order = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    slow = set()
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker("slow")
        if item.get_closest_marker("slow"):
            slow.add(item.path)
    items.sort(key=lambda item: (order.get(item.path.name, len(order)), item.path not in slow))
