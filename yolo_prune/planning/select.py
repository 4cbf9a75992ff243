# SPDX-License-Identifier: AGPL-3.0-or-later
"""Scores, a target and constraints in; which channels stay out."""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from yolo_prune.errors import TargetError
from yolo_prune.graph.structure import ChannelSet, Group
from yolo_prune.planning.cost import Cost

Curve = Sequence[tuple[float, float]]
COST_WEIGHT = 0.25
"""Exponent of the cost in "share of the scores per cost", for scores that are no amounts of the loss.

A choice; it was never measured against others. At 0 the cost does not count: many cheap channels go for little. At 1
it counts in full, as it does for amounts of the loss: shares of scores say little about the loss, so that the costliest
layers would be emptied first, up to the limits on widths.
"""


@dataclass(frozen=True)
class Goal:
    """What the selection has to reach.

    Attributes:
        metric: "flops", "params" or "latency".
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


@dataclass(frozen=True)
class Allocation:
    """How what is removed is shared out over the groups.

    Attributes:
        classes: `{group name: any value}`. Groups with the same value compete with one another by loss per cost, and
            every such class loses the same share of its channels. Empty: all groups compete.
        curves: `{group name: ((share removed, loss), ...)}`, the share of the present channels, ascending: what the
            loss rises by, in place of what the scores say. Empty: the scores decide.
    """

    classes: Mapping[str, Hashable] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)


EVERYWHERE = Allocation()


def select(
    groups: Sequence[Group],
    cost: Cost,
    scores: Mapping[str, Tensor],
    goal: Goal,
    constraints: Constraints,
    dense_widths: Mapping[str, int],
    comparable: bool = False,
    allocation: Allocation = EVERYWHERE,
) -> dict[str, tuple[int, ...]]:
    """Choose the channels to keep: greedy by score lost per cost saved, over the whole model or class by class.

    A step takes the lowest scored channels of one group down to its next allowed width. What it loses is their scores,
    if those are amounts of the loss; else the share of the scores still there (so a group that is already thin resists,
    as in LAMP, Lee et al., ICLR 2021, arXiv:2010.07611), weighed against a small power of the cost only. What it saves
    is the true change of the whole model's cost at that moment, as a thinner producer also thins its consumers. When
    the goal is passed, steps that still fit are taken back, dearest first. With several classes of groups, the next
    step is in the class that has lost the least share of its dense channels when it is half done.

    Args:
        groups: all groups; protected ones are left alone.
        cost: of this model.
        scores: `{set name: (size,)}`, higher matters more.
        goal: what to reach.
        constraints: on the widths.
        dense_widths: `{set name: channels in the dense model}`.
        comparable: scores are amounts of the loss, and can be compared between sets.
        allocation: which groups compete, and by what.

    Returns:
        `{set name: kept channels, ascending}` for the sets that get narrower.

    Raises:
        TargetError: If the constraints do not allow the goal; says what they allow.
    """
    ledger = _Ledger(cost, goal.metric)
    classes: dict[Hashable, list[_Move]] = {}
    for group in groups:
        steps = [] if group.protected else levels(group, constraints, dense_widths)
        if len(steps) > 1:
            move = _Move(group, ledger, steps, dense_widths)
            move.judge(scores, comparable, allocation.curves.get(group.name))
            classes.setdefault(allocation.classes.get(group.name), []).append(move)
    queues = [_Class(moves) for moves in classes.values()]
    _cut(queues, ledger, goal)
    _give_back(queues, ledger, goal)
    return {name: kept for moves in classes.values() for m in moves if m.at for name, kept in m.kept().items()}


def least(
    groups: Sequence[Group], cost: Cost, metric: str, constraints: Constraints, dense_widths: Mapping[str, int]
) -> float:
    """What is left, in the metric's unit, once everything is removed that the constraints allow."""
    ledger = _Ledger(cost, metric)
    for group in groups:
        steps = [] if group.protected else levels(group, constraints, dense_widths)
        if len(steps) > 1:
            _Move(group, ledger, steps, dense_widths).step(len(steps) - 1)
    return ledger.total()


class _Ledger:
    """Cost of the model as channels go: the sum of the terms of its tensors."""

    def __init__(self, cost: Cost, metric: str) -> None:
        self.fixed, terms = cost.terms(metric)
        names = sorted(terms)
        shapes = [(*cost.shapes[n], 1, 1)[:2] for n in names]
        self.row = {n: i for i, n in enumerate(names)}
        self.dims = np.array(shapes, dtype=np.float64).reshape(-1, 2).T.copy()
        factors = [(t.both, t.first, t.second) for t in map(terms.__getitem__, names)]
        self.factors = np.array(factors, dtype=np.float64).reshape(-1, 3).T.copy()
        self.steps = np.array([terms[n].steps for n in names], dtype=np.float64).reshape(-1, 2).T.copy()

    def total(self) -> float:
        return self.fixed + float(np.sum(self._cost(self.dims, slice(None))))

    def change(self, rows: NDArray[np.intp], less: NDArray[np.float64]) -> float:
        """Cost saved by making `rows` smaller by `less`, `(2, rows)`."""
        now = self.dims[:, rows]
        return float(np.sum(self._cost(now, rows) - self._cost(now - less, rows)))

    def _cost(self, dims: NDArray[np.float64], rows: NDArray[np.intp] | slice) -> NDArray[np.float64]:
        steps, (both, first, second) = self.steps[:, rows], self.factors[:, rows]
        d0, d1 = np.ceil(dims / steps) * steps
        found: NDArray[np.float64] = both * d0 * d1 + first * d0 + second * d1
        return found


