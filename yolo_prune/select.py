# SPDX-License-Identifier: AGPL-3.0-or-later
"""Scores, a target and constraints in; which channels stay out."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from yolo_prune.cost import Cost
from yolo_prune.errors import TargetError
from yolo_prune.graph.structure import Group

COST_WEIGHT = 0.25  # exponent of the cost in "share of the scores per cost"


@dataclass(frozen=True)
class Goal:
    """What the selection has to reach.

    Attributes:
        metric: "flops" or "params".
        limit: the most that may be left, in that metric's unit.
        dense: the same metric of the dense model; messages speak in fractions of it.
    """

    metric: str
    limit: float
    dense: float


@dataclass(frozen=True)
class Constraints:
    """Per group: widths are multiples of `round_to`, at least `min`, and at least `1 - max_removed` of dense.

    Attributes:
        layers: `{layer name: what holds for its outputs instead}`.
    """

    round_to: int
    min: int
    max_removed: float
    layers: Mapping[str, Constraints] = field(default_factory=dict)

    def of(self, group: Group) -> Constraints:
        """What holds for a group: of what holds for its layers, the strictest."""
        all_of_them = [self.layers.get(name, self) for name in group.layers] or [self]
        return Constraints(
            math.lcm(*(c.round_to for c in all_of_them)),
            max(c.min for c in all_of_them),
            min(c.max_removed for c in all_of_them),
        )


def select(
    groups: Sequence[Group],
    cost: Cost,
    scores: Mapping[str, Tensor],
    goal: Goal,
    constraints: Constraints,
    dense_widths: Mapping[str, int],
    comparable: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Choose the channels to keep: global, greedy by score lost per cost saved.

    A step takes the lowest scored channels of one group down to its next allowed width. What it loses is their scores,
    if those are amounts of the loss; else the share of the scores still there (so a group that is already thin resists,
    as in LAMP, Lee et al., ICLR 2021, arXiv:2010.07611), weighed against a small power of the cost only. What it saves
    is the true change of the whole model's cost at that moment, as a thinner producer also thins its consumers. When
    the goal is passed, steps that still fit are taken back, dearest first.

    Args:
        groups: all groups; protected ones are left alone.
        cost: of this model.
        scores: `{set name: (size,)}`, higher matters more.
        goal: what to reach.
        constraints: on the widths.
        dense_widths: `{set name: channels in the dense model}`.
        comparable: scores are amounts of the loss, and can be compared between sets.

    Returns:
        `{set name: kept channels, ascending}` for the sets that get narrower.

    Raises:
        TargetError: If the constraints do not allow the goal; says what they allow.
    """
    ledger = _Ledger(cost, goal.metric)
    levels = [(g, _levels(g, constraints, dense_widths)) for g in groups if not g.protected]
    moves = [_Move(g, ledger, scores, ls, comparable) for g, ls in levels if len(ls) > 1]
    _cut(moves, ledger, goal)
    _give_back(moves, ledger, goal)
    return {name: kept for m in moves if m.at for name, kept in m.kept().items()}


def least(
    groups: Sequence[Group], cost: Cost, metric: str, constraints: Constraints, dense_widths: Mapping[str, int]
) -> float:
    """What is left, in the metric's unit, once everything is removed that the constraints allow."""
    ledger = _Ledger(cost, metric)
    for group in groups:
        levels = [] if group.protected else _levels(group, constraints, dense_widths)
        if len(levels) > 1:
            _Move(group, ledger, None, levels).step(len(levels) - 1)
    return ledger.total()


class _Ledger:
    """Cost of the model as channels go: `sum(weight * d0 * d1 * rest)` over tensors."""

    def __init__(self, cost: Cost, metric: str) -> None:
        weights = {n: 2 * w for n, w in cost.macs.items()} if metric == "flops" else dict.fromkeys(cost.params, 1.0)
        self.fixed = 2 * cost.fixed if metric == "flops" else 0.0
        names = sorted(weights)
        shapes = [(*cost.shapes[n], 1, 1)[:2] for n in names]
        self.row = {n: i for i, n in enumerate(names)}
        self.dims = np.array(shapes, dtype=np.float64).T.copy()
        rest = [math.prod(cost.shapes[n][2:]) for n in names]
        self.weight = np.array([weights[n] for n in names]) * np.array(rest, dtype=np.float64)

    def total(self) -> float:
        return self.fixed + float(np.sum(self.weight * self.dims[0] * self.dims[1]))

    def change(self, rows: NDArray[np.intp], d0: NDArray[np.float64], d1: NDArray[np.float64]) -> float:
        """Cost saved by making `rows` smaller by `d0` and `d1`."""
        a, b = self.dims[0][rows], self.dims[1][rows]
        return float(np.sum(self.weight[rows] * (a * b - (a - d0) * (b - d1))))


