# SPDX-License-Identifier: AGPL-3.0-or-later
"""Selection: which channels go, by hand on toy models, and as properties on real ones."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import models
import pytest
import torch
from torch import Tensor

from yolo_prune.errors import TargetError
from yolo_prune.graph import ChannelSet, Group, Slot
from yolo_prune.planning.cost import Cost
from yolo_prune.planning.planner import build_plan
from yolo_prune.planning.select import Allocation, Constraints, Goal, select

Kept = dict[str, tuple[int, ...]]
FREE = Constraints(round_to=1, min=1, max_removed=0.99)


def chain(*widths: int, macs: float = 1.0) -> tuple[list[Group], Cost]:
    """Convolutions 1 x 1 one behind the other; the first reads 3 channels, the last one's output is fixed."""
    shapes = {f"{i}.weight": (out, ins, 1, 1) for i, (ins, out) in enumerate(zip((3, *widths), widths, strict=False))}
    groups = []
    for i, size in enumerate(widths):
        slots = [Slot(f"{i}.weight", 0, tuple(range(size)))]
        if i + 1 < len(widths):
            slots.append(Slot(f"{i + 1}.weight", 1, tuple(range(size))))
        protected = "task output" if i + 1 == len(widths) else None
        groups.append(Group((ChannelSet(str(i), size, tuple(slots)),), protected))
    return groups, Cost(dict.fromkeys(shapes, macs), frozenset(shapes), dict(shapes), 64)


def scored(**values: list[float]) -> dict[str, Tensor]:
    return {name.strip("_"): torch.tensor(v, dtype=torch.float64) for name, v in values.items()}


def run(
    groups: list[Group],
    cost: Cost,
    scores: dict[str, Tensor],
    limit: float,
    constraints: Constraints = FREE,
    dense: dict[str, int] | None = None,
    **more: Any,
) -> Kept:
    widths = {s.name: s.size for g in groups for s in g.sets} | (dense or {})
    return select(groups, cost, scores, Goal("flops", limit, cost.flops()), constraints, widths, **more)


EIGHT = [5.0, 1.0, 4.0, 2.0, 8.0, 7.0, 3.0, 6.0]


@pytest.mark.parametrize(
    ("limit", "constraints", "kept"),
    [
        (98, FREE, (0, 2, 3, 4, 5, 6, 7)),  # 112 FLOPs, 14 a channel
        (97, FREE, (0, 2, 4, 5, 6, 7)),
        (97, Constraints(2, 1, 0.99), (0, 2, 4, 5, 6, 7)),
        (83, Constraints(2, 1, 0.99), (0, 4, 5, 7)),
        (83, Constraints(4, 1, 0.99), (0, 4, 5, 7)),
        (97, Constraints(3, 1, 0.99), (0, 2, 4, 5, 6, 7)),  # 8 itself is no multiple, but stands
        (28, Constraints(1, 2, 0.99), (4, 5)),
        (28, Constraints(1, 1, 0.75), (4, 5)),
        (14, FREE, (4,)),
    ],
)
def test_the_lowest_scores_go_down_to_an_allowed_width(
    limit: float, constraints: Constraints, kept: tuple[int, ...]
) -> None:
    groups, cost = chain(8, 4)
    assert cost.flops() == 112
    assert run(groups, cost, scored(_0=EIGHT), limit, constraints) == {"0": kept}


def test_equal_scores_keep_the_later_channels() -> None:
    groups, cost = chain(8, 4)
    assert run(groups, cost, scored(_0=[1.0] * 8), 56) == {"0": (4, 5, 6, 7)}


def test_worthless_channels_can_go_too() -> None:
    groups, cost = chain(8, 4)
    assert run(groups, cost, scored(_0=[0.0] * 8), 56) == {"0": (4, 5, 6, 7)}


def test_a_group_that_loses_less_goes_first() -> None:
    groups, cost = chain(8, 8, 4)
    scores = scored(_0=[1.0] * 8, _1=[1.0] * 6 + [0.01] * 2)
    assert run(groups, cost, scores, cost.flops() - 2) == {"1": (0, 1, 2, 3, 4, 5, 7)}


