# SPDX-License-Identifier: AGPL-3.0-or-later
"""The console script `yolo-prune`, in Ultralytics' `key=value` grammar."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolo_prune import _grammar as grammar
from yolo_prune._grammar import Argument, Command, Request
from yolo_prune._version import __version__
from yolo_prune.env import outputs, terminal
from yolo_prune.env.image_size import image_size
from yolo_prune.errors import BenchError, ParityError, PruneError

if TYPE_CHECKING:
    from yolo_prune.cut.plan import Plan
    from yolo_prune.report.measurement import Measurement


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. A user's mistake gives one message on standard error, and status 1."""
    name, *words = list(sys.argv[1:] if arguments is None else arguments) or ["help"]
    if grammar.asks_for_help(name) and words and not all(map(grammar.asks_for_help, words)):
        name, words = words[0], [name]  # `yolo-prune help plan` is `yolo-prune plan --help`
    try:
        with terminal.forgiving():
            return _run(name, grammar.as_typed(words))
    except KeyboardInterrupt:
        return _fail(f"{name}: interrupted", INTERRUPTED)
    except (PruneError, SyntaxError, FileNotFoundError) as e:
        return _fail(f"{name}: {str(e).strip()}")
    except OSError as e:
        if e.errno not in OUTSIDE:
            raise
        return _fail(f"{name}: " + (f"'{e.filename}': " if e.filename else "") + outputs.reason(e))


def _fail(message: str, status: int = 1) -> int:
    with terminal.forgiving():
        print(f"yolo-prune {message}", file=sys.stderr)
    return status


def _run(name: str, words: list[str]) -> int:
    if grammar.asks_for_help(name):
        print(overview())
        return 0
    if name.lstrip("-") in ("version", "v"):
        print(__version__)
        return 0
    if name not in COMMANDS:
        near = grammar.nearest(name, COMMANDS)
        hint = f"Did you mean '{near}'? " if near else ""
        raise PruneError(f"'{name}' is not a command. {hint}Commands: {', '.join(COMMANDS)}.")
    command = COMMANDS[name]
    if any(map(grammar.asks_for_help, words)):
        print(command.help())
        return 0
    return command.run(command.read(words))


def overview() -> str:
    """The help: a line for every command, with its shortest call."""
    calls = {f"yolo-prune {command.shortest}": command.summary for command in COMMANDS.values()}
    return "\n\n".join((
        f"yolo-prune {__version__}: structured pruning as an ordinary part of an Ultralytics YOLO run",
        grammar.table(calls),
        "'yolo-prune COMMAND --help' lists all arguments of a command. recipe.<field>=<value> overrides a field of\n"
        "the recipe, for example recipe.target.flops=0.4. Bundled recipes: half-flops (default), gentle, edge,\n"
        "smallest. After installation, 'yolo train ... callbacks=prune' does the same as 'yolo-prune train ...'.",
    ))  # fmt: skip


def _train(request: Request) -> int:
    from yolo_prune import _startup

    _startup.install(force=True)
    import ultralytics.cfg
    import ultralytics.engine.model  # imported to be patched

    if errors := _startup.state().errors:
        reasons = "; ".join(f"{k} could not be patched: {v}" for k, v in errors.items())
        raise PruneError(f"{reasons}. 'yolo-prune doctor' says what to do.")
    arguments = request.words
    resumes = [a.lower() for a in arguments if a.partition("=")[0] == "resume"]
    resumed = any(not a.endswith(FALSE) for a in resumes)
    if not resumed and not any(a.startswith("callbacks=") for a in arguments):
        arguments = [*arguments, "callbacks=prune"]
    ultralytics.cfg.ARGV[:] = ["yolo-prune", "train", *arguments]
    ultralytics.cfg.entrypoint()
    return 0


def _plan(request: Request) -> int:
    values = request.values
    from yolo_prune import api

    plan = api.plan(
        values["model"], values.get("recipe"), imgsz=values.get("imgsz"), data=values.get("data"), **request.overrides
    )
    return _finish(plan.describe(), values.get("save"), plan.save)


