# SPDX-License-Identifier: AGPL-3.0-or-later
"""Classes that are not needed: what is removed from a model, and how datasets are read for it afterwards."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import small_data
import torch
import yaml
import zoo
from small_runs import FINE, PLAIN, RUNS
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.engine.model import Model
from ultralytics.nn.tasks import load_checkpoint

import yolo_prune
from yolo_prune import cli
from yolo_prune.cut import proof, surgery
from yolo_prune.cut.plan import Plan
from yolo_prune.cut.record import forget_lost_zeros, read_record
from yolo_prune.data import datasets
from yolo_prune.env import files
from yolo_prune.errors import PlanError, PruneError, RecipeError, RunError, UnsupportedModelError
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
    broken = surgery.apply

    def damage(module: nn.Module, cut: Plan) -> Any:
        done = broken(module, cut)
        with torch.no_grad():
            module.get_parameter(layer).mul_(1.01)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surgery, "apply", damage)
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
        ({"keep_classes": [0, 0]}, "names the class 0 twice"),
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


def test_a_fused_yoloe_is_refused() -> None:
    model = build("yoloe-11")
    model.model[-1].fuse(model.pe)
    with pytest.raises(UnsupportedModelError, match="classes of this YOLOE are fused into its layers"):
        yolo_prune.plan(model, TWO, imgsz=64)


def test_structure_alone_has_no_target_and_no_default_recipe() -> None:
    recipe = load_recipe(None, {"structure.keep_classes": "[person, car]"})
    assert recipe.target is None
    assert recipe.structure.keep_classes == ("person", "car")
    assert load_recipe(recipe.to_dict()) == recipe
    both = load_recipe("half-flops", {"structure.drop_classes": "dog"})
    assert (both.target.flops, both.structure.drop_classes) == (0.5, ("dog",))


# --- datasets, matched by name ---

SHAPES = ("disc", "ring", "square", "triangle", "cross")
TWO_SHAPES: dict[str, Any] = {"structure": {"keep_classes": ["disc", "square"]}}
VAL: dict[str, Any] = {"plots": False, "workers": 0, "device": "cpu", "imgsz": 64, "verbose": False}
RUN = RUNS["heads"]
slow = pytest.mark.slow


def cut_to_two(source: Path, target: Path) -> Path:
    model = YOLO(source)
    yolo_prune.apply(model, yolo_prune.plan(model, TWO_SHAPES, imgsz=64))
    model.save(target)
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dense.pt`, which detects some of the five shapes, `two.pt`, and the dataset `scenes/scenes.yaml`."""
    folder = small_data.tiny(tmp_path_factory.mktemp("classes"), train=96, val=16)
    settings = {
        **RUN,
        "epochs": 20,
        "batch": 8,
        "nbs": 8,
        "lr0": 0.004,
        "mosaic": 0.0,
        "warmup_epochs": 0,
        "val": False,
    }
    YOLO(folder / "tiny.yaml").train(data=str(data_of(folder)), project=str(folder), name="run", **settings)
    (folder / "run/weights/last.pt").replace(folder / "dense.pt")
    cut_to_two(folder / "dense.pt", folder / "two.pt")
    return folder


class Stop(Exception):
    pass


def stop(trainer: Any) -> None:
    """A callback that ends a run in the middle."""
    raise Stop


def data_of(folder: Path) -> Path:
    return folder / "scenes/scenes.yaml"


def renamed(folder: Path, path: Path, *names: str) -> str:
    """The dataset with other names."""
    facts = {**yaml.safe_load(data_of(folder).read_text()), "path": str(folder / "scenes")}
    path.write_text(yaml.safe_dump({**facts, "names": dict(enumerate(names))}))
    return str(path)


def stock_val(model: YOLO, **settings: Any) -> Any:
    """Ultralytics' own `val`."""
    return inspect.unwrap(Model.val)(model, **{**VAL, **settings})


