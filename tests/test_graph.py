# SPDX-License-Identifier: AGPL-3.0-or-later
"""Groups of coupled channels: complete, without overlap, as the blocks need them, and read without a trace."""

from __future__ import annotations

from collections import Counter
from typing import Any

import models
import pytest
import torch
from torch import nn
from ultralytics.nn.modules.block import Attention, C2f
from ultralytics.nn.tasks import ClassificationModel, DetectionModel, SegmentationModel
from yolo_prune.graph.scope import BLOCKS

from yolo_prune.errors import RecipeError, UnsupportedModelError
from yolo_prune.graph import Group, read_as_is, register_block, trace

EVERY = (*models.FAMILIES, *models.DEEP)


def home(name: str, tensor: str, index: int = 0, dim: int = 0) -> tuple[Group, str]:
    """The group and the set that one channel of a tensor belongs to."""
    for group in models.graph_of(name).groups:
        for channels in group.sets:
            for slot in channels.slots:
                if (slot.tensor, slot.dim) == (tensor, dim) and index in slot.index:
                    return group, channels.name
    raise LookupError(tensor)


@pytest.mark.parametrize("name", EVERY)
def test_every_channel_of_every_layer_is_in_exactly_one_set(name: str) -> None:
    model = models.shared(name)
    found = Counter(
        (slot.tensor, slot.dim, i)
        for group in models.graph_of(name).groups
        for channels in group.sets
        for slot in channels.slots
        for i in slot.index
    )
    expected = set()
    for layer_name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and ".dfl" not in layer_name:
            expected |= {(f"{layer_name}.weight", 0, i) for i in range(layer.out_channels)}
            if layer.groups == 1 and layer_name != "model.0.conv":  # the image has channels of its own
                expected |= {(f"{layer_name}.weight", 1, i) for i in range(layer.in_channels)}
            if layer.bias is not None:
                expected |= {(f"{layer_name}.bias", 0, i) for i in range(layer.out_channels)}
        elif isinstance(layer, nn.BatchNorm2d):
            for key in ("weight", "bias", "running_mean", "running_var"):
                expected |= {(f"{layer_name}.{key}", 0, i) for i in range(layer.num_features)}
    assert set(found) == expected
    assert set(found.values()) == {1}


@pytest.mark.parametrize("name", EVERY)
def test_sets_are_as_long_as_their_slots_and_names_are_unique(name: str) -> None:
    sets = [s for g in models.graph_of(name).groups for s in g.sets]
    assert all(len(slot.index) == len(set(slot.index)) == s.size for s in sets for slot in s.slots)
    assert max(Counter(s.name for s in sets).values()) == 1


@pytest.mark.parametrize("name", EVERY)
def test_the_halves_of_a_split_convolution_are_two_sets_of_one_group(name: str) -> None:
    blocks = [(n, m) for n, m in models.shared(name).named_modules() if isinstance(m, C2f)]
    assert blocks
    for path, block in blocks:
        first, a = home(name, f"{path}.cv1.conv.weight", 0)
        second, b = home(name, f"{path}.cv1.conv.weight", block.c)
        assert first is second
        assert a != b
        assert home(name, f"{path}.cv1.conv.weight", block.c - 1)[1] == a


@pytest.mark.parametrize("name", ["yolo11n", "yolo26n"])
def test_attention_ties_values_to_the_width_of_its_input_and_queries_to_keys(name: str) -> None:
    blocks: list[tuple[str, Any]] = [(n, m) for n, m in models.shared(name).named_modules() if isinstance(m, Attention)]
    assert any(block.num_heads > 1 for _, block in blocks)
    for path, block in blocks:
        size = 2 * block.key_dim + block.head_dim
        group, stream = home(name, f"{path}.qkv.conv.weight", dim=1)
        keys, _ = home(name, f"{path}.qkv.conv.weight")
        assert keys is not group
        names = []
        for head in range(block.num_heads):
            q, k, v = (head * size, head * size + block.key_dim, head * size + 2 * block.key_dim)
            homes = [home(name, f"{path}.qkv.conv.weight", i) for i in (q, k, v)]
            assert [g.name for g, _ in homes] == [keys.name, keys.name, group.name]
            assert homes[0][1] == homes[1][1]  # q and k are multiplied channel by channel
            assert homes[2][1] == home(name, f"{path}.pe.conv.weight", head * block.head_dim)[1]
            assert homes[2][1] == home(name, f"{path}.proj.conv.weight", head * block.head_dim, dim=1)[1]
            names += [homes[0][1], homes[2][1]]
        assert len({stream, *names}) == 1 + 2 * block.num_heads


