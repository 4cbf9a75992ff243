# SPDX-License-Identifier: AGPL-3.0-or-later
"""Cuts for a latency: a formula proposes how far to cut, what is measured on the exported model decides."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from torch import nn
from ultralytics.utils import LOGGER

from yolo_prune.cut.plan import Plan
from yolo_prune.cut.record import is_pruned
from yolo_prune.env.log import PREFIX
from yolo_prune.errors import NothingToRemoveError, TargetError
from yolo_prune.graph import Graph
from yolo_prune.latency.stopwatch import Measured, Stopwatch, cut_copy, dense_twin
from yolo_prune.latency.target import find, place_of, setting_of
from yolo_prune.planning import planner
from yolo_prune.planning.cost import Timing
from yolo_prune.planning.planner import Weighed
from yolo_prune.recipe import Recipe
from yolo_prune.recipe.schema import Target
from yolo_prune.report.data import LatencyRow

METRIC = "latency"
TOLERANCE = 0.03
"""How near the measured latency comes to the target, as a fraction of it.

A ratio that is measured at another hour moves by one or two per cent (README): nearer is chance.
"""
ATTEMPTS = 8
"""Cuts that are exported and timed for one target, at most.

A choice: a search that brackets halves what is left with each, so that eight narrow it 256 times; each takes an export
and a budget of the stopwatch.
"""
DOUBT = 0.2
"""A formula may be as wrong as this: what it says can just be reached, or just not, is measured.

