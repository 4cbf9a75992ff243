# SPDX-License-Identifier: AGPL-3.0-or-later
"""`bench.json`: the latency of exported models, and their differences from the checkpoint, as plain data.

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
from yolo_prune.report.data import Size, _Count, _Float, _Int, _plain, _Row
from yolo_prune.report.table import MISSING, align, number, percent

FORMAT = 1
BENCH = "bench.json"
FILE = JsonFile(
    "a measurement",
    missing="There is no measurement at {path}. Pass a file that 'yolo-prune bench ... save=bench.json' wrote.",
    unreadable="The measurement {path} cannot be read: {why}. Check the path and its permissions.",
    broken="{path} is not complete JSON: {why}. Measure again.",
    wrong="{path} is not a measurement: {why}. Measure again.",
)
_Real = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PRECISIONS = {None: "fp32", 32: "fp32", 16: "fp16", 8: "int8"}
"""The precision for each value of Ultralytics' argument `quantize`."""


class Tolerance(_Row):
    """The largest allowed differences of an export. None allows any difference.

    Attributes:
        outputs: difference of a raw output, relative to the largest output of its kind (boxes, scores, ...).
        boxes: difference of a side of a detected box, in pixels.
        scores: difference of the score of a detection.
        quality: difference of the mAP, lower or higher.
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
"""The tolerance for each precision of the computation: several times the effect of rounding on trained models."""
NAMES = {"outputs": "raw outputs", "boxes": "boxes", "scores": "scores", "quality": "mAP"}
UNITS = {"outputs": " of their scale", "boxes": " pixels", "scores": "", "quality": ""}


class Parity(_Row):
    """Largest differences between an exported model and its checkpoint in torch, over the same images.

    Attributes:
        images: number of images.
        precision: fp32, fp16, bf16 or int8; it selects the tolerance.
        outputs: difference of raw outputs, relative to the largest one, for boxes and scores separately; None if the
            order of the outputs may differ.
        boxes: difference of the boxes of detections in torch, in pixels; None without detections.
        scores: difference of the scores of these detections.
        detections: number of detections that were compared.
        finite: whether all differences are finite numbers.
        quality_torch: mAP of the checkpoint, with `rect=False`; for tasks without mAP, Ultralytics' fitness.
        quality: mAP of the exported model.
        tolerance: the largest allowed differences.
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
        """The measured differences, with the names of `Tolerance`."""
        change = None if self.change is None else abs(self.change)
        return {"outputs": self.outputs, "boxes": self.boxes, "scores": self.scores, "quality": change}

    @property
    def change(self) -> float | None:
        """The mAP of the export minus the mAP of the checkpoint."""
        known = self.quality is not None and self.quality_torch is not None
        return self.quality - self.quality_torch if known else None  # type: ignore[operator]

    @property
    def failures(self) -> list[str]:
        """One text for each difference that exceeds the tolerance."""
        broken = [] if self.finite else ["outputs are not finite numbers"]
        return broken + [
            f"{NAMES[name]} differ by {value:.2g}{UNITS[name]} (allowed: {limit:g})"
            for name, value in self.differences.items()
            if (limit := getattr(self.tolerance, name)) is not None and value is not None and not value <= limit
        ]


