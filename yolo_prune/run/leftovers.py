# SPDX-License-Identifier: AGPL-3.0-or-later
"""Files that a run leaves if it is killed in its last moments, when it is complete but has not tidied its folder."""

from __future__ import annotations

from pathlib import Path

from ultralytics.utils import LOGGER

from yolo_prune.env.log import PREFIX
from yolo_prune.env.releases import load_checkpoint
from yolo_prune.errors import PruneError
from yolo_prune.recover.rewind import FILE as EARLY
from yolo_prune.report import Report
from yolo_prune.run.resume import STATES

PATTERNS = (*STATES, f"weights/{EARLY}")
"""Files that only a resumed run needs, and incomplete files."""


def delete(folder: Path) -> None:
    """Delete the files in the folder of a finished run that only a resumed run would need.

    The run is finished if its report says so, and its last.pt cannot be resumed any more.
    """
    left = [path for pattern in PATTERNS for path in folder.glob(pattern)]
    if not left or not _finished(folder):
        return
    try:
        for path in left:
            path.unlink(missing_ok=True)
    except OSError as e:
        LOGGER.warning(f"{PREFIX}files of the finished run in {folder} that nobody needs could not be deleted: {e}")


def _finished(folder: Path) -> bool:
    try:
        _, last = load_checkpoint(folder / "weights/last.pt")
        return Report.load(folder).status == "finished" and last.get("optimizer") is None
    except PruneError:  # no run of ours, or a file is missing
        return False
