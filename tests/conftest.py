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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests are begun first: a process that got the longest of them last would be waited for."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
