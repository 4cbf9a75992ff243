# SPDX-License-Identifier: AGPL-3.0-or-later
"""The console script `yolo-prune`, in Ultralytics' `key=value` grammar."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from yolo_prune._version import __version__
from yolo_prune.errors import PruneError

HELP = f"""yolo-prune {__version__}: structured pruning as an ordinary part of an Ultralytics YOLO run

  yolo-prune train model=best.pt data=data.yaml epochs=60 [recipe=half-flops]   prune while training
  yolo-prune plan  model=best.pt [data=data.yaml] [recipe=half-flops] [imgsz=640] [save=plan.json]   look before you cut
  yolo-prune apply model=best.pt data=data.yaml [recipe=half-flops | plan=plan.json] [imgsz=640] [save=pruned.pt]
                                                                one shot: cut and refit, no training
  yolo-prune show  model=pruned.pt | recipe=half-flops   what was done to a checkpoint; what a recipe says
  yolo-prune bench model=dense.pt,pruned.pt [format=onnx,openvino] [imgsz=640] [batch=1] [device=cpu] [threads=N]
                   [repeats=N] [half=True | quantize=16 | quantize=8] [data=data.yaml] [save=bench.json]
                                                                is it really faster, and still the same model?
  yolo-prune profile model=best.pt format=ncnn [imgsz=640] [batch=1] [device=cpu] [threads=N] [half=True]
                   [save=profile.json]   on the target device: what recipe.target.profile reads elsewhere
  yolo-prune report  runs/detect/train [data=data.yaml] [model=dense.pt] [save=report.html]
                                                                what a run did, on one page
  yolo-prune compare dense.pt pruned.pt ... data=data.yaml [imgsz=640] [save=compare.html]
                                                                checkpoints side by side, validated anew
                     both with [format=onnx,openvino], measured as 'bench' does, with its arguments
  yolo-prune demo  [folder=yolo-prune-demo]   everything on a small made-up dataset, in a few minutes
  yolo-prune doctor   is the start-up hook active, which versions are here
  yolo-prune schema [save=recipe.schema.json]   JSON schema of recipes, for editors

