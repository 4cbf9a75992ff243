# SPDX-License-Identifier: AGPL-3.0-or-later
"""Sparse weights: which become zero, how the others are refitted, and that they stay zero."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import models
import pytest
import small_data
import torch
import torch.nn.functional as F
from small_runs import FINE, RUNS
from torch import Tensor, nn
from torch.nn.utils import prune
from ultralytics import YOLO
from ultralytics.engine.validator import BaseValidator
from ultralytics.nn.modules.block import RepVGGDW
from ultralytics.nn.modules.conv import RepConv

import yolo_prune
from yolo_prune import cli, recover
from yolo_prune.cut import masks, surgery
from yolo_prune.cut.census import census
from yolo_prune.cut.masks import Mask, Masked
from yolo_prune.cut.plan import Plan
from yolo_prune.cut.record import Record, composed_plan, read_record, write_record
from yolo_prune.env.releases import load_checkpoint
from yolo_prune.errors import NothingToRemoveError, PlanError, PruneError, RecipeError, RunError, TargetError
from yolo_prune.planning import planner
from yolo_prune.recipe import load_recipe
from yolo_prune.recover.refit import solve, solve_masked
from yolo_prune.report import Report
from yolo_prune.report.front import Front
from yolo_prune.zeros import planner as zeros
from yolo_prune.zeros import scores
from yolo_prune.zeros.layers import find
from yolo_prune.zeros.patterns import NOfM, Pattern

RUN = RUNS["zeros"]


def layers_of(model: nn.Module) -> dict[str, Any]:
    """The layers that a user counts zeros in."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) and ".dfl" not in n}


def share(model: nn.Module) -> float:
    """The share of zeros, counted by torch alone."""
    weights = [layer.weight for layer in layers_of(model).values()]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def plan_of(model: nn.Module, **sparsity: Any) -> Plan:
    recipe = load_recipe({"sparsity": sparsity})
    assert recipe.sparsity
    present = planner.standing(model, planner.survey(model, recipe, models.IMGSZ))
    return zeros.plan_for(model, recipe, recipe.sparsity.fixed, present)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return models.build("yolo26-tiny")


def test_global_zeros_are_those_of_torch(model: nn.Module) -> None:
    theirs = deepcopy(model)
    layers = layers_of(theirs)
    prune.global_unstructured([(m, "weight") for m in layers.values()], prune.L1Unstructured, amount=0.3)
    plan = plan_of(model, amount=0.3)
    assert {n for n, m in layers.items() if not m.weight_mask.all()} == {n.removesuffix(".weight") for n in plan.masks}
    for name, mask in plan.masks.items():
        assert torch.equal(mask.kept, layers[name.removesuffix(".weight")].weight_mask.bool()), name


def test_zeros_per_layer_are_those_of_torch(model: nn.Module) -> None:
    theirs = deepcopy(model)
    plan = plan_of(model, amount=0.3, scope="layer")
    for name, layer in layers_of(theirs).items():
        prune.l1_unstructured(layer, "weight", amount=0.3)
        assert torch.equal(plan.masks[f"{name}.weight"].kept, layer.weight_mask.bool()), name


def test_n_of_m_runs_along_the_inputs_at_each_kernel_position() -> None:
    weight = torch.randn(8, 16, 3, 3)
    kept = NOfM(2, 4).compute_mask(weight.abs(), torch.ones_like(weight)).bool()
    for out in range(8):
        for y in range(3):
            for x in range(3):
                for first in range(0, 16, 4):
                    four, left = weight[out, first : first + 4, y, x].abs(), kept[out, first : first + 4, y, x]
                    assert left.sum() == 2
                    assert four[left].min() >= four[~left].max()
    earlier = torch.ones_like(weight)
    earlier[:, ::4] = 0
    both = NOfM(2, 4).compute_mask(weight.abs(), earlier)
    assert both.sum() == weight.numel() / 2  # what was zero before counts
    assert not both[:, ::4].any()


