# SPDX-License-Identifier: AGPL-3.0-or-later
"""What was measured in one runtime on one device: times of layers, and of whole models; in a file that can be moved."""

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
from yolo_prune.env.json_files import JsonFile
from yolo_prune.errors import BenchError
from yolo_prune.latency.fit import Formula, LayerTime, formula, steps
from yolo_prune.latency.layers import Layer, distinct
from yolo_prune.planning.cost import Term, Timing

FORMAT = 1
_OTHER = (
    f"'{{path}}' is no profile that this yolo-prune {__version__} reads ({{why}}). Write it with 'yolo-prune profile' "
    "of the same version."
)
FILE = JsonFile(
    "a profile",
    unreadable="The profile '{path}' cannot be read: {why}.",
    broken=_OTHER,
    wrong=_OTHER,
    error=BenchError,
)
KEY = r"^[0-9a-f]{16} [0-9a-f]{16} at [1-9][0-9]{1,4}$"  # see model_key
LEAST_SCALE = 0.05
"""Of what its layers save, a model saves at least this. A choice: if it saved nothing, no cut could be solved for."""


class Place(BaseModel):
    """In what, on what and how something is measured: times of one place say nothing of another."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: str
    runtime: str
    hardware: str
    device: str
    threads: int | None
    batch: int
    quantize: int

    def __str__(self) -> str:
        """In words."""
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.threads else ""
        bits = ", half precision" if self.quantize == 16 else ""
        return f"{self.runtime} on {self.hardware}{threads}, batch {self.batch}{bits}"


class Whole(BaseModel):
    """One model: what its layers add up to by their formulas, and what it really took, in milliseconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    layers: float = Field(gt=0)
    measured: float = Field(gt=0)


