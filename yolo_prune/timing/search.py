# SPDX-License-Identifier: AGPL-3.0-or-later
"""Cuts for a latency: a formula proposes how far to cut, what is measured on the exported model decides."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from torch import nn
from ultralytics.utils import LOGGER

from yolo_prune import metadata, planner, surgery
from yolo_prune.cost import Timing
from yolo_prune.errors import NothingToRemoveError, TargetError
from yolo_prune.graph import Graph
from yolo_prune.journal import PREFIX
from yolo_prune.planner import Weighed
from yolo_prune.plans import Plan
from yolo_prune.proof import bare_copy
from yolo_prune.recipe import Recipe
from yolo_prune.recipe.schema import Target
from yolo_prune.report.data import LatencyRow
from yolo_prune.timing.target import find, place_of, setting_of
from yolo_prune.timing.whole import Measured, Stopwatch, dense_twin

METRIC = "latency"
TOLERANCE = 0.03
"""How near the measured latency comes to the target, as a fraction of it."""
ATTEMPTS = 8
"""Cuts that are exported and timed for one target, at most."""
DOUBT = 0.2
"""A formula may be as wrong as this: what it says can just be reached, or just not, is measured."""
FINEST = 1e-4
"""Formulas that differ by less ask for the same cut."""


class Trial(NamedTuple):
    """What a recipe would do to a model at once, without looking at data.

    Attributes:
        plan: as large as the one of the recipe's target.
        present: fraction of the dense model that the model is, in the target's metric; of a latency, measured.
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
    deepest = weighed.nearest(METRIC, 0.0)
    present, reached = _measured(model, target, imgsz, keep, weighed, deepest)
    if reached is not None and reached > keep * (1 + TOLERANCE):
        raise TargetError(
            f"target.latency: {keep:g} of the dense model's latency is out of reach: the smallest model that channels "
            f"and protect allow takes {reached:.3f} of it, as measured. Raise channels.max_removed, lower channels.min "
            "or channels.round_to, protect less, or ask for less."
        )
    return Trial(weighed.nearest(METRIC, _ask(weighed, keep, present)), present, timing)


def _measured(
    model: nn.Module, target: Target, imgsz: int, keep: float, weighed: Weighed, deepest: Plan
) -> tuple[float, float | None]:
    """What model and deepest cut take of the dense model's latency; of the cut, only where it may be above `keep`."""
    pruned, doubtful = metadata.is_pruned(model), deepest.predicted.kept(METRIC) > keep * (1 - DOUBT)
    if not (pruned or doubtful):
        return 1.0, None
    cuts = [model] if pruned else []
    cuts += [_cut(model, deepest)] if doubtful else []
    with Stopwatch(dense_twin(model), *setting_of(target, imgsz)) as stopwatch:
        ratios = [found.ratio.median for found in stopwatch.measure(cuts)]
    present = ratios[0] if pruned else 1.0
    _check_slower(present, keep)
    return present, ratios[-1] if doubtful else None


def settle(model: nn.Module, weighed: Weighed, target: Target, imgsz: int, keep: float | None = None) -> Hit:
    """Plan a cut, export what it leaves, time it, and correct the cut until it takes as long as wanted.

    Where no cut does, it is the one that comes nearest, with a warning.

    Args:
        model: the one to be cut; it is only read.
        weighed: its scores and costs.
        target: of the recipe.
        imgsz: of the run.
        keep: fraction of the dense model's latency to keep; the target's where None.

    Raises:
        TargetError: If a profile's formula says that the target is out of reach.
        NothingToRemoveError: If the model already is as fast.
        BenchError: If the models cannot be exported or run.
    """
    keep = target.keep if keep is None else keep
    assert keep is not None
    if target.profile is not None:
        return Hit(weighed.plan(METRIC, keep))
    format, setting = setting_of(target, imgsz)
    with Stopwatch(dense_twin(model), format, setting) as stopwatch:
        search = _Search(model, weighed, keep, stopwatch)
        hit = search.run()
    if abs(hit.ratio / keep - 1) > TOLERANCE:
        LOGGER.warning(
            f"{PREFIX}target.latency: {hit.ratio:.3f} is as near to {keep:g} as the widths of this model allow "
            f"(within {TOLERANCE:.0%} was wanted). channels.round_to and channels.max_removed limit them."
        )
    return Hit(hit.plan, _row(hit.found, str(place_of(format, setting)), setting.imgsz))


