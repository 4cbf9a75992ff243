# SPDX-License-Identifier: AGPL-3.0-or-later
"""Makes a `Plan` from a model and a recipe: finds the groups, scores channels and selects. It changes no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from yolo_prune import criteria
from yolo_prune.criteria.base import ModelReader, Observer
from yolo_prune.cut.forecast import Forecast
from yolo_prune.cut.plan import Attributes, GroupWidth, Keep, Plan, Protected, Scale, Shapes
from yolo_prune.cut.proof import RefutedError, prove
from yolo_prune.cut.record import composed_plan, read_record
from yolo_prune.data.calibration import Calibration, Progress
from yolo_prune.env.image_size import ImageSize
from yolo_prune.errors import NothingToRemoveError, ProofError, RecipeError, TargetError
from yolo_prune.graph import Graph, Rows, has_heads, named, rules, trace
from yolo_prune.graph.opaque import may_be_opaque
from yolo_prune.graph.structure import ChannelSet, Group
from yolo_prune.planning import allocation
from yolo_prune.planning.cost import Cost, Timing, cost_of
from yolo_prune.planning.limits import Limits
from yolo_prune.planning.select import Allocation, Constraints, Goal, levels, select
from yolo_prune.recipe import AllocationSpec, CriterionSpec, LayerLimits, Recipe

STAND_INS: Mapping[str, CriterionSpec | AllocationSpec] = {
    "criterion": CriterionSpec(name="magnitude"),
    "allocation": AllocationSpec(),
}
"""Replacements for a criterion or an allocation that needs training images, for planning without data."""
ROUND_TO = 8
"""Default of `channels.round_to`: tensor cores pad FP16 widths to multiples of 8. docs/ compares it with 16."""


def make_plan(
    model: nn.Module,
    recipe: Recipe,
    imgsz: ImageSize = 640,
    keep: float | None = None,
    frozen: Sequence[str] = (),
    calibration: Calibration | None = None,
    progress: Progress = iter,
    timing: Timing | None = None,
) -> Plan:
    """Plan one cut.

    Args:
        model: the module in `YOLO(...).model`; dense or pruned before.
        recipe: target, criterion, constraints, protected modules.
        imgsz: image size in pixels for which FLOPs are counted.
        keep: fraction of the *dense* model to keep after this cut; None for the recipe's target.
        frozen: names of modules that are not trained and therefore not cut.
        calibration: training images, for criteria and allocations that need data.
        progress: wraps an iterable to show a progress bar.
        timing: the latency as a function of widths, for a latency target.

    Raises:
        TargetError: If the target is out of reach.
        NothingToRemoveError: If the model already meets the target.
        UnsupportedModelError: If the model has a part whose dependencies are not known.
        RecipeError: If a pattern of protect or channels.layers matches nothing, or the criterion is unknown.
        PruneError: If weights are NaN or infinite, or the model cannot take images of `imgsz`.
    """
    return plan_for(model, survey(model, recipe, imgsz, frozen), recipe, keep, calibration, progress, timing)


def rehearsal(recipe: Recipe) -> Recipe:
    """The recipe with a criterion and an allocation that need no data.

    Its plans have the same size as those of the recipe, but remove other channels.

    Raises:
        RecipeError: If the recipe's criterion is unknown, or an option of the criterion or allocation is wrong.
    """
    return recipe.model_copy(update={key: STAND_INS[key] for key in looks(recipe)})


def images_for(recipe: Recipe) -> int:
    """Number of training images that a recipe's criterion and allocation need; 0 if both use weights only."""
    return max(looks(recipe).values(), default=0)


def looks(recipe: Recipe) -> dict[str, int]:
    """`{field: number of training images}` for those of criterion and allocation that need training images.

    Raises:
        RecipeError: If the criterion is unknown, or an option of the criterion or allocation is wrong.
    """
    criterion = criteria.create(recipe.criterion.name, recipe.criterion.options)
    if recipe.target is None:  # no channel is cut
        return {}
    counts = {
        "criterion": criterion.images if isinstance(criterion, Observer) else 0,
        "allocation": allocation.create(recipe.allocation.name, recipe.allocation.options).images,
    }
    return {key: count for key, count in counts.items() if count}


