# SPDX-License-Identifier: AGPL-3.0-or-later
"""How long a model takes as a function of its widths, and cuts that are corrected until they take as long as wanted."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from made_up_clock import PLACE, install, layers, made_up, table
from small_data import IMGSZ, tiny
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import get_flops

import yolo_prune
from yolo_prune.data import datasets
from yolo_prune.errors import BenchError, TargetError
from yolo_prune.graph import ChannelSet, Group, Slot
from yolo_prune.latency import probe, stopwatch, target
from yolo_prune.latency.fit import LayerTime, formula, steps
from yolo_prune.latency.layers import Layer, distinct, layers_of
from yolo_prune.latency.profile import Table, Whole, model_key
from yolo_prune.latency.stopwatch import dense_twin
from yolo_prune.measure import clock, runtimes, subjects
from yolo_prune.measure.subjects import Setting
from yolo_prune.planning import planner
from yolo_prune.planning.cost import Cost, Term, Timing
from yolo_prune.planning.select import Constraints, Goal, select
from yolo_prune.recipe.schema import Target

SMALL = {"criterion": "magnitude", "channels.round_to": 2, "channels.min": 2}


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("each", [(1, 4), (1, 8), (8, 8), (1, 16), (4, 32)])
def test_the_steps_of_a_runtime_are_found_through_noise(each: tuple[int, int]) -> None:
    found = table(each, noise=0.03)
    assert steps({layer.key: (found.layers[layer.key], layer.depthwise) for layer in distinct(layers())}) == each


def test_steps_too_small_to_see_do_no_harm() -> None:
    found = table((1, 1), noise=0.03)
    assert max(steps({layer.key: (found.layers[layer.key], layer.depthwise) for layer in distinct(layers())})) <= 4


def test_a_formula_is_found_again_and_is_never_negative() -> None:
    exact = [
        (i, o, 0.5 + 0.25 * i + 0.125 * o + 0.01 * i * o) for i, o in ((64, 32), (32, 32), (64, 16), (16, 8), (8, 8))
    ]
    assert formula(exact) == pytest.approx((0.5, 0.25, 0.125, 0.01))
    shrinking = [(64, 32, 1.0), (32, 32, 1.5), (64, 16, 1.5), (16, 8, 2.0)]  # longer the thinner: noise
    found = formula(shrinking)
    assert found.base > 1
    assert found[1:] == pytest.approx((0, 0, 0), abs=1e-4)
    assert min(found) >= 0
    assert formula([(16, 16, 0.6), (8, 8, 0.4), (4, 4, 0.3)], depthwise=True) == pytest.approx((0.2, 0, 0.025, 0))


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolo26n", "yolov9t", "yolov10n", "yolov8n-seg"])
def test_the_layers_are_all_that_a_deployed_model_computes(name: str) -> None:
    model = YOLO(f"{name}.yaml").model
    found = layers_of(model, IMGSZ)
    assert set(found) <= {n for n, _ in model.named_parameters()}
    macs = 0
    for same in found.values():
        for layer in same:
            size = np.prod([-(-s // d) for s, d in zip(layer.size, layer.stride, strict=True)])
            size = size if layer.kind == "conv" else np.prod(layer.size)
            macs += size * np.prod(layer.kernel) * layer.outs * (1 if layer.depthwise else layer.ins / layer.groups)
    deployed = model.fuse(verbose=False)
    flops = get_flops(deployed, IMGSZ)
    assert 2e-9 * macs == pytest.approx(flops, rel=0.05)  # what is left is attention


@pytest.mark.parametrize("said", [None, {}, {"ch": 4}])
def test_images_have_the_channels_that_the_model_takes(said: dict[str, int] | None, folder: Path, brief: None) -> None:
    model = DetectionModel(YOLO(folder / "dense.pt").model.yaml, ch=4, verbose=False)
    model.yaml = said if said is None else {k: v for k, v in model.yaml.items() if k != "channels"} | said
    assert layers_of(model, IMGSZ)["model.0.conv.weight"][0].ins == 4
    if said is not None:  # Ultralytics itself loads none without
        with stopwatch.Stopwatch(model, "torch", SETTING) as timed:
            assert timed.measure([]) == []


def test_a_layer_at_other_widths_is_the_same_layer_thinner() -> None:
    for layer in distinct(layers("yolov8n")):
        for ins, outs in layer.widths():
            module, x = layer.at(ins, outs).probe(batch=2)
            with torch.inference_mode():
                assert module(x).shape[:2] == (2, outs)
            weights = [p for n, p in module.named_parameters() if n.endswith("weight")]
            assert len(weights) == 4


@pytest.mark.parametrize("name", ["yolov8n", pytest.param("yolo11n", marks=pytest.mark.long)])
def test_times_add_up_for_the_dense_model_and_for_a_cut_one(name: str) -> None:
    found = table((1, 1), name)
    timing = found.sums(layers(name))
    dense = models.shared(name)
    assert timing.total(shapes(dense)) == pytest.approx(
        sum(made_up(layer, (1, 1))[0][2] for same in layers(name).values() for layer in same)
    )
    thin = models.build(name)
    models.cut(thin, models.plan_of(name, target_flops=0.5))
    again = layers_of(thin, IMGSZ)
    expected = sum(made_up(layer, (1, 1))[0][2] for same in again.values() for layer in same)
    assert timing.total(shapes(thin)) == pytest.approx(expected, rel=1e-6)


def test_a_deconvolution_reads_along_its_first_dimension() -> None:
    layer = Layer("deconv", 16, 24, (8, 8), (2, 2), (2, 2), (0, 0), (1, 1))
    found = Table(place=PLACE, layers={layer.key: made_up(layer, (1, 1))}).sums({"up.weight": [layer]})
    for ins, outs in ((16, 24), (16, 12), (8, 24)):
        wanted = made_up(layer.at(ins, outs), (1, 1))
        exact = next(ms for i, o, ms in wanted if (i, o) == (ins, outs))
        assert found.total({"up.weight": (ins, outs, 2, 2)}) == pytest.approx(exact)


def test_whole_models_set_the_sums_right() -> None:
    found, key, dense = table(), model_key(layers(), IMGSZ), shapes(models.shared("yolo11n"))
    sums = found.sums(layers()).total(dense)
    assert found.timing(layers(), key).total(dense) == pytest.approx(sums)  # nothing is known yet
    found.wholes[key] = [Whole(layers=sums, measured=2 * sums), Whole(layers=sums / 2, measured=1.6 * sums)]
    timing = found.timing(layers(), key)
    assert timing.total(dense) == pytest.approx(2 * sums)
    fixed = timing.fixed / (2 * sums)
    assert fixed > 0.5  # halving the layers saves a fifth only
    found.wholes[key] = [Whole(layers=sums, measured=sums / 2), Whole(layers=sums / 2, measured=sums / 4)]
    assert found.timing(layers(), key).total(dense) == pytest.approx(sums / 2)


def two_layers(timing: Timing) -> tuple[list[Group], Cost]:
    """Two convolutions 1 x 1 of 32 channels side by side, both of which read an image."""
    shapes_: dict[str, tuple[int, ...]] = {"a.weight": (32, 3, 1, 1), "b.weight": (32, 3, 1, 1)}
    groups = [Group((ChannelSet(n, 32, (Slot(f"{n}.weight", 0, tuple(range(32))),)),)) for n in "ab"]
    return groups, Cost(dict.fromkeys(shapes_, 1.0), frozenset(shapes_), shapes_, 64, timing=timing)


def test_a_target_is_written_with_all_that_its_measurement_depends_on() -> None:
    asked = Target(latency=0.5)
    found = target.written_out(asked, 64)
    assert (found.latency, found.imgsz) == (0.5, None)  # the image size is an argument of the run
    place = (found.format, found.device, found.batch, found.threads, found.quantize)
    assert place == ("onnx", "cpu", 1, subjects.cores(), 32)
    assert target.setting_of(found, 64) == target.setting_of(asked, 64)
    given = Target(latency=0.5, format="torch", threads=1, batch=2)
    assert target.written_out(given, 64) == given.model_copy(update={"device": "cpu", "quantize": 32})
    for other in (Target(flops=0.5), Target(latency=0.5, profile="pi.json")):
        assert target.written_out(other, 64) is other


def test_what_saves_no_time_stays() -> None:
    timing = Timing({"a.weight": Term(0.0), "b.weight": Term(0.0, 1.0)}, 10.0, 1)
    groups, cost = two_layers(timing)
    scores = {"a": torch.zeros(32, dtype=torch.float64), "b": torch.ones(32, dtype=torch.float64)}
    limits, widths = Constraints(8, 8, 0.75), {"a": 32, "b": 32}
    kept = select(groups, cost, scores, Goal("latency", 26.0, 42.0), limits, widths)
    assert {name: len(channels) for name, channels in kept.items()} == {"b": 16}  # though all of a are worth nothing
    with pytest.raises(TargetError, match=r"target\.latency: 0\.2.* at least 0\.429 is left"):
        select(groups, cost, scores, Goal("latency", 0.2 * 42, 42.0), limits, widths)


def test_widths_between_two_steps_cost_as_much_as_the_next() -> None:
    timing = Timing({"a.weight": Term(0.0, 1.0, steps=(16, 1)), "b.weight": Term(0.0, 1.0, steps=(1, 1))}, 0.0, 16)
    assert timing.total({"a.weight": (17, 3), "b.weight": (17, 3)}) == 32 + 17
    groups, cost = two_layers(timing)
    scores = {"a": torch.zeros(32, dtype=torch.float64), "b": torch.ones(32, dtype=torch.float64)}
    kept = select(groups, cost, scores, Goal("latency", 40.0, 64.0), Constraints(16, 8, 0.75), {"a": 32, "b": 32})
    assert {name: len(channels) for name, channels in kept.items()} == {"a": 16} or len(kept) == 2
    assert all(len(channels) % 16 == 0 for channels in kept.values())


def test_widths_follow_the_steps_of_the_runtime_unless_the_user_wants_more() -> None:
    model, found = models.build("yolo11n"), table((1, 16))
    timing = found.sums(layers())

    def multiples(**fields: Any) -> int:
        recipe = models.recipe(target_latency=0.8, **fields)
        plan = planner.make_plan(model, recipe, IMGSZ, timing=timing)
        assert plan.predicted.kept("latency") <= 0.8
        return int(np.gcd.reduce([g.after for g in plan.groups]))

    assert multiples() == 16
    assert multiples(channels_round_to=4) == 16  # four of sixteen would save no time
    assert multiples(channels_round_to=32) == 32


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing takes long, and nothing is known of other runs."""
    warm_up = clock.warm_up
    monkeypatch.setattr(clock, "warm_up", lambda runs, **_: warm_up(runs, seconds=0.0, least=1))
    monkeypatch.setattr(clock, "rounds_for", lambda *_: 3)
    monkeypatch.setattr(datasets, "MEMORY", tmp_path / "memory")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("timing"), train=4)


