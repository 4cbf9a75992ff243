# SPDX-License-Identifier: AGPL-3.0-or-later
"""From a model to its `Graph`: trace the stand-in with torch-pruning, translate to stock tensors, apply the facts."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from unittest import mock

import torch
import torch_pruning as tp
from torch import nn
from torch_pruning.dependency import index_mapping

from yolo_prune.errors import RecipeError, UnsupportedModelError
from yolo_prune.graph.scope import Facts, Scope
from yolo_prune.graph.structure import ChannelSet, Graph, Group, Rows, Slot

TENSORS_OUT = ("weight", "bias", "running_mean", "running_var")
TURNS = 1000  # more than a channel is ever read by one layer


def trace(model: nn.Module, protect: Sequence[str] = (), frozen: Sequence[str] = ()) -> Graph:
    """Find the groups of coupled channels of an Ultralytics model. The model is only read.

    Args:
        model: the `DetectionModel` (what `YOLO(...).model` holds).
        protect: names or globs of modules that must not be touched.
        frozen: names of modules that are not trained in this run; they are not touched either.

    Raises:
        UnsupportedModelError: If the model has a part whose dependencies are not known.
        RecipeError: If a protect pattern matches no module.
    """
    from yolo_prune.graph import blocks  # registers the rules; here, as it imports ultralytics

    if getattr(model, "is_fused", lambda: False)():
        blocks.raise_fused("the model")
    facts = Facts()
    twin = Scope(facts, "").stand_in(model)
    engine = _build(twin, _channels(model))
    sets = list(_channel_sets(engine, facts))
    guarded = dict.fromkeys(frozen, "frozen in this run") | _match(model, protect)
    groups = _groups(sets, facts, guarded)
    reached = {s.tensor for c in sets for s in c.slots}
    constant = tuple((r.tensor.removesuffix(".weight"), why) for r, why in facts.fixed if r.tensor not in reached)
    return Graph(tuple(groups), tuple(facts.attributes), tuple(facts.extra_costs), tuple(facts.spare), constant)


def _channels(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise UnsupportedModelError("The model has no convolution; there is nothing to prune.")


def _build(twin: nn.Module, channels: int) -> tp.DependencyGraph:
    def outputs(out: object) -> list[torch.Tensor]:
        products = [p for m in twin.modules() for p in getattr(m, "products", ())]
        return [*tp.utils.flatten_as_list(out), *products]

    engine = tp.DependencyGraph()
    image = torch.empty(1, channels, 64, 64, device="meta")
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.build_dependency(twin, (image,), output_transform=outputs, verbose=False)
    return engine


def _channel_sets(engine: tp.DependencyGraph, facts: Facts) -> Iterator[ChannelSet]:
    """Every output channel of every convolution, in exactly one set."""
    seen: set[tuple[nn.Module, int]] = set()
    # Each query would refresh the index mappings of all nodes; nothing is pruned here, so they stay as built.
    with mock.patch.object(index_mapping, "update_index_mapping"):
        for layer in _in_model_order(engine, facts):
            free = [i for i in range(layer.out_channels) if (layer, i) not in seen]
            if not free:
                continue
            pruner = engine.get_pruner_of_module(layer)
            items = engine.get_pruning_group(layer, pruner.prune_out_channels, free)
            for item in items:
                module = item.dep.target.module
                if isinstance(module, nn.Conv2d) and _is_out(item.dep):
                    seen.update((module, i) for i in item.idxs)
            yield from _homogeneous(items, facts)


def _in_model_order(engine: tp.DependencyGraph, facts: Facts) -> list[nn.Conv2d]:
    known = engine.module2node
    return [m for m in facts.origins if isinstance(m, nn.Conv2d) and m in known]


def _is_out(dep: tp.Dependency) -> bool:
    module = dep.target.module
    depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
    return depthwise or not isinstance(module, nn.Conv2d) or dep.handler.__name__ == "prune_out_channels"


def _homogeneous(items: tp.Group, facts: Facts) -> Iterator[ChannelSet]:
    """Split a torch-pruning group into sets whose channels all reach the same slots."""
    # A channel may be read at several places of one tensor (residual streams into a concatenation): `turn` counts them.
    Place = tuple[str, int, int]  # tensor, dimension, turn
    reach: dict[int, dict[Place, int]] = {}
    for item in items:
        origin = facts.origins.get(item.dep.target.module)
        if origin is None:  # an operation without tensors
            continue
        module, out = item.dep.target.module, _is_out(item.dep)
        if not isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            raise UnsupportedModelError(f"'{origin.layer}' is a {type(module).__name__}, which is not known yet.")
        keys = [k for k in TENSORS_OUT if getattr(module, k, None) is not None] if out else ["weight"]
        offset = origin.start if out else 0
        turns: Counter[int] = Counter()
        for index, root in zip(item.idxs, item.root_idxs, strict=True):
            for key in keys:
                place = (f"{origin.layer}.{key}", 0 if out else 1, turns[root] + offset * TURNS)
                reach.setdefault(root, {})[place] = index + offset
            turns[root] += 1
    kinds: dict[tuple[Place, ...], list[int]] = {}
    for root, places in reach.items():
        kinds.setdefault(tuple(places), []).append(root)
    for reached, roots in kinds.items():
        slots = {Slot(p[0], p[1], tuple(reach[r][p] for r in roots)): None for p in reached}
        yield ChannelSet(_name(items, facts, roots, len(kinds)), len(roots), tuple(slots))


def _name(items: tp.Group, facts: Facts, roots: list[int], parts: int) -> str:
    origin = facts.origins[items[0].dep.target.module]
    name = origin.layer.removesuffix(".conv") + (f":{origin.label}" if origin.label else "")
    return name if parts == 1 else f"{name}[{roots[0]}:{roots[-1] + 1}]"


def _match(model: nn.Module, protect: Sequence[str]) -> dict[str, str]:
    """`{module name: reason}` of the modules that a pattern names."""
    found: dict[str, str] = {}
    for pattern in protect:
        hits = [name for name, _ in model.named_modules() if name and fnmatchcase(name, pattern)]
        if not hits:
            tops = [name for name, _ in model.named_modules() if name.count(".") == 1]
            raise RecipeError(
                f"protect: '{pattern}' matches no module of this model. Its layers are {tops[0]} to {tops[-1]}; "
                "'yolo-prune plan model=...' lists the names inside them."
            )
        found.update(dict.fromkeys(hits, f"recipe: protect '{pattern}'"))
    return found


def _groups(sets: list[ChannelSet], facts: Facts, guarded: dict[str, str]) -> list[Group]:
    home = {(s.tensor, s.dim, i): n for n, c in enumerate(sets) for s in c.slots for i in s.index}
    parent = list(range(len(sets)))

    def root(n: int) -> int:
        while parent[n] != n:
            parent[n] = parent[parent[n]]
            n = parent[n]
        return n

    def members(rows: Rows) -> set[int]:
        return {home[rows.tensor, rows.dim, i] for i in range(rows.start, rows.stop)}

    for parts in facts.equal:
        first, *rest = sorted(set().union(*(members(p) for p in parts)))
        for other in rest:
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    reasons: dict[int, str] = {}
    for rows, reason in facts.fixed:
        if (rows.tensor, rows.dim, rows.start) in home:
            reasons.update((root(n), reason) for n in members(rows))
    for n, channels in enumerate(sets):
        for slot in channels.slots:
            module = slot.tensor.rpartition(".")[0]
            why = next((r for name, r in guarded.items() if module == name or module.startswith(f"{name}.")), None)
            if why:
                reasons.setdefault(root(n), why)
    together: dict[int, list[ChannelSet]] = {}
    for n, channels in enumerate(sets):
        together.setdefault(root(n), []).append(channels)
    return [Group(tuple(members_), reasons.get(n)) for n, members_ in together.items()]
