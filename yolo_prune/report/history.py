# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a run did over its epochs, as series to draw: the fitness, the FLOPs kept, the cuts and what was taken back."""

from __future__ import annotations

from dataclasses import dataclass

from yolo_prune.report.data import Report, RoundRow, first_known

Line = list[tuple[float, float]]


@dataclass(frozen=True)
class History:
    """The course of a run; positions are numbers of finished epochs.

    Attributes:
        last: the end of the axis: the epochs of the run, or more if more were trained.
        epochs: how many were logged.
        rounds: in order; each was cut at its `epoch`.
        lines: `(epochs, fitness)`, a new line wherever the model became another one or was not measured.
        kept: `(epochs, percent of the dense FLOPs)`, from there on; the last one says where the training ends.
        back: `(from, to)` of what was trained and taken back.
        dense: fitness of the dense model.
        limit: the lowest fitness that was allowed, if there was one.
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
        """Read the series off a report."""
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
        """Every fitness that a chart shows, but for those right after cuts, which are far below all others."""
        recovered = (row.fitness.recovered for row in self.rounds)
        known = (value for value in (self.dense, self.limit, *recovered) if value is not None)
        return [*known, *(value for line in self.lines for _, value in line)]

    @property
    def measured(self) -> bool:
        """Whether any fitness was measured."""
        return bool(self.fitness) or any(row.fitness.cut is not None for row in self.rounds)


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


def flops_kept(report: Report) -> Line:
    """Percent of the dense FLOPs from which epoch on, and once more at the end; empty if not known.

    The log says what was trained; a cut that no epoch has followed yet, only its round.
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
    """The epoch up to which a round that was taken back was trained."""
    later = [r.epoch for r in report.rounds if r.number > row.number]
    other = [r.epoch - 1 for r in report.epochs_log if r.epoch > row.epoch and r.flops != row.flops]
    trained = [r.epoch for r in report.epochs_log]
    return max(row.epoch, min([*later, *other, max([row.epoch, *trained])]))
