# SPDX-License-Identifier: AGPL-3.0-or-later
"""What works on which architecture: measures every cell of docs/reference/support.md.

python tests/support.py            # writes docs/reference/support.md; about 15 minutes on two cores
python tests/support.py yolo12     # prints the rows of some architectures
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "false"}
if __name__ == "__main__":
    os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="yolo-prune-support-")

import oracle
import torch
import zoo
from torch import nn
from ultralytics import RTDETR, YOLO, YOLOE, YOLOWorld
from ultralytics.utils import LOGGER

from yolo_prune import recover
from yolo_prune.cut import proof, surgery
from yolo_prune.cut.plan import Plan
from yolo_prune.cut.record import Record, write_record
from yolo_prune.graph import Graph, trace
from yolo_prune.planning import planner
from yolo_prune.recipe import Recipe, load_recipe

PAGE = Path(__file__).parents[1] / "docs/reference/support.md"
COLUMNS = ("plan", "exact", "least FLOPs", "train step", "stock reload", "fuse", "ONNX", "again")
NUMBERS = {"exact": 1e-8, "fuse": 1e-2, "ONNX": 1e-2}  # largest error allowed
THIN = 0.25  # width multiple of the models that the test suite measures
RELOAD = """
import sys, torch
sys.modules["yolo_prune"] = None
from ultralytics.nn.tasks import load_checkpoint
import zoo
for path in sys.argv[1:]:
    try:
        model, image, wanted = load_checkpoint(path + ".pt")[0].float().eval(), *torch.load(path + ".ref")
        gap = zoo.relative(wanted, zoo.decoded(model, image))
        print(path, "yes" if gap < 1e-3 else f"no: another output, by {gap:.0e}", sep="\\t")
    except Exception as e:
        print(path, f"no: {type(e).__name__}: {e}".splitlines()[0], sep="\\t")
"""


@dataclass
class Row:
    """One architecture.

    Attributes:
        name: of its YAML file.
        cells: what was found, by column; an error that is in order, "yes", or "no: why".
        protected: `{reason: share of the parameters}`.
    """

    name: str
    cells: dict[str, Any] = field(default_factory=dict)
    protected: dict[str, float] = field(default_factory=dict)


def recipe(keep: float, **fields: Any) -> Recipe:
    """The default recipe with a target."""
    return load_recipe(
        "half-flops",
        {"target.flops": keep, "criterion": "magnitude", **{k.replace("_", ".", 1): v for k, v in fields.items()}},
    )


def measure(name: str, folder: Path, width: float | None = None, columns: tuple[str, ...] = COLUMNS) -> Row:
    """Fill the row of an architecture, or some columns of it; `reload` does the reloading, of all at once."""
    row = Row(name)

    def cell(column: str, of: Callable[[], Any]) -> Any:
        if column in COLUMNS and column not in columns:
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = of()
        except Exception as e:  # whatever it is, it belongs into the table
            row.cells[column] = f"no: {type(e).__name__}: {e}".splitlines()[0]
            return None
        row.cells[column] = "yes" if value is None else value
        return value

    size = 2 * zoo.image_size(name)
    precise = zoo.randomise(zoo.build(name, width).double())
    model = settled(precise, name)
    graph = cell("trace", lambda: trace(model, imgsz=size))
    if graph is None:
        row.cells["plan"] = row.cells["trace"]
        return row
    row.cells.pop("trace")
    least = cell("least FLOPs", lambda: planner.limits_of(model, graph, recipe(0.5)).least("flops"))
    row.protected = protected(model, graph)
    first, second = (least + (1 - least) * share for share in (0.6, 0.3))
    plan = cell("plan", lambda: planner.plan_for(model, graph, recipe(first)))
    if plan is None:
        return row
    cell("exact", lambda: exact(name, precise, plan))
    surgery.apply(model, plan)
    write_record(model, Record({}, plan, graph.widths))
    cell("train step", lambda: train_step(model, name))
    cell("again", lambda: again(deepcopy(model), recipe(second), size))
    if "stock reload" in columns:
        save(model, name, folder)
    cell("fuse", lambda: fuse(model, name))
    if cell("ONNX", lambda: onnx(model, name, folder)) is None and "ONNX" in columns:
        save(deepcopy(precise).float(), name, folder, "dense-")
        cell("dense", lambda: onnx(model, name, folder, "dense-"))
        row.cells["ONNX"] = _as_dense(row.cells["ONNX"], row.cells.pop("dense"))
    row.cells["plan"] = f"{plan.predicted.flops_kept:.2f}"
    return row


def settled(precise: nn.Module, name: str) -> Any:
    """A copy in float32 whose batch norms fit its activations: outputs are neither saturated nor all alike."""
    model = deepcopy(precise).float().eval()
    recover.recalibrate(model, [zoo.images(model, name, 2, seed) for seed in range(3)])
    if zoo.task_of(name) == "semantic":
        nn.init.zeros_(model.model[-1].classifier[-1].bias)  # else one class wins everywhere
    return model


def exact(name: str, original: nn.Module, plan: Plan) -> float:
    """The oracle's error, and the package's own proof must hold too."""
    proof.prove(original, plan)
    pruned = deepcopy(original)
    surgery.apply(pruned, plan)
    return oracle.judge(original, pruned, name)


def train_step(model: Any, name: str) -> None:
    """One step on the task's own loss: finite, and every layer that the loss reaches learns."""
    model.train()
    batch = zoo.batch(model, name)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6)
    loss = model.loss(batch)[0].sum()
    loss.backward()
    assert torch.isfinite(loss), "the loss is not finite"
    learns = [p for p in model.parameters() if p.grad is not None]
    assert len(learns) > len(list(model.parameters())) // 3, "hardly anything has a gradient"
    assert all(torch.isfinite(p.grad).all() for p in learns), "a gradient is not finite"
    optimizer.step()
    optimizer.zero_grad()
    model.criterion = None
    model.eval()


