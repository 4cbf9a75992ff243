# SPDX-License-Identifier: AGPL-3.0-or-later
"""The start-up hook, each time in a Python of its own, with a small package in the place of Ultralytics.

`python -S` keeps everything installed out of these processes, the start-up file of this package included.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A stand-in for yolo_prune._patch that marks what it was given.
FAKE_PATCH = """
import sys, types
calls = []
def apply(module):
    calls.append(module.__name__)
    module.patched = getattr(module, "patched", 0) + 1
fake = types.ModuleType("yolo_prune._patch")
fake.apply = apply
sys.modules["yolo_prune._patch"] = fake
"""
FAILING_PATCH = f"""{FAKE_PATCH}
def fail(module):
    raise AttributeError("no such function here")
fake.apply = fail
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder with a package `ultralytics` whose modules only count how often they are executed."""
    folder = tmp_path / "path"
    for package in ("ultralytics", "ultralytics/cfg", "ultralytics/engine"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text("executed = globals().get('executed', 0) + 1\n")
    (folder / "ultralytics/engine/model.py").write_text("executed = globals().get('executed', 0) + 1\n")
    return folder


def run(path: Path, code: str, *, options: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a bare Python that finds `path` and this package, whatever its exit code."""
    clean = {k: v for k, v in os.environ.items() if k not in {"YOLO_PRUNE_HOOK", "PYTHONWARNINGS"}}
    return subprocess.run(
        [sys.executable, "-S", *options, "-c", textwrap.dedent(code)],
        env={**clean, "PYTHONPATH": os.pathsep.join((str(path), str(ROOT))), **env},
        cwd=path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def check(path: Path, code: str, *, options: tuple[str, ...] = (), **env: str) -> str:
    """Run `code` as `run` does; it must succeed without a word on stderr. Returns what it printed."""
    result = run(path, code, options=options, **env)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return result.stdout.strip()


def test_both_targets_are_patched_after_they_were_executed(path: Path) -> None:
    check(
        path,
        FAKE_PATCH
        + """
import yolo_prune
from yolo_prune import _startup
assert calls == [] and "ultralytics" not in sys.modules
import ultralytics.cfg
assert calls == ["ultralytics.cfg"] and ultralytics.cfg.executed == 1
assert _startup.state().patched == ("ultralytics.cfg",)
import ultralytics.engine.model
assert calls == ["ultralytics.cfg", "ultralytics.engine.model"]
assert _startup.state().patched == _startup.TARGETS
assert not hasattr(ultralytics, "patched") and not hasattr(ultralytics.engine, "patched")
""",
    )


def test_modules_already_imported_are_patched_at_once_and_only_once(path: Path) -> None:
    check(
        path,
        FAKE_PATCH
        + """
import ultralytics.cfg
import yolo_prune
assert calls == ["ultralytics.cfg"]
yolo_prune._startup.install()
assert calls == ["ultralytics.cfg"]
""",
    )


def test_a_module_still_being_imported_is_patched_at_its_end(path: Path) -> None:
    (path / "ultralytics/cfg/__init__.py").write_text(
        "from yolo_prune import _startup\n_startup.install()\nlate = True\n"
    )
    check(
        path,
        FAKE_PATCH
        + """
fake.apply = lambda module: calls.append(module.late)
import yolo_prune
import ultralytics.cfg
assert calls == [True]
""",
    )


def test_the_start_up_file_may_run_twice(path: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "yolo_prune/yolo_prune.pth", tmp_path)
    out = check(
        path,
        FAKE_PATCH
        + f"""
import site
for _ in range(2):
    site.addpackage({str(tmp_path)!r}, "yolo_prune.pth", None)
from yolo_prune import _startup
assert sum(type(f).__module__ == "yolo_prune._startup" for f in sys.meta_path) == 1
import ultralytics.cfg
assert calls == ["ultralytics.cfg"]
print(_startup.state())
""",
    )
    assert "installed=True, opted_out=False, patched=('ultralytics.cfg',), started=True" in out


def test_a_plain_import_is_not_taken_for_a_start_up_file(path: Path) -> None:
    code = "import yolo_prune; print(yolo_prune._startup.state())"
    out = check(path, code, YOLO_PRUNE_HOOK="1")  # which is no opting out either
    assert "installed=True, opted_out=False" in out
    assert "started=False" in out


@pytest.mark.parametrize("value", ["0", "false", " OFF "])
def test_opting_out_holds_for_start_up_and_import_but_not_for_force(path: Path, value: str) -> None:
    check(
        path,
        FAKE_PATCH
        + """
import yolo_prune
from yolo_prune import _startup
_startup.install()
import ultralytics.cfg
state = _startup.state()
assert calls == [] and state.opted_out and state.started and not state.installed
_startup.install(force=True)
assert calls == ["ultralytics.cfg"] and _startup.state().installed
""",
        YOLO_PRUNE_HOOK=value,
    )


def test_a_failing_patch_warns_and_the_import_succeeds(path: Path) -> None:
    result = run(
        path,
        FAILING_PATCH
        + """
import yolo_prune
import ultralytics.cfg
yolo_prune._startup.install()
assert ultralytics.cfg.executed == 1
state = yolo_prune._startup.state()
assert state.patched == () and state.errors == {"ultralytics.cfg": "AttributeError: no such function here"}
""",
    )
    assert result.returncode == 0
    assert result.stderr.count("RuntimeWarning: ") == 1
    assert (
        "the pruning keys callbacks= and recipe= are not available: ultralytics.cfg could not be patched "
        "(AttributeError: no such function here)" in result.stderr
    )
    assert "YOLO_PRUNE_HOOK=0 in the environment turns this warning off" in result.stderr


def test_a_failing_patch_does_not_break_the_import_where_warnings_are_errors(path: Path) -> None:
    code = FAILING_PATCH + "import yolo_prune, ultralytics.cfg\nprint('imported')"
    result = run(path, code, options=("-W", "error"))
    assert (result.returncode, result.stdout.strip()) == (0, "imported")
    assert "ultralytics.cfg could not be patched" in result.stderr


def test_an_unimportable_patch_warns_too(path: Path) -> None:
    code = "import sys, yolo_prune\nsys.modules['yolo_prune._patch'] = None\nimport ultralytics.cfg"
    assert "could not be patched (ModuleNotFoundError: " in run(path, code).stderr


def test_an_error_of_the_module_itself_comes_through_and_can_be_retried(path: Path) -> None:
    (path / "ultralytics/cfg/__init__.py").write_text("import os\nif 'BROKEN' in os.environ: 1 / 0\n")
    check(
        path,
        FAKE_PATCH
        + """
import os, yolo_prune
try:
    import ultralytics.cfg
except ZeroDivisionError:
    pass
else:
    raise SystemExit("the error was swallowed")
assert calls == [] and "ultralytics.cfg" not in sys.modules
del os.environ["BROKEN"]
import ultralytics.cfg
assert calls == ["ultralytics.cfg"]
""",
        BROKEN="1",
    )


def test_loader_and_spec_are_the_originals_afterwards(path: Path) -> None:
    check(
        path,
        FAKE_PATCH
        + """
import yolo_prune
import ultralytics.cfg
import importlib.machinery, inspect, pkgutil
for loader in (ultralytics.cfg.__loader__, ultralytics.cfg.__spec__.loader):
    assert type(loader) is importlib.machinery.SourceFileLoader
assert inspect.getsource(ultralytics.cfg).startswith("executed")
""",
    )


def test_reload_patches_again(path: Path) -> None:
    check(
        path,
        FAKE_PATCH
        + """
import importlib.machinery, yolo_prune, ultralytics.cfg
module = importlib.reload(ultralytics.cfg)
assert module.executed == 2 and calls == ["ultralytics.cfg"] * 2
assert type(module.__loader__) is importlib.machinery.SourceFileLoader
""",
    )


def test_an_error_is_forgotten_when_the_patch_succeeds(path: Path) -> None:
    result = run(
        path,
        FAILING_PATCH
        + """
import importlib, yolo_prune, ultralytics.cfg
fake.apply = lambda module: None
importlib.reload(ultralytics.cfg)
state = yolo_prune._startup.state()
assert state.errors == {} and state.patched == ("ultralytics.cfg",)
""",
    )
    assert result.returncode == 0, result.stderr


def test_find_spec_looks_without_importing(path: Path) -> None:
    check(
        path,
        FAKE_PATCH
        + """
import importlib.util, copy, yolo_prune
spec = importlib.util.find_spec("ultralytics.cfg")
assert "ultralytics.cfg" not in sys.modules and calls == []
assert spec.origin.endswith("__init__.py") and spec.submodule_search_locations
assert spec.loader.get_source("ultralytics.cfg").startswith("executed")
assert copy.copy(spec.loader).get_filename("ultralytics.cfg") == spec.origin
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.patched == 1
assert importlib.util.find_spec("ultralytics.nothing") is None
""",
    )


def test_a_missing_ultralytics_is_reported_as_ever(path: Path) -> None:
    shutil.rmtree(path / "ultralytics")
    result = run(path, "import yolo_prune, ultralytics.cfg")
    assert result.stderr.strip().endswith("ModuleNotFoundError: No module named 'ultralytics'")


@pytest.mark.parametrize("place", ["sys.meta_path.insert(0, Other())", "sys.meta_path.insert(1, Other())"])
def test_another_hook_that_delegates_works_beside_this_one(path: Path, place: str) -> None:
    # As wrapt, before it or behind it: it asks all finders again, this one included.
    check(
        path,
        FAKE_PATCH
        + f"""
import importlib.util, yolo_prune
class Other:
    busy, asked = False, 0
    def find_spec(self, fullname, path=None, target=None):
        if fullname != "ultralytics.cfg":
            return None
        Other.asked += 1
        if Other.busy:
            return None
        Other.busy = True
        try:
            return importlib.util.find_spec(fullname)
        finally:
            Other.busy = False
{place}
import ultralytics.cfg
assert calls == ["ultralytics.cfg"] and Other.asked == 2 and ultralytics.cfg.executed == 1
""",
    )


def test_finders_of_the_old_protocol_and_foreign_loaders_are_left_alone(path: Path) -> None:
    check(
        path,
        FAKE_PATCH
        + """
import importlib.machinery, yolo_prune
class Old:
    def find_module(self, fullname, path=None): return None
class Memory:
    def create_module(self, spec): return None
    def exec_module(self, module): module.executed = "in memory"
class New:
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "ultralytics.cfg":
            return importlib.machinery.ModuleSpec(fullname, Memory())
sys.meta_path[1:1] = [Old(), New()]
import warnings
warnings.simplefilter("ignore", ImportWarning)
import ultralytics.cfg
assert ultralytics.cfg.executed == "in memory" and ultralytics.cfg.patched == 1
assert type(ultralytics.cfg.__loader__) is Memory
""",
    )


def test_a_lazy_loader_patches_on_first_use(path: Path) -> None:
    check(
        path,
        FAKE_PATCH
        + """
import importlib.util, yolo_prune
spec = importlib.util.find_spec("ultralytics.cfg")
spec.loader = importlib.util.LazyLoader(spec.loader)
module = importlib.util.module_from_spec(spec)
sys.modules["ultralytics.cfg"] = module
spec.loader.exec_module(module)
assert calls == []
assert module.executed == 1 and calls == ["ultralytics.cfg"]
""",
    )


def test_import_is_cheap_and_needs_nothing_but_the_package(path: Path) -> None:
    out = check(
        path,
        """
        import os, sys
        before = set(sys.modules)
        import yolo_prune
        print(*sorted(set(sys.modules) - before))
        """,
    )
    assert out.split() == ["__future__", "yolo_prune", "yolo_prune._startup"]


def test_public_names_are_listed_and_loaded_on_first_use(path: Path) -> None:
    # The face `yolo_prune.api` is a stand-in here.
    check(
        path,
        """
        import sys, types, yolo_prune
        assert set(yolo_prune.__all__) <= set(dir(yolo_prune))
        api = sys.modules["yolo_prune.api"] = types.ModuleType("yolo_prune.api")
        api.plan = lambda: "the function"
        assert yolo_prune.plan() == "the function"
        from yolo_prune import plan, PruneError, __version__
        assert plan is api.plan and issubclass(PruneError, Exception) and __version__.count(".") == 2
        try:
            yolo_prune.prun
        except AttributeError as error:
            assert str(error) == "module 'yolo_prune' has no attribute 'prun'"
        else:
            raise SystemExit("no error")
        """,
    )