@slow
def test_validation_finds_the_accuracy_of_the_kept_classes(folder: Path, tmp_path: Path) -> None:
    """On the old dataset with this package, and on the written one without it."""
    dense = YOLO(folder / "dense.pt").val(data=str(data_of(folder)), **VAL)
    wanted = dense.box.maps[[0, 2]]
    assert (wanted > 0).all()
    two = YOLO(folder / "two.pt").val(data=str(data_of(folder)), **VAL)
    assert two.names == {0: "disc", 1: "square"}
    assert two.box.maps == pytest.approx(wanted, abs=1e-4)
    written = yolo_prune.write_dataset(folder / "two.pt", data_of(folder), tmp_path / "two")
    facts = yaml.safe_load(written.read_text())
    assert facts["names"] == {0: "disc", 1: "square"}
    assert (facts["train"], facts["val"]) == ("images/train", "images/val")
    stock = stock_val(YOLO(folder / "two.pt"), data=str(written))
    assert stock.box.maps.tolist() == two.box.maps.tolist()
    again = YOLO(folder / "two.pt").val(data=str(written), **VAL)
    assert again.box.maps.tolist() == two.box.maps.tolist()
    wrong = stock_val(YOLO(folder / "two.pt"), data=str(data_of(folder)))  # it takes rings for squares
    assert wrong.box.maps[1] != pytest.approx(wanted[1], abs=1e-3)
    with pytest.raises(RunError, match="is there already"):
        yolo_prune.write_dataset(folder / "two.pt", data_of(folder), tmp_path / "two")
    with pytest.raises(RunError, match="No class was removed"):
        yolo_prune.write_dataset(folder / "dense.pt", data_of(folder), tmp_path / "five")


@slow
def test_the_order_and_the_number_of_the_classes_in_the_dataset_do_not_matter(folder: Path, tmp_path: Path) -> None:
    order = (3, 2, 1, 4, 0)  # where each class went
    scenes = tmp_path / "scenes"
    shutil.copytree(folder / "scenes", scenes, ignore=shutil.ignore_patterns("*.cache"))
    for file in (scenes / "labels").rglob("*.txt"):
        rows = [line.split(maxsplit=1) for line in file.read_text().splitlines()]
        file.write_text("".join(f"{order[int(c)]} {rest}\n" for c, rest in rows))
    facts = yaml.safe_load((scenes / "scenes.yaml").read_text())
    names = {order[i]: f" {name.title()}" for i, name in enumerate(SHAPES)}
    (scenes / "scenes.yaml").write_text(yaml.safe_dump({**facts, "path": str(scenes), "names": names}))
    as_before = YOLO(folder / "two.pt").val(data=str(data_of(folder)), **VAL)
    found = YOLO(folder / "two.pt").val(data=str(scenes / "scenes.yaml"), **VAL)
    assert found.box.maps.tolist() == as_before.box.maps.tolist()


@slow
def test_further_training_on_the_old_dataset_keeps_two_classes(folder: Path, tmp_path: Path) -> None:
    seen: dict[str, set[float]] = {"train": set(), "val": set()}

    def look(trainer: Any) -> None:
        for split, loader in (("train", trainer.train_loader), ("val", trainer.test_loader)):
            for label in loader.dataset.labels:
                seen[split] |= set(label["cls"].flatten().tolist())
            assert loader.dataset.data["names"] == {0: "disc", 1: "square"}

    model = YOLO(folder / "two.pt")
    model.add_callback("on_train_start", look)
    model.train(data=str(data_of(folder)), project=str(tmp_path), name="run", **{**RUN, "cls_pw": 0.5})
    assert seen == {"train": {0.0, 1.0}, "val": {0.0, 1.0}}
    best, _ = load_checkpoint(tmp_path / "run/weights/best.pt")
    assert best.names == {0: "disc", 1: "square"}
    assert best.model[-1].nc == best.model[-1].cv3[0][-1].out_channels == 2
    assert read_record(best).plan.classes.kept_names == ("disc", "square")
    resumed = YOLO(tmp_path / "run/weights/best.pt")
    recipe = {**PLAIN, **FINE, "target": {"flops": 0.6}, "schedule": {"rounds": 1}, "criterion": "taylor"}
    resumed.train(
        data=str(data_of(folder)), project=str(tmp_path), name="pruned", callbacks="prune", recipe=recipe, **RUN
    )
    best, _ = load_checkpoint(tmp_path / "pruned/weights/best.pt")
    assert list(best.names.values()) == ["disc", "square"]
    plan = read_record(best).plan
    assert plan.classes.kept == (0, 2)
    assert plan.groups
    report = yolo_prune.report.Report.load(tmp_path / "pruned")
    dense = planner.present_cost(YOLO(folder / "dense.pt").model, 64)
    assert report.pruned.flops <= 0.6 * dense[0]


