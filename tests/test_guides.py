# SPDX-License-Identifier: AGPL-3.0-or-later
"""Everything that the guides and the README tell people to run is run: on a tiny model, and with what makes it quick.

The commands of a page run in their order and in one folder, so that a later one finds what an earlier one wrote. So do
the examples in the docstrings of the public names.
"""

from __future__ import annotations

import doctest
import functools
import importlib.util
import inspect
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import made_up_clock
import pytest
import torch
import ultralytics.cfg
import yaml
from small_data import IMGSZ, tiny
from small_runs import QUICK
from ultralytics import YOLO
from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.engine.exporter import export_formats
from ultralytics.engine.model import Model
from ultralytics.engine.validator import BaseValidator

import yolo_prune
from yolo_prune import cli
from yolo_prune.data import datasets
from yolo_prune.measure import runtimes, subjects
from yolo_prune.recipe import load_recipe
from yolo_prune.report.measurement import TOLERANCES, Measurement, Tolerance

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
LINKING = (*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"""\]\(([^)\s]+)\)|\bsrc(?:set)?="([^"]+)\"""")

ELSEWHERE = {"yolo-prune demo": "test_cli.py runs the demo", "python -m pytest": "this is it"}
NEEDS = {  # modules, of formats that this package does not measure
    "coreml": ("coremltools",),
    "litert": ("litert_torch", "ai_edge_litert"),
    "executorch": ("executorch",),
    "mnn": ("MNN",),
}
EXPORTED = {".tflite": "litert", ".mlpackage": "coreml", ".engine": "engine"}
PACKAGES = {"nncf", "nvidia-modelopt", "litert-torch", "coremltools", "tensorrt"}  # to install beside our extras
MODELS = ("best.pt", "cut.pt", "yolo11n.pt", "bccd-yolo11n.pt")  # that pages speak of; and pruned.pt, from a run
COCO = ("person", "bicycle", "car", "dog", "cat")  # names of the five classes, where a page speaks of COCO
FITNESS = 0.5  # of every model: the stand-in has learnt nothing, and a limit on the drop would refuse it

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Item:
    """Something to run: a command line, or a block of Python or YAML."""

    page: Path
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{short(self.page)}:{self.line}"


def short(page: Path) -> str:
    """The name of a page in the repository."""
    return page.relative_to(ROOT).as_posix()


def items(page: Path) -> Iterator[Item]:
    text = page.read_text(encoding="utf-8")
    for block in FENCE.finditer(text):
        first = text.count("\n", 0, block.start(2)) + 1
        if block[1] != "bash":
            yield Item(page, first, block[1], block[2])
            continue
        begun = ""
        for line, row in enumerate(block[2].splitlines(), first):
            begun += row.removesuffix("\\")
            if not row.endswith("\\"):
                for command in begun.split(" && "):
                    if words := shlex.split(command, comments=True):
                        yield Item(page, line, "bash", shlex.join(words))
                begun = ""


ITEMS = [item for page in PAGES for item in items(page)]
COMMANDS = [item for item in ITEMS if item.kind == "bash"]


def wider(limit: Tolerance) -> Tolerance:
    """Limits are for models that have learnt something: rounding does more to the outputs of the stand-in."""
    return limit.model_copy(update={"outputs": 4 * limit.outputs})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """What holds for all runs here, and may be changed by them."""

    def validate(self: Any, trainer: Any = None, model: Any = None) -> Any:
        found = stock(self, trainer, model)
        return {**found, "fitness": FITNESS} if trainer and found else found

    stock = BaseValidator.__call__

    def exported(form: str, subject: subjects.Subject, setting: subjects.Setting) -> Path:
        """The export of a model that was exported before, for another command: these take most of the time."""
        weights = sum(float(t.double().abs().sum()) for t in subject.model.model.state_dict().values())
        key = (form, weights, setting.imgsz, setting.batch, setting.quantize)
        if form != "torch" and key not in kept:
            made = export(form, subject, setting)
            target = tmp_path_factory.mktemp(form) / made.name
            kept[key] = Path(shutil.copytree(made, target) if made.is_dir() else shutil.copy(made, target))
        return kept.get(key, subject.path)

    kept: dict[tuple[Any, ...], Path] = {}
    export = subjects.exported
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subjects, "exported", exported)
        for precision in ("fp16", "bf16", "int8"):
            patch.setitem(TOLERANCES, precision, wider(TOLERANCES[precision]))
        patch.setattr(BaseValidator, "__call__", validate)
        patch.setattr(ultralytics.cfg, "ARGV", [])
        patch.setattr(datasets, "MEMORY", tmp_path_factory.mktemp("memory"))
        patch.setattr(subjects, "cores", lambda: 4)  # of the devices that the guides are about
        made_up_clock.install(patch)
        yield patch


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, place: pytest.MonkeyPatch) -> Path:
    """A folder as a user has it: checkpoints, a dataset, a recipe and a run that has pruned."""
    folder = tiny(tmp_path_factory.mktemp("original"), train=4)
    scenes = yaml.safe_load((folder / "scenes/scenes.yaml").read_text(encoding="utf-8"))
    for name in ("images", "labels"):
        (folder / "scenes" / name).rename(folder / name)
    for name in ("data.yaml", "bccd.yaml"):
        (folder / name).write_text(yaml.safe_dump(scenes), encoding="utf-8")
    for name in MODELS:
        shutil.copy(folder / "dense.pt", folder / name)
    (folder / "coco.yaml").write_text(yaml.safe_dump({**scenes, "names": dict(enumerate(COCO))}), encoding="utf-8")
    coco = YOLO(folder / "dense.pt")
    coco.model.names = dict(enumerate(COCO))
    coco.save(folder / "coco.pt")
    yolo_prune.apply(coco, yolo_prune.plan(coco, {"structure": {"keep_classes": ["person", "car"]}}, imgsz=IMGSZ))
    coco.save(folder / "fewer.pt")
    (folder / "my.yaml").write_text("target: {flops: 0.5}\n", encoding="utf-8")
    place.chdir(folder)
    execute(shortened("yolo train model=best.pt data=data.yaml callbacks=prune recipe.criterion=magnitude".split()))
    shutil.copy(folder / "runs/detect/train/weights/best.pt", folder / "pruned.pt")
    execute(shortened("yolo export model=pruned.pt format=onnx".split()))
    execute(shortened("yolo-prune profile model=best.pt save=profile.json".split()))  # as if from another device
    return folder