def _apply(request: Request) -> int:
    values, overrides = request.values, request.overrides
    if "plan" in values and ("recipe" in values or overrides):
        raise PruneError("plan= and recipe= exclude one another, because a plan replaces the recipe. Leave one out.")
    source, data, imgsz = Path(values["model"]), values.get("data"), values.get("imgsz")
    target = values.get("save") or Path(f"{source.stem}-pruned.pt")
    if target.resolve() == source.resolve() or (target.exists() and source.exists() and target.samefile(source)):
        raise PruneError(f"save={target} would overwrite the model itself. Choose another name.")
    outputs.check(target)
    from yolo_prune import api
    from yolo_prune.cut.plan import Plan
    from yolo_prune.recipe import load_recipe

    model = api.open_model(source)
    recipe = load_recipe(values.get("recipe"), overrides)
    plan = Plan.load(values["plan"]) if "plan" in values else api.plan(model, recipe, imgsz=imgsz, data=data)
    if plan.forecast:
        outputs.check(target, size=HALF_PRECISION * plan.forecast.params_after)
    refit = recipe.recover.refit
    proven = api.apply(model, plan, data=data, imgsz=imgsz, refit=refit)
    target, asked = outputs.deliver(target, lambda path: api.save(model, path)), target
    print(plan.describe())
    if proven:
        print(f"exact: pruned model and masked reference agree to {proven.error:.0e} in float64")
    print(f"saved {target}" + _what_next(target, plan, api.changes_channels(plan), data, refit))
    return int(target != asked)


def _what_next(target: Path, plan: Plan, cut: bool, data: str | None, refit: int) -> str:
    """What a saved model lacks, and what to do about it."""
    if not cut:
        return f". It scores the {len(plan.classes.kept if plan.classes else ())} kept classes as before."
    why = "data= was not given" if data is None else "" if refit else "the recipe says refit: 0"
    fitted = why and f"; the weights were not refitted, because {why}"
    return f"{fitted}. Fine-tune it with: yolo train model={target} data=... epochs=..."


def _dataset(request: Request) -> int:
    values = request.values
    from yolo_prune import api

    print(f"saved {api.write_dataset(values['model'], values['data'], values['save'])}")
    return 0


def _bench(request: Request) -> int:
    values = request.values
    formats, how = _measuring(values)
    from yolo_prune.measure import benchmark
    from yolo_prune.measure.subjects import Setting

    asked = Setting.of(values.get("imgsz"), data=values.get("data"), **how)
    measurement = benchmark.measure_models(values["model"], formats, asked)
    status = _finish(str(measurement), values.get("save"), measurement.save)
    measurement.check()
    return status


def _profile(request: Request) -> int:
    values = request.values
    formats, how = _measuring(values)
    if len(formats) > 1:
        raise PruneError(f"format={values['format']}: a profile is for one runtime. Write one file for each runtime.")
    from yolo_prune import api
    from yolo_prune.latency import target
    from yolo_prune.measure.subjects import Setting

    model = api.open_model(values["model"])
    setting = Setting.of(values.get("imgsz"), **how).sized([model])
    saved = target.profile(model, formats[0], setting, values["save"])
    print(f"saved {saved}, measured with imgsz {setting.imgsz}")
    return int(saved != values["save"])


def _show(request: Request) -> int:
    values = request.values
    if "model" not in values:
        from yolo_prune.recipe import load_recipe

        print(load_recipe(values.get("recipe"), request.overrides).to_yaml(), end="")
        return 0
    from yolo_prune import api

    print(api.describe(values["model"]))
    return 0


def _report(request: Request) -> int:
    runs, values = request.places, request.values
    if len(runs) != 1:
        given = f"{len(runs)} runs were named" if runs else "no run was named"
        raise PruneError(f"{given}; pass the folder of one run, as in 'yolo-prune report runs/detect/train'.")
    formats, how = _measuring(values, "imgsz")
    from yolo_prune.pages import run_page
    from yolo_prune.report.page import PAGE
    from yolo_prune.run import leftovers

    known = {key: values.get(key) for key in ("data", "model")}
    imgsz = values.get("imgsz")
    measurement = run_page.measure_run(runs[0], formats, imgsz=imgsz, **known, **how) if formats else None
    folder = run_page.folder_of(runs[0])
    place = values.get("save") or folder / PAGE
    path, shown = run_page.write_report(runs[0], save=place, measurement=measurement, **known)
    leftovers.delete(folder)
    print(f"{measurement}\n\nsaved {path}" if measurement else f"saved {path}")
    if measurement:
        measurement.check()
    elif shown:
        _check_earlier(shown)
    return int(path != place)


