# SPDX-License-Identifier: AGPL-3.0-or-later
"""The two command lines: `yolo ... callbacks=prune` and `yolo-prune`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics import YOLO
from ultralytics.cfg import entrypoint

import yolo_prune
from yolo_prune import _grammar, _keys, _patch, cli
from yolo_prune.cut.plan import Plan
from yolo_prune.cut.record import KEY
from yolo_prune.demo import tour
from yolo_prune.errors import TargetError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "dense.pt"
    torch.manual_seed(0)
    YOLO("yolo11n.yaml").save(path)
    return path


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_a_reader_that_leaves_early_is_no_error(clean_cwd: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "yolo_prune.cli", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as shown:
        assert shown.stdout
        assert shown.stderr
        shown.stdout.close()
        assert "Traceback" not in (said := shown.stderr.read())
        assert "Broken pipe" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["aply", "model=x.pt"], "'aply' is not a command. Did you mean 'apply'?"),
        (["plan"], "model= is missing"),
        (["plan", "model=nowhere.pt"], "The model 'nowhere.pt' does not exist"),
        (["plan", "model=best.onnx"], "'best.onnx' cannot be pruned. Pass a .pt checkpoint"),
        (["plan", "modle=x.pt"], "'modle' is not an argument of 'plan'. Did you mean 'model'?"),
        (["plan", "model=x.pt", "latency=0.7"], "Did you mean 'recipe.target.latency'?"),
        (["plan", "model=x.pt", "target.flops=0.7"], "Did you mean 'recipe.target.flops'?"),
        (["apply", "model=x.pt", "amount=0.7"], "Did you mean 'recipe.sparsity.amount'?"),
        (["plan", "x.pt"], "'x.pt' is not of the form key=value. Usage: yolo-prune plan"),
        (["plan", "model=yolo11n.yaml", "imgsz=100"], "imgsz=100: must be a multiple of 32"),
        (["plan", "model=yolo11n.yaml", "recipe=ege"], "Did you mean 'edge'?"),
        (["plan", "model=yolo11n.yaml", "recipe.target.flops=0.02"], "cannot be reached"),
        (["plan", "model=yolo11n.yaml", "recipe.criterion=fischer"], "Did you mean 'fisher'?"),
        (["apply", "model=a.pt", "save=a.pt"], "would overwrite the model itself"),
        (["apply", "model=a.pt", "save=b.onnx"], "the name must end in .pt"),
        (["apply", "model=a.pt", "plan=p.json", "recipe=edge"], "plan= and recipe= exclude one another"),
        (["doctor", "now"], "'now' is not of the form key=value"),
        (["schema", "sav=x.json"], "Did you mean 'save'?"),
    ],
)
def test_mistakes_are_one_message_on_standard_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], clean_cwd: Path
) -> None:
    err = fails(capsys, *arguments)
    assert message in err
    assert err.startswith(f"yolo-prune {arguments[0]}: ")
    assert "Traceback" not in err
    assert list(clean_cwd.iterdir()) == []


def test_a_dataset_is_not_taken_for_a_model(capsys: pytest.CaptureFixture[str], clean_cwd: Path) -> None:
    Path("data.yaml").write_text("train: images\nval: images\nnames: {0: cell}\n")
    message = "'data.yaml' does not describe a model: it has no 'backbone'. Pass a .pt checkpoint"
    assert message in fails(capsys, "plan", "model=data.yaml")


def test_a_truncated_checkpoint_is_one_message(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], clean_cwd: Path
) -> None:
    Path("cut.pt").write_bytes(checkpoint.read_bytes()[:50_000])
    assert "'cut.pt' is not a complete Ultralytics checkpoint" in fails(capsys, "plan", "model=cut.pt")


def test_plan_apply_show_go_together(checkpoint: Path, capsys: pytest.CaptureFixture[str], clean_cwd: Path) -> None:
    assert cli.main(["plan", f"model={checkpoint}", "recipe=gentle", "imgsz=320", "save=plan.json"]) == 0
    table = capsys.readouterr().out
    assert "task output" in table
    assert "at imgsz 320" in table
    plan = Plan.load("plan.json")
    assert 0.74 <= plan.predicted.flops_kept <= 0.75

    assert cli.main(["apply", f"model={checkpoint}", "plan=plan.json", "save=cut.pt"]) == 0
    assert "exact: " in capsys.readouterr().out
    model = YOLO("cut.pt")
    assert sum(p.numel() for p in model.model.parameters()) == plan.predicted.params_after
    assert yolo_prune.is_pruned("cut.pt")
    assert not yolo_prune.is_pruned(checkpoint)

    assert cli.main(["show", "model=cut.pt"]) == 0
    shown = capsys.readouterr().out
    assert f"{plan.predicted.params_after:,}" in shown
    assert f"plan {plan.hash[:12]}" in shown

    err = fails(capsys, "apply", "model=cut.pt", "plan=plan.json", "save=again.pt")
    assert "The plan was made for another model" in err
    assert not Path("again.pt").exists()


@pytest.mark.parametrize("written", ["64,96", "[64,96]"])
def test_a_plan_for_rectangles(
    written: str, checkpoint: Path, capsys: pytest.CaptureFixture[str], clean_cwd: Path
) -> None:
    assert cli.main(["plan", f"model={checkpoint}", f"imgsz={written}", "recipe=gentle", "save=plan.json"]) == 0
    assert "at imgsz 64,96" in capsys.readouterr().out
    found, square = Plan.load("plan.json"), yolo_prune.plan(checkpoint, "gentle", imgsz=96)
    assert found.predicted.dense_flops == pytest.approx(square.predicted.dense_flops * 64 / 96, rel=0.01)
    assert yolo_prune.plan(checkpoint, "gentle", imgsz=[64, 96]).forecast == found.forecast


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("a.pt,b.pt", ["a.pt", "b.pt"]),
        ("a.pt, b.pt,", ["a.pt", "b.pt"]),
        (
            "runs/lr0=0.1,batch=8/best.pt",
            ["runs/lr0=0.1,batch=8/best.pt"],
        ),  # not there: a message names it whole
        ("yolo11n.yaml,runs/a,b/best.pt", ["yolo11n.yaml", "runs/a,b/best.pt"]),
        ("nothing,else", ["nothing,else"]),
        ("here,1/x.pt,2.pt", ["here,1/x.pt,2.pt"]),  # it is there, with a comma after a suffix
        ("a.pt,here,1/x.pt,2.pt,b.pt", ["a.pt", "here,1/x.pt,2.pt", "b.pt"]),
    ],
)
def test_a_list_of_files_whose_names_have_commas(text: str, read: list[str], clean_cwd: Path) -> None:
    Path("here,1").mkdir()
    Path("here,1/x.pt,2.pt").touch()
    assert _grammar.files("model", text) == read


def test_paths_of_hyperparameter_searches(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], clean_cwd: Path
) -> None:
    """Ray Tune names its folders so."""
    places = [Path("runs/train_a1_lr0=0.1,batch=8/weights/best.pt"), Path('with "quotes", and spaces/best.pt')]
    for place in places:
        place.parent.mkdir(parents=True)
        place.write_bytes(checkpoint.read_bytes())
    settings = ["format=torch", "repeats=1", "imgsz=32"]
    assert cli.main(["bench", f"model={places[0]},{places[1]}", *settings, "save=b.json"]) == 0
    capsys.readouterr()
    assert len(json.loads(Path("b.json").read_text())["rows"]) == 2
    capsys.readouterr()
    message = "The model 'runs/train_a1_lr0=0.2,batch=8/weights/best.pt' does not exist"
    missing = str(places[0]).replace("0.1", "0.2")
    assert message in fails(capsys, "bench", f"model={missing},{places[1]}", *settings)
    assert message in fails(capsys, "compare", missing, str(places[0]), "data=x.yaml")
    read = cli.COMMANDS["compare"].read([*map(str, places), "data=x.yaml"])
    assert read.places == [*map(str, places)]


def test_a_path_that_ultralytics_cannot_open_is_told_as_that(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], clean_cwd: Path
) -> None:
    Path("it's.pt").write_bytes(checkpoint.read_bytes())
    assert "Ultralytics cannot open 'it's.pt', because of the quote (') in its path" in fails(
        capsys, "plan", "model=it's.pt"
    )


def test_show_prints_a_recipe_with_its_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "recipe=edge", "recipe.channels.round_to=4"]) == 0
    assert "round_to: 4" in capsys.readouterr().out


def test_schema_is_json(capsys: pytest.CaptureFixture[str], clean_cwd: Path) -> None:
    assert cli.main(["schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert cli.main(["schema", "save=recipe.schema.json"]) == 0
    assert json.loads(Path("recipe.schema.json").read_text(encoding="utf-8")) == printed


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  yolo-prune {command.shortest}  " in text for command in cli.COMMANDS.values())
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("name", cli.COMMANDS)
@pytest.mark.parametrize("words", ["{} --help", "{} model=best.pt -h", "help {}"])
def test_help_of_one_command_is_about_that_one(name: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words.format(name).split()) == 0
    text, _ = capsys.readouterr()
    assert text.startswith(f"yolo-prune {name}: {cli.COMMANDS[name].summary}\n\nUsage: yolo-prune {name}")
    assert all(f"\n  {argument.name} " in text for argument in cli.COMMANDS[name].arguments)
    assert all(f"yolo-prune {other}" not in text for other in cli.COMMANDS if other != name)
    assert all(len(line) <= 120 for line in text.splitlines())


def test_help_of_no_command_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'plam' is not a command. Did you mean 'plan'?" in fails(capsys, "help", "plam")


@pytest.mark.parametrize("name", [name for name, command in cli.COMMANDS.items() if not command.passes_on])
def test_what_a_usage_line_shows_is_accepted(name: str) -> None:
    command = cli.COMMANDS[name]
    shown = command.usage.removeprefix(f"Usage: yolo-prune {name}").replace("[", "").replace("]", "").split()
    read = command.read(shown)
    assert read.places == command.places.split()
    assert set(read.values) == set(command.known)


@pytest.mark.parametrize("name", [name for name, command in cli.COMMANDS.items() if not command.passes_on])
def test_a_required_argument_that_is_missing_is_told_with_an_example(name: str) -> None:
    command = cli.COMMANDS[name]
    for argument in (a for a in command.arguments if a.required):
        others = [f"{a.name}={a.example}" for a in command.arguments if a.required and a is not argument]
        with pytest.raises(
            yolo_prune.PruneError, match=rf"^{argument.name}= is missing: pass .* {argument.name}=\S+\.$"
        ):
            command.read([*command.places.split(), *others])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "yolo val model=x.pt callbacks=prune",
            "'callbacks' is an argument of 'yolo train' and YOLO.train only. Leave it out: 'val' works",
        ),
        (
            "yolo export model=x.pt recipe=edge",
            "'recipe' is an argument of 'yolo train' and YOLO.train only. Leave it out: 'export' works",
        ),
        ("yolo predict model=x.pt callbacks=prune", "'predict' works"),
        ("yolo train model=yolo11n.yaml callback=prune", r"Similar arguments are i\.e\. \['callbacks=prune'\]"),
        ("yolo train model=yolo11n.yaml callbacks=prune recipie=edge", r"'recipie' is not.*recipe=half-flops"),
        ("yolo train model=yolo11n.yaml recipe=edge", "'recipe' has no effect by itself. Add callbacks=prune"),
        ("yolo train model=yolo11n.yaml callbacks=prnue", "Did you mean callbacks=prune?"),
        ("yolo train model=yolo11n.yaml epoch=3", "'epoch' is not a valid YOLO argument"),
    ],
)
def test_yolo_refuses_what_it_should(command: str, message: str, clean_cwd: Path) -> None:
    with pytest.raises(SyntaxError, match=message):
        entrypoint(command)
    assert list(clean_cwd.iterdir()) == []


def test_yolo_train_understands_the_keys_and_refuses_before_any_work(clean_cwd: Path) -> None:
    with pytest.raises(TargetError, match=r"target\.flops: 0\.02 of the dense model cannot be reached"):
        entrypoint("yolo train model=yolov10n.yaml data=x.yaml callbacks=prune recipe=edge recipe.target.flops=0.02")
    assert list(clean_cwd.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train callbacks=prune recipe.target.flops=0.02", "target.flops: 0.02 of the dense model cannot"),
        ("train callbacks=prunes", "callbacks='prunes' is not a known callback"),
        ("train callbacks=", "'callbacks' needs a value"),
        ("val callbacks=prune", "'callbacks' is an argument of 'yolo train' and YOLO.train only"),
    ],
)
def test_who_types_yolo_gets_a_message_and_no_traceback(arguments: str, message: str, clean_cwd: Path) -> None:
    command = ["/usr/bin/yolo", *arguments.split(), "model=yolov10n.yaml", "data=x.yaml"]
    script = (
        "import sys, yolo_prune._startup as s; s.install(force=True); "
        f"sys.argv[:] = {command}; from ultralytics.cfg import entrypoint; entrypoint()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(f"yolo-prune: {message}")


def test_yolo_prune_train_works_where_the_hook_is_off(clean_cwd: Path) -> None:
    command = [sys.executable, "-m", "yolo_prune.cli", "train", "model=yolov10n.yaml", "recipe.target.flops=0.02"]
    environment = os.environ | {"YOLO_PRUNE_HOOK": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("yolo-prune train: target.flops: 0.02 of the dense")


@pytest.mark.parametrize(
    ("value", "wanted"),
    [("prune", True), (["prune"], True), ("[prune]", True), ("prune,", True), (None, False), ("", False), ([], False)],
)
def test_ways_to_write_callbacks(value: Any, wanted: bool) -> None:
    assert _keys.wants_pruning(value) is wanted


@pytest.mark.slow
def test_the_demo_runs_through(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clean_cwd: Path
) -> None:
    pytest.importorskip("onnxruntime", reason="needs the export extra")
    monkeypatch.setitem(tour.DENSE, "epochs", 1)
    monkeypatch.setitem(tour.PRUNE, "epochs", 3)
    monkeypatch.setattr(tour, "IMAGES", {"train": 16, "val": 8})
    assert cli.main(["demo", "folder=here"]) == 0
    out = capsys.readouterr().out
    assert "onnxruntime agrees with torch" in out
    for name in ("prune.png", "prune.json", "weights/best.pt", "weights/best.onnx"):
        assert (clean_cwd / "here/pruned" / name).exists()
    report = json.loads((clean_cwd / "here/pruned/prune.json").read_text(encoding="utf-8"))
    assert report["status"] == "finished"
    assert 0.49 < report["pruned"]["flops"] / report["dense"]["flops"] <= 0.5


def test_the_demo_does_not_touch_a_folder_of_yours(capsys: pytest.CaptureFixture[str], clean_cwd: Path) -> None:
    mine = clean_cwd / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert "'mine' holds other files" in fails(capsys, "demo", "folder=mine")
    assert [p.name for p in mine.iterdir()] == ["thesis.txt"]


def test_a_run_without_our_keys_does_not_even_import_the_pruning_code(clean_cwd: Path) -> None:
    script = """