SETTING = Setting.of(IMGSZ, threads=1)


@pytest.mark.usefixtures("brief")
def test_what_was_measured_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = YOLO(folder / "dense.pt").model
    asked = Target(latency=0.8, format="torch", threads=1)
    first = target.find(model, asked, IMGSZ)
    assert first
    assert first.total(shapes(model)) > 0

    def again(*_: object, **__: object) -> Any:
        raise AssertionError("measured once more")

    with monkeypatch.context() as m:
        m.setattr(probe, "_time", again)
        m.setattr(stopwatch.Stopwatch, "__enter__", again)
        assert target.find(model, asked, IMGSZ) == first
        thin = YOLO(folder / "dense.pt")
        yolo_prune.apply(thin, yolo_prune.plan(thin, imgsz=IMGSZ, **SMALL))
        assert target.find(thin.model, asked, IMGSZ) == first  # of the dense model, whatever became of it
        with pytest.raises(AssertionError, match="measured once more"):
            target.find(model, asked, 2 * IMGSZ)
    kept = next((tmp_path / "memory").glob("latency-*.json"))
    kept.write_text("{")
    assert target.find(model, asked, IMGSZ) is not None  # a damaged file is measured anew
    assert Table.load(kept).place.threads == 1


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("form", ["torch", "torchscript", "onnx", "openvino", "ncnn"])
@pytest.mark.parametrize(
    "layer",
    [
        Layer("conv", 16, 24, (8, 8), (3, 3), (2, 2), (1, 1), (1, 1)),
        Layer("conv", 16, 16, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), 0),
        Layer("deconv", 16, 8, (8, 8), (2, 2), (2, 2), (0, 0), (1, 1)),
        Layer("linear", 16, 8, (20,)),
    ],
    ids=lambda layer: layer.kind + ("" if layer.groups else " depthwise"),
)
def test_layers_run_in_every_runtime(layer: Layer, form: str) -> None:
    for module in runtimes.FORMATS[form].modules:
        pytest.importorskip(module, reason=f"{module} is not installed here")
    found = probe.time_layers([layer], form, SETTING, iter)
    assert [pair[:2] for pair in found[layer.key]] == layer.widths()
    assert all(ms > 0 for *_, ms in found[layer.key])


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize(("form", "made_for"), [("onnx", 2), ("ncnn", 1)])
def test_layers_run_on_several_images(form: str, made_for: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in runtimes.FORMATS[form].modules:
        pytest.importorskip(module, reason=f"{module} is not installed here")

    def export(model: nn.Module, x: torch.Tensor, *rest: Any) -> Path:
        assert x.shape[0] == made_for
        return exporter(model, x, *rest)

    def look(*arguments: Any) -> Any:
        session = stock(*arguments)
        session.run()
        outputs.append(session.outputs()[0].shape)
        return session

    stock, exporter, outputs = probe._open, probe.EXPORTERS[form], []
    monkeypatch.setitem(probe.EXPORTERS, form, export)
    monkeypatch.setattr(probe, "_open", look)
    layer = Layer("conv", 16, 24, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1))
    probe.time_layers([layer], form, Setting.of(IMGSZ, batch=2, threads=1), iter)
    assert outputs == [(2, outs, 8, 8) for _, outs in layer.widths()]


