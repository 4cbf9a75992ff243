# SPDX-License-Identifier: AGPL-3.0-or-later
"""The course of a run over its epochs, as series for charts: fitness, FLOPs kept, cuts and rollbacks."""

from __future__ import annotations

from dataclasses import dataclass

from yolo_prune.report.data import Report, RoundRow, first_known

Line = list[tuple[float, float]]


@dataclass(frozen=True)
class History:
    """The course of a run. Positions on the axis are numbers of finished epochs.

    Attributes:
        last: end of the axis: the epochs of the run, or more if more were trained.
        epochs: number of epochs in the log.
        rounds: the rounds in order; each cut was made at the `epoch` of its round.
        lines: lines of points `(epochs, fitness)`. A new line starts if the model changes or was not measured.
        kept: points `(epochs, percent of the dense FLOPs)`; each value is valid up to the next point, and the last
            point marks the end of the training.
        back: `(start, end)` of each part that was trained and rolled back.
        dense: fitness of the dense model.
        limit: lowest allowed fitness, if there was a limit.
    """

    last: int
    epochs: int
    rounds: tuple[RoundRow, ...]
    lines: tuple[Line, ...]
    kept: Line
    back: tuple[tuple[int, int], ...]
    dense: float | None = None
    limit: float | None = None

    @classmethod
    def of(cls, report: Report, limit: float | None = None) -> History:
        """Make the series from a report."""
        epochs = [row.epoch for row in report.epochs_log]
        return cls(
            last=max([report.epochs or 1, *epochs, *(row.epoch for row in report.rounds)]),
            epochs=len(epochs),
            rounds=tuple(report.rounds),
            lines=tuple(fitness_lines(report)),
            kept=flops_kept(report),
            back=tuple((row.epoch, back_until(report, row)) for row in report.rounds if row.held is False),
            dense=report.dense.fitness,
            limit=limit,
        )

    @property
    def fitness(self) -> list[float]:
        """All fitness values in a chart, except those right after cuts, which are far below the others."""
        recovered = (row.fitness.recovered for row in self.rounds)
        known = (value for value in (self.dense, self.limit, *recovered) if value is not None)
        return [*known, *(value for line in self.lines for _, value in line)]

    @property
    def measured(self) -> bool:
        """Whether any fitness was measured."""
        return bool(self.fitness) or any(row.fitness.cut is not None for row in self.rounds)


def fitness_lines(report: Report) -> list[Line]:
    """The fitness over the epochs. A new line starts if the model changes or was not measured."""
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


def flops_kept(report: Report) -> Line:
    """The percentage of the dense FLOPs from each change on, and again at the end; empty if it is not known.

    The epochs in the log give the cost of the trained models. A cut without an epoch after it is only in its round.
    """
    log = [(row.epoch - 1, row.flops) for row in sorted(report.epochs_log, key=lambda r: r.epoch)]
    trained = log[-1][0] + 1 if log else 0
    log += [(row.epoch, row.flops) for row in report.rounds if row.epoch >= trained]
    known = [(epoch, flops) for epoch, flops in log if flops is not None]
    if not report.dense.flops or not known:
        return []
    kept: Line = [(0.0, 100.0)] if known[0][0] == 0 and any(row.epoch == 0 for row in report.rounds) else []
    for epoch, flops in known:
        share = 100 * flops / report.dense.flops
        if not kept or share != kept[-1][1]:
            kept.append((float(epoch), share))
    return [*kept, (float(max(trained, known[-1][0])), kept[-1][1])]


def back_until(report: Report, row: RoundRow) -> int:
    """The last epoch that was trained in a round that was rolled back."""
    later = [r.epoch for r in report.rounds if r.number > row.number]
    other = [r.epoch - 1 for r in report.epochs_log if r.epoch > row.epoch and r.flops != row.flops]
    trained = [r.epoch for r in report.epochs_log]
    return max(row.epoch, min([*later, *other, max([row.epoch, *trained])]))
