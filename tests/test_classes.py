# SPDX-License-Identifier: AGPL-3.0-or-later
"""Classes that are not needed: what is removed from a model, and how datasets are read for it afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
import zoo
from small_runs import FINE
from torch import Tensor, nn

import yolo_prune
from yolo_prune.cut import proof
from yolo_prune.cut.plan import Plan
from yolo_prune.cut.record import read_record
from yolo_prune.errors import PlanError, PruneError, RecipeError, UnsupportedModelError
from yolo_prune.planning import planner
from yolo_prune.recipe import load_recipe

NAMES = ("person", "bicycle", "car", "dog", "traffic light")
KEPT = [0, 2]
TWO: dict[str, Any] = {"structure": {"keep_classes": ["person", "car"]}}
THIN = 0.125  # width multiple


def build(name: str, nc: int = len(NAMES), seed: int = 0) -> Any:
    """A thin random model with the classes of `NAMES`, in float32."""
    torch.manual_seed(seed)
    model = zoo.model_class(name)({**zoo.configuration(name, THIN), "nc": nc}, nc=nc, verbose=False)
    model.names, model.nc, model.task = dict(enumerate(NAMES[:nc])), nc, zoo.task_of(name)
    if "yoloe" in name:
        model.model[-1].nc, model.pe = nc, nn.functional.normalize(torch.randn(1, nc, 512), dim=-1)
    return zoo.randomise(model.double(), seed).float().eval()


def two_of(model: Any, **fields: Any) -> Any:
    """A copy with two classes."""
    copy = deepcopy(model)
    yolo_prune.apply(copy, yolo_prune.plan(copy, {**TWO, **fields}, imgsz=64))
    return copy


def class_layers(model: nn.Module, count: int) -> dict[str, nn.Module]:
    """The convolutions and linear layers that put out one score for each class."""
    outs = {n: getattr(m, "out_channels", getattr(m, "out_features", 0)) for n, m in model.named_modules()}
    marks = ("cv3", "score_head", "linear", "semseg")
    return {n: model.get_submodule(n) for n, o in outs.items() if o == count and any(mark in n for mark in marks)}


@contextmanager
def row_by_row(layers: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Inside, each score is a sum of its own: a matrix product of another size may round in another way.

    Yields what these layers read.
    """
    seen: dict[str, Tensor] = {}

    def compute(name: str, layer: Any, args: tuple[Tensor, ...]) -> Tensor:
        x = seen[name] = args[0]
        channels = x if isinstance(layer, nn.Linear) else x.movedim(1, -1)
        rows = [(channels * w.flatten()).sum(-1) + b for w, b in zip(layer.weight, layer.bias, strict=True)]
        return torch.stack(rows, -1 if isinstance(layer, nn.Linear) else 1)

    hooks = [m.register_forward_hook(lambda m, args, _, n=name: compute(n, m, args)) for name, m in layers.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


TASKS = ("yolov8", "yolo11", "yolo26", "yolo26-seg", "yolo26-pose", "yolo11-obb", "yolov10n", "yolov9t", "yoloe-11")


@pytest.mark.parametrize("name", TASKS)
@torch.no_grad()
def test_the_scores_of_kept_classes_are_equal_to_the_bit(name: str) -> None:
    """All branches in training mode; boxes, masks, keypoints and angles as well."""
    dense = build(name)
    two, image = two_of(dense), zoo.images(dense, name, 1)
    outs = []
    for model, count in ((dense, 5), (two, 2)):
        layers = class_layers(model, count) if "yoloe" not in name else {}
        for module in model.modules():
            module.training = not isinstance(module, nn.BatchNorm2d)
        with row_by_row(layers):
            outs.append(zoo.outputs(model(image)))
    compared = 0
    for a, b in zip(*outs, strict=True):
        if a.shape != b.shape:
            a, compared = a[:, KEPT], compared + 1
        assert torch.equal(a, b) if "yoloe" not in name else torch.allclose(a, b, atol=1e-5)
    assert compared == (3 if "seg" in name else 2 if name.startswith(("yolo26", "yolov10")) else 1) + (
        name == "yolo26-seg"
    )
    assert two.names == {0: "person", 1: "car"}
    assert (two.nc, two.yaml["nc"], two.model[-1].nc) == (2, 2, 2)


@torch.no_grad()
def test_a_classifier_keeps_the_logits() -> None:
    dense = build("yolo11-cls")
    two, image = two_of(dense), zoo.images(dense, "yolo11-cls", 1)
    logits = []
    for model, count in ((dense, 5), (two, 2)):
        with row_by_row(class_layers(model, count)):
            logits.append(model(image)[1])
    assert torch.equal(logits[0][:, KEPT], logits[1])
    assert torch.allclose(two(image)[0], logits[0][:, KEPT].softmax(1), atol=1e-6)


@torch.no_grad()
def test_rtdetr_scores_each_location_and_each_query_as_before() -> None:
    """Fewer classes may select other queries, so the decoder gets the same ones here."""
    dense = build("yolov8-rtdetr")
    two, image = two_of(dense), zoo.images(dense, "yolov8-rtdetr", 1)
    read: list[dict[str, Tensor]] = []
    scores: list[Tensor] = []
    for model, count in ((dense, 5), (two, 2)):
        layers = class_layers(model, count)
        heads = {n: m for n, m in layers.items() if "enc_score_head" in n}
        assert len(heads) == 1
        assert len(layers) == 1 + len(model.model[-1].dec_score_head)
        with row_by_row(heads) as seen:
            features = model.model[-1]
            hook = features.enc_score_head.register_forward_hook(lambda *a: scores.append(a[2]))
            model(image)
            hook.remove()
        read.append(dict(seen))
    (a,), (b,) = (r.values() for r in read)
    assert torch.equal(a, b)
    assert torch.equal(scores[0][..., KEPT], scores[1])
    queries = torch.randn(1, 7, dense.model[-1].hidden_dim)
    outs = []
    for model, count in ((dense, 5), (two, 2)):
        head = model.model[-1]
        feats, shapes = head._get_encoder_input([torch.ones(1, c[0].in_channels, 4, 4) for c in head.input_proj])
        decoders = {n: m for n, m in class_layers(model, count).items() if "dec_score" in n}
        with row_by_row(decoders):
            outs.append(
                head.decoder(
                    queries, torch.zeros(1, 7, 4), feats, shapes, head.dec_bbox_head, head.dec_score_head,
                    head.query_pos_head,
                )
            )  # fmt: skip
    assert torch.equal(outs[0][0], outs[1][0])
    assert torch.equal(outs[0][1][..., KEPT], outs[1][1])
    assert two.model[-1].denoising_class_embed.num_embeddings == 2


@torch.no_grad()
def test_yolo_world_keeps_the_texts() -> None:
    """Its neck reads the texts, so it computes what it would after `set_classes` with the kept names."""
    dense = build("yolov8-worldv2")
    two, image = two_of(dense), zoo.images(dense, "yolov8-worldv2", 1)
    dense.txt_feats, dense.model[-1].nc = dense.txt_feats[:, KEPT], 2
    assert two.txt_feats.shape[1] == 2
    assert all(torch.equal(a, b) for a, b in zip(zoo.outputs(dense(image)), zoo.outputs(two(image)), strict=True))


@pytest.mark.parametrize("name", ["yolo26-seg", "yolov8-rtdetr", "yolo11-cls"])
def test_the_proof_compares_with_classes_that_are_never_predicted(name: str) -> None:
    model = build(name)
    plan = yolo_prune.plan(model, TWO, imgsz=64)
    found = proof.prove(model, plan)
    assert found.error < 1e-9
    assert found.effect > 1
    layer = next(n for n in plan.classes.tensors if n.endswith(".bias"))
    wrong = deepcopy(model)
    broken = proof.surgery.apply

    def damage(module: nn.Module, cut: Plan) -> Any:
        done = broken(module, cut)
        with torch.no_grad():
            module.get_parameter(layer).mul_(1.01)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof.surgery, "apply", damage)
        with pytest.raises(PruneError, match="does not compute what silencing"):
            proof.prove(wrong, plan)


