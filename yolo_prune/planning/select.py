# SPDX-License-Identifier: AGPL-3.0-or-later
"""Selects the channels to keep, from scores, a target and constraints."""

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
"""Exponent of the cost in "share of the scores per cost", for scores that are not amounts of the loss.

This value is a choice; it was not compared with others. With 0, the cost does not count: many channels are removed that
save little. With 1, the cost counts in full, as it does for amounts of the loss. But shares of scores say little about
the loss, so the layers with the highest cost would be cut first, down to the limits on widths.
"""


@dataclass(frozen=True)
class Goal:
    """The goal of the selection.

    Attributes:
        metric: "flops", "params" or "latency".
        limit: maximum cost after the cut, in the unit of the metric.
        dense: cost of the dense model in the same metric; messages contain fractions of it.
    """

    metric: str
    limit: float
    dense: float


@dataclass(frozen=True)
class Constraints:
    """Limits on widths: multiples of `round_to`, at least `min`, and at least `1 - max_removed` of the dense width.

    Attributes:
        layers: `{layer name: the constraints for the outputs of this layer, instead of these}`.
    """

    round_to: int
    min: int
    max_removed: float
    layers: Mapping[str, Constraints] = field(default_factory=dict)

    def of(self, group: Group) -> Constraints:
        """The constraints for a group: the strictest of the constraints for its layers."""
        all_of_them = [self.layers.get(name, self) for name in group.layers] or [self]
        return Constraints(
            math.lcm(*(c.round_to for c in all_of_them)),
            max(c.min for c in all_of_them),
            min(c.max_removed for c in all_of_them),
        )


@dataclass(frozen=True)
class Allocation:
    """How the removal is distributed over the groups.

    Attributes:
        classes: `{group name: any value}`. Groups with the same value form a class: they compete with one another by
            loss per cost. All classes lose the same share of their channels. Empty: all groups compete.
        curves: `{group name: ((share removed, loss), ...)}`, ascending: the measured rise of the loss for a removed
            share of the present channels. It is used instead of the scores. Empty: the scores are used.
    """

    classes: Mapping[str, Hashable] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)


ALL_COMPETE = Allocation()


def select(
    groups: Sequence[Group],
    cost: Cost,
    scores: Mapping[str, Tensor],
    goal: Goal,
    constraints: Constraints,
    dense_widths: Mapping[str, int],
    comparable: bool = False,
    allocation: Allocation = ALL_COMPETE,
) -> dict[str, tuple[int, ...]]:
    """Choose the channels to keep: a greedy search by lost score per saved cost, over the whole model or per class.

    A step removes the channels with the lowest scores of one group, down to the group's next allowed width.

    - Loss of a step: the sum of the removed scores, if scores are amounts of the loss. Otherwise the removed share of
      the group's remaining scores (so a group that is already thin loses fewer channels, as in LAMP, Lee et al., ICLR
      2021, arXiv:2010.07611); this share is divided by a small power of the saved cost.
    - Saved cost of a step: the change of the whole model's cost at this moment. It includes the layers that read the
      removed channels.

    After the goal is reached, steps are undone as long as the goal still holds, those with the highest loss per cost
    first. With several classes, the next step is in the class that has lost the smallest share of its dense channels
    in the middle of this step.

    Args:
        groups: all groups; protected groups are not cut.
        cost: the cost of this model.
        scores: `{set name: (size,)}`; a higher score means a more important channel.
        goal: the goal to reach.
        constraints: the constraints on widths.
        dense_widths: `{set name: channels in the dense model}`.
        comparable: scores are amounts of the loss, and can be compared between sets.
        allocation: which groups compete, and by which measure.

    Returns:
        `{set name: kept channels, ascending}` for the sets that get narrower.

    Raises:
        TargetError: If the constraints do not allow the goal; the message says what they allow.
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
    _undo_steps(queues, ledger, goal)
    return {name: kept for moves in classes.values() for m in moves if m.at for name, kept in m.kept().items()}


def least(
    groups: Sequence[Group], cost: Cost, metric: str, constraints: Constraints, dense_widths: Mapping[str, int]
) -> float:
    """Cost of the model, in the metric's unit, after everything is removed that the constraints allow."""
    ledger = _Ledger(cost, metric)
    for group in groups:
        steps = [] if group.protected else levels(group, constraints, dense_widths)
        if len(steps) > 1:
            _Move(group, ledger, steps, dense_widths).step(len(steps) - 1)
    return ledger.total()


