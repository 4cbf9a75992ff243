# SPDX-License-Identifier: AGPL-3.0-or-later
"""Write files so that they are never incomplete, in every folder that can rename a file.

Some folders refuse a part of this: mounted buckets, exFAT or network shares may not flush, rename or delete a file.
What is optional is done where it can be done, and is never the reason to stop.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

LOST = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""Errors that mean that the content did not reach the disk. Any other error of a flush means that it cannot flush."""
LONGEST = 40  # characters of a file's name in the name of its temporary file; file systems limit the length of names


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write `data` to a temporary name in the same folder, then rename it to `path`. A link stays a link."""
    path = Path(path)
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    target.parent.mkdir(parents=True, exist_ok=True)
    # `open` gives the file ordinary permissions; the files of `tempfile` are private
    temporary = target.parent / f".{target.name[:LONGEST]}.{uuid.uuid4().hex[:8]}.tmp"
    file = temporary.open("xb")  # "x": it fails if another process has made this file
    try:
        with file:
            file.write(data)
            _flush(file)
        move(temporary, target)  # after the file is closed: Windows cannot rename an open file
    except TornError:
        raise  # the temporary file is now the only complete one
    except BaseException as e:  # closing fails, too, if the disk is full
        remove(temporary)
        if isinstance(e, OSError):
            e.filename = str(path)
        raise
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8; see `write_bytes`.

    In names of files, Python keeps bytes that it cannot decode, for example with `LC_ALL=C`. They are written as they
    are if they are UTF-8, and as question marks if not.
    """
    data = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").encode()
    return write_bytes(path, data)


class TornError(OSError):
    """A file that was being replaced by a copy, because it could not be renamed, and the copy failed half-way."""


def remove(path: Path) -> None:
    """Delete a file that is not needed any more. In a folder that refuses this, it stays."""
    with contextlib.suppress(OSError):
        path.unlink()


def move(source: str | Path, target: str | Path) -> None:
    """Rename a file or a folder; an existing file is replaced. If this is refused, the content is copied instead.

    Raises:
        TornError: If copying failed after it had begun: only `source` is complete.
        OSError: If `target` cannot be written; it is as before.
    """
    source, target = Path(source), Path(target)
    try:
        os.replace(source, target)
    except OSError as e:
        if e.errno in LOST:
            raise
        if source.is_dir():
            target.mkdir()  # fails if there is such a folder, as renaming does
            for inside in source.iterdir():
                move(inside, target / inside.name)
            source.rmdir()
        else:
            _copy(source, target)
            remove(source)


def link(source: Path, target: Path) -> None:
    """Let `target` be the same file as `source`, by a link if the folder can have one, else as a copy.

    Raises:
        FileExistsError: If there is such a file. To write into it could change the file to which it is a link.
    """
    if os.path.lexists(target):
        raise FileExistsError(f"{target} is there already")
    for make in (os.link, os.symlink):
        with contextlib.suppress(OSError, NotImplementedError):
            make(source.resolve(), target)
            return
    _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    """Copy the content, without the permissions, which cannot be set everywhere."""
    with source.open("rb") as old, target.open("wb") as new:
        try:
            shutil.copyfileobj(old, new)
            new.flush()
        except OSError as e:
            raise TornError(e.errno, f"{e.strerror}; the complete content is in '{source}'", str(target)) from e


def unused(path: Path, taken: Callable[[Path], bool] = os.path.lexists) -> Path:
    """`path`, or a path like it with a number, that is not taken: there is no file."""
    number, free = 1, path
    while taken(free):
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def _flush(file: BinaryIO) -> None:
    """Flush a file to the disk, if the folder can do this. All programs see the complete file either way."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as e:
        if e.errno in LOST:
            raise


class WholeFile(type(Path())):  # type: ignore[misc]  # PosixPath or WindowsPath; Path itself only from Python 3.12 on
    """A path whose `write_bytes` never leaves an incomplete file. Paths joined to it have the same class."""

    def write_bytes(self, data: bytes) -> int:
        """Call the function `write_bytes` of this module."""
        write_bytes(Path(self), data)
        return len(data)