def survey(
    model: nn.Module, recipe: Recipe, imgsz: ImageSize, frozen: Sequence[str] = (), progress: Progress = iter
) -> Graph:
    """Trace a model with the settings of a recipe. Blocks of users are tried out, unless the recipe has `proof: false`.

    A block whose cut is refuted is opaque: it keeps its channels, and the reason is in the graph. Blocks that were
    opaque in earlier cuts of the model are opaque again.
    """
    known = opaque_before(model)

    def traced(opaque: Mapping[str, str]) -> Graph:
        hidden = {**known, **opaque}
        return trace(model, recipe.protect, frozen, imgsz=imgsz, heads=recipe.channels.attention, opaque=hidden)

    graph = traced({})
    return tried_out(model, graph, traced, recipe.channels.round_to or ROUND_TO, progress) if recipe.proof else graph


def opaque_before(model: nn.Module) -> dict[str, str]:
    """`{module name: reason}` of the blocks that were opaque in earlier cuts, and for which there is no rule yet."""
    earlier, modules = composed_plan(model), dict(model.named_modules())
    known = earlier.opaque if earlier else {}
    return {path: why for path, why in known.items() if path in modules and rules.rule_of(modules[path]) is None}


@dataclass(frozen=True)
class Weighed:
    """Everything that is needed for a plan, except how much to remove.

    Attributes:
        graph: the graph of the model.
        cost: the cost of the model.
        dense: shapes in the dense model, for the tensors that earlier cuts made smaller.
        widths: `{set name: channels in the dense model}`.
        constraints: the constraints on widths.
        scores: `{set name: (size,)}`.
        comparable: scores are amounts of the loss.
        group_allocation: how the removal is distributed over groups.
    """

    graph: Graph
    cost: Cost
    dense: Shapes
    widths: Mapping[str, int]
    constraints: Constraints
    scores: Mapping[str, Tensor]
    comparable: bool
    group_allocation: Allocation

    def plan(self, metric: str, keep: float) -> Plan:
        """The plan that keeps the fraction `keep` of the dense model's "flops", "params" or "latency".

        Raises:
            TargetError: If this fraction is out of reach.
            NothingToRemoveError: If the model is already as small.
        """
        goal = _goal(self.cost, self.dense, metric, keep)
        groups, constraints = self.graph.groups, (self.constraints, self.widths)
        try:
            kept = select(groups, self.cost, self.scores, goal, *constraints, self.comparable, self.group_allocation)
        except TargetError as e:
            raise TargetError(self._out_of_reach(metric, keep, e.reached or 0.0), e.reached) from e
        return build_plan(self.graph, self.cost, kept, self.dense)

    def _out_of_reach(self, metric: str, keep: float, reached: float) -> str:
        ask, advice = math.ceil(reached * 100) / 100, self.limits.advice(metric, keep)
        if ask >= self.present(metric):
            return f"target.{metric}: nothing, or next to nothing, can be removed from this model. {advice}".strip()
        return (
            f"target.{metric}: {keep:.3g} of the dense model cannot be reached: at least {reached:.3f} is left. "
            f"Set the target to {ask:.2f} or more. {advice}"
        ).strip()

    @property
    def limits(self) -> Limits:
        """What limits the cuts of the model."""
        return Limits(self.graph.groups, self.cost, self.constraints, self.dense, self.widths)

    def nearest(self, metric: str, keep: float) -> Plan:
        """The plan that keeps the fraction `keep` of the dense model; if this is out of reach, the deepest plan.

        Raises:
            TargetError: If nothing can be removed at all.
            NothingToRemoveError: If the model is already as small.
        """
        try:
            return self.plan(metric, keep)
        except TargetError as e:
            if e.reached is None or e.reached >= self.present(metric) * (1 - 1e-9):
                raise
            return self.plan(metric, e.reached * (1 + 1e-9))

    def deepest(self, metric: str) -> Plan | None:
        """The plan that removes as much as possible; None if nothing can be removed."""
        try:
            return self.nearest(metric, 0.0)
        except TargetError:
            return None

    def present(self, metric: str) -> float:
        """Cost of the model as a fraction of the dense model's cost."""
        return self.limits.present(metric)


def plan_for(
    model: nn.Module,
    graph: Graph,
    recipe: Recipe,
    keep: float | None = None,
    calibration: Calibration | None = None,
    progress: Progress = iter,
    timing: Timing | None = None,
) -> Plan:
    """Plan one cut of a model that is already traced; see `make_plan`."""
    wanted = recipe.keep if keep is None else keep
    if wanted is None:
        raise RecipeError(
            "target.max_drop: a training run (callbacks=prune) finds how small the model can get, so there is no size "
            "to plan for. To plan or apply one cut, give target.flops, target.params or target.latency."
        )
    # Checks the target before channels are scored, which takes long.
    _goal(cost_of(model, graph, timing), _dense_sizes(model, graph)[0], recipe.metric, wanted)
    return weigh(model, graph, recipe, calibration, progress, timing).plan(recipe.metric, wanted)