@pytest.mark.usefixtures("brief")
def test_layers_have_the_precision_that_models_are_exported_in(folder: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the export extra")
    pytest.importorskip("onnxruntime", reason="needs the export extra")
    setting = Setting.of(IMGSZ, threads=1, quantize=16)
    probe._open(Layer("conv", 16, 24, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1)), "onnx", setting, tmp_path / "layer")
    (tmp_path / "dense.pt").write_bytes((folder / "dense.pt").read_bytes())
    model = YOLO(tmp_path / "dense.pt")
    exported = subjects.exported("onnx", subjects.Subject("dense", model, tmp_path / "dense.pt"), setting)
    for path in (tmp_path / "layer/layer.onnx", exported):
        weights = [t for t in onnx.load(path).graph.initializer if len(t.dims) == 4]
        assert {t.data_type for t in weights} == {onnx.TensorProto.FLOAT16}
    layer = Layer("linear", 16, 8, (20,))
    assert probe.time_layers([layer], "onnx", setting, iter)[layer.key]


def test_precisions_that_a_runtime_does_not_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for form, message in (("torch", "computes in float32 on a CPU"), ("torchscript", "only on a GPU")):
        with pytest.raises(BenchError, match=message):
            target.find(models.shared("yolo11n"), Target(latency=0.5, format=form, quantize=16), IMGSZ)
    monkeypatch.setattr(runtimes, "halves_onnx", lambda: False)
    with pytest.raises(BenchError, match="with quantize=16 on a GPU only"):
        runtimes.check(["onnx"], 16, torch.device("cpu"))