def _row(found: Measured, place: str, imgsz: int) -> LatencyRow:
    dense, ms, (ratio, low, high) = found
    return LatencyRow(place=place, imgsz=imgsz, dense_ms=dense, ms=ms, ratio=ratio, interval=[low, high])


class _Tried(NamedTuple):
    """A cut that was timed: what the formula was asked for, what it says of the cut, and what was measured."""

    ask: float
    formula: float
    plan: Plan
    found: Measured

    @property
    def ratio(self) -> float:
        return self.found.ratio.median


class _Search:
    """From cut to cut: each one lies between the slowest that is fast enough and the fastest that is too slow."""

    def __init__(self, model: nn.Module, weighed: Weighed, keep: float, stopwatch: Stopwatch) -> None:
        self.model, self.weighed, self.keep, self.stopwatch = model, weighed, keep, stopwatch
        self.tried: list[_Tried] = []
        self.present = stopwatch.measure([model])[0].ratio.median if metadata.is_pruned(model) else 1.0
        self.points = [(weighed.present(METRIC), self.present)]
        """Of the uncut model and all cuts: what the formula says, and what was measured."""
        _check_slower(self.present, keep)

    def run(self) -> _Tried:
        """The first cut that is within the tolerance, or the nearest that there is."""
        low, high = 0.0, self.weighed.present(METRIC)  # no cut is left to try outside
        ask = _ask(self.weighed, self.keep, self.present)
        while len(self.tried) < ATTEMPTS and high - low > FINEST:
            tried = self._try(ask)
            if abs(tried.ratio / self.keep - 1) <= TOLERANCE:
                return tried
            if tried.ratio < self.keep:
                low = max(low, ask)
            else:  # whatever is asked down to what the cut came to gives the same cut, and none goes deeper than asked
                high, low = min(high, tried.formula), low if tried.formula <= ask + FINEST else tried.formula
            ask = self._next(low, high) if tried is self.tried[-1] else (low + high) / 2
        return min(self.tried, key=lambda t: abs(t.ratio - self.keep))

    def _try(self, ask: float) -> _Tried:
        plan = self.weighed.nearest(METRIC, ask)
        known = next((t for t in self.tried if t.plan.hash == plan.hash), None)
        if known:
            return known
        found = self.stopwatch.measure([_cut(self.model, plan)])[0]
        LOGGER.info(
            f"{PREFIX}attempt {len(self.tried) + 1}: {found.ms:.2f} ms of {found.dense_ms:.2f} ms, "
            f"{found.ratio.median:.3f} of the dense model's latency (wanted {self.keep:g})"
        )
        formula = plan.predicted.kept(METRIC)
        self.tried.append(_Tried(ask, formula, _restated(plan, found, self.present), found))
        self.points.append((formula, found.ratio.median))
        return self.tried[-1]

    def _next(self, low: float, high: float) -> float:
        """What to ask for between two limits: along the line through the points that lie nearest, but not at the ends.

        Where nothing was fast enough so far, it may go as deep as half of what was not.
        """
        (a, at_a), (b, at_b) = sorted(self.points, key=lambda point: abs(point[1] - self.keep))[:2]
        rising = (a - b) * (at_a - at_b) > 0  # if not, that is noise
        line = a + (a - b) / (at_a - at_b) * (self.keep - at_a) if rising else (low + high) / 2
        low = low or high / 2
        margin = 0.1 * (high - low)
        return min(max(line, low + margin), high - margin)


def _cut(model: nn.Module, plan: Plan) -> nn.Module:
    cut = bare_copy(model)
    surgery.apply(cut, plan)
    return cut


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
    if present <= keep:
        raise NothingToRemoveError(
            f"target.latency: the model already takes {present:.3f} of the dense model's latency, as measured; a "
            f"target of {keep:g} leaves nothing to remove. Ask for less."
        )
