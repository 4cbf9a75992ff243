# SPDX-License-Identifier: AGPL-3.0-or-later
"""Silence around exporters and runtimes, which write a lot, in Python, in C and from programs that they start."""

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

from yolo_prune.errors import BenchError, PruneError


@contextlib.contextmanager
def quietly(what: str) -> Iterator[None]:
    """Keep what is written meanwhile, by this thread and by programs that it starts, and show it if this fails.

    A training goes on around this, so what its other threads print or log appears as ever. Only what they write in C,
    past Python, is kept as well: exporters write there, too, and a process has one standard output.

    Ultralytics is kept from installing packages as well.

    Raises:
        BenchError: For anything that is raised inside and is no PruneError; with the last lines that were written.
    """
    with tempfile.TemporaryFile() as log:
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
    """A first `logging.warning` makes a handler, here for a stream that is soon closed."""
    before = list(logging.root.handlers)
    try:
        yield
    finally:
        logging.root.handlers[:] = before


@contextlib.contextmanager
def _descriptors_to(log: IO[bytes]) -> Iterator[dict[int, int]]:
    """Send standard output and error of the process to a file; yields `{1: ..., 2: ...}`, where they really lead."""
    _flush()
    terminals = {number: os.dup(number) for number in (1, 2)}
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
    """Send what this thread logs to a file, and what it prints nowhere; what others write goes where it would go.

    Logs tell why something failed. What is printed is progress bars, which would crowd them out.
    """
    loggers = (logging.root, LOGGER)
    handlers = [h for logger in loggers for h in logger.handlers if type(h) is logging.StreamHandler]
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        kept = io.TextIOWrapper(io.FileIO(log.fileno(), "w", closefd=False), "utf-8", "replace", write_through=True)

        def route(stream: Any, own: IO[str]) -> Any:
            found = _ByThread(stream, own, _past_descriptors(stream, terminals))
            stack.callback(found.end)
            return found

        for handler in handlers:
            stack.callback(handler.setStream, handler.stream)
            handler.setStream(route(handler.stream, kept))
        stack.enter_context(contextlib.redirect_stdout(route(sys.stdout, nowhere)))
        stack.enter_context(contextlib.redirect_stderr(route(sys.stderr, nowhere)))
        yield


class _ByThread:
    """A stream that this thread writes to one place, and every other thread to another.

    Others may keep it for longer than it is needed: after its end it is the stream that it stood for.
    """

    def __init__(self, stream: Any, own: IO[str], theirs: Any) -> None:
        self._stream, self._own, self._theirs = stream, own, theirs
        self._thread: int | None = threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own if threading.get_ident() == self._thread else self._theirs, name)

    def end(self) -> None:
        self._thread, self._theirs = None, self._stream


def _past_descriptors(stream: Any, terminals: dict[int, int]) -> Any:
    """A stream that leads where `stream` did before its descriptor was redirected; itself where it has no such one."""
    number: int | None = None
    with contextlib.suppress(Exception):  # a notebook's streams have no descriptor
        number = stream.fileno()
    if number not in terminals:
        return stream
    raw = io.FileIO(terminals[number], "w", closefd=False)
    return io.TextIOWrapper(raw, stream.encoding or "utf-8", stream.errors or "replace", write_through=True)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # a notebook's streams may have none
            stream.flush()