class Table(BaseModel):
    """Times in one place.

    Attributes:
        layers: `{key of a layer: [(channels read, channels put out, milliseconds), ...]}`.
        wholes: `{key of a dense model: itself, and models that were cut from it}`.
    """

    model_config = ConfigDict(extra="ignore")
    version: Literal[1] = 1  # FORMAT
    yolo_prune: str = __version__
    place: Place
    layers: dict[str, Annotated[list[LayerTime], Field(min_length=1)]] = Field(default_factory=dict)
    wholes: dict[Annotated[str, Field(pattern=KEY)], list[Whole]] = Field(default_factory=dict)

    def missing(self, layers: Mapping[str, list[Layer]]) -> list[Layer]:
        """Layers of a model that were not timed."""
        return [layer for layer in distinct(layers) if layer.key not in self.layers]

    def sizes(self) -> list[int]:
        """Image sizes, in pixels, at which whole models were timed."""
        return sorted({int(key.rpartition(" ")[2]) for key in self.wholes})

    def find(self, layers: Mapping[str, list[Layer]], imgsz: int) -> str | None:
        """The key of a dense model in `wholes`, else of one that differs in the widths of its head alone.

        Args:
            layers: of the model, at this size.
            imgsz: image size in pixels.
        """
        own = model_key(layers, imgsz)
        body, size = own.split()[0], own.split()[-1]
        kin = (key for key in self.wholes if key.split()[0] == body and key.split()[-1] == size)
        return own if own in self.wholes else next(kin, None)

    def only(self, layers: Mapping[str, list[Layer]], key: str) -> Table:
        """What is known of one model."""
        keys = [layer.key for layer in distinct(layers)]
        return Table(place=self.place, layers={k: self.layers[k] for k in keys}, wholes={key: self.wholes[key]})

    def completed(self, layers: Mapping[str, list[Layer]]) -> Table:
        """With the layers that were not timed: each gets the times of the same layer at the widths nearest to its own.

        Times are kept with the widths that they were taken at, so that the formula made of them tells other widths too.

        Raises:
            BenchError: If there is no such layer.
        """
        return self.model_copy(update={"layers": self.layers | {m.key: self._nearest(m) for m in self.missing(layers)}})

    def _nearest(self, layer: Layer) -> list[LayerTime]:
        def distance(points: list[LayerTime]) -> float:
            ins, outs, _ = max(points)
            return abs(math.log(ins / layer.ins)) + abs(math.log(outs / layer.outs))

        found = [points for key, points in self.layers.items() if key.rpartition(":")[0] == layer.alike]
        if not found:
            raise BenchError(f"No layer that is like '{layer.key}' was timed ({self.place}).")
        return min(found, key=distance)

    def sums(self, layers: Mapping[str, list[Layer]]) -> Timing:
        """Time of a model as its layers add up, without what lies between them.

        Args:
            layers: of the dense model; all of them were timed.
        """
        timed = {layer.key: (self.layers[layer.key], layer.depthwise) for layer in distinct(layers)}
        each = steps(timed)
        formulas = {key: formula(points, each, depthwise) for key, (points, depthwise) in timed.items()}
        fixed = sum(formulas[layer.key].base for found in layers.values() for layer in found)
        terms = {w: _term(found[0], [formulas[layer.key] for layer in found], each) for w, found in layers.items()}
        return Timing(terms, fixed, max(each))

    def timing(self, layers: Mapping[str, list[Layer]], key: str) -> Timing:
        """Time of a model, set right by the whole models that were measured.

        Args:
            layers: of the dense model; all of them were timed.
            key: of the dense model in `wholes`, or of one that is nearly the same.
        """
        sums = self.sums(layers)
        scale, offset = _straight([(w.layers, w.measured) for w in self.wholes.get(key, ())])
        terms = {
            name: term._replace(both=scale * term.both, first=scale * term.first, second=scale * term.second)
            for name, term in sums.terms.items()
        }
        return Timing(terms, scale * sums.fixed + offset, sums.multiple)

    def save(self, path: str | Path) -> Path:
        """Write the table as JSON; the file appears whole or not at all."""
        return write_text(path, json.dumps(self.model_dump(mode="json"), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Table:
        """Read a table.

        Raises:
            BenchError: If the file cannot be read, or is no such table.
        """
        return FILE.load(path, cls)


def model_key(layers: Mapping[str, list[Layer]], imgsz: int) -> str:
    """Of a dense model at an image size: the same for models with the same layers.

    Its first word is the same as well where the widths of heads differ, as they do with the number of classes.
    """
    places = {name: int(found[1]) for name in layers if (found := re.match(r"model\.(\d+)\.", name))}
    head = {name for name, place in places.items() if place == max(places.values())}
    own = {name: [layer.key for layer in found] for name, found in sorted(layers.items())}
    body = {name: [layer.alike for layer in layers[name]] if name in head else keys for name, keys in own.items()}
    words = (hashlib.sha256(json.dumps(each).encode()).hexdigest()[:16] for each in (body, own))
    return f"{' '.join(words)} at {imgsz}"


def _term(layer: Layer, formulas: list[Formula], steps: tuple[int, int]) -> Term:
    """Of a weight: of all passes through its layer. The second dimension of a weight counts one group's channels."""
    per = max(layer.groups, 1)
    ins, outs, both = (sum(getattr(f, name) for f in formulas) for name in ("ins", "outs", "both"))
    step_in, step_out = steps if per == 1 else (1, 1)
    if layer.kind == "deconv":
        return Term(per * both, ins, per * outs, (step_in, step_out))
    return Term(per * both, outs, per * ins, (step_out, 1 if layer.depthwise else step_in))


def _straight(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Scale and offset from sums of layers to measured times, exact for the dense model, which comes first.

    What lies between the layers takes its time as well, and some of it does not get less: that is the offset.
    """
    if not points:
        return 1.0, 0.0
    (dense, whole), *others = points
    saved = [(dense - layers, whole - measured) for layers, measured in others if layers < dense]
    squares = sum(x * x for x, _ in saved)
    scale = sum(x * y for x, y in saved) / squares if squares else 1.0
    scale = min(max(scale, LEAST_SCALE), whole / dense)
    return scale, whole - scale * dense
