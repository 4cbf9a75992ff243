# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the loss rises by as layers get thinner: measured right, remembered, and used."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_data
import torch
import zoo
from torch import Tensor, nn
from ultralytics import YOLO

import yolo_prune
from yolo_prune import load_recipe
from yolo_prune.cut import surgery
from yolo_prune.data import datasets
from yolo_prune.data.calibration import Calibration, loss_of
from yolo_prune.env.image_size import Rectangle
from yolo_prune.errors import GradientError, RecipeError
from yolo_prune.graph import ChannelSet, Group, Slot, trace
from yolo_prune.planning import cost, planner
from yolo_prune.planning.sensitivity import curves

SHARES = (0.25, 0.5, 0.75)
TINY = {
    "target.flops": 0.6,
    "criterion": "magnitude",
    "channels.round_to": 2,
    "channels.min": 2,
    "allocation": {"name": "sensitivity", "images": 3},
}


class Toy(nn.Module):
    """Two layers of four channels; the loss is the distance to what they put out at first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(n, m, bias=False) for n, m in ((1, 4), (4, 4), (4, 1)))
        self.a.weight.data = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
        self.b.weight.data = torch.eye(4)
        self.c.weight.data = torch.tensor([[1.0, 1.0, -2.0, 0.5]])
        self.passes = [0]

    def forward(self, image: Tensor) -> Tensor:
        self.passes[0] += 1
        return self.c(self.b(self.a(image)))

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, None]:
        return (self(batch["img"]) - batch["wanted"]).abs().sum(), None

    def __deepcopy__(self, memo: dict[int, Any]) -> Toy:
        twin = Toy()
        twin.load_state_dict(self.state_dict())
        twin.passes = self.passes  # counted over all copies
        return twin


def toy_group(name: str, reader: str) -> tuple[Group, list[int]]:
    slots = (Slot(f"{name}.weight", 0, (0, 1, 2, 3)), Slot(f"{reader}.weight", 1, (0, 1, 2, 3)))
    return Group((ChannelSet(name, 4, slots, (name,)),)), [4, 3, 2, 1]


GROUPS = [toy_group("a", "b"), toy_group("b", "c")]
SCORES = {name: torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64) for name in "ab"}
# The model puts out (1 + 2 - 6 + 2) x = -x: without channels 0, 0 to 1, 0 to 2 it is -2 x, -4 x, 2 x.
RISES = {0.25: 1.0, 0.5: 3.0, 0.75: 3.0}


def toys(memory: Path | None = None) -> Calibration:
    items = [{"img": torch.tensor([[x]]), "wanted": torch.tensor([[-x]])} for x in (1.0, 3.0)]
    return Calibration(lambda: items, lambda batch: batch, SimpleNamespace(box=7.5), memory)


def measure(model: nn.Module, calibration: Calibration, progress: Any = iter, **change: Any) -> Any:
    wanted: dict[str, Any] = {"levels": GROUPS, "scores": SCORES, "shares": (1 / 3, 2 / 3, 1.0), **change}
    return curves(model, wanted["levels"], wanted["scores"], wanted["shares"], calibration, progress)


def test_curves_by_hand() -> None:
    model = Toy()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = measure(model, toys())
    for name in "ab":  # images 1 and 3: on average twice the rise
        assert found[name] == [(share, pytest.approx(2 * rise)) for share, rise in RISES.items()]
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_loss_that_falls_again_counts_as_the_highest_before_it_and_none_counts_below_zero() -> None:
    scores = {**SCORES, "a": torch.tensor([2.0, 1.0, 4.0, 3.0], dtype=torch.float64)}  # 1 0 3 2 go
    found = measure(Toy(), toys(), scores=scores)
    assert [loss for _, loss in found["a"]] == pytest.approx([2 * 2, 2 * 3, 2 * 5])
    items = [{"img": torch.tensor([[1.0]]), "wanted": torch.tensor([[-2.0]])}]  # better without channel 0
    found = measure(Toy(), replace(toys(), load=lambda: items))
    assert [loss for _, loss in found["a"]] == pytest.approx([0, 1, 3])


def test_shares_are_of_what_may_go_and_no_level_is_measured_twice() -> None:
    model = Toy()
    levels = [(GROUPS[0][0], [4, 3, 2])]
    assert measure(model, toys(), levels=levels, shares=(0.4, 0.5, 0.6, 1.0))["a"] == [(0.25, 2.0), (0.5, 6.0)]
    assert model.passes == [2 * (1 + 2)]


def test_a_finished_measurement_is_remembered(tmp_path: Path) -> None:
    model = Toy()
    first = measure(model, toys(tmp_path))
    assert model.passes == [2 * (1 + 6)]
    assert measure(model, toys(tmp_path)) == first
    assert model.passes == [2 * (1 + 6)]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_measurement_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    def killed(groups: Iterable[Any]) -> Iterator[Any]:
        yield from list(groups)[:1]
        raise KeyboardInterrupt

    model = Toy()
    with pytest.raises(KeyboardInterrupt):
        measure(model, toys(tmp_path), killed)
    assert model.passes == [2 * (1 + 3)]
    assert measure(model, toys(tmp_path)) == measure(model, toys())
    assert model.passes == [2 * (1 + 3) + 2 * 3 + 2 * (1 + 6)]


def other_weights(model: Toy, calibration: Calibration) -> Calibration:
    model.b.weight.data *= 2
    return calibration


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        (other_weights, 7),
        (lambda _, c: replace(c, load=lambda: [*c.items[:1], {**c.items[1], "wanted": torch.zeros(1, 1)}]), 7),
        (lambda _, c: replace(c, settings=SimpleNamespace(box=1.0)), 7),
        (lambda _, c: replace(c, settings=SimpleNamespace(box=7.5, save_dir="elsewhere")), 0),
    ],
)
def test_what_was_measured_for_something_else_does_not_count(change: Any, passes: int, tmp_path: Path) -> None:
    model = Toy()
    measure(model, toys(tmp_path))
    model.passes[0] = 0
    measure(model, change(model, toys(tmp_path)))
    assert model.passes == [2 * passes]
    assert len(list(tmp_path.iterdir())) == 1 + bool(passes)


def test_only_groups_whose_channels_go_in_another_order_are_measured_anew(tmp_path: Path) -> None:
    model = Toy()
    first = measure(model, toys(tmp_path))
    model.passes[0] = 0
    scores = {**SCORES, "a": SCORES["a"].flip(0)}
    found = measure(model, toys(tmp_path), scores=scores)
    assert model.passes == [2 * 3]
    assert found["b"] == first["b"]
    measure(model, toys(tmp_path))
    assert model.passes == [2 * 3]  # what was known before is not lost


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"version": 1}',
        b'{"version": 1, "losses": [1]}',
        b'{"version": 1, "losses": {"whole": "x"}}',
        b'{"version": 1, "losses": {"whole": NaN}}',
        b'{"version": 9, "losses": {"whole": 1.0}}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_measured_anew(damage: bytes, tmp_path: Path) -> None:
    model = Toy()
    first = measure(model, toys(tmp_path))
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    path.write_bytes(damage)
    assert measure(model, toys(tmp_path)) == first
    assert model.passes == [4 * (1 + 6)]
    assert path.read_bytes() == good
    assert set(json.loads(good)) == {"version", "losses"}


def test_a_disk_that_cannot_be_written_to_costs_no_more_than_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="The measured losses could not be written to"):
        found = measure(Toy(), toys(tmp_path / "file" / "folder"))
    assert found == measure(Toy(), toys())


def test_a_loss_that_is_not_finite_is_an_error_with_a_remedy() -> None:
    model = Toy()
    model.b.weight.data[0, 0] = float("nan")
    with pytest.raises(GradientError, match=r"The loss of the whole model is not finite.*another allocation"):
        measure(model, toys())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, r"allocation\.images: must be a whole number from 1"),
        ({"shares": []}, r"allocation\.shares: must be a list of 1 to 20 numbers, got \[\]"),
        ({"shares": 0.5}, r"allocation\.shares: must be a list of 1 to 20 numbers, got 0\.5"),
        ({"shares": [0.5, 2]}, r"allocation\.shares: must be a number above 0 and at most 1, got 2"),
        ({"share": 1}, r"allocation\.share: 'sensitivity' has no such option. The options are: images, shares"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        planner.rehearsal(load_recipe("half-flops", {"allocation": {"name": "sensitivity", **options}}))


def test_images_are_enough_for_the_criterion_and_for_the_allocation() -> None:
    def count(**overrides: Any) -> int:
        return planner.images_for(load_recipe("half-flops", {k.replace("_", "."): v for k, v in overrides.items()}))

    assert count(criterion="magnitude") == 0
    assert count(criterion="magnitude", allocation="sensitivity") == 32
    assert count(criterion_images=16, allocation="sensitivity") == 32
    assert count(criterion_images=64, allocation_name="sensitivity", allocation_images=8) == 64
    recipe = load_recipe("half-flops", {"allocation": "sensitivity"})
    stand_in = planner.rehearsal(recipe)
    assert (stand_in.criterion.name, stand_in.allocation.name) == ("magnitude", "global")
    assert planner.rehearsal(load_recipe("half-flops", {"allocation": "uniform"})).allocation.name == "uniform"


def test_without_images_global_stands_in_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = YOLO("yolo11n.yaml")
    asked = {"target": {"flops": 0.5}, "criterion": "magnitude", "allocation": "sensitivity"}
    found = yolo_prune.plan(model, asked, imgsz=64)
    assert "allocation sensitivity needs training images, and data= was not given" in caplog.text
    assert "uses the allocation global" in caplog.text
    assert found.hash == yolo_prune.plan(model, {**asked, "allocation": "global"}, imgsz=64).hash
    with pytest.raises(RecipeError, match=r"allocation: sensitivity needs training images\..*recipe\.allocation=gl"):
        planner.make_plan(model.model, load_recipe(asked), 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data.tiny(tmp_path_factory.mktemp("sensitivity"), train=6)


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets, "MEMORY", tmp_path / "memory")
    return tmp_path / "memory"


def test_from_a_dataset_to_a_plan(folder: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, passes = YOLO(folder / "dense.pt"), folder / "scenes/scenes.yaml", [0]
    mean_loss = Calibration.mean_loss

    def counted(self: Calibration, twin: Any) -> float:
        passes[0] += len(self)
        return mean_loss(self, twin)

    monkeypatch.setattr(Calibration, "mean_loss", counted)
    plan = yolo_prune.plan(model, None, imgsz=32, data=data, **TINY)
    assert 0.58 < plan.predicted.flops_kept <= 0.6
    assert passes[0] > 3 * 20
    (kept,) = memory.iterdir()
    assert kept.name.startswith("sensitivity-")
    measured = passes[0]
    assert yolo_prune.plan(model, None, imgsz=32, data=data, **TINY).hash == plan.hash
    assert passes[0] == measured
    other = yolo_prune.plan(model, None, imgsz=32, data=data, **TINY | {"allocation": "global"})
    assert other.hash != plan.hash
    yolo_prune.apply(model, plan)


def test_training_images_have_the_size_that_was_asked_for(folder: Path) -> None:
    model = YOLO(folder / "dense.pt")
    calibration = datasets.calibration(model, folder / "scenes/scenes.yaml", Rectangle(64, 96), 2)
    assert calibration.images(2).shape == (2, 3, 64, 96)
    with calibration.differentiable(model.model) as twin:
        assert math.isfinite(calibration.mean_loss(twin))


def test_a_measured_rise_is_that_of_the_pruned_model(folder: Path, memory: Path) -> None:
    """Removing a group's channels for good costs what silencing them was measured to cost."""
    model = YOLO(folder / "dense.pt")
    module = zoo.randomise(model.model.double(), 3)  # or the biases of the head would say it all
    calibration = datasets.calibration(model, folder / "scenes/scenes.yaml", 64, 3)
    calibration = replace(calibration, prepare=lambda b: {**b, "img": b["img"].double() / 255}, memory=None)
    graph = trace(module, imgsz=64)
    group = next(g for g in graph.groups if g.name == "model.3")
    scores = {s.name: torch.arange(s.size, dtype=torch.float64) for s in group.sets}
    found = curves(module, [(group, [group.grain, group.grain // 2])], scores, [1.0], calibration, iter)[group.name]
    assert [share for share, _ in found] == [0.5]
    kept = {s.name: tuple(range(s.size // 2, s.size)) for s in group.sets}
    pruned = calibration.twin(module)
    surgery.apply(pruned, planner.build_plan(graph, cost.cost_of(module, graph), kept, {}))

    def loss(twin: Any) -> float:
        with torch.no_grad():
            return sum(float(loss_of(twin, batch)) for batch in calibration.batches()) / 3

    rise = loss(pruned) - loss(calibration.twin(module))
    assert rise > 1e-6
    assert found[0][1] == pytest.approx(rise, rel=1e-6)