class _Ledger:
    """Tracks the cost of the model while channels are removed: the sum of the terms of its tensors."""

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
        """Cost saved if the sizes of the tensors `rows` shrink by `less`, `(2, rows)`."""
        now = self.dims[:, rows]
        return float(np.sum(self._cost(now, rows) - self._cost(now - less, rows)))

    def _cost(self, dims: NDArray[np.float64], rows: NDArray[np.intp] | slice) -> NDArray[np.float64]:
        steps, (both, first, second) = self.steps[:, rows], self.factors[:, rows]
        d0, d1 = np.ceil(dims / steps) * steps
        costs: NDArray[np.float64] = both * d0 * d1 + first * d0 + second * d1
        return costs


class _Move:
    """The steps of one group: its allowed widths, the loss of each step, and the present level."""

    def __init__(self, group: Group, ledger: _Ledger, levels: list[int], dense_widths: Mapping[str, int]) -> None:
        self.group = group
        self.ledger = ledger
        self.levels = levels
        self.at = 0
        self.back = False  # a step of this group was undone
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
        """Set the order in which channels are removed, and the loss of each step."""
        self.order = {s.name: ascending(scores[s.name]) for s in self.group.sets}
        self.power = 1.0 if comparable or curve else COST_WEIGHT
        self.losses = self._losses_on_curve(curve) if curve else self._losses(scores, comparable)

    def _losses(self, scores: Mapping[str, Tensor], comparable: bool) -> list[float]:
        losses = np.zeros(len(self.levels) - 1)
        for s in self.group.sets:
            below = np.concatenate(([0.0], np.cumsum(scores[s.name].numpy()[self.order[s.name]])))
            gone = [removed(s, self.group, level) for level in self.levels]
            for i, (now, then) in enumerate(pairwise(gone)):
                left = 1.0 if comparable else below[-1] - below[now]
                losses[i] += (below[then] - below[now]) / left if left > 0 else 0.0
        return [float(x) for x in losses / (1 if comparable else len(self.group.sets))]

    def _losses_on_curve(self, curve: Curve) -> list[float]:
        """Loss of each step, from a curve. Beyond its end, the curve continues with its last or its average slope.

        The steeper of the two slopes is used.
        """
        shares, losses = zip((0.0, 0.0), *curve, strict=True)
        slope = max((losses[-1] - losses[-2]) / (shares[-1] - shares[-2]), losses[-1] / shares[-1])
        gone = 1 - np.array(self.levels) / self.group.grain
        losses_at_levels = np.interp(gone, shares, losses) + slope * np.maximum(gone - shares[-1], 0)
        return [float(x) for x in np.diff(losses_at_levels)]

    def saving(self, start: int) -> float:
        """Cost saved by the step from level `start` to the next level."""
        steps = self.levels[start] - self.levels[start + 1]
        return self.ledger.change(self.rows, self.shrink * steps)

    def price(self) -> tuple[float, float]:
        """Lost score per saved cost of the next step, and the removed share, which decides between equal prices."""
        saved = self.saving(self.at)
        price = self.losses[self.at] / saved**self.power if saved > 0 else math.inf
        return price, self.gone(self.at + 1) / self.dense

    def worth(self) -> tuple[float, float]:
        """Regained score per added cost if the last step is undone."""
        refund = self.refund()
        worth = self.losses[self.at - 1] / refund**self.power if refund > 0 else 0.0
        return worth, self.gone(self.at) / self.dense

    def gone(self, at: int) -> int:
        """Number of channels of the dense model that are removed at a level."""
        return self.dense - self.per_grain * self.levels[at]

    def step(self, by: int) -> None:
        """Go one level down (1) or back up (-1)."""
        delta = self.levels[self.at] - self.levels[self.at + by]
        self.ledger.dims[:, self.rows] -= self.shrink * delta
        self.at += by

    def refund(self) -> float:
        """Cost that is added if the last step is undone."""
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
    """Allowed numbers of grains of a group, from the present number downward."""
    dense = max(dense_widths.get(s.name, s.size) for s in group.sets)
    constraints = constraints.of(group)
    if all(s.whole for s in group.sets):
        constraints = Constraints(1, 1, constraints.max_removed)
    floor = max(constraints.min, math.ceil(round((1 - constraints.max_removed) * dense, 6)), 1)
    per_grain = group.width // group.grain
    lower = (n for n in range(group.grain - 1, 0, -1) if n * per_grain >= floor)
    return [group.grain, *(n for n in lower if n * per_grain % constraints.round_to == 0)]