class _Move:
    """One group on its way down: allowed widths, what each step loses, where it stands."""

    def __init__(self, group: Group, ledger: _Ledger, levels: list[int], dense_widths: Mapping[str, int]) -> None:
        self.group = group
        self.ledger = ledger
        self.levels = levels
        self.at = 0
        self.back = False  # it was given a step back
        self.per_grain = sum(s.size for s in group.sets) // group.grain
        self.dense = sum(dense_widths.get(s.name, s.size) for s in group.sets)
        shrink: dict[int, list[int]] = {}
        for s in group.sets:
            for slot in s.slots:
                if slot.tensor in ledger.row:
                    shrink.setdefault(ledger.row[slot.tensor], [0, 0])[slot.dim] += s.size // group.grain
        self.rows = np.array(list(shrink), dtype=np.intp)
        self.shrink = np.array(list(shrink.values()), dtype=np.float64).reshape(-1, 2).T

    def judge(self, scores: Mapping[str, Tensor], comparable: bool, curve: Curve | None) -> None:
        """Fix in which order the channels go, and what each step loses."""
        self.order = {s.name: ascending(scores[s.name]) for s in self.group.sets}
        self.power = 1.0 if comparable or curve else COST_WEIGHT
        self.losses = self._along(curve) if curve else self._losses(scores, comparable)

    def _losses(self, scores: Mapping[str, Tensor], comparable: bool) -> list[float]:
        losses = np.zeros(len(self.levels) - 1)
        for s in self.group.sets:
            below = np.concatenate(([0.0], np.cumsum(scores[s.name].numpy()[self.order[s.name]])))
            gone = [removed(s, self.group, level) for level in self.levels]
            for i, (now, then) in enumerate(pairwise(gone)):
                left = 1.0 if comparable else below[-1] - below[now]
                losses[i] += (below[then] - below[now]) / left if left > 0 else 0.0
        return [float(x) for x in losses / (1 if comparable else len(self.group.sets))]

    def _along(self, curve: Curve) -> list[float]:
        """Differences along a curve, which goes on beyond its end as steeply as it came there, or did on average."""
        shares, losses = zip((0.0, 0.0), *curve, strict=True)
        slope = max((losses[-1] - losses[-2]) / (shares[-1] - shares[-2]), losses[-1] / shares[-1])
        gone = 1 - np.array(self.levels) / self.group.grain
        found = np.interp(gone, shares, losses) + slope * np.maximum(gone - shares[-1], 0)
        return [float(x) for x in np.diff(found)]

    def saving(self, start: int) -> float:
        """Cost saved (or spent again) between level `start` and the next."""
        steps = self.levels[start] - self.levels[start + 1]
        return self.ledger.change(self.rows, self.shrink * steps)

    def price(self) -> tuple[float, float]:
        """Score lost per cost saved by the next step; of what costs the same, the more goes, the dearer."""
        saved = self.saving(self.at)
        price = self.losses[self.at] / saved**self.power if saved > 0 else math.inf
        return price, self.gone(self.at + 1) / self.dense

    def worth(self) -> tuple[float, float]:
        """Score per cost of the step before, if it is taken back."""
        refund = self.refund()
        worth = self.losses[self.at - 1] / refund**self.power if refund > 0 else 0.0
        return worth, self.gone(self.at) / self.dense

    def gone(self, at: int) -> int:
        """Channels of the dense model that are not there at a level."""
        return self.dense - self.per_grain * self.levels[at]

    def step(self, by: int) -> None:
        """Go one level down (1) or back up (-1)."""
        delta = self.levels[self.at] - self.levels[self.at + by]
        self.ledger.dims[:, self.rows] -= self.shrink * delta
        self.at += by

    def refund(self) -> float:
        """Cost that going back up one level adds."""
        delta = self.levels[self.at] - self.levels[self.at - 1]
        return -self.ledger.change(self.rows, self.shrink * delta)

    def kept(self) -> dict[str, tuple[int, ...]]:
        level = self.levels[self.at]
        out = {}
        for s in self.group.sets:
            gone = removed(s, self.group, level)
            out[s.name] = tuple(sorted(int(i) for i in self.order[s.name][gone:]))
        return out


