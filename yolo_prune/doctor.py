# SPDX-License-Identifier: AGPL-3.0-or-later
"""What `yolo-prune doctor` reports: the state of the start-up hook, and whether the versions were tested."""

from __future__ import annotations

import platform
import site
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from yolo_prune import _startup
from yolo_prune._version import __version__
from yolo_prune.env.versions import PACKAGES, TESTED, Component, version_of, warnings_of

_REQUIRED = (*PACKAGES, "pydantic")
_FOR_EXPORT = ("onnx", "onnxruntime")
_COMMAND = "use `yolo-prune train` instead of `yolo train`"
_INSTEAD = f"{_COMMAND}, or `import yolo_prune` in Python before training"


@dataclass(frozen=True)
class Hook:
    """The state of the start-up hook in this process.

    Attributes:
        active: Whether `yolo train ... callbacks=prune` works in this environment.
        summary: A sentence that says whether the hook is active, with the reason if it is not.
        remedy: What the user can do; empty if the hook is active.
        files: The start-up files in the folders where Python looks for them.
        patched: The Ultralytics modules that are patched.
    """

    active: bool
    summary: str
    remedy: str = ""
    files: tuple[Path, ...] = ()
    patched: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """Everything that `yolo-prune doctor` reports."""

    hook: Hook
    components: tuple[Component, ...]
    python: str = field(default_factory=platform.python_version)

    @property
    def warnings(self) -> tuple[str, ...]:
        """One text for each package that is missing or was not tested, with its remedy."""
        return tuple(warnings_of(self.components))

    @property
    def exit_code(self) -> int:
        """0 if `yolo train ... callbacks=prune` works here, 1 if not. An untested version does not matter."""
        return int(not self.hook.active or any(c.missing for c in self.components))


def diagnose() -> Diagnosis:
    """Examine this process and its environment, and change nothing. Importing Ultralytics takes some seconds."""
    components = tuple(
        Component(name, version_of(name), required=name in _REQUIRED) for name in (*_REQUIRED, *_FOR_EXPORT)
    )
    return Diagnosis(hook=_examine_hook(components[0], _import_targets()), components=components)


def render(diagnosis: Diagnosis) -> str:
    """The diagnosis as text for a terminal, without a newline at the end."""
    hook = diagnosis.hook
    lines = [f"yolo-prune {__version__}", "", f"hook      {hook.summary}"]
    if hook.remedy:
        lines.append(f"          To do: {hook.remedy}.")
    lines += [f"          start-up file: {file}" for file in hook.files]
    if hook.patched:
        lines.append(f"          patched: {', '.join(hook.patched)}")
    lines += ["", f"versions  {'python':15}{diagnosis.python}"]
    for component in diagnosis.components:
        note = {True: "tested", False: "not tested", None: ""}[component.tested]
        lines.append(f"          {component.name:15}{component.version or 'not installed':15}{note}".rstrip())
    if diagnosis.warnings:
        lines += ["", *(f"warning   {warning}" for warning in diagnosis.warnings)]
    return "\n".join(lines)


def _import_targets() -> str:
    """Import the modules that the hook patches. Returns the reason if this fails, else an empty string."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a failing patch is reported from the hook's state
            for name in _startup.TARGETS:
                import_module(name)
    except Exception as error:  # a broken installation can raise any error, and the doctor must report it
        return f"{type(error).__name__}: {error}"
    return ""


def _examine_hook(ultralytics: Component, import_error: str) -> Hook:
    state = _startup.state()
    files = tuple(_startup_files())
    missed = [name for name in _startup.TARGETS if name not in state.patched]
    remedy = ""
    if state.opted_out:
        summary = f"off: the environment says {_startup.OPT_OUT}=0"
        remedy = f"unset {_startup.OPT_OUT}, or {_COMMAND}"
    elif import_error:
        summary = f"not active: Ultralytics cannot be imported ({import_error})"
        remedy = "repair Ultralytics first; `python -c 'import ultralytics.engine.model'` shows the whole error"
        if ultralytics.missing:
            remedy = f"pip install 'ultralytics>={TESTED['ultralytics'][0]}'"
    elif state.errors:
        summary = f"not active: {'; '.join(f'{name}: {why}' for name, why in state.errors.items())}"
        remedy = _remedy_of_failed_patch(ultralytics)
    elif not state.started:
        summary, remedy = _why_not_started(files)
    elif missed:
        summary = f"not active: another import hook loaded {' and '.join(missed)} without calling this one"
        remedy = _INSTEAD
    else:
        summary = "active: `yolo train ... callbacks=prune` works in this environment"
    return Hook(not remedy, summary, remedy, files, state.patched)


def _remedy_of_failed_patch(ultralytics: Component) -> str:
    if ultralytics.tested:
        return "install yolo-prune again; if that does not help, report the problem with this text"
    return f"pip install 'ultralytics=={TESTED['ultralytics'][1]}', the newest version that was tested"


def _why_not_started(files: tuple[Path, ...]) -> tuple[str, str]:
    """The reason why no start-up file has called the hook, and the remedy."""
    if sys.flags.no_site:
        return "not active: `python -S` reads no start-up files", f"start Python without -S, or {_INSTEAD}"
    if files:
        return (
            "not active: there is a start-up file, but this Python started before the file was installed, or did not "
            "read the file",
            f"restart Python (or the notebook's kernel), or {_INSTEAD}",
        )
    return (
        "not active: no start-up file is installed where this Python looks for one",
        "pip install yolo-prune into this environment (a folder on PYTHONPATH, or one filled with "
        f"`pip install --target`, is not enough), or {_INSTEAD}",
    )


def _startup_files() -> Iterator[Path]:
    folders = site.getsitepackages()
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    names = ["yolo_prune.pth"] + ["yolo_prune.start"] * (sys.version_info >= (3, 15))
    for folder in dict.fromkeys(folders):
        yield from (Path(folder, name) for name in names if Path(folder, name).is_file())
