# SPDX-License-Identifier: AGPL-3.0-or-later
"""Every architecture with torch-pruning alone and through this package: can its groups be found, and are they exact?

    python benchmarks/torch_pruning_groups.py              # all architectures; about 15 minutes on one core
    python benchmarks/torch_pruning_groups.py yolo11 yolo26

Each group loses a random third of its channels. Then the masked oracle of the tests compares the outputs with those of
the model in which these channels are silenced. The models are thin (a quarter of the width of scale n), in float64.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

os.environ |= {"YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "false"}
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import oracle
import torch
import torch_pruning as tp
import zoo
from torch import nn
from ultralytics.utils import LOGGER

import yolo_prune

LIMIT = 10
"""Seconds of CPU time for torch-pruning alone. It takes 0.1 s to 3 s for the models that it reads, or never returns."""


def stock(model: nn.Module, name: str) -> Iterator[Any]:
    """The groups of torch-pruning alone, without the layers whose outputs the task fixes."""
    fixed = {
        s.name.split("[")[0] for g in yolo_prune.dependency_graph(model).structure.groups if g.protected for s in g.sets
    }
    ignored = [m for n, m in model.named_modules() if n in fixed or n.removesuffix(".conv") in fixed]
    ignored += [m for n, m in model.named_modules() if n.endswith(".dfl.conv")]
    graph = tp.DependencyGraph()
    graph.build_dependency(model.train().requires_grad_(True), zoo.images(model, name, 1), verbose=False)
    return graph.get_all_groups(ignored_layers=ignored)


def ours(model: nn.Module, name: str) -> Iterator[Any]:
    """The groups of this package."""
    return yolo_prune.dependency_graph(model, 2 * zoo.image_size(name)).get_all_groups()


def tried(of: Callable[[nn.Module, str], Iterator[Any]], original: nn.Module, name: str) -> str:
    """What becomes of a model whose groups all lose a third."""
    model, random, count, begun = deepcopy(original), Random(0), 0, time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for group in of(model, name):
                width = len(group[0].idxs)
                group.prune(sorted(random.sample(range(width), max(1, width // 3))))
                count += 1
            seconds = time.perf_counter() - begun
            return f"{count} groups, {seconds:.1f} s, error {oracle.judge(original, model, name):.0e}"
    except Exception as e:  # whatever it is, it belongs into the table
        return f"after {count} groups: {type(e).__name__}: {e}".splitlines()[0][:90]


def limited(original: nn.Module, name: str) -> str:
    """The same with torch-pruning alone, in a process that ends after `LIMIT` seconds on the CPU."""

    def work() -> None:
        receiver.close()
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
        sender.send(tried(stock, original, name))

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        return str(receiver.recv())
    except EOFError:
        return f"does not return within {LIMIT} s"
    finally:
        process.join()


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    LOGGER.setLevel("ERROR")
    print("| architecture | torch-pruning alone | through this package |\n|---|---|---|")
    for name in sys.argv[1:] or zoo.NAMES:
        original = zoo.randomise(zoo.build(name, 0.25).double())
        print(f"| {name} | {limited(original, name)} | {tried(ours, original, name)} |", flush=True)
        oracle._index.cache_clear()


if __name__ == "__main__":
    main()