def test_classes_come_before_channels_and_zeros_in_one_plan() -> None:
    model = build("yolo26")
    recipe = {**TWO, **FINE, "target": {"flops": 0.6}, "sparsity": {"amount": 0.3}, "criterion": "magnitude"}
    plan = yolo_prune.plan(model, recipe, imgsz=64)
    first = yolo_prune.plan(model, TWO, imgsz=64)
    assert plan.classes == first.classes
    assert plan.class_part == Plan(first.keep, first.attributes, first.shapes, classes=first.classes)
    assert plan.class_part.then(plan.since(plan.class_part)).hash == plan.hash
    assert plan.predicted.flops_before == plan.predicted.dense_flops == first.predicted.dense_flops
    assert plan.predicted.flops_kept <= 0.6
    assert plan.masks
    found = yolo_prune.apply(model, plan)
    assert found.error < 1e-9
    flops, params = planner.present_cost(model, 64)
    assert (flops, params) == (plan.predicted.flops_after, plan.predicted.params_after)
    dense = planner.dense_cost(model, read_record(model).plan, 64)
    assert dense == (first.predicted.dense_flops, first.predicted.dense_params)
    later = yolo_prune.plan(model, {"target": {"flops": 0.4}, **FINE, "criterion": "magnitude"}, imgsz=64)
    assert later.predicted.dense_flops == dense[0]