@pytest.fixture(scope="module")
def folders(original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """A copy of it for every page."""
    return {page: Path(shutil.copytree(original, tmp_path_factory.mktemp(page.stem) / "here")) for page in PAGES}


@pytest.fixture(scope="module")
def done() -> dict[frozenset[str], Item]:
    """Training runs: they take long, and pages have some in common."""
    return {}


@pytest.fixture(scope="module")
def names() -> dict[Path, dict[str, Any]]:
    """What the Python of a page has defined so far."""
    return {page: {"__name__": page.stem} for page in PAGES}


def shortened(words: list[str]) -> list[str]:
    """A command with arguments at its end that make it quick, and the head of a YOLO11 called as in the stand-in."""
    words = [word.replace("model.23", "model.10") for word in words]
    size, device, runs = f"imgsz={IMGSZ}", "device=cpu", f"project={Path.cwd() / 'runs/detect'}"
    if words[1] == "train":
        limit = "smallest" in str(words) or "max_drop" in str(words)
        search = ["epochs=2", "recipe.schedule.rounds=1"] if limit else ["epochs=1"]
        if "recipe=lottery" in words:
            search = ["epochs=3", "recipe.schedule.rounds=1"]
        return [*words, *search, "batch=4", size, runs, *(f"{k}={v}" for k, v in QUICK.items())]
    if words[0] == "yolo":
        more = [] if words[1] == "export" else [runs, "workers=0", "plots=False"]
        return [*words, size, device, *more]
    if words[1] in ("plan", "apply", "bench", "compare", "profile"):
        more = (
            ["repeats=2", "threads=1"]
            if words[1] == "bench" or (words[1] == "compare" and "format=" in str(words))
            else []
        )
        return [*words, size, *more]
    return [*words, "repeats=2", "threads=1"] if words[1] == "report" and "format=" in str(words) else words


def execute(words: list[str]) -> None:
    """Run a command in this process, as its console script would."""
    torch.set_num_threads(1)  # another command may have changed it
    if words[0] == "yolo":
        ultralytics.cfg.ARGV[:] = words
        ultralytics.cfg.entrypoint()
    else:
        assert words[0] == "yolo-prune", f"nobody knows how to run {words[0]}"
        assert cli.main(words[1:]) == 0


def lacks(words: list[str]) -> str | None:
    """What a command needs that is not here."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    formats = given.get("format", "onnx" if words[1:2] == ["bench"] else "").split(",")
    formats += [form for suffix, form in EXPORTED.items() if suffix in given.get("model", "")]
    modules: list[str] = []
    for form in formats:
        found = runtimes.FORMATS.get(form)
        modules += NEEDS.get(form, found.modules if found else ())
    if given.get("quantize") == "8":
        modules += ["modelopt"] if "train" in words or "engine" in formats else []
        modules += ["nncf"] if "openvino" in formats else []
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed here"
    gpu = "engine" in formats or given.get("device", "cpu") != "cpu"
    return "no NVIDIA GPU here" if gpu and not torch.cuda.is_available() else None


def check_unrun(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What can be said of a command that lacks something: its arguments exist, and nothing else is wrong with it."""
    if words[0] == "yolo":
        given = dict(word.split("=", 1) for word in words[2:])
        assert set(given) <= set(DEFAULT_CFG_DICT)
        assert given.get("format", "onnx") in export_formats()["Argument"]
        return
    assert cli.main(words[1:]) == 1
    assert re.search("not installed here|sees no(ne| GPUs)", capsys.readouterr().err)


def check_install(words: list[str]) -> None:
    """What pip is told to install: extras that there are, and packages that a runtime needs."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.findall(
        r"^(\w+) = \[", project.split("[project.optional-dependencies]")[1].split("\n[")[0], re.MULTILINE
    )
    for word in words[2:]:
        if ours := re.fullmatch(r"(?:\.|yolo-prune)(?:\[(.+)\])?", word):
            assert set((ours[1] or "export").split(",")) <= set(extras)
        else:
            assert word in PACKAGES


@pytest.mark.parametrize("item", COMMANDS, ids=str)
def test_a_command_works(
    item: Item,
    folders: dict[Path, Path],
    place: pytest.MonkeyPatch,
    done: dict[frozenset[str], Item],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = shlex.split(item.text)
    if item.text in ELSEWHERE:
        pytest.skip(ELSEWHERE[item.text])
    if words[:2] == ["pip", "install"]:
        return check_install(words)
    same = frozenset(word for word in words if not word.startswith("imgsz="))
    if words[1] == "train" and done.setdefault(same, item) is not item:
        pytest.skip(f"the same as {done[same]}")
    place.chdir(folders[item.page])
    if reason := lacks(words):
        check_unrun(words, capsys)
        pytest.skip(reason)
    execute(shortened(words))
    return None


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python that trains or measures does so for a moment."""
    train = Model.train

    @functools.wraps(train)
    def short_run(self: Any, *args: Any, **settings: Any) -> Any:
        return train(self, *args, **{**settings, **QUICK, "imgsz": IMGSZ, "batch": 4, "project": "runs"})

    monkeypatch.setattr(Model, "train", short_run)
    monkeypatch.setattr(yolo_prune, "bench", functools.partial(yolo_prune.bench, repeats=2, threads=1))
    torch.set_num_threads(1)


def quick(source: str) -> str:
    return re.sub(r"\bimgsz=\d+", f"imgsz={IMGSZ}", re.sub(r"\bepochs=\d+", "epochs=1", source))


@pytest.mark.usefixtures("briefly")
@pytest.mark.parametrize("item", [item for item in ITEMS if item.kind == "python"], ids=str)
def test_python_works(
    item: Item, folders: dict[Path, Path], names: dict[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders[item.page])
    exec(compile("\n" * (item.line - 1) + quick(item.text), item.page, "exec"), names[item.page])


def described() -> Iterator[tuple[str, str]]:
    """The public names, with the methods of classes, and their docstrings."""
    for name in yolo_prune.__all__:
        if name != "__version__":
            yield from docstrings(name, getattr(yolo_prune, name))
    yield from docstrings("Measurement", Measurement)


def docstrings(name: str, value: Any) -> Iterator[tuple[str, str]]:
    yield name, inspect.getdoc(value) or ""
    if inspect.isclass(value):
        for attribute, member in vars(value).items():
            inner = getattr(member, "__func__", getattr(member, "fget", member))  # of a classmethod, of a property
            if not attribute.startswith("_") and inspect.isfunction(inner) and inner.__doc__:
                yield f"{name}.{attribute}", inspect.getdoc(inner) or ""


@pytest.fixture(scope="module")
def workplace(original: Path, place: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the examples, with what those of methods load."""
    folder = Path(shutil.copytree(original, tmp_path_factory.mktemp("examples") / "here"))
    place.chdir(folder)
    yolo_prune.plan("best.pt", "half-flops", imgsz=IMGSZ).save("plan.json")
    yolo_prune.bench(["best.pt", "pruned.pt"], imgsz=IMGSZ, repeats=2, threads=1, save="bench.json")
    return folder


class Lenient(doctest.OutputChecker):
    """Training prints a progress bar, and an example without an output does not promise that there is none."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.usefixtures("briefly")
@pytest.mark.parametrize(("name", "text"), list(described()), ids=[name for name, _ in described()])
def test_an_example_works(name: str, text: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    example = doctest.DocTestParser().get_doctest(quick(text), {}, name, None, None)
    assert example.examples, "a public name needs an example"
    said: list[str] = []
    runner = doctest.DocTestRunner(Lenient(), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(example, out=said.append).failed == 0, "".join(said)


@pytest.mark.parametrize("item", [item for item in ITEMS if item.kind == "yaml"], ids=str)
def test_a_recipe_is_one(item: Item, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(item.text, encoding="utf-8")
    load_recipe(tmp_path / "recipe.yaml")


def test_nothing_is_left_out() -> None:
    assert {item.kind for item in ITEMS} <= {"bash", "python", "yaml"}
    stems = {item.page.stem for item in COMMANDS}
    assert stems >= {"README", "start", "targets", "devices", "troubles", "command-line", "design"}


@pytest.mark.parametrize("page", LINKING, ids=short)
def test_links_lead_somewhere(page: Path) -> None:
    for link in map("".join, LINK.findall(page.read_text(encoding="utf-8"))):
        if not link.startswith("http"):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
