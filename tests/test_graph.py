# SPDX-License-Identifier: AGPL-3.0-or-later
"""Groups of coupled channels: complete, without overlap, as the blocks need them, and read without a trace."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import zoo
from torch import nn
from ultralytics.nn.modules.block import Attention, C2f
from ultralytics.nn.modules.conv import Conv, RepConv

from yolo_prune.cut import surgery
from yolo_prune.cut.plan import Plan
from yolo_prune.cut.proof import prove
from yolo_prune.errors import RecipeError, UnsupportedModelError
from yolo_prune.graph import Group, probes, read_as_is, register_block, rules, trace
from yolo_prune.graph.ops.base import effect
from yolo_prune.graph.rules import RULES
from yolo_prune.planning import select
from yolo_prune.planning.cost import cost_of
from yolo_prune.planning.planner import build_plan, make_plan

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
        if ".dfl" not in slot.tensor
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
    last, reasons = len(models.shared(name).model) - 1, {g.protected for g in graph.groups if g.protected}
    dfl = {f"model.{last}.dfl.conv"} if head.reg_max > 1 else set()
    assert protected == {f"model.{e}" for e in expected} | dfl
    assert reasons == {"task output"} | ({"box distribution (DFL)"} if dfl else set())


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


@pytest.mark.parametrize("name", models.TINY)
def test_the_graph_after_a_cut_is_that_of_a_new_trace(name: str) -> None:
    plan = models.plan_of(name, target_flops=0.5, channels_round_to=1, channels_min=1)
    model = models.build(name)
    surgery.apply(model, plan)
    assert models.graph_of(name).after(plan.keep) == trace(model, imgsz=models.IMGSZ)


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


def test_a_block_that_was_fused_is_refused() -> None:
    model = models.build("yolov9t").float().eval()
    block = next(m for m in model.modules() if isinstance(m, RepConv))
    block.fuse_convs()
    block.forward = block.forward_fuse
    with pytest.raises(UnsupportedModelError, match=r"'model\.\S+' does not run the forward of .*before fuse\(\)"):
        trace(model)


def test_a_head_that_lost_a_branch_still_has_the_other() -> None:
    model = models.build("yolo26-tiny")
    model.end2end = True
    model.model[-1].fuse()
    graph = trace(model, imgsz=64)
    assert not [n for g in graph.groups for n in g.layers if n.startswith("model.23.cv2")]
    assert {g.protected for g in graph.groups if "model.23.one2one_cv2.0.2" in g.layers} == {"task output"}


class Added(nn.Module):
    """A layer that somebody put behind another; subclasses say what it does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.c = inner, inner.conv.out_channels // 2  # type: ignore[union-attr, operator]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Squeeze(Added):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        return x * x.mean(1, keepdim=True)


class Gate(Added):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        return x * x.mean((2, 3), keepdim=True).sigmoid()


class Softened(Added):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).sigmoid()


class Shuffled(Added):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        b, c, h, w = x.shape
        return x.view(b, 2, self.c, h, w).transpose(1, 2).reshape(b, c, h, w)


class Chunked(Added):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.inner(x).chunk(2, 1)
        return torch.cat((b, a), 1)


class Sliced(Added):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        return torch.cat((x[:, self.c :], x[:, : self.c]), 1)


class Strided(Added):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        return torch.cat((x[:, 1::2], x[:, ::2]), 1)


class Sorted(Added):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).kthvalue(1, dim=-1, keepdim=True).values + self.inner(x)


def with_added(cls: type[Added]) -> Any:
    model = models.build("yolov8-tiny")
    stock = model.model[3]
    added: Any = cls(stock)
    added.i, added.f, added.type, added.np = stock.i, stock.f, "Added", stock.np
    model.model[3] = added
    return model


def group_of(model: Any, layer: str) -> Group:
    return next(g for g in trace(model, imgsz=64).groups if layer in g.layers)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Squeeze, "mean over channels in Squeeze"),
        (Softened, "feeds a convolution through an activation that is not 0 at 0 in Conv2d"),
        (Strided, "is cut up by 'getitem' in Strided"),
        (Sorted, "meets 'kthvalue', which is not known, in Sorted"),
    ],
)
def test_what_a_strange_block_does_to_channels_is_protected_with_the_reason(cls: type[Added], reason: str) -> None:
    group = group_of(with_added(cls), "model.3.inner.conv")
    assert group.protected == reason


def halved(model: Any, layer: str, heads: str = "dims") -> Plan:
    """A plan that keeps every other channel of the group that a layer is in; proved."""
    graph = trace(model, imgsz=64, heads=heads)
    group = next(g for g in graph.groups if layer in g.layers)
    assert group.protected is None
    plan = build_plan(graph, cost_of(model, graph), {s.name: tuple(range(s.size))[1::2] for s in group.sets}, {})
    assert prove(model, plan).error < 1e-10
    return plan


@pytest.mark.parametrize("cls", [Added, Gate, Chunked, Shuffled])
def test_a_strange_block_is_pruned_exactly_where_a_trace_can_tell(cls: type[Added]) -> None:
    assert len(halved(with_added(cls), "model.3.inner.conv").keep["model.3.inner.conv.weight"][0]) == 16


@pytest.mark.parametrize("cls", [Squeeze, Softened, Shuffled, Sliced, Strided, Sorted])
def test_the_rest_of_a_model_with_a_strange_block_is_pruned_exactly(cls: type[Added]) -> None:
    model = with_added(cls)
    plan = make_plan(model, models.recipe(target_flops=0.6, channels_round_to=1, channels_min=1), 64)
    assert prove(model, plan).error < 1e-10


