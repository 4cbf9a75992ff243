# SPDX-License-Identifier: AGPL-3.0-or-later
"""Files that are complete or not there at all."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from yolo_prune.env import files

FULL_DISK = """
import resource, signal, sys
from yolo_prune.env.files import write_bytes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
for size in (3_000, 100_000):
    try:
        write_bytes(sys.argv[1], b"a" * size)
    except OSError:
        continue
    sys.exit("the disk is not full")
"""


def test_a_file_is_replaced_by_its_new_content(tmp_path: Path) -> None:
    path = tmp_path / "new folder/report.json"
    for content in ("old", "new"):
        assert files.write_text(path, content) == path
        assert path.read_text() == content
    assert list(path.parent.iterdir()) == [path]


def test_a_file_has_the_permissions_of_any_other_and_the_process_keeps_its_own(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        written = files.write_bytes(tmp_path / "file", b"")
        ordinary = tmp_path / "ordinary"
        ordinary.touch()
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], check=True)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interruption_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = files.write_text(tmp_path / "file", "old")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_names_that_python_cannot_decode_are_written(tmp_path: Path) -> None:
    names = [name.decode("ascii", "surrogateescape") for name in ("細胞.pt".encode(), b"\xff.pt")]
    assert files.write_text(tmp_path / "page.html", " ".join(names)).read_text(encoding="utf-8") == "細胞.pt \ufffd.pt"


def refusing(code: int) -> Any:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


def test_a_folder_that_cannot_rename_gets_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = files.write_text(tmp_path / "file", "old")
    monkeypatch.setattr(os, "replace", refusing(errno.EPERM))
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_way_stays(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="file"):
        files.write_text(tmp_path / "file", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_rename_on_a_full_disk_is_not_tried_as_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = files.write_text(tmp_path / "file", "old")
    monkeypatch.setattr(os, "replace", refusing(errno.ENOSPC))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_only_complete_file_is_kept_if_a_copy_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = files.write_text(tmp_path / "file", "old")
    monkeypatch.setattr(os, "replace", refusing(errno.EPERM))
    monkeypatch.setattr(files.shutil, "copyfileobj", refusing(errno.EIO))
    with pytest.raises(files.TornError, match=r"the complete content is in '.*\.file\..*\.tmp'"):
        files.write_text(path, "new")
    (kept,) = tmp_path.glob(".file.*.tmp")
    assert kept.read_text() == "new"
