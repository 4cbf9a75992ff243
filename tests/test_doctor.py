# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from yolo_prune import doctor
from yolo_prune._startup import OPT_OUT, TARGETS, HookState
from yolo_prune._version import __version__
from yolo_prune.env import versions

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = {
    "ultralytics": "8.4.190",
    "torch": "2.15.0+cpu",
    "torch-pruning": "1.6.1",
    "pydantic": "2.14.3",
    "onnx": "1.23.2",
    "onnxruntime": "1.32.0",
}

Diagnose = Callable[..., doctor.Diagnosis]


@pytest.fixture
def diagnose(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Diagnose:
    """`diagnose` in a made-up environment: healthy, but for what the keywords change."""

    def in_environment(
        *,
        versions: dict[str, str | None] | None = None,
        files: tuple[str, ...] = ("yolo_prune.pth",),
        import_error: str = "",
        **state: object,
    ) -> doctor.Diagnosis:
        for name in files:
            (tmp_path / name).touch()
        healthy: dict[str, Any] = {"started": True, "installed": True, "opted_out": False}
        healthy |= {"patched": TARGETS, "errors": {}, **state}
        installed = {**VERSIONS, **(versions or {})}
        monkeypatch.setattr("yolo_prune._startup.state", lambda: HookState(**healthy))
        monkeypatch.setattr(doctor, "version_of", installed.get)
        monkeypatch.setattr(doctor, "_import_targets", lambda: import_error)
        monkeypatch.setattr("site.getsitepackages", lambda: [str(tmp_path)])
        monkeypatch.setattr("site.ENABLE_USER_SITE", False)
        return doctor.diagnose()

    return in_environment


def test_a_healthy_environment(diagnose: Diagnose, tmp_path: Path) -> None:
    diagnosis = diagnose()
    text = doctor.render(diagnosis)
    assert diagnosis.exit_code == 0
    assert diagnosis.warnings == ()
    assert text.startswith(f"yolo-prune {__version__}\n")
    assert "active: `yolo train ... callbacks=prune` works in this environment" in text
    assert f"start-up file: {tmp_path / 'yolo_prune.pth'}" in text
    assert f"patched: {', '.join(TARGETS)}" in text
    assert "torch          2.15.0+cpu     tested\n" in text
    assert "torch-pruning  1.6.1          tested\n" in text
    assert "To do" not in text


@pytest.mark.parametrize(
    ("environment", "summary", "remedy"),
    [
        (
            {"opted_out": True, "installed": False, "patched": ()},
            f"off: the environment says {OPT_OUT}=0",
            f"unset {OPT_OUT}, or use `yolo-prune train` instead of `yolo train`",
        ),
        (
            {"import_error": "ModuleNotFoundError: gone", "versions": {"ultralytics": None}},
            "not active: Ultralytics cannot be imported (ModuleNotFoundError: gone)",
            "pip install 'ultralytics>=8.3.0'",
        ),
        (
            {"import_error": "OSError: libtorch.so"},
            "not active: Ultralytics cannot be imported (OSError: libtorch.so)",
            "repair Ultralytics first; `python -c 'import ultralytics.engine.model'` shows the whole error",
        ),
        (
            {
                "errors": {TARGETS[0]: "AttributeError: x"},
                "patched": (),
                "versions": {"ultralytics": "9.0.0"},
            },
            "not active: ultralytics.cfg: AttributeError: x",
            "pip install 'ultralytics==8.4.190', the newest version that was tested",
        ),
        (
            {"errors": {TARGETS[0]: "AttributeError: x"}, "patched": ()},
            "not active: ultralytics.cfg: AttributeError: x",
            "install yolo-prune again; if that does not help, report the problem with this text",
        ),
        (
            {"started": False},
            "not active: there is a start-up file, but this Python started before the file was installed, or did not "
            "read the file",
            "restart Python (or the notebook's kernel), or use `yolo-prune train`",
        ),
        (
            {"started": False, "files": ()},
            "not active: no start-up file is installed where this Python looks for one",
            "pip install yolo-prune into this environment",
        ),
        (
            {"patched": TARGETS[:1]},
            "not active: another import hook loaded ultralytics.engine.model without calling this one",
            "use `yolo-prune train` instead of `yolo train`",
        ),
    ],
)
def test_why_the_hook_is_not_active(
    diagnose: Diagnose, environment: dict[str, object], summary: str, remedy: str
) -> None:
    diagnosis = diagnose(**environment)
    text = doctor.render(diagnosis)
    assert diagnosis.exit_code == 1
    assert f"hook      {summary}\n" in text
    assert f"To do: {remedy}" in text


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ("8.4.190", True),
        ("8.4.190.post1", True),
        ("8.4.190+local", True),
        ("8.2.103", False),
        ("8.4.1900", False),
        ("8.10.0", False),
        ("8.4.190.dev1", False),
        ("8.4.190rc1", False),
        ("unknown", False),
        (None, None),
    ],
)
def test_which_versions_count_as_tested(version: str | None, tested: bool | None) -> None:
    assert doctor.Component("ultralytics", version).tested is tested


