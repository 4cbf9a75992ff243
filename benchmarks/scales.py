# SPDX-License-Identifier: AGPL-3.0-or-later
"""Time, memory and exactness of planning, proving and cutting; one process a model.

    python benchmarks/scales.py                          # scales n to x of YOLOv8, 11, 12, 26, and the slowest others
    python benchmarks/scales.py yolo11n rtdetr-x         # some
    python benchmarks/scales.py --torch-pruning          # stock torch-pruning beside it, where that reads a model

One CPU core, the `half-flops` recipe with the criterion `magnitude` at imgsz 640. Prints Markdown: GFLOPs and
parameters kept, the proof's error in float64, seconds (the model being built already) and peak memory of the process
above what it held before, as a multiple of the model's own size in float32. With `--torch-pruning`: seconds that its
graph and a uniform cut of half of the channels take, against this package's plan and cut, both without a proof; traced
at imgsz 640, where this package counts FLOPs, and at 64, the smallest image it takes.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
import warnings
from typing import Any

FAMILIES = ("yolov8", "yolo11", "yolo12", "yolo26")
SLOWEST = ("yolov9e", "yolov10x", "rtdetr-l", "rtdetr-x")
READABLE = ("yolov3-tiny", "yolov3", "yolov5n", "yolov5x", "yolov6n", "yolov6x")
COLUMNS = ("model", "GFLOPs", "kept", "parameters", "kept", "error", "plan s", "proof s", "cut s", "sum s", "memory")


def build(name: str) -> Any:
    """The module of a model, untrained."""
    from ultralytics import RTDETR, YOLO

    return (RTDETR if "rtdetr" in name else YOLO)(f"{name}.yaml").model


def measure(name: str) -> dict[str, float]:
    """Measure one model in this process."""
    import torch

    import yolo_prune
    from yolo_prune.cut import proof, surgery
    from yolo_prune.planning import planner

    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipe = yolo_prune.load_recipe("half-flops", {"criterion": "magnitude"})
    module = build(name)
    planner.make_plan(build("yolov8n"), recipe)  # imports and warms up what every model shares
    before, peak = resident(), Peak()
    times = [time.perf_counter()]
    plan = planner.make_plan(module, recipe)
    times.append(time.perf_counter())
    proven = proof.prove(module, plan)
    times.append(time.perf_counter())
    surgery.apply(module, plan)
    times.append(time.perf_counter())
    forecast = plan.predicted
    return {
        "flops": forecast.dense_flops,
        "flops_kept": forecast.flops_kept,
        "params": forecast.dense_params,
        "params_kept": forecast.params_kept,
        "error": proven.error,
        "plan": times[1] - times[0],
        "proof": times[2] - times[1],
        "cut": times[3] - times[2],
        "memory": (peak.stop() - before) / (4 * forecast.dense_params),
    }


def compare(name: str) -> dict[str, float]:
    """Seconds of stock torch-pruning and of this package for one cut of the same model."""
    import torch

    import yolo_prune
    from yolo_prune.cut import surgery
    from yolo_prune.planning import planner

    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipe = yolo_prune.load_recipe("half-flops", {"criterion": "magnitude"})
    planner.make_plan(build("yolov8n"), recipe)
    ours, theirs = build(name), build(name)
    start = time.perf_counter()
    surgery.apply(ours, planner.make_plan(ours, recipe))
    mine = time.perf_counter() - start
    return {"ours": mine, "at 640": stock(theirs, 640), "at 64": stock(build(name), 64)}


def stock(model: Any, imgsz: int) -> float:
    """Seconds that stock torch-pruning takes to cut half of the channels, traced with an image of that size."""
    import torch
    import torch_pruning as tp

    model.train().requires_grad_(True)
    last = [m for n, m in model.model[-1].named_modules() if isinstance(m, torch.nn.Conv2d) and n.endswith(".2")]
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.MagnitudePruner(
            model,
            torch.rand(1, 3, imgsz, imgsz),
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=[*last, model.model[-1].dfl],
            round_to=8,
        )
        pruner.step()
    return time.perf_counter() - start


class Peak:
    """Largest resident size of this process while it runs, sampled every 10 ms."""

    def __init__(self) -> None:
        self.largest, self.running = 0, True
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()

    def _sample(self) -> None:
        while self.running:
            self.largest = max(self.largest, resident())
            time.sleep(0.01)

    def stop(self) -> int:
        """Stop sampling; returns bytes."""
        self.running = False
        self.thread.join()
        return max(self.largest, resident())


def resident() -> int:
    """Resident size of this process in bytes."""
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_a_process_of_its_own(how: str, name: str) -> dict[str, float]:
    """What `measure` or `compare` returns for a model."""
    command = [sys.executable, __file__, how, name]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Run every model in a process of its own and print a table."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["--one"], ["--compare"]):
        print(json.dumps((measure if arguments[0] == "--one" else compare)(arguments[1])))
        return
    if arguments[:1] == ["--torch-pruning"]:
        print("| model | yolo-prune s | torch-pruning s | ratio | at imgsz 64 s | ratio |\n" + "|---" * 6 + "|")
        for name in arguments[1:] or READABLE:
            r = in_a_process_of_its_own("--compare", name)
            large, small = r["at 640"], r["at 64"]
            ratios = f"{large:.2f} | {large / r['ours']:.1f} | {small:.2f} | {small / r['ours']:.1f}"
            print(f"| {name} | {r['ours']:.2f} | {ratios} |", flush=True)
        return
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for name in arguments or [*(f + s for f in FAMILIES for s in "nsmlx"), *SLOWEST]:
        r = in_a_process_of_its_own("--one", name)
        seconds = f"{r['plan']:.1f} | {r['proof']:.1f} | {r['cut']:.2f} | {r['plan'] + r['proof'] + r['cut']:.1f}"
        print(
            f"| {name} | {r['flops'] / 1e9:.1f} | {r['flops_kept']:.4f} | {r['params']:,} | {r['params_kept']:.3f} | "
            f"{r['error']:.0e} | {seconds} | {r['memory']:.1f}x |",
            flush=True,
        )


if __name__ == "__main__":
    main()
