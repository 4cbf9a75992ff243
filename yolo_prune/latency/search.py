# SPDX-License-Identifier: AGPL-3.0-or-later
"""Cuts for a latency target: a formula proposes a cut, and the measured latency of the exported model decides."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from torch import nn
from ultralytics.utils import LOGGER

from yolo_prune.cut.plan import Plan
from yolo_prune.cut.record import is_pruned
from yolo_prune.env.image_size import ImageSize
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
"""Allowed difference between the measured latency and the target, as a fraction of the target.

From one hour to the next, a measured ratio changes by 1 or 2 % (see docs/), so a smaller difference is chance.
"""
ATTEMPTS = 8
"""Maximum number of cuts that are exported and timed for one target.

This value is a choice: each attempt of a bracketing search halves the interval, so eight attempts make it 256 times
smaller. Each attempt takes an export and a budget of the stopwatch.
"""
DOUBT = 0.2
"""Possible error of the formula: a target within this fraction of the reachable latency is checked by measurement.

About three times the measured error of the formula alone, which was 7 % on one machine (see docs/).
"""
FINEST = 1e-4
"""Values of the formula count as equal if they differ by less. This is a choice, far below `TOLERANCE`."""


class Trial(NamedTuple):
    """What a recipe would do to a model in one cut, planned without data.

    Attributes:
        plan: a plan of the size that the recipe's target demands.
        present: cost of the model as a fraction of the dense model's, in the target's metric. A latency is measured,
            unless the target has a profile.
        timing: the latency as a function of widths, for a latency target.
    """

    plan: Plan
    present: float
    timing: Timing | None


class Hit(NamedTuple):
    """A cut, and the measured latency of the model after it; None if the target is another device."""

    plan: Plan
    row: LatencyRow | None = None


def trial(model: nn.Module, graph: Graph, recipe: Recipe, imgsz: ImageSize) -> Trial:
    """Try a recipe on a model before any work is done.

    Args:
        model: the model, dense or pruned before; it is not changed.
        graph: the graph of the model.
        recipe: the recipe with the target and the constraints.
        imgsz: image size of the run, in pixels.

    Raises:
        TargetError: If the target is out of reach; for a latency target, according to a measurement.
        NothingToRemoveError: If the model already meets the target.
        BenchError: If a latency cannot be measured here, or the profile is not of this model.
    """
    target, keep = recipe.target, recipe.keep
    timing = find(model, target, imgsz) if target else None
    if target is None or timing is None or keep is None:
        plan = planner.trial(model, graph, recipe)
        return Trial(plan, plan.predicted.present(recipe.metric), None)
    weighed = planner.weigh(model, graph, planner.rehearsal(recipe), timing=timing)
    if target.profile is not None:
        plan = weighed.plan(METRIC, keep)
        return Trial(plan, plan.predicted.present(METRIC), timing)
    present = _check_reachable(model, weighed, target, imgsz, keep)
    return Trial(weighed.nearest(METRIC, _formula_target(weighed, keep, present)), present, timing)


def _check_reachable(model: nn.Module, weighed: Weighed, target: Target, imgsz: ImageSize, keep: float) -> float:
    """Check that the target `keep` is below the model's latency and in reach.

    Nothing is timed if this is clear: the model is dense, and the target is far above the latency of the deepest cut.

    Returns:
        The model's latency as a fraction of the dense model's.
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
            f"target.latency: {keep:g} of the dense model's latency is out of reach. The deepest cut that channels and "
            f"protect allow has a measured latency of {reached:.3f} of the dense model's. Set a larger target. "
            f"{weighed.limits.advice(METRIC, _formula_target(weighed, keep, present))}".rstrip()
        )
    return present


def settle(
    model: nn.Module,
    weighed: Weighed,
    target: Target,
    imgsz: ImageSize,
    keep: float | None = None,
    present: float = 1.0,
    tolerance: float = TOLERANCE,
) -> Hit:
    """Plan a cut, export and time the model after the cut, and correct the cut until its latency is as wanted.

    If no cut has the wanted latency, the result is the cut with the nearest latency, and a warning is logged.

    Args:
        model: the model to cut; it is not changed.
        weighed: the scores and costs of the model.
        target: the target of the recipe.
        imgsz: image size of the run, in pixels.
        keep: fraction of the dense model's latency to keep; None for the recipe's target.
        present: measured latency of the model as a fraction of the dense model's.
        tolerance: allowed difference to `keep`, as a fraction of `keep`.

    Raises:
        TargetError: If the target is out of reach according to the formula of a profile.
        NothingToRemoveError: If the model is already as fast, or nothing more may be removed from it.
        BenchError: If the models cannot be exported or run.
    """
    keep = target.keep if keep is None else keep
    assert keep is not None
    if target.profile is not None:
        return Hit(weighed.plan(METRIC, keep))
    _check_slower(present, keep)
    if not weighed.deepest(METRIC):
        raise NothingToRemoveError(
            "target.latency: no further cut of this model saves time under channels and protect. "
            f"{weighed.limits.advice(METRIC, _formula_target(weighed, keep, present))}".rstrip()
        )
    format, setting = setting_of(target, imgsz)
    with Stopwatch(dense_twin(model), format, setting) as stopwatch:
        search = _Search(model, weighed, stopwatch, keep, present, tolerance)
        hit = search.run()
    if abs(hit.ratio / keep - 1) > tolerance:
        LOGGER.warning(
            f"{PREFIX}target.latency: the best cut has a latency of {hit.ratio:.3f}, not {keep:g} (within "
            f"{tolerance:.0%}), because {search.limit}. {_nearer(weighed, keep, present)}".rstrip()
        )
    low, high = hit.measured.ratio.low, hit.measured.ratio.high
    if (high - low) / 2 > TOLERANCE * hit.ratio:
        LOGGER.warning(
            f"{PREFIX}target.latency: the measured {hit.ratio:.3f} is uncertain ({low:.3f} to {high:.3f}), because the "
            "machine is busy. Measure again on an idle machine: "
            f"yolo-prune bench model=dense.pt,pruned.pt format={format}"
        )
    return Hit(hit.plan, _row(hit.measured, str(place_of(format, setting)), setting.imgsz))


