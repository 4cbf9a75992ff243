# SPDX-License-Identifier: AGPL-3.0-or-later
"""Differences between releases of Ultralytics, also where its sources are not installed."""

from __future__ import annotations

import importlib
import inspect
import py_compile
import sys
from pathlib import Path

import pytest

from yolo_prune.env import releases

BODY = """
def early():
    return {"callback": 1, "other": 2}
def late(trainer):
    inner = lambda: {"trainer": trainer, "callbacks": 3}
    mosaic_closed = inner()
    return mosaic_closed
"""


@pytest.fixture(params=["with sources", "without sources"])
def module(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    source = tmp_path / "strange_release.py"
    source.write_text(BODY)
    if request.param == "without sources":
        py_compile.compile(str(source), cfile=str(tmp_path / "strange_release.pyc"))
        source.unlink()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "strange_release", raising=False)
    return "strange_release"


def test_names_and_constants_are_found_in_compiled_code(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = importlib.import_module(module)
    monkeypatch.delitem(sys.modules, module)
    assert releases._mentions(loaded.late.__code__, "callbacks")
    assert releases._mentions(loaded.late.__code__, "mosaic_closed")
    assert not releases._mentions(loaded.early.__code__, "callbacks")
    spec = importlib.util.find_spec(module)
    assert releases._mentions(spec.loader.get_code(module), "mosaic_closed")
    assert not releases._mentions(spec.loader.get_code(module), "something")


def test_the_probes_read_no_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(thing: object) -> str:
        raise OSError("could not get source code")

    late = "mosaic_closed" in inspect.getsource(releases.BaseTrainer._do_train)
    shared = "callbacks" in inspect.getsource(releases.dist.generate_ddp_file)
    halved = "convert_float_to_float16" in inspect.getsource(importlib.import_module("ultralytics.engine.exporter"))
    monkeypatch.setattr(inspect, "getsource", missing)
    assert (releases.closes_mosaic_late(), releases.shares_callbacks()) == (late, shared)
    assert releases.halves_onnx() == halved