@slow
def test_a_run_is_resumed_with_two_classes(folder: Path, tmp_path: Path) -> None:
    model = YOLO(folder / "two.pt")
    model.add_callback("on_model_save", stop)
    with pytest.raises(Stop):
        model.train(data=str(data_of(folder)), project=str(tmp_path), name="run", **{**RUN, "epochs": 2})
    YOLO(tmp_path / "run/weights/last.pt").train(resume=True)
    best, _ = load_checkpoint(tmp_path / "run/weights/best.pt")
    assert list(best.names.values()) == ["disc", "square"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("disc", "ring", "square", "triangle", "drone"), "has the class 'drone', which the dense model did not have"),
        (("disc", "ring", "a", "triangle", "b"), "has the classes 'a', 'b', which"),
        (("disc", "ring", "Ring", "triangle", "cross"), "lacks the class 'square', which this model has"),
        (("disc", "ring", "square", "Square", "cross"), "has several classes named 'square', 'Square'"),
    ],
)
@slow
def test_names_that_cannot_be_matched_are_refused_before_the_run(
    names: tuple[str, ...], message: str, folder: Path, tmp_path: Path
) -> None:
    data, model = renamed(folder, tmp_path / "other.yaml", *names), YOLO(folder / "two.pt")
    with pytest.raises(RunError, match=message):
        model.train(data=data, project=str(tmp_path), **RUN)
    with pytest.raises(RunError, match=message):
        model.val(data=data, project=str(tmp_path), **VAL)
    with pytest.raises(RunError, match=message):
        yolo_prune.plan(model, {"target": {"flops": 0.6}, "criterion": "taylor", **FINE}, imgsz=64, data=data)
    with pytest.raises(RunError, match=message):
        yolo_prune.write_dataset(model, data, tmp_path / "written")
    assert not list(tmp_path.rglob("*.pt"))


@slow
def test_data_criteria_see_the_kept_classes_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {**TWO_SHAPES, **FINE, "target": {"flops": 0.6}, "criterion": {"name": "taylor", "images": 8}}
    seen: set[float] = set()
    stock = datasets.calibration

    def look(*args: Any, **kwargs: Any) -> Any:
        found = stock(*args, **kwargs)
        seen.update(c for item in found.items for c in item["cls"].flatten().tolist())
        return found

    monkeypatch.setattr(datasets, "calibration", look)
    model = YOLO(folder / "dense.pt")
    plan = yolo_prune.plan(model, recipe, imgsz=64, data=data_of(folder))
    assert seen == {0.0, 1.0}
    assert plan.groups
    found = yolo_prune.apply(model, plan, imgsz=64, data=data_of(folder), refit=4)
    assert found.error < 1e-9
    assert len(model.names) == 2


@slow
def test_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = tmp_path / "fewer.pt"
    words = [f"model={folder / 'dense.pt'}", "recipe.structure.keep_classes=[disc, square]", "imgsz=64"]
    assert cli.main(["plan", *words]) == 0
    assert "classes: 2 of 5 kept: disc, square" in capsys.readouterr().out
    assert cli.main(["apply", *words, f"save={two}"]) == 0
    out = capsys.readouterr().out
    assert "exact: pruned model and masked reference agree" in out
    assert "Fine-tune" not in out
    assert cli.main(["show", f"model={two}"]) == 0
    assert "classes: 2 of 5 kept: disc, square" in capsys.readouterr().out
    assert cli.main(["dataset", f"model={two}", f"data={data_of(folder)}", f"save={tmp_path / 'written'}"]) == 0
    assert (tmp_path / "written/data.yaml").is_file()
    page, models = tmp_path / "page.html", [str(folder / "dense.pt"), str(two)]
    assert cli.main(["compare", *models, f"data={data_of(folder)}", "imgsz=64", f"save={page}"]) == 0
    assert "different classes" in capsys.readouterr().out
    assert cli.main(["apply", f"model={folder / 'dense.pt'}", "recipe.structure.keep_classes=[disk]"]) == 1
    assert "did you mean 'disc'?" in capsys.readouterr().err


@slow
def test_an_export_is_validated_on_the_kept_classes(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "two.pt", tmp_path / "two.pt")
    found = yolo_prune.bench([tmp_path / "two.pt"], format="torchscript", imgsz=64, repeats=1, data=data_of(folder))
    wanted = YOLO(folder / "two.pt").val(data=str(data_of(folder)), rect=False, batch=1, **VAL)
    assert found.rows[0].parity.quality == pytest.approx(wanted.box.map, abs=1e-3)


