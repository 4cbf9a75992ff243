# SPDX-License-Identifier: AGPL-3.0-or-later
"""The architecture that the folder listing promises."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import yolo_prune

PACKAGE = Path(yolo_prune.__file__).parent
MAY_IMPORT_ULTRALYTICS = {
    "_patch.py",
    "api.py",
    "benchmark.py",
    "callback.py",
    "control.py",
    "journal.py",
    "resume.py",
    "cli.py",
    "compat.py",
    "comparison.py",
    "demo.py",
    "evaluate.py",
    "exports.py",
    "graph/blocks.py",
    "images.py",
    "launch.py",
    "measured.py",
    "models.py",
    "pages.py",
    "rounds.py",
    "runtimes.py",
    "subjects.py",
    "timing/search.py",
    "timing/target.py",
    "trainer.py",
}
FILES = sorted(str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level packages a file imports, at its top or inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("name", FILES)
def test_only_the_rooms_that_may_import_ultralytics_do(name: str) -> None:
    if "ultralytics" in imported(PACKAGE / name):
        assert name in MAY_IMPORT_ULTRALYTICS


@pytest.mark.parametrize(
    "name",
    [
        "surgery.py",
        "proof.py",
        "select.py",
        "plans.py",
        "cost.py",
        "recover/refit.py",
        "criteria/data.py",
        "allocation.py",
        "sensitivity.py",
        "latency.py",
        "forecast.py",
        "timing/fit.py",
        "timing/layers.py",
        "timing/table.py",
        "agreement.py",
    ],
)
def test_the_core_does_not_know_the_trainer(name: str) -> None:
    tree = ast.parse((PACKAGE / name).read_text(encoding="utf-8"))
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not modules & {f"yolo_prune.{room}" for room in ("trainer", "callback", "launch", "api", "cli")}


def test_files_stay_small() -> None:
    sizes = {name: len((PACKAGE / name).read_text(encoding="utf-8").splitlines()) for name in FILES}
    assert {name: lines for name, lines in sizes.items() if lines > 420} == {}
