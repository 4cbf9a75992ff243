# SPDX-License-Identifier: AGPL-3.0-or-later
"""Criteria that look at data, and the refit: against what brute force and closed forms say."""

from __future__ import annotations

import itertools
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_data
import torch
from small_data import IMGSZ
from small_runs import FINE, SMALL
from torch import Tensor, nn
from ultralytics import YOLO

import yolo_prune
from yolo_prune import load_recipe
from yolo_prune.criteria import create
from yolo_prune.criteria.surgeon import Reader, order
from yolo_prune.cut import surgery
from yolo_prune.cut.plan import Plan
from yolo_prune.data import datasets, layer_samples
from yolo_prune.data.calibration import Calibration, loss_of
from yolo_prune.demo.scenes import make_dataset
from yolo_prune.errors import GradientError, RecipeError
from yolo_prune.graph import ChannelSet, Slot
from yolo_prune.planning import planner
from yolo_prune.recover import refit
from yolo_prune.recover.refit import solve


def loss_without(weight: Tensor, moment: Tensor, curvature: Tensor, gone: list[int]) -> float:
    """By brute force: the least of tr(G d H d^T) / 2 over all changes d that make the columns `gone` zero."""
    left = [i for i in range(len(moment)) if i not in gone]
    # stationary in the columns left: d_left H_ll + d_gone H_gl = 0, with d_gone = -w_gone
    change = torch.zeros_like(weight)
    change[:, gone] = -weight[:, gone]
    change[:, left] = weight[:, gone] @ moment[gone][:, left] @ torch.linalg.inv(moment[left][:, left])
    return float(torch.trace(curvature @ change @ moment @ change.T)) / 2


