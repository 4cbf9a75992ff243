# SPDX-License-Identifier: AGPL-3.0-or-later
"""A run over its epochs: the fitness above, the FLOPs below, cuts as lines, and rounds that were taken back."""

from __future__ import annotations

from itertools import pairwise

from yolo_prune.report.data import Report, RoundRow, first_known
from yolo_prune.report.plot import LETTER, SMALL, Axis, Plot, axis_for, tick_text

LEFT, RIGHT, TOP, BOTTOM = 58.0, 18.0, 44.0, 42.0  # room around the panels
BETWEEN = 44.0  # the panels
LOWER = 0.28  # share of the height that the lower panel has
Line = list[tuple[float, float]]


def history(report: Report, limit: float | None, *, width: float, height: float) -> Plot:
    """Draw what happened to the fitness and the FLOPs of a model while it was trained.

    Args:
        report: with at least one finished epoch.
        limit: the lowest fitness that was allowed, if there was one.
        width: of the plot, in pixels where it is not scaled.
        height: likewise.
    """
    plot = Plot(width, height, "Fitness and FLOPs over the epochs of the run")
    costs, lines = flops_steps(report), fitness_lines(report)
    inner = height - TOP - BOTTOM
    lower = (inner - BETWEEN) * LOWER if costs and lines else inner if costs else 0.0
    foot = height - BOTTOM
    upper = foot if not costs else foot - lower - BETWEEN
    last = max([report.epochs or 1, *(row.epoch for row in report.epochs_log)])
    x = Axis(0.0, float(last), LEFT, width - RIGHT)
    _taken_back(plot, report, x, foot)
    if lines:
        _fitness(plot, report, lines, x, upper, limit)
    if costs:
        _flops(plot, costs, x, foot, foot - lower)
    _cuts(plot, report, x, foot)
    ticks = [tick for tick in x.ticks(11 if width > 500 else 6) if tick == round(tick)]
    for tick in ticks:
        plot.text("tick", x.at(tick), foot + 18, f"{tick:.0f}", "middle")
    plot.text("axis-name", width - RIGHT, foot + 36, "epochs finished", "end")
    return plot


def fitness_lines(report: Report) -> list[Line]:
    """The fitness over the epochs, interrupted wherever the model became another one, or was not measured."""
    starts = {row.epoch: first_known(row.fitness.recovered, row.fitness.cut) for row in report.rounds}
    lines: list[Line] = []
    current: Line = []
    if 0 not in starts and report.dense.fitness is not None and report.epochs_log:
        current = [(0.0, report.dense.fitness)]
    before: float | None = None
    for row in sorted(report.epochs_log, key=lambda r: r.epoch):
        begun = row.epoch - 1
        if begun in starts or (before is not None and row.flops != before) or row.fitness is None:
            lines.append(current)
            value = starts.get(begun)
            current = [] if value is None else [(float(begun), value)]
        if row.fitness is not None:
            current.append((float(row.epoch), row.fitness))
        before = row.flops
    return [line for line in [*lines, current] if line]


def flops_steps(report: Report) -> Line:
    """Percent of the dense FLOPs that the model had, as corners of steps over the epochs; empty if not known."""
    dense = report.dense.flops
    log = [row for row in sorted(report.epochs_log, key=lambda r: r.epoch) if row.flops is not None]
    if not dense or not log:
        return []
    steps: Line = []
    for row in log:
        kept = 100 * (row.flops or 0.0) / dense
        steps += [(float(row.epoch - 1), kept), (float(row.epoch), kept)]
    return [(0.0, 100.0), *steps]


def back_until(report: Report, row: RoundRow) -> int:
    """The epoch up to which a round that was taken back was trained."""
    later = [r.epoch for r in report.rounds if r.number > row.number]
    other = [r.epoch - 1 for r in report.epochs_log if r.epoch > row.epoch and r.flops != row.flops]
    trained = [r.epoch for r in report.epochs_log]
    return max(row.epoch, min([*later, *other, max([row.epoch, *trained])]))


def _taken_back(plot: Plot, report: Report, x: Axis, foot: float) -> None:
    for row in report.rounds:
        if row.held is False:
            left, right = x.at(row.epoch), x.at(back_until(report, row))
            plot.add("rect", "back-band", x=left, y=TOP, width=max(right - left, 2.0), height=foot - TOP)


