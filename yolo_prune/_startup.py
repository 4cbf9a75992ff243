# SPDX-License-Identifier: AGPL-3.0-or-later
"""Patch Ultralytics when it is imported, and not before.

The start-up files `yolo_prune.pth` and, from Python 3.15 on, `yolo_prune.start` call `install` at every start
of Python. `install` puts one finder on `sys.meta_path`. For the two modules in `TARGETS`, this finder asks the other
finders for the module, and calls `yolo_prune._patch.apply` after the module has been executed. wrapt's post-import
hooks work in the same way. The environment variable `YOLO_PRUNE_HOOK=0` turns the hook off.

Only `sys` and `os` are imported at the top, because every Python has loaded these two already.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # replaces `typing.TYPE_CHECKING`: importing typing would slow down every start of Python
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

OPT_OUT = "YOLO_PRUNE_HOOK"
TARGETS = ("ultralytics.cfg", "ultralytics.engine.model")

_started = False  # a start-up file has called install()
_seen: dict[str, ModuleType] = {}  # targets that were patched, or whose patch failed
_errors: dict[str, str] = {}


class HookState:
    """What the hook has done in this process.

    This is a plain class, because importing `dataclasses` would slow down every start of Python.

    Attributes:
        started: A start-up file called `install`, so that `yolo train` is patched too.
        installed: The finder is on `sys.meta_path`.
        opted_out: The environment says `YOLO_PRUNE_HOOK=0`.
        patched: The names of the loaded modules that were patched.
        errors: The reason for each module that could not be patched.
    """

    __slots__ = ("errors", "installed", "opted_out", "patched", "started")

    def __init__(
        self,
        *,
        started: bool,
        installed: bool,
        opted_out: bool,
        patched: tuple[str, ...],
        errors: dict[str, str],
    ) -> None:
        self.started = started
        self.installed = installed
        self.opted_out = opted_out
        self.patched = patched
        self.errors = errors

    def __repr__(self) -> str:
        return f"HookState({', '.join(f'{name}={getattr(self, name)!r}' for name in self.__slots__)})"


class _Finder:
    """Finds the target modules with the finders that come after this one, and wraps the loaders of these modules."""

    def __init__(self) -> None:
        self._searching: set[tuple[int, str]] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in TARGETS:
            return None
        from _thread import get_ident

        # A later finder may search sys.meta_path from the top, and would then call this finder again.
        search = (get_ident(), fullname)
        if search in self._searching:
            return None
        self._searching.add(search)
        try:
            spec = self._find_behind(fullname, path, target)
        finally:
            self._searching.discard(search)
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]  # importlib.abc is slow to import
        return spec

    def _find_behind(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        finders = list(sys.meta_path)
        if self in finders:
            del finders[: finders.index(self) + 1]
        for finder in finders:
            find_spec = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec(fullname, path, target) if find_spec is not None else None
            if spec is not None:
                return spec
        return None


class _Loader:
    """Replaces the loader of a module until the module is executed, then patches the module."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        if name == "_loader":  # not set yet, for example while this object is being copied
            raise AttributeError(name)
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None and spec.loader is self:  # type: ignore[comparison-overlap]
            spec.loader = self._loader
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self._loader
        self._loader.exec_module(module)
        _patch_target(module)


def install(*, force: bool = False, imported: bool = False) -> None:
    """Patch Ultralytics when it is imported, or now if it is imported already. A second call changes nothing.

    Args:
        force: Install even if `YOLO_PRUNE_HOOK=0` is set. The `yolo-prune` command does this.
        imported: The call comes from `import yolo_prune`, not from a start-up file.
    """
    global _started
    _started = _started or not (force or imported)
    if _opted_out() and not force:
        return
    if not _installed():
        sys.meta_path.insert(0, _Finder())
    for name in TARGETS:
        module = sys.modules.get(name)
        if module is None or _seen.get(name) is module:
            continue
        # A module that is still being executed has nothing to patch yet. The finder's loader patches it afterwards.
        if not getattr(module.__spec__, "_initializing", False):
            _patch_target(module)


def state() -> HookState:
    """What the hook has done so far in this process."""
    loaded = tuple(name for name in TARGETS if name in _seen and sys.modules.get(name) is _seen[name])
    return HookState(
        started=_started,
        installed=_installed(),
        opted_out=_opted_out(),
        patched=tuple(name for name in loaded if name not in _errors),
        errors=dict(_errors),
    )


def _opted_out() -> bool:
    return os.environ.get(OPT_OUT, "").strip().lower() in {"0", "false", "no", "off"}


def _installed() -> bool:
    # The name is compared, not the class, because this module may have been loaded again since.
    return any(type(finder).__module__ == __name__ for finder in sys.meta_path)


def _patch_target(module: ModuleType) -> None:
    """Patch one target module. If the patch fails, the error is recorded and reported as a warning, not raised."""
    name = module.__name__
    _seen[name] = module
    try:
        from yolo_prune._patch import apply

        apply(module)
    except Exception as error:
        _errors[name] = f"{type(error).__name__}: {error}"
        _warn(
            f"yolo-prune: the pruning keys callbacks= and recipe= are not available: {name} could not be "
            f"patched ({_errors[name]}). Everything else in Ultralytics works as before. "
            f"`yolo-prune doctor` shows the details; {OPT_OUT}=0 in the environment turns this warning off."
        )
    else:
        _errors.pop(name, None)


def _warn(message: str) -> None:
    import warnings

    try:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    except RuntimeWarning:  # this process turns warnings into errors; `import ultralytics` must work nevertheless
        print(message, file=sys.stderr)