def test_a_shortcut_ties_what_it_adds_and_no_shortcut_leaves_it_free() -> None:
    _, stream = home("yolov8n", "model.2.cv1.conv.weight", 16)
    assert home("yolov8n", "model.2.m.0.cv2.conv.weight")[1] == stream
    _, stream = home("yolov8n", "model.12.cv1.conv.weight", 64)
    assert home("yolov8n", "model.12.m.0.cv2.conv.weight")[1] != stream


@pytest.mark.parametrize("name", models.FAMILIES)
def test_exactly_the_task_outputs_are_protected(name: str) -> None:
    head: Any = models.shared(name).model[-1]
    graph = models.graph_of(name)
    towers = [t for t in ("cv2", "cv3", "one2one_cv2", "one2one_cv3") if hasattr(head, t)]
    expected = {f"{len(models.shared(name).model) - 1}.{t}.{i}.2" for t in towers for i in range(3)}
    protected = {layer for g in graph.groups if g.protected for layer in g.layers}
    assert protected == {f"model.{e}" for e in expected}
    assert {g.protected for g in graph.groups if g.protected} == {"task output"}
    assert bool(graph.constant) == (head.reg_max > 1)


def test_both_copies_of_an_end_to_end_head_keep_equal_widths() -> None:
    for level in range(3):
        one, _ = home("yolo26n", f"model.23.cv2.{level}.0.conv.weight")
        two, _ = home("yolo26n", f"model.23.one2one_cv2.{level}.0.conv.weight")
        assert one is two


@pytest.mark.parametrize("name", models.FAMILIES)
def test_names_of_sets_survive_a_cut(name: str) -> None:
    """Widths of the dense model are looked up by these names in later rounds."""
    after = trace(models.pruned(name, target_flops=0.4))
    assert list(after.widths) == list(models.graph_of(name).widths)
    assert [g.name for g in after.groups] == [g.name for g in models.graph_of(name).groups]


@pytest.mark.parametrize("name", ["yolo26n"])
def test_tracing_reads_the_model_and_draws_no_random_numbers(name: str) -> None:
    model = models.build(name)
    model.model[0].register_forward_hook(lambda *_: pytest.fail("the model itself was run"))
    before, modes = models.snapshot(model), [m.training for m in model.modules()]
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    random = torch.get_rng_state()
    assert trace(model).groups == trace(model).groups
    assert models.same_bits(models.snapshot(model), before)
    assert [m.training for m in model.modules()] == modes
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert torch.equal(torch.get_rng_state(), random)
    assert len(model.model[0]._forward_hooks) == 1


@pytest.mark.parametrize(
    ("pattern", "inside"),
    [
        ("model.4", lambda layer: layer.startswith("model.4.")),
        ("model.10.m.0.attn", lambda layer: layer.startswith("model.10.m.0.attn.")),
        ("*.ffn.0", lambda layer: ".ffn.0." in layer),
        ("model.2?", lambda layer: layer.split(".")[1] in ("20", "21", "22", "23")),
    ],
)
def test_a_protected_module_guards_every_group_that_touches_it(pattern: str, inside: Any) -> None:
    groups = trace(models.shared("yolo11n"), [pattern]).groups
    touched = [g for g in groups if any(inside(slot.tensor) for s in g.sets for slot in s.slots)]
    assert touched
    outputs = {g.name for g in models.graph_of("yolo11n").groups if g.protected}
    reasons = {g.protected for g in touched if g.name not in outputs}
    assert reasons == {f"recipe: protect '{pattern}'"}
    assert all(g.protected is None for g in groups if g not in touched and g.name not in outputs)


