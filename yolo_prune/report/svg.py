# SPDX-License-Identifier: AGPL-3.0-or-later
"""Matplotlib charts as elements of a page. They use the fonts and the colours of the page, in light and dark mode.

Each chart has its own Figure, in matplotlib's default style. pyplot is not used. The settings of the user are replaced
while a chart is drawn, and restored after that.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unicodedata import category
from xml.etree import ElementTree

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

SIZE = 12.0  # of all text on a page, in pixels; in matplotlib's SVG, a pixel is as large as a point
DPI = 72
TIP = "tip: "
UNPRINTABLE = {"Cc", "Cs", "Cn"}  # control characters, surrogates, and what is no character

# Names of colours in the style sheet. While matplotlib draws, a unique colour stands for each name.
NAMES = (
    *("ink", "quiet", "faint", "sheet", "dense", "pruned", "cost", "cost-soft", "back", "back-soft"),
    *(f"m{number}" for number in range(1, 9)),
)
PAGE: Mapping[str, str] = {name: f"#0000{index:02x}" for index, name in enumerate(NAMES, start=1)}


@contextmanager
def default_style(**settings: Any) -> Iterator[None]:
    """Inside, matplotlib uses its default style instead of the user's. `__` in the name of a setting means a dot."""
    from matplotlib import style

    with style.context(["default", {name.replace("__", "."): value for name, value in settings.items()}]):
        yield


def blank(width: float, height: float) -> Figure:
    """An empty figure of a size in pixels. It makes room for its labels until `fix_layout` is called."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_visible(False)
    return figure


def fix_layout(figure: Figure) -> None:
    """Give the axes their final places, so that later labels can be placed exactly."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def tip(artist: Artist, text: str) -> None:
    """Give an artist a tooltip on the page."""
    artist.set_gid(TIP + printable(text))


def printable(text: str) -> str:
    """A text without control characters: file names may contain them, but XML may not."""
    return "".join("\N{REPLACEMENT CHARACTER}" if category(letter) in UNPRINTABLE else letter for letter in text)


def plain_axes(axes: Axes, colours: Mapping[str, str], size: float = SIZE) -> None:
    """Style axes: no frame, no tick marks, and faint horizontal lines."""
    axes.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colours["quiet"])
    axes.tick_params(colors=colours["quiet"], labelsize=size, pad=6, bottom=False, left=False)
    axes.grid(axis="y", color=colours["faint"], linewidth=0.8)
    axes.set_axisbelow(True)


def span(values: Sequence[float], margin: float = 0.1, least: float = 0.0) -> tuple[float, float]:
    """The two ends of an axis around values.

    The axis starts at 0 if this needs little room. It never starts below 0 unless a value is negative.

    Args:
        values: at least one value.
        margin: room beyond the values, as a share of their spread.
        least: smallest length of the axis, so that noise does not look like a difference.
    """
    low, high = min(values), max(values)
    foot = 0.0 if low >= 0 else -math.inf
    room = max(0.0, least - (high - low)) / 2
    low, high = max(foot, low - room), high + room
    low = 0.0 if 0 <= low < 0.35 * high else low
    spread = (high - low) or 0.2 * abs(high) or 1.0
    return max(foot, low - margin * spread), high + margin * spread


def round_ticks(axis: Axis, most: int) -> None:
    """Set ticks at round values, without exponents, that divide an axis into at most `most` parts."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    written_out = ScalarFormatter(useOffset=False)
    written_out.set_scientific(False)
    axis.set_major_locator(MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))
    axis.set_major_formatter(written_out)


def element(figure: Figure, label: str) -> Markup:
    """A figure as an `svg` element.

    Args:
        figure: the figure, drawn in the colours of `PAGE`, with text of one size.
        label: description for screen readers; each chart of the same width on a page needs another one.
    """
    for artist in figure.findobj():
        artist.set_clip_on(False)
    buffer = io.StringIO()
    salt = f"{label} {figure.bbox.width:.0f}"  # the same chart gives the same text; two charts share no ids
    with default_style(svg__fonttype="none", svg__hashsalt=salt):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if _name(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for part in root.iter():
        _convert(part)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))


def _convert(part: ElementTree.Element) -> None:
    """Convert an element of matplotlib's SVG into an element of the page: names, colours, fonts and tooltips."""
    part.tag = _name(part.tag)
    known = part.attrib.get("id", "")
    if part.tag == "g":
        part.attrib.pop("id", None)
    part.attrib = {_name(name): _short(value) for name, value in part.attrib.items()}
    part.text = part.text if part.tag in ("text", "title") else None
    part.tail = None
    if known.startswith(TIP):
        title = ElementTree.Element("title")
        title.text = known[len(TIP) :]
        part.insert(0, title)
    if look := part.attrib.get("style"):
        look = re.sub(r"#0000([0-9a-f]{2})", lambda m: f"var(--{NAMES[int(m[1], 16) - 1]})", look)
        part.attrib["style"] = re.sub(r"font: (?:(\w+) )?[\d.]+px [^;]*", _weight, look)


def _weight(font: re.Match[str]) -> str:
    return "font-weight: 600" if font[1] else ""  # bold, as the headings of the page


def _name(name: str) -> str:
    """An XML name without its namespace."""
    return name.rpartition("}")[2]


def _short(value: str) -> str:
    """Coordinates with at most two decimals."""
    return re.sub(r"(\.\d\d)\d+", r"\1", value)
