# SPDX-License-Identifier: AGPL-3.0-or-later
"""torch-pruning as an independent referee: where its dependency graph can read a model, both find the same groups."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch_pruning as tp
import zoo
from torch import nn

import yolo_prune
from yolo_prune.graph import trace


def longer(*names: str) -> tuple[Any, ...]:
    return tuple(pytest.param(name, marks=pytest.mark.long) for name in names)


READABLE = (
    *("yolov3", "yolov3-tiny", "yolov5", "yolov6", "yolov8-ghost", "yolov8-cls-resnet50", "yolo11-cls-resnet18"),
    *longer("yolov3-spp", "yolov5-p6", "yolov8-ghost-p2", "yolov8-ghost-p6", "yolov8-cls-resnet101"),
)
HALVING = ("C2", "C2f", "ELAN1", "RepNCSPELAN4")
WITH_HALVES = ("yolov8", "yolov8-cls", *longer("yolov8-p2", "yolov8-p6", "yolov9t", "yolov9s", "yolov9m"))
"""torch-pruning traces these, too, but misreads their blocks, which halve the output of a layer and concatenate it."""
Place = tuple[str, int, int]  # tensor, dimension, index


def ours(model: nn.Module, name: str) -> dict[Place, frozenset[Place]]:
    """`{place: all places that go with it}` of the weights of layers, where something may go."""
    found = {}
    for group in trace(model, imgsz=2 * zoo.image_size(name)).groups:
        if group.protected:
            continue
        for channels in group.sets:
            for i in range(channels.size):
                together = frozenset(
                    (s.tensor, s.dim, s.index[i]) for s in channels.slots if s.tensor.endswith("weight")
                )
                found.update(dict.fromkeys(together, together))
    return found


def stock(model: nn.Module, name: str) -> Any:
    """The graph of torch-pruning alone."""
    graph = tp.DependencyGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph.build_dependency(model.train().requires_grad_(True), zoo.images(model, name, 1), verbose=False)
    return graph


def theirs(model: nn.Module, name: str) -> dict[Place, frozenset[Place]]:
    names = {module: path for path, module in model.named_modules()}
    graph, found = stock(model, name), {}
    for layer in [m for m in names if isinstance(m, nn.Conv2d) and m in graph.module2node and ".dfl" not in names[m]]:
        for channel in range(0, layer.out_channels, 5):
            if (f"{names[layer]}.weight", 0, channel) in found:
                continue
            pruner = graph.get_pruner_of_module(layer)
            group = graph.get_pruning_group(layer, pruner.prune_out_channels, [channel])
            together = frozenset(
                (f"{names[item.dep.target.module]}.weight", _dimension(item.dep), index)
                for item in group
                if item.dep.target.module in names
                for index in item.idxs
            )
            found.update(dict.fromkeys(together, together))
    return found


def _dimension(dependency: Any) -> int:
    layer, out = dependency.target.module, dependency.handler.__name__ == "prune_out_channels"
    if isinstance(layer, nn.ConvTranspose2d):
        return int(out)
    depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1
    return 0 if out or depthwise or not isinstance(layer, nn.Conv2d | nn.Linear) else 1


@pytest.mark.parametrize("name", READABLE)
def test_torch_pruning_finds_the_same_groups(name: str) -> None:
    model = zoo.build(name, width=0.25)
    torch.manual_seed(0)
    mine, found = ours(model, name), theirs(model, name)
    both = mine.keys() & found.keys()
    assert len(both) > 500
    assert [place for place in sorted(both) if mine[place] != found[place]] == []


@pytest.mark.parametrize("name", WITH_HALVES)
def test_torch_pruning_finds_other_groups_only_where_halves_are_concatenated(name: str) -> None:
    """There it couples the halves with the layers that are concatenated to them, and its own cut breaks the model."""
    model = zoo.build(name, width=0.25)
    torch.manual_seed(0)
    blocks = {n: m for n, m in model.named_modules() if type(m).__name__ in HALVING}
    mine, found = ours(model, name), theirs(model, name)
    both = mine.keys() & found.keys()
    other = {place for place in both if mine[place] != found[place]}
    inside = {block: [p for p in other if p[0].startswith(f"{block}.")] for block in blocks}
    assert len(both) - len(other) > 500
    assert sum(map(len, inside.values())) == len(other)
    assert all(inside.values())
    image = zoo.images(model, name, 1)
    model.eval()(image)
    block = next(iter(blocks.values()))
    group = stock(model, name).get_pruning_group(block.cv1.conv, tp.prune_conv_out_channels, [0])
    group.prune()
    with pytest.raises(RuntimeError, match="channels"):
        model.eval()(image)


@pytest.mark.parametrize("name", READABLE)
def test_our_groups_of_torch_pruning_are_its_own(name: str) -> None:
    """The same layers on the same side, the same indices, and the same indices of the root for each of them."""
    model = zoo.build(name, width=0.25)
    graph, compared = stock(model, name), 0
    for group in yolo_prune.dependency_graph(model, 2 * zoo.image_size(name)).get_all_groups():
        root = group[0].dep
        other = graph.get_pruning_group(root.target.module, root.handler, list(group[0].idxs))
        assert described(group) == described(other)
        compared += 1
    assert compared > 10


def described(group: Any) -> set[tuple[nn.Module, Any, int, int]]:
    """`(layer, function, index, index of the root)` for every index of every layer of a group."""
    return {
        (item.dep.target.module, item.dep.handler, index, root)
        for item in group
        if type(item.dep.target.module).__module__.startswith("torch.nn.")
        for index, root in zip(item.idxs, item.root_idxs, strict=True)
    }
