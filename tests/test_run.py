# SPDX-License-Identifier: AGPL-3.0-or-later
"""Real Ultralytics runs, tiny: what a user gets, and that nothing is lost on the way."""

from __future__ import annotations

import csv
import json
import os
import pickletools
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from small_data import short_checkpoint
from small_runs import FINE, PLAIN, RECIPES, RUNS
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import ROOT, YAML

import yolo_prune
from yolo_prune import cli
from yolo_prune.cut import surgery
from yolo_prune.cut.record import read_record
from yolo_prune.demo.scenes import make_dataset
from yolo_prune.errors import PruneError, RecipeError, RunError, TargetError
from yolo_prune.report import Report
from yolo_prune.run import leftovers

TINY = RUNS["run"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_dataset(tmp_path_factory.mktemp("data") / "scenes", train=16, val=8, imgsz=64))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def pruned(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: four epochs, two rounds."""
    folder = tmp_path_factory.mktemp("run")
    model = YOLO(short_checkpoint(folder))
    places = {"data": data, "project": str(folder), "name": "a"}
    model.train(epochs=4, callbacks="prune", recipe=RECIPES["run"], **places, **TINY)
    return folder / "a"


def test_the_delivered_checkpoint_has_the_target_structure(pruned: Path) -> None:
    best, dense = load_checkpoint(pruned / "weights/best.pt")[0], load_checkpoint(pruned.parent / "dense.pt")[0]
    record = read_record(best)
    assert record is not None
    assert record.plan is not None
    surgery.check_applied(best, record.plan)
    report = Report.load(pruned)
    assert report.status == "finished"
    assert 0.49 <= report.pruned.flops / report.dense.flops <= 0.5
    assert report.pruned.params == parameters(best)
    assert report.dense.params == parameters(dense)
    assert [r.plan for r in record.rounds] == [r.plan for r in report.rounds]
    modules = pickled_modules(pruned / "weights/best.pt")
    assert "ultralytics.nn.tasks" in modules
    assert {name.split(".")[0] for name in modules} <= {"ultralytics", "torch", "collections", "__builtin__"}


def pickled_modules(path: Path) -> set[str]:
    """Modules whose classes a checkpoint names."""
    with zipfile.ZipFile(path) as archive:
        data = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    return {str(a).split(" ")[0] for op, a, _ in pickletools.genops(data) if op.name == "GLOBAL"}


def test_the_report_holds_every_round_and_every_epoch(pruned: Path) -> None:
    report = Report.load(pruned)
    assert [r.epoch for r in report.rounds] == [0, 1]
    assert [e.epoch for e in report.epochs_log] == [1, 2, 3, 4]
    for r in report.rounds:
        assert r.fitness.before is not None
        assert r.fitness.cut is not None
        assert r.fitness.recovered is not None
        assert r.fitness.end is not None
        assert r.proof is not None
        assert r.proof.error <= 1e-8
    assert {"ultralytics", "torch", "torch-pruning", "python"} <= set(report.versions)
    assert yolo_prune.load_recipe(pruned / "prune.yaml").to_dict() == report.recipe
    names = {"disc", "ring", "square", "triangle", "cross"}
    for figures in (report.dense, report.pruned):
        assert figures.classes.keys() <= names
        assert sum(figures.classes.values()) / len(figures.classes) == pytest.approx(figures.fitness, abs=1e-3)
    assert {"batch": 8, "nbs": 8, "optimizer": "AdamW", "warmup_epochs": 0}.items() <= report.arguments.items()
    assert not {"model", "data", "epochs", "imgsz", "project", "name", "seed"} & report.arguments.keys()
    assert (pruned / "prune.png").stat().st_size > 10_000
    assert any("DFL" in p.reason for p in report.protected)


def test_results_csv_is_unbroken_and_agrees_with_the_report(pruned: Path) -> None:
    rows = list(csv.DictReader((pruned / "results.csv").open()))
    assert [int(r["epoch"]) for r in rows] == [1, 2, 3, 4]
    logged = {e.epoch: e.fitness for e in Report.load(pruned).epochs_log}
    for row in rows:
        assert float(row["metrics/mAP50-95(B)"]) == pytest.approx(logged[int(row["epoch"])], abs=1e-4)


def test_what_was_best_before_a_cut_is_kept_with_its_own_structure(pruned: Path) -> None:
    before = load_checkpoint(pruned / "weights/round1.pt")[0]
    best = load_checkpoint(pruned / "weights/best.pt")[0]
    report = Report.load(pruned)
    assert parameters(before) == report.rounds[0].params
    assert parameters(best) == report.rounds[1].params
    assert parameters(load_checkpoint(pruned / "weights/last.pt")[0]) == report.rounds[1].params
    assert not (pruned / "weights/round0.pt").exists()


STRANGER = """
import sys
for name in [n for n in sys.modules if n.split(".")[0] == "yolo_prune"]:
    del sys.modules[name]
sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith("yolo_prune")]
sys.modules["yolo_prune"] = None
import torch
from ultralytics import YOLO
model = YOLO(sys.argv[1])
torch.manual_seed(0)
out = model.model(torch.rand(1, 3, 64, 64))[0]
boxes = model.predict(torch.rand(1, 3, 64, 64), verbose=False)
print(sum(p.numel() for p in model.model.parameters()), float(out.abs().sum()), len(boxes))
"""


def test_a_python_without_this_package_runs_it_under_safe_load(pruned: Path) -> None:
    path = pruned / "weights/best.pt"
    environment = os.environ | {"ULTRALYTICS_SAFE_LOAD": "1", "YOLO_PRUNE_HOOK": "0"}
    command = [sys.executable, "-c", STRANGER, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, total, images = done.stdout.split()[-3:]
    model = load_checkpoint(path)[0]
    torch.manual_seed(0)
    with torch.no_grad():
        here = float(model(torch.rand(1, 3, 64, 64))[0].abs().sum())
    assert (int(count), int(images)) == (parameters(model), 1)
    assert float(total) == pytest.approx(here, rel=1e-5)


@pytest.mark.parametrize(
    "pruning_keys", [{}, {"callbacks": "prune", "recipe": {**RECIPES["run"], "target": {"flops": 0.3}}}]
)
def test_training_a_pruned_checkpoint_keeps_or_thins_its_structure(
    pruned: Path, data: str, tmp_path: Path, pruning_keys: dict[str, Any]
) -> None:
    model = YOLO(pruned / "weights/best.pt")
    before = parameters(model.model)
    weight = model.model.model[0].conv.weight.clone()
    model.train(data=data, epochs=2, project=str(tmp_path), **TINY, **pruning_keys)
    after = load_checkpoint(tmp_path / "train/weights/best.pt")[0]
    if pruning_keys:
        report = Report.load(tmp_path / "train")
        assert 0.29 <= report.pruned.flops / report.dense.flops <= 0.3
        assert report.dense.params == Report.load(pruned).dense.params  # fractions are of the first dense model
        assert parameters(after) == report.pruned.params < before
    else:
        assert parameters(after) == before
        assert not torch.equal(after.model[0].conv.weight, weight)
        assert read_record(after).plan.hash == read_record(YOLO(pruned / "weights/best.pt").model).plan.hash


def test_pruning_as_far_as_it_is_already_is_refused_before_a_folder_exists(
    pruned: Path, data: str, tmp_path: Path
) -> None:
    model = YOLO(pruned / "weights/best.pt")
    with pytest.raises(RunError, match=r"already is at 0\.\d+ of its dense size"):
        model.train(data=data, epochs=4, callbacks="prune", project=str(tmp_path), **TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("optimizer", ["AdamW", "MuSGD", pytest.param("SGD", marks=pytest.mark.long)])
def test_after_a_cut_the_average_moves_and_the_optimizer_owns_the_new_parameters(
    optimizer: str, data: str, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    def state_of(trainer: Any) -> dict[tuple[str, str], torch.Tensor]:
        names = {p: name for name, p in trainer.model.named_parameters()}
        states = trainer.optimizer.state.items()
        return {(names[p], key): v.clone() for p, state in states for key, v in state.items() if torch.is_tensor(v)}

    def cut_comes(trainer: Any) -> None:
        if trainer.epoch == 1:
            seen["momentum"] = state_of(trainer)

    def cut_made(trainer: Any) -> None:
        if trainer.epoch == 1 and "ema" not in seen:
            seen["kept"] = state_of(trainer)
            seen["plan"] = read_record(trainer.model).plan
            seen["ema"] = {k: v.clone() for k, v in trainer.ema.ema.state_dict().items()}
            owned = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
            everything = {id(p) for p in trainer.model.parameters()}
            trainable = {id(p) for p in trainer.model.parameters() if p.requires_grad}
            seen["owned"] = trainable <= owned <= everything
            shapes = [(p.shape, v.shape) for p, s in trainer.optimizer.state.items() for v in s.values() if v.ndim]
            seen["state"] = bool(shapes) and all(a == b for a, b in shapes)

    def trained(trainer: Any) -> None:
        if trainer.epoch == 1:
            now = trainer.ema.ema.state_dict()
            seen["moved"] = [k for k, v in seen["ema"].items() if v.is_floating_point() and not torch.equal(v, now[k])]

    model = YOLO(short_checkpoint(tmp_path))
    model.add_callback("on_train_epoch_start", cut_comes)
    model.add_callback("on_train_batch_start", cut_made)
    model.add_callback("on_train_epoch_end", trained)
    overrides = {"recipe.schedule.rounds": 1, "recipe.schedule.start": 1}
    settings = {**TINY, "optimizer": optimizer, "lr0": 0.01}
    model.train(data=data, epochs=2, callbacks="prune", project=str(tmp_path), freeze=[0], **settings, **overrides)
    assert seen["owned"]
    assert seen["state"]
    assert set(seen["kept"]) == set(seen["momentum"])
    for (name, key), before in seen["momentum"].items():  # of channels that are kept, to the bit
        dims = seen["plan"].keep.get(name, {}) if before.ndim else {}
        for dim, keep in dims.items():
            before = before.index_select(dim, torch.tensor(keep))
        assert torch.equal(seen["kept"][name, key], before), (name, key)
    rows = list(csv.DictReader((tmp_path / "train/results.csv").open()))
    logged = Report.load(tmp_path / "train").epochs_log
    assert [float(r["metrics/mAP50-95(B)"]) for r in rows] == pytest.approx([e.fitness for e in logged], abs=1e-4)
    moving = [k for k in seen["ema"] if k.endswith("conv.weight") and ".dfl" not in k and not k.startswith("model.0.")]
    assert set(moving) <= set(seen["moved"])
    # freeze=[0] keeps its layer as it is, structure included
    best = load_checkpoint(tmp_path / "train/weights/best.pt")[0]
    dense = load_checkpoint(tmp_path / "dense.pt")[0]
    assert torch.equal(best.model[0].conv.weight, dense.model[0].conv.weight)
    surgery.check_applied(best, seen["plan"])


def test_a_failed_proof_stops_the_run_before_anything_is_cut(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from yolo_prune.cut import proof
    from yolo_prune.planning import planner

    true_plan = planner.plan_for

    def wrong(*args: Any, **kwargs: Any) -> yolo_prune.Plan:
        plan = true_plan(*args, **kwargs)
        name = next(n for n, dims in plan.keep.items() if 1 in dims and 0 not in dims)
        kept = list(plan.keep[name][1])
        gone = next(i for i in range(plan.shapes[name][1]) if i not in kept)
        kept[0] = gone
        plan.keep[name][1] = tuple(sorted(kept))
        return plan

    seen = {}
    model = YOLO(short_checkpoint(tmp_path))
    model.add_callback("teardown", lambda t: seen.update(parameters=parameters(t.model), files=list(t.wdir.iterdir())))
    monkeypatch.setattr(planner, "plan_for", wrong)
    with pytest.raises(yolo_prune.PruneError, match=r"first layer that differs is 'model\..*unchanged") as error:
        model.train(data=data, epochs=4, callbacks="prune", project=str(tmp_path), **TINY)
    assert isinstance(error.value, proof.ProofError)
    assert seen == {"parameters": parameters(load_checkpoint(tmp_path / "dense.pt")[0]), "files": []}
    assert Report.load(tmp_path / "train").status == "failed"


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"recipe": "half"}, RecipeError, "no recipe 'half'. Did you mean 'half-flops'"),
        ({"recipe.target.flops": 0.01}, TargetError, r"0\.01 of the dense model cannot be reached.*Set the target to"),
        ({"recipe.protect": "backbone"}, RecipeError, "protect: 'backbone' matches no module"),
        (
            {"recipe.recover.refit": 0, "epochs": 2},
            RecipeError,
            "3 rounds from epoch 0 need at least 3 epochs, and the run has 2",
        ),
        (
            {"recipe.criterion": "taylr"},
            RecipeError,
            "no criterion 'taylr'.*choose one of taylor, fisher, obs",
        ),
        ({"callbacks": "prun"}, SyntaxError, "Did you mean callbacks=prune"),
        ({"callback": "prune"}, SyntaxError, "'callback' is not a valid YOLO argument. Did you mean 'callbacks'"),
        ({"callbacks": None}, SyntaxError, "'recipe' has no effect by itself"),
        ({"lr": 0.1}, SyntaxError, "'lr' is not a valid YOLO argument"),
        ({"modle": "x.pt", "recipe": "half"}, SyntaxError, r"^'modle' is not a valid YOLO argument.*'model'\]"),
        ({"epochs": None}, TypeError, "'epochs=None' is invalid. 'epochs' must not be None"),
        ({"imgsz": "64x96"}, ValueError, "'imgsz=64x96' is not a valid image size"),
    ],
)
def test_bad_arguments_are_refused_before_a_folder_exists(
    arguments: dict[str, Any], kind: type[Exception], message: str, data: str, tmp_path: Path
) -> None:
    model = YOLO("yolo11n.yaml")
    settings = {
        **TINY,
        "data": data,
        "epochs": 4,
        "callbacks": "prune",
        "recipe": "half-flops",
        "project": str(tmp_path),
    }
    with pytest.raises(kind, match=message):
        model.train(**{**settings, **arguments})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["val", "predict", "export", "tune"])
def test_other_modes_say_that_the_keys_belong_to_train(mode: str, data: str, tmp_path: Path, clean_cwd: Path) -> None:
    model = YOLO(short_checkpoint(tmp_path))
    with pytest.raises(yolo_prune.PruneError, match=r"^'recipe' is an argument of 'yolo train' and YOLO\.train only"):
        getattr(model, mode)(data=data, recipe="edge", source=str(tmp_path))
    assert list(clean_cwd.iterdir()) == []


def test_a_file_of_arguments_may_hold_the_keys(data: str, tmp_path: Path) -> None:
    """As `yolo train cfg=...` reads the file. What the file leaves out is the default, not a setting of the model."""
    model, file = YOLO(short_checkpoint(tmp_path)), tmp_path / "cfg.yaml"
    model.overrides["lr0"] = 0.5
    recipe = {**PLAIN, **FINE, "schedule": {"rounds": 1}}
    ours = {"callbacks": "prune", "recipe": recipe, "recipe.target.flops": 0.6}
    YAML.save(file, {**TINY, **ours, "epochs": 3, "model": "other.pt"})
    model.train(data=data, cfg=str(file), epochs=1, project=str(tmp_path), warmup_epochs=0, lr0=0.002)
    report = Report.load(tmp_path / "train")
    assert report.status == "finished"
    assert report.recipe["target"] == {"flops": 0.6}
    args = model.trainer.args
    assert (args.epochs, args.imgsz, args.lr0, args.data) == (1, TINY["imgsz"], 0.002, data)
    assert Path(args.model).name == "dense.pt"
    YAML.save(file, {"recipie": "edge"})
    with pytest.raises(SyntaxError, match=r"'recipie' is not a valid YOLO argument\. Did you mean 'recipe'"):
        model.train(data=data, cfg=str(file))


def test_a_file_of_arguments_without_the_keys_is_left_to_ultralytics(data: str, tmp_path: Path) -> None:
    model, file = YOLO(short_checkpoint(tmp_path)), tmp_path / "cfg.yaml"
    YAML.save(file, {**TINY, "epochs": 1})
    model.train(data=data, cfg=str(file), project=str(tmp_path))
    assert model.trainer.args.cfg == str(file)
    assert not yolo_prune.is_pruned(model)


def test_callbacks_do_not_outlive_the_call(data: str, tmp_path: Path) -> None:
    model = YOLO(short_checkpoint(tmp_path))
    before = {event: list(functions) for event, functions in model.callbacks.items()}
    with pytest.raises(TargetError):
        model.train(data=data, epochs=4, callbacks="prune", **{"recipe.target.flops": 0.01}, **TINY)
    assert model.callbacks == before
    model.train(data=data, epochs=1, project=str(tmp_path), **TINY)
    assert not yolo_prune.is_pruned(model)


def test_python_api_one_shot_then_train_keeps_the_structure(data: str, tmp_path: Path) -> None:
    yaml = YAML.load(ROOT / "cfg/models/v8/yolov8.yaml") | {"nc": 5, "scale": "n"}
    YAML.save(tmp_path / "mine.yaml", yaml)
    model = YOLO(tmp_path / "mine.yaml")
    dense = parameters(model.model)
    plan = yolo_prune.plan(model, "half-flops", imgsz=64)
    assert parameters(model.model) == dense
    table = str(plan)
    for text in ("model.22.cv2.0.2", "task output", "GFLOPs", "before", "kept"):
        assert text in table
    proof = yolo_prune.apply(model, plan)
    assert proof is not None
    assert proof.error <= 1e-8
    cut = parameters(model.model)
    assert cut < dense
    assert yolo_prune.is_pruned(model)
    model.train(data=data, epochs=1, project=str(tmp_path), **TINY)
    assert yolo_prune.is_pruned(model)
    assert parameters(model.model) == cut


def test_prune_in_one_call_returns_the_report(data: str, tmp_path: Path) -> None:
    report = yolo_prune.prune(
        short_checkpoint(tmp_path, end2end=True, reg_max=1),  # as in a YOLO26
        {"target": {"params": 0.6}, "schedule": {"curve": "one-shot"}, **FINE},
        data=data,
        epochs=1,
        project=str(tmp_path),
        **TINY,
    )
    assert 0.59 <= report.pruned.params / report.dense.params <= 0.6


def test_onnx_export_agrees_with_torch_and_says_that_it_was_pruned(pruned: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the export extra")
    pytest.importorskip("onnx", reason="needs the export extra")
    model = YOLO(pruned / "weights/best.pt")
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = load_checkpoint(pruned / "weights/best.pt")[0](image)[0]
    session = onnxruntime.InferenceSession(model.export(format="onnx", imgsz=64, verbose=False))
    (got,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    assert (torch.from_numpy(got) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    told = json.loads(session.get_modelmeta().custom_metadata_map["pruning"])
    report = Report.load(pruned)
    assert told["params"] == report.pruned.params
    assert told["target"] == {"flops": 0.5}


def test_a_result_that_is_not_pruned_fails_loudly(data: str, tmp_path: Path) -> None:
    model = YOLO(short_checkpoint(tmp_path))

    def stop(trainer: Any) -> None:
        trainer.stop = True  # another callback ends the run before the first round

    model.add_callback("on_fit_epoch_end", stop)
    with pytest.raises(PruneError, match=r"ended after epoch 1, before round 1"):
        model.train(
            data=data, epochs=4, callbacks="prune", project=str(tmp_path), **TINY, **{"recipe.schedule.start": 1}
        )
    assert Report.load(tmp_path / "train").status == "failed"


def killed_in_epoch(number: int) -> Any:
    def stop(trainer: Any) -> None:
        if trainer.epoch == number:
            raise KeyboardInterrupt

    return stop


def test_a_resumed_fine_tuning_of_a_pruned_model_prunes_nothing_more(pruned: Path, data: str, tmp_path: Path) -> None:
    model = YOLO(pruned / "weights/round1.pt")  # its run went on to cut it once more
    before = parameters(model.model)
    model.add_callback("on_train_batch_end", killed_in_epoch(1))
    with pytest.raises(KeyboardInterrupt):
        model.train(data=data, epochs=2, project=str(tmp_path), **TINY)
    YOLO(tmp_path / "train/weights/last.pt").train(resume=True)
    assert parameters(load_checkpoint(tmp_path / "train/weights/best.pt")[0]) == before
    assert not (tmp_path / "train/prune.json").exists()


def test_the_record_of_a_model_that_grew_back_counts_for_nothing(pruned: Path, tmp_path: Path) -> None:
    thin = load_checkpoint(pruned / "weights/best.pt")[0]
    grown = type(thin)(thin.yaml, nc=5, verbose=False)  # what a stock trainer without this package does
    assert "pruning" in grown.yaml
    assert not yolo_prune.is_pruned(grown)
    assert yolo_prune.plan(grown, "half-flops", imgsz=64).predicted.present("flops") == 1.0


def test_classes_in_another_order_take_their_rows_along(pruned: Path, data: str, tmp_path: Path) -> None:
    model = YOLO(pruned / "weights/best.pt")
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    model.model.names = dict(enumerate(reversed(model.model.names.values())))
    seen: dict[str, torch.Tensor] = {}
    model.add_callback("on_train_start", lambda t: seen.update({k: v.clone() for k, v in t.model.state_dict().items()}))
    model.train(data=data, epochs=1, project=str(tmp_path), **TINY)
    rows = "model.10.cv3.0.2.weight"
    assert torch.equal(seen[rows], before[rows].flip(0).float())
    assert torch.equal(seen["model.0.conv.weight"], before["model.0.conv.weight"].float())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": "PRUNED"}, "is a pruned model. Copying its weights into the dense model would lose the"),
        ({"freeze": 10, "callbacks": "prune"}, "cannot be reached"),
        ({"resume": True, "callbacks": "prune"}, "belongs to a run without pruning"),
    ],
)
def test_what_would_lose_the_structure_or_prune_nothing_is_refused(
    arguments: dict[str, Any], message: str, pruned: Path, data: str, tmp_path: Path
) -> None:
    arguments = {k: str(pruned / "weights/best.pt") if v == "PRUNED" else v for k, v in arguments.items()}
    model = YOLO(pruned.parent / "dense.pt")
    with pytest.raises(PruneError, match=message):
        model.train(data=data, epochs=3, project=str(tmp_path), **TINY, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_resuming_a_finished_run_says_so(pruned: Path) -> None:
    with pytest.raises(RunError, match="belongs to a run that has ended, so there is nothing to resume"):
        YOLO(pruned / "weights/last.pt").train(resume=True)


def test_a_resumed_run_keeps_its_recipe_and_survives_a_lost_report_and_state(
    data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = YOLO(short_checkpoint(tmp_path))
    model.add_callback("on_train_batch_end", killed_in_epoch(2))
    rounds: dict[str, Any] = {"recipe.schedule.rounds": 3}
    with pytest.raises(KeyboardInterrupt):
        model.train(data=data, epochs=3, callbacks="prune", project=str(tmp_path), **TINY, **rounds)
    last = tmp_path / "train/weights/last.pt"
    with pytest.raises(RunError, match=r"keeps the recipe that it began with. Leave out recipe\.target\.flops"):
        YOLO(last).train(resume=True, **{"recipe.target.flops": 0.3})
    (tmp_path / "train/prune.json").unlink()
    for state in last.parent.glob("state-*.pt"):
        state.write_bytes(state.read_bytes()[:1000])
    YOLO(last).train(resume=True)
    assert "continues from last.pt alone" in caplog.text
    report = Report.load(tmp_path / "train")
    assert [r.number for r in report.rounds] == [1, 2, 3]
    assert report.pruned.flops <= 0.5 * report.dense.flops


@pytest.fixture
def killed(pruned: Path, tmp_path: Path) -> Path:
    """A finished run that was killed before it deleted the files that only a resumed run needs."""
    shutil.copytree(pruned, tmp_path / "a")
    (tmp_path / "a/weights/state-3-2.pt").write_bytes(b"values of the last epoch")
    (tmp_path / "a/weights/.last.pt.1f2e.tmp").write_bytes(b"half of it")
    (tmp_path / "a/.prune.json.1f2e.tmp").write_bytes(b"{")
    return tmp_path / "a"


def left(run: Path) -> list[str]:
    return sorted(p.name for p in run.rglob("*") if p.name.startswith("state-") or p.suffix == ".tmp")


@pytest.mark.parametrize("how", ["report", "resume", "resume by path", "train further"])
def test_what_a_kill_in_the_last_moment_leaves_is_deleted_later(how: str, killed: Path, data: str) -> None:
    last = killed / "weights/last.pt"
    before = last.read_bytes()
    assert len(left(killed)) == 3
    if how == "report":
        assert cli.main(["report", str(killed)]) == 0
    elif how == "train further":
        places = {"data": data, "project": str(killed.parent), "name": "a", "exist_ok": True}
        YOLO(last).train(epochs=1, **places, **TINY)
    else:
        model, resume = (YOLO(last), True) if how == "resume" else (YOLO("yolo11n.yaml"), str(last))
        with pytest.raises(RunError, match=r"'.*last\.pt' belongs to a run that has ended"):
            model.train(resume=resume)
    assert left(killed) == []
    assert (last.read_bytes() == before) is (how != "train further")


def test_files_of_a_run_that_has_not_ended_stay(killed: Path) -> None:
    report = Report.load(killed)
    report.status = "running"
    report.save(killed / "prune.json")
    assert cli.main(["report", str(killed)]) == 0
    assert len(left(killed)) == 3
    report.status = "finished"  # but last.pt can still be resumed
    report.save(killed / "prune.json")
    checkpoint = torch.load(killed / "weights/last.pt", weights_only=False)
    torch.save({**checkpoint, "optimizer": {"state": {}}}, killed / "weights/last.pt")
    leftovers.delete(killed)
    assert len(left(killed)) == 3