def weigh(
    model: nn.Module,
    graph: Graph,
    recipe: Recipe,
    calibration: Calibration | None = None,
    progress: Progress = iter,
    timing: Timing | None = None,
) -> Weighed:
    """Score all channels; see `make_plan`."""
    dense, widths = _dense_sizes(model, graph)
    constraints = _constraints(model, graph, recipe, timing)
    for key in looks(recipe) if calibration is None else ():
        raise RecipeError(
            f"{key}: {getattr(recipe, key).name} needs training images. Pass a dataset, for example data=coco8.yaml, "
            f"or one that uses weights only, for example recipe.{key}={STAND_INS[key].name}."
        )
    criterion = criteria.create(recipe.criterion.name, recipe.criterion.options)
    tensors, free = model.state_dict(), [g for g in graph.groups if not g.protected]
    sets: Iterable[ChannelSet] = [s for g in free for s in g.sets]
    if isinstance(criterion, ModelReader):
        criterion.read(model)
    if isinstance(criterion, Observer) and criterion.images and calibration is not None:
        criterion.observe(model, calibration.first(criterion.images), progress)
        sets = progress(sets)  # scoring inverts large matrices, which takes minutes on large models
    scores = {s.name: criteria.score(criterion, tensors, s) for s in sets}
    comparable = bool(getattr(criterion, "comparable", False))
    allowed = [(g, levels(g, constraints, widths)) for g in free]
    allocate = allocation.create(recipe.allocation.name, recipe.allocation.options)
    group_allocation = allocate(allocation.Prunable(model, allowed, scores, calibration, progress))
    cost = cost_of(model, graph, timing)
    return Weighed(graph, cost, dense, widths, constraints, scores, comparable, group_allocation)


def trial(model: nn.Module, graph: Graph, recipe: Recipe) -> Plan:
    """The plan that a run with this recipe would make, but without data; in a search for the size, its first plan."""
    keep = recipe.keep
    if keep is None:
        limits, metric = limits_of(model, graph, recipe), recipe.metric
        present, floor = limits.present(metric), limits.least(metric)
        if present <= floor:
            advice = limits.advice(metric, present)
            raise TargetError(f"target.max_drop: nothing can be removed from this model. {advice}".strip())
        keep = (present + floor) / 2
    return plan_for(model, graph, rehearsal(recipe), keep)


def limits_of(model: nn.Module, graph: Graph, recipe: Recipe) -> Limits:
    """What limits the cuts of a model, for a target without a latency.

    Args:
        model: the model; dense or pruned before.
        graph: the graph of the model.
        recipe: the recipe with the constraints.
    """
    dense, widths = _dense_sizes(model, graph)
    return Limits(graph.groups, cost_of(model, graph), _constraints(model, graph, recipe), dense, widths)


def _constraints(model: nn.Module, graph: Graph, recipe: Recipe, timing: Timing | None = None) -> Constraints:
    """The limits on widths in a recipe: for all layers, and for the layers that its patterns match.

    For a latency target, widths are multiples of the runtime's step: a width between two steps would save no time.

    Raises:
        RecipeError: If a pattern matches no layer.
    """
    channels, multiple = recipe.channels, timing.multiple if timing else 1
    usual = math.lcm(ROUND_TO, recipe.sparsity.multiple) if recipe.sparsity else ROUND_TO
    everywhere = multiple if timing and channels.round_to is None else channels.round_to or usual
    limits_of: dict[str, list[LayerLimits]] = {}
    for pattern, limits in channels.layers.items():
        modules = set(named(model, pattern, "channels.layers"))
        layers = [n for g in graph.groups for n in g.layers if modules & {n, *_containers_of(n)}]
        if not layers:
            raise RecipeError(
                f"channels.layers: '{pattern}' matches no layer that has a width of its own. Give the name of a "
                "convolution or of a block with convolutions."
            )
        for name in dict.fromkeys(layers):
            limits_of.setdefault(name, []).append(limits)

    def given(key: str, of: list[LayerLimits]) -> list[Any]:
        return [v for v in (getattr(limits, key) for limits in of) if v is not None]

    def strictest(of: list[LayerLimits]) -> Constraints:
        return Constraints(
            math.lcm(multiple, *given("round_to", of) or [everywhere]),
            max(given("min", of), default=channels.min),
            min(given("max_removed", of), default=channels.max_removed),
        )

    each = {name: strictest(limits) for name, limits in limits_of.items()}
    return Constraints(math.lcm(multiple, everywhere), channels.min, channels.max_removed, each)