def test_a_component_without_a_range_is_neither_tested_nor_untested() -> None:
    assert doctor.Component("pydantic", "2.0").tested is None


def test_an_untested_version_is_a_warning_and_no_failure(diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(versions.TESTED, "torch", ("2.10.0", "2.15.0"))
    diagnosis = diagnose(versions={"torch": "2.16.0", "ultralytics": "8.5.0"})
    assert diagnosis.exit_code == 0
    assert diagnosis.warnings == (
        "ultralytics 8.5.0: this yolo-prune was tested with 8.3.0 to 8.4.190. It may well work; "
        "if it does not, pip install 'ultralytics==8.4.190'",
        "torch 2.16.0: this yolo-prune was tested with 2.10.0 to 2.15.0. It may well work; "
        "if it does not, pip install 'torch==2.15.0'",
    )
    assert "torch          2.16.0         not tested\n" in doctor.render(diagnosis)


def test_one_version_of_torch_pruning_is_tested(diagnose: Diagnose) -> None:
    assert diagnose(versions={"torch-pruning": "1.7.0"}).warnings == (
        "torch-pruning 1.7.0: this yolo-prune was tested with 1.6.1. It may well work; "
        "if it does not, pip install 'torch-pruning==1.6.1'",
    )


def test_a_missing_requirement_fails_and_a_missing_extra_does_not(diagnose: Diagnose) -> None:
    extra = diagnose(versions={"onnx": None, "onnxruntime": None})
    assert extra.exit_code == 0
    assert extra.warnings == ("not installed: onnx, onnxruntime; for ONNX export, pip install 'yolo-prune[export]'",)
    for name in ("torch-pruning", "pydantic"):
        core = diagnose(versions={name: None})
        assert core.exit_code == 1
        assert core.warnings == (f"{name} is not installed, and yolo-prune needs it: pip install {name}",)
        assert f"{name:15}not installed\n" in doctor.render(core)


def test_where_nothing_at_all_is_installed(tmp_path: Path) -> None:
    """The real thing under `python -S`, where only this package and the standard library exist."""
    code = """
from yolo_prune import doctor
from yolo_prune.env import versions
diagnosis = doctor.diagnose()
print(doctor.render(diagnosis))
raise SystemExit(diagnosis.exit_code)
"""
    env = {k: v for k, v in os.environ.items() if k != OPT_OUT}
    command = [sys.executable, "-S", "-c", code]
    result = subprocess.run(
        command,
        env={**env, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (1, "")
    assert "Ultralytics cannot be imported (ModuleNotFoundError: No module named 'ultralytics')" in result.stdout
    assert "warning   torch is not installed, and yolo-prune needs it: pip install torch" in result.stdout


def test_no_site_is_named_as_the_reason(diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = SimpleNamespace(flags=SimpleNamespace(no_site=1), version_info=sys.version_info)
    monkeypatch.setattr("yolo_prune.doctor.sys", bare)
    assert diagnose(started=False).hook.summary == "not active: `python -S` reads no start-up files"


@pytest.mark.parametrize(
    ("python", "read"),
    [((3, 14), ["yolo_prune.pth"]), ((3, 15), ["yolo_prune.pth", "yolo_prune.start"])],
)
def test_start_files_count_from_python_3_15_on(
    diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch, python: tuple[int, int], read: list[str]
) -> None:
    monkeypatch.setattr("yolo_prune.doctor.sys", SimpleNamespace(flags=sys.flags, version_info=python))
    hook = diagnose(files=("yolo_prune.pth", "yolo_prune.start")).hook
    assert [file.name for file in hook.files] == read
