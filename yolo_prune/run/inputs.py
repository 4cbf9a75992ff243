# SPDX-License-Identifier: AGPL-3.0-or-later
"""Checkpoints that a run reads and would overwrite: they are copied before the first epoch."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultralytics.utils import LOGGER

from yolo_prune.env import ranks
from yolo_prune.env.files import unused, write_bytes
from yolo_prune.env.log import PREFIX
from yolo_prune.env.releases import save_yaml
from yolo_prune.errors import RunError
from yolo_prune.recover.rewind import FILE as EARLY

READ = ("model", "pretrained", "distill_model")
"""Arguments of `train` that can name a checkpoint."""
WRITTEN = ("last.pt", "best.pt", "epoch*.pt", "round*.pt", "state-*.pt", EARLY)
"""Patterns of the files in the folder `weights` that a run writes, replaces or deletes."""


def protect(trainer: Any) -> None:
    """Copy the checkpoints that this run reads and would overwrite, and let its arguments name the copies.

    A copy is called `input-<name>.pt`. An existing file is not replaced, unless it has the same content: then it is
    used as it is. A resumed run continues in its own folder, so nothing is copied.

    Raises:
        RunError: If the run trains on several devices. Ultralytics then deletes the whole folder first.
    """
    if trainer.args.resume or not ranks.first():
        return
    folder = Path(trainer.wdir).resolve()
    read = {key: path for key in READ if (path := _file(trainer.args, key))}
    if getattr(trainer, "ddp", False):
        _refuse_inside(folder.parent, read)
        return
    endangered = {key: path for key, path in read.items() if path.parent == folder and any(map(path.match, WRITTEN))}
    for key, path in endangered.items():
        copy = _copy(path)
        setattr(trainer.args, key, str(copy))
        LOGGER.info(f"{PREFIX}{path} is in the folder of this run, which replaces it. Its copy is {copy}.")
    if endangered:
        save_yaml(trainer.save_dir / "args.yaml", vars(trainer.args))


def _refuse_inside(folder: Path, read: Mapping[str, Path]) -> None:
    for key, path in read.items():
        if folder in path.parents:
            raise RunError(
                f"{key}={path} is in the folder of this run. A run on several devices begins with an empty folder, so "
                "the file would be deleted. Give this run another name=, or copy the file."
            )


def _file(args: Any, key: str) -> Path | None:
    value = getattr(args, key, None)
    path = Path(value).resolve() if isinstance(value, str | Path) and str(value).endswith(".pt") else None
    return path if path and path.is_file() else None


def _copy(path: Path) -> Path:
    """The path of the copy, which is written if there is none yet."""

    def differs(copy: Path) -> bool:
        return copy.exists() and not filecmp.cmp(path, copy, shallow=False)

    copy = unused(path.with_name(f"input-{path.name}"), taken=differs)
    return copy if copy.exists() else write_bytes(copy, path.read_bytes())