def test_two_of_four_goes_where_sparse_tensor_cores_can_use_it(model: nn.Module) -> None:
    plan = plan_of(model, pattern="2:4")
    reasons = {layer: part.reason for part in plan.protected for layer in part.layers}
    for name, layer in layers_of(model).items():
        fits = layer.groups == 1 and not layer.weight.shape[1] % 16 and not layer.weight.shape[0] % 8
        assert fits == (f"{name}.weight" in plan.masks), name
        if not fits:
            assert "2:4 needs" in reasons[name]
            continue
        kept = plan.masks[f"{name}.weight"].kept.movedim(1, -1).reshape(-1, 4)
        assert (kept.sum(1) == 2).all()


def test_a_round_before_the_last_has_a_part_of_the_zeros_of_the_pattern(model: nn.Module) -> None:
    recipe = load_recipe({"sparsity": {"pattern": "1:4"}})
    present = planner.standing(model, planner.survey(model, recipe, models.IMGSZ))
    early, last = (zeros.plan_for(model, recipe, amount, present) for amount in (0.3, 0.75))
    assert early.predicted.kept("weights") == pytest.approx(0.7, abs=1e-3)
    assert last.predicted.kept("weights") == 0.25
    assert all(not (last.masks[n].kept & ~mask.kept).any() for n, mask in early.masks.items())


def test_some_layers_have_amounts_of_their_own_or_no_zeros(model: nn.Module) -> None:
    recipe = {"sparsity": {"amount": 0.5, "layers": {"model.1": {"amount": 0.25}}}, "protect": ["model.0"]}
    plan = yolo_prune.plan(model, recipe, imgsz=models.IMGSZ)
    mask = plan.masks["model.1.conv.weight"]
    assert mask.zeros == round(0.25 * mask.size)
    assert "model.0.conv.weight" not in plan.masks
    assert [p.layers for p in plan.protected if p.reason == "no zeros: protect"] == [("model.0.conv",)]
    others = [m for n, m in plan.masks.items() if n != "model.1.conv.weight"]
    counted = plan.predicted.weights - mask.size
    assert sum(m.zeros for m in others) == round(0.5 * counted)


class Block(nn.Module):
    """Two layers with known inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).movedim(1, -1))  # type: ignore[no-any-return]


def patches(block: Block, images: Tensor) -> dict[str, Tensor]:
    """The inputs of each weight, `{layer: (groups, columns, samples)}`, by torch's own unfold."""
    unfolded = F.unfold(images, 3, padding=1, stride=2)
    between = block.conv(images).detach()
    return {
        "conv": unfolded.movedim(1, 0).flatten(1).reshape(2, 18, -1).double(),
        "linear": between.movedim(1, 0).flatten(1)[None].double(),
    }


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("score", ["wanda", "obs"])
def test_scores_that_look_at_inputs_by_hand(score: str, relative: bool) -> None:
    torch.manual_seed(0)
    block, images = Block(), torch.randn(5, 4, 8, 8)
    found = find(block, Pattern(), (), (), True)
    got = scores.from_inputs(block, found.layers, images, score, relative)
    for name, inputs in patches(block, images).items():
        layer: Any = getattr(block, name)
        weight = layer.weight.detach().double().reshape(len(inputs), -1, inputs.shape[1])
        wanted = torch.empty_like(weight)
        for group, x in enumerate(inputs):
            moment = x @ x.T / x.shape[1]
            moment += (scores.DAMPING * moment.diagonal().mean() + scores.TINY) * torch.eye(len(x))
            unit = x.square().mean(1) if score == "wanda" else 1 / torch.linalg.inv(moment).diagonal()
            wanted[group] = weight[group].square() * unit
        if relative:
            wanted /= sum((w @ x).var(1).sum() for w, x in zip(weight, inputs, strict=True))
        torch.testing.assert_close(got[f"{name}.weight"].reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-9)


def test_the_masked_refit_is_that_of_each_row_alone() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(40, 500, dtype=torch.float64)
    inputs[20:] += inputs[:20]  # correlated
    moment, cross = inputs @ inputs.T / 500, torch.randn(7, 40, dtype=torch.float64)
    kept = torch.rand(7, 40) > 0.6
    kept[3] = False
    got = solve_masked(moment, cross, kept)
    for row, mask in enumerate(kept):
        wanted = torch.zeros(40, dtype=torch.float64)
        wanted[mask] = torch.linalg.solve(moment[mask][:, mask], cross[row, mask])
        torch.testing.assert_close(got[row], wanted, rtol=1e-4, atol=1e-6)


