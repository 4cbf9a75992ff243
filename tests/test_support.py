# SPDX-License-Identifier: AGPL-3.0-or-later
"""No cell of docs/reference/support.md gets worse: measured again, on thin models where Ultralytics allows them."""

from __future__ import annotations

from pathlib import Path

import pytest
import support
import zoo

# Exactness of every family is judged in test_oracle.py; here, one architecture of each kind is measured in full.
WHOLE = (
    *("yolov3-tiny", "yolov5", "yolov6", "yolov8-ghost", "yolov8-worldv2", "yolov9t", "yolov10n", "yolo11-seg"),
    *("yolo12-obb", "yolo12-cls", "yolo26", "yolo26-pose", "yolo26-depth", "yolo26-sem", "yoloe-26-seg"),
    "yolov8-rtdetr",
)
IN_FULL = tuple(c for c in support.COLUMNS if c != "exact")
IN_SHORT = ("plan", "least FLOPs", "again")


def committed() -> dict[str, dict[str, str]]:
    """The first table of docs/reference/support.md: `{architecture: {column: cell}}`."""
    lines = [line for line in support.PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    head = next(i for i, line in enumerate(lines) if "plan" in line)
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines[head:]]
    rows = [row for row in cells[1:] if len(row) == len(support.COLUMNS) + 1]
    return {name: dict(zip(support.COLUMNS, values, strict=True)) for name, *values in rows}


def number(cell: str) -> object:
    try:
        return float(cell)
    except ValueError:
        return cell


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, support.Row]:
    """All rows, measured once."""
    folder: Path = tmp_path_factory.mktemp("support")
    measured = []
    for name in zoo.NAMES:
        measured.append(support.measure(name, folder, support.THIN, IN_FULL if name in WHOLE else IN_SHORT))
    support.reload([row for row in measured if row.name in WHOLE], folder)
    return {row.name: row for row in measured}


def test_the_page_has_every_architecture_that_ultralytics_ships_and_no_empty_cell() -> None:
    table = committed()
    assert sorted(table) == zoo.NAMES
    bad = {
        (name, column, cell)
        for name, cells in table.items()
        for column, cell in cells.items()
        if not support.good(column, number(cell))
    }
    assert bad == set()


def test_the_words_of_the_page_are_those_that_are_written() -> None:
    text = support.PAGE.read_text(encoding="utf-8")
    assert text.startswith(support.HEADER)
    assert support.FAMILIES in text


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.NAMES)
def test_no_cell_gets_worse(name: str, rows: dict[str, support.Row]) -> None:
    cells = rows[name].cells
    assert set(cells) == set(IN_FULL if name in WHOLE else IN_SHORT)
    assert {c: v for c, v in cells.items() if not support.good(c, v)} == {}


@pytest.mark.slow
def test_what_is_protected_is_told_for_every_architecture(rows: dict[str, support.Row]) -> None:
    told = {reason for row in rows.values() for reason in row.protected}
    assert told == {
        "task output",
        "box distribution (DFL)",
        "width of nn.MultiheadAttention",
        "sampling points of deformable attention",
        "embedding",
        "width of the text embedding",
        "width of the prompt embedding",
        "does not run in a forward pass",
    }
