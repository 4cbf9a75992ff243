# SPDX-License-Identifier: AGPL-3.0-or-later
"""Every architecture that the installed release of Ultralytics ships: is it planned, proved and cut?

    python benchmarks/releases.py                      # all architectures; about 3 minutes on one core
    python benchmarks/releases.py only=yolo11,yolo12
    nox -s releases                                    # the same on each tested release

Every YAML is built at its smallest scale, at most a quarter of the full width, with random weights and statistics, in
float64. The plan keeps 60 % of the FLOPs, and the package's proof of it must hold. After the cut, the masked oracle of
the tests judges the pruned model without asking what was removed. One line is printed for each architecture. The
summary is appended to `benchmarks/releases.md`. The exit status is 1 if a model that the release itself builds is not
cut exactly.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "false"}
if __name__ == "__main__":  # another release would rewrite the settings of the user
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="yolo-prune-releases-"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import oracle
import torch
import ultralytics
import zoo
from torch import nn
from ultralytics.utils import LOGGER

from yolo_prune.cut import proof, surgery
from yolo_prune.planning.planner import make_plan
from yolo_prune.recipe import load_recipe

DEFAULTS = {"only": "", "width": "0.25", "flops": "0.6", "table": str(Path(__file__).with_suffix(".md"))}
HEAD = """\
| ultralytics | torch | YAMLs | built | planned | proved | cut | largest error | exceptions | seconds |
|---|---|---|---|---|---|---|---|---|---|"""
QUERIES = 100
LIMITS = {"round_to": 4, "min": 4}
"""Of widths: fine enough for models this thin."""
STEPS = ("built", "planned", "proved", "cut")


@dataclass
class Row:
    """What becomes of one architecture.

    Attributes:
        name: the name of its YAML.
        steps: how many of `STEPS` it passed.
        error: the larger error of the proof and of the oracle, relative to how much an output varies.
        misfits: reasons of the blocks that are traced because their rule does not fit.
        why: why the next step failed.
    """

    name: str
    steps: int = 0
    error: float = 0.0
    misfits: tuple[str, ...] = ()
    why: str = ""

    @property
    def good(self) -> bool:
        """Whether it is cut exactly, or is no model in this release."""
        return self.steps in (0, len(STEPS))

    def __str__(self) -> str:
        """One line."""
        done = ", ".join(STEPS[: self.steps]) or "not built"
        told = [done, *([f"error {self.error:.0e}"] if self.steps == len(STEPS) else []), *self.misfits]
        return f"{self.name:24} {'; '.join(told)}{f': {self.why}' if self.why else ''}"


def built(name: str, width: float) -> Any:
    """A model, with fewer queries than its smallest image has positions: early releases of RT-DETR need that."""
    model = zoo.build(name, width)
    head = model.model[-1]
    if hasattr(head, "num_queries"):
        head.num_queries = min(head.num_queries, QUERIES)
    return model


def tried(name: str, ask: dict[str, str]) -> Row:
    """Build, plan, prove and cut an architecture."""
    row = Row(name)
    try:
        model = built(name, float(ask["width"]))
        row.steps = 1
        prune(zoo.randomise(model.double()), row, float(ask["flops"]))
    except Exception as e:  # whatever it is, it belongs into the table
        row.why = f"{type(e).__name__}: {' '.join(str(e).split())}"
    oracle._index.cache_clear()
    return row


def prune(model: nn.Module, row: Row, flops: float) -> None:
    """Plan, prove and cut a model, and write the result into its row.

    Raises:
        AssertionError: If the oracle finds that the cut is not exact.
    """
    recipe = load_recipe("half-flops", {"criterion": "magnitude", "target": {"flops": flops}, "channels": LIMITS})
    plan = make_plan(model, recipe, 2 * zoo.image_size(row.name))
    row.misfits = tuple(p.reason for p in plan.protected if p.reason.startswith("the rule for "))
    row.steps = 2
    proved = proof.prove(model, plan).error
    row.steps = 3
    pruned = deepcopy(model)
    surgery.apply(pruned, plan)
    row.error = max(proved, oracle.judge(model, pruned, row.name))
    assert row.error < oracle.TOLERANCE, f"the oracle finds a difference of {row.error:.0e}"
    row.steps = 4


def summary(rows: list[Row], seconds: float) -> str:
    """A line of the table."""
    counts = [sum(row.steps > step for row in rows) for step in range(len(STEPS))]
    error = max((row.error for row in rows), default=0.0)
    exceptions = "; ".join(f"{row.name}: {row.why}" for row in rows if row.why).replace("|", "/")
    versions = [ultralytics.__version__, torch.__version__.partition("+")[0]]
    cells = [*versions, len(rows), *counts, f"{error:.0e}", exceptions or "none", f"{seconds:.0f}"]
    return f"| {' | '.join(map(str, cells))} |"


def append(table: Path, line: str) -> None:
    """Append a line to a table, which gets its head if it is new."""
    if not table.exists():
        table.write_text(f"{HEAD}\n", encoding="utf-8")
    with table.open("a", encoding="utf-8") as file:
        print(line, file=file)


def main(arguments: Iterable[str]) -> int:
    """Try the architectures; 1 if one is not cut exactly."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    if given.keys() - DEFAULTS.keys():
        sys.exit(__doc__)
    ask = {**DEFAULTS, **given}
    torch.set_num_threads(1)
    LOGGER.setLevel("ERROR")
    warnings.simplefilter("ignore")
    rows, began = [], time.perf_counter()
    for name in ask["only"].split(",") if ask["only"] else zoo.NAMES:
        rows.append(tried(name, ask))
        print(rows[-1], flush=True)
    line = summary(rows, time.perf_counter() - began)
    append(Path(ask["table"]), line)
    print(line)
    return int(not all(row.good for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