def test_all_weights_kept_is_the_refit_without_a_mask() -> None:
    torch.manual_seed(0)
    read, old = torch.randn(2, 9, 300), torch.randn(6, 9)
    wanted = torch.randn(6, 300)
    for a, b in zip(solve(read, wanted, old), solve(read, wanted, old, kept=torch.ones(6, 9) > 0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_refit_holds_the_zeros_and_brings_the_outputs_back() -> None:
    torch.manual_seed(0)
    model, images = models.build("yolo26-tiny").float().eval(), torch.rand(4, 3, models.IMGSZ, models.IMGSZ)
    recover.recalibrate(model, [images])
    plan = plan_of(model.eval(), amount=0.6)
    cut, fitted = deepcopy(model), deepcopy(model)
    for copy in (cut, fitted):
        surgery.apply(copy, plan)
    recover.refit(model, fitted, plan, images)
    assert Masked(fitted, plan.masks).holds()
    outputs: dict[str, Tensor] = {}
    for name, copy in {"dense": model, "cut": cut, "fitted": fitted}.items():
        copy.eval().model[3].register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out}))
        copy(images)
    gap = {name: float((outputs[name] - outputs["dense"]).square().mean()) for name in ("cut", "fitted")}
    assert gap["fitted"] < 0.5 * gap["cut"]


@pytest.mark.parametrize("block", [RepConv(16, 16, act=False), RepVGGDW(16)], ids=["RepConv", "RepVGGDW"])
def test_kernels_that_an_export_merges_have_their_zeros_in_common(block: Any) -> None:
    model = nn.Sequential(block)
    (layer,) = find(model, Pattern(), (), (), False).layers
    kept = scores.magnitude(layer) > scores.magnitude(layer).flatten().median()
    assert layer.merged
    masks.hold(model, {layer.tensor: Mask.of(kept), f"{layer.merged[0]}.weight": Mask.of(layer.centre(kept))})
    fused = deepcopy(block).eval()
    (fused.fuse_convs if isinstance(block, RepConv) else fused.fuse)()
    assert torch.equal(fused.conv.weight != 0, kept)


def test_a_plan_with_zeros_is_read_back(model: nn.Module, tmp_path: Path) -> None:
    plan = plan_of(model, amount=0.3)
    assert plan.to_dict()["version"] == 2
    back = Plan.load(plan.save(tmp_path / "plan.json"))
    assert (back, back.hash) == (plan, plan.hash)
    assert plan_of(model, amount=0.31).hash != plan.hash
    assert "weights are zero" in str(plan)
    damaged = plan.to_dict()
    next(iter(damaged["masks"].values()))["kept"] = "AAAA"
    with pytest.raises(PlanError, match="cannot have 3 bytes"):
        Plan.from_dict(damaged)