def levels(group: Group, constraints: Constraints, dense_widths: Mapping[str, int]) -> list[int]:
    """Allowed numbers of grains, from the present one downward."""
    dense = max(dense_widths.get(s.name, s.size) for s in group.sets)
    constraints = constraints.of(group)
    if all(s.whole for s in group.sets):
        constraints = Constraints(1, 1, constraints.max_removed)
    floor = max(constraints.min, math.ceil(round((1 - constraints.max_removed) * dense, 6)), 1)
    per_grain = group.width // group.grain
    lower = (n for n in range(group.grain - 1, 0, -1) if n * per_grain >= floor)
    return [group.grain, *(n for n in lower if n * per_grain % constraints.round_to == 0)]


def ascending(scores: Tensor) -> NDArray[np.intp]:
    """Channels, lowest score first. Ties go to the later channel, so that the order is the same on every machine."""
    return np.argsort(scores.numpy(), kind="stable")


def removed(channels: ChannelSet, group: Group, level: int) -> int:
    """How many channels of a set are gone when its group is down to `level` grains."""
    return channels.size - channels.size // group.grain * level


class _Class:
    """Groups that compete with one another, by price.

    Prices only rise as the rest of the model gets thinner, so an outdated price is a lower bound and the queue may be
    refreshed lazily.
    """

    def __init__(self, moves: list[_Move]) -> None:
        self.moves = moves
        self.dense = sum(m.dense for m in moves)
        self.gone = sum(m.gone(0) for m in moves)
        self.queue = [(m.price(), i) for i, m in enumerate(moves)]
        heapq.heapify(self.queue)

    def cheapest(self) -> _Move | None:
        """The group that goes next."""
        while self.queue:
            price, i = self.queue[0]
            now = self.moves[i].price()
            if now <= price:
                return self.moves[i] if math.isfinite(now[0]) else None  # what saves nothing is not removed
            heapq.heapreplace(self.queue, (now, i))
        return None

    def dearest(self, room: float, again: bool) -> _Move | None:
        """The group that gets its last step back, if any may: its cost must fit into `room`."""
        able = [m for m in self.moves if m.at and m.refund() <= room and (again or not m.back)]
        best = max(able, key=_Move.worth, default=None)
        return best if best and best.worth() > (0.0, 0.0) else None

    def share(self, move: _Move, at: int) -> float:
        """Share of the dense channels that is gone in the middle of a group's step from level `at` to the next."""
        middle = (move.gone(at) + move.gone(at + 1)) / 2
        return (self.gone - move.gone(move.at) + middle) / self.dense

    def step(self, move: _Move, by: int) -> None:
        """Let a group step down (1) or back up (-1)."""
        before = move.gone(move.at)
        move.step(by)
        self.gone += move.gone(move.at) - before
        if by > 0:
            _, i = heapq.heappop(self.queue)
            if move.at < len(move.levels) - 1:
                heapq.heappush(self.queue, (move.price(), i))
        else:
            move.back = True


def _cut(classes: list[_Class], ledger: _Ledger, goal: Goal) -> None:
    """Step down until the goal is reached: in the class that has lost least, where it is cheapest."""
    total = ledger.total()
    turns: list[tuple[float, int]] = []

    def queue(number: int) -> None:
        if move := classes[number].cheapest():
            heapq.heappush(turns, (classes[number].share(move, move.at), number))

    for number in range(len(classes)):
        queue(number)
    while total > goal.limit:
        if not turns:
            raise TargetError(_out_of_reach(goal, total / goal.dense), reached=total / goal.dense)
        _, number = heapq.heappop(turns)
        move = classes[number].cheapest()  # not always the one it was queued for: prices rise
        assert move
        classes[number].step(move, 1)
        total = ledger.total()
        queue(number)


def _out_of_reach(goal: Goal, least: float) -> str:
    ask = math.ceil(least * 100) / 100
    if ask >= 1:
        return (
            f"target.{goal.metric}: nothing may be removed from this model under channels and protect. Raise "
            "channels.max_removed, lower channels.min or channels.round_to, or protect less."
        )
    return (
        f"target.{goal.metric}: {goal.limit / goal.dense:.3g} of the dense model cannot be reached; what may be "
        f"removed under channels (channels.layers included) and protect leaves {least:.3f}. Ask for at least "
        f"{ask:.2f}, or raise channels.max_removed, or lower channels.min or channels.round_to."
    )


def _give_back(classes: list[_Class], ledger: _Ledger, goal: Goal) -> None:
    """Take back steps as long as the goal still holds: in the class that lost most, most score per cost first.

    Where shares are to be equal, each group gets one step at most, or what is cheap would get back everything.
    """
    alone = len(classes) == 1
    while True:
        room = goal.limit - ledger.total()
        offers = [(c.share(m, m.at - 1), c, m) for c in classes if (m := c.dearest(room, alone))]
        if not offers:
            return
        _, of, move = max(offers, key=lambda offer: offer[0])
        of.step(move, -1)
