# SPDX-License-Identifier: AGPL-3.0-or-later
"""Write files so that they are never incomplete."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write `data` to a temporary name in the same folder, then rename it to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # `open` gives the file ordinary permissions; the files of `tempfile` are private
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    file = temporary.open("xb")  # "x": it fails if another process has made this file
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # after the file is closed: Windows cannot rename an open file
    except BaseException:  # closing fails, too, if the disk is full
        temporary.unlink(missing_ok=True)
        raise
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8; see `write_bytes`."""
    return write_bytes(path, text.encode("utf-8"))


class WholeFile(type(Path())):  # type: ignore[misc]  # PosixPath or WindowsPath; Path itself only from Python 3.12 on
    """A path whose `write_bytes` never leaves an incomplete file. Paths joined to it have the same class."""

    def write_bytes(self, data: bytes) -> int:
        """Call the function `write_bytes` of this module."""
        write_bytes(Path(self), data)
        return len(data)