def test_a_cut_and_zeros_in_what_is_left_make_one_plan(model: nn.Module) -> None:
    both = yolo_prune.plan(
        model, {**FINE, "target": {"flops": 0.6}, "sparsity": {"amount": 0.5}, "criterion": "magnitude"}, imgsz=64
    )
    at_once, step_by_step = deepcopy(model), deepcopy(model)
    surgery.apply(at_once, both)
    assert share(at_once) == pytest.approx(0.5, abs=1e-3)
    first = Plan(both.keep, both.attributes, both.shapes, scale=both.scale)
    surgery.apply(step_by_step, first)
    second = Plan({}, {}, {}, masks=both.masks)
    surgery.apply(step_by_step, second)
    assert first.then(second).hash == both.hash
    for a, b in zip(at_once.state_dict().values(), step_by_step.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert both.predicted.flops_kept <= 0.6
    later = planner.make_plan(at_once, load_recipe({**FINE, "target": {"flops": 0.4}, "criterion": "magnitude"}), 64)
    assert {n: m.shape for n, m in both.then(later).masks.items()}.items() <= {
        n: tuple(later.shape_after(n) if n in later.keep else t.shape) for n, t in at_once.state_dict().items()
    }.items()


def test_one_shot_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_data.short_checkpoint(tmp_path)
    out = tmp_path / "zeros.pt"
    assert cli.main(["apply", f"model={tmp_path}/dense.pt", "recipe.sparsity.amount=0.75", f"save={out}"]) == 0
    cut = load_checkpoint(out)[0]
    assert share(cut) == pytest.approx(0.75, abs=1e-3)
    dense = load_checkpoint(tmp_path / "dense.pt")[0]
    assert {n: t.shape for n, t in cut.state_dict().items()} == {n: t.shape for n, t in dense.state_dict().items()}
    assert yolo_prune.is_pruned(cut)
    capsys.readouterr()
    assert cli.main(["show", f"model={out}"]) == 0
    assert "zeros" in capsys.readouterr().out
    assert cli.main(["apply", f"model={out}", "recipe.sparsity.amount=0.5", f"save={tmp_path}/more.pt"]) == 1
    assert "0.750 of the weights are zero already" in capsys.readouterr().err


def test_a_record_forgets_zeros_that_stock_ultralytics_trained_away(model: nn.Module) -> None:
    plan = plan_of(model, amount=0.3)
    copy = deepcopy(model)
    surgery.apply(copy, plan)
    write_record(copy, Record({}, plan, planner.widths(copy), ()))
    assert composed_plan(copy) == plan
    with torch.no_grad():
        next(iter(layers_of(copy).values())).weight.add_(1)
    assert read_record(copy) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data.tiny(tmp_path_factory.mktemp("zeros"), train=8)


def train(folder: Path, model: Path | str, name: str, **arguments: Any) -> Path:
    settings = {**RUN, "data": str(folder / "scenes/scenes.yaml"), "project": str(folder), "name": name}
    YOLO(model).train(**{"epochs": 2, "exist_ok": True, **settings, **arguments})
    return folder / name / "weights/best.pt"


def pruned(folder: Path, name: str, recipe: Mapping[str, Any], **arguments: Any) -> nn.Module:
    best = train(folder, folder / "dense.pt", name, callbacks="prune", recipe=recipe, **arguments)
    return load_checkpoint(best)[0]


@pytest.fixture(scope="module")
def sparse(folder: Path) -> Path:
    recipe = {"sparsity": {"amount": 0.75}, "schedule": {"rounds": 2, "interval": 1}, "recover": {"refit": 2}}
    return train(folder, folder / "dense.pt", "sparse", callbacks="prune", recipe=recipe)


def test_zeros_grow_over_the_rounds_and_stay(folder: Path, sparse: Path) -> None:
    for name in ("best.pt", "last.pt"):
        assert share(load_checkpoint(sparse.with_name(name))[0]) == pytest.approx(0.75, abs=1e-3)
    first = share(load_checkpoint(sparse.with_name("round1.pt"))[0])
    assert first == pytest.approx(0.75 * (1 - 0.5**3), abs=1e-3)  # cubic
    model = load_checkpoint(sparse)[0]
    again = train(folder, sparse, "again", epochs=1)
    later = load_checkpoint(again)[0]
    assert share(later) == share(model)
    assert composed_plan(later) == composed_plan(model)
    assert not torch.equal(later.state_dict()["model.1.conv.weight"], model.state_dict()["model.1.conv.weight"])


def test_zeros_survive_other_weights_a_new_dataset_and_another_round(folder: Path, sparse: Path) -> None:
    model = YOLO(sparse)
    model.load(folder / "dense.pt")
    assert share(model.model) == pytest.approx(0.75, abs=1e-3)
    with pytest.raises(RunError, match="The weights to load have zeros, which this model would not keep"):
        YOLO(folder / "dense.pt").load(sparse)
    text = (folder / "scenes/scenes.yaml").read_text()
    more = folder / "scenes/more.yaml"
    more.write_text(text.replace("  4: cross", "  4: cross\n  5: cube"))
    best = train(folder, sparse, "classes", epochs=1, data=str(more))
    found = load_checkpoint(best)[0]
    assert found.model[-1].nc == 6
    assert composed_plan(found)
    assert share(found) == pytest.approx(0.75, abs=5e-3)  # the new rows have none
    recipe = {**FINE, "target": {"flops": 0.6}, "criterion": "magnitude", "recover": {"refit": 2}}
    best = train(folder, sparse, "cut", epochs=1, callbacks="prune", recipe=recipe)
    cut = load_checkpoint(best)[0]
    plan = composed_plan(cut)
    assert plan
    assert Masked(cut, plan.masks).holds()
    assert share(cut) > 0.3


def test_lottery_tickets_are_rewound_and_masked(folder: Path) -> None:
    early: dict[str, Tensor] = {}
    rewound: dict[str, Tensor] = {}

    def keep(trainer: Any) -> None:
        if trainer.epoch == 1:
            early.update({k: v.clone() for k, v in trainer.model.state_dict().items()})

    def after(trainer: Any) -> None:
        if trainer.epoch == 2 and not rewound:
            rewound.update({k: v.clone() for k, v in trainer.model.state_dict().items()})

    recipe = {
        "sparsity": {"amount": 0.5},
        "schedule": {"rounds": 1, "start": 2},
        "recover": {"rewind": {"epoch": 1}},
        "measure": False,
    }
    model = YOLO(folder / "dense.pt")
    model.add_callback("on_train_epoch_start", keep)
    model.add_callback("on_train_batch_start", after)
    settings = {**RUN, "data": str(folder / "scenes/scenes.yaml"), "project": str(folder), "name": "ticket"}
    model.train(epochs=3, exist_ok=True, callbacks="prune", recipe=recipe, **settings)
    plan = composed_plan(load_checkpoint(folder / "ticket/weights/last.pt")[0])
    assert plan
    for name, mask in plan.masks.items():
        assert torch.equal(rewound[name], early[name] * mask.kept), name


def test_a_weight_that_is_not_zero_any_more_is_an_error(folder: Path) -> None:
    def spoil(trainer: Any) -> None:
        for parameter in trainer.ema.ema.parameters():
            parameter.data.add_(1)

    model = YOLO(folder / "dense.pt")
    model.add_callback("on_train_epoch_end", spoil)
    settings = {**RUN, "data": str(folder / "scenes/scenes.yaml"), "project": str(folder), "name": "spoilt"}
    recipe = {"sparsity": {"amount": 0.5}, "schedule": {"rounds": 1}, "measure": False}
    recipe["recover"] = {"refit": 0, "batchnorm": 0}
    with pytest.raises(RunError, match="is not zero any more"):
        model.train(epochs=1, exist_ok=True, callbacks="prune", recipe=recipe, **settings)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({}, "target: is missing.*sparsity"),
        ({"sparsity": {}}, "amount is missing"),
        ({"sparsity": {"amount": 1.5}}, "sparsity.amount: must be"),
        ({"sparsity": {"pattern": "4:2"}}, "N below M"),
        ({"sparsity": {"pattern": "two of four"}}, "must be unstructured, or N:M"),
        ({"sparsity": {"pattern": "2:4", "amount": 0.7}}, "means 0.5; leave amount out"),
        ({"sparsity": {"amount": 0.5, "images": 4}}, "looks at no images"),
        ({"sparsity": {"amount": 0.5, "score": "wands"}}, "did you mean 'wanda'"),
        ({"sparsity": {"amount": 0.5, "seed": 1}}, "is not random"),
        ({"sparsity": {"pattern": "2:4", "layers": {"model.0": {"amount": 0.5}}}}, "one amount for all layers"),
        ({"sparsity": {"amount": 0.5}, "target": {"max_drop": 0.01}}, "in a second run"),
    ],
)
def test_recipes_that_cannot_be(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe)