def test_more_classes_go_in_a_second_cut() -> None:
    model = build("yolo11")
    yolo_prune.apply(model, yolo_prune.plan(model, {"structure": {"drop_classes": [1, "DOG "]}}, imgsz=64))
    assert list(model.names.values()) == ["person", "car", "traffic light"]
    once = deepcopy(model)
    yolo_prune.apply(model, yolo_prune.plan(model, {"structure": {"keep_classes": "car"}}, imgsz=64))
    classes = read_record(model).plan.classes
    assert (classes.names, classes.kept, classes.kept_names) == (NAMES, (2,), ("car",))
    assert read_record(model).plan.since(read_record(once).plan).classes.names == ("person", "car", "traffic light")
    assert model(zoo.images(model, "yolo11", 1))[0].shape[1] == 5


def test_a_target_that_the_classes_alone_reach_removes_no_channel() -> None:
    model = build("yolo11-cls")
    plan = yolo_prune.plan(model, {**TWO, "target": {"params": 0.999}}, imgsz=64)
    assert plan.classes
    assert not plan.groups


def test_a_plan_with_classes_is_plain_data() -> None:
    plan = yolo_prune.plan(build("yolov8"), TWO, imgsz=64)
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["version"] == 3
    assert Plan.from_dict(data) == plan
    assert "classes: 2 of 5 kept: person, car" in plan.describe()
    assert plan
    for wrong in ({"kept": [2, 0]}, {"kept": []}, {"kept": [0, 7]}, {"kept": [0, 1]}):
        with pytest.raises(PlanError, match="damaged"):
            Plan.from_dict({**data, "classes": {**data["classes"], **wrong}})
    with pytest.raises(PlanError, match="not a yolo-prune plan"):
        Plan.from_dict({**data, "classes": {"kept": [0]}})


def test_a_plan_is_for_the_classes_it_was_made_for() -> None:
    plan, other = yolo_prune.plan(build("yolov8"), TWO, imgsz=64), build("yolov8")
    other.names = dict(enumerate("abcde"))
    with pytest.raises(PlanError, match="made for the 5 classes person, bicycle, car, "):
        yolo_prune.apply(other, plan)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"keep_classes": ["persn"]}, "structure.keep_classes: the model has no class 'persn'; did you mean 'person'?"),
        ({"keep_classes": ["xyz"]}, "the model has no class 'xyz'; the classes are person, bicycle, car"),
        ({"keep_classes": [5]}, "structure.keep_classes: there is no class 5: .* numbered 0 to 4"),
        ({"keep_classes": [-1]}, "there is no class -1"),
        ({"keep_classes": ["car", 2]}, "structure.keep_classes: the class 'car' is named twice"),
        ({"keep_classes": list(range(5))}, "structure.keep_classes: all 5 classes would stay"),
        ({"drop_classes": list(NAMES)}, "structure.drop_classes: no class would stay"),
        ({"keep_classes": ["a", "a"]}, "names the class 'a' twice"),
        ({"keep_classes": []}, "structure.keep_classes: names no class"),
        ({"keep_classes": [True]}, "structure.keep_classes: must be names or numbers of classes; put quotes"),
        ({"keep_classes": {"a": 1}}, "structure.keep_classes: must be a list of names or numbers"),
        ({"keep_classes": [0], "drop_classes": [1]}, "structure: give exactly one of keep_classes and drop_classes"),
        ({}, "structure: give exactly one of keep_classes and drop_classes"),
        ({"keep": [0]}, "structure.keep: unknown key"),
    ],
)
def test_impossible_classes_are_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        yolo_prune.plan(build("yolov8"), {"structure": asked}, imgsz=64)


def test_two_classes_of_one_name_are_told_apart_by_number() -> None:
    model = build("yolov8")
    model.names[1] = "Person"
    with pytest.raises(RecipeError, match="several classes are named 'person'"):
        yolo_prune.plan(model, TWO, imgsz=64)
    assert yolo_prune.plan(model, {"structure": {"keep_classes": [1]}}, imgsz=64).classes.kept == (1,)


@pytest.mark.parametrize(
    ("name", "message"), [("yolo26-sem", "semantic segmentation gives each pixel"), ("yolo26-depth", "has no classes")]
)
def test_other_tasks_are_refused(name: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        yolo_prune.plan(zoo.build(name, THIN), {"structure": {"keep_classes": [0]}}, imgsz=64)


def test_structure_alone_has_no_target_and_no_default_recipe() -> None:
    recipe = load_recipe(None, {"structure.keep_classes": "[person, car]"})
    assert recipe.target is None
    assert recipe.structure.keep_classes == ("person", "car")
    assert load_recipe(recipe.to_dict()) == recipe
    both = load_recipe("half-flops", {"structure.drop_classes": "dog"})
    assert (both.target.flops, both.structure.drop_classes) == (0.5, ("dog",))
