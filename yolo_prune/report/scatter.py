# SPDX-License-Identifier: AGPL-3.0-or-later
"""Charts of accuracy against cost: the models of a search, or several models that are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from yolo_prune.report import svg
from yolo_prune.report.front import Front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

RADIUS = 6.5  # of a dot, in pixels
AWAY = RADIUS + 4  # distance from the middle of a dot to its name
RINGS = 5  # number of distances (multiples of AWAY) at which a name is tried


@dataclass(frozen=True)
class Dot:
    """A model in a chart: its cost and accuracy, its look, a short name beside it, and a text for its tooltip.

    `look` is `delivered`, `held`, `back`, or the name of a colour in the style sheet.
    """

    x: float
    y: float
    look: str
    name: str
    tip: str = ""


def scatter(
    dots: Sequence[Dot],
    *,
    width: float,
    height: float,
    title: str,
    across: str,
    up: str,
    limit: float | None = None,
) -> Markup:
    """A chart of models as dots, with a line through the best dots: no other dot is both cheaper and more accurate.

    Args:
        dots: at least one dot.
        width: width in pixels, before the page scales the chart.
        height: height in pixels, before the page scales the chart.
        title: description for screen readers.
        across: label of the horizontal axis.
        up: label of the vertical axis.
        limit: accuracy at which a line is drawn.
    """
    colours = svg.PAGE
    with svg.default_style():
        figure = svg.blank(width, height)
        axes = figure.subplots()
        svg.plain_axes(axes, colours)
        axes.set_xlim(*svg.span([dot.x for dot in dots], margin=0.12))
        heights = [*(dot.y for dot in dots), *([] if limit is None else [limit])]
        axes.set_ylim(*svg.span(heights, margin=0.15, least=0.02))
        svg.round_ticks(axes.xaxis, most=6 if width > 420 else 4)
        svg.round_ticks(axes.yaxis, most=5)
        words: dict[str, Any] = {"fontsize": svg.SIZE, "color": colours["quiet"], "weight": "bold", "parse_math": False}
        axes.set_xlabel(svg.printable(across), loc="right", **words)
        figure.suptitle(svg.printable(up), x=0.0, ha="left", **words)
        if limit is not None:
            axes.axhline(limit, color=colours["back"], linewidth=1.2, linestyle=(0, (6, 3)), zorder=1)
        best = frontier([(dot.x, dot.y) for dot in dots])
        axes.plot(*zip(*best, strict=True), color=colours["quiet"], linewidth=1.4, linestyle=(0, (1, 2.5)), zorder=2)
        for dot in dots:
            look = _look(dot.look, colours)
            (drawn,) = axes.plot([dot.x], [dot.y], marker="o", markersize=2 * RADIUS, zorder=3, **look)
            svg.tip(drawn, dot.tip or dot.name)
        svg.fix_layout(figure)
        _write_names(axes, dots, colours)
        return svg.element(figure, title)


def _look(look: str, colours: Mapping[str, str]) -> dict[str, Any]:
    fill, edge = {
        "delivered": ("pruned", "pruned"),
        "held": ("dense", "pruned"),
        "back": ("sheet", "back"),
    }.get(look, (look, "sheet"))
    return {"color": colours[fill], "markeredgecolor": colours[edge], "markeredgewidth": 1.6}


def _write_names(axes: Axes, dots: Sequence[Dot], colours: Mapping[str, str]) -> None:
    """Write each name at the nearest place where it covers no dot and no other name.

    A name far from its dot gets a line to the dot. A name without room is left out: the tooltip of its dot and the
    tables show it.
    """
    from matplotlib.transforms import Bbox

    size, around = RADIUS + 1, axes.transData.transform([(dot.x, dot.y) for dot in dots])
    taken = [Bbox.from_extents(x - size, y - size, x + size, y + size) for x, y in around]
    words: dict[str, Any] = {"fontsize": svg.SIZE, "weight": "bold", "color": colours["ink"], "zorder": 4}
    words |= {"textcoords": "offset pixels", "annotation_clip": False, "parse_math": False}
    line: dict[str, Any] = {"arrowstyle": "-", "color": colours["quiet"], "shrinkA": 0, "shrinkB": RADIUS}
    for dot in dots:
        label = axes.annotate(dot.name, (dot.x, dot.y), (0, 0), **words)
        place = _place(axes, label, taken)
        if place is None:
            label.remove()
        elif math.hypot(*place) > 1.5 * AWAY:
            axes.annotate("", (dot.x, dot.y), place, textcoords="offset pixels", arrowprops=line, zorder=2)


def _place(axes: Axes, label: Annotation, taken: list[Bbox]) -> tuple[float, float] | None:
    """Move a label to the nearest free place around its dot. Returns its offset; None if there is no free place."""
    canvas: Any = axes.figure.canvas
    area, right = axes.bbox, axes.figure.bbox.x1
    for ring in range(1, RINGS + 1):
        for angle in (0, 180, 90, 270, 45, 315, 135, 225):
            x, y = round(math.cos(math.radians(angle)), 3), round(math.sin(math.radians(angle)), 3)
            place = (ring * AWAY * x, ring * AWAY * y)
            label.set_position(place)
            label.set_horizontalalignment("left" if x > 0 else "right" if x < 0 else "center")
            label.set_verticalalignment("bottom" if y > 0 else "top" if y < 0 else "center")
            box = label.get_window_extent(canvas.get_renderer())
            inside = area.x0 <= box.x0 and box.x1 <= right and area.y0 <= box.y0 and box.y1 <= area.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                return place
    return None


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The best points, cheapest first: there is no other point that costs no more and is at least as accurate."""
    best: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best


def front_dots(front: Front) -> list[Dot]:
    """The points of a search as dots, in percent of the dense model. Points without a measurement are left out."""
    metric = cost_metric(front)
    dots = []
    for point in front.points:
        kept = getattr(point, metric)
        if kept is None or point.fitness is None:
            continue
        look = "delivered" if point.delivered else "held" if point.held else "back"
        name = "start" if point.round == 0 else f"round {point.round}"
        dots.append(Dot(100 * kept, point.fitness, look, name, f"{name}: {100 * kept:.1f} %, {point.fitness:.3f}"))
    return dots


def cost_metric(front: Front) -> str:
    """The cost that is known for all models: weights that are not zero, or FLOPs, or else parameters."""
    if all(p.weights_kept is not None for p in front.points):
        return "weights_kept"
    return "flops_kept" if all(p.flops_kept is not None for p in front.points) else "params_kept"
