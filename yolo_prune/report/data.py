# SPDX-License-Identifier: AGPL-3.0-or-later
"""`prune.json`: everything a pruning run measured, as plain data.

A value that was not measured is None, in memory and in the file; NaN and infinities are stored as None too.
FLOPs are 2 x MACs as Ultralytics prints them, sizes are megabytes (1e6 bytes), times are seconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from yolo_prune._version import __version__
from yolo_prune.env.files import write_text
from yolo_prune.env.image_size import ImageSize, plain, stored_size
from yolo_prune.env.json_files import JsonFile
from yolo_prune.errors import PruneError

FORMAT = 1
FILE_NAME = "prune.json"
_WHERE = f"Pass the {FILE_NAME} of a run that was trained with callbacks=prune, or its folder."
FILE = JsonFile(
    "a pruning report",
    missing=f"No pruning report at {{path}}. {_WHERE}",
    unreadable=f"Cannot read the pruning report {{path}}: {{why}}. {_WHERE}",
    broken="{path} is not complete JSON ({why}): the file is incomplete or was edited. Restore it from a copy, or "
    "resume the run, which writes it again.",
)


def _plain(value: object) -> object:
    """`value` with numpy and torch scalars as numbers, paths as strings and non-finite floats as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if getattr(value, "ndim", None) == 0 and callable(item := getattr(value, "item", None)):
        value = item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


_Float = Annotated[float | None, BeforeValidator(_plain)]
_Int = Annotated[int | None, BeforeValidator(_plain)]
_Count = Annotated[int, BeforeValidator(_plain)]
_Text = Annotated[str, BeforeValidator(_plain)]
Size = Annotated[ImageSize, BeforeValidator(lambda value: stored_size(value, error=ValueError)), PlainSerializer(plain)]
_Mapping = Annotated[dict[str, Any], BeforeValidator(_plain)]


def first_known(*values: float | None) -> float | None:
    """The first value that is not None; None if there is no such value."""
    return next((value for value in values if value is not None), None)


class _Row(BaseModel):
    """Base of the rows: mutable, checked on construction and on assignment. Keys of newer releases are ignored."""

    model_config = ConfigDict(extra="ignore", validate_assignment=True)


class Figures(_Row):
    """Cost and fitness of one model. `classes` holds the AP (mAP50-95) of every class that was validated.

    `zeros` is the share of the weights of its layers that are zero, and `zipped_mb` the size of the compressed
    checkpoint. Both are None if no weight was set to zero.
    """

    flops: _Float = None
    params: _Int = None
    size_mb: _Float = None
    zipped_mb: _Float = None
    zeros: _Float = None
    latency_ms: _Float = None
    fitness: _Float = None
    classes: Annotated[dict[str, float], BeforeValidator(_plain)] = Field(default_factory=dict)


class RoundFitness(_Row):
    """Fitness before a cut, right after the cut, after recovery, and before the next cut (`end`)."""

    before: _Float = None
    cut: _Float = None
    recovered: _Float = None
    end: _Float = None


class Proof(_Row):
    """The proof of a cut.

    `error` is the largest relative difference between masked reference and pruned model, and `effect` is the largest
    relative difference between masked reference and uncut model.
    """

    error: _Float = None
    effect: _Float = None
    seconds: _Float = None


class LatencyRow(_Row):
    """Latency of the cut model and of the dense model, measured in turn: medians in ms, and their ratio.

    `interval` is the confidence interval of the ratio, and `place` names the runtime and the device.
    """

    place: str = ""
    imgsz: Size | None = None
    dense_ms: _Float = None
    ms: _Float = None
    ratio: _Float = None
    interval: Annotated[list[float], BeforeValidator(_plain)] = Field(default_factory=list)

    @property
    def runtime(self) -> str:
        """The name of the runtime."""
        return self.place.split()[0] if self.place else ""

    def __str__(self) -> str:
        """The latency as text."""
        return f"{self.ratio:.3f} of the dense model's {self.dense_ms:.2f} ms ({self.place})"