def again(model: nn.Module, recipe: Recipe, size: int) -> str:
    """Prune further, proved."""
    plan = planner.make_plan(model, recipe, size)
    proof.prove(model, plan)
    surgery.apply(model, plan)
    return f"{plan.predicted.flops_kept:.2f}"


def save(model: Any, name: str, folder: Path, prefix: str = "pruned-") -> None:
    """A checkpoint as Ultralytics writes it, and what the model in it puts out."""
    half = deepcopy(model).half()
    torch.save({"model": half, "train_args": {}, "date": "", "version": ""}, folder / f"{prefix}{name}.pt")
    copy = deepcopy(half).float().eval()
    image = zoo.images(copy, name, 1)
    torch.save((image, zoo.decoded(copy, image)), folder / f"{prefix}{name}.ref")


def reload(rows: list[Row], folder: Path) -> None:
    """Load all checkpoints where this package cannot be imported, under ULTRALYTICS_SAFE_LOAD=1."""
    said = _reloaded([folder / f"pruned-{r.name}" for r in rows])
    for row in rows:
        row.cells["stock reload"] = said[f"pruned-{row.name}"]
    failed = [r for r in rows if not good("stock reload", r.cells["stock reload"])]
    for row in failed:
        save(zoo.build(row.name), row.name, folder, "dense-")
    said = _reloaded([folder / f"dense-{r.name}" for r in failed])
    for row in failed:
        row.cells["stock reload"] = _as_dense(row.cells["stock reload"], said[f"dense-{row.name}"])


def _as_dense(pruned: str, dense: str) -> str:
    """A failure, or that the dense model fails alike."""
    alike = str(dense).startswith("no:") and str(dense)[:30] == pruned[:30]
    return f"as dense: {pruned.removeprefix('no: ').split('.pt ')[-1].split('. ')[0]}" if alike else pruned