class TimingRow(_Row):
    """One model in one format.

    Attributes:
        model: name of the model, as in the table.
        format: name of the format in Ultralytics, or torch.
        precision: precision of the export: fp32, fp16 or int8.
        computed: precision in which the runtime computes, if it is known.
        runtime: name and version of the runtime.
        flops: FLOPs of one image.
        params: number of parameters.
        size_mb: size of the exported file or folder, in 1e6 bytes.
        zeros: share of zeros among the weights of the checkpoint; None if no model in the table has zeros.
        zipped_mb: size of the compressed export, in 1e6 bytes; None if no model in the table has zeros.
        times_ms: time in each round. The times of the same round in one format are compared.
        median_ms: median of the times.
        quartiles_ms: first and third quartile of the times.
        ratio: latency ratio to the first model: median over the rounds; 1 for the first model.
        ratio_interval: 95 % confidence interval of the ratio; with fewer than six rounds, smallest and largest ratio.
        flops_ratio: FLOPs ratio to the first model.
        convolutions: number of convolutions in the exported graph; None if the graph cannot be read.
        aligned: number of convolutions whose channel counts are multiples of 8.
        weights: fingerprint of the weights of the checkpoint (`subjects.fingerprint`).
        parity: differences from the checkpoint.
    """

    model: str
    format: str
    precision: str
    computed: str | None = None
    runtime: str = ""
    flops: _Float = None
    params: _Int = None
    size_mb: _Float = None
    zeros: _Float = None
    zipped_mb: _Float = None
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
    """The content of `bench.json`. `print` shows it as tables.

    Attributes:
        hardware: name of the CPU or GPU.
        threads: CPU threads of each runtime; None on a GPU.
        busy: number of cores that other programs used before the first round; None if it is unknown.
        rounds: number of rounds, for each format.
        failed: formats that could not be measured, with the reason.

    Example:
        >>> import yolo_prune
        >>> measurement = yolo_prune.bench(["best.pt", "pruned.pt"], format="onnx", imgsz=640, threads=1)
        >>> [(row.model, row.median_ms, row.ratio) for row in measurement.rows]
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
    imgsz: Size
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
            >>> measurement = Measurement.load("bench.json")
            >>> measurement.models
            ['best.pt', 'pruned.pt']
        """
        return list(dict.fromkeys(row.model for row in self.rows))

    @property
    def formats(self) -> dict[str, list[TimingRow]]:
        """The rows of every format, in the order of the measurement.

        Example:
            >>> from yolo_prune.report.measurement import Measurement
            >>> measurement = Measurement.load("bench.json")
            >>> [row.model for row in measurement.formats["onnx"]]
            ['best.pt', 'pruned.pt']
        """
        names = dict.fromkeys(row.format for row in self.rows)
        return {name: [row for row in self.rows if row.format == name] for name in names}

    @property
    def ends(self) -> tuple[TimingRow, TimingRow] | None:
        """The rows of the first and the last model, in the first format in which all models were measured.

        None if there is no such format, or only one model.

        Example:
            >>> from yolo_prune.report.measurement import Measurement
            >>> measurement = Measurement.load("bench.json")
            >>> first, last = measurement.ends
            >>> first.model, last.model
            ('best.pt', 'pruned.pt')
        """
        rows = next((rows for rows in self.formats.values() if len(rows) == len(self.models) > 1), None)
        return (rows[0], rows[-1]) if rows else None

    def renamed(self, names: Sequence[str]) -> Measurement:
        """A copy with other names of the models, in their order.

        Example:
            >>> from yolo_prune.report.measurement import Measurement
            >>> measurement = Measurement.load("bench.json")
            >>> measurement.renamed(["dense", "half"]).models
            ['dense', 'half']
        """
        copy = self.model_copy(deep=True)
        new = dict(zip(self.models, names, strict=True))
        for row in copy.rows:
            row.model = new[row.model]
        return copy

    def row(self, model: str, format: str) -> TimingRow:
        """The row of a model in a format. `model` is the name of the model in the table.

        Raises:
            KeyError: If there is no such row.

        Example:
            >>> from yolo_prune.report.measurement import Measurement
            >>> measurement = Measurement.load("bench.json")
            >>> measurement.row("pruned.pt", "onnx").flops_ratio < 1
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
            ParityError: If an export does not agree with its checkpoint. The message names the model, the format and
                the difference. The attribute `measurement` of the error is this object.

        Example:
            >>> from yolo_prune.report.measurement import Measurement
            >>> measurement = Measurement.load("bench.json")
            >>> measurement.check()  # passes, or raises ParityError or BenchError
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
        """Write the measurement as JSON. The file is never incomplete.

        Example:
            >>> from yolo_prune.report.measurement import Measurement
            >>> measurement = Measurement.load("bench.json")
            >>> path = measurement.save("bench.json")
        """
        return write_text(path, json.dumps(_plain(self.model_dump()), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Measurement:
        """Read a file that `save` wrote.

        Raises:
            PruneError: If the file is missing, incomplete, or not a measurement.

        Example:
            >>> from yolo_prune.report.measurement import Measurement
            >>> measurement = Measurement.load("bench.json")
            >>> print(measurement)
            imgsz ...
        """
        return FILE.load(path, cls)


def render(measurement: Measurement) -> str:
    """A measurement as text: the machine and the settings, a table for each format, and notes."""
    setting = [f"imgsz {measurement.imgsz}", f"batch {measurement.batch}", measurement.hardware]
    if measurement.threads:
        setting.append(
            f"{measurement.threads} of {measurement.cores} cores"
            if measurement.cores
            else f"{measurement.threads} threads"
        )
    setting += [f"{name} {version}" for name, version in measurement.versions.items() if name != "python"]
    parts = [", ".join(setting)]
    for format, rows in measurement.formats.items():
        parts.append(_timing_table(rows, measurement.rounds.get(format, 0)))
        if any(row.parity for row in rows):
            parts.append(_parity_table([row for row in rows if row.parity]))
    if not measurement.rows:
        return "Nothing could be measured."
    parts.append(
        "Times are for the model alone, without pre- and postprocessing. latency and FLOPs are ratios to the first "
        "model.\nThe models took turns in each round; latency is the median ratio over the rounds, with its 95 % "
        "interval."
    )
    parts += filter(None, [busy_note(measurement)])
    return "\n\n".join(parts)


def busy_note(measurement: Measurement) -> str:
    """A note that other programs kept the machine busy; empty if they hardly used it."""
    if measurement.busy is None or not measurement.cores or measurement.busy <= 0.25 * measurement.cores:
        return ""
    shown = f"Other programs kept {measurement.busy:.1f} of {measurement.cores} cores busy"
    return f"{shown}: times are longer than on an idle machine."


def _timing_table(rows: Sequence[TimingRow], rounds: int) -> str:
    head = ["model", "median ms", "quartiles", "latency", "95 % interval", "FLOPs", "GFLOPs", "M params", "MB"]
    aligned = any(row.convolutions for row in rows)
    sparse = any(row.zeros for row in rows)
    head += ["zeros", "MB zipped"] * sparse + ["multiple-of-8 convs"] * aligned
    table = [head]
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
        if sparse:
            table[-1] += [percent(row.zeros, 1), number(row.zipped_mb)]
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