@pytest.mark.parametrize("taps", [1, 4])
def test_each_removal_costs_what_brute_force_says(taps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    size = 6
    inputs = torch.randn(taps * size, 200, generator=generator, dtype=torch.float64)
    gradients = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, taps * size, generator=generator, dtype=torch.float64)
    moment, curvature = inputs @ inputs.T / 200, gradients @ gradients.T
    columns = torch.arange(taps * size).view(size, taps)
    values, vectors = torch.linalg.eigh(curvature)
    root = (vectors * values.clamp(min=0).sqrt()).T
    scores = order([Reader(torch.linalg.inv(moment), root @ weight, columns)], size)

    gone: list[int] = []
    spent, least = 0.0, 0.0
    ranked = torch.argsort(scores, stable=True).tolist()
    for channel in ranked[:-1]:
        rest = [c for c in range(size) if c not in [g // taps for g in gone]]
        costs = {c: loss_without(weight, moment, curvature, gone + columns[c].tolist()) for c in rest}
        assert min(costs, key=costs.__getitem__) == channel
        gone += columns[channel].tolist()
        least = max(least, costs[channel] - spent)
        spent = costs[channel]
        assert scores[channel].item() == pytest.approx(least)
    assert scores[ranked[-1]].item() == pytest.approx(2 * least)


def test_of_two_equal_channels_one_is_free_and_both_are_dear() -> None:
    """What magnitude, Taylor and Fisher cannot see."""
    inputs = torch.randn(3, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs[1] = inputs[0]
    moment = inputs @ inputs.T / 500 + 1e-6 * torch.eye(3, dtype=torch.float64)
    weight = torch.tensor([[2.0, 2.0, 1.0]], dtype=torch.float64)
    scores = order([Reader(torch.linalg.inv(moment), weight.clone(), torch.arange(3)[:, None])], 3)
    assert scores[:2].min() < 1e-4
    assert scores[2].item() == pytest.approx(0.5, rel=0.2)  # the other one, with all the weight of both, is last
    assert scores[:2].max() == scores.max()


class Toy(nn.Module):
    """Two convolutions, and a loss that can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 2, 1, bias=False)
        self.b = nn.Conv2d(2, 1, 1, bias=False)
        self.a.weight.data = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
        self.b.weight.data = torch.tensor([3.0, -1.0]).view(1, 2, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.b(self.a(image))

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, None]:
        return self(batch["img"]).sum(), None


SET = ChannelSet("a", 2, (Slot("a.weight", 0, (0, 1)), Slot("b.weight", 1, (0, 1))))


def pixels(*values: float) -> Calibration:
    items = [{"img": torch.full((1, 1, 1, 1), v)} for v in values]
    return Calibration(lambda: items, lambda batch: batch, SimpleNamespace())


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # image x: the slopes by the gates are w_b * w_a * x = 3x and -2x
        ("taylor", [3 * (1 + 3) / 2, 2 * (1 + 3) / 2]),
        ("fisher", [9 * (1 + 9) / 4, 4 * (1 + 9) / 4]),
    ],
)
def test_slopes_by_hand(name: str, expected: list[float]) -> None:
    model = Toy()
    criterion: Any = create(name, {"images": 2})
    criterion.observe(model, pixels(1.0, -3.0), iter)
    assert criterion(model.state_dict(), SET).tolist() == pytest.approx(expected)
    assert all(p.grad is None for p in model.parameters())
    assert criterion.comparable


def test_the_surgeon_by_hand() -> None:
    """Both channels of the toy are multiples of the same pixel: without one of them, the other does all its work."""
    model = Toy()
    criterion: Any = create("obs", {"images": 4, "damping": 1e-6})
    criterion.observe(model, pixels(1.0, -3.0, 0.5, 2.0), iter)
    scores = criterion(model.state_dict(), SET)
    assert scores.min() < 1e-4 * scores.max() or scores.max() < 1e-3


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("obs", {"images": 0}, r"criterion\.images: must be a whole number from 1"),
        ("obs", {"damping": 0}, r"criterion\.damping: must be a number above 0 and at most 1, got 0"),
        ("taylor", {"images": True}, r"criterion\.images"),
        ("lamp", {"norm": 1}, r"'lamp' has no such option. Leave it out"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        create(name, options)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 8, (1, 3), padding=(0, 2), dilation=2),
        nn.Conv2d(4, 8, 3, groups=2),
        nn.Conv2d(4, 4, 5, padding=2, groups=4),
        nn.Linear(4, 3),
    ],
    ids=str,
)
def test_patches_times_weight_is_what_the_layer_puts_out(layer: Any) -> None:
    torch.manual_seed(0)
    value = torch.randn(2, 7, 4) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 9, 11)
    output = layer(value)
    where = layer_samples.positions("layer", output, layer, 5)
    assert where.shape == (2, 5)
    columns = layer_samples.read(layer, value, where, output.shape[-1])
    wanted = layer_samples.written(layer, output, where)
    groups, _, samples = columns.shape
    weight = layer.weight.reshape(groups, -1, columns.shape[1])
    bias = layer.bias.reshape(groups, -1, 1)
    assert samples == 10
    torch.testing.assert_close(weight @ columns + bias, wanted)


def test_least_squares_against_a_solver() -> None:
    generator = torch.Generator().manual_seed(0)
    read, wanted = torch.randn(1, 5, 300, generator=generator), torch.randn(3, 300, generator=generator)
    weight, offset = solve(read, wanted, torch.zeros(3, 5), ridge=0.0)
    design = torch.cat([read[0], torch.ones(1, 300)]).T
    best = torch.linalg.lstsq(design, wanted.T).solution.T
    torch.testing.assert_close(weight, best[:, :5], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(offset, best[:, 5], atol=1e-4, rtol=1e-4)
    heavy, _ = solve(read, wanted, torch.ones(3, 5), ridge=1e6)
    torch.testing.assert_close(heavy, torch.ones(3, 5), atol=1e-3, rtol=0)


class Redundant(nn.Module):
    """Four channels, of which two are sums of the others: a cut loses nothing that a refit could not bring back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 4, 1, bias=False)
        self.b = nn.Conv2d(4, 5, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(5)
        self.c = nn.Conv2d(5, 5, 3, padding=1, groups=5)
        with torch.no_grad():
            self.a.weight[3] = self.a.weight[0] - self.a.weight[1]

    def forward(self, image: Tensor) -> Tensor:
        return self.c(self.bn(self.b(self.a(image))))


def test_what_was_redundant_is_brought_back() -> None:
    before = Redundant().eval()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    before.train()
    before(images)  # so that the batch norm has statistics
    before.bn.momentum = 1.0
    before(images)
    before.eval()
    wanted = before(images)
    after = deepcopy(before)
    keep = (0, 1, 2)
    shapes = {n: tuple(t.shape) for n, t in before.state_dict().items()}
    plan = Plan({"a.weight": {0: keep}, "b.weight": {1: keep}}, {}, {n: shapes[n] for n in ("a.weight", "b.weight")})
    surgery.apply(after, plan)
    broken = float((after(images) - wanted).norm() / wanted.norm())
    assert refit(before, after, plan, images) == 4
    mended = float((after(images) - wanted).norm() / wanted.norm())
    assert broken > 0.2
    assert mended < 0.03
    assert not any(m._forward_pre_hooks for m in after.modules())


def test_one_tiny_image_does_not_blow_the_model_up() -> None:
    before = Redundant().eval()
    after = deepcopy(before)
    plan = Plan(
        {"a.weight": {0: (0, 1)}, "b.weight": {1: (0, 1)}}, {}, {"a.weight": (4, 3, 1, 1), "b.weight": (5, 4, 3, 3)}
    )
    surgery.apply(after, plan)
    refit(before, after, plan, torch.rand(1, 3, 1, 1))
    assert all(t.isfinite().all() for t in after.state_dict().values())
    assert (after.bn.running_var >= 0.05 * before.bn.running_var).all()


class Upsampled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, 2), nn.Conv2d(6, 2, 1)
        with torch.no_grad():
            self.a.weight[3] = self.a.weight[0] + self.a.weight[1]
            self.a.bias[3] = self.a.bias[0] + self.a.bias[1]

    def forward(self, image: Tensor) -> Tensor:
        return self.c(self.b(self.a(image)))


def test_a_transposed_convolution_is_refitted_as_well() -> None:
    torch.manual_seed(0)
    before = Upsampled()
    after = deepcopy(before)
    keep = {
        "a.weight": {0: (0, 1, 2)},
        "a.bias": {0: (0, 1, 2)},
        "b.weight": {0: (0, 1, 2), 1: (0, 2, 3, 4)},
        "b.bias": {0: (0, 2, 3, 4)},
        "c.weight": {1: (0, 2, 3, 4)},
    }
    shapes = {name: tuple(before.state_dict()[name].shape) for name in keep}
    surgery.apply(after, Plan(keep, {}, shapes))
    images = torch.randn(4, 3, 16, 16)
    wanted = before.b(before.a(images))[:, [0, 2, 3, 4]]

    def error() -> float:
        return float((after.b(after.a(images)) - wanted).norm() / wanted.norm())

    broken = error()
    refit(before, after, Plan(keep, {}, shapes), images)
    assert broken > 0.1
    assert error() < 0.05 * broken


def redundant_cut() -> tuple[Redundant, Redundant, Plan]:
    before = Redundant().eval()
    after = deepcopy(before)
    keep = {"a.weight": {0: (0, 1, 2)}, "b.weight": {1: (0, 1, 2)}}
    plan = Plan(keep, {}, {"a.weight": (4, 3, 1, 1), "b.weight": (5, 4, 3, 3)})
    surgery.apply(after, plan)
    return before, after, plan


def test_a_lack_of_memory_costs_images_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after, plan = redundant_cut()
    few = deepcopy(after)
    images = torch.randn(4, 3, 8, 8)
    stock = Redundant.forward

    def short_of_memory(self: Redundant, image: Tensor) -> Tensor:
        out = stock(self, image)
        if self is after and len(image) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return out

    monkeypatch.setattr(Redundant, "forward", short_of_memory)
    assert refit(before, after, plan, images) == 2
    assert refit(before, few, plan, images[:2]) == 2
    assert all(torch.equal(a, b) for a, b in zip(after.state_dict().values(), few.state_dict().values(), strict=True))


def test_another_error_is_no_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after, plan = redundant_cut()
    monkeypatch.setattr(Redundant, "forward", lambda self, image: self.a(image[:, :1]))
    with pytest.raises(RuntimeError, match="channels"):
        refit(before, after, plan, torch.randn(4, 3, 8, 8))


def test_frozen_layers_are_not_refitted() -> None:
    before = Redundant().eval()
    after = deepcopy(before)
    keep = (0, 1, 2)
    plan = Plan(
        {"a.weight": {0: keep}, "b.weight": {1: keep}}, {}, {"a.weight": (4, 3, 1, 1), "b.weight": (5, 4, 3, 3)}
    )
    surgery.apply(after, plan)
    old = {n: t.clone() for n, t in after.state_dict().items()}
    refit(before, after, plan, torch.randn(2, 3, 8, 8), frozen=["c", "bn"])
    changed = {n for n, t in after.state_dict().items() if not torch.equal(t, old[n])}
    assert changed == {"b.weight", "a.weight"} or changed == {"b.weight"}


def boxes(model: YOLO, data: str) -> Tensor:
    """What the model puts out for some images."""
    images = datasets.calibration(model, data, IMGSZ, 16, seed=7).images(16).float()
    with torch.no_grad():
        return model.model.float().eval()(images)[0][:, :4]


@pytest.mark.slow
def test_in_one_shot_the_surgeon_and_the_refit_each_keep_the_model_nearer_to_itself(tmp_path: Path) -> None:
    """How much of what was learned stays is measured in the long test below."""
    folder = small_data.tiny(tmp_path, train=32)
    data = str(folder / "scenes/scenes.yaml")
    settings = {**SMALL, "epochs": 16, "batch": 8, "nbs": 8, "lr0": 2e-3, "warmup_epochs": 0, "val": False, "seed": 0}
    YOLO(folder / "dense.pt").train(data=data, project=str(folder), name="dense", **settings)
    path = folder / "dense/weights/last.pt"
    wanted, far = boxes(YOLO(path), data), {}
    for criterion, count in itertools.product(("random", "obs"), (0, 32)):
        model = YOLO(path)
        plan = yolo_prune.plan(
            model, {"target": {"flops": 0.5}, "criterion": criterion, **FINE}, imgsz=IMGSZ, data=data
        )
        yolo_prune.apply(model, plan, data=data, imgsz=IMGSZ, refit=count)
        far[criterion, count] = float((boxes(model, data) - wanted).abs().mean())
    assert far["obs", 0] < 0.8 * far["random", 0]
    assert far["obs", 32] < 0.5 * far["obs", 0]
    assert far["random", 32] < 0.5 * far["random", 0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A model that has learned something, and its dataset."""
    folder = tmp_path_factory.mktemp("surgeon")
    data = str(make_dataset(folder / "scenes", train=48, val=16, imgsz=96))
    torch.manual_seed(0)
    model = YOLO("yolo11n.yaml")
    model.train(data=data, imgsz=96, epochs=25, batch=8, nbs=8, optimizer="AdamW", lr0=2e-3, amp=False, workers=0,
                warmup_epochs=0, plots=False, project=str(folder), name="dense", val=False, seed=0)  # fmt: skip
    return folder / "dense/weights/last.pt", data


def loss(model: YOLO, data: str) -> float:
    calibration = datasets.calibration(model, data, 96, 24, seed=7)
    with calibration.differentiable(model.model) as copy, torch.no_grad():
        return float(sum(loss_of(copy, batch) for batch in calibration.batches())) / len(calibration)


@pytest.mark.long
def test_in_one_shot_the_surgeon_and_the_refit_lose_least(trained: tuple[Path, str]) -> None:
    path, data = trained
    found: dict[tuple[str, int], float] = {}
    for criterion, count in itertools.product(("random", "obs"), (0, 32)):
        model = YOLO(path)
        plan = yolo_prune.plan(model, {"target": {"flops": 0.5}, "criterion": criterion}, imgsz=96, data=data)
        yolo_prune.apply(model, plan, data=data, imgsz=96, refit=count)
        found[criterion, count] = loss(model, data)
    dense = loss(YOLO(path), data)
    assert found["obs", 32] < found["obs", 0]
    assert found["random", 32] < found["random", 0]
    assert found["obs", 32] - dense < 0.5 * (found["random", 32] - dense)


def test_without_images_magnitude_stands_in_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = YOLO("yolo11n.yaml")
    found = yolo_prune.plan(model, {"target": {"flops": 0.5}, "criterion": "obs"}, imgsz=64)
    assert "criterion obs needs training images, and data= was not given" in caplog.text
    assert found.hash == yolo_prune.plan(model, {"target": {"flops": 0.5}, "criterion": "magnitude"}, imgsz=64).hash
    with pytest.raises(RecipeError, match=r"criterion: obs needs training images\. Pass a dataset.*data=coco8\.yaml"):
        planner.make_plan(model.model, load_recipe({"target": {"flops": 0.5}, "criterion": "obs"}), 64)


@pytest.mark.parametrize("name", ["taylor", "fisher"])
def test_gradients_that_are_not_finite_are_an_error_with_a_remedy(name: str) -> None:
    model = Toy()
    model.b.weight.data *= 1e38
    criterion: Any = create(name, {"images": 1})
    criterion.observe(model, pixels(1e10), iter)
    with pytest.raises(GradientError, match="are not finite, so no channel can be scored by them"):
        criterion(model.state_dict(), SET)