'train' takes every argument of 'yolo train'. Recipe fields are overridden by recipe.<field>=<value>, for example
recipe.target.flops=0.4. Bundled recipes: half-flops (default), gentle, edge, smallest. After installation
'yolo train ... callbacks=prune' does the same as 'yolo-prune train ...'.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. A user's mistake is one message on standard error, and status 1."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0].lstrip("-") in ("help", "h"):
        print(HELP)
        return 0
    if given[0].lstrip("-") in ("version", "v"):
        print(__version__)
        return 0
    name, *rest = given
    try:
        if name not in COMMANDS:
            near = get_close_matches(name, COMMANDS)
            hint = f"Did you mean '{near[0]}'? " if near else ""
            raise PruneError(f"'{name}' is not a command. {hint}Commands: {', '.join(COMMANDS)}.")
        if any(a.lstrip("-") in ("help", "h") for a in rest):
            print(HELP)
            return 0
        status = COMMANDS[name](rest)
        sys.stdout.flush()
        return status
    except (PruneError, SyntaxError, FileNotFoundError) as e:
        print(f"yolo-prune {name}: {str(e).strip()}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `yolo-prune show ... | head`: nobody reads on, and Python is not to try once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _train(arguments: list[str]) -> int:
    from yolo_prune import _startup

    _startup.install(force=True)
    import ultralytics.cfg
    import ultralytics.engine.model  # imported to be patched

    if errors := _startup.state().errors:
        raise PruneError("; ".join(f"{k} could not be patched: {v}" for k, v in errors.items()))
    resumes = [a.lower() for a in arguments if a.partition("=")[0] == "resume"]
    resumed = any(not a.endswith(FALSE) for a in resumes)
    if not resumed and not any(a.startswith("callbacks=") for a in arguments):
        arguments = [*arguments, "callbacks=prune"]
    ultralytics.cfg.ARGV[:] = ["yolo-prune", "train", *arguments]
    ultralytics.cfg.entrypoint()
    return 0


def _plan(arguments: list[str]) -> int:
    values, overrides = _parse("plan", arguments, ("model", "recipe", "imgsz", "data", "save"))
    from yolo_prune import api

    plan = api.plan(_model(values), values.get("recipe"), imgsz=_imgsz(values), data=values.get("data"), **overrides)
    print(plan.describe())
    if save := values.get("save"):
        print(f"saved {plan.save(_target(save, '.json'))}")
    return 0


def _apply(arguments: list[str]) -> int:
    values, overrides = _parse("apply", arguments, ("model", "recipe", "plan", "imgsz", "data", "save"))
    if "plan" in values and ("recipe" in values or overrides):
        raise PruneError("plan= and recipe= exclude one another: a plan already says what goes.")
    source = Path(_model(values))
    target = _target(values.get("save") or f"{source.stem}-pruned.pt", ".pt")
    if target.resolve() == source.resolve():
        raise PruneError(f"save={target} would overwrite the model itself. Choose another name.")
    from yolo_prune import api
    from yolo_prune.cut.plan import Plan
    from yolo_prune.recipe import load_recipe

    model = api.open_model(source)
    recipe = load_recipe(values.get("recipe"), overrides)
    if "plan" in values:
        plan = Plan.load(values["plan"])
    else:
        plan = api.plan(model, recipe, imgsz=_imgsz(values), data=values.get("data"))
    refit = recipe.recover.refit
    proven = api.apply(model, plan, data=values.get("data"), imgsz=_imgsz(values), refit=refit)
    api.save(model, target)
    print(plan.describe())
    if proven:
        print(f"exact: the pruned model computes what silencing computes, to {proven.error:.0e} in float64")
    why = "data= was not given" if "data" not in values else "" if refit else "the recipe says refit: 0"
    fitted = why and f"; the weights were not refitted, as {why}"
    print(f"saved {target}{fitted}. Train it further with: yolo train model={target} data=... epochs=...")
    return 0


def _bench(arguments: list[str]) -> int:
    values, _ = _parse("bench", arguments, ("model", "imgsz", "data", "save", *MEASURING))
    models = [name for name in _model(values).split(",") if name]
    save = _target(values["save"], ".json") if "save" in values else None
    formats, how = _measuring({"format": "onnx", **values})
    from yolo_prune.measure import benchmark
    from yolo_prune.measure.subjects import Setting

    asked = Setting.of(_imgsz(values), data=values.get("data"), **how)
    found = benchmark.measure(models, formats, asked)
    print(found)
    if save:
        print(f"\nsaved {found.save(save)}")
    found.check()
    return 0


def _profile(arguments: list[str]) -> int:
    known = ("model", "format", "imgsz", "batch", "device", "threads", "half", "quantize", "save")
    values, _ = _parse("profile", arguments, known)
    source, save = _model(values), _target(values.get("save", "profile.json"), ".json")
    formats, how = _measuring({"format": "onnx", **values})
    if len(formats) > 1:
        raise PruneError(f"format={values['format']}: a profile is of one runtime. Write one file for each.")
    from yolo_prune import api
    from yolo_prune.latency import target
    from yolo_prune.measure.subjects import Setting

    asked = Setting.of(_imgsz(values), **how)
    print(f"saved {target.profile(api.open_model(source), formats[0], asked, save)}")
    return 0


def _show(arguments: list[str]) -> int:
    values, overrides = _parse("show", arguments, ("model", "recipe"))
    if "model" not in values:
        from yolo_prune.recipe import load_recipe

        print(load_recipe(values.get("recipe"), overrides).to_yaml(), end="")
        return 0
    from yolo_prune import api

    print(api.describe(_model(values)))
    return 0


def _report(arguments: list[str]) -> int:
    runs, rest = _places(arguments)
    values, _ = _parse("report", rest, ("data", "model", "save", "imgsz", *MEASURING))
    if len(runs) != 1:
        given = f"{len(runs)} runs were named" if runs else "no run was named"
        raise PruneError(f"{given}; pass the folder of one, as in 'yolo-prune report runs/detect/train'.")
    save = _target(values["save"], ".html") if "save" in values else None
    size = _imgsz(values) if "imgsz" in values else None
    formats, how = _measuring(values, *(["imgsz"] if size else []))
    from yolo_prune.pages import run_page

    known = {key: values.get(key) for key in ("data", "model")}
    found = run_page.measure_run(runs[0], formats, imgsz=size, **known, **how) if formats else None
    path = run_page.write_report(runs[0], save=save, **known)
    print(f"{found}\n\nsaved {path}" if found else f"saved {path}")
    if found:
        found.check()
    return 0


def _compare(arguments: list[str]) -> int:
    models, rest = _places(arguments)
    values, _ = _parse("compare", rest, ("data", "imgsz", "save", *MEASURING))
    if len(models) < 2:
        raise PruneError(f"pass two or more checkpoints to compare. {_usage('compare')}")
    if again := next((m for m in models if models.count(m) > 1), None):
        raise PruneError(f"'{again}' is named twice. Name every checkpoint once.")
    if "data" not in values:
        raise PruneError("data= is missing: pass the dataset to validate on, for example data=data.yaml.")
    save, imgsz = _target(values.get("save", "compare.html"), ".html"), _imgsz(values)
    formats, how = _measuring(values)
    from yolo_prune.pages import compare_page

    text, found = compare_page.compare(models, values["data"], imgsz, save, formats, **how)
    print(f"{text}\nsaved {save}")
    if found:
        found.check()
    return 0


def _demo(arguments: list[str]) -> int:
    values, _ = _parse("demo", arguments, ("folder",))
    from yolo_prune.demo import tour

    return tour.run(Path(values.get("folder", "yolo-prune-demo")))


def _doctor(arguments: list[str]) -> int:
    _parse("doctor", arguments, ())
    from yolo_prune import doctor

    diagnosis = doctor.diagnose()
    print(doctor.render(diagnosis))
    return diagnosis.exit_code


def _schema(arguments: list[str]) -> int:
    values, _ = _parse("schema", arguments, ("save",))
    from yolo_prune.env.files import write_text
    from yolo_prune.recipe import json_schema

    text = json.dumps(json_schema(), indent=2) + "\n"
    if "save" in values:
        print(f"saved {write_text(_target(values['save'], '.json'), text)}")
    else:
        print(text, end="")
    return 0


MEASURING = ("format", "batch", "device", "threads", "repeats", "half", "quantize")
FALSE = ("=false", "=0", "=none", "=")
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "plan": _plan,
    "apply": _apply,
    "bench": _bench,
    "profile": _profile,
    "show": _show,
    "report": _report,
    "compare": _compare,
    "demo": _demo,
    "doctor": _doctor,
    "schema": _schema,
}


