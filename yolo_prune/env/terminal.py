# SPDX-License-Identifier: AGPL-3.0-or-later
"""Standard output and error that never end a command: what they cannot show is escaped, or dropped."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from yolo_prune.errors import PruneError

STREAMS = {1: "stdout", 2: "stderr"}
LOGGING_NAME = "ultralytics"  # the name of `ultralytics.utils.LOGGER`, which is slow to import


class _Descriptor(io.FileIO):
    """A descriptor that drops everything after its first error, for example because the reader of a pipe has ended."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as e:
            self.error = e
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # also for the programs that this process starts
            os.close(nowhere)
            return len(data)


@contextlib.contextmanager
def forgiving() -> Iterator[None]:
    """Inside, output that cannot be written raises no error: the work goes on, and its result is saved.

    Raises:
        PruneError: At the end, if output was lost for another reason than that its reader has ended.
    """
    _open_what_is_closed()
    descriptors = {number: _Descriptor(number, "w", closefd=False) for number in STREAMS}
    with contextlib.ExitStack() as stack:
        for number, name in STREAMS.items():
            before = getattr(sys, name)
            if hasattr(before, "errors") and hasattr(before, "reconfigure"):
                stack.callback(before.reconfigure, errors=before.errors)
            stream = _forgiving(before, descriptors[number])
            stack.callback(setattr, sys, name, before)
            setattr(sys, name, stream)
            for handler in logging.getLogger(LOGGING_NAME).handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                    stack.callback(handler.setStream, before)
                    handler.setStream(stream)
            stack.callback(stream.flush)
        yield
        sys.stdout.flush()
        lost = descriptors[1].error
        if lost and not isinstance(lost, BrokenPipeError):
            raise PruneError(f"standard output cannot be written: {lost.strerror}. All files were written.")


def _open_what_is_closed() -> None:
    """Open the null device in the place of standard streams that are closed, so that no file gets their numbers."""
    for number in (0, *STREAMS):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free


def _forgiving(stream: Any, descriptor: _Descriptor) -> Any:
    """A stream to the target of `stream`. A stream of another kind, as in a notebook or a test, is returned itself."""
    if stream is None:  # `pythonw`, or it was closed when Python started
        return open(os.devnull, "w", encoding="utf-8")  # it may be used until the process ends
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # with `python -u` there is no buffer between
    if type(raw) is io.FileIO and raw.fileno() == descriptor.fileno():
        with contextlib.suppress(OSError):  # what was printed before is lost, and Python says so at the end
            stream.flush()
        how = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        return io.TextIOWrapper(io.BufferedWriter(descriptor), stream.encoding, "backslashreplace", **how)
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return stream
