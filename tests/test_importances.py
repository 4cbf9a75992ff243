# SPDX-License-Identifier: AGPL-3.0-or-later
"""The criterion torch_pruning: against stock torch-pruning where that reads a model, and against values by hand."""

from __future__ import annotations

import inspect
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import small_data
import torch
import torch_pruning as tp
import zoo
from small_runs import RECIPES, RUNS
from torch import Tensor, nn
from ultralytics import YOLO

from yolo_prune import _patch, load_recipe
from yolo_prune.criteria import create, score
from yolo_prune.criteria.importances import REFUSED
from yolo_prune.cut import surgery
from yolo_prune.cut.record import read_record
from yolo_prune.data.calibration import Calibration, loss_of
from yolo_prune.errors import ArgumentError, GradientError, PruneError, RecipeError, RunError
from yolo_prune.graph import ChannelSet, Slot, trace
from yolo_prune.graph.pruning_group import pruning_group
from yolo_prune.planning import planner
from yolo_prune.recipe import Recipe, code
from yolo_prune.report import Report
from yolo_prune.run.callback import PruneCallback

READABLE = ("yolov3-tiny", "yolov5", "yolov6", "yolov8-ghost", "yolov8-cls-resnet50")  # by stock torch-pruning
OF_WEIGHTS = ("GroupMagnitudeImportance", "BNScaleImportance", "LAMPImportance", "FPGMImportance")
USABLE = tuple(
    name
    for name, kind in vars(tp.importance).items()
    if inspect.isclass(kind) and issubclass(kind, tp.importance.Importance) and name not in ("Importance", *REFUSED)
)
OF_DATA = ("GroupTaylorImportance", "GroupHessianImportance", "OBDCImportance", "ActivationImportance")


def criterion(importance: str, **options: Any) -> Any:
    return create("torch_pruning", {"importance": importance, **options})


def calibration_of(model: Any, name: str, count: int = 2) -> Calibration:
    """The made-up batch of the zoo, one image at a time."""
    batch = zoo.batch(model, name, count)
    items = [{k: v[i : i + 1] if k != "batch_idx" else torch.zeros(1) for k, v in batch.items()} for i in range(count)]
    return Calibration(lambda: items, lambda item: item, model.args)