def test_a_pattern_that_yaml_reads_as_a_number_is_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("sparsity: {pattern: 2:4}\n")
    assert load_recipe(tmp_path / "mine.yaml").keep == 0.5
    assert load_recipe(None, {"sparsity.pattern": "2:4"}).sparsity.pattern == "2:4"  # type: ignore[union-attr]


def test_zeros_alone_have_no_default_recipe() -> None:
    assert load_recipe(None, {"sparsity.amount": 0.5}).target is None
    assert load_recipe(None, {"sparsity.amount": 0.5, "target.flops": 0.5}).target is not None
    assert load_recipe("half-flops", {"sparsity.amount": 0.5}).target is not None
    assert planner.images_for(load_recipe(None, {"sparsity.amount": 0.5})) == 0


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        ({"sparsity": {"amount": 0.5}, "protect": ["model.*"]}, TargetError, "no layer of this model can have"),
        ({"sparsity": {"amount": 0.5, "layers": {"modle.0": {"amount": 0.1}}}}, RecipeError, "matches no module"),
        ({"sparsity": {"amount": 0.5, "layers": {"model.0.bn": {"amount": 0.1}}}}, RecipeError, "matches no layer"),
    ],
)
def test_recipes_that_do_not_fit_the_model(
    model: nn.Module, recipe: dict[str, Any], error: type[PruneError], message: str
) -> None:
    with pytest.raises(error, match=message):
        yolo_prune.plan(model, recipe, imgsz=64)