def test_at_equal_loss_the_dearer_channel_goes_first() -> None:
    groups, cost = chain(8, 8, 64)  # a channel of the second layer is read by 64
    assert list(run(groups, cost, scored(_0=[1.0] * 8, _1=[1.0] * 8), cost.flops() - 2)) == ["1"]


def test_what_a_criterion_s_scale_is_does_not_matter() -> None:
    groups, cost = chain(8, 8, 8, 4)
    scores = scored(_0=EIGHT, _1=EIGHT[::-1], _2=[x**2 for x in EIGHT])
    louder = {name: score * 10.0**i for i, (name, score) in enumerate(scores.items())}
    assert run(groups, cost, scores, cost.flops() * 0.4) == run(groups, cost, louder, cost.flops() * 0.4)


def test_protected_groups_are_left_alone() -> None:
    groups, cost = chain(8, 8, 4)
    groups[1] = Group(groups[1].sets, "recipe")
    kept = run(groups, cost, scored(_0=[100.0] * 8, _1=[0.0] * 8), cost.flops() * 0.7)
    assert list(kept) == ["0"]


def test_sets_of_a_group_keep_equal_fractions() -> None:
    wide, narrow = (
        ChannelSet(n, size, (Slot(f"{n}.weight", 0, tuple(range(size))),)) for n, size in (("w", 8), ("n", 4))
    )
    shapes = {"w.weight": (8, 10, 1, 1), "n.weight": (4, 10, 1, 1)}
    cost = Cost(dict.fromkeys(shapes, 1.0), frozenset(shapes), dict(shapes), 64)
    kept = run([Group((wide, narrow))], cost, scored(w=EIGHT, n=[1.0, 4.0, 2.0, 3.0]), 0.75 * cost.flops())
    assert kept == {"w": (0, 2, 4, 5, 6, 7), "n": (1, 2, 3)}


def test_what_was_cut_in_passing_is_given_back_if_it_still_fits() -> None:
    """A cheap first step is not needed once a big one passed the goal."""
    sizes = {"small": 2, "big": 2}
    sets = {n: ChannelSet(n, s, (Slot(f"{n}.weight", 0, tuple(range(s))),)) for n, s in sizes.items()}
    shapes = {"small.weight": (2, 1, 1, 1), "big.weight": (2, 100, 1, 1)}
    cost = Cost(dict.fromkeys(shapes, 0.5), frozenset(shapes), dict(shapes), 64)
    scores = scored(small=[0.001, 1.0], big=[1.0, 1.0])
    assert run([Group((s,)) for s in sets.values()], cost, scores, cost.flops() - 50) == {"big": (1,)}


def test_max_removed_counts_from_the_dense_width() -> None:
    groups, cost = chain(8, 4)
    constraints = Constraints(1, 1, 0.75)
    assert run(groups, cost, scored(_0=EIGHT), 70, constraints, {"0": 20}) == {"0": (0, 2, 4, 5, 7)}
    with pytest.raises(TargetError, match=r"at least 0\.625 is left"):  # 5 of 8, a quarter of 20
        run(groups, cost, scored(_0=EIGHT), 69, constraints, {"0": 20})


def named_layers(groups: list[Group]) -> list[Group]:
    """The same groups, with the names of the layers that a trace would give them."""
    return [
        Group(tuple(dataclasses.replace(s, layers=(f"{s.name}.conv",)) for s in g.sets), g.protected) for g in groups
    ]


@pytest.mark.parametrize(
    ("layers", "kept"),
    [
        ({}, (0, 4, 5, 7)),
        ({"0.conv": Constraints(3, 1, 0.99)}, (4, 5, 7)),
        ({"0.conv": Constraints(4, 1, 0.99)}, (0, 4, 5, 7)),
        ({"other.conv": Constraints(8, 8, 0.1)}, (0, 4, 5, 7)),
    ],
)
def test_a_layer_may_have_limits_of_its_own(layers: dict[str, Constraints], kept: tuple[int, ...]) -> None:
    groups, cost = chain(8, 4)
    constraints = Constraints(1, 1, 0.99, layers)
    assert run(named_layers(groups), cost, scored(_0=EIGHT), 56, constraints) == {"0": kept}