def _check_earlier(measurement: Measurement) -> None:
    """Fail for a measurement of an earlier command as that command did: a page must not hide a failure."""
    try:
        measurement.check()
    except (BenchError, ParityError) as e:
        raise PruneError(
            f"bench.json, measured before, is on the page and has failures: {str(e).rstrip('.')}. Measure again with "
            "format=..., or delete the file."
        ) from e


def _compare(request: Request) -> int:
    models, values = request.places, request.values
    if len(models) < 2:
        raise PruneError(f"pass two or more checkpoints to compare. {COMMANDS['compare'].usage}")
    if again := next((m for m in models if models.count(m) > 1), None):
        raise PruneError(f"'{again}' is named twice. Name every checkpoint once.")
    formats, how = _measuring(values)
    from yolo_prune.pages import compare_page

    done = compare_page.compare(models, values["data"], values.get("imgsz"), values["save"], formats, **how)
    print(f"{done.text}\nsaved {done.page}")
    if done.measurement:
        done.measurement.check()
    return int(done.page != values["save"])


def _demo(request: Request) -> int:
    from yolo_prune.demo import tour

    return tour.run(Path(request.values["folder"]))


def _doctor(request: Request) -> int:
    from yolo_prune import doctor

    diagnosis = doctor.diagnose()
    print(doctor.render(diagnosis))
    return diagnosis.exit_code


def _schema(request: Request) -> int:
    from yolo_prune.env.files import write_text
    from yolo_prune.recipe import json_schema

    text = json.dumps(json_schema(), indent=2)
    if save := request.values.get("save"):
        return _finish("", save, lambda path: write_text(path, f"{text}\n"))
    print(text)
    return 0


def _finish(text: str, save: Path | None, write: Callable[[Path], object]) -> int:
    """Save a result if this was requested, then print it. The status is 1 if it had to be saved elsewhere."""
    saved = outputs.deliver(save, write) if save else None
    if text:
        print(text)
    if saved:
        print(f"saved {saved}")
    return int(saved != save)


def _measuring(values: dict[str, Any], *others: str) -> tuple[list[str], dict[str, Any]]:
    """The formats to measure, empty without format=, and the arguments for `Setting.of`."""
    if "format" not in values:
        if alone := next((key for key in (*others, *(a.name for a in MEASURING)) if key in values), None):
            raise PruneError(
                f"{alone}= is for measuring, and format= is missing. Add a format, for example format=onnx."
            )
        return [], {}
    how = {a.name: values[a.name] for a in MEASURING if a is not HALF and a.name in values}
    if values.get("half") and how.setdefault("quantize", 16) != 16:
        raise PruneError(f"half=True means quantize=16, and quantize={values['quantize']} was given. Leave one out.")
    from yolo_prune.measure import runtimes

    return runtimes.parse(values["format"]), how


INTERRUPTED = 130  # the exit status of a command that Ctrl-C has ended
OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
"""Errors that come from the disk and its permissions, and not from this package."""
HALF_PRECISION = 2  # bytes of a parameter in a checkpoint
FALSE = ("=false", "=0", "=none", "=")

