# SPDX-License-Identifier: AGPL-3.0-or-later
"""The documentation as a site: it builds without a warning, is complete, and loads nothing from anywhere else."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args, get_origin

import browser
import pytest
from PIL import Image
from pydantic import BaseModel

import yolo_prune
from yolo_prune import cli
from yolo_prune.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
MISSING = [name for name in ("sphinx", "myst_parser", "furo") if importlib.util.find_spec(name) is None]
LOADING = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "srcset", "object": "data"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    if MISSING and os.environ.get("YOLO_PRUNE_TEST_DOCS") != "1":
        pytest.skip(f"{', '.join(MISSING)} not installed: pip install '.[docs]'")
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-d", f"{target}-trees"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [*command, str(ROOT / "docs"), str(target)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return target


class Loaded(HTMLParser):
    """What a browser fetches for a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and not {"stylesheet", "icon", "preload"} & set((given.get("rel") or "").split()):
            return  # a pointer for search engines and readers
        if address := given.get(LOADING.get(tag, "")):
            self.found.append(address)


def elsewhere(address: str) -> bool:
    return bool(re.match(r"(?!data:|file:)[a-z][a-z0-9+.-]*:|//", address.strip(), re.IGNORECASE))


@pytest.mark.slow
def test_every_page_is_there(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if not (site / page).is_file()} == set()


@pytest.mark.slow
def test_every_public_name_is_described(site: Path) -> None:
    text = (site / "reference/python.html").read_text(encoding="utf-8")
    described = set(re.findall(r'id="yolo_prune\.(\w+)"', text))
    assert set(yolo_prune.__all__) - described == set()


@pytest.mark.slow
def test_the_search_has_an_index(site: Path) -> None:
    text = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text[text.index("{") : text.rindex("}") + 1])
    assert "reference/recipes" in index["docnames"]
    assert (site / "search.html").is_file()


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    fetched = {(page.name, a) for page in site.rglob("*.html") for a in Loaded(page).found if elsewhere(a)}
    fetched |= {
        (sheet.name, address)
        for sheet in site.rglob("*.css")
        for address in re.findall(r"(?:url\(|@import\s+)[\"']?([^\"')\s]+)", sheet.read_text(encoding="utf-8"))
        if elsewhere(address)
    }
    assert fetched == set()


def fields(part: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The fields of a recipe, dotted, as the command line has them."""
    for name, field in part.model_fields.items():
        inner = next((t for t in kinds(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)), None)
        yield from fields(inner, f"{prefix}{name}.") if inner else [prefix + name]


def kinds(annotation: Any) -> tuple[Any, ...]:
    """A type, or the types of a union; what is in a mapping has no dotted name."""
    return () if get_origin(annotation) is dict else (annotation, *get_args(annotation))


def test_every_field_of_a_recipe_is_in_its_table() -> None:
    text = (ROOT / "docs/reference/recipes.md").read_text(encoding="utf-8")
    assert set(fields(Recipe)) == set(re.findall(r"^\| `([\w.]+)` \| [^|]*\| [^|]+\|$", text, re.MULTILINE))


def test_every_command_has_its_section() -> None:
    text = (ROOT / "docs/reference/command-line.md").read_text(encoding="utf-8")
    named = {name for head in re.findall(r"^## (.+)$", text, re.MULTILINE) for name in head.split(" and ")}
    assert named == set(cli.COMMANDS)


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("name", ["report.png", "report-dark.png"])
def test_a_picture_is_small(name: str) -> None:
    assert 10_000 < (ROOT / "docs/images" / name).stat().st_size <= 300_000


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium here")
def test_the_script_makes_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs/pictures.py")
    assert spec
    assert spec.loader
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    (tmp_path / "images").mkdir()
    (tmp_path / "report.html").write_text("<style>:root { color-scheme: light dark }</style><h1>A run</h1>")
    monkeypatch.setattr(pictures, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["pictures.py", str(tmp_path)])
    assert pictures.main() == 0
    for name, corner in (("report.png", 255), ("report-dark.png", 18)):
        with Image.open(tmp_path / "images" / name) as picture:
            assert picture.width == pictures.WIDTH
            assert picture.convert("L").getpixel((0, 0)) == corner
