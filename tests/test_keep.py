# SPDX-License-Identifier: AGPL-3.0-or-later
"""A pruned model in a run of any trainer: its structure stays, and the user's methods run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_data
import torch
import yaml
from small_runs import FINE, PLAIN, RUNS
from torch import nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.modules.head import Detect
from ultralytics.nn.tasks import DetectionModel, load_checkpoint

import yolo_prune
from yolo_prune.cut import surgery
from yolo_prune.cut.record import Record, read_record, write_record
from yolo_prune.errors import RunError
from yolo_prune.run import keep

RUN: dict[str, Any] = RUNS["heads"]
PRUNE: dict[str, Any] = {
    "callbacks": "prune",
    "recipe": {**PLAIN, **FINE, "target": {"flops": 0.6}, "schedule": {"rounds": 1}},
}
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dense.pt`, its half `cut.pt`, `tiny.yaml`, and the dataset `scenes/scenes.yaml`."""
    folder = small_data.tiny(tmp_path_factory.mktemp("keep"), train=4)
    model = YOLO(folder / "dense.pt")
    model.model.names = names_of(folder)
    model.save(folder / "dense.pt")
    half(folder, folder / "cut.pt", 0.5)
    return folder


def half(folder: Path, path: Path, flops: float) -> Path:
    model = YOLO(folder / "dense.pt")
    yolo_prune.apply(model, yolo_prune.plan(model, {"target": {"flops": flops}, **FINE}, imgsz=64))
    model.save(path)
    return path


def names_of(folder: Path) -> dict[int, str]:
    return dict(yaml.safe_load((folder / "scenes/scenes.yaml").read_text())["names"])


def dataset(folder: Path, path: Path, **changes: Any) -> str:
    """The dataset with other facts."""
    facts = yaml.safe_load((folder / "scenes/scenes.yaml").read_text())
    path.write_text(yaml.safe_dump({**facts, "path": str(folder / "scenes"), **changes}))
    return str(path)


def train(model: YOLO, folder: Path, project: Path, **settings: Any) -> YOLO:
    model.train(**{"data": str(folder / "scenes/scenes.yaml"), "project": str(project), **RUN, **settings})
    return model


def in_memory(folder: Path) -> YOLO:
    model = YOLO(folder / "dense.pt")
    yolo_prune.apply(model, yolo_prune.plan(model, {"target": {"flops": 0.5}, **FINE}, imgsz=64))
    return model


class Stop(Exception):
    """What ends the runs that are resumed."""


def interrupted(model: YOLO, folder: Path, project: Path, **settings: Any) -> Path:
    """`last.pt` of a run that was interrupted after its first epoch."""

    def stop(trainer: Any) -> None:
        raise Stop

    model.add_callback("on_model_save", stop)
    with pytest.raises(Stop):
        train(model, folder, project, **{**settings, "epochs": 2, "name": "run"})
    return project / "run/weights/last.pt"


