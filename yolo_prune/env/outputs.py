# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where results go: checked before the work, and another folder after it, so that a result is not lost."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from yolo_prune.env.files import remove, unused
from yolo_prune.env.terminal import LOGGING_NAME
from yolo_prune.errors import OutputError

LOGGER = logging.getLogger(LOGGING_NAME)
MB = 10**6
LITTLE = 4 * MB  # enough for texts and small files


def check(path: str | Path, size: int = 0) -> None:
    """Before any work: refuse a file that cannot be written. Nothing is left on the disk.

    Args:
        path: the file.
        size: the number of bytes that it will have at least, if this is known.

    Raises:
        OutputError: If the file cannot be written. The message says why.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise OutputError(f"'{path}' is a folder. Pass the name of a file.")
    _check(f"'{path}' cannot be written", Path(os.path.realpath(path)), size)


def check_folder(folder: str | Path, size: int = 0) -> None:
    """Before any work: refuse a folder in which no file can be written. A missing folder is not made yet.

    Raises:
        OutputError: If no file of `size` bytes can be written there. The message says why.
    """
    _check(f"Nothing can be written in '{folder}'", Path(os.path.realpath(folder)) / "any", size)


def _check(problem: str, path: Path, size: int) -> None:
    try:
        folder = next((place for place in path.parents if os.path.lexists(place)), None)
        if folder is None:
            raise OutputError(f"{problem}: there is no '{path.anchor}'. Choose another folder.")
        if not folder.is_dir():
            raise OutputError(f"{problem}: '{folder}' is not a folder. Choose another folder.")
        _try(folder)
        if path.exists() and not os.access(path, os.W_OK):
            raise OutputError(f"{problem}: it is protected. Choose another name, or allow writing.")
        free = shutil.disk_usage(folder).free
    except OSError as e:
        raise OutputError(f"{problem}: {reason(e)}. Choose another folder.") from e
    if free < size:
        raise OutputError(
            f"{problem}: the disk has {free / MB:.1f} MB of free space, and {size / MB:.1f} MB are needed. Free some "
            "space, or choose another folder."
        )


def deliver(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Write a result of long work. If this fails, write it into the first folder that can be written.

    The folders are that of `path` (with another name), the current folder, and the home folder. No existing file is
    replaced there. One line of the log says why, and where the result is.

    Args:
        path: the file to write.
        write: writes the result to a path; it raises `OSError` if this fails.

    Returns:
        The path of the file that was written.

    Raises:
        OutputError: If none of the folders can be written.
    """
    path = Path(path)
    try:
        write(path)
        return path
    except OSError as e:
        why = f"'{path}' could not be written: {reason(e)}."
    for folder in _usable(lambda: path.parent, Path.cwd, Path.home):
        try:
            kept = unused(folder / path.name)
            write(kept)
        except OSError:
            continue  # the next folder
        LOGGER.error(f"yolo-prune: {why} The result is in '{kept}' instead.")
        return kept
    raise OutputError(
        f"{why} Neither could a file in the current folder or in the home folder, so the result is lost. Free some "
        "space, and run the command again."
    )


def scratch(size: int = LITTLE, prefix: str = "yolo-prune-") -> tempfile.TemporaryDirectory[str]:
    """A temporary folder: in the system's folder for temporary files, the current folder, or the home folder.

    The first of them is used that has `size` bytes of free space.

    Raises:
        OutputError: If none of them can be used.
    """
    for parent in _usable(lambda: Path(tempfile.gettempdir()), Path.cwd, Path.home):
        try:
            check_folder(parent, size)
            return tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True)
        except (OSError, OutputError):
            continue  # the next folder
    raise OutputError(
        f"There is no folder with {size / MB:.0f} MB of free space for temporary files. Free some space, or set the "
        "environment variable TMPDIR to a folder that has it."
    )


def reason(error: OSError) -> str:
    """What the system says, without the path."""
    return error.strerror or str(error) or type(error).__name__


def _try(folder: Path) -> None:
    """Write a small file, because permissions alone do not tell whether a mounted folder can be written."""
    trial = folder / f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        with trial.open("xb") as file:
            file.write(b"yolo-prune")
    finally:
        remove(trial)


def _usable(*places: Callable[[], Path]) -> Iterator[Path]:
    """The folders that can be named at all: the current folder may be deleted, and there may be no home folder."""
    for place in places:
        with contextlib.suppress(OSError, RuntimeError):
            yield place()
