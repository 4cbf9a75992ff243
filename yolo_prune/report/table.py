# SPDX-License-Identifier: AGPL-3.0-or-later
"""Plain-text tables of a report, for the training log and the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from yolo_prune.report.data import Report, RoundRow

MISSING = "-"


def number(value: float | None, scale: float = 1.0) -> str:
    """`value / scale` with three significant digits and no exponent, or a dash when it was not measured."""
    if value is None:
        return MISSING
    value /= scale
    size = abs(value)
    decimals = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 or size == 0 else 3
    return f"{value:.{decimals}f}"


def fitness(value: float | None) -> str:
    """A fitness (0..1) with three decimals, or a dash when it was not measured."""
    return MISSING if value is None else f"{value:.3f}"


def percent(part: float | None, whole: float | None) -> str:
    """`part` as a percentage of `whole`, or a dash when either was not measured."""
    return MISSING if part is None or not whole else f"{100 * part / whole:.1f} %"


def difference(after: float | None, before: float | None) -> str:
    """`after - before` with its sign and three decimals, or a dash when either was not measured."""
    return MISSING if after is None or before is None else f"{round(after - before, 3) + 0.0:+.3f}"


def summary_table(report: Report) -> str:
    """Dense against pruned: cost, file size and fitness, and how much of each was kept."""
    dense, pruned = report.dense, report.pruned
    rows = [["", "dense", "pruned", "kept"]]
    for label, before, after, scale in (
        ("GFLOPs", dense.flops, pruned.flops, 1e9),
        ("M params", dense.params, pruned.params, 1e6),
        ("size, MB", dense.size_mb, pruned.size_mb, 1.0),
        ("latency, ms", dense.latency_ms, pruned.latency_ms, 1.0),
    ):
        if label == "latency, ms" and before is None and after is None:
            continue
        rows.append([label, number(before, scale), number(after, scale), percent(after, before)])
    if pruned.zeros is not None:
        rows.append(["zeros", MISSING, percent(pruned.zeros, 1), MISSING])
        rows.append(["zipped, MB", MISSING, number(pruned.zipped_mb), MISSING])
    change = difference(pruned.fitness, dense.fitness)
    rows.append(["fitness", fitness(dense.fitness), fitness(pruned.fitness), change])
    return align(rows, left=1)


HELD = {True: "yes", False: "no", None: MISSING}


def rounds_table(report: Report) -> str:
    """One line for each round: its target, the cost that was kept, and the fitness before and after the cut.

    `epoch` is the epoch that began with the cut, 1-based as in results.csv. The dense model comes first. If there was a
    limit on the drop, the last column says whether the round held.
    """
    rows = [
        ["", "", "", "", "", "", "", "fitness", "", "", ""],
        ["round", "epoch", "target", "GFLOPs", "kept", "M params", "kept", "before", "cut", "recov.", "end"],
    ]
    dense = report.dense
    rows.append(["dense", MISSING, MISSING, number(dense.flops, 1e9), percent(dense.flops, dense.flops)])
    rows[-1] += [number(dense.params, 1e6), percent(dense.params, dense.params)]
    rows[-1] += [MISSING, MISSING, MISSING, fitness(dense.fitness)]
    rows += [_round_line(item, report) for item in report.rounds]
    if any(item.zeros is not None for item in report.rounds):
        shares = ["", "zeros", MISSING, *(percent(item.zeros, 1) for item in report.rounds)]
        rows = [[*row, share] for row, share in zip(rows, shares, strict=True)]
    if any(item.held is not None for item in report.rounds):
        verdicts = ["", "held", MISSING, *(HELD[item.held] for item in report.rounds)]
        rows = [[*row, verdict] for row, verdict in zip(rows, verdicts, strict=True)]
    return align(rows, left=1)


def target_text(row: RoundRow, unit: bool = True) -> str:
    """The target of a round, as in `65 % FLOPs` or `65 %`; empty if the report has no target."""
    names = {"flops": "FLOPs"}
    parts = (f"{100 * keep:.3g} % {names.get(name, name) if unit else ''}" for name, keep in row.target.items())
    return ", ".join(map(str.strip, parts))


def _round_line(row: RoundRow, report: Report) -> list[str]:
    around = (row.fitness.before, row.fitness.cut, row.fitness.recovered, row.fitness.end)
    return [
        str(row.number),
        str(row.epoch + 1),
        target_text(row) or MISSING,
        number(row.flops, 1e9),
        percent(row.flops, report.dense.flops),
        number(row.params, 1e6),
        percent(row.params, report.dense.params),
        *map(fitness, around),
    ]


def align(rows: Sequence[Sequence[str]], left: int) -> str:
    """Columns two spaces apart, the first `left` of them left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