import sys
from ultralytics import YOLO
from yolo_prune._patch import MARK
assert hasattr(YOLO.train, MARK)
try:
    YOLO("yolo11n.yaml").train(data="nowhere.yaml", epochs=1)
except Exception as error:
    assert "nowhere.yaml" in str(error), error
else:
    raise SystemExit("no error")
assert not {"yolo_prune.graph", "yolo_prune.run.launch"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_patch_looks_where_the_record_is() -> None:
    assert _patch.RECORD == KEY


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("model = best.pt imgsz=64", ["model=best.pt", "imgsz=64"]),
        ("model= best.pt imgsz =64", ["model=best.pt", "imgsz=64"]),
        ("data= imgsz=64", ["data=", "imgsz=64"]),
        ("model=~/a.pt,~/b.pt ~/c.pt", ["model={}/a.pt,{}/b.pt", "{}/c.pt"]),
        ("data=a~/b.yaml save=~x.json", ["data=a~/b.yaml", "save=~x.json"]),
    ],
)
def test_words_are_read_as_people_type_them(typed: str, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda _: "/home/me")
    assert _grammar.as_typed(typed.split()) == [word.format(*["/home/me"] * 2) for word in read]


def test_the_package_is_a_command_too(clean_cwd: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "yolo_prune", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{yolo_prune.__version__}\n"


def test_an_interrupted_command_has_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    assert cli.main(["plan", "model=best.pt"]) == 130
    assert capsys.readouterr().err == "yolo-prune plan: interrupted\n"


def test_a_checkpoint_given_as_run_is_told_its_run(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], clean_cwd: Path
) -> None:
    weights = Path("runs/x/weights")
    weights.mkdir(parents=True)
    (weights / "best.pt").write_bytes(checkpoint.read_bytes())
    assert "'runs/x/weights/best.pt' is not a report. Pass the folder of the run." in fails(
        capsys, "report", str(weights / "best.pt")
    )
    Path("runs/x/prune.json").write_text("{}")
    assert "Pass the folder of the run: runs/x\n" in fails(capsys, "report", str(weights / "best.pt"))