@slow
def test_stock_ultralytics_loads_it_and_validates_on_the_written_dataset(folder: Path, tmp_path: Path) -> None:
    written = yolo_prune.write_dataset(folder / "two.pt", data_of(folder), tmp_path / "two")
    code = (
        "import sys; from ultralytics import YOLO; m = YOLO(sys.argv[1]); "
        "r = m.val(data=sys.argv[2], plots=False, workers=0, device='cpu', imgsz=64, verbose=False); "
        "print('MAPS', r.box.maps.tolist()); m.predict(__import__('numpy').zeros((64, 64, 3), 'uint8'), imgsz=64); "
        "print('NAMES', m.names)"
    )
    environment = {**os.environ, "YOLO_PRUNE_HOOK": "0", "ULTRALYTICS_SAFE_LOAD": "1", "PYTHONPATH": ""}
    words = [sys.executable, "-c", code, str(folder / "two.pt"), str(written)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "NAMES {0: 'disc', 1: 'square'}" in done.stdout
    dense = YOLO(folder / "dense.pt").val(data=str(data_of(folder)), **VAL).box.maps[[0, 2]]
    maps = json.loads(done.stdout.split("MAPS ")[1].splitlines()[0])
    assert maps == pytest.approx(dense.tolist(), abs=1e-4)


IN_RUN: dict[str, Any] = {
    **TWO_SHAPES,
    **PLAIN,
    **FINE,
    "target": {"flops": 0.6},
    "schedule": {"rounds": 1, "start": 1},
}


@slow
def test_a_run_removes_classes_before_it_begins(folder: Path, tmp_path: Path) -> None:
    counts: list[int] = []
    model = YOLO(folder / "dense.pt")
    model.add_callback("on_train_start", lambda trainer: counts.append(trainer.model.model[-1].nc))
    settings = {**RUN, "epochs": 2, "data": str(data_of(folder)), "project": str(tmp_path), "callbacks": "prune"}
    model.train(**settings, name="run", recipe=IN_RUN)
    assert counts == [2]
    assert list(model.names.values()) == ["disc", "square"]
    best, _ = load_checkpoint(tmp_path / "run/weights/best.pt")
    plan, report = read_record(best).plan, yolo_prune.report.Report.load(tmp_path / "run")
    assert plan.classes.kept_names == ("disc", "square")
    assert plan.groups
    dense = planner.present_cost(YOLO(folder / "dense.pt").model, 64)
    assert (report.dense.flops, report.dense.params) == dense
    assert report.pruned.flops <= 0.6 * dense[0]
    assert report.kept_classes == "classes: 2 of 5 kept: disc, square"
    assert report.kept_classes in (tmp_path / "run/report.html").read_text()
    surgery.check_applied(best, plan)


@slow
def test_a_run_that_removed_classes_is_resumed_and_a_failed_one_changes_nothing(folder: Path, tmp_path: Path) -> None:
    model = YOLO(folder / "dense.pt")
    model.add_callback("on_model_save", stop)
    settings = {**RUN, "epochs": 3, "data": str(data_of(folder)), "project": str(tmp_path), "callbacks": "prune"}
    with pytest.raises(Stop):
        model.train(**settings, name="run", recipe=IN_RUN)
    assert list(model.names.values()) == list(SHAPES)
    assert not yolo_prune.is_pruned(model)
    YOLO(tmp_path / "run/weights/last.pt").train(resume=True)
    best, _ = load_checkpoint(tmp_path / "run/weights/best.pt")
    assert list(best.names.values()) == ["disc", "square"]
    assert read_record(best).plan.groups


@slow
def test_a_run_that_only_removes_classes_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="structure: to remove classes, no training is needed"):
        YOLO(folder / "dense.pt").train(
            data=str(data_of(folder)), project=str(tmp_path), callbacks="prune", recipe=TWO_SHAPES, **RUN
        )
    with pytest.raises(RunError, match="pretrained=False would rebuild the dense model"):
        YOLO(folder / "dense.pt").train(
            data=str(data_of(folder)), project=str(tmp_path), callbacks="prune", recipe=IN_RUN, pretrained=False,
            **{**RUN, "epochs": 2},
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@slow
def test_a_model_without_names_is_matched_by_number(folder: Path, tmp_path: Path) -> None:
    model = YOLO(folder / "tiny.yaml")
    yolo_prune.apply(model, yolo_prune.plan(model, {"structure": {"keep_classes": [0, 2]}}, imgsz=64))
    model.save(tmp_path / "two.pt")
    YOLO(tmp_path / "two.pt").train(data=str(data_of(folder)), project=str(tmp_path), name="run", **RUN)
    best = YOLO(tmp_path / "run/weights/best.pt")
    assert list(best.names.values()) == ["disc", "square"]
    best.val(data=str(data_of(folder)), project=str(tmp_path), **VAL)


@slow
@pytest.mark.parametrize("task", ["segment", "pose", "obb", "classify"])
def test_other_tasks_train_on_the_old_dataset(task: str, tmp_path: Path) -> None:
    data = small_data.make(task, tmp_path)
    name = {"segment": "yolo26-seg", "pose": "yolo11-pose", "obb": "yolo11-obb", "classify": "yolo11-cls"}[task]
    names = ["a", "b"] if task == "classify" else list(SHAPES)
    kept = names[1:] if task == "classify" else ["square", "disc"]
    config = {**zoo.configuration(name, THIN), "nc": len(names)}
    (tmp_path / f"{name}.yaml").write_text(
        yaml.safe_dump({**config, **({"kpt_shape": [2, 3]} if task == "pose" else {})})
    )
    model = YOLO(tmp_path / f"{name}.yaml")
    model.model.names = dict(enumerate(names))
    yolo_prune.apply(model, yolo_prune.plan(model, {"structure": {"keep_classes": kept}}, imgsz=64))
    model.save(tmp_path / "two.pt")
    wanted = sorted(kept, key=names.index)
    YOLO(tmp_path / "two.pt").train(data=str(data), project=str(tmp_path), name="run", **RUN)
    best = YOLO(tmp_path / "run/weights/best.pt")
    assert list(best.names.values()) == wanted
    found = best.val(data=str(data), project=str(tmp_path), **VAL)
    written = yolo_prune.write_dataset(best, data, tmp_path / "written")
    stock = stock_val(YOLO(tmp_path / "run/weights/best.pt"), data=str(written), project=str(tmp_path))
    assert stock.results_dict == pytest.approx(found.results_dict)
    if task == "classify":
        assert [p.name for p in (written / "val").iterdir()] == wanted
    else:
        labels = [
            line.split()[0] for p in (written.parent / "labels").rglob("*.txt") for line in p.read_text().splitlines()
        ]
        assert set(labels) == {"0", "1"}
        assert found.confusion_matrix is not None


def test_a_written_dataset_changes_no_image_and_loses_none(folder: Path, tmp_path: Path) -> None:
    """Images of one name lie in several folders, and others already have the names that they could get."""
    info = yaml.safe_load(Path(data_of(folder)).read_text(encoding="utf-8"))
    source = next((folder / "scenes/images/train").glob("*.*"))
    places = ("images/a/x", "images/b/x", "images/c/x-0", "images/c/x-1")
    for number, place in enumerate(places):
        image = tmp_path / f"{place}{source.suffix}"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(source.read_bytes() + bytes([number]))
        label = tmp_path / f"{place.replace('images', 'labels')}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(f"0 0.5 0.5 0.{number + 1} 0.2\n")
    before = {place: (tmp_path / f"{place}{source.suffix}").read_bytes() for place in places}
    data = tmp_path / "data.yaml"
    data.write_text(yaml.safe_dump({"path": str(tmp_path), "train": "images", "val": "images", "names": info["names"]}))
    written = yolo_prune.write_dataset(folder / "two.pt", data, tmp_path / "two")
    assert {place: (tmp_path / f"{place}{source.suffix}").read_bytes() for place in places} == before
    images = sorted((written.parent / "images/train").iterdir())
    assert sorted(image.read_bytes() for image in images) == sorted(before.values())
    for image in images:
        label = written.parent / f"labels/train/{image.stem}.txt"
        assert label.read_text().split()[3] == f"0.{image.read_bytes()[-1] + 1}"


def test_a_link_never_takes_the_place_of_a_file(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    with pytest.raises(FileExistsError):
        files.link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "b"


def test_a_model_that_was_trained_for_other_classes_reads_its_own_dataset(folder: Path) -> None:
    """Ultralytics without this package keeps the record, and gives the model the names of another dataset."""
    model = YOLO(folder / "two.pt").model
    assert datasets.kept_classes(model)
    model.names = {0: "car", 1: "person"}
    assert datasets.kept_classes(model) is None
    assert not forget_lost_zeros(model)  # there are none to forget
    record = read_record(model)
    assert record is not None
    assert record.plan is not None
    assert record.plan.keep  # the structure is still known


def test_a_single_class_is_refused(folder: Path) -> None:
    with pytest.raises(RunError, match=r"single_cls=True does not work with a model from which classes were removed"):
        YOLO(folder / "two.pt").val(data=data_of(folder), imgsz=32, single_cls=True, plots=False)


@pytest.mark.parametrize("again", [[0, "disc"], ["Disc", "disc"]])
def test_a_class_that_is_named_in_two_ways_is_named_twice(folder: Path, again: list[Any]) -> None:
    with pytest.raises(RecipeError, match="the class 'disc' is named twice"):
        yolo_prune.plan(folder / "dense.pt", {"structure": {"keep_classes": again}}, imgsz=32)