def _row(measured: Measured, place: str, imgsz: ImageSize) -> LatencyRow:
    dense, ms, (ratio, low, high) = measured
    return LatencyRow(place=place, imgsz=imgsz, dense_ms=dense, ms=ms, ratio=ratio, interval=[low, high])


class _TimedCut(NamedTuple):
    """A timed cut: its latency by the formula, its plan, and its measured latency."""

    formula: float
    plan: Plan
    measured: Measured

    @property
    def ratio(self) -> float:
        return self.measured.ratio.median


class _Search:
    """A bracketing search: a new cut lies between the slowest cut that is fast enough and the fastest that is not."""

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
        self.tried: list[_TimedCut] = []
        self.limit = "the allowed widths of this model permit no other cut"

    def run(self) -> _TimedCut:
        """The first cut within the tolerance; if there is none, the cut with the nearest latency."""
        low, high = 0.0, self.weighed.present(METRIC)  # every cut outside this interval was tried
        before = slow = high, self.present  # (latency by the formula, measured latency)
        fast = None
        request = _formula_target(self.weighed, self.keep, self.present)
        while high - low > FINEST:
            if len(self.tried) == ATTEMPTS:
                self.limit = f"the search ended after {ATTEMPTS} attempts"
                break
            width, known = high - low, len(self.tried)
            tried = self._try(request)
            if abs(tried.ratio / self.keep - 1) <= self.tolerance:
                return tried
            if tried.ratio < self.keep:
                low, fast = max(low, request), (tried.formula, tried.ratio)
            elif tried.formula > request + FINEST:  # no deeper cut is possible
                break
            else:  # every request from here down to `tried.formula` gives the same cut
                before, high, slow = slow, min(high, tried.formula), (tried.formula, tried.ratio)
            if fast is None:
                request = max(_line(slow, before, self.keep), high / 2)
            elif len(self.tried) > known and high - low <= width / 2:
                request = _line(slow, fast, self.keep)
            else:
                request = (low + high) / 2
            margin = 0.1 * (high - low)
            request = min(max(request, low + margin), high - margin)
        return min(self.tried, key=lambda t: abs(t.ratio - self.keep))

    def _try(self, request: float) -> _TimedCut:
        """The cut with the latency `request` by the formula. It is timed if it was not tried before."""
        plan = self.weighed.nearest(METRIC, request)
        known = next((t for t in self.tried if t.plan.hash == plan.hash), None)
        if known:
            return known
        measured = self.stopwatch.measure([cut_copy(self.model, plan)])[0]
        LOGGER.info(
            f"{PREFIX}attempt {len(self.tried) + 1}: {measured.ratio.median:.3f} of the dense model's "
            f"{measured.dense_ms:.2f} ms (95 %: {measured.ratio.low:.3f} to {measured.ratio.high:.3f}; "
            f"target {self.keep:g})"
        )
        self.tried.append(_TimedCut(plan.predicted.kept(METRIC), _restated(plan, measured, self.present), measured))
        return self.tried[-1]


def _line(a: tuple[float, float], b: tuple[float, float], wanted: float) -> float:
    """The place where the line through two points has the wanted value; their middle if the line does not rise."""
    (x, at_x), (y, at_y) = a, b
    if (x - y) * (at_x - at_y) <= 0:  # noise
        return (x + y) / 2
    return x + (x - y) / (at_x - at_y) * (wanted - at_x)


def _ratio(stopwatch: Stopwatch, model: nn.Module) -> float:
    return stopwatch.measure([model])[0].ratio.median


def _formula_target(weighed: Weighed, keep: float, present: float) -> float:
    """The formula's value for the target: its value for the uncut model, scaled by `keep / present`."""
    return weighed.present(METRIC) * keep / present


def _restated(plan: Plan, measured: Measured, present: float) -> Plan:
    """The plan with measured latencies in its forecast, instead of those of the formula."""
    dense = measured.dense_ms
    before, after = present * dense, measured.ratio.median * dense
    forecast = replace(plan.predicted, dense_ms=dense, ms_before=before, ms_after=after, measured=True)
    return replace(plan, forecast=forecast)


def _nearer(weighed: Weighed, keep: float, present: float) -> str:
    """What to change for a latency nearer to the target; empty if nothing can be done."""
    deepest, wanted = weighed.deepest(METRIC), _formula_target(weighed, keep, present)
    if deepest is None or deepest.predicted.kept(METRIC) > wanted:
        return weighed.limits.advice(METRIC, wanted)
    step = weighed.cost.timing.multiple if weighed.cost.timing else 1
    return "For more possible widths, lower channels.round_to." if weighed.constraints.round_to > step else ""


def _check_slower(present: float, keep: float) -> None:
    if present <= keep * (1 + TOLERANCE):
        raise NothingToRemoveError(
            f"target.latency: the model's measured latency is {present:.3f} of the dense model's, so a target of "
            f"{keep:g} (within {TOLERANCE:.0%}) leaves nothing to remove. Set a smaller target."
        )