def widths(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


# --- the user's trainer ---

OVERRIDES = (
    "_setup_scheduler _setup_train build_dataset build_optimizer final_eval get_dataloader get_dataset get_model "
    "get_validator label_loss_items optimizer_step plot_metrics plot_training_labels plot_training_samples "
    "preprocess_batch progress_string resume_training save_metrics save_model set_class_weights set_model_attributes "
    "setup_model validate"
).split()
called: list[str] = []


def recorded(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(name)
        return getattr(super(Recording, self), name)(*args, **kwargs)

    return method


class Recording(DetectionTrainer):
    """A trainer of the user's own, with all methods that a user may override."""


for override in OVERRIDES:
    setattr(Recording, override, recorded(override))


@slow
@pytest.mark.parametrize("run", ["prune", "further", "memory", "resume", "resume further"])
def test_all_methods_of_a_users_trainer_run(run: str, folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"trainer": Recording, "plots": True}
    if "resume" in run:
        start, added = ("cut.pt", {}) if "further" in run else ("dense.pt", PRUNE)
        last = interrupted(YOLO(folder / start), folder, tmp_path, **settings, **added)
        called.clear()
        YOLO(last).train(resume=True, trainer=Recording)
    else:
        model = in_memory(folder) if run == "memory" else YOLO(folder / ("dense.pt" if run == "prune" else "cut.pt"))
        called.clear()
        train(model, folder, tmp_path, **settings, **(PRUNE if run == "prune" else {}))
    assert set(OVERRIDES) - set(called) == set()
    assert called.count("get_model") == 1
    (best,) = tmp_path.rglob("best.pt")
    assert yolo_prune.is_pruned(best)


class MyModel(DetectionModel):
    """A model with its own loss, and with a weight that no checkpoint has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(1))

    def init_criterion(self) -> Any:
        called.append("init_criterion")
        return super().init_criterion()


class MyHead(Detect):
    """A head of the user's own."""


class WithSuper(DetectionTrainer):
    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        model = super().get_model(cfg, weights, verbose)
        model.mine = True
        return model


class OwnModel(DetectionTrainer):
    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        model = MyModel(cfg, nc=self.data["nc"], ch=self.data["channels"], verbose=False)
        if weights is not None:
            model.load(weights)
        model.mine = True
        return model


class OwnHead(WithSuper):
    """The head is replaced by one that has the widths of the dense model."""

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        model = super().get_model(cfg, weights, verbose)
        old, head = model.model[-1], MyHead(self.data["nc"], ch=(64,))
        head.i, head.f, head.type, head.stride = old.i, old.f, old.type, old.stride
        model.model[-1] = head
        return model


class LoadsItself(DetectionTrainer):
    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        model = super().get_model(cfg, None, verbose)
        if weights is not None:
            model.load(weights)
        model.mine = True
        return model


class AroundSuper(DetectionTrainer):
    """`super()` is not used, so that nothing between this class and Ultralytics' own is called."""

    def get_model(self, cfg: Any, weights: Any) -> Any:
        model = DetectionTrainer.get_model(self, cfg, weights)
        model.mine = True
        return model


def at_start(model: YOLO) -> dict[str, Any]:
    """What a run begins with, to be filled."""
    seen: dict[str, Any] = {}

    def look(trainer: Any) -> None:
        seen.update(model=trainer.model, state={k: v.clone() for k, v in trainer.model.state_dict().items()})

    model.add_callback("on_train_start", look)
    return seen


USERS = {"super": WithSuper, "model": OwnModel, "head": OwnHead, "load": LoadsItself, "around": AroundSuper}


@slow
@pytest.mark.parametrize("name", USERS)
def test_a_pruned_model_begins_with_its_weights_in_the_model_that_the_user_builds(
    name: str, folder: Path, tmp_path: Path
) -> None:
    called.clear()
    seen = at_start(model := YOLO(folder / "cut.pt"))
    train(model, folder, tmp_path, trainer=USERS[name], lr0=0.01)
    pruned = load_checkpoint(folder / "cut.pt")[0]
    assert seen["model"].mine
    assert type(seen["model"]) is (MyModel if name == "model" else DetectionModel)
    assert (type(seen["model"].model[-1]) is MyHead) is (name == "head")
    assert ("init_criterion" in called) is (name == "model")
    for tensor, value in pruned.float().state_dict().items():
        assert torch.equal(seen["state"][tensor], value), tensor
    assert set(seen["state"]) - set(pruned.state_dict()) == ({"gain"} if name == "model" else set())
    best = load_checkpoint(tmp_path / "train/weights/best.pt")[0]
    assert widths(best).items() >= widths(pruned).items()
    assert read_record(best).plan.keep == read_record(pruned).plan.keep
    assert best.mine
    assert any(not torch.equal(value.float(), seen["state"][t]) for t, value in best.state_dict().items())


@slow
@pytest.mark.parametrize("run", ["prune", "prune further", "resume", "resume further", "classes"])
def test_a_model_of_the_users_own_in_every_other_kind_of_run(run: str, folder: Path, tmp_path: Path) -> None:
    start = YOLO(folder / ("dense.pt" if run in ("prune", "resume") else "cut.pt"))
    if run == "classes":
        more = {**names_of(folder), 5: "more"}
        model = train(start, folder, tmp_path, trainer=OwnModel, data=dataset(folder, tmp_path / "d.yaml", names=more))
        assert model.model.model[-1].nc == model.model.model[-1].cv3[0][-1].out_channels == 6
    elif "resume" in run:
        last = interrupted(start, folder, tmp_path, trainer=OwnModel, **({} if "further" in run else PRUNE))
        model = YOLO(last)
        model.train(resume=True, trainer=OwnModel)
    else:
        recipe = {**PRUNE["recipe"], "target": {"flops": 0.35}} if "further" in run else PRUNE["recipe"]
        model = train(start, folder, tmp_path, trainer=OwnModel, **{**PRUNE, "recipe": recipe})
    assert type(model.model) is MyModel
    assert model.model.mine
    assert yolo_prune.is_pruned(model)


@slow
def test_the_model_that_the_user_changes_keeps_the_weights_that_he_gave_it(folder: Path, tmp_path: Path) -> None:
    class Zeroed(DetectionTrainer):
        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
            model = super().get_model(cfg, weights, verbose)
            nn.init.zeros_(model.model[0].conv.weight)
            return model

    seen = at_start(model := YOLO(folder / "cut.pt"))
    train(model, folder, tmp_path, trainer=Zeroed)
    assert not seen["state"]["model.0.conv.weight"].any()


class OtherModel(DetectionTrainer):
    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        return DetectionModel("yolo11n.yaml", nc=self.data["nc"], verbose=False)


class WiderModel(DetectionTrainer):
    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        wider = {**cfg, "backbone": [[f, n, m, [2 * a[0], *a[1:]]] for f, n, m, a in cfg["backbone"]]}
        return DetectionModel(wider, nc=self.data["nc"], verbose=False)


class NoModel(DetectionTrainer):
    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        super().get_model(cfg, weights, verbose)


class ReplacesModel(DetectionTrainer):
    def setup_model(self) -> Any:
        checkpoint = super().setup_model()
        self.model = DetectionModel("yolo11n.yaml", nc=self.data["nc"], verbose=False)
        return checkpoint


class MoreOutputs(DetectionTrainer):
    """The pruned model gets other convolutions at the end of its head."""

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        model = super().get_model(cfg, weights, verbose)
        for branch in model.model[-1].cv3:
            branch[-1] = nn.Conv2d(branch[-1].in_channels, 7, 1)
        return model


class MoreOutputsAnew(DetectionTrainer):
    """The same, in a model that is built from `cfg`."""

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        model = DetectionModel(cfg, nc=7, verbose=False)
        model.nc, model.model[-1].nc = self.data["nc"], self.data["nc"]
        return model


@slow
@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (
            MoreOutputs,
            r"MoreOutputs\.get_model .* 'model\.10\.cv3\.0\.2\.weight' has the shape \(7, .* instead of \(5, ",
        ),
        (MoreOutputsAnew, r"'model\.10\.cv3\.0\.2\.weight' has the shape \(7, 64, 1, 1\) instead of \(5, 64, 1, 1\)"),
        (OtherModel, r"OtherModel\.get_model builds another model than the one .* 'model\.4\.conv\.weight' is missing"),
        (WiderModel, r"'model\.0\.conv\.weight' has the shape \(32, 3, 3, 3\) instead of \(16, 3, 3, 3\)"),
        (NoModel, r"NoModel\.get_model returned None instead of a model"),
        (ReplacesModel, r"ReplacesModel\.setup_model replaces the pruned model by a model with another structure"),
    ],
)
def test_a_model_that_cannot_have_the_pruned_structure_is_refused(
    trainer: type, message: str, folder: Path, tmp_path: Path
) -> None:
    model = YOLO(folder / "cut.pt")
    before = widths(model.model)
    with pytest.raises(RunError, match=message):
        train(model, folder, tmp_path, trainer=trainer)
    assert list(tmp_path.rglob("*.pt")) == []
    assert widths(model.model) == before