def _parse(command: str, arguments: list[str], known: tuple[str, ...]) -> tuple[dict[str, str], dict[str, Any]]:
    """Split `key=value` into the command's own arguments and recipe overrides."""
    values: dict[str, str] = {}
    overrides: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not equals or not value:
            raise PruneError(f"'{argument}' is not of the form key=value. {_usage(command)}")
        if key.startswith("recipe.") and "recipe" in known:
            overrides[key.removeprefix("recipe.")] = value
        elif key in known:
            values[key] = value
        else:
            near = get_close_matches(key, known) or (_fields(key) if "recipe" in known else [])
            raise PruneError(
                f"'{key}' is not an argument of '{command}'. "
                + (f"Did you mean '{near[0]}'? " if near else "")
                + (f"It takes {', '.join(known)}." if known else "It takes none.")
            )
    return values, overrides


def _fields(key: str) -> list[str]:
    """Recipe fields that a name without their section may mean."""
    from yolo_prune.recipe.schema import Recipe

    last = key.rpartition(".")[2]
    sections = {name: getattr(field.annotation, "model_fields", {}) for name, field in Recipe.model_fields.items()}
    return [f"recipe.{name}.{last}" for name, fields in sections.items() if last in fields] + (
        [f"recipe.{last}"] if last in sections else []
    )


def _measuring(values: dict[str, str], *others: str) -> tuple[list[str], dict[str, Any]]:
    """The formats to measure in, none where format= is not given, and how, for `Setting.of`."""
    if "format" not in values:
        if alone := next((key for key in (*others, *MEASURING) if key in values), None):
            raise PruneError(f"{alone}= says how to measure, and format= is missing, for example format=onnx.")
        return [], {}
    how: dict[str, Any] = {"device": values["device"]} if "device" in values else {}
    how |= {k: _whole(k, values[k]) for k in ("batch", "threads", "repeats", "quantize") if k in values}
    if _truth("half", values.get("half", "False")) and how.setdefault("quantize", 16) != 16:
        raise PruneError(f"half=True is quantize=16, and quantize={values['quantize']} was given. Leave one out.")
    from yolo_prune.measure import runtimes

    return runtimes.parse(values["format"]), how


def _places(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The files and folders among the arguments, and the others."""
    places = [a for a in arguments if "=" not in a or Path(a).exists()]
    return places, [a for a in arguments if a not in places]


def _usage(command: str) -> str:
    return next((f"Usage: {line.strip()}" for line in HELP.splitlines() if f"yolo-prune {command}" in line), "")


def _model(values: dict[str, str]) -> str:
    if "model" not in values:
        raise PruneError("model= is missing: pass a .pt checkpoint, for example model=best.pt.")
    return values["model"]


def _imgsz(values: dict[str, str]) -> int:
    text = values.get("imgsz", "640")
    if not text.isdigit() or not 32 <= int(text) <= 8192 or int(text) % 32:
        raise PruneError(f"imgsz={text}: must be a multiple of 32 between 32 and 8192.")
    return int(text)


def _whole(key: str, text: str) -> int:
    if not text.isdigit() or not int(text):
        raise PruneError(f"{key}={text}: must be a whole number of at least 1.")
    return int(text)


def _truth(key: str, text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise PruneError(f"{key}={text}: must be True or False.")
    return text.lower() in ("true", "1")


def _target(name: str, suffix: str) -> Path:
    path = Path(name)
    if path.suffix != suffix:
        raise PruneError(f"save={name}: the name must end in {suffix}.")
    return path


if __name__ == "__main__":
    sys.exit(main())