def _containers_of(layer: str) -> Iterator[str]:
    """Names of the modules that contain a layer, from the innermost to the outermost."""
    while layer := layer.rpartition(".")[0]:
        yield layer


def _goal(cost: Cost, dense: Shapes, metric: str, keep: float) -> Goal:
    whole, present = cost.total(metric, dense), cost.total(metric)
    if present <= keep * whole:
        what = metric if metric == "latency" else "size"
        raise NothingToRemoveError(
            f"target.{metric}: the model already is at {present / whole:.3f} of its dense {what}, so a target of "
            f"{keep:g} leaves nothing to remove. Set a smaller target."
        )
    return Goal(metric, keep * whole, whole)


def _dense_sizes(model: nn.Module, graph: Graph) -> tuple[Shapes, Mapping[str, int]]:
    """Shapes in the dense model of the tensors that are smaller now, and the dense `{set name: channels}`."""
    record = read_record(model)
    return (record.plan.shapes, record.widths) if record and record.plan else ({}, graph.widths)


def build_plan(graph: Graph, cost: Cost, kept: Mapping[str, tuple[int, ...]], dense: Shapes) -> Plan:
    """Translate kept channels per set into a plan: kept indices per tensor, new attribute values and a forecast.

    Args:
        graph: the graph of the model.
        cost: the cost of the model.
        kept: `{set name: kept channels}`; a set that is not in it keeps all its channels.
        dense: shapes in the dense model, for the tensors that earlier cuts made smaller.
    """
    removed: dict[tuple[str, int], set[int]] = {}
    narrower = []
    for group in graph.groups:
        for channels in group.sets:
            if channels.name not in kept:
                continue
            gone = set(range(channels.size)) - set(kept[channels.name])
            for slot in channels.slots:
                removed.setdefault((slot.tensor, slot.dim), set()).update(slot.index[i] for i in gone)
        widest = max(group.sets, key=lambda s: s.size)
        if widest.name in kept:
            narrower.append(GroupWidth(group.name, group.layers, group.width, len(kept[widest.name])))
    keep: Keep = {}
    for (tensor, dim), gone in sorted(removed.items()):
        size = cost.shapes[tensor][dim]
        keep.setdefault(tensor, {})[dim] = tuple(i for i in range(size) if i not in gone)

    def left(rows: Rows) -> int:
        gone = removed.get((rows.tensor, rows.dim), set())
        return sum(i not in gone for i in range(rows.start, rows.stop))

    attributes: Attributes = {}
    for a in graph.attributes:
        counts = [left(rows) for rows in a.rows]
        if counts != [len(rows) for rows in a.rows]:
            value = counts if a.many else sum(counts) // a.per
            attributes.setdefault(a.module, {})[a.name] = value
    scale: Scale = {}
    for fold in graph.folds:
        factor = (left(fold.counted) / len(fold.counted)) ** fold.power
        if factor != 1.0:
            gone = removed.get((fold.rows.tensor, 0), set())
            kept_rows = (i for i in range(fold.rows.start, fold.rows.stop) if i not in gone)
            scale.setdefault(fold.rows.tensor, {}).update(dict.fromkeys(kept_rows, factor))
    shapes = {t: cost.shapes[t] for t in (*keep, *scale)}
    parts, opaque = protected_parts(graph), dict(graph.opaque)
    plan = Plan(keep, attributes, shapes, tuple(narrower), parts, scale=scale, opaque=opaque)
    after = {t: plan.shape_after(t) for t in keep}
    forecast = Forecast(
        imgsz=cost.imgsz,
        dense_flops=cost.flops(dense),
        flops_before=cost.flops(),
        flops_after=cost.flops(after),
        dense_params=cost.parameters(dense),
        params_before=cost.parameters(),
        params_after=cost.parameters(after),
    )
    if cost.timing is not None:
        of_dense, now, then = (cost.total("latency", shapes) for shapes in (dense, None, after))
        forecast = replace(forecast, dense_ms=of_dense, ms_before=now, ms_after=then)
    return replace(plan, forecast=forecast)


