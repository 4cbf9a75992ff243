# SPDX-License-Identifier: AGPL-3.0-or-later
"""The profile of a runtime on a device: times of layers and of whole models, in a file for other machines."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from yolo_prune._version import __version__
from yolo_prune.env.files import write_text
from yolo_prune.env.image_size import ImageSize, height_width, stored_size
from yolo_prune.env.json_files import JsonFile
from yolo_prune.errors import BenchError
from yolo_prune.latency.fit import Formula, LayerTime, formula, steps
from yolo_prune.latency.layers import Layer, distinct
from yolo_prune.planning.cost import Term, Timing

FORMAT = 1
_OTHER = (
    f"'{{path}}' is not a profile that yolo-prune {__version__} can read ({{why}}). Write it again with 'yolo-prune "
    "profile' of the same version."
)
FILE = JsonFile(
    "a profile",
    unreadable="The profile '{path}' cannot be read: {why}.",
    broken=_OTHER,
    wrong=_OTHER,
    error=BenchError,
)
KEY = r"^[0-9a-f]{16} [0-9a-f]{16} at [1-9][0-9]{1,4}(,[1-9][0-9]{1,4})?$"  # see model_key
LEAST_SCALE = 0.05
"""Minimum of the time that a model saves, as a fraction of the time that its layers save.

This value is a choice: with 0, no cut would save time by the formula, and no plan could be found.
"""


class Place(BaseModel):
    """The runtime, device and settings of a measurement. Times from different places must not be compared."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: str
    runtime: str
    hardware: str
    device: str
    threads: int | None
    batch: int
    quantize: int

    def __str__(self) -> str:
        """A description for messages."""
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.threads else ""
        bits = ", half precision" if self.quantize == 16 else ""
        return f"{self.runtime} on {self.hardware}{threads}, batch {self.batch}{bits}"