def test_a_model_with_as_many_zeros_has_nothing_to_remove(model: nn.Module) -> None:
    copy = deepcopy(model)
    plan = plan_of(copy, amount=0.5)
    surgery.apply(copy, plan)
    write_record(copy, Record({}, plan, planner.widths(copy), ()))
    with pytest.raises(NothingToRemoveError, match=r"0.500 of the weights are zero already"):
        plan_of(copy, amount=0.4)
    more = plan_of(copy, amount=0.6)
    assert all(not (more.masks[n].kept & ~mask.kept).any() for n, mask in plan.masks.items())


def test_an_export_keeps_the_zeros(folder: Path, sparse: Path) -> None:
    import onnx
    from onnx import numpy_helper

    counted = census(load_checkpoint(sparse)[0])
    graph = onnx.load(YOLO(sparse).export(format="onnx", imgsz=32, opset=17, verbose=False)).graph
    weights = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    kernels = [weights[node.input[1]] for node in graph.node if node.op_type == "Conv" and node.input[1] in weights]
    sizes = sorted(k.size for k in kernels if k.size > 16)  # not the fixed layer of DFL
    assert sum(sizes) == counted.weights  # every layer, with its batch norm folded into it
    assert 0 <= sum(int((k == 0).sum()) for k in kernels) - counted.zeros <= 3  # a product may underflow


@pytest.mark.parametrize("quantize", [32, 16, 8])
def test_an_openvino_export_keeps_the_zeros(folder: Path, sparse: Path, tmp_path: Path, quantize: int) -> None:
    openvino = pytest.importorskip("openvino", reason="needs openvino: pip install openvino nncf")
    if quantize == 8:
        pytest.importorskip("nncf", reason="needs nncf: pip install openvino nncf")
    counted, model = census(load_checkpoint(sparse)[0]), YOLO(shutil.copy(sparse, tmp_path / "sparse.pt"))
    data = str(folder / "scenes/scenes.yaml")
    made = model.export(format="openvino", imgsz=32, quantize=quantize, data=data, fraction=1.0, verbose=False)
    kernels = []
    for node in openvino.Core().read_model(next(Path(made).glob("*.xml"))).get_ordered_ops():
        if node.get_type_name() in ("Convolution", "GroupConvolution"):
            source = node.input_value(1).get_node()
            while source.get_type_name() != "Constant":  # in half precision and in int8, it is converted first
                source = source.input_value(0).get_node()
            kernels.append(source.get_data())
    kernels = [k for k in kernels if k.size > 16]  # not the fixed layer of DFL
    assert {k.dtype.name for k in kernels} == {{32: "float32", 16: "float16", 8: "int8"}[quantize]}
    assert sum(k.size for k in kernels) == counted.weights
    zeros_kept = sum(int((k == 0).sum()) for k in kernels)
    assert zeros_kept >= counted.zeros  # small weights become zero, too
    assert zeros_kept <= counted.zeros + (3 if quantize > 8 else 0.05 * counted.weights)


