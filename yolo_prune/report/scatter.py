# SPDX-License-Identifier: AGPL-3.0-or-later
"""Accuracy against cost: what a search went through, or several models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from yolo_prune.report.front import Front
from yolo_prune.report.plot import Labels, Plot, axis_for, tick_text

LEFT, RIGHT, TOP, BOTTOM = 52.0, 18.0, 26.0, 46.0  # room around the points


@dataclass(frozen=True)
class Dot:
    """A model: its cost and accuracy, its class in the style sheet, the text in it and beside it."""

    x: float
    y: float
    look: str
    inside: str = ""
    beside: str = ""


def scatter(
    dots: Sequence[Dot],
    *,
    width: float,
    height: float,
    title: str,
    across: str,
    up: str,
    limit: float | None = None,
) -> Plot:
    """Dots over axes, with a line through those that no other dot beats in both.

    Args:
        dots: at least one.
        width: of the plot, in pixels where it is not scaled.
        height: likewise.
        title: for those who cannot see it.
        across: what the horizontal axis shows.
        up: what the vertical axis shows.
        limit: an accuracy to draw a line at.
    """
    plot = Plot(width, height, title)
    heights = [*(dot.y for dot in dots), *([] if limit is None else [limit])]
    x = axis_for([dot.x for dot in dots], LEFT, width - RIGHT, margin=0.12)
    y = axis_for(heights, height - BOTTOM, TOP, margin=0.15, least=0.02)
    ticks = y.ticks(5)
    for tick in ticks:
        plot.add("line", "grid", x1=LEFT, x2=width - RIGHT, y1=y.at(tick), y2=y.at(tick))
        plot.text("tick", LEFT - 8, y.at(tick) + 4, tick_text(tick, ticks), "end")
    ticks = x.ticks(7 if width > 420 else 5)
    for tick in ticks:
        plot.text("tick", x.at(tick), height - BOTTOM + 20, tick_text(tick, ticks), "middle")
    plot.add("line", "axis", x1=LEFT, x2=width - RIGHT, y1=height - BOTTOM, y2=height - BOTTOM)
    plot.text("axis-name", width - RIGHT, height - 6, across, "end")
    plot.text("axis-name", 0.0, 14, up)
    if limit is not None:
        plot.add("line", "limit", x1=LEFT, x2=width - RIGHT, y1=y.at(limit), y2=y.at(limit))
        plot.text("limit-name", LEFT + 4, y.at(limit) + 15, f"limit {limit:.3f}")
    plot.line("frontier", [(x.at(a), y.at(b)) for a, b in frontier([(d.x, d.y) for d in dots])])
    places = [(x.at(dot.x), y.at(dot.y)) for dot in dots]
    labels = Labels(plot, (LEFT, 18.0, width, height - BOTTOM), places, 11.0 if dots[0].inside else 7.0)
    for dot, (across_at, up_at) in zip(dots, places, strict=True):
        plot.add("circle", dot.look, cx=across_at, cy=up_at, r=11.0 if dot.inside else 6.5)
        if dot.inside:
            plot.text("dot-text", across_at, up_at + 4, dot.inside, "middle")
        if dot.beside:
            labels.put("dot-name", across_at, up_at, dot.beside)
    return plot


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats: none costs as little or less and is better. Cheapest first."""
    best: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best


def front_dots(front: Front) -> list[Dot]:
    """The points of a search, in percent of the dense model; those that were not measured are left out."""
    metric = cost_metric(front)
    dots = []
    for point in front.points:
        kept = getattr(point, metric)
        if kept is None or point.fitness is None:
            continue
        look = "delivered" if point.delivered else "held" if point.held else "back"
        name = "start" if point.round == 0 else f"round {point.round}"
        dots.append(Dot(100 * kept, point.fitness, f"dot {look}", beside=name))
    return dots


def cost_metric(front: Front) -> str:
    """What is known of the cost of all models: FLOPs where possible."""
    return "flops_kept" if all(p.flops_kept is not None for p in front.points) else "params_kept"
