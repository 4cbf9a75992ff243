# SPDX-License-Identifier: AGPL-3.0-or-later
"""The architecture that the folder listing promises."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import yolo_prune

PACKAGE = Path(yolo_prune.__file__).parent
FLOOR = {"errors", "_version"}  # that everything may use
ORDER = (  # folders, and the faces at the root: each imports only what stands above it
    "_keys",
    "recipe",
    "env",
    "graph",
    "cut",
    "data",
    "criteria",
    "recover",
    "planning",
    "report",
    "measure",
    "latency",
    "zeros",
    "pages",
    "run",
    "_patch",
    "_startup",
    "demo",
    "doctor",
    "api",
    "interop",
    "__init__",
    "_grammar",
    "cli",
    "__main__",
)
KNOW_NO_ULTRALYTICS = {"errors", "_version", "_keys", "recipe", "cut", "criteria", "planning", "recover", "report"}
IN_FREE_ROOMS = {  # beside them: parts of other folders that are plain functions, and are to stay so
    "data/calibration.py",
    "data/layer_samples.py",
    "env/files.py",
    "env/image_size.py",
    "env/json_files.py",
    "env/ranks.py",
    "env/registry.py",
    "env/terminal.py",
    "env/versions.py",
    "graph/trace.py",
    "graph/rules.py",
    "latency/fit.py",
    "latency/layers.py",
    "latency/profile.py",
    "measure/alignment.py",
    "measure/clock.py",
    "measure/differences.py",
    "run/guard.py",
    "run/schedule.py",
}
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(("yolo_prune", *(parts[:-1] if parts[-1] == "__init__" else parts)))


MODULES = {name_of(path): path for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, at its top or inside functions; `from x import y` is `x.y` where that is one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports must be absolute"
            assert node.module
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def room(module: str) -> str:
    """The folder that a module of ours lies in; of what lies at the root, its own name."""
    return [*module.split("."), "__init__"][1]


def ours(path: Path) -> set[str]:
    return {module for module in imports(path) if module.split(".")[0] == "yolo_prune"}


def test_every_folder_and_face_has_its_place_in_the_order() -> None:
    assert {room(module) for module in MODULES} == FLOOR | set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_what_its_folder_may_know(path: Path) -> None:
    here = room(name_of(path))
    may = FLOOR if here in FLOOR else FLOOR | set(ORDER[: ORDER.index(here) + 1])
    assert {module for module in ours(path) if room(module) not in may} == set()


def test_no_files_import_each_other_in_a_loop() -> None:
    graph = {module: ours(path) - {module} for module, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(f"import loop: {' <- '.join(e.args[1])}")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_core_does_not_know_ultralytics(path: Path) -> None:
    if room(name_of(path)) in KNOW_NO_ULTRALYTICS or path.relative_to(PACKAGE).as_posix() in IN_FREE_ROOMS:
        assert "ultralytics" not in {module.split(".")[0] for module in imports(path)}


def test_the_files_that_stay_free_of_ultralytics_are_there() -> None:
    assert {file for file in IN_FREE_ROOMS if not (PACKAGE / file).is_file()} == set()


def test_no_folder_takes_the_name_of_a_public_function() -> None:
    """Importing the folder would put the module in the place of the function, in `yolo_prune`."""
    names = {path.stem if path.suffix == ".py" else path.name for path in PACKAGE.iterdir()}
    assert names & set(yolo_prune.__all__) == set()
