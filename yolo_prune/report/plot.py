# SPDX-License-Identifier: AGPL-3.0-or-later
"""Drawing with SVG elements: shapes, axes with round ticks, and labels that find a free place.

A plot is only data; the templates write it down and escape it, and the style sheet gives classes their colours, in
light and in dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

LETTER = 0.62  # width over font size of a letter on average, in the wider bold sans-serif fonts of systems
SMALL = 12.0  # font size of labels, in units of the plot


@dataclass(frozen=True)
class Shape:
    """One SVG element: its tag, its attributes, and its text, if it has any."""

    tag: str
    attributes: dict[str, str | float]
    text: str = ""


@dataclass
class Plot:
    """A drawing of a size; later shapes cover earlier ones."""

    width: float
    height: float
    title: str
    shapes: list[Shape] = field(default_factory=list)

    def add(self, tag: str, look: str, text: str = "", **attributes: str | float) -> None:
        """Add a shape of the class `look`; in the names of attributes `_` stands for `-`."""
        rounded = {k.replace("_", "-"): round(v, 1) if isinstance(v, float) else v for k, v in attributes.items()}
        self.shapes.append(Shape(tag, {"class": look, **rounded}, text))

    def line(self, look: str, points: Iterable[tuple[float, float]]) -> None:
        """Add a line through points."""
        self.add("polyline", look, points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points))

    def text(self, look: str, x: float, y: float, text: str, anchor: str = "start") -> None:
        """Add text whose base line begins, has its middle or ends (`start`, `middle`, `end`) at a point."""
        self.add("text", look, text, x=x, y=y, text_anchor=anchor)


@dataclass(frozen=True)
class Axis:
    """Maps values from `low` to `high` to positions from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The position of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """At most `most` round values in the range, or two."""
        step = _round_up((self.high - self.low) / max(most - 1, 1))
        first = math.ceil(self.low / step - 1e-9)
        return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis_for(
    values: Sequence[float], start: float, end: float, most: int = 5, margin: float = 0.08, least: float = 0.0
) -> Axis:
    """An axis with room around values that are not negative; it begins at 0 where that costs little.

    It spans at least `least`, so that noise does not look like a difference.
    """
    low, high = min(values), max(values)
    if (room := (least - (high - low)) / 2) > 0:
        low, high = max(0.0, low - room), high + room
    if high <= 0:
        return Axis(0.0, 1.0, start, end)
    low = 0.0 if low < 0.35 * high else low
    spread = (high - low) or 0.2 * high
    step = _round_up(spread / max(most - 1, 1))
    below = math.floor((low - margin * spread) / step + 1e-9) * step
    return Axis(max(0.0, below), high + margin * spread, start, end)


def tick_text(value: float, ticks: Sequence[float]) -> str:
    """A tick with as many decimals as its axis needs."""
    step = min((b - a for a, b in pairwise(ticks)), default=1.0)
    return f"{value:.{max(0, math.ceil(-math.log10(step) - 1e-9))}f}" if step > 0 else f"{value:g}"


def _round_up(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * (1 - 1e-9))


Box = tuple[float, float, float, float]


class Labels:
    """Places labels beside points so that they cover neither one another, nor points, nor leave the plot."""

    def __init__(self, plot: Plot, area: Box, points: Iterable[tuple[float, float]], radius: float = 8.0) -> None:
        self._plot, self._area, self._radius = plot, area, radius
        self._taken = [(x - radius, y - radius, x + radius, y + radius) for x, y in points]

    def put(self, look: str, x: float, y: float, text: str) -> None:
        """Write `text` beside a point, where there is room; to the right where there is none."""
        wide, far = len(text) * LETTER * SMALL, self._radius + 4
        places: list[tuple[float, float, str, Box]] = []
        for height in (0.0, -far - 6, far + 8, -2 * far - 8, 2 * far + 10):
            beside = ((x + far, "start", x + far), (x - far, "end", x - far - wide), (x, "middle", x - wide / 2))
            for at, anchor, left in beside[:2] if not height else beside[::-1]:
                base = y + 4 + height
                places.append((at, base, anchor, (left, base - SMALL, left + wide, base + 3)))
        at, base, anchor, box = next((p for p in places if self._free(p[3])), places[0])
        self._taken.append(box)
        self._plot.text(look, at, base, text, anchor)

    def _free(self, box: Box) -> bool:
        inside = (
            box[0] >= self._area[0] and box[1] >= self._area[1] and box[2] <= self._area[2] and box[3] <= self._area[3]
        )
        return inside and not any(
            box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in self._taken
        )