@pytest.fixture
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads, random numbers and temporary files are the same afterwards."""
    places = tmp_path / "temporary"
    places.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(places))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    states = torch.random.get_rng_state(), random.getstate(), repr(np.random.get_state())
    yield
    count = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert count == 3
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert (random.getstate(), repr(np.random.get_state())) == states[1:]
    assert list(places.glob("yolo-prune-*")) == []


@pytest.mark.usefixtures("brief", "nothing_left")
def test_a_search_leaves_everything_as_it_was(folder: Path) -> None:
    assert target.find(YOLO(folder / "dense.pt").model, Target(latency=0.8, format="torch", threads=1), IMGSZ)


@pytest.mark.usefixtures("brief", "nothing_left")
def test_a_profile_leaves_everything_as_it_was(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def time_layers(layers: list[Layer], *_: object) -> dict[str, list[LayerTime]]:
        torch.rand(1)
        torch.set_num_threads(1)
        return {layer.key: made_up(layer, (1, 1)) for layer in layers}

    install(monkeypatch)
    monkeypatch.setattr(probe, "time_layers", time_layers)
    target.profile(YOLO(folder / "dense.pt"), "torch", SETTING, tmp_path / "pi.json")


@pytest.mark.usefixtures("nothing_left")
def test_a_probe_leaves_everything_as_it_was() -> None:
    Layer("linear", 16, 8, (20,)).probe(batch=1)


@pytest.mark.usefixtures("brief", "nothing_left")
def test_a_stopwatch_that_fails_leaves_everything_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        torch.rand(1)
        torch.set_num_threads(1)
        raise BenchError("no luck")

    monkeypatch.setattr(subjects, "session", fail)
    with (
        pytest.raises(BenchError, match="no luck"),
        stopwatch.Stopwatch(YOLO(folder / "dense.pt").model, "torch", SETTING),
    ):
        pass


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"device": "7"}, "recipe.target: device=7 is not available: torch sees"),
        ({"threads": 9999}, "recipe.target: threads=9999: must be at most"),
        ({"format": "torch", "quantize": 16}, "recipe.target: format=torch computes in float32 on a CPU"),
    ],
)
def test_what_cannot_be_timed_here_is_named_as_part_of_the_recipe(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchError, match=f"^{re.escape(message)}"):
        target.setting_of(Target(latency=0.6, **fields), IMGSZ)


def test_other_targets_need_no_times() -> None:
    assert target.find(models.shared("yolo11n"), Target(flops=0.5), IMGSZ) is None


def test_the_dense_model_of_a_pruned_one_is_built_anew() -> None:
    dense, thin = models.shared("yolo26n"), models.pruned("yolo26n", target_flops=0.5)
    state = torch.random.get_rng_state()
    twin = dense_twin(thin)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert shapes(twin) == shapes(dense)
    assert dense_twin(dense) is dense


def test_a_stopwatch_times_models_in_turn_and_leaves_nothing_behind(
    folder: Path, brief: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dense, threads = YOLO(folder / "dense.pt"), torch.get_num_threads()
    thin = YOLO(folder / "dense.pt")
    yolo_prune.apply(thin, yolo_prune.plan(thin, imgsz=IMGSZ, **SMALL))
    with stopwatch.Stopwatch(dense.model, "torch", SETTING) as timed:
        first, second = timed.measure([thin.model, dense.model])
        assert list(tmp_path.glob("yolo-prune-*"))
    assert first.dense_ms == second.dense_ms > 0
    assert first.ms / first.dense_ms == pytest.approx(first.ratio.median, rel=0.9)
    assert second.ratio.low <= second.ratio.median <= second.ratio.high
    assert not list(tmp_path.glob("yolo-prune-*"))
    assert torch.get_num_threads() == threads
