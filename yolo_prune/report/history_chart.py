# SPDX-License-Identifier: AGPL-3.0-or-later
"""The chart of a run over its epochs, for `report.html` and `prune.png`: fitness above, FLOPs kept below."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from yolo_prune.report import svg
from yolo_prune.report.data import RoundRow
from yolo_prune.report.history import History
from yolo_prune.report.table import MISSING, fitness, target_text

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

ROOM = 26.0  # height above the panels for the names of the cuts, in pixels
LOWER = 0.28  # height of the lower of two panels, as a share of their height
Name = tuple[float, str, list[RoundRow]]  # left edge in epochs, text, and the rounds that it names


def history_chart(history: History, *, width: float, height: float) -> Markup:
    """The chart for a page.

    Args:
        history: the series of a run; at least one must have data.
        width: width in pixels, before the page scales the chart.
        height: height in pixels, before the page scales the chart.
    """
    with svg.default_style():
        figure = svg.blank(width, height)
        layout: Any = figure.get_layout_engine()
        layout.set(rect=(0, 0, 1, 1 - ROOM / height), hspace=0.08)
        both = history.measured and bool(history.kept)
        panels = figure.subplots(
            2 if both else 1, squeeze=False, sharex=True, height_ratios=[1 - LOWER, LOWER] if both else None
        )[:, 0]
        draw_history(
            panels[0] if history.measured else None, panels[-1] if history.kept else None, history, svg.PAGE, svg.SIZE
        )
        figure.align_ylabels()
        svg.fix_layout(figure)
        name_cuts(panels[0], history, svg.PAGE, svg.SIZE)
        return svg.element(figure, "Fitness and FLOPs over the epochs of the run")


def draw_history(
    above: Axes | None, below: Axes | None, history: History, colours: Mapping[str, str], size: float
) -> list[Artist]:
    """Draw the fitness above and the FLOPs kept below, or only one of them if the other is not known.

    Args:
        above: axes for the fitness.
        below: axes for the FLOPs.
        history: the series of a run.
        colours: colours by name, with the names of `svg.PAGE`.
        size: size of text, in points.

    Returns:
        The labelled artists for a legend.
    """
    from matplotlib.ticker import MaxNLocator

    handles: list[Artist] = []
    for axes in (above, below):
        if axes is None:
            continue
        svg.plain_axes(axes, colours, size)
        axes.set_xlim(0, history.last)
        draw = _fitness if axes is above else _flops
        bands = _bands(axes, history, colours)
        handles = [*handles, *draw(axes, history, colours, size), *(bands if axes is (below or above) else [])]
    foot = below or above
    if foot is not None:
        foot.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
        foot.set_xlabel("epochs finished", loc="right", fontsize=size, color=colours["quiet"], weight="bold")
    if above is not None and below is not None:
        above.tick_params(labelbottom=False)
        above.spines["bottom"].set_visible(False)
    return handles


def _bands(axes: Axes, history: History, colours: Mapping[str, str]) -> list[Artist]:
    """Draw cuts as lines, and epochs that were rolled back as bands."""
    look: dict[str, Any] = {"color": colours["back-soft"], "linewidth": 0, "zorder": 0, "label": "rolled back"}
    bands: list[Artist] = [axes.axvspan(start, end, **look) for start, end in history.back]
    for row in history.rounds:
        line = axes.axvline(row.epoch, color=_colour(row, colours), linewidth=1.0, linestyle=(0, (3, 3)), zorder=1)
        svg.tip(line, _story(row))
    return bands[:1]


def _fitness(axes: Axes, history: History, colours: Mapping[str, str], size: float) -> list[Artist]:
    """Draw the fitness. Between a cut and the epoch before it, the line is interrupted."""
    known = history.fitness or [0.0]
    axes.set_ylim(*svg.span([*known, 0.9 * max(known)], margin=0.15))  # so that small changes look small
    svg.round_ticks(axes.yaxis, most=5)
    axes.set_ylabel("fitness", fontsize=size, color=colours["quiet"], weight="bold")
    handles: list[Artist] = []
    look: dict[str, Any] = {"color": colours["quiet"], "linewidth": 1.2, "linestyle": (0, (1, 2)), "zorder": 2}
    if history.dense is not None:
        handles.append(axes.axhline(history.dense, label="dense fitness", **look))
    if history.limit is not None:
        look |= {"color": colours["back"], "linestyle": (0, (6, 3))}
        handles.append(axes.axhline(history.limit, label=f"limit {fitness(history.limit)}", **look))
    dotted = axes.bbox.width / history.last > 8
    for index, line in enumerate(history.lines):
        xs, ys = zip(*line, strict=True)
        look = {"color": colours["pruned"], "linewidth": 2.2, "label": "fitness", "zorder": 3, "clip_on": False}
        look |= {"marker": "o" if dotted or len(line) == 1 else "", "markersize": 4.5}
        drawn = axes.plot(xs, ys, **look)
        handles += drawn if index == 0 else []
    return [*handles, *_marks(axes, history, colours, size)]


def _marks(axes: Axes, history: History, colours: Mapping[str, str], size: float) -> list[Artist]:
    """Draw the fitness right after the cuts, and after recovery."""
    low = axes.get_ylim()[0]
    handles: list[Artist] = []
    for key, label, marker, fill in (
        ("cut", "right after the cut", "v", colours["sheet"]),
        ("recovered", "recovered", "D", colours["dense"]),
    ):
        look: dict[str, Any] = {"color": fill, "markeredgecolor": colours["pruned"], "markeredgewidth": 1.6}
        look |= {"marker": marker, "markersize": 7, "linestyle": "", "clip_on": False, "zorder": 5, "label": label}
        known = [(row, value) for row in history.rounds if (value := getattr(row.fitness, key)) is not None]
        marks = [axes.plot([row.epoch], [max(value, low)], **look)[0] for row, value in known]
        for mark, (row, value) in zip(marks, known, strict=True):
            svg.tip(mark, f"round {row.number}, {label}: fitness {fitness(value)}")
        handles += marks[:1]
    _label_low_values(axes, history, colours, size)
    return handles


def _label_low_values(axes: Axes, history: History, colours: Mapping[str, str], size: float) -> None:
    """Write fitness values right after cuts that are below the axis as numbers, if there is room.

    The axis does not reach down to these values, because the other values would then be too close together.
    """
    low, room = axes.get_ylim()[0], 5 * size * axes.figure.dpi / 72
    place: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": size, "color": colours["quiet"]}
    ends = [*(row.epoch for row in history.rounds[1:]), history.last]
    for row, end in zip(history.rounds, ends, strict=False):
        value, wide = row.fitness.cut, (end - row.epoch) / history.last * axes.bbox.width
        if value is not None and value < low and wide > room:
            axes.annotate(fitness(value), (row.epoch, low), (8, 0), **place)


def _flops(axes: Axes, history: History, colours: Mapping[str, str], size: float) -> list[Artist]:
    """Draw the FLOPs of the model, in percent of the dense model, as steps at cuts and rollbacks."""
    axes.set_ylim(0, 105)
    axes.set_yticks((0, 50, 100), labels=("0 %", "50 %", "100 %"))
    axes.set_ylabel("FLOPs kept", fontsize=size, color=colours["quiet"], weight="bold")
    xs, ys = zip(*history.kept, strict=True)
    axes.fill_between(xs, ys, step="post", color=colours["cost-soft"], linewidth=0, zorder=2)
    look: dict[str, Any] = {"color": colours["cost"], "linewidth": 2.0, "label": "FLOPs kept", "zorder": 3}
    line = axes.step(xs, ys, where="post", **look)
    place: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "bottom", "weight": "bold"}
    axes.annotate(f"{ys[-1]:.1f} %", (xs[-1], ys[-1]), (-3, 4), color=colours["cost"], fontsize=size, **place)
    return list(line)


# ---- names of the cuts -----------------------------------------------------------------------------------------------


def name_cuts(axes: Axes, history: History, colours: Mapping[str, str], size: float) -> None:
    """Write the names of the cuts above the axes. The layout must be final."""
    from matplotlib.font_manager import FontProperties

    canvas: Any = axes.figure.canvas
    renderer, font = canvas.get_renderer(), FontProperties(size=size, weight="bold")
    pixel = history.last / axes.bbox.width
    end = (axes.figure.bbox.width - axes.bbox.x0) * pixel

    def wide(text: str) -> float:
        return float(renderer.get_text_width_height_descent(text, font, False)[0]) * pixel

    for left, text, rows in names_of_cuts(history.rounds, wide, end, 4 * pixel):
        rolled_back = all(row.held is False for row in rows)
        place: dict[str, Any] = {
            "xycoords": axes.get_xaxis_transform(),
            "textcoords": "offset points",
            "weight": "bold",
        }
        colour = colours["back" if rolled_back else "ink"]
        label = axes.annotate(text, (left, 1.0), (0, 6), color=colour, fontsize=size, annotation_clip=False, **place)
        svg.tip(label, "; ".join(_story(row) for row in rows))


def names_of_cuts(rounds: Sequence[RoundRow], wide: Callable[[str], float], end: float, gap: float) -> list[Name]:
    """Names of cuts that do not overlap.

    Each cut has its own name, in the longest form that fits. If even short names do not fit, neighbours share a name.

    Args:
        rounds: the rounds in order.
        wide: returns the width of a text, in epochs.
        end: right edge for all names, in epochs.
        gap: distance by which a name starts before its cut, and ends before the next name, in epochs.

    Returns:
        For each name: its left edge in epochs, its text, and the rounds that it names.
    """
    for text in (_with_unit, _with_target, _short):
        names = _shared(rounds, text, wide, end, gap)
        if len(names) == len(rounds):
            return names
    return _shared(rounds, _with_target, wide, end, gap)


def _shared(
    rounds: Sequence[RoundRow],
    text_of: Callable[[Sequence[RoundRow]], str],
    wide: Callable[[str], float],
    end: float,
    gap: float,
) -> list[Name]:
    names: list[Name] = []
    for row in rounds:
        group = [row]
        while True:
            text = text_of(group)
            left = min(group[0].epoch - gap, end - wide(text))
            if not names or names[-1][0] + wide(names[-1][1]) + gap <= left:
                break
            group = names.pop()[2] + group
        names.append((left, text, group))
    return names


def _short(rounds: Sequence[RoundRow]) -> str:
    first, last = rounds[0].number, rounds[-1].number
    return f"round {last}" if first == last else f"rounds {first}-{last}"


def _with_target(rounds: Sequence[RoundRow], unit: bool = False) -> str:
    target = target_text(rounds[-1], unit)
    return f"{_short(rounds)} → {target}" if target else _short(rounds)


def _with_unit(rounds: Sequence[RoundRow]) -> str:
    return _with_target(rounds, unit=True)


def _colour(row: RoundRow, colours: Mapping[str, str]) -> str:
    return colours["back" if row.held is False else "quiet"]


def _story(row: RoundRow) -> str:
    """The description of a round in one line."""
    name = f"round {row.number}" + (", rolled back" if row.held is False else "")
    target = target_text(row)
    around = row.fitness
    parts = [f"to keep {target}" if target else ""]
    parts += [
        f"fitness {fitness(value)} {when}"
        for value, when in ((around.before, "before"), (around.cut, "after the cut"), (around.end, "at the end"))
        if fitness(value) != MISSING
    ]
    return f"{name}: {', '.join(filter(None, parts))}".rstrip(": ")
