# SPDX-License-Identifier: AGPL-3.0-or-later
"""Blocks of your own in a YOLOv8n: how many of the channels around them can be removed, and are the cuts exact?

    python benchmarks/blocks.py my_blocks.py
    python benchmarks/blocks.py my_blocks.py bottleneck attention

The file has `CASES = {name: class}`. A class gets the number of channels, and maps `(b, c, h, w)` to the same shape. It
may have `SIZES = {name: image size}` for the blocks that need another image size than 128. Each block is put behind
SPPF. Counted are the output channels of SPPF and of all layers of the block:

- free: these channels can be removed.
- protected: the plan protects these channels, and the block is traced.
- opaque: the block could not be traced, or its cut was refuted, so all its channels are protected.

Then half of all free channels in the model are removed, other ones in every set. The masked oracle of the tests
compares the outputs in evaluation mode with those of the model in which these channels are silenced. Each row ends with
the largest relative difference.

The oracle also tries every protected or opaque group alone: half of its channels are removed against the protection.
The channels that could be removed exactly in this way, together with the free ones, are "allowed".
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

os.environ |= {"YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "false"}
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import oracle
import torch
import zoo
from torch import Tensor, nn
from ultralytics.utils import LOGGER

import yolo_prune
from yolo_prune.cut import surgery
from yolo_prune.graph import Graph
from yolo_prune.graph.structure import Group, output_dimension
from yolo_prune.planning.cost import cost_of
from yolo_prune.planning.planner import build_plan, survey
from yolo_prune.recipe import load_recipe

WIDTH, PLACE = 256, 9
SPPF, BLOCK = f"model.{PLACE}.0.cv2.conv", f"model.{PLACE}.1"
EXACT = 1e-6  # relative; for blocks that cast to float32 as well


def cases(path: str) -> Any:
    """The module with the blocks."""
    spec = importlib.util.spec_from_file_location("own_blocks", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"'{path}' is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_blocks"] = module
    spec.loader.exec_module(module)
    return module


def model_with(block: Any) -> nn.Module:
    """A YOLOv8n with the block behind SPPF. No parameter is 0 or 1."""
    torch.manual_seed(0)
    model: Any = zoo.build("yolov8")
    old = model.model[PLACE]
    model.model[PLACE] = new = nn.Sequential(old, block(WIDTH))
    new.i, new.f, new.type, new.np = old.i, old.f, "Sequential", 0
    return zoo.randomise(model.double()).train()


def counts(model: nn.Module, graph: Graph, size: int) -> Counter[str]:
    """`{free, protected, opaque or allowed: number of output channels}` of SPPF and of the layers of the block."""
    found = Counter[str]()
    for group in graph.groups:
        reason = group.protected or ("" if group.grain > 1 else "a single channel")
        kind = "free" if not reason else "opaque" if reason.startswith(f"'{BLOCK}") else "protected"
        number = own_channels(model, group)
        found[kind] += number
        if number and (kind == "free" or (group.grain > 1 and exactness(model, graph, [group], size)[0] < EXACT)):
            found["allowed"] += number
    return found


def own_channels(model: nn.Module, group: Group) -> int:
    """Output channels of SPPF and of the layers of the block in a group."""
    layers, number = dict(model.named_modules()), 0
    for slot in (slot for channels in group.sets for slot in channels.slots):
        name, _, key = slot.tensor.rpartition(".")
        own = name == SPPF or name.startswith(f"{BLOCK}.")
        if own and key == "weight" and isinstance(layers[name], nn.modules.conv._ConvNd | nn.Linear):
            number += len(slot.index) if slot.dim == output_dimension(layers[name]) else 0
    return number


def halved(model: nn.Module, graph: Graph, groups: Sequence[Group]) -> Any:
    """A plan that removes a random half of the channels of some groups."""
    generator, kept = torch.Generator().manual_seed(0), {}
    for group in groups:
        for channels in group.sets:
            order = torch.randperm(channels.size, generator=generator)
            kept[channels.name] = tuple(sorted(order[: channels.size * (group.grain // 2) // group.grain].tolist()))
    return build_plan(graph, cost_of(model, graph), kept, {})


def exactness(model: nn.Module, graph: Graph, groups: Sequence[Group], size: int) -> tuple[float, str]:
    """The largest difference between the cut and the silenced model in evaluation mode, and where it was computed."""
    cut = deepcopy(model)
    try:
        surgery.apply(cut, halved(model, graph, groups))
        reference = oracle.silenced(model, oracle.recover_kept(model, cut))
    except (yolo_prune.PruneError, AssertionError):
        return math.inf, ""
    for dtype in (torch.float64, torch.float32):  # some blocks cast to float32
        try:
            wanted = outputs(reference, size, dtype)
        except RuntimeError:
            continue
        try:
            gap = float(oracle.gap(wanted, outputs(cut, size, dtype)))
        except Exception:  # the block may be anyone's code, and it may refuse the width
            gap = math.inf
        return gap, " (float32)" * (dtype == torch.float32)
    return math.inf, " (does not run)"


@torch.no_grad()
def outputs(model: nn.Module, size: int, dtype: torch.dtype) -> list[Tensor]:
    """The outputs in evaluation mode for two random images."""
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    return zoo.outputs(deepcopy(model).to(dtype).eval()(images))


def row(module: Any, name: str) -> str:
    """One row of the table."""
    size, model = getattr(module, "SIZES", {}).get(name, 128), model_with(module.CASES[name])
    try:
        graph = survey(model, load_recipe("half-flops", {"criterion": "magnitude"}), size)
    except yolo_prune.PruneError as e:
        return f"| {name} | refused: {e} | | | | |"
    found, free = counts(model, graph, size), [g for g in graph.groups if not g.protected and g.grain > 1]
    gap, where = exactness(model, graph, free, size)
    numbers = " | ".join(str(found[kind]) for kind in ("allowed", "free", "protected", "opaque"))
    return f"| {name} | {numbers} | {gap:.0e}{where} |"


def main() -> None:
    """Print the table."""
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    torch.set_num_threads(1)
    LOGGER.setLevel("ERROR")
    warnings.simplefilter("ignore")
    module = cases(sys.argv[1])
    print("| block | allowed | free | protected | opaque | largest difference |\n|---|---|---|---|---|---|")
    for name in sys.argv[2:] or module.CASES:
        print(row(module, name), flush=True)


if __name__ == "__main__":
    main()