MODEL = Argument("model", "best.pt", "a .pt checkpoint", required=True)
DATA = Argument("data", "data.yaml", "a dataset")
RECIPE = Argument("recipe", "half-flops", "a bundled recipe or a file (default: half-flops)")
IMGSZ = Argument(
    "imgsz",
    "640",
    "the size of images in pixels: one number, or height,width (default: that of the model's training)",
    lambda name, text: image_size(text),
)
FORMAT = Argument("format", "onnx,openvino", "the formats to measure", default="onnx")
HALF = Argument("half", "True", "the same as quantize=16", grammar.boolean)
REPEATS = Argument(
    "repeats", "20", "the number of rounds (default: as many as fit in 30 seconds)", grammar.positive_integer
)
MEASURING = (  # all arguments for measuring, except the formats
    Argument("batch", "1", "the number of images in a pass (default: 1)", grammar.positive_integer),
    Argument("device", "cpu", "cpu, or the number of an NVIDIA GPU (default: cpu)"),
    Argument(
        "threads", "4", "the number of CPU threads of a runtime (default: one for each core)", grammar.positive_integer
    ),
    REPEATS,
    HALF,
    Argument("quantize", "8", "the bits of the export: 32, 16 or 8 (default: 32)", grammar.positive_integer),
)
ON_A_PAGE = (  # without format=, a page is written without measuring
    replace(FORMAT, help="the formats to measure, as 'bench' does (default: nothing is measured)", default=None),
    *MEASURING,
)
COMMANDS = {
    command.name: command
    for command in (
        Command(
            "train",
            "prune while training",
            _train,
            (
                replace(MODEL, help="the checkpoint to start from"),
                replace(DATA, help="the dataset to train on", required=True),
                Argument("epochs", "60", "the epochs of the whole run: cuts and recovery"),
                RECIPE,
            ),
            passes_on="'yolo train'",
        ),
        Command(
            "plan",
            "show what a recipe would remove from a model",
            _plan,
            (
                MODEL,
                replace(DATA, help="the dataset, for criteria that look at images"),
                RECIPE,
                IMGSZ,
                Argument("save", "plan.json", "the file for the plan", grammar.file(".json")),
            ),
        ),
        Command(
            "apply",
            "cut and refit in one step, without training",
            _apply,
            (
                MODEL,
                replace(DATA, help="the dataset for the refit (default: the weights are not refitted)"),
                RECIPE,
                Argument("plan", "plan.json", "a plan that 'plan' saved, instead of a recipe"),
                IMGSZ,
                Argument("save", "pruned.pt", "the file to write (default: <model>-pruned.pt)", grammar.file(".pt")),
            ),
        ),
        Command(
            "show",
            "show what was removed from a model, or a recipe",
            _show,
            (Argument("model", "pruned.pt", "a checkpoint"), RECIPE),
        ),
        Command(
            "dataset",
            "write a dataset with the classes that a model keeps",
            _dataset,
            (
                replace(MODEL, example="fewer.pt", help="a checkpoint from which classes were removed"),
                replace(DATA, help="a dataset with all classes", required=True),
                Argument("save", "fewer-classes", "the new folder", default="fewer-classes"),
            ),
        ),
        Command(
            "bench",
            "compare the latency of models, and check their exports",
            _bench,
            (
                replace(
                    MODEL,
                    example="dense.pt,pruned.pt",
                    help="the checkpoints; the others are compared with the first",
                    read=grammar.files,
                ),
                FORMAT,
                IMGSZ,
                *MEASURING,
                replace(DATA, help="the dataset on which exports are compared with their checkpoints"),
                Argument("save", "bench.json", "the file for the figures", grammar.file(".json")),
            ),
        ),
        Command(
            "profile",
            "measure latencies on a device for recipe.target.profile",
            _profile,
            (
                MODEL,
                replace(FORMAT, example="ncnn", help="the format to measure"),
                IMGSZ,
                *(argument for argument in MEASURING if argument is not REPEATS),
                Argument("save", "profile.json", "the file to write", grammar.file(".json"), Path("profile.json")),
            ),
        ),
        Command(
            "report",
            "write the report of a run, on one page",
            _report,
            (
                replace(DATA, help="the dataset, for images and for class accuracies that the run did not measure"),
                Argument("model", "dense.pt", "the dense checkpoint, if it was moved since the run"),
                Argument(
                    "save",
                    "report.html",
                    "the file to write (default: in the folder of the run)",
                    grammar.file(".html"),
                ),
                replace(IMGSZ, help=IMGSZ.help.replace("model's training", "run")),
                *ON_A_PAGE,
            ),
            places="runs/detect/train",
        ),
        Command(
            "compare",
            "validate checkpoints and compare them on one page",
            _compare,
            (
                replace(DATA, help="the dataset to validate on", required=True),
                IMGSZ,
                Argument("save", "compare.html", "the file to write", grammar.file(".html"), Path("compare.html")),
                *ON_A_PAGE,
            ),
            places="dense.pt pruned.pt ...",
        ),
        Command(
            "demo",
            "run the complete workflow on a small dataset",
            _demo,
            (Argument("folder", "yolo-prune-demo", "a new folder to work in", default="yolo-prune-demo"),),
        ),
        Command("doctor", "check the start-up hook and the installed versions", _doctor),
        Command(
            "schema",
            "write the JSON schema of recipes, for editors",
            _schema,
            (
                Argument(
                    "save", "recipe.schema.json", "the file to write (default: standard output)", grammar.file(".json")
                ),
            ),
        ),
    )
}


if __name__ == "__main__":
    sys.exit(main())