def never() -> nn.Module:
    raise AssertionError("the stock model is built only if shapes differ")


def test_layers_that_the_user_puts_into_the_pruned_model_may_have_other_names() -> None:
    model = DetectionModel({**small_data.SHORT, "nc": 5}, verbose=False)
    pruned = DetectionModel({**small_data.SHORT, "nc": 5}, verbose=False)
    del model.model[0].bn
    model.model[0].norm = nn.BatchNorm2d(16)
    keep.adopt(model, pruned, edited=True, builder="Mine", stock=never)
    with pytest.raises(RunError, match=r"'model\.0\.bn\.weight' is missing"):
        keep.adopt(model, pruned, edited=False, builder="Mine", stock=lambda: pruned)


def test_a_head_with_the_hidden_widths_of_other_classes_takes_those_of_the_pruned_model() -> None:
    """Ultralytics' `load` keeps the hidden widths of the first training, which `cfg` does not tell."""
    many = DetectionModel("yolo11n.yaml", nc=80, verbose=False)
    few = DetectionModel("yolo11n.yaml", nc=3, verbose=False)
    few.load(many, verbose=False)
    fresh = DetectionModel("yolo11n.yaml", nc=3, verbose=False)
    assert fresh.model[-1].cv3[0][-1].in_channels != few.model[-1].cv3[0][-1].in_channels
    plan = yolo_prune.plan(few, {"target": {"flops": 0.5}}, imgsz=64)
    surgery.apply(few, plan)
    write_record(few, Record({}, plan))
    keep.adopt(fresh, few, edited=False, builder="Mine", stock=partial(DetectionModel, "yolo11n.yaml", nc=3))
    assert yolo_prune.is_pruned(fresh)
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(fresh.eval()(image)[0], few.eval()(image)[0])