class Whole(BaseModel):
    """The time of a whole model in milliseconds: the sum of the layers' formulas, and the measured time."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    layers: float = Field(gt=0)
    measured: float = Field(gt=0)


class Table(BaseModel):
    """All times that were measured in one place.

    Attributes:
        version: version of the file format.
        yolo_prune: version of the package that wrote the file.
        place: the runtime, device and settings.
        layers: `{key of a layer: [(input channels, output channels, milliseconds), ...]}`.
        wholes: `{key of a dense model: times of this model, and of models that were cut from it}`.
    """

    model_config = ConfigDict(extra="ignore")
    version: Literal[1] = 1  # FORMAT
    yolo_prune: str = __version__
    place: Place
    layers: dict[str, Annotated[list[LayerTime], Field(min_length=1)]] = Field(default_factory=dict)
    wholes: dict[Annotated[str, Field(pattern=KEY)], list[Whole]] = Field(default_factory=dict)

    def missing(self, layers: Mapping[str, list[Layer]]) -> list[Layer]:
        """Layers of a model that are not in the table."""
        return [layer for layer in distinct(layers) if layer.key not in self.layers]

    def sizes(self) -> list[ImageSize]:
        """Image sizes, in pixels, at which whole models were timed."""
        sizes = {stored_size(key.rpartition(" ")[2], error=BenchError) for key in self.wholes}
        return sorted(sizes, key=height_width)

    def find(self, layers: Mapping[str, list[Layer]], imgsz: ImageSize) -> str | None:
        """The key in `wholes` of a dense model, or of one that differs only in the widths of its head; else None.

        Args:
            layers: the layers of the model at this image size.
            imgsz: image size in pixels.
        """
        own = model_key(layers, imgsz)
        body, size = own.split()[0], own.split()[-1]
        kin = (key for key in self.wholes if key.split()[0] == body and key.split()[-1] == size)
        return own if own in self.wholes else next(kin, None)

    def only(self, layers: Mapping[str, list[Layer]], key: str) -> Table:
        """The part of the table that is about one model."""
        keys = [layer.key for layer in distinct(layers)]
        return Table(place=self.place, layers={k: self.layers[k] for k in keys}, wholes={key: self.wholes[key]})

    def completed(self, layers: Mapping[str, list[Layer]]) -> Table:
        """The table with the missing layers added: each gets the times of the same layer with the nearest widths.

        The times keep the widths at which they were measured, so the formula is also correct for the missing layer.

        Raises:
            BenchError: If the table has no such layer.
        """
        return self.model_copy(update={"layers": self.layers | {m.key: self._nearest(m) for m in self.missing(layers)}})

    def _nearest(self, layer: Layer) -> list[LayerTime]:
        def distance(points: list[LayerTime]) -> float:
            ins, outs, _ = max(points)
            return abs(math.log(ins / layer.ins)) + abs(math.log(outs / layer.outs))

        candidates = [points for key, points in self.layers.items() if key.rpartition(":")[0] == layer.alike]
        if not candidates:
            raise BenchError(
                f"The profile has no times of a layer like '{layer.key}' ({self.place}). Profile this model instead."
            )
        return min(candidates, key=distance)

    def sums(self, layers: Mapping[str, list[Layer]]) -> Timing:
        """Time of a model as the sum of its layers, without other operations.

        Args:
            layers: the layers of the dense model; the table must have all of them.
        """
        timed = {layer.key: (self.layers[layer.key], layer.depthwise) for layer in distinct(layers)}
        each = steps(timed)
        formulas = {key: formula(points, each, depthwise) for key, (points, depthwise) in timed.items()}
        fixed = sum(formulas[layer.key].base for calls in layers.values() for layer in calls)
        terms = {w: _term(calls[0], [formulas[layer.key] for layer in calls], each) for w, calls in layers.items()}
        return Timing(terms, fixed, max(each))

    def timing(self, layers: Mapping[str, list[Layer]], key: str) -> Timing:
        """Time of a model as the sum of its layers, corrected by the measured times of whole models.

        Args:
            layers: the layers of the dense model; the table must have all of them.
            key: the key in `wholes`, from `find`.
        """
        sums = self.sums(layers)
        scale, offset = _scale_and_offset([(w.layers, w.measured) for w in self.wholes.get(key, ())])
        terms = {
            name: term._replace(both=scale * term.both, first=scale * term.first, second=scale * term.second)
            for name, term in sums.terms.items()
        }
        return Timing(terms, scale * sums.fixed + offset, sums.multiple)

    def save(self, path: str | Path) -> Path:
        """Write the table as JSON. If this fails, no incomplete file is left."""
        return write_text(path, json.dumps(self.model_dump(mode="json"), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Table:
        """Read a table.

        Raises:
            BenchError: If the file cannot be read or is not such a table.
        """
        return FILE.load(path, cls)


def model_key(layers: Mapping[str, list[Layer]], imgsz: ImageSize) -> str:
    """The key of a dense model at an image size. Models with the same layers have the same key.

    The first word of the key does not depend on the widths of the head, which change with the number of classes.
    """
    places = {name: int(match[1]) for name in layers if (match := re.match(r"model\.(\d+)\.", name))}
    head = {name for name, place in places.items() if place == max(places.values())}
    own = {name: [layer.key for layer in calls] for name, calls in sorted(layers.items())}
    body = {name: [layer.alike for layer in layers[name]] if name in head else keys for name, keys in own.items()}
    words = (hashlib.sha256(json.dumps(each).encode()).hexdigest()[:16] for each in (body, own))
    return f"{' '.join(words)} at {imgsz}"


def _term(layer: Layer, formulas: list[Formula], steps: tuple[int, int]) -> Term:
    """The term of a weight, for all calls of its layer. A weight's second dimension has the channels of one group."""
    per = max(layer.groups, 1)
    ins, outs, both = (sum(getattr(f, name) for f in formulas) for name in ("ins", "outs", "both"))
    step_in, step_out = steps if per == 1 else (1, 1)
    if layer.kind == "deconv":
        return Term(per * both, ins, per * outs, (step_in, step_out))
    return Term(per * both, outs, per * ins, (step_out, 1 if layer.depthwise else step_in))


def _scale_and_offset(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Scale and offset that convert sums of layers to measured times. They are exact for the dense model (first point).

    The offset is the time of operations that a cut does not make faster.
    """
    if not points:
        return 1.0, 0.0
    (dense, whole), *others = points
    saved = [(dense - layers, whole - measured) for layers, measured in others if layers < dense]
    squares = sum(x * x for x, _ in saved)
    scale = sum(x * y for x, y in saved) / squares if squares else 1.0
    scale = min(max(scale, LEAST_SCALE), whole / dense)
    return scale, whole - scale * dense
