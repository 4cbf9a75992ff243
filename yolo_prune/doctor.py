# SPDX-License-Identifier: AGPL-3.0-or-later
"""What `yolo-prune doctor` says: is the start-up hook active, which versions are here, were they tested."""

from __future__ import annotations

import platform
import re
import site
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path

from yolo_prune import _startup
from yolo_prune._version import __version__

TESTED = {
    "ultralytics": ("8.3.0", "8.4.190"),
    "torch": ("2.4.0", "2.15.0"),
}
"""Oldest and newest version, both included, that this release of yolo-prune was tested with."""

_REQUIRED = ("ultralytics", "torch", "pydantic")
_FOR_EXPORT = ("onnx", "onnxruntime")
_COMMAND = "use `yolo-prune train` instead of `yolo train`"
_INSTEAD = f"{_COMMAND}, or `import yolo_prune` in Python before training"


@dataclass(frozen=True)
class Component:
    """An installed, or missing, distribution.

    Attributes:
        name: As `pip` knows it.
        version: What is installed, `None` if nothing is.
        required: Whether yolo-prune cannot work without it.
    """

    name: str
    version: str | None
    required: bool = True

    @property
    def tested(self) -> bool | None:
        """Whether the version lies in the tested range; `None` if there is no range, or no version."""
        if self.version is None or self.name not in TESTED:
            return None
        oldest, newest = TESTED[self.name]
        release = _release(self.version)
        return release is not None and _numbers(oldest) <= release <= _numbers(newest)

    @property
    def missing(self) -> bool:
        """Whether it is required and not there."""
        return self.required and self.version is None


@dataclass(frozen=True)
class Hook:
    """The start-up hook as this process has it.

    Attributes:
        active: A plain `yolo train ... callbacks=prune` works in this environment.
        summary: That in a sentence, with the reason if it does not.
        remedy: What to do about it; empty if active.
        files: The start-up files found where Python looks for them.
        patched: The Ultralytics modules that are patched.
    """

    active: bool
    summary: str
    remedy: str = ""
    files: tuple[Path, ...] = ()
    patched: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """All that `yolo-prune doctor` knows."""

    hook: Hook
    components: tuple[Component, ...]
    python: str = field(default_factory=platform.python_version)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is missing or was not tested, each with its remedy."""
        return tuple(_warnings_of(self.components))

    @property
    def exit_code(self) -> int:
        """0 if `yolo train ... callbacks=prune` works here, 1 if not. An untested version is no failure."""
        return int(not self.hook.active or any(c.missing for c in self.components))


def untested() -> list[str]:
    """Installed versions that this release was not tested with, each as a warning."""
    components = (Component(name, _version_of(name)) for name in TESTED)
    return [warning for component in components if component.tested is False for warning in _warnings_of([component])]


def diagnose() -> Diagnosis:
    """Look at this process and its environment. Imports Ultralytics, which takes seconds; changes nothing."""
    components = tuple(
        Component(name, _version_of(name), required=name in _REQUIRED) for name in (*_REQUIRED, *_FOR_EXPORT)
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
    """Import what the hook patches; returns why that failed, or an empty string."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a failing patch is reported from the hook's state
            for name in _startup.TARGETS:
                import_module(name)
    except Exception as error:  # whatever a broken installation raises, the doctor has to say it
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
        remedy = "mend that first; `python -c 'import ultralytics.engine.model'` shows all of it"
        if ultralytics.missing:
            remedy = f"pip install 'ultralytics>={TESTED['ultralytics'][0]}'"
    elif state.errors:
        summary = f"not active: {'; '.join(f'{name}: {why}' for name, why in state.errors.items())}"
        remedy = _remedy_of_failed_patch(ultralytics)
    elif not state.started:
        summary, remedy = _why_not_started(files)
    elif missed:
        summary = f"not active: another import hook loaded {' and '.join(missed)} past this one"
        remedy = _INSTEAD
    else:
        summary = "active: `yolo train ... callbacks=prune` works in this environment"
    return Hook(not remedy, summary, remedy, files, state.patched)


def _remedy_of_failed_patch(ultralytics: Component) -> str:
    if ultralytics.tested:
        return "install yolo-prune anew; if that does not help, report it with this text"
    return f"pip install 'ultralytics=={TESTED['ultralytics'][1]}', the newest version that was tested"


def _why_not_started(files: tuple[Path, ...]) -> tuple[str, str]:
    """The reason why no start-up file has called the hook, and the remedy."""
    if sys.flags.no_site:
        return "not active: `python -S` reads no start-up files", f"start Python without -S, or {_INSTEAD}"
    if files:
        return (
            "not active: there is a start-up file, but this Python was started before it or did not read it",
            f"start Python (or the notebook's kernel) anew, or {_INSTEAD}",
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


def _version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _warnings_of(components: Sequence[Component]) -> Iterator[str]:
    for component in components:
        name = component.name
        if component.missing:
            yield f"{name} is not installed, and yolo-prune needs it: pip install {name}"
        elif component.tested is False:
            oldest, newest = TESTED[name]
            span = oldest if oldest == newest else f"{oldest} to {newest}"
            yield (
                f"{name} {component.version}: this yolo-prune was tested with {span}. It may well work; "
                f"if it does not, pip install '{name}=={newest}'"
            )
    if absent := [c.name for c in components if not c.required and c.version is None]:
        yield f"not installed: {', '.join(absent)}; for ONNX export, pip install 'yolo-prune[export]'"


def _release(version: str) -> tuple[int, ...] | None:
    """The numbers of a final release, without its local part; `None` for development and pre-releases."""
    match = re.fullmatch(r"(\d+(?:\.\d+)*)(?:\.post\d+)?(?:\+.*)?", version)
    return _numbers(match[1]) if match else None


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in release.split("."))