class _Move:
    """One group on its way down: allowed widths, what each step loses, where it stands."""

    def __init__(
        self,
        group: Group,
        ledger: _Ledger,
        scores: Mapping[str, Tensor] | None,
        levels: list[int],
        comparable: bool = False,
    ) -> None:
        self.group = group
        self.comparable = comparable
        self.power = 1.0 if comparable else COST_WEIGHT
        self.ledger = ledger
        self.at = 0
        self.levels = levels
        # Ties go to the later channel, so that the order is the same on every machine.
        self.order = {s.name: np.argsort(scores[s.name].numpy(), kind="stable") for s in group.sets} if scores else {}
        self.losses = self._losses(scores) if scores else []
        shrink: dict[int, list[int]] = {}
        for s in group.sets:
            for slot in s.slots:
                if slot.tensor in ledger.row:
                    shrink.setdefault(ledger.row[slot.tensor], [0, 0])[slot.dim] += s.size // group.grain
        self.rows = np.array(list(shrink), dtype=np.intp)
        self.shrink = np.array(list(shrink.values()), dtype=np.float64).reshape(-1, 2).T

    def _losses(self, scores: Mapping[str, Tensor]) -> list[float]:
        losses = np.zeros(len(self.levels) - 1)
        for s in self.group.sets:
            ascending = scores[s.name].numpy()[self.order[s.name]]
            below = np.concatenate(([0.0], np.cumsum(ascending)))
            gone = [s.size - s.size // self.group.grain * level for level in self.levels]
            for i, (now, then) in enumerate(pairwise(gone)):
                left = 1.0 if self.comparable else below[-1] - below[now]
                losses[i] += (below[then] - below[now]) / left if left > 0 else 0.0
        return [float(x) for x in losses / (1 if self.comparable else len(self.group.sets))]

    def saving(self, start: int) -> float:
        """Cost saved (or spent again) between level `start` and the next."""
        steps = self.levels[start] - self.levels[start + 1]
        return self.ledger.change(self.rows, *(self.shrink * steps))

    def price(self) -> float:
        """Score lost per cost saved by the next step."""
        saved = self.saving(self.at)
        return self.losses[self.at] / saved**self.power if saved > 0 else math.inf

    def step(self, by: int) -> None:
        """Go one level down (1) or back up (-1)."""
        delta = self.levels[self.at] - self.levels[self.at + by]
        self.ledger.dims[:, self.rows] -= self.shrink * delta
        self.at += by

    def refund(self) -> float:
        """Cost that going back up one level adds."""
        delta = self.levels[self.at] - self.levels[self.at - 1]
        return -self.ledger.change(self.rows, *(self.shrink * delta))

    def kept(self) -> dict[str, tuple[int, ...]]:
        level = self.levels[self.at]
        out = {}
        for s in self.group.sets:
            gone = s.size - s.size // self.group.grain * level
            out[s.name] = tuple(sorted(int(i) for i in self.order[s.name][gone:]))
        return out


def _levels(group: Group, constraints: Constraints, dense_widths: Mapping[str, int]) -> list[int]:
    """Allowed numbers of grains, from the present one downward."""
    dense = max(dense_widths.get(s.name, s.size) for s in group.sets)
    constraints = constraints.of(group)
    if all(s.whole for s in group.sets):
        constraints = Constraints(1, 1, constraints.max_removed)
    floor = max(constraints.min, math.ceil(round((1 - constraints.max_removed) * dense, 6)), 1)
    per_grain = group.width // group.grain
    lower = (n for n in range(group.grain - 1, 0, -1) if n * per_grain >= floor)
    return [group.grain, *(n for n in lower if n * per_grain % constraints.round_to == 0)]


def _cut(moves: list[_Move], ledger: _Ledger, goal: Goal) -> None:
    """Step down, cheapest first, until the goal is reached.

    Prices only rise as the rest of the model gets thinner, so an outdated price is a lower bound and the queue may be
    refreshed lazily.
    """
    total = ledger.total()
    queue = [(m.price(), i) for i, m in enumerate(moves)]
    heapq.heapify(queue)
    while total > goal.limit:
        while queue:
            price, i = heapq.heappop(queue)
            now = moves[i].price()
            if now <= price or not queue or now <= queue[0][0]:
                break
            heapq.heappush(queue, (now, i))
        else:
            raise TargetError(_out_of_reach(goal, total / goal.dense))
        move = moves[i]
        move.step(1)
        total = ledger.total()
        if move.at < len(move.levels) - 1:
            heapq.heappush(queue, (move.price(), i))


def _out_of_reach(goal: Goal, least: float) -> str:
    ask = math.ceil(least * 100) / 100
    if ask >= 1:
        return (
            f"target.{goal.metric}: nothing may be removed from this model under channels and protect. Raise "
            "channels.max_removed, lower channels.min or channels.round_to, or protect less."
        )
    return (
        f"target.{goal.metric}: {goal.limit / goal.dense:.3g} of the dense model cannot be reached; what may be "
        f"removed under channels and protect leaves {least:.3f}. Ask for at least {ask:.2f}, or raise "
        "channels.max_removed, or lower channels.min or channels.round_to."
    )


def _give_back(moves: list[_Move], ledger: _Ledger, goal: Goal) -> None:
    """Take back steps, most score per cost first, as long as the goal still holds."""
    while True:
        room = goal.limit - ledger.total()
        best, best_worth = None, 0.0
        for m in moves:
            if not m.at:
                continue
            refund = m.refund()
            worth = m.losses[m.at - 1] / refund**m.power if refund > 0 else 0.0
            if refund <= room and worth > best_worth:
                best, best_worth = m, worth
        if best is None:
            return
        best.step(-1)