@pytest.fixture
def fitness_falls_with_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fitness is the share of weights that are not zero, so a limit of 0.3 means at most 30 % zeros."""

    def validate(self: Any, trainer: Any = None, model: Any = None) -> Any:
        found = stock(self, trainer, model)
        return {**found, "fitness": 1 - share(trainer.ema.ema)} if trainer and found else found

    stock = BaseValidator.__call__
    monkeypatch.setattr(BaseValidator, "__call__", validate)


@pytest.mark.usefixtures("fitness_falls_with_zeros")
def test_a_round_with_too_many_zeros_is_undone(folder: Path) -> None:
    recipe = {
        "sparsity": {"amount": 0.8},
        "schedule": {"rounds": 3, "interval": 1, "curve": "linear"},
        "guard": {"max_drop": 0.3},
        "recover": {"refit": 2},
    }
    model = pruned(folder, "guarded", recipe, epochs=4)
    report = Report.load(folder / "guarded")
    assert [row.held for row in report.rounds] == [True, False, False]
    assert share(model) == pytest.approx(0.8 / 3, abs=1e-3)
    front = Front.load(folder / "guarded")
    assert front
    assert [round(p.weights_kept, 3) for p in front.points] == [1, 0.733, 0.467, 0.6]  # type: ignore[arg-type]


def test_the_report_and_the_page_show_the_zeros(sparse: Path) -> None:
    report = Report.load(sparse.parents[1])
    counted = census(load_checkpoint(sparse)[0])
    assert report.pruned.zeros == counted.share
    assert [round(row.zeros or 0, 2) for row in report.rounds] == [0.66, 0.75]
    assert report.rounds[-1].target == {"weights": 0.25}
    assert {row.name: row.zeros for row in report.layers if row.zeros} == pytest.approx(
        {name: part for name, part in counted.layers.items() if part}
    )
    page = (sparse.parents[1] / "report.html").read_text()
    assert "Zero weights" in page
    assert report.pruned.zipped_mb is not None
    assert report.pruned.size_mb is not None
    assert report.pruned.zipped_mb < 0.6 * report.pruned.size_mb


def facts_of(folder: Path, name: str) -> list[Any]:
    record = read_record(load_checkpoint(folder / name / "weights/best.pt")[0])
    assert record
    return list(record.rounds)


BOTH: dict[str, Any] = {
    **FINE,
    "target": {"flops": 0.6},
    "sparsity": {"amount": 0.6},
    "criterion": "magnitude",
    "recover": {"refit": 2},
}


def test_a_run_with_cuts_and_zeros_records_both_sizes(folder: Path) -> None:
    recipe = {**BOTH, "schedule": {"rounds": 2, "interval": 1}}
    model = pruned(folder, "both", recipe, epochs=3)
    report = Report.load(folder / "both")
    for row, facts in zip(report.rounds, facts_of(folder, "both"), strict=True):
        assert report.dense.flops
        assert row.flops
        assert facts.keep == pytest.approx(row.flops / report.dense.flops)
        assert facts.keep <= row.target["flops"]
    assert [row.zeros for row in report.rounds] == pytest.approx([0.6 * (1 - 0.5**3), 0.6], abs=2e-3)
    assert share(model) == pytest.approx(0.6, abs=2e-3)
    plan = composed_plan(model)
    assert plan
    assert plan.predicted.dense_flops == report.dense.flops
    assert {reason for reason in (p.reason for p in plan.protected)} >= {p.reason for p in report.protected}


@pytest.mark.usefixtures("fitness_falls_with_zeros")
def test_a_guard_halves_the_step_of_a_run_with_cuts_and_zeros(folder: Path) -> None:
    recipe = {
        **BOTH,
        "schedule": {"rounds": 3, "interval": 1, "curve": "linear"},
        "guard": {"max_drop": 0.35},
    }
    model = pruned(folder, "both-guarded", recipe, epochs=4)
    rounds = Report.load(folder / "both-guarded").rounds
    assert [r.held for r in rounds] == [True, False, True]
    assert [round(r.target["flops"], 3) for r in rounds] == [0.867, 0.733, 0.8]
    assert share(model) == pytest.approx(0.3, abs=5e-3)


def test_amounts_of_some_layers_are_reached_in_several_rounds(folder: Path) -> None:
    recipe = {
        "sparsity": {"amount": 0.3, "layers": {"model.4": {"amount": 0.9}, "model.6": {"amount": 0.9}}},
        "schedule": {"rounds": 2, "interval": 1},
        "recover": {"refit": 2},
    }
    model = pruned(folder, "layers", recipe, epochs=3)
    layers = census(model).layers
    assert layers["model.4.conv"] == pytest.approx(0.9, abs=1e-3)
    assert layers["model.6.cv1.conv"] == pytest.approx(0.9, abs=1e-3)
    assert [facts.keep for facts in facts_of(folder, "layers")] == pytest.approx([1 - 0.3 * 0.875, 0.7])


def test_zeros_are_made_where_no_channel_is_left_to_remove(folder: Path) -> None:
    recipe = {**BOTH, "channels": {"round_to": 32, "min": 2}, "schedule": {"rounds": 4, "interval": 1}}
    model = pruned(folder, "coarse", recipe, epochs=5)
    assert share(model) == pytest.approx(0.6, abs=3e-3)


def test_two_of_four_comes_with_the_last_cut_and_holds_everywhere(folder: Path) -> None:
    recipe = {**BOTH, "sparsity": {"pattern": "1:2"}, "channels": {"min": 2}, "schedule": {"rounds": 2, "interval": 1}}
    model = pruned(folder, "pattern", recipe, epochs=3)
    plan = composed_plan(model)
    assert plan
    assert plan.masks
    for mask in plan.masks.values():
        assert (mask.kept.movedim(1, -1).reshape(-1, 2).sum(1) == 1).all()
    assert load_recipe(None, {"sparsity.pattern": "2:4", "target.flops": 0.5}).sparsity.multiple == 16  # type: ignore[union-attr]


def test_a_pattern_for_a_model_with_other_zeros(model: nn.Module) -> None:
    copy = deepcopy(model)
    plan = plan_of(copy, amount=0.7)
    surgery.apply(copy, plan)
    write_record(copy, Record({}, plan, planner.widths(copy), ()))
    both = plan.then(plan_of(copy, pattern="2:4"))
    fits = [n for n, m in both.masks.items() if not m.shape[1] % 16 and not m.shape[0] % 8]
    assert fits
    for name in fits:
        assert (both.masks[name].kept.movedim(1, -1).reshape(-1, 4).sum(1) <= 2).all()


def test_layers_that_do_not_run_keep_their_weights() -> None:
    torch.manual_seed(0)

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)
            self.attention = nn.MultiheadAttention(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x.flatten(2).movedim(2, 0))
            return self.attention(x, x, x)[0]  # type: ignore[no-any-return]

    block, images = Attends(), torch.randn(2, 16, 4, 4)
    found = find(block, Pattern(), (), (), True)
    assert set(scores.from_inputs(block, found.layers, images, "wanda", True)) == {"linear.weight"}


def test_weights_that_are_changed_before_the_first_step_are_noticed(folder: Path, sparse: Path) -> None:
    def spoil(trainer: Any) -> None:
        for parameter in trainer.model.parameters():
            parameter.data.add_(1)

    model = YOLO(sparse)
    model.add_callback("on_train_start", spoil)
    before = share(model.model)
    settings = {**RUN, "data": str(folder / "scenes/scenes.yaml"), "project": str(folder), "name": "start"}
    model.train(epochs=1, exist_ok=True, **settings)
    assert share(load_checkpoint(folder / "start/weights/last.pt")[0]) == before  # zero again after the first step


def test_lost_zeros_are_told(folder: Path, sparse: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = YOLO(sparse)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(0.01)
    settings = {**RUN, "data": str(folder / "scenes/scenes.yaml"), "project": str(folder), "name": "lost"}
    with caplog.at_level("WARNING", logger="ultralytics"):
        model.train(epochs=1, exist_ok=True, **settings)
    assert "zeros of this model are not zero any more" in caplog.text
    assert read_record(load_checkpoint(folder / "lost/weights/last.pt")[0]) is None


def test_gradients_of_zeros_do_not_count() -> None:
    layer = nn.Linear(2, 1, bias=False)
    masked = Masked(layer, {"weight": Mask.of(torch.tensor([[True, False]]))})
    layer(torch.tensor([[3.0, 4.0]])).sum().backward()
    masked.hold_gradients()
    assert layer.weight.grad is not None
    assert layer.weight.grad.norm() == 3


def test_a_plan_cannot_mask_what_is_no_weight(model: nn.Module) -> None:
    name = next(n for n, t in model.state_dict().items() if n.endswith("running_var"))
    mask = Mask.of(torch.zeros(model.state_dict()[name].shape))
    with pytest.raises(PlanError, match="was made for another model"):
        surgery.apply(deepcopy(model), Plan({}, {}, {}, masks={name: mask}))
    data = plan_of(model, amount=0.5).to_dict()
    data["forecast"]["zeros_after"] = data["forecast"]["weights"] + 1
    with pytest.raises(PlanError, match="more zeros than weights"):
        Plan.from_dict(data)
