# SPDX-License-Identifier: AGPL-3.0-or-later
"""Hides the output of exporters and runtimes, which write a lot: in Python, in C, and in programs that they start."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import IO, Any

from ultralytics import utils
from ultralytics.utils import LOGGER, checks

from yolo_prune.env import outputs
from yolo_prune.errors import BenchError, PruneError

_ONE_AT_A_TIME = threading.RLock()
"""A use restores the descriptors that it found at its start, so uses in two threads must not overlap."""


@contextlib.contextmanager
def quietly(what: str) -> Iterator[None]:
    """Hide the output of this thread and of the programs that it starts. After an error, the last lines are shown.

    A training may be running, so other threads can still print and log. Two kinds of their output are hidden, because a
    process has only one standard output: output from C code, and output through a stream that was opened before, such
    as the handler of another logger.

    Ultralytics cannot install packages inside this context.

    Args:
        what: the activity, for the error message.

    Raises:
        BenchError: If an error that is not a PruneError is raised inside; the message has the last lines of output.
    """
    with _ONE_AT_A_TIME, outputs.scratch() as folder, tempfile.TemporaryFile(dir=folder) as log:
        try:
            with _installing_nothing(), _root_handlers_kept(), _descriptors_to(log) as terminals:
                with _this_thread_to(log, terminals):
                    yield
        except PruneError:
            raise
        except Exception as e:
            log.seek(0)
            lines = log.read().decode("utf-8", "replace").strip().splitlines()[-5:]
            said = "".join(f"\n  {line}" for line in lines)
            raise BenchError(f"{what} failed: {type(e).__name__}: {e}{said}") from e


@contextlib.contextmanager
def _installing_nothing() -> Iterator[None]:
    before = {module: module.AUTOINSTALL for module in (utils, checks) if hasattr(module, "AUTOINSTALL")}
    try:
        for module in before:
            module.AUTOINSTALL = False
        yield
    finally:
        for module, value in before.items():
            module.AUTOINSTALL = value


@contextlib.contextmanager
def _root_handlers_kept() -> Iterator[None]:
    """Remove handlers that are added inside: the first `logging.warning` adds one, for a stream that is soon closed."""
    before = list(logging.root.handlers)
    try:
        yield
    finally:
        logging.root.handlers[:] = before


@contextlib.contextmanager
def _descriptors_to(log: IO[bytes]) -> Iterator[dict[int, int]]:
    """Redirect standard output and error of the process to a file.

    Yields:
        `{1: ..., 2: ...}`: copies of the descriptors from before the redirection. A closed one is left out.
    """
    _flush()
    terminals = {number: os.dup(number) for number in (1, 2) if _is_open(number)}
    try:
        for number in terminals:
            os.dup2(log.fileno(), number)
        yield terminals
    finally:
        _flush()
        for number, terminal in terminals.items():
            os.dup2(terminal, number)
            os.close(terminal)


@contextlib.contextmanager
def _this_thread_to(log: IO[bytes], terminals: dict[int, int]) -> Iterator[None]:
    """Send the logs of this thread to a file, and drop what it prints. Other threads write to their usual streams.

    The logs show why something failed. Most printed lines are progress bars, which would hide the logs.
    """
    loggers = (logging.root, LOGGER)
    handlers = [h for logger in loggers for h in logger.handlers if type(h) is logging.StreamHandler]
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        kept = io.TextIOWrapper(io.FileIO(log.fileno(), "w", closefd=False), "utf-8", "replace", write_through=True)

        def route(stream: Any, own: IO[str]) -> Any:
            stream_by_thread = _ByThread(stream, own, _past_descriptors(stream, terminals))
            stack.callback(stream_by_thread.end)
            return stream_by_thread

        for handler in handlers:
            stack.callback(handler.setStream, handler.stream)
            handler.setStream(route(handler.stream, kept))
        stack.enter_context(contextlib.redirect_stdout(route(sys.stdout, nowhere)))
        stack.enter_context(contextlib.redirect_stderr(route(sys.stderr, nowhere)))
        yield


class _ByThread:
    """A stream with one target for this thread and another target for all other threads.

    Other code may hold this object longer than the context. After `end` it behaves like the original stream.
    """

    def __init__(self, stream: Any, own: IO[str], theirs: Any) -> None:
        self._stream, self._own, self._theirs = stream, own, theirs
        self._thread: int | None = threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own if threading.get_ident() == self._thread else self._theirs, name)

    def end(self) -> None:
        self._thread, self._theirs = None, self._stream


def _past_descriptors(stream: Any, terminals: dict[int, int]) -> Any:
    """A stream to the target that `stream` had before the redirection; `stream` itself if it was not redirected."""
    number: int | None = None
    with contextlib.suppress(Exception):  # streams of a notebook have no descriptor
        number = stream.fileno()
    if number not in terminals:
        return stream
    raw = io.FileIO(terminals[number], "w", closefd=False)
    return io.TextIOWrapper(raw, stream.encoding or "utf-8", stream.errors or "replace", write_through=True)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # streams of a notebook may have no `flush`
            stream.flush()