def test_frozen_modules_are_protected_as_such() -> None:
    groups = trace(models.shared("yolov8n"), frozen=["model.0.conv", "model.0.bn"]).groups
    assert {g.protected for g in groups if "model.0.conv" in g.layers} == {"frozen in this run"}


def test_a_pattern_that_matches_nothing_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(RecipeError, match=r"protect: 'modle\.0' matches no module.*model\.0 to model\.22"):
        trace(models.shared("yolov8n"), ["modle.0"])


def test_a_fused_model_is_refused() -> None:
    model = models.build("yolov8-tiny").float().eval().fuse(verbose=False)
    with pytest.raises(UnsupportedModelError, match=r"fused for inference.*before fuse\(\)"):
        trace(model)


def test_a_head_that_lost_a_branch_is_refused() -> None:
    model = models.build("yolo26-tiny")
    model.end2end = True
    model.model[-1].fuse()
    with pytest.raises(UnsupportedModelError, match=r"'model\.23' is fused for inference"):
        trace(model)


@pytest.mark.parametrize(
    ("cls", "family", "message"),
    [
        (SegmentationModel, "yolo11-seg", "The model is a .*SegmentationModel"),
        (ClassificationModel, "yolov8-cls", "The model is a .*ClassificationModel"),
        (DetectionModel, "yolov9t", r"'model\.2' is a .*ELAN1"),
        (DetectionModel, "yolov10n", r"'model\.5' is a .*SCDown"),
        (DetectionModel, "yolov6", r"'model\.11' is a .*ConvTranspose2d"),
    ],
)
def test_a_part_that_is_not_known_is_named(cls: type[nn.Module], family: str, message: str) -> None:
    model = cls(models.scaled(family, "n", 0.33, 0.125), verbose=False)
    with pytest.raises(UnsupportedModelError, match=message):
        trace(model)


class Squeeze(nn.Module):
    """Nothing this package has heard of."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.mean(1, keepdim=True)


def test_a_layer_somebody_added_is_named_not_guessed() -> None:
    model = models.build("yolov8-tiny")
    model.model[3].act = Squeeze()
    with pytest.raises(UnsupportedModelError, match=r"'model\.3\.act' is a .*Squeeze"):
        trace(model)


def test_a_convolution_in_groups_is_refused() -> None:
    model = models.build("yolov8-tiny")
    model.model[3].conv = nn.Conv2d(16, 32, 3, 2, 1, groups=4, bias=False)
    with pytest.raises(UnsupportedModelError, match=r"'model\.3\.conv' is a convolution of 4 groups"):
        trace(model)


def test_a_block_whose_width_does_not_fit_its_layers_is_refused() -> None:
    model = models.build("yolov8-tiny")
    model.model[2].c += 1
    with pytest.raises(UnsupportedModelError, match=r"'model\.2\.cv1' has 16 output channels.*was changed"):
        trace(model)


def test_a_model_without_convolutions_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no convolution; there is nothing to prune"):
        trace(nn.Sequential(nn.ReLU()))


def test_a_block_has_one_rule() -> None:
    with pytest.raises(ValueError, match="C2f already has a rule"):
        register_block(C2f)(lambda block, scope: block)
    assert Squeeze not in BLOCKS


def test_blocks_can_be_added_from_outside() -> None:
    class Doubled(nn.Conv2d):
        pass

    read_as_is(Doubled)
    model = models.build("yolov8-tiny")
    model.model[3].conv = Doubled(16, 32, 3, 2, 1, bias=False)
    assert trace(model).widths == models.graph_of("yolov8-tiny").widths