def _reloaded(paths: list[Path]) -> dict[str, str]:
    if not paths:
        return {}
    environment = os.environ | {
        "ULTRALYTICS_SAFE_LOAD": "1",
        "YOLO_PRUNE_HOOK": "0",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    command = [sys.executable, "-c", RELOAD, *map(str, paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    said = dict(line.split("\t") for line in done.stdout.splitlines() if "\t" in line)
    error = (done.stderr.strip().splitlines() or ["it was not loaded"])[-1]
    return {p.name: said.get(str(p), f"no: {error}") for p in paths}


def fuse(model: nn.Module, name: str) -> float:
    """Fold batch norms and branches; the output stays."""
    plain, fused = deepcopy(model).eval(), deepcopy(model).eval()
    image = zoo.images(plain, name, 1)
    wanted = zoo.decoded(plain, image)
    fused.fuse(verbose=False)
    return zoo.relative(wanted, zoo.decoded(fused, image))


def onnx(model: Any, name: str, folder: Path, prefix: str = "pruned-") -> float:
    """Export through the standard exporter; ONNX Runtime agrees with torch."""
    import onnxruntime

    image = zoo.images(model, name, 1)
    cls = RTDETR if "rtdetr" in name else YOLOE if "yoloe" in name else YOLOWorld if "world" in name else YOLO
    yolo = cls(folder / f"{prefix}{name}.pt")
    if "yoloe" in name:
        yolo.model.pe = model.pe
    file = yolo.export(format="onnx", imgsz=list(image.shape[2:]), verbose=False, simplify=False)
    session = onnxruntime.InferenceSession(file)
    got = [torch.from_numpy(o) for o in session.run(None, {session.get_inputs()[0].name: image.numpy()})]
    stock = deepcopy(yolo.model).float().eval()
    stock.fuse(verbose=False)
    for module in stock.modules():
        if hasattr(module, "export"):
            module.export, module.format = True, "onnx"
    with torch.no_grad():
        wanted = zoo.outputs(stock(image))
    Path(file).unlink()
    return zoo.relative(wanted, got)


def protected(model: nn.Module, graph: Graph) -> dict[str, float]:
    """`{reason: share of all parameters}` of the layers that are protected for it."""
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    total, shares = sum(sizes.values()), dict[str, float]()
    for group in graph.groups:
        if group.protected:
            own = {slot.tensor for s in group.sets for slot in s.slots if slot.dim == 0 and slot.tensor in sizes}
            own = {t for t in own if t.rpartition(".")[0].removesuffix(".bn") in {*group.layers, *_stems(group.layers)}}
            shares[group.protected] = shares.get(group.protected, 0.0) + sum(sizes[t] for t in own) / total
    return shares


def _stems(layers: tuple[str, ...]) -> set[str]:
    return {name.removesuffix(".conv") for name in layers}


def good(column: str, value: Any) -> bool:
    """Whether a cell is in order."""
    if column in NUMBERS and not str(value).startswith("as dense:"):
        return isinstance(value, float) and value <= NUMBERS[column]
    return isinstance(value, float) or not str(value).startswith("no:")


def page(rows: list[Row], seconds: float) -> str:
    """docs/reference/support.md."""
    lines = [HEADER, "| architecture | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in rows:
        lines.append(f"| {row.name} | " + " | ".join(_text(c, row.cells.get(c, "no: not run")) for c in COLUMNS) + " |")
    lines += [FAMILIES, "| architecture | protected: reason (share of the parameters) |", "|---|---|"]
    for row in rows:
        shares = sorted(row.protected.items(), key=lambda item: -item[1])
        told = "; ".join(f"{reason} ({share:.1%})" for reason, share in shares)
        lines.append(f"| {row.name} | {told or 'nothing'} |")
    import ultralytics

    lines += ["", f"Ultralytics {ultralytics.__version__}, torch {torch.__version__.split('+')[0]}; {seconds:.0f} s."]
    return "\n".join(lines) + "\n"


def _text(column: str, value: Any) -> str:
    if column == "least FLOPs" and isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:.0e}" if isinstance(value, float) else str(value).replace("|", "/")


HEADER = """# Supported models

yolo-prune prunes every model YAML that Ultralytics ships, in every scale: YOLOv3 to YOLO26, RT-DETR, YOLO-World and
YOLOE. The tasks are detection, segmentation (instance and semantic), depth, pose, oriented boxes and classification.
Checkpoint files of earlier releases (8.0 to 8.3) work as well. What other releases of Ultralytics ship is tested, too
([table](../results.md#releases-of-ultralytics)).

**What is pruned.** Backbones, necks, attention, the feed-forward layers of transformers, and the hidden channels of
all heads. In an end-to-end head, both branches are pruned to the same widths (numbers of channels).

**What is protected.** A protected layer keeps all its output channels. `yolo-prune plan` prints the reason for each
layer. Examples are the outputs of the task, the channels of a transformer that pass through LayerNorm, and the width
of a text embedding.

**Your own blocks.** yolo-prune analyses the forward pass of a block. Sizes that are read from a tensor or stored as a
whole number follow a cut. If the plan protects a block because of another size, add [a rule for the
block](blocks.md#a-rule).

**What is refused.** Fused and quantized checkpoints, exported files, SAM, YOLO-NAS, and the class `FastSAM` (open the
file with `YOLO(...)`). The error message says which file to pass instead.

**Where training runs.** On a CPU, on one GPU or on several GPUs, with `distill_model=` and the other settings of
Ultralytics' trainer. Five settings are an error together with `callbacks=prune`: `compile=True`, `quantize=8`,
`time=`, `save=False` and a list of datasets. All five work when you train the pruned checkpoint afterwards. See
[What works with what](../how-to/training.md#what-works-with-what).

## Test results for each architecture

The tests use every model YAML that Ultralytics ships, at its smallest scale, with three classes and random weights.
`python tests/support.py` measures the table and writes this page. A test of this project measures the values again, and
fails if a value becomes worse. The columns are:

- **plan**: fraction of the FLOPs that the first cut keeps. The cut removes 40 % of the FLOPs that may be removed.
- **exact**: largest difference between the outputs of the pruned model and of a reference model, in float64, divided
  by the variation of the output. In the reference model, the removed channels are set to zero. This test does not
  use the plan: the kept channels are found by a comparison of the pruned weights with the original weights.
- **least FLOPs**: smallest fraction of the FLOPs that the default limits allow (`round_to: 8`, `min: 8`,
  `max_removed: 0.75`).
- **train step**: whether one AdamW step on the task's own loss works after the cut.
- **stock reload**: whether Python without yolo-prune loads the saved checkpoint under `ULTRALYTICS_SAFE_LOAD=1`, with
  the same outputs.
- **fuse**: largest difference between the outputs before and after `fuse()`, in float32, divided by the largest
  output.
- **ONNX**: largest difference between the outputs of torch and of ONNX Runtime after the standard export, in float32,
  divided by the largest output.
- **again**: fraction of the FLOPs that a second cut keeps. The second cut passes the same test as the first.

Architectures with text inputs are tested with random embeddings. "As dense" means that the unpruned model has the same
limitation.
"""
FAMILIES = """
## What is protected, and why

The percentages are fractions of the parameters. A percentage counts the layers whose output channels may not be
removed. (The
input channels of these layers may be removed.) The tested models are small and have three classes, so heads have a
larger fraction of the parameters than in other models.
"""


def main() -> None:
    """Measure, then write the page or print the rows asked for."""
    LOGGER.setLevel("ERROR")
    thin = "--thin" in sys.argv
    names, began = [a for a in sys.argv[1:] if a != "--thin"] or zoo.NAMES, time.time()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            start = time.time()
            rows.append(measure(name, Path(folder), THIN if thin else None))
            print(f"{time.time() - start:5.1f} s  {name:24}", rows[-1].cells, flush=True)
        reload(rows, Path(folder))
    text = page(rows, time.time() - began)
    if sys.argv[1:]:
        print(text)
    else:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text, encoding="utf-8")
    bad = [(r.name, c, r.cells.get(c)) for r in rows for c in COLUMNS if not good(c, r.cells.get(c, "no"))]
    print(f"{len(bad)} cells are not in order", *bad, sep="\n")


if __name__ == "__main__":
    main()