# --- the dataset of a resumed run ---

CHANGES: dict[str, tuple[Callable[[dict[int, str]], dict[str, Any]], str]] = {
    "more": (lambda names: {"names": {**names, 5: "more"}}, r"\(classes: 5 in the checkpoint, 6 in the dataset\)"),
    "fewer": (lambda names: {"names": {i: names[i] for i in range(4)}}, "5 in the checkpoint, 4 in the dataset"),
    "order": (lambda names: {"names": {i: names[4 - i] for i in range(5)}}, "the order of the classes"),
    "grey": (lambda names: {"channels": 1}, r"\(channels: 3 in the checkpoint, 1 in the dataset\)"),
}


@slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("run", ["cut", "not yet cut", "further"])
def test_a_run_is_not_resumed_with_another_dataset(run: str, change: str, folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {} if run == "further" else PRUNE
    if run == "not yet cut":
        settings = {**PRUNE, "recipe": {**PRUNE["recipe"], "schedule": {"rounds": 1, "start": 1}}}
    data = dataset(folder, tmp_path / "data.yaml")
    start = YOLO(folder / ("cut.pt" if run == "further" else "dense.pt"))
    last = interrupted(start, folder, tmp_path, data=data, **settings)
    content = last.read_bytes()
    changes, message = CHANGES[change]
    dataset(folder, tmp_path / "data.yaml", **changes(names_of(folder)))
    with pytest.raises(RunError, match=rf"The dataset was changed since this run began .*{message}.* leave out resume"):
        YOLO(last).train(resume=True)
    assert last.read_bytes() == content
    dataset(folder, tmp_path / "data.yaml")
    model = YOLO(last)
    model.train(resume=True)
    assert yolo_prune.is_pruned(model)


def test_what_a_model_and_a_dataset_differ_in() -> None:
    model = DetectionModel({**small_data.SHORT, "nc": 3}, verbose=False)
    model.names, model.kpt_shape = {0: "a", 1: "b", 2: "c"}, [17, 3]
    same = {"nc": 3, "names": {0: "a", 1: "b", 2: "c"}, "channels": 3, "kpt_shape": (17, 3)}
    assert keep.differences(model, same, True) == {}
    assert keep.differences(model, {**same, "names": ["a", "b", "c"]}, True) == {}
    assert keep.differences(model, {**same, "names": ["x", "y", "z"]}, True) == {}
    turned = {**same, "names": ["c", "b", "a"]}
    assert keep.differences(model, turned, True) == {"names": (model.names, {0: "c", 1: "b", 2: "a"})}
    assert keep.differences(model, turned, False) == {}
    assert keep.differences(model, {**same, "kpt_shape": [2, 3]}, True) == {"kpt_shape": ([17, 3], [2, 3])}
    with pytest.raises(RunError, match=r"kpt_shape: \[17, 3\] in the checkpoint, \[2, 3\] in the dataset"):
        keep.check_same_data(model, {**same, "kpt_shape": [2, 3]}, True)


# --- from a pruned file into another model, and back ---

ROUTES: dict[str, tuple[Callable[[Path], YOLO], Callable[[Path], Any], str]] = {
    "yaml": (lambda f: YOLO(f / "tiny.yaml"), lambda f: f / "cut.pt", "is not pruned, but the weights to load are"),
    "text": (lambda f: YOLO(f / "dense.pt"), lambda f: str(f / "cut.pt"), "is not pruned, but the weights"),
    "module": (lambda f: YOLO(f / "dense.pt"), lambda f: load_checkpoint(f / "cut.pt")[0], "is not pruned, but the"),
    "checkpoint": (
        lambda f: YOLO(f / "dense.pt"),
        lambda f: torch.load(f / "cut.pt", weights_only=False),
        "is not pruned, but the weights to load are",
    ),
    "memory": (lambda f: YOLO(f / "dense.pt"), lambda f: in_memory(f).model, "is not pruned, but the weights"),
    "back": (lambda f: YOLO(f / "cut.pt"), lambda f: f / "dense.pt", "is pruned, but the weights to load are not"),
    "into memory": (in_memory, lambda f: f / "dense.pt", "is pruned, but the weights to load are not"),
    "another cut": (
        lambda f: YOLO(f / "cut.pt"),
        lambda f: half(f, f / "other.pt", 0.7),
        "This model and the weights to load were pruned differently",
    ),
}


@pytest.mark.parametrize("inner", [False, True], ids=["YOLO", "module"])
@pytest.mark.parametrize("route", ROUTES)
def test_load_does_not_mix_two_structures(route: str, inner: bool, folder: Path) -> None:
    target, weights, message = ROUTES[route]
    model, source = target(folder), weights(folder)
    if inner and isinstance(source, str | Path):
        source = load_checkpoint(source)[0]
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    checkpoint = model.ckpt
    with pytest.raises(RunError, match=rf"{message}.* start from the file of the weights: YOLO\('") as e:
        (model.model if inner else model).load(source)
    if isinstance(weights(folder), Path):
        assert str(e.value).endswith(
            f"Instead, start from the file of the weights: YOLO('{weights(folder)}').train(...)."
        )
    if route == "memory":
        assert "Instead, save the model of the weights with its save(), and start" in str(e.value)
    assert model.ckpt is checkpoint
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_load_between_models_of_one_structure_is_as_in_ultralytics(folder: Path, tmp_path: Path) -> None:
    other = YOLO(folder / "cut.pt")
    for tensor in other.model.parameters():
        tensor.data.fill_(0.25)
    other.save(tmp_path / "other.pt")
    model = YOLO(folder / "cut.pt").load(tmp_path / "other.pt")
    assert yolo_prune.is_pruned(model)
    assert all((tensor == 0.25).all() for tensor in model.model.parameters())
    dense = YOLO(folder / "tiny.yaml").load(folder / "dense.pt")
    wanted = load_checkpoint(folder / "dense.pt")[0].state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in dense.model.state_dict().items())


