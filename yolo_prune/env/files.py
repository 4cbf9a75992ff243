# SPDX-License-Identifier: AGPL-3.0-or-later
"""Writing files so that they appear whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write `data` to a temporary name in the same folder, then rename it to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # opened as any file is, so that it gets the mode of an ordinary one; the files of `tempfile` are private
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    with temporary.open("xb") as file:  # and is nobody else's
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            file.close()  # Windows renames no open files
            os.replace(temporary, path)
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8; see `write_bytes`."""
    return write_bytes(path, text.encode("utf-8"))


class WholeFile(type(Path())):  # type: ignore[misc]  # PosixPath or WindowsPath; Path itself only from Python 3.12 on
    """A path whose `write_bytes` writes all or nothing; what is joined to it is one, too."""

    def write_bytes(self, data: bytes) -> int:
        """See the function of this name."""
        write_bytes(Path(self), data)
        return len(data)
