# SPDX-License-Identifier: AGPL-3.0-or-later
"""Read JSON files that may be incomplete, edited by a user, or of another kind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from yolo_prune.errors import PruneError

MAX_BYTES = 64 * 2**20  # far more than any file of ours; without a bound, a wrong file could fill the memory

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class JsonFile:
    """A kind of JSON file, and the error messages for a file that cannot be used.

    The messages name the file, the problem, and what to do. `{path}` and `{why}` stand for the file and the problem.

    Attributes:
        what: the kind of file, with its article.
        unreadable: the message if the file cannot be read.
        broken: the message if the file is not JSON.
        wrong: the message if the file is JSON of another kind.
        missing: the message if there is no such file; if empty, `unreadable` is used.
        error: the class of the error.
    """

    what: str
    unreadable: str
    broken: str
    wrong: str = ""
    missing: str = ""
    error: type[PruneError] = PruneError

    def read(self, path: str | Path) -> Any:
        """The content of a file, as plain data.

        Raises:
            PruneError: If the file cannot be read, is too large, or is not JSON. Its class is `error`.
        """
        try:
            with Path(path).open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
        except (OSError, ValueError) as e:  # ValueError: the name is not possible for a file
            message = self.missing if isinstance(e, FileNotFoundError) and self.missing else self.unreadable
            raise self.error(message.format(path=path, why=getattr(e, "strerror", None) or e)) from e
        if len(raw) > MAX_BYTES:
            raise self.error(f"'{path}' is larger than {MAX_BYTES // 2**20} MiB, so it is not {self.what}.")
        try:
            return json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as e:
            raise self.error(self.broken.format(path=path, why=e)) from e

    def load(self, path: str | Path, model: type[M]) -> M:
        """The content of a file, checked by a pydantic model.

        Raises:
            PruneError: As in `read`, or if the content does not fit the model. The message names the first problem.
        """
        data = self.read(path)
        try:
            return model.model_validate(data)
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(map(str, first["loc"])) or "file"
            raise self.error(self.wrong.format(path=path, why=f"{where}: {first['msg']}")) from e