def test_load_between_a_pruned_model_and_the_same_one_for_other_classes_is_allowed(folder: Path) -> None:
    def build(model: Any, nc: int) -> nn.Module:
        return DetectionModel(dict(model.yaml), nc=nc, verbose=False)

    first, second = load_checkpoint(folder / "cut.pt")[0], load_checkpoint(folder / "cut.pt")[0]
    keep.fit(second, {"nc": 6, "names": {**names_of(folder), 5: "more"}}, True, build)
    assert read_record(second).plan.shapes != read_record(first).plan.shapes
    for tensor in second.parameters():
        tensor.data.fill_(0.25)
    first.load(second, verbose=False)
    assert (first.model[0].conv.weight == 0.25).all()


@slow
def test_a_trainer_without_yolo_does_not_train_the_dense_model_instead(folder: Path, tmp_path: Path) -> None:
    settings = {"model": str(folder / "cut.pt"), "data": str(folder / "scenes/scenes.yaml"), "project": str(tmp_path)}
    with pytest.raises(RunError, match=r"is not pruned, but the weights to load are.*YOLO\('.*cut\.pt'\)\.train\("):
        DetectionTrainer(overrides={**settings, **RUN}).train()
    assert list(tmp_path.rglob("*.pt")) == []


@pytest.mark.parametrize("settings", [{}, PRUNE], ids=["train", "prune"])
def test_the_yaml_of_a_pruned_model_does_not_build_it(settings: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.yaml"
    path.write_text(yaml.safe_dump(load_checkpoint(folder / "cut.pt")[0].yaml))
    with pytest.raises(RunError, match=r"cut\.yaml' describes a pruned model, but a YAML file always builds the dense"):
        train(YOLO(path), folder, tmp_path / "runs", **settings)
    assert not (tmp_path / "runs").exists()


def test_pretrained_in_a_file_of_settings_is_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({"pretrained": str(folder / "cut.pt")}))
    with pytest.raises(RunError, match=r"pretrained=.*cut\.pt is a pruned model"):
        train(YOLO(folder / "tiny.yaml"), folder, tmp_path / "runs", cfg=str(tmp_path / "settings.yaml"))
    assert not (tmp_path / "runs").exists()


@slow
def test_weights_that_were_reset_are_trained_in_the_pruned_structure(folder: Path, tmp_path: Path) -> None:
    model = YOLO(folder / "cut.pt").reset_weights()
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    with pytest.raises(RunError, match=r"After reset_weights\(\), which sets it, pass pretrained=True"):
        train(model, folder, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    seen = at_start(model)
    train(model, folder, tmp_path, pretrained=True)
    assert all(torch.equal(seen["state"][name], tensor) for name, tensor in before.items())
    assert yolo_prune.is_pruned(model)
