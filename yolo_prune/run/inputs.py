# SPDX-License-Identifier: AGPL-3.0-or-later
"""Checkpoints that a run reads and would overwrite: they are copied before the first epoch."""

from __future__ import annotations

import filecmp
from itertools import chain, count
from pathlib import Path
from typing import Any

from ultralytics.utils import LOGGER, YAML

from yolo_prune.env import ranks
from yolo_prune.env.files import write_bytes
from yolo_prune.env.log import PREFIX
from yolo_prune.recover.rewind import FILE as EARLY

READ = ("model", "pretrained", "distill_model")
"""Arguments of `train` that can name a checkpoint."""
WRITTEN = ("last.pt", "best.pt", "epoch*.pt", "round*.pt", "state-*.pt", EARLY)
"""Patterns of the files in the folder `weights` that a run writes, replaces or deletes."""


def keep(trainer: Any) -> None:
    """Copy the checkpoints that this run reads and would overwrite, and let its arguments name the copies.

    A copy is called `input-<name>.pt`. An existing file is not replaced, unless it has the same content: then it is
    used as it is. A resumed run continues in its own folder, so nothing is copied.
    """
    if trainer.args.resume or not ranks.first():
        return
    folder = Path(trainer.wdir).resolve()
    endangered = {key: path for key in READ if (path := _file(trainer.args, key)) and _is_written(path, folder)}
    for key, path in endangered.items():
        copy = _copy(path)
        setattr(trainer.args, key, str(copy))
        LOGGER.info(f"{PREFIX}{path} is in the folder of this run, which replaces it. Its copy is {copy}.")
    if endangered:
        YAML.save(trainer.save_dir / "args.yaml", vars(trainer.args))


def _file(args: Any, key: str) -> Path | None:
    value = getattr(args, key, None)
    path = Path(value).resolve() if isinstance(value, str | Path) and str(value).endswith(".pt") else None
    return path if path and path.is_file() else None


def _is_written(path: Path, folder: Path) -> bool:
    return path.parent == folder and any(map(path.match, WRITTEN))


def _copy(path: Path) -> Path:
    """The path of the copy, which is written if there is none yet."""
    numbers = chain([""], (f"-{number}" for number in count(2)))
    names = (path.with_name(f"input-{path.stem}{number}.pt") for number in numbers)
    copy = next(name for name in names if not name.exists() or filecmp.cmp(path, name, shallow=False))
    return copy if copy.exists() else write_bytes(copy, path.read_bytes())