def standing(model: nn.Module, graph: Graph) -> Forecast:
    """The cost of a model as it stands, as the forecast of a plan that removes no channel."""
    cost, dense = cost_of(model, graph), _dense_sizes(model, graph)[0]
    flops, params = cost.flops(), cost.parameters()
    return Forecast(cost.imgsz, cost.flops(dense), flops, flops, cost.parameters(dense), params, params)


def protected_parts(graph: Graph) -> tuple[Protected, ...]:
    """The protected layers, grouped by reason."""
    reasons: dict[str, list[str]] = {}
    for group in graph.groups:
        if group.protected:
            reasons.setdefault(group.protected, []).extend(group.layers)
    return tuple(Protected(tuple(layers), reason) for reason, layers in reasons.items())


TRIALS = 8
"""Number of trials that each find one class of blocks. After them, all blocks of users are opaque."""


def tried_out(
    model: nn.Module,
    graph: Graph,
    traced: Callable[[Mapping[str, str]], Graph],
    step: int = ROUND_TO,
    progress: Progress = iter,
) -> Graph:
    """The graph of a model in which every block of a user that cannot be cut is opaque.

    About half of all free channels are cut from a copy, and the cut is proved. If it is refuted, the block that is the
    most likely cause becomes opaque, with all other blocks of its class.

    Args:
        model: the model; it is not changed.
        graph: its graph.
        traced: `({block: reason}) -> graph`: traces the model with opaque blocks.
        step: widths are multiples of it.
        progress: wraps the trials to show a progress bar.

    Returns:
        The graph with opaque blocks; `graph` if no set of opaque blocks makes the proof hold.
    """
    blocks = {path: module for path, module in model.named_modules() if may_be_opaque(model, path)}
    if not blocks:
        return graph
    opaque, tried = dict[str, str](), graph
    for trial in progress(iter(range(1, TRIALS + 2))):
        kept = {name: k for g in tried.groups if not g.protected for name, k in about_half(g, step).items()}
        trial_plan = build_plan(tried, cost_of(model, tried), kept, {})
        if not trial_plan.keep:
            return tried
        try:
            prove(model, trial_plan)
            return tried
        except RefutedError as e:
            cause = next((s for s in e.suspects if s in blocks and s not in tried.opaque and s not in opaque), None)
            why = e.why
        except ProofError:  # the model itself does not run
            return graph
        if cause is None:
            return graph
        for path, block in blocks.items():
            if type(block) is type(blocks[cause]) or trial >= TRIALS:
                opaque.setdefault(
                    path,
                    f"'{path}' ({type(block).__name__}) does not work with fewer channels: {why}. To prune it, state "
                    "its rule (register_block)",
                )
        tried = traced(opaque)
    return graph


def about_half(group: Group, step: int) -> dict[str, tuple[int, ...]]:
    """`{set: kept channels}`: at most half. Large widths are odd multiples of `step`: no special number."""
    count = group.grain // 2
    if group.grain > 2 * step:
        count = count // step * step
        count -= step if count // step % 2 == 0 else 0
    return {s.name: tuple(range(s.size))[1::2][: count * s.size // group.grain] for s in group.sets} if count else {}


def widths(model: nn.Module, graph: Graph | None = None, imgsz: ImageSize = 640) -> dict[str, int]:
    """`{set name: channels}` of a model, for both values of `channels.attention`.

    Args:
        model: the model.
        graph: the graph of the model; None: the model is traced.
        imgsz: image size in pixels for the trace. With `graph`, the image size of the graph is used.
    """
    graph = graph or trace(model, imgsz=imgsz)
    return (
        {**trace(model, imgsz=graph.imgsz, heads="heads").widths, **graph.widths} if has_heads(model) else graph.widths
    )


def present_cost(model: nn.Module, imgsz: ImageSize) -> tuple[float, int]:
    """FLOPs (2 x MACs, one image) and parameters of a model, without parts that do not run in deployment."""
    return dense_cost(model, None, imgsz)


def dense_cost(model: nn.Module, plan: Plan | None, imgsz: ImageSize) -> tuple[float, int]:
    """FLOPs and parameters of the dense model from which `plan` made `model` (None: `model` itself is dense)."""
    cost = cost_of(model, trace(model, imgsz=imgsz))
    shapes = plan.shapes if plan else {}
    return cost.flops(shapes), cost.parameters(shapes)


def layer_widths(model: nn.Module) -> Sequence[tuple[str, int]]:
    """`(name, output channels)` of every convolution and linear layer, in model order."""
    return [
        (n, m.out_features if isinstance(m, nn.Linear) else m.out_channels)
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)
    ]
