# SPDX-License-Identifier: AGPL-3.0-or-later
"""What is in the wheel, the editable wheel and the source archive. Built in place, without a network."""

from __future__ import annotations

import email
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import yolo_prune

ROOT = Path(__file__).resolve().parents[1]
PTH = b"import yolo_prune._startup; yolo_prune._startup.install()\n"
START = b"yolo_prune._startup:install\n"

pytest.importorskip("hatchling", reason="hatchling, the build backend, is not installed: pip install '.[test]'")

TEMPLATES = ("base.html.j2", "parts.html.j2", "report.html.j2", "compare.html.j2", "style.css.j2")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Builds one kind of archive ("wheel", "editable" or "sdist") of a copy of the source, once."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs", "*.pt", "*venv*")
    built: dict[str, Path] = {}

    def build_once(kind: str) -> Path:
        if not source.exists():
            shutil.copytree(ROOT, source, ignore=ignored)
            shutil.copy(ROOT / ".gitignore", source)
        if kind not in built:
            code = f"import hatchling.build as b; print(b.build_{kind}({str(folder)!r}))"
            command = [sys.executable, "-c", code]
            result = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120)
            assert result.returncode == 0, result.stderr
            # All kinds of wheel have the same file name.
            name = result.stdout.split()[-1]
            built[kind] = (folder / name).rename(folder / f"{kind}-{name}")
        return built[kind]

    return build_once


@pytest.fixture(scope="module")
def wheel(build: Callable[[str], Path]) -> dict[str, bytes]:
    return contents(build("wheel"))


def contents(archive: Path) -> dict[str, bytes]:
    """`{name: bytes}` of the files in a wheel."""
    with zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name) for name in opened.namelist() if not name.endswith("/")}


def info(wheel: dict[str, bytes], name: str) -> str:
    return wheel[f"yolo_prune-{yolo_prune.__version__}.dist-info/{name}"].decode()


def test_the_start_up_files_lie_where_python_looks_and_say_exactly_this(wheel: dict[str, bytes]) -> None:
    found = {name: data for name, data in wheel.items() if name.endswith((".pth", ".start"))}
    assert found == {"yolo_prune.pth": PTH, "yolo_prune.start": START}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: dict[str, bytes]) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "yolo_prune").rglob("*")
        if path.is_file() and path.suffix not in {".pyc", ".pth", ".start"}
    }
    recipes = {f"yolo_prune/recipes/{path.name}" for path in (ROOT / "recipes").iterdir()}
    code = {name for name in wheel if ".dist-info/" not in name}
    assert "yolo_prune/py.typed" in expected
    assert {f"yolo_prune/report/templates/{name}" for name in TEMPLATES} <= expected
    assert "yolo_prune/recipes/half-flops.yaml" in recipes
    assert code == expected | recipes | {"yolo_prune.pth", "yolo_prune.start"}


def test_recipes_are_copied_byte_for_byte(wheel: dict[str, bytes]) -> None:
    for path in (ROOT / "recipes").iterdir():
        assert wheel[f"yolo_prune/recipes/{path.name}"] == path.read_bytes()


def test_the_licence_is_the_agpl(wheel: dict[str, bytes]) -> None:
    licence = info(wheel, "licenses/LICENSE")
    assert licence.encode() == (ROOT / "LICENSE").read_bytes()
    assert licence.split()[:6] == ["GNU", "AFFERO", "GENERAL", "PUBLIC", "LICENSE", "Version"]
    assert email.message_from_string(info(wheel, "METADATA"))["License-Expression"] == "AGPL-3.0-or-later"


def test_the_metadata(wheel: dict[str, bytes]) -> None:
    metadata = email.message_from_string(info(wheel, "METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("yolo-prune", yolo_prune.__version__)
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra", [])) == {"dev", "docs", "export", "ncnn", "onnx", "openvino", "test"}
    assert "ultralytics>=8.3.0" in metadata.get_all("Requires-Dist", [])
    assert "yolo-prune = yolo_prune.cli:main" in info(wheel, "entry_points.txt")


def test_an_editable_install_has_the_start_up_files_and_the_source(build: Callable[[str], Path]) -> None:
    files = contents(build("editable"))
    assert (files["yolo_prune.pth"], files["yolo_prune.start"]) == (PTH, START)
    # The path to the source must be read before the line that imports from it.
    assert sorted(name for name in files if name.endswith(".pth")) == ["_yolo_prune.pth", "yolo_prune.pth"]
    assert not [name for name in files if name.startswith("yolo_prune/")]


def test_the_source_archive_can_be_built_from(build: Callable[[str], Path]) -> None:
    with tarfile.open(build("sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "yolo_prune/yolo_prune.pth"} <= names
    assert {
        "yolo_prune/yolo_prune.start",
        "recipes/half-flops.yaml",
        "tests/conftest.py",
        "docs/how-to/targets.md",
    } <= names
    assert {f"yolo_prune/report/templates/{name}" for name in TEMPLATES} <= names


def test_the_wheel_alone_installs_the_hook_at_start(build: Callable[[str], Path], tmp_path: Path) -> None:
    site_packages, stand_in = tmp_path / "site", tmp_path / "path"
    with zipfile.ZipFile(build("wheel")) as opened:
        opened.extractall(site_packages)
    (stand_in / "ultralytics/cfg").mkdir(parents=True)
    (stand_in / "ultralytics/__init__.py").touch()
    (stand_in / "ultralytics/cfg/__init__.py").touch()
    code = f"""
import site, sys, types
site.addsitedir({str(site_packages)!r})
patch = sys.modules["yolo_prune._patch"] = types.ModuleType("yolo_prune._patch")
patch.apply = lambda module: print("patched", module.__name__)
sys.path.append({str(stand_in)!r})
import ultralytics.cfg
"""
    command = [sys.executable, "-I", "-S", "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "patched ultralytics.cfg\n", "")


@pytest.mark.skipif(
    not any(Path(folder, "yolo_prune.pth").exists() for folder in site.getsitepackages()),
    reason="yolo-prune is not installed in this environment, only on its path",
)
def test_an_installed_package_starts_its_hook_and_imports_nothing_heavy(tmp_path: Path) -> None:
    code = """
import sys
hook = sys.modules.get("yolo_prune._startup")
print(hook is not None and hook.state().started, {"torch", "ultralytics", "pydantic"} & set(sys.modules))
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("True set()\n", "")