def test_what_a_chunk_cuts_keeps_equal_halves() -> None:
    group = group_of(with_added(Chunked), "model.3.inner.conv")
    assert [s.size for s in group.sets] == [16, 16]


def test_the_rule_in_the_documentation_prunes_the_block_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs/reference/blocks.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    block, rule = code.split("@yolo_prune.register_block")
    monkeypatch.setattr(rules, "RULES", RULES.copy())
    names: dict[str, Any] = {"__name__": "mine"}
    exec(block, names)
    model: Any = models.build("yolov8-tiny")
    stock, own = model.model[3], names["Swap"](16, 32).double()
    own.i, own.f, own.type, own.np = stock.i, stock.f, "Swap", stock.np
    model.model[3] = zoo.randomise(own)
    assert group_of(model, "model.3.cv.conv").protected == "is cut up by 'split' in Swap"
    exec("@yolo_prune.register_block" + rule, names)
    plan = halved(model, "model.3.cv.conv")
    assert plan.attributes["model.3"] == {"sizes": [8, 8]}
    assert plan.keep["model.3.cv.conv.weight"][0] == tuple(range(1, 32, 2))


def test_subclasses_that_inherit_forward_inherit_the_rule() -> None:
    class Mine(C2f):
        pass

    class Other(C2f):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    assert rules.rule_of(Mine(16, 16)) is RULES[C2f]
    assert rules.rule_of(Other(16, 16)) is None


def test_convolutions_in_groups_lose_the_same_places_of_every_group() -> None:
    model = models.build("yolov8-tiny")
    model.model[3].conv = nn.Conv2d(16, 32, 3, 2, 1, groups=4, bias=False).double()
    rows = halved(model, "model.3.conv").keep["model.3.conv.weight"][0]
    assert rows == tuple(range(1, 32, 2))
    inputs = halved(model, "model.2.cv2.conv").keep["model.3.conv.weight"][1]
    assert inputs == (1, 3)


def test_a_model_without_convolutions_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no convolution; there is nothing to prune"):
        trace(nn.Sequential(nn.ReLU()))


class Peeks(Added):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        return x if float(x.sum()) > 0 else -x


def test_a_block_that_looks_at_values_is_named() -> None:
    reasons = {g.protected for g in trace(with_added(Peeks), imgsz=64).groups}
    assert any(reason and reason.startswith("'model.3' (Peeks) cannot be traced: ") for reason in reasons)


def test_a_block_has_one_rule() -> None:
    with pytest.raises(ValueError, match="C2f already has a rule"):
        register_block(C2f)(lambda block, facts: None)
    with pytest.raises(ValueError, match="Conv already has a rule"):
        read_as_is(Conv)


def test_a_class_beside_one_that_has_a_rule_gets_none() -> None:
    with pytest.raises(ValueError, match="C2f already has a rule"):
        read_as_is(Shuffled, C2f)
    assert Shuffled not in RULES


def test_a_class_of_models_has_one_further_forward_pass_and_an_operation_one_effect() -> None:
    taken = next(iter(probes.PROBES))
    with pytest.raises(ValueError, match=f"{taken.__name__} already has a further forward pass"):
        probes.register_probe(taken)(probes.plain)
    with pytest.raises(ValueError, match="'mm' already has an effect"):
        effect("mm")(lambda call: None)


def test_whole_heads_can_go_instead_of_thinner_ones() -> None:
    name = "yolo11n"
    graph = trace(models.shared(name), imgsz=64, heads="heads")
    path = "model.10.m.0.attn"
    group = next(g for g in graph.groups if f"{path}.qkv.conv" in g.layers)
    attention: Any = models.shared(name).model[10].m[0].attn
    heads = next(s for s in group.sets if f"{path}.qkv.conv" in s.layers)
    assert heads.size == attention.num_heads
    plan = halved(models.shared(name), f"{path}.qkv.conv", "heads")
    assert plan.attributes[path] == {"num_heads": attention.num_heads // 2}
    half = 2 * attention.key_dim + attention.head_dim
    assert plan.keep[f"{path}.qkv.conv.weight"][0] == tuple(range(half, 2 * half))


def test_limits_on_widths_do_not_count_heads() -> None:
    """A set of four heads is not a layer of four channels."""
    graph = trace(zoo.build("yolo12"), imgsz=64, heads="heads")
    group = next(g for g in graph.groups if "model.8.m.0.0.attn.qkv.conv" in g.layers)
    assert [(s.size, s.whole) for s in group.sets] == [(4, True)]
    assert select.levels(group, select.Constraints(8, 8, 0.75), graph.widths) == [4, 3, 2, 1]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            lambda block, facts: facts.attribute("cc", facts.outputs("inner")),
            r"attribute 'cc', but 'model\.3\.cc' is not of type int",
        ),
        (lambda block, facts: facts.outputs("qq"), r"rule for Shuffled fails on 'model\.3': AttributeError"),
        (lambda block, facts: facts.parts("inner", 1, 2), r"the rule for Shuffled expects 1 \+ 2"),
    ],
)
def test_a_rule_with_a_mistake_is_named(rule: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "RULES", RULES.copy())
    register_block(Shuffled)(rule)
    with pytest.raises(UnsupportedModelError, match=message):
        trace(with_added(Shuffled), imgsz=64)