def _fitness(plot: Plot, report: Report, lines: list[Line], x: Axis, foot: float, limit: float | None) -> None:
    dense = report.dense.fitness
    around = [(r.epoch, r.fitness.cut, r.fitness.recovered) for r in report.rounds]
    values = [value for line in lines for _, value in line]
    values += [v for v in (dense, limit, *(recovered for *_, recovered in around)) if v is not None]
    values += [0.9 * max(values)]  # small changes look small
    y = axis_for(values, foot, TOP + 12)
    right = plot.width - RIGHT
    ticks = y.ticks(6 if foot - TOP > 160 else 4)
    for tick in ticks:
        plot.add("line", "grid", x1=LEFT, x2=right, y1=y.at(tick), y2=y.at(tick))
        plot.text("tick", LEFT - 8, y.at(tick) + 4, tick_text(tick, ticks), "end")
    plot.text("axis-name", 0.0, TOP - 11, "fitness")
    if limit is not None:
        plot.add("line", "limit", x1=LEFT, x2=right, y1=y.at(limit), y2=y.at(limit))
        plot.text("limit-name", right, y.at(limit) + 15, f"limit {limit:.3f}", "end")
    if dense is not None:
        plot.add("line", "reference", x1=LEFT, x2=right, y1=y.at(dense), y2=y.at(dense))
        plot.text("reference-name", right, y.at(dense) - 6, f"dense {dense:.3f}", "end")
    dotted = plot.width / max(len(report.epochs_log), 1) > 9
    for line in lines:
        places = [(x.at(a), y.at(b)) for a, b in line]
        plot.line("fitness-line", places)
        for across, up in places if dotted else ():
            plot.add("circle", "fitness-dot", cx=across, cy=up, r=2.6)
    after = [*(x.at(epoch) for epoch, *_ in around[1:]), right + 60]
    for (epoch, cut, recovered), beyond in zip(around, after, strict=False):
        if cut is not None:
            across, up = x.at(epoch), min(y.at(cut), foot - 8)
            plot.add("path", "mark-cut", d=f"M{across - 6:.1f} {up - 5:.1f}h12l-6 10z")
            if cut < y.low and beyond - across > 56:  # such values would squeeze all others: they are at the foot
                plot.text("mark-name", across + 10, up + 4, f"{cut:.3f}")
        if recovered is not None:
            across, up = x.at(epoch), y.at(recovered)
            plot.add("path", "mark-recovered", d=f"M{across:.1f} {up - 6:.1f}l6 6l-6 6l-6 -6z")


def _flops(plot: Plot, steps: Line, x: Axis, foot: float, top: float) -> None:
    y = Axis(0.0, 100.0, foot, top)
    right = plot.width - RIGHT
    for tick in (0.0, 50.0, 100.0):
        plot.add("line", "grid", x1=LEFT, x2=right, y1=y.at(tick), y2=y.at(tick))
        plot.text("tick", LEFT - 8, y.at(tick) + 4, f"{tick:.0f} %", "end")
    plot.text("axis-name", 0.0, top - 14, "FLOPs kept")
    places = [(x.at(a), y.at(b)) for a, b in steps]
    corners = [(places[0][0], foot), *places, (places[-1][0], foot)]
    plot.add("polygon", "cost-area", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in corners))
    plot.line("cost-line", places)
    across, up = places[-1]
    plot.text("cost-name", across - 4, up - 7, f"{steps[-1][1]:.1f} %", "end")


def _cuts(plot: Plot, report: Report, x: Axis, foot: float) -> None:
    """A line per cut; above it the number of the round, where there is room, and whether it was taken back."""
    edges = [*(x.at(row.epoch) for row in report.rounds), plot.width + 10]
    free = -1.0
    for row, (at, after) in zip(report.rounds, pairwise(edges), strict=True):
        look = "cut back" if row.held is False else "cut"
        plot.add("line", look, x1=at, x2=at, y1=TOP - 6, y2=foot)
        texts = [f"round {row.number}", str(row.number)]
        if row.held is False:
            texts.insert(0, f"round {row.number}, taken back")
        room = after - at
        text = next((t for t in texts if len(t) * LETTER * SMALL + 6 <= room), "")
        wide = len(text) * LETTER * SMALL
        left = min(at - 3, plot.width - wide - 2)
        if text and left > free:
            plot.text("cut-name back" if row.held is False else "cut-name", left, TOP - 11, text)
            free = left + wide