class RoundRow(_Row):
    """One round. `epoch` is the 0-based epoch at whose start the cut is made, and `target` is the fraction to keep.

    `zeros` is the share of zeros afterwards among the weights that may be zero; None without zeros.

    `held` says whether the fitness stayed within the limit; it is None without a limit.
    """

    number: _Count
    epoch: _Count
    target: Annotated[dict[str, float], BeforeValidator(_plain)] = Field(default_factory=dict)
    flops: _Float = None
    params: _Int = None
    size_mb: _Float = None
    zeros: _Float = None
    plan: str | None = None
    held: bool | None = None
    latency: LatencyRow | None = None
    proof: Proof | None = None
    fitness: RoundFitness = Field(default_factory=RoundFitness)
    seconds: _Float = None


class EpochRow(_Row):
    """One finished epoch, 1-based as in results.csv, with the cost of the model that was trained."""

    epoch: _Count
    fitness: _Float = None
    flops: _Float = None
    params: _Int = None


class LayerRow(_Row):
    """Output channels of one convolution in the dense and in the pruned model, and the share of its zeros."""

    name: str
    dense: _Count
    pruned: _Int = None
    zeros: _Float = None
    protected: bool = False


class ProtectedRow(_Row):
    """Layers whose outputs no round cuts, and the reason."""

    layers: list[str]
    reason: str


class Report(_Row):
    """The content of `prune.json`. It can be filled in and saved again and again during a run.

    `kept_classes` says which classes are left if some were removed.

    `arguments` holds the training arguments that differ from Ultralytics' defaults and have no key of their own.
    """

    version: Literal[1] = 1  # FORMAT
    yolo_prune: str = __version__
    versions: dict[str, str] = Field(default_factory=dict)
    recipe: _Mapping = Field(default_factory=dict)
    model: _Text = ""
    data: _Text = ""
    imgsz: Size | None = None
    epochs: _Int = None
    arguments: _Mapping = Field(default_factory=dict)
    status: Literal["running", "finished", "failed"] = "running"
    error: str | None = None
    dense: Figures = Field(default_factory=Figures)
    pruned: Figures = Field(default_factory=Figures)
    rounds: list[RoundRow] = Field(default_factory=list)
    epochs_log: list[EpochRow] = Field(default_factory=list)
    layers: list[LayerRow] = Field(default_factory=list)
    protected: list[ProtectedRow] = Field(default_factory=list)
    kept_classes: _Text = ""

    @property
    def timed(self) -> LatencyRow | None:
        """The measured latency after the last cut that was not rolled back, if the target was a latency."""
        return next((row.latency for row in reversed(self.rounds) if row.held is not False), None)

    def to_dict(self) -> dict[str, Any]:
        """This report as plain data, ready for JSON."""
        return {key: _plain(value) for key, value in self.model_dump().items()}

    def save(self, path: str | Path) -> Path:
        """Write this report to `path`. The file always holds the complete old or the complete new report."""
        return write_text(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report from a file, or from the `prune.json` of a run's folder.

        Raises:
            PruneError: The file is missing, incomplete, of another format version, or not a report.
        """
        path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME
        elif path.is_file() and path.suffix != ".json":
            run = next((folder for folder in path.parents if (folder / FILE_NAME).is_file()), None)
            raise PruneError(f"'{path}' is not a report. Pass the folder of the run" + (f": {run}" if run else "."))
        return cls._from_data(FILE.read(path), path)

    @classmethod
    def _from_data(cls, data: object, path: Path) -> Report:
        if not isinstance(data, dict) or "version" not in data:
            raise PruneError(f"{path} is not a pruning report: it has no 'version'. {_WHERE}")
        if data["version"] != FORMAT:
            raise PruneError(
                f"{path} is a report of format version {data['version']!r}, written by yolo-prune "
                f"{data.get('yolo_prune', '(unknown)')}; this yolo-prune {__version__} reads version "
                f"{FORMAT}. Read the report with the yolo-prune that wrote it, or with a newer yolo-prune."
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, item['loc']))}: {item['msg']} (got {item['input']!r:.80})"
                for item in error.errors()[:5]
            )
            raise PruneError(f"{path} is a damaged report: {wrong}. {_WHERE}") from error