def test_limits_of_one_layer_can_put_the_target_out_of_reach_and_loosen_it_again() -> None:
    groups, cost = chain(8, 4)
    tight = Constraints(1, 1, 0.99, {"0.conv": Constraints(1, 6, 0.5)})
    with pytest.raises(TargetError, match=r"at least 0\.750 is left"):
        run(named_layers(groups), cost, scored(_0=EIGHT), 56, tight)
    loose = Constraints(8, 8, 0.1, {"0.conv": Constraints(1, 1, 0.5)})
    assert run(named_layers(groups), cost, scored(_0=EIGHT), 56, loose) == {"0": (0, 4, 5, 7)}


def test_a_group_obeys_the_strictest_of_its_layers() -> None:
    group = Group((ChannelSet("0", 48, (), ("a", "b", "c")),))
    constraints = Constraints(8, 8, 0.75, {"a": Constraints(6, 4, 0.9), "b": Constraints(4, 16, 0.5)})
    assert constraints.of(group) == Constraints(24, 16, 0.5)  # of c, the values for all
    assert constraints.of(Group((ChannelSet("0", 48, (), ("a",)),))) == Constraints(6, 4, 0.9)


def test_the_goal_may_be_parameters() -> None:
    groups, cost = chain(8, 4)
    weighed = Cost({**cost.macs, "0.weight": 1e6}, cost.params, cost.shapes, 64)
    kept = select(groups, weighed, scored(_0=EIGHT), Goal("params", 28, 56), FREE, {"0": 8})
    assert kept == {"0": (0, 4, 5, 7)}


def test_a_goal_out_of_reach_says_what_can_be_reached() -> None:
    groups, cost = chain(8, 4)
    with pytest.raises(
        TargetError,
        match=r"target\.flops: 0\.1 of the dense model cannot be reached: at least 0\.500 is left\.",
    ) as refusal:
        run(groups, cost, scored(_0=EIGHT), 0.1 * cost.flops(), Constraints(1, 4, 0.99))
    assert refusal.value.reached == 0.5


def test_a_model_in_which_nothing_may_go_says_so() -> None:
    groups, cost = chain(8, 4)
    with pytest.raises(TargetError, match=r"target\.flops: .* at least 1\.000 is left"):
        run(groups, cost, scored(_0=EIGHT), 100, Constraints(1, 8, 0.99))


def widths(groups: list[Group], kept: Kept) -> list[int]:
    return [len(kept[g.name]) if g.name in kept else g.width for g in groups[:-1]]


def test_uniform_takes_the_same_share_of_every_group_and_the_scores_say_which_channels() -> None:
    groups, cost = chain(8, 16, 4)
    uniform = Allocation({"0": "0", "1": "1"})
    scores = scored(_0=[1000 * x for x in EIGHT], _1=[0.001] * 14 + [1.0] * 2)
    half = 2 * (4 * 3 + 8 * 4 + 4 * 8)
    kept = run(groups, cost, scores, half, allocation=uniform)
    assert kept == {"0": (0, 4, 5, 7), "1": tuple(range(8, 16))}
    assert widths(groups, run(groups, cost, scores, half)) != [4, 8]  # all in competition
    coarse = run(groups, cost, scores, cost.flops() - 1, Constraints(4, 4, 0.99), allocation=uniform)
    assert widths(groups, coarse) == [8, 12]  # a quarter is nearer to nothing than a half


def test_uniform_counts_shares_from_the_dense_width() -> None:
    groups, cost = chain(8, 8, 4)
    kept = run(groups, cost, scored(_0=EIGHT, _1=EIGHT), 2 * (8 * 3 + 5 * 8 + 4 * 5), dense={"0": 16},
               allocation=Allocation({"0": "0", "1": "1"}))  # fmt: skip
    assert widths(groups, kept) == [8, 5]  # half of the first was gone before