def places(group: Any, names: dict[nn.Module, str]) -> frozenset[Any]:
    """What belongs to a group: layers, sides and indices."""
    return frozenset(
        (names[item.dep.target.module], item.dep.handler.__name__, tuple(sorted(item.idxs)))
        for item in group
        if item.dep.target.module in names
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", READABLE)
def test_scores_are_those_of_stock_torch_pruning(name: str) -> None:
    """Of its own groups, on the models that it reads, with the same gradients."""
    model = zoo.randomise(zoo.build(name, width=0.25)).float()
    graph = trace(model, imgsz=2 * zoo.image_size(name))
    taylor = criterion("GroupTaylorImportance", images=2)
    taylor.observe(model, calibration_of(model, name), iter)
    gradients = {n: p.grad for n, p in taylor._layers[""].named_parameters()}
    stock = tp.DependencyGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock.build_dependency(model.train().requires_grad_(True), zoo.images(model, name, 1), verbose=False)
    for n, p in model.named_parameters():
        p.grad = gradients[n]
    names = {module: n for n, module in model.named_modules()}
    layers = dict(model.named_modules())
    theirs = {places(group, names): group for group in stock.get_all_groups()}
    compared = 0
    sets = [s for g in graph.groups if not g.protected for s in g.sets]
    for importance in (*OF_WEIGHTS, "GroupTaylorImportance"):
        ours = taylor if importance == "GroupTaylorImportance" else criterion(importance)
        ours.read(model)
        for channels in sets:
            group = theirs.get(places(pruning_group(layers, channels), names))
            if group is None:
                continue
            found = score(ours, {}, channels)
            wanted = getattr(tp.importance, importance)()(group)
            if wanted is None or wanted.isnan().all():  # 0 divided by 0, where no gradient comes
                wanted = torch.zeros(channels.size)
            if len(wanted) > channels.size:  # it counts on zeros for channels that are not there; see the docs
                wanted = wanted[: channels.size] / wanted[: channels.size].mean()
            # LAMP divides by differences of sums in single precision, so the order of the sums counts
            loose = {"rtol": 1e-2, "atol": 1e-6} if importance == "LAMPImportance" else {"rtol": 1e-5, "atol": 1e-7}
            torch.testing.assert_close(found, wanted.double(), **loose)
            compared += 1
    assert compared > 0.8 * 5 * len(sets)


class Net(nn.Module):
    """A convolution, a batch norm and a convolution, with a loss that depends on the image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(3)
        self.b = nn.Conv2d(3, 2, 1)
        nn.init.uniform_(self.bn.weight, 0.5, 1.5)

    def forward(self, image: Tensor) -> Tensor:
        return self.b(self.bn(self.a(image)).relu())

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, None]:
        return self(batch["img"]).square().sum(), None


def chain(producer: tuple[int, ...], reader: tuple[int, ...]) -> ChannelSet:
    """A set of `Net` whose channels are these outputs of `a`, and these inputs of `b`."""
    slots = [Slot(f"{name}", 0, producer) for name in ("a.weight", "bn.weight", "bn.bias", "bn.running_var")]
    return ChannelSet("a", len(producer), (*slots, Slot("b.weight", 1, reader)), ("a",))


def images(*seeds: int) -> Calibration:
    items = [{"img": torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(s))} for s in seeds]
    return Calibration(lambda: items, lambda item: item, SimpleNamespace())


def gradients_by_hand(model: Net, seeds: tuple[int, ...]) -> dict[str, Tensor]:
    """`{parameter: (images, *shape)}`: the gradient of each image."""
    copy = Net().eval()
    copy.load_state_dict(model.state_dict())
    found = []
    for batch in images(*seeds).batches():
        gradients = torch.autograd.grad(loss_of(copy, batch), list(copy.parameters()))
        found.append(dict(zip(dict(copy.named_parameters()), gradients, strict=True)))
    return {name: torch.stack([g[name] for g in found]) for name in found[0]}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_hessian_by_hand(order: tuple[int, ...]) -> None:
    """Stock torch-pruning keeps the squared gradients of the last image only, and sorts indices without their roots."""
    model, seeds = Net(), (1, 2, 3)
    ours = criterion("GroupHessianImportance", images=3)
    ours.observe(model, images(*seeds), iter)
    h = {name: g.square().mean(0) for name, g in gradients_by_hand(model, seeds).items()}
    with torch.no_grad():
        a = (model.a.weight.square() * h["a.weight"]).flatten(1).sum(1)
        bn = model.bn.weight.square() * h["bn.weight"]
        b = (model.b.weight.square() * h["b.weight"]).transpose(0, 1).flatten(1).sum(1)[list(order)]
    wanted = (a + bn + b) / 3
    torch.testing.assert_close(ours({}, chain((0, 1, 2), order)), (wanted / wanted.mean()).double())
    last = criterion("GroupHessianImportance", images=3)
    last.observe(model, images(3), iter)
    assert not torch.allclose(last({}, chain((0, 1, 2), order)), ours({}, chain((0, 1, 2), order)))


@pytest.mark.parametrize("producer", [(0, 1, 2), (0, 2)])
def test_obdc_by_hand(producer: tuple[int, ...]) -> None:
    """Also for a part of a layer's outputs, for which stock torch-pruning takes the Fisher information of all."""
    model, seeds = Net(), (1, 2)
    ours = criterion("OBDCImportance", images=2, normalizer=None)
    ours.observe(model, images(*seeds), iter)
    fisher = gradients_by_hand(model, seeds)["a.weight"].square().mean(0) + 1e-10
    wanted = (model.a.weight.detach().square() * fisher).flatten(1).sum(1)[list(producer)]
    torch.testing.assert_close(ours({}, chain(producer, producer)), wanted.double())
    assert ours.comparable


def test_activation_by_hand() -> None:
    """Stock torch-pruning keeps the inputs of the last batch only."""
    model = Net()
    ours = criterion("ActivationImportance", images=2)
    ours.observe(model, images(1, 2), iter)
    model.eval()
    with torch.no_grad():
        read = torch.cat([model.bn(model.a(b["img"])).relu() for b in images(1, 2).batches()])
    wanted = read.abs().mean((0, 2, 3))
    torch.testing.assert_close(ours({}, chain((0, 1, 2), (0, 1, 2))), (wanted / wanted.mean()).double())


@pytest.mark.parametrize("importance", [*OF_WEIGHTS, *OF_DATA])
def test_nothing_is_left_on_the_model(importance: str) -> None:
    model = Net()
    before = {n: (set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    options = {"images": 2} if importance in OF_DATA else {}
    ours = criterion(importance, **options)
    ours.read(model)
    if options:
        ours.observe(model, images(1, 2), iter)
    scores = score(ours, {}, chain((0, 1, 2), (0, 1, 2)))
    assert scores.dtype == torch.float64
    assert len(set(scores.tolist())) == 3
    after = {n: (set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    assert after == before
    assert all(p.grad is None for p in model.parameters())
    assert models.same_bits(weights, model.state_dict())


def test_a_layer_that_reads_a_channel_twice() -> None:
    """Stock torch-pruning returns more scores than channels if it begins with such a layer."""
    model = nn.ModuleDict({"a": nn.Conv2d(1, 2, 1, bias=False), "b": nn.Conv2d(4, 1, 1, bias=False)})
    model["a"].weight.data = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    model["b"].weight.data = torch.tensor([1.0, 2.0, 3.0, 5.0]).view(1, 4, 1, 1)
    slots = (Slot("a.weight", 0, (0, 1)), Slot("b.weight", 1, (0, 1)), Slot("b.weight", 1, (2, 3)))
    twice = ChannelSet("a", 2, slots, ("a",))
    expected = {"sum": [1 + 1 + 9, 4 + 4 + 25], "max": [9, 25], "prod": [1 * 1 * 9, 4 * 4 * 25]}
    for reduction, wanted in expected.items():
        ours = criterion("GroupMagnitudeImportance", group_reduction=reduction, normalizer=None)
        ours.read(model)
        assert ours({}, twice).tolist() == wanted
    reads_first = ChannelSet("a", 2, slots[1:], ("a",))
    ours = criterion("GroupMagnitudeImportance", normalizer="max")
    ours.read(model)
    assert ours({}, reads_first).tolist() == pytest.approx([10 / 29, 1])


def test_a_class_can_follow_the_index_mappings() -> None:
    group = pruning_group(dict(Net().named_modules()), chain((0, 1, 2), (2, 0, 1)))
    roots = [tp._helpers._HybridIndex(idx=i, root_idx=i) for i in range(3)]
    found = {i.dep.target._name: [h.idx for h in i.dep.index_mapping[0](roots)] for i in group}
    assert found == {"a": [0, 1, 2], "bn": [0, 1, 2], "b": [2, 0, 1]}


def test_without_a_score_it_is_0() -> None:
    model, everywhere = Net(), chain((0, 1, 2), (0, 1, 2))
    ours = criterion("BNScaleImportance")
    ours.read(model)
    alone = ChannelSet("a", 3, (Slot("a.weight", 0, (0, 1, 2)),), ("a",))
    assert ours({}, alone).tolist() == [0, 0, 0]
    model.bn.weight.data.zero_()
    ours.read(model)
    assert score(ours, {}, everywhere).tolist() == [0, 0, 0]  # stock torch-pruning divides 0 by 0


@pytest.mark.parametrize("normalizer", ["mean", "sum", "max", "lamp", "standarization", "gaussian", "sentinel_0.5"])
def test_the_smallest_scores_are_normalized_like_others(normalizer: str) -> None:
    """As of squared gradients where hardly any gradient comes: single precision rounds their mean to 0."""
    ours, size = criterion("GroupMagnitudeImportance", normalizer=normalizer), 64
    ours._size = size
    raw = torch.cat([torch.zeros(size - 8), torch.full((7,), 1e-44), torch.full((1,), 1.5e-44)])
    found = ours._importance.normalizer(raw)
    assert found.isfinite().all()
    assert int(found.argmax()) == size - 1


def test_negative_scores_are_moved_up() -> None:
    ours = criterion("GroupMagnitudeImportance", normalizer="gaussian")
    ours.read(Net())
    scores = score(ours, {}, chain((0, 1, 2), (0, 1, 2)))
    plain = criterion("GroupMagnitudeImportance")
    plain.read(Net())
    assert scores.min() == 0
    assert torch.equal(scores.argsort(), plain({}, chain((0, 1, 2), (0, 1, 2))).argsort())


@pytest.mark.parametrize(
    ("importance", "options", "comparable"),
    [
        ("GroupTaylorImportance", {}, False),
        ("GroupTaylorImportance", {"normalizer": None}, True),
        ("GroupMagnitudeImportance", {"normalizer": "lamp"}, True),
        ("GroupMagnitudeImportance", {"normalizer": "sentinel_0.5"}, False),
        ("LAMPImportance", {}, True),
    ],
)
def test_the_normalizer_says_whether_scores_compare(importance: str, options: dict[str, Any], comparable: bool) -> None:
    assert criterion(importance, **options).comparable is comparable


def test_no_normalizer_survives_the_recipe() -> None:
    """A checkpoint holds the recipe as plain data, in which null is a value to an option."""
    asked = {"name": "torch_pruning", "importance": "GroupTaylorImportance", "normalizer": None}
    recipe = load_recipe({"target": {"flops": 0.5}, "criterion": asked})
    assert recipe.to_dict()["criterion"] == asked
    assert load_recipe(recipe) == recipe
    assert load_recipe("half-flops", {f"criterion.{k}": v or "null" for k, v in asked.items()}).criterion.options == {
        "importance": "GroupTaylorImportance",
        "normalizer": None,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"criterion\.importance: is missing; add the name of a class"),
        ({"importance": 3}, r"criterion\.importance: must be a text, got 3"),
        (
            {"importance": "GroupTaylor"},
            r"no importance 'GroupTaylor'; choose .* Did you mean 'GroupTaylorImportance'\?",
        ),
        ({"importance": "Importance"}, r"no importance 'Importance'"),
        ({"importance": "RandomImportance"}, r"'RandomImportance' is refused: it has no seed.* criterion random"),
        ({"importance": "GroupMagnitudeImportance", "images": 4}, r"criterion\.images: .* reads weights only"),
        ({"importance": "GroupTaylorImportance", "images": 0}, r"criterion\.images: must be a whole number from 1"),
        (
            {"importance": "BNScaleImportance", "p": 1},
            r"criterion\.p: .* no such option\. The options are: group_reduction",
        ),
        ({"importance": "GroupMagnitudeImportance", "p": 0}, r"criterion\.p: must be a number above 0, got 0"),
        ({"importance": "FPGMImportance", "p": True}, r"criterion\.p: must be a number above 0, got True"),
        ({"importance": "GroupTaylorImportance", "bias": 1}, r"criterion\.bias: must be true or false, got 1"),
        (
            {"importance": "GroupTaylorImportance", "group_reduction": "gate"},
            r"criterion\.group_reduction: .* no meaning",
        ),
        (
            {"importance": "GroupTaylorImportance", "group_reduction": None},
            r"criterion\.group_reduction: must be one of",
        ),
        ({"importance": "GroupTaylorImportance", "normalizer": "sentinel_1"}, r"criterion\.normalizer: must be one of"),
        ({"importance": "GroupTaylorImportance", "normalizer": ["max"]}, r"criterion\.normalizer: must be one of"),
        ({"importance": "LAMPImportance", "normalizer": "mean"}, r"criterion\.normalizer: .* it is always lamp"),
        ({"importance": "OBDCImportance", "bias": True}, r"criterion\.bias: .* Fisher information of the weights"),
        ({"importance": "OBDCImportance", "num_classes": 3}, r"criterion\.num_classes: .* Leave num_classes out"),
        ({"importance": "GroupTaylorImportance", "target_types": "Conv2d"}, r"criterion\.target_types: must be a list"),
        ({"importance": "GroupTaylorImportance", "target_types": ["Conv3"]}, r"torch\.nn has no layer 'Conv3'"),
        ({"importance": "no_such_module:Mine"}, r"'no_such_module:Mine' is code"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        create("torch_pruning", options)


def test_target_types_are_names_of_torch() -> None:
    model, channels = Net(), chain((0, 1, 2), (0, 1, 2))
    ours = criterion("GroupMagnitudeImportance", p=1, normalizer=None, target_types=["BatchNorm2d"])
    ours.read(model)
    assert ours({}, channels).tolist() == pytest.approx(model.bn.weight.abs().tolist())


def test_gradients_that_are_not_finite_are_told() -> None:
    model = Net()
    model.b.weight.data[0, 0] = torch.inf
    with pytest.raises(GradientError, match="not finite"):
        criterion("GroupTaylorImportance", images=1).observe(model, images(1), iter)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "times"), [("yolo26", 2), ("rtdetr-l", 1)])
def test_every_importance_makes_a_plan(name: str, times: int) -> None:
    """The same one each time, and the model is as before."""
    model = zoo.randomise(zoo.build(name, width=0.125)).float()
    before, graph = models.snapshot(model), trace(model, imgsz=zoo.image_size(name))
    hashes: dict[str, str] = {}
    for importance in (*OF_WEIGHTS, *OF_DATA):
        options = {"images": 2} if importance in OF_DATA else {}
        asked = {"name": "torch_pruning", "importance": importance, **options}
        recipe = load_recipe({"target": {"flops": 0.7}, "criterion": asked, "channels": {"round_to": 2, "min": 2}})
        for _ in range(times):
            calibration = calibration_of(model, name) if options else None
            plan = planner.plan_for(model, graph, recipe, calibration=calibration)
            assert hashes.setdefault(importance, plan.hash) == plan.hash
            assert 0.6 < plan.predicted.flops_kept <= 0.7
    assert len(set(hashes.values())) == len(hashes)
    assert models.same_bits(before, model.state_dict())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data.tiny(tmp_path_factory.mktemp("importances"), train=4, val=2)


@pytest.mark.long
@pytest.mark.parametrize("importance", USABLE)
def test_every_importance_prunes_a_run(importance: str, folder: Path, tmp_path: Path) -> None:
    """What is delivered has the target's size, says by what it was pruned, and loads."""
    asked = {"name": "torch_pruning", "importance": importance}
    if criterion(importance).images:
        asked["images"] = 2
    model = YOLO(folder / "dense.pt")
    dense = sum(p.numel() for p in model.model.parameters())
    recipe = {**RECIPES["importances"], "criterion": asked}
    model.train(data=str(folder / "scenes/scenes.yaml"), project=str(tmp_path), recipe=recipe, **RUNS["importances"])
    again = YOLO(tmp_path / "run/weights/best.pt")
    record, report = read_record(again.model), Report.load(tmp_path / "run")
    assert record is not None
    assert record.plan is not None
    assert record.recipe["criterion"] == asked
    surgery.check_applied(again.model, record.plan)
    assert 0.55 < record.plan.predicted.kept("flops") <= 0.6
    assert report.pruned.flops / report.dense.flops == pytest.approx(record.plan.predicted.kept("flops"), abs=1e-3)
    assert sum(p.numel() for p in again.model.parameters()) < dense
    assert len(again.predict(torch.rand(1, 3, 32, 32), verbose=False)) == 1


# A user's own class

MINE = """
from pathlib import Path
import torch
import torch_pruning as tp

Path(__file__).with_suffix(".imported").touch()

class Mine(tp.importance.Importance):
    def __init__(self, power=1):
        self.power, self.seen = power, 0

    def accumulate_grad(self, model):
        self.seen += 1

    def __call__(self, group):
        (dep, idxs), *_ = group
        weight = dep.target.module.weight
        value = weight if weight.grad is None else weight * weight.grad * self.seen
        return value[idxs].abs().flatten(1).sum(1).pow(self.power)

class Short(tp.importance.Importance):
    def __call__(self, group):
        return torch.ones(1)

class Fails(tp.importance.Importance):
    def __call__(self, group):
        return 1 / 0

class Strict(tp.importance.GroupMagnitudeImportance):
    def __init__(self, limit):
        raise ValueError("no limit will do")

def function(group):
    return None
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of a user that is on the path, and not yet imported nor named by anyone."""
    name = f"mine_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(code, "_named_by_user", set())
    return name


def asked_for(name: str, **options: Any) -> dict[str, Any]:
    return {"target": {"flops": 0.7}, "criterion": {"name": "torch_pruning", "importance": name, **options}}


def make(recipe: Recipe) -> Any:
    return create(recipe.criterion.name, recipe.criterion.options)


def test_a_class_of_a_user_scores_weights(module: str) -> None:
    ours = make(load_recipe(asked_for(f"{module}:Mine", power=2)))
    model = Net()
    ours.read(model)
    assert (ours.images, ours.comparable) == (0, False)
    wanted = model.a.weight.abs().flatten(1).sum(1).square().tolist()
    assert ours({}, chain((0, 1, 2), (0, 1, 2))).tolist() == pytest.approx(wanted)


def test_with_images_a_class_of_a_user_gets_gradients(module: str) -> None:
    model, seeds = Net(), (1, 2, 3)
    ours = make(load_recipe(asked_for(f"{module}:Mine", images=3)))
    ours.observe(model, images(*seeds), iter)
    mean = gradients_by_hand(model, seeds)["a.weight"].mean(0)
    wanted = (3 * model.a.weight.detach() * mean).abs().flatten(1).sum(1)
    torch.testing.assert_close(ours({}, chain((0, 1, 2), (0, 1, 2))), wanted.double())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Mine", {"limit": 1}, r"criterion\.limit: .*:Mine' has no such option\. The options are: power"),
        ("Nobody", {}, r"cannot be imported: AttributeError.* PYTHONPATH"),
        ("function", {}, r"is not a subclass of torch_pruning\.importance\.Importance"),
        ("Strict", {}, r"cannot be made: TypeError: .*limit"),
        ("Strict", {"limit": 1}, r"cannot be made: ValueError: no limit will do"),
    ],
)
def test_what_is_wrong_with_a_class_of_a_user_is_told(
    module: str, name: str, options: dict[str, Any], message: str
) -> None:
    recipe = load_recipe(asked_for(f"{module}:{name}", **options))
    with pytest.raises(RecipeError, match=message):
        make(recipe)


def test_one_score_per_channel(module: str) -> None:
    ours = make(load_recipe(asked_for(f"{module}:Short")))
    ours.read(Net())
    with pytest.raises(PruneError, match=r"returned scores of shape \(1,\) for 'a', which has 3 channels"):
        ours({}, chain((0, 1, 2), (0, 1, 2)))


def test_fpgm_does_not_count_readers_with_groups() -> None:
    class Grouped(Net):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
            self.b = nn.Conv2d(4, 4, 1, groups=2)

    net, ours = Grouped(), make(load_recipe(asked_for("FPGMImportance", normalizer=None)))
    ours.read(net)
    index = tuple(range(len(net.a.weight)))
    found = ours({}, chain(index, index))
    rows = net.a.weight.detach().flatten(1).square()
    torch.testing.assert_close(found.float(), torch.cdist(rows, rows).sum(1), rtol=1e-4, atol=1e-5)


def test_a_class_that_fails_is_told_with_the_layer(module: str) -> None:
    ours = make(load_recipe(asked_for(f"{module}:Fails")))
    ours.read(Net())
    with pytest.raises(PruneError, match=r"Fails' failed on 'a': ZeroDivisionError: .* protect this layer"):
        ours({}, chain((0, 1, 2), (0, 1, 2)))


def test_only_what_the_user_names_is_imported(module: str, tmp_path: Path) -> None:
    """A recipe in a checkpoint is no word of the user; a path, a mapping and an override are."""
    imported = (tmp_path / f"{module}.py").with_suffix(".imported")
    name = f"{module}:Mine"
    recipe = Recipe.model_validate(asked_for(name))
    with pytest.raises(RecipeError, match=rf"'{name}' is code.* pass recipe\.criterion\.importance={name}"):
        make(recipe)
    with pytest.raises(RecipeError, match="is code"):
        make(Recipe.model_validate(pickle.loads(pickle.dumps(recipe)).to_dict()))
    assert not imported.exists()
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    for again in (
        load_recipe(path),
        load_recipe("half-flops", {"criterion": "torch_pruning", "criterion.importance": name}),
    ):
        assert make(again).images == 0
    assert imported.exists()


def test_a_process_that_trains_along_may_import_what_its_parent_may(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = pickle.dumps(PruneCallback(load_recipe(asked_for(f"{module}:Mine"))))
    monkeypatch.setattr(code, "_named_by_user", set())  # as in another process
    assert make(pickle.loads(sent).recipe).images == 0


class Interrupted(Exception):
    """What ends the run here."""


@pytest.mark.slow
def test_a_resumed_run_is_told_its_code_again(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, name = small_data.tiny(tmp_path, train=4), f"{module}:Mine"
    key = "recipe.criterion.importance"

    def interrupt(trainer: Any) -> None:
        raise Interrupted

    model = YOLO(folder / "dense.pt")
    model.add_callback("on_model_save", interrupt)
    recipe = {**RECIPES["resume"], "criterion": {"name": "torch_pruning", "importance": name, "images": 2}}
    run = {**RUNS["resume"], "epochs": 2, "data": str(folder / "scenes/scenes.yaml"), "project": str(tmp_path)}
    with pytest.raises(Interrupted):
        model.train(**run, recipe=recipe)
    monkeypatch.setattr(code, "_named_by_user", set())
    last = tmp_path / "run/weights/last.pt"
    with pytest.raises(RunError, match=rf"scores channels with '{name}', which is code.* pass {key}={name}"):
        YOLO(last).train(resume=True)
    with pytest.raises(RunError, match=rf"began with {key}={name}, not with other:Mine"):
        YOLO(last).train(resume=True, **{key: "other:Mine"})
    with pytest.raises(RunError, match=r"keeps the recipe that it began with\. Leave out recipe\.target\.flops"):
        YOLO(last).train(resume=True, **{key: name, "recipe.target.flops": 0.3})
    resumed = YOLO(last)
    resumed.train(resume=True, **{key: name})
    assert resumed.trainer.pruning.over


def test_a_resumed_command_may_name_the_code_again() -> None:
    given = {"mode": "train", "resume": "last.pt", f"recipe.{code.FIELD}": "mine:Mine"}
    _patch._check_command(given, unreadable=False)
    with pytest.raises(ArgumentError, match="has no effect by itself"):
        _patch._check_command({**given, "resume": False}, unreadable=False)