About three times the 7 % that the formula alone was seen to be wrong by (README), as that was one machine.
"""
FINEST = 1e-4
"""Formulas that differ by less are taken for the same. A choice, far below what can be measured (`TOLERANCE`)."""


class Trial(NamedTuple):
    """What a recipe would do to a model at once, without looking at data.

    Attributes:
        plan: as large as the one of the recipe's target.
        present: fraction of the dense model that the model is, in the target's metric. Of a latency it is measured,
            unless a profile has to do.
        timing: what takes how long, for a latency target.
    """

    plan: Plan
    present: float
    timing: Timing | None


class Hit(NamedTuple):
    """A cut, and how long the model takes after it; not measured where it is for another device."""

    plan: Plan
    row: LatencyRow | None = None


def trial(model: nn.Module, graph: Graph, recipe: Recipe, imgsz: int) -> Trial:
    """Try a recipe on a model before any work is done.

    Args:
        model: dense, or pruned before; it is only read.
        graph: its trace.
        recipe: for target and constraints.
        imgsz: of the run, in pixels.

    Raises:
        TargetError: If the target is out of reach; of a latency, by what was measured.
        NothingToRemoveError: If the model already meets it.
        BenchError: If a latency cannot be measured here, or the profile is not of this model.
    """
    target, keep = recipe.target, recipe.target.keep
    timing = find(model, target, imgsz)
    if timing is None or keep is None:
        plan = planner.trial(model, graph, recipe)
        return Trial(plan, plan.predicted.present(target.metric), None)
    weighed = planner.weigh(model, graph, planner.rehearsal(recipe), timing=timing)
    if target.profile is not None:
        plan = weighed.plan(METRIC, keep)
        return Trial(plan, plan.predicted.present(METRIC), timing)
    present = _tried_out(model, weighed, target, imgsz, keep)
    return Trial(weighed.nearest(METRIC, _ask(weighed, keep, present)), present, timing)


def _tried_out(model: nn.Module, weighed: Weighed, target: Target, imgsz: int, keep: float) -> float:
    """Fraction of the dense model's latency that a model takes, once it is known that `keep` lies below and in reach.

    Nothing is timed where that is clear: for a dense model, and a target far above what the deepest cut comes to.
    """
    deepest = weighed.deepest(METRIC)
    share = deepest.predicted.kept(METRIC) / weighed.present(METRIC) if deepest else 1.0
    pruned = is_pruned(model)
    if not pruned:
        _check_slower(1.0, keep)
        if share <= keep * (1 - DOUBT):
            return 1.0
    with Stopwatch(dense_twin(model), *setting_of(target, imgsz)) as stopwatch:
        present = _ratio(stopwatch, model) if pruned else 1.0
        _check_slower(present, keep)
        if share * present <= keep * (1 - DOUBT):
            return present
        reached = _ratio(stopwatch, cut_copy(model, deepest)) if deepest else present
    if reached > keep * (1 + TOLERANCE):
        raise TargetError(
            f"target.latency: {keep:g} of the dense model's latency is out of reach: once everything is removed that "
            f"saves time and that channels and protect allow, the model takes {reached:.3f} of it, as measured. Raise "
            "channels.max_removed, lower channels.min or channels.round_to, protect less, or ask for less."
        )
    return present


def settle(
    model: nn.Module,
    weighed: Weighed,
    target: Target,
    imgsz: int,
    keep: float | None = None,
    present: float = 1.0,
    tolerance: float = TOLERANCE,
) -> Hit:
    """Plan a cut, export what it leaves, time it, and correct the cut until it takes as long as wanted.

    Where no cut does, it is the one that comes nearest, with a warning.

    Args:
        model: the one to be cut; it is only read.
        weighed: its scores and costs.
        target: of the recipe.
        imgsz: of the run.
        keep: fraction of the dense model's latency to keep; the target's where None.
        present: fraction that the model takes, as measured.
        tolerance: how near to `keep` it is to come, as a fraction of it.

    Raises:
        TargetError: If a profile's formula says that the target is out of reach.
        NothingToRemoveError: If the model already is as fast, or nothing may be removed from it any more.
        BenchError: If the models cannot be exported or run.
    """
    keep = target.keep if keep is None else keep
    assert keep is not None
    if target.profile is not None:
        return Hit(weighed.plan(METRIC, keep))
    _check_slower(present, keep)
    if not weighed.deepest(METRIC):
        raise NothingToRemoveError("target.latency: nothing more may be removed from this model that saves time.")
    format, setting = setting_of(target, imgsz)
    with Stopwatch(dense_twin(model), format, setting) as stopwatch:
        search = _Search(model, weighed, stopwatch, keep, present, tolerance)
        hit = search.run()
    if abs(hit.ratio / keep - 1) > tolerance:
        LOGGER.warning(
            f"{PREFIX}target.latency: {hit.ratio:.3f} is as near to {keep:g} as {search.limit} "
            f"(within {tolerance:.0%} was wanted). channels.round_to and channels.max_removed limit the widths."
        )
    low, high = hit.found.ratio.low, hit.found.ratio.high
    if (high - low) / 2 > TOLERANCE * hit.ratio:
        LOGGER.warning(
            f"{PREFIX}target.latency: the machine is so busy that {hit.ratio:.3f} may be anything from {low:.3f} to "
            f"{high:.3f}. Measure again when it is idle: yolo-prune bench model=dense.pt,pruned.pt format={format}"
        )
    return Hit(hit.plan, _row(hit.found, str(place_of(format, setting)), setting.imgsz))


def _row(found: Measured, place: str, imgsz: int) -> LatencyRow:
    dense, ms, (ratio, low, high) = found
    return LatencyRow(place=place, imgsz=imgsz, dense_ms=dense, ms=ms, ratio=ratio, interval=[low, high])


class _Tried(NamedTuple):
    """A cut that was timed: what the formula says of it, and what was measured."""

    formula: float
    plan: Plan
    found: Measured

    @property
    def ratio(self) -> float:
        return self.found.ratio.median


class _Search:
    """From cut to cut: each one lies between the slowest that is fast enough and the fastest that is too slow."""

    def __init__(
        self,
        model: nn.Module,
        weighed: Weighed,
        stopwatch: Stopwatch,
        keep: float,
        present: float,
        tolerance: float,
    ) -> None:
        self.model, self.weighed, self.stopwatch = model, weighed, stopwatch
        self.keep, self.present, self.tolerance = keep, present, tolerance
        self.tried: list[_Tried] = []
        self.limit = "the widths of this model allow"

    def run(self) -> _Tried:
        """The first cut that is within the tolerance, or the nearest that there is."""
        low, high = 0.0, self.weighed.present(METRIC)  # what may be asked for: outside, no cut is left to try
        before = slow = high, self.present  # what the formula says, and what was measured
        fast = None
        ask = _ask(self.weighed, self.keep, self.present)
        while high - low > FINEST:
            if len(self.tried) == ATTEMPTS:
                self.limit = f"{ATTEMPTS} attempts came"
                break
            width, known = high - low, len(self.tried)
            tried = self._try(ask)
            if abs(tried.ratio / self.keep - 1) <= self.tolerance:
                return tried
            if tried.ratio < self.keep:
                low, fast = max(low, ask), (tried.formula, tried.ratio)
            elif tried.formula > ask + FINEST:  # no cut goes as deep as asked
                break
            else:  # whatever is asked down to what the cut came to gives the same cut
                before, high, slow = slow, min(high, tried.formula), (tried.formula, tried.ratio)
            if fast is None:
                ask = max(_line(slow, before, self.keep), high / 2)
            elif len(self.tried) > known and high - low <= width / 2:
                ask = _line(slow, fast, self.keep)
            else:
                ask = (low + high) / 2
            margin = 0.1 * (high - low)
            ask = min(max(ask, low + margin), high - margin)
        return min(self.tried, key=lambda t: abs(t.ratio - self.keep))

    def _try(self, ask: float) -> _Tried:
        """The cut that the formula has for what is asked; timed, if it is a new one."""
        plan = self.weighed.nearest(METRIC, ask)
        known = next((t for t in self.tried if t.plan.hash == plan.hash), None)
        if known:
            return known
        found = self.stopwatch.measure([cut_copy(self.model, plan)])[0]
        LOGGER.info(
            f"{PREFIX}attempt {len(self.tried) + 1}: {found.ratio.median:.3f} of the dense model's "
            f"{found.dense_ms:.2f} ms (95 %: {found.ratio.low:.3f} to {found.ratio.high:.3f}; wanted {self.keep:g})"
        )
        self.tried.append(_Tried(plan.predicted.kept(METRIC), _restated(plan, found, self.present), found))
        return self.tried[-1]


def _line(a: tuple[float, float], b: tuple[float, float], wanted: float) -> float:
    """Where the line through two points has the value that is wanted; between them where it does not rise."""
    (x, at_x), (y, at_y) = a, b
    if (x - y) * (at_x - at_y) <= 0:  # noise
        return (x + y) / 2
    return x + (x - y) / (at_x - at_y) * (wanted - at_x)


def _ratio(stopwatch: Stopwatch, model: nn.Module) -> float:
    return stopwatch.measure([model])[0].ratio.median


def _ask(weighed: Weighed, keep: float, present: float) -> float:
    """What to ask the formula for: as small a part of what it says of the uncut model as is wanted of what it takes."""
    return weighed.present(METRIC) * keep / present


def _restated(plan: Plan, found: Measured, present: float) -> Plan:
    """The plan with what was measured in its forecast, in place of what the formula says."""
    dense = found.dense_ms
    before, after = present * dense, found.ratio.median * dense
    forecast = replace(plan.predicted, dense_ms=dense, ms_before=before, ms_after=after, measured=True)
    return replace(plan, forecast=forecast)


def _check_slower(present: float, keep: float) -> None:
    if present <= keep * (1 + TOLERANCE):
        raise NothingToRemoveError(
            f"target.latency: the model takes {present:.3f} of the dense model's latency, as measured; a target of "
            f"{keep:g} (within {TOLERANCE:.0%}) leaves nothing to remove. Ask for less."
        )
