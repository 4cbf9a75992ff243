# SPDX-License-Identifier: AGPL-3.0-or-later
"""One run at a time in a folder: two runs would replace each other's checkpoints, and neither would notice."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import IO

from yolo_prune.env.files import remove
from yolo_prune.errors import RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE = ".running.lock"


class Claim:
    """The right of this process to write into the folder of a run.

    The system takes it back when the process ends, also after a kill. Folders that cannot lock a file are not
    protected, and neither are folders on Windows.
    """

    def __init__(self, folder: Path) -> None:
        """Claim a folder, if it exists.

        Raises:
            RunError: If another run has claimed this folder.
        """
        self._path = folder / FILE
        self._file = _locked(self._path) if fcntl else None
        _held.add(self)

    def __bool__(self) -> bool:
        """Whether the folder is claimed."""
        return self._file is not None

    def release(self) -> None:
        """The run has ended."""
        if self._file:
            remove(self._path)  # before it is closed: the next run must not lock a file that is then deleted
            self.forget()

    def forget(self) -> None:
        """Close the file without an effect on the claims of other processes."""
        if self._file:
            self._file.close()
            self._file = None


def _locked(path: Path) -> IO[str] | None:
    """The locked file; None if there is no such folder, or if it has no locks."""
    try:
        file = path.open("a", encoding="utf-8")
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.close()
        raise RunError(
            f"Another run is writing into {path.parent}. Wait until it has ended, or give this run another name=."
        ) from e
    except OSError:
        file.close()
        remove(path)
        return None
    return file


_held: weakref.WeakSet[Claim] = weakref.WeakSet()


def _forget_in_child() -> None:
    """A process that was forked for loading images may live longer than the run, and must not hold its claim."""
    for claim in list(_held):
        claim.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