def ascending(scores: Tensor) -> NDArray[np.intp]:
    """Channels, lowest score first. Equal scores keep the order of the channels: the same on every machine."""
    return np.argsort(scores.numpy(), kind="stable")


def removed(channels: ChannelSet, group: Group, level: int) -> int:
    """Number of channels of a set that are removed when its group has `level` grains left."""
    return channels.size - channels.size // group.grain * level


class _Class:
    """Groups that compete with one another by price.

    Prices only rise while the rest of the model gets thinner. So an old price in the queue is a lower bound, and is
    updated only when it is at the top.
    """

    def __init__(self, moves: list[_Move]) -> None:
        self.moves = moves
        self.dense = sum(m.dense for m in moves)
        self.gone = sum(m.gone(0) for m in moves)
        self.queue = [(m.price(), i) for i, m in enumerate(moves)]
        heapq.heapify(self.queue)

    def cheapest(self) -> _Move | None:
        """The group with the cheapest next step; None if no step saves cost."""
        while self.queue:
            price, i = self.queue[0]
            now = self.moves[i].price()
            if now <= price:
                return self.moves[i] if math.isfinite(now[0]) else None  # infinite: saves no cost
            heapq.heapreplace(self.queue, (now, i))
        return None

    def dearest(self, room: float, again: bool) -> _Move | None:
        """The group whose last step is undone next, if its cost fits into `room`; None if there is no such group."""
        able = [m for m in self.moves if m.at and m.refund() <= room and (again or not m.back)]
        best = max(able, key=_Move.worth, default=None)
        return best if best and best.worth() > (0.0, 0.0) else None

    def share(self, move: _Move, at: int) -> float:
        """Removed share of the dense channels in the middle of a group's step from level `at` to the next."""
        middle = (move.gone(at) + move.gone(at + 1)) / 2
        return (self.gone - move.gone(move.at) + middle) / self.dense

    def step(self, move: _Move, by: int) -> None:
        """Move a group one level down (1) or back up (-1)."""
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
    """Take steps until the goal is reached: the cheapest step of the class that has lost the smallest share."""
    total = ledger.total()
    turns: list[tuple[float, int]] = []

    def queue(number: int) -> None:
        if move := classes[number].cheapest():
            heapq.heappush(turns, (classes[number].share(move, move.at), number))

    for number in range(len(classes)):
        queue(number)
    while total > goal.limit:
        if not turns:
            left = total / goal.dense
            raise TargetError(
                f"target.{goal.metric}: {goal.limit / goal.dense:.3g} of the dense model cannot be reached: at least "
                f"{left:.3f} is left.",
                reached=left,
            )
        _, number = heapq.heappop(turns)
        move = classes[number].cheapest()  # may be another group than when it was queued, because prices rise
        assert move
        classes[number].step(move, 1)
        total = ledger.total()
        queue(number)


def _undo_steps(classes: list[_Class], ledger: _Ledger, goal: Goal) -> None:
    """Undo steps as long as the goal still holds: in the class that lost most, the highest score per cost first.

    With several classes, at most one step of each group is undone: else the groups of low cost would get all channels
    back, and shares would not be equal.
    """
    alone = len(classes) == 1
    while True:
        room = goal.limit - ledger.total()
        offers = [(c.share(m, m.at - 1), c, m) for c in classes if (m := c.dearest(room, alone))]
        if not offers:
            return
        _, owner, move = max(offers, key=lambda offer: offer[0])
        owner.step(move, -1)
