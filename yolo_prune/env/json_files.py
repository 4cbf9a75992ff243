# SPDX-License-Identifier: AGPL-3.0-or-later
"""Reading JSON files that a user may have cut short, edited or mixed up with others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from yolo_prune.errors import PruneError

MAX_BYTES = 64 * 2**20  # far more than any file of ours takes; without a bound a wrong file would fill the memory

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class JsonFile:
    """A kind of file, and what is said where one of them cannot be used.

    The messages name the file, the damage, and what to do; `{path}` and `{why}` stand for the first two.

    Attributes:
        what: it is, with its article.
        unreadable: the message where the file cannot be read.
        broken: where it is no JSON.
        wrong: where it is JSON of something else.
        missing: where there is no such file; empty: that of `unreadable`.
        error: that is raised.
    """

    what: str
    unreadable: str
    broken: str
    wrong: str = ""
    missing: str = ""
    error: type[PruneError] = PruneError

    def read(self, path: str | Path) -> Any:
        """What a file holds, as plain data.

        Raises:
            PruneError: If it cannot be read, is too large, or is no JSON; of the class `error`.
        """
        try:
            with Path(path).open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
        except (OSError, ValueError) as e:  # ValueError: a name that no file can have
            message = self.missing if isinstance(e, FileNotFoundError) and self.missing else self.unreadable
            raise self.error(message.format(path=path, why=getattr(e, "strerror", None) or e)) from e
        if len(raw) > MAX_BYTES:
            raise self.error(f"'{path}' is larger than {MAX_BYTES // 2**20} MiB; that is not {self.what}.")
        try:
            return json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as e:
            raise self.error(self.broken.format(path=path, why=e)) from e

    def load(self, path: str | Path, model: type[M]) -> M:
        """What a file holds, checked by the model of its content.

        Raises:
            PruneError: As `read`, and if the content is something else; names the first thing that is wrong.
        """
        data = self.read(path)
        try:
            return model.model_validate(data)
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(map(str, first["loc"])) or "file"
            raise self.error(self.wrong.format(path=path, why=f"{where}: {first['msg']}")) from e