def test_under_uniform_no_group_gets_back_more_than_one_step() -> None:
    sizes, costs = {"small": 8, "big": 8}, {"small": 1, "big": 100}
    groups = [Group((ChannelSet(n, s, (Slot(f"{n}.weight", 0, tuple(range(s))),)),)) for n, s in sizes.items()]
    shapes = {f"{n}.weight": (sizes[n], costs[n], 1, 1) for n in sizes}
    cost = Cost(dict.fromkeys(shapes, 0.5), frozenset(shapes), dict(shapes), 64)
    scores = scored(small=EIGHT, big=EIGHT)
    kept = run(groups, cost, scores, cost.flops() - 350, allocation=Allocation({"small": 1, "big": 2}))
    assert {n: len(k) for n, k in kept.items()} == {"small": 5, "big": 4}
    assert {n: len(k) for n, k in run(groups, cost, scores, cost.flops() - 350).items()} == {"big": 4}


def test_isomorphic_ranks_within_a_class_and_takes_the_same_share_of_all_classes() -> None:
    groups, cost = chain(8, 8, 8, 4)
    scores = scored(_0=[1.0] * 4 + [0.001] * 4, _1=[1.0] * 8, _2=[9.0] * 8)
    classes = Allocation({"0": "a", "1": "a", "2": "b"})
    kept = run(groups, cost, scores, 2 * (4 * 3 + 8 * 4 + 6 * 8 + 4 * 6), comparable=True, allocation=classes)
    assert widths(groups, kept) == [4, 8, 6]  # a quarter of 16, a quarter of 8
    assert kept["0"] == (0, 1, 2, 3)


def test_curves_count_in_place_of_scores() -> None:
    """Differences along a curve, at the widths that are allowed; beyond its end as steep as before."""
    groups, cost = chain(8, 8, 4)
    amounts = scored(_0=[0.25] * 4 + [1.0] * 4, _1=[0.5] * 6 + [2.0] * 2)
    curves = {"0": ((0.5, 1.0), (0.75, 3.0)), "1": ((0.75, 3.0), (0.875, 5.0))}
    for limit in range(238, 16, -6):
        wanted = run(groups, cost, amounts, limit, comparable=True)
        for comparable in (True, False):
            found = run(groups, cost, scored(_0=EIGHT, _1=EIGHT), limit, comparable=comparable,
                        allocation=Allocation(curves=curves))  # fmt: skip
            assert widths(groups, found) == widths(groups, wanted)
            assert "0" not in found or 1 not in found["0"]  # the scores say which


@pytest.mark.parametrize(
    ("curve", "steps"),
    [
        (((0.25, 0.5), (0.5, 1.5)), [0.25] * 2 + [0.5] * 5),
        (((0.25, 1.0), (0.5, 1.0)), [0.5] * 2 + [0.0] * 2 + [0.25] * 3),
    ],
)
def test_beyond_its_end_a_curve_goes_on_as_steeply_as_it_came_or_did_on_average(
    curve: tuple[tuple[float, float], ...], steps: list[float]
) -> None:
    """The choice is that of a curve which says this of every width, whatever another group offers."""
    groups, cost = chain(8, 8, 4)
    scores = scored(_0=EIGHT, _1=EIGHT)
    spelled = tuple((i / 8, sum(steps[:i])) for i in range(1, 8))
    for price in (0.2, 0.3, 0.45, 0.6):
        other = tuple((i / 8, price * i) for i in range(1, 8))
        for limit in range(238, 16, -6):
            short, long = (
                run(groups, cost, scores, limit, allocation=Allocation(curves={"0": given, "1": other}))
                for given in (curve, spelled)
            )
            assert widths(groups, short) == widths(groups, long)


def test_what_costs_nothing_goes_evenly() -> None:
    groups, cost = chain(8, 8, 4)
    free = Allocation(curves={"0": ((0.5, 0.0),), "1": ((0.5, 0.0),)})
    kept = run(groups, cost, scored(_0=EIGHT, _1=EIGHT), 2 * (5 * 3 + 5 * 5 + 4 * 5), allocation=free)
    assert widths(groups, kept) == [5, 5]


@functools.cache
def scores_of(name: str, criterion: str) -> dict[str, Tensor]:
    tensors, score = models.shared(name).state_dict(), models.criterion_of(name, criterion, {})
    return {s.name: score(tensors, s) for g in models.graph_of(name).groups for s in g.sets}


