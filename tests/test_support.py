# SPDX-License-Identifier: AGPL-3.0-or-later
"""No cell of docs/reference/support.md gets worse: measured again, on thin models where Ultralytics allows them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import support
import zoo

# Exactness of every family is judged in test_oracle.py; here, one architecture of each kind is measured in full.
FIRST = ("yolov6", "yolov9t", "yolov10n", "yolo11-seg", "yolo12-obb", "yolo26-pose", "yoloe-26-seg", "yolov8-rtdetr")
WHOLE = (
    *FIRST,
    *("yolov3-tiny", "yolov5", "yolov8-ghost", "yolov8-worldv2", "yolo12-cls", "yolo26", "yolo26-depth", "yolo26-sem"),
)
IN_FULL = tuple(c for c in support.COLUMNS if c not in ("exact", "stock reload"))
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


def protected() -> dict[str, set[str]]:
    """The second table of docs/support.md: `{architecture: reasons}`."""
    text = support.PAGE.read_text(encoding="utf-8").split("## What is protected")[1]
    lines = re.findall(r"^\| (\S+) \| (.+) \|$", text, re.MULTILINE)[1:]
    return {name: set(re.findall(r"(?:^|; )(.+?) \([\d.]+%\)", told)) for name, told in lines}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where checkpoints of what was measured in full are saved."""
    return tmp_path_factory.mktemp("support")


@pytest.fixture(scope="module")
def saved() -> list[support.Row]:
    """What was measured in full so far."""
    return []


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
@pytest.mark.parametrize(
    "name", [*FIRST, *(pytest.param(n, marks=pytest.mark.long) for n in zoo.NAMES if n not in FIRST)]
)
def test_no_cell_gets_worse(name: str, folder: Path, saved: list[support.Row]) -> None:
    columns = IN_FULL if name in WHOLE else IN_SHORT
    row = support.measure(name, folder, support.THIN, (*columns, *(["stock reload"] if name in WHOLE else [])))
    assert set(row.cells) == set(columns)
    assert {c: v for c, v in row.cells.items() if not support.good(c, v)} == {}
    assert set(row.protected) == protected()[name]
    if name in WHOLE:
        saved.append(row)


@pytest.mark.slow
def test_what_was_saved_loads_where_this_package_is_not(folder: Path, saved: list[support.Row]) -> None:
    if not saved:  # this test is run alone
        saved.append(support.measure("yolo26", folder, support.THIN, ("stock reload",)))
    support.reload(saved, folder)
    assert {r.name: r.cells["stock reload"] for r in saved if r.cells["stock reload"] != "yes"} == {}


def test_what_is_protected_is_told_for_every_architecture() -> None:
    assert sorted(protected()) == zoo.NAMES
    assert set().union(*protected().values()) == {
        "task output",
        "box distribution (DFL)",
        "width of nn.MultiheadAttention",
        "sampling points of deformable attention",
        "embedding",
        "width of the text embedding",
        "width of the prompt embedding",
        "does not run in a forward pass",
    }
