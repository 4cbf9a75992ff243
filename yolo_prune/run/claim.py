# SPDX-License-Identifier: AGPL-3.0-or-later
"""One run at a time in a folder: two runs would replace each other's checkpoints, and neither would notice."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import IO

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
        """Claim a folder.

        Raises:
            RunError: If another run has claimed this folder.
        """
        self._file: IO[str] | None = None
        with contextlib.suppress(OSError):  # a folder that cannot be written: the run will say so
            self._file = (folder / FILE).open("w", encoding="utf-8")
        if self._file is None or fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            self._file.close()
            raise RunError(
                f"Another run is writing into {folder}. Wait until it has ended, or give this run another name=."
            ) from e
        except OSError:  # this folder has no locks
            return

    def release(self) -> None:
        """The run has ended."""
        if self._file and not self._file.closed:
            name = Path(self._file.name)
            self._file.close()
            name.unlink(missing_ok=True)
