# SPDX-License-Identifier: AGPL-3.0-or-later
"""`bench.json`: how long exported models take, and how well they agree with the checkpoint, as plain data.

Times are milliseconds, boxes are pixels of the image that the model sees, FLOPs are 2 x MACs of one image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from yolo_prune._version import __version__
from yolo_prune.env.files import write_text
from yolo_prune.env.json_files import JsonFile
from yolo_prune.errors import BenchError, ParityError
from yolo_prune.report.data import _Count, _Float, _Int, _plain, _Row
from yolo_prune.report.table import MISSING, align, number

FORMAT = 1
BENCH = "bench.json"
FILE = JsonFile(
    "a measurement",
    missing="There is no measurement at {path}.",
    unreadable="The measurement {path} cannot be read: {why}.",
    broken="{path} is not complete JSON: {why}. Measure again.",
    wrong="{path} is not a measurement: {why}. Measure again.",
)
_Real = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PRECISIONS = {None: "fp32", 32: "fp32", 16: "fp16", 8: "int8"}
"""What Ultralytics calls `quantize`, in words."""


class Tolerance(_Row):
    """The largest differences that an export is allowed; None: any.

    Attributes:
        outputs: of any raw output, as a share of the largest of its kind (boxes, scores, ...).
        boxes: of any side of a detection's box, in pixels.
        scores: of any detection's score.
        quality: by which the mAP may be lower or higher.
    """

    outputs: _Float = None
    boxes: _Float = None
    scores: _Float = None
    quality: _Float = None


TOLERANCES = {
    "fp32": Tolerance(outputs=1e-3, boxes=0.5, scores=0.005, quality=0.002),
    "fp16": Tolerance(outputs=0.06, boxes=2.0, scores=0.06, quality=0.01),
    "bf16": Tolerance(outputs=0.15, boxes=4.0, scores=0.15, quality=0.01),
    "int8": Tolerance(outputs=0.6, boxes=16.0, scores=0.5, quality=0.03),
}
"""By the precision that is computed in: several times what rounding alone does to trained models."""
NAMES = {"outputs": "raw outputs", "boxes": "boxes", "scores": "scores", "quality": "mAP"}
UNITS = {"outputs": " of their scale", "boxes": " pixels", "scores": "", "quality": ""}


class Parity(_Row):
    """Largest differences between an exported model and its checkpoint in torch, over the same images.

    Attributes:
        images: how many.
        precision: fp32, fp16, bf16 or int8, what the tolerance goes by.
        outputs: of raw outputs (boxes and scores apart), relative to the largest of each; None where their order may
            differ.
        boxes: of boxes of the detections in torch, in pixels; None where there was no detection.
        scores: of their scores.
        detections: in how many detections this was looked at.
        finite: no output is infinite or no number where that of the other is.
        quality_torch: mAP of the checkpoint, with `rect=False`; what Ultralytics calls fitness for other tasks.
        quality: mAP of the exported model.
        tolerance: what is allowed.
    """

    images: _Count
    precision: str
    outputs: _Float = None
    boxes: _Float = None
    scores: _Float = None
    detections: _Count = 0
    finite: bool = True
    quality_torch: _Float = None
    quality: _Float = None
    tolerance: Tolerance = Field(default_factory=Tolerance)

    @property
    def differences(self) -> dict[str, float | None]:
        """What was measured, under the names of the tolerance."""
        change = None if self.change is None else abs(self.change)
        return {"outputs": self.outputs, "boxes": self.boxes, "scores": self.scores, "quality": change}

    @property
    def change(self) -> float | None:
        """By how much the export has a better mAP than the checkpoint."""
        known = self.quality is not None and self.quality_torch is not None
        return self.quality - self.quality_torch if known else None  # type: ignore[operator]

    @property
    def failures(self) -> list[str]:
        """What is beyond the tolerance, for people."""
        broken = [] if self.finite else ["outputs are not finite numbers"]
        return broken + [
            f"{NAMES[name]} differ by {value:.2g}{UNITS[name]} (allowed: {limit:g})"
            for name, value in self.differences.items()
            if (limit := getattr(self.tolerance, name)) is not None and value is not None and not value <= limit
        ]


class TimingRow(_Row):
    """One model in one format.

    Attributes:
        model: its name, as in the table.
        format: as Ultralytics calls it, or torch.
        precision: that was exported: fp32, fp16, int8.
        computed: precision that the runtime computes in, where it says so.
        runtime: and its version.
        flops: of one image.
        params: parameters.
        size_mb: of the exported file or folder, in 1e6 bytes.
        times_ms: of every round; those of one format belong together, round by round.
        median_ms: of these.
        quartiles_ms: first and third.
        ratio: to the first model: median over the rounds, 1 for the first.
        ratio_interval: 95 % confidence interval of it; smallest and largest of fewer than six rounds.
        flops_ratio: to the first model.
        convolutions: in the exported graph; None where it cannot be read.
        aligned: those of them whose channel counts are multiples of 8.
        weights: fingerprint of the checkpoint's weights, `subjects.fingerprint`.
        parity: how it agrees with the checkpoint.
    """

    model: str
    format: str
    precision: str
    computed: str | None = None
    runtime: str = ""
    flops: _Float = None
    params: _Int = None
    size_mb: _Float = None
    times_ms: list[float] = Field(default_factory=list)
    median_ms: _Real = 0.0
    quartiles_ms: tuple[_Real, _Real] = (0.0, 0.0)
    ratio: _Real = 1.0
    ratio_interval: tuple[_Real, _Real] = (1.0, 1.0)
    flops_ratio: _Float = None
    convolutions: _Int = None
    aligned: _Int = None
    weights: str | None = None
    parity: Parity | None = None


class Measurement(_Row):
    """The content of `bench.json`; prints as tables.

    Attributes:
        hardware: name of the CPU or GPU.
        threads: CPU threads of each runtime; None on a GPU.
        busy: cores that other programs used before the first round; None if that is unknown.
        rounds: number of rounds, for each format.
        failed: formats that could not be measured, with the reason.

    Example:
        >>> import yolo_prune
        >>> found = yolo_prune.bench(["best.pt", "pruned.pt"], format="onnx", imgsz=640, threads=1)
        >>> [(row.model, row.median_ms, row.ratio) for row in found.rows]
        [(...), (...)]
    """

    version: Literal[1] = 1  # FORMAT
    yolo_prune: str = __version__
    versions: dict[str, str] = Field(default_factory=dict)
    device: str
    hardware: str
    cores: _Int = None
    threads: _Int = None
    busy: _Float = None
    imgsz: int
    batch: int
    rounds: dict[str, int] = Field(default_factory=dict)
    rows: list[TimingRow] = Field(default_factory=list)
    failed: dict[str, str] = Field(default_factory=dict)

    def __str__(self) -> str:
        return render(self)

    @property
    def models(self) -> list[str]:
        """Names of the models. Ratios refer to the first.

        Example:
            >>> from yolo_prune.report.measurement import Measurement
            >>> found = Measurement.load("bench.json")
            >>> found.models
            ['best.pt', 'pruned.pt']
        """
        return list(dict.fromkeys(row.model for row in self.rows))

    @property
    def formats(self) -> dict[str, list[TimingRow]]:
        """The rows of every format, in the order of the measurement.

        Example:
            >>> from yolo_prune.report.measurement import Measurement
            >>> found = Measurement.load("bench.json")
            >>> [row.model for row in found.formats["onnx"]]
            ['best.pt', 'pruned.pt']
        """
        names = dict.fromkeys(row.format for row in self.rows)
        return {name: [row for row in self.rows if row.format == name] for name in names}

    @property
    def ends(self) -> tuple[TimingRow, TimingRow] | None:
        """The first and the last model, in the first format in which both were measured; None if there is no such one.

        Example:
            >>> from yolo_prune.report.measurement import Measurement
            >>> found = Measurement.load("bench.json")
            >>> first, last = found.ends
            >>> first.model, last.model
            ('best.pt', 'pruned.pt')
        """
        rows = next((rows for rows in self.formats.values() if len(rows) == len(self.models) > 1), None)
        return (rows[0], rows[-1]) if rows else None

    def renamed(self, names: Sequence[str]) -> Measurement:
        """A copy with other names of the models, in their order.

        Example:
            >>> from yolo_prune.report.measurement import Measurement
            >>> found = Measurement.load("bench.json")
            >>> found.renamed(["dense", "half"]).models
            ['dense', 'half']
        """
        found = self.model_copy(deep=True)
        new = dict(zip(self.models, names, strict=True))
        for row in found.rows:
            row.model = new[row.model]
        return found

    def row(self, model: str, format: str) -> TimingRow:
        """The row of a model in a format. The name is that in the table.

        Raises:
            KeyError: If there is none.

        Example:
            >>> from yolo_prune.report.measurement import Measurement
            >>> found = Measurement.load("bench.json")
            >>> found.row("pruned.pt", "onnx").flops_ratio < 1
            True
        """
        for row in self.rows:
            if (row.model, row.format) == (model, format):
                return row
        raise KeyError(f"no row for {model} in {format}")

    def check(self) -> None:
        """Pass if every format was measured, and every export agrees with its checkpoint.

        Raises:
            BenchError: If a format could not be measured.
            ParityError: If an export does not agree. The message names the model, the format and the number, and its
                attribute `measurement` is this object.

        Example:
            >>> from yolo_prune.report.measurement import Measurement
            >>> found = Measurement.load("bench.json")
            >>> found.check()  # passes, or raises ParityError or BenchError
        """
        judged = [(f"{r.model} as {r.format} ({r.precision})", r.parity) for r in self.rows if r.parity]
        wrong = [f"{name}: {failure}" for name, parity in judged for failure in parity.failures]
        if wrong:
            raise ParityError(f"Exports do not agree with their checkpoints: {'; '.join(wrong)}.", measurement=self)
        if self.failed:
            raise BenchError(
                "; ".join(f"format={name} could not be measured: {why}" for name, why in self.failed.items())
            )

    def save(self, path: str | Path) -> Path:
        """Write this as JSON. The file appears whole or not at all.

        Example:
            >>> from yolo_prune.report.measurement import Measurement
            >>> found = Measurement.load("bench.json")
            >>> path = found.save("bench.json")
        """
        return write_text(path, json.dumps(_plain(self.model_dump()), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Measurement:
        """Read what `save` wrote.

        Raises:
            PruneError: If the file is missing, cut short, or something else.

        Example:
            >>> from yolo_prune.report.measurement import Measurement
            >>> found = Measurement.load("bench.json")
            >>> print(found)
            imgsz ...
        """
        return FILE.load(path, cls)


def render(found: Measurement) -> str:
    """All of a measurement as text: where, then a table per format, then what to know about it."""
    where = [f"imgsz {found.imgsz}", f"batch {found.batch}", found.hardware]
    if found.threads:
        where.append(f"{found.threads} of {found.cores} cores" if found.cores else f"{found.threads} threads")
    where += [f"{name} {version}" for name, version in found.versions.items() if name != "python"]
    parts = [", ".join(where)]
    for format, rows in found.formats.items():
        parts.append(_timing_table(rows, found.rounds.get(format, 0)))
        if any(row.parity for row in rows):
            parts.append(_parity_table([row for row in rows if row.parity]))
    if not found.rows:
        return "Nothing could be measured."
    parts.append(
        "Times are of the model alone, without pre- and postprocessing. latency and FLOPs: ratio to the first model, "
        "over\nthe same rounds (with its 95 % interval); the models took turns."
    )
    parts += filter(None, [busy_note(found)])
    return "\n\n".join(parts)


def busy_note(found: Measurement) -> str:
    """That others kept the machine busy meanwhile; empty where they hardly did."""
    if found.busy is None or not found.cores or found.busy <= 0.25 * found.cores:
        return ""
    shown = f"Other programs kept {found.busy:.1f} of {found.cores} cores busy"
    return f"{shown}: times are longer than on an idle machine."


def _timing_table(rows: Sequence[TimingRow], rounds: int) -> str:
    head = ["model", "median ms", "quartiles", "latency", "95 % interval", "FLOPs", "GFLOPs", "M params", "MB"]
    aligned = any(row.convolutions for row in rows)
    table = [[*head, "convs of 8s"] if aligned else head]
    for index, row in enumerate(rows):
        table.append([
            row.model,
            number(row.median_ms),
            _range(row.quartiles_ms, number),
            f"{row.ratio:.3f}",
            MISSING if not index else _range(row.ratio_interval, lambda v: f"{v:.3f}"),
            MISSING if row.flops_ratio is None else f"{row.flops_ratio:.3f}",
            number(row.flops, 1e9),
            number(row.params, 1e6),
            number(row.size_mb),
        ])  # fmt: skip
        if aligned:
            table[-1].append(f"{row.aligned} of {row.convolutions}" if row.convolutions else MISSING)
    first = rows[0]
    rest = ", the rest" if first.precision == "int8" else ""
    computed = f"{rest} computed as {first.computed}" if first.computed not in (None, first.precision) else ""
    return f"{first.format}, {first.precision}{computed}, {first.runtime}, {rounds} rounds\n{align(table, left=1)}"


def _parity_table(rows: Sequence[TimingRow]) -> str:
    table = [["against torch", "raw outputs", "boxes, px", "scores", "mAP torch", "mAP export", "difference", ""]]
    for row in rows:
        parity = row.parity
        assert parity is not None
        table.append([
            row.model,
            MISSING if parity.outputs is None else f"{parity.outputs:.1e}",
            MISSING if parity.boxes is None else f"{parity.boxes:.2g}",
            MISSING if parity.scores is None else f"{parity.scores:.1e}",
            MISSING if parity.quality_torch is None else f"{parity.quality_torch:.4f}",
            MISSING if parity.quality is None else f"{parity.quality:.4f}",
            MISSING if parity.change is None else f"{parity.change:+.4f}",
            "FAILS" if parity.failures else "agrees",
        ])  # fmt: skip
    return align(table, left=1)


def _range(pair: tuple[float, float], text: Callable[[float], str]) -> str:
    return f"{text(pair[0])} - {text(pair[1])}"