def choose(name: str, metric: str, keep: float, constraints: Constraints, criterion: str = "magnitude") -> Kept:
    graph, cost = models.graph_of(name), models.cost_of(name)
    whole = cost.flops() if metric == "flops" else cost.parameters()
    goal = Goal(metric, keep * whole, whole)
    return select(graph.groups, cost, scores_of(name, criterion), goal, constraints, graph.widths)


def share(name: str, metric: str, kept: Kept) -> float:
    forecast = build_plan(models.graph_of(name), models.cost_of(name), kept, {}).predicted
    return forecast.flops_kept if metric == "flops" else forecast.params_kept


@pytest.mark.parametrize("criterion", ["magnitude", pytest.param("random", marks=pytest.mark.long)])
@pytest.mark.parametrize("round_to", [8, 4, 1])
@pytest.mark.parametrize("metric", ["flops", "params"])
@pytest.mark.parametrize("name", models.FAMILIES)
def test_selection_lands_within_one_percent_below_the_target(
    name: str, metric: str, round_to: int, criterion: str
) -> None:
    for keep in (0.9, 0.75, 0.5, 0.3, 0.2):
        kept = choose(name, metric, keep, Constraints(round_to, 8, 0.75), criterion)
        assert 0.99 * keep < share(name, metric, kept) <= keep


@pytest.mark.parametrize("round_to", [8, 4])
@pytest.mark.parametrize("name", [*models.FAMILIES, *models.DEEP])
def test_widths_of_layers_keep_to_the_constraints(name: str, round_to: int) -> None:
    graph, cost = models.graph_of(name), models.cost_of(name)
    kept = choose(name, "flops", 0.6, Constraints(round_to, 2 * round_to, 0.5))
    plan = build_plan(graph, cost, kept, {})
    cut = {n: plan.shape_after(n)[0] for n in plan.keep if cost.shapes[n][0] != plan.shape_after(n)[0]}
    layers = {n: width for n, width in cut.items() if len(cost.shapes[n]) == 4}
    assert layers
    for tensor, width in layers.items():
        assert width >= 0.5 * cost.shapes[tensor][0]
        assert width >= min(2 * round_to, cost.shapes[tensor][0])
    for group in plan.groups:
        assert group.after % round_to == 0
        assert group.after >= 2 * round_to
        assert group.after >= 0.5 * group.before
    roundable = {n: w for n, w in layers.items() if cost.shapes[n][0] % round_to == 0}
    assert all(width % round_to == 0 for width in roundable.values())


@pytest.mark.parametrize("name", models.FAMILIES)
def test_no_group_could_be_wider_within_the_target(name: str) -> None:
    graph, keep = models.graph_of(name), 0.5
    kept = choose(name, "flops", keep, Constraints(8, 8, 0.75))
    for group in graph.groups:
        if group.sets[0].name not in kept:
            continue
        grains = len(kept[group.sets[0].name]) * group.grain // group.sets[0].size
        step = 8 * group.grain // group.width
        wider = {s.name: tuple(range(s.size // group.grain * (grains + step))) for s in group.sets}
        assert share(name, "flops", kept | wider) > keep


@pytest.mark.parametrize("name", models.FAMILIES)
def test_a_lower_target_is_reached_by_removing_what_scores_lowest(name: str) -> None:
    kept, scores = choose(name, "flops", 0.4, Constraints(8, 8, 0.75)), scores_of(name, "magnitude")
    for set_name, channels in kept.items():
        gone = [i for i in range(len(scores[set_name])) if i not in channels]
        assert scores[set_name][gone].max() <= scores[set_name][list(channels)].min()


@pytest.mark.parametrize("metric", ["flops", "params"])
@pytest.mark.parametrize("name", [*models.FAMILIES, *models.TINY])
def test_what_is_said_to_be_reachable_is(name: str, metric: str) -> None:
    constraints = Constraints(8, 16, 0.4)
    with pytest.raises(TargetError, match=r"at least 0\.\d\d\d is left") as refusal:
        choose(name, metric, 0.01, constraints)
    floor = refusal.value.reached
    assert floor is not None
    assert share(name, metric, choose(name, metric, floor, constraints)) <= floor
    with pytest.raises(TargetError):
        choose(name, metric, floor - 0.01, constraints)
