# SPDX-License-Identifier: AGPL-3.0-or-later
"""A terminal that cannot show something ends no command, and nothing is lost that was measured."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_data import short_checkpoint
from ultralytics.utils import LOGGER, TQDM

from yolo_prune import _patch, cli
from yolo_prune.env import log, terminal
from yolo_prune.measure.quiet import quietly

COMMAND = [sys.executable, "-m", "yolo_prune.cli"]


@pytest.fixture
def model(clean_cwd: Path) -> str:
    return short_checkpoint(clean_cwd).rename("модель.pt").name


@pytest.fixture
def pipe_without_reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Standard output is a pipe whose reader has ended, as after `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    kept = os.dup(1)
    os.dup2(writer, 1)
    os.close(writer)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), "utf-8"))
    yield
    os.dup2(kept, 1)
    os.close(kept)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "ascii:strict"])
@pytest.mark.parametrize(
    ("words", "file"),
    [
        ("plan model=модель.pt imgsz=64 recipe=gentle", "план.json"),
        ("apply model=модель.pt imgsz=64 recipe=gentle", "срез.pt"),
        ("bench model=модель.pt imgsz=64 format=torch repeats=1 threads=1", "время.json"),
        ("schema", "схема.json"),
    ],
    ids=lambda text: text.split()[0],
)
def test_names_that_the_terminal_cannot_show_are_escaped(
    words: str, file: str, encoding: str, model: str, clean_cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.BytesIO()
    name, _, errors = encoding.partition(":")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, name, errors or None, write_through=True))
    assert cli.main([*words.split(), f"save={file}"]) == 0
    assert Path(file).stat().st_size
    assert f"saved {file}".encode(name, "backslashreplace") in out.getvalue()


def test_the_console_script_escapes_on_a_real_terminal(model: str, clean_cwd: Path) -> None:
    words = ["bench", f"model={model}", "imgsz=64", "format=torch", "repeats=1", "threads=1", "save=время.json"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*COMMAND, *words], env=environment, capture_output=True, check=False)
    assert done.returncode == 0
    assert done.stderr == b""
    assert json.loads(Path("время.json").read_text(encoding="utf-8"))["rows"][0]["model"] == "модель.pt"
    assert rb"\u043c\u043e\u0434\u0435\u043b\u044c.pt" in done.stdout


def test_a_command_whose_reader_has_ended_saves_its_result(
    model: str, clean_cwd: Path, pipe_without_reader: None
) -> None:
    words = ["bench", f"model={model}", "imgsz=64", "format=torch", "repeats=1", "threads=1", "save=b.json"]
    assert cli.main(words) == 0
    assert json.loads(Path("b.json").read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("flags", [[], ["-u"]], ids=["buffered", "unbuffered"])
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_output_that_is_lost_is_told_and_files_are_written(flags: list[str], clean_cwd: Path) -> None:
    command = [sys.executable, *flags, *COMMAND[1:]]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command, "schema"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 1
        message = "yolo-prune schema: standard output cannot be written: No space left on device."
        assert done.stderr.startswith(message)
        assert len(done.stderr.splitlines()) == 1
        subprocess.run([*command, "schema", "save=s.json"], stdout=full, stderr=subprocess.PIPE, check=False)
    assert json.loads(Path("s.json").read_text(encoding="utf-8"))


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_a_command_without_standard_output_works(model: str, clean_cwd: Path) -> None:
    words = f"plan model={model} imgsz=64 recipe=gentle data=none.yaml"
    done = subprocess.run(["sh", "-c", f'{sys.executable} "$@" >&-', "sh", *COMMAND[1:], *words.split()],
                          stderr=subprocess.PIPE, text=True, check=False)  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "none.yaml" in done.stderr
    words = f"bench model={model} imgsz=64 format=torch repeats=1 threads=1 save=b.json"
    done = subprocess.run(["sh", "-c", f'{sys.executable} "$@" >&- 2>&- <&-', "sh", *COMMAND[1:], *words.split()],
                          check=False)  # fmt: skip
    assert done.returncode == 0
    assert json.loads(Path("b.json").read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("command", ["/usr/bin/yolo", "yolo.exe"])
def test_a_run_of_yolo_goes_on_when_its_reader_has_ended(
    command: str, pipe_without_reader: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [command, "train"])
    handler = LOGGER.handlers[0]
    monkeypatch.setattr(handler, "stream", sys.stdout)
    before = sys.stdout
    print("printed before, and still in the buffer of the stream")
    with _patch._as_a_run():
        assert list(TQDM(range(3))) == [0, 1, 2]
        LOGGER.info("細胞")
        print("細胞", flush=True)
    assert sys.stdout is before
    assert handler.stream is before  # type: ignore[attr-defined]
    assert "Logging error" not in capfd.readouterr().err


def test_a_python_script_keeps_its_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    strict = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", strict)
    with pytest.raises(UnicodeEncodeError), _patch._as_a_run():
        print("細胞")


def test_without_a_terminal_bars_and_silence_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert list(log.bar("scoring")(range(3))) == [0, 1, 2]
    with quietly("Nothing"):
        pass


def test_silence_leaves_closed_descriptors_closed() -> None:
    script = (
        "import os; from yolo_prune.measure.quiet import quietly; os.close(1)\n"
        "with quietly('A look'): pass\n"
        "try: os.fstat(1)\n"
        "except OSError: raise SystemExit(7)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 7


def test_a_stream_of_a_notebook_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pane:
        """A stream without encoding, buffer and descriptor."""

        text = ""

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None:
            pass

    pane: Any = Pane()
    monkeypatch.setattr(sys, "stdout", pane)
    with terminal.forgiving():
        print("細胞")
        assert sys.stdout is pane
    assert pane.text == "細胞\n"
