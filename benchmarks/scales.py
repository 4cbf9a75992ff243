# SPDX-License-Identifier: AGPL-3.0-or-later
"""Plan, prove and apply `half-flops` on every scale of YOLOv8, YOLO11 and YOLO26; one process each.

    python benchmarks/scales.py [yolo11x yolo26x ...]

Prints a Markdown table: GFLOPs kept, parameters kept, the proof's error in float64, seconds (plan + proof + apply, the
model being built already) and peak memory of the process above what it held before planning.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time

FAMILIES = {"yolov8": "nsmlx", "yolo11": "nsmlx", "yolo26": "nsmlx"}
COLUMNS = ("model", "GFLOPs", "kept", "parameters", "kept", "error", "plan s", "proof s", "apply s", "memory MB")


def measure(name: str) -> dict[str, float]:
    """Measure one model in this process."""
    import torch
    from ultralytics import YOLO

    import yolo_prune
    from yolo_prune import planner, proof, surgery

    torch.manual_seed(0)
    module = YOLO(f"{name}.yaml").model
    recipe = yolo_prune.load_recipe("half-flops")
    planner.make_plan(YOLO("yolov8n.yaml").model, recipe)  # imports and warms up what every model shares
    before = resident()
    peak = Peak()
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
        "apply": times[3] - times[2],
        "memory": (peak.stop() - before) / 1e6,
    }


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


def main() -> None:
    """Run every model in a process of its own and print the table."""
    if len(sys.argv) == 3 and sys.argv[1] == "--one":
        print(json.dumps(measure(sys.argv[2])))
        return
    names = sys.argv[1:] or [f"{family}{scale}" for family, scales in FAMILIES.items() for scale in scales]
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for name in names:
        done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr}")
        r = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {name} | {r['flops'] / 1e9:.1f} | {r['flops_kept']:.4f} | {r['params']:,} | {r['params_kept']:.3f} | "
            f"{r['error']:.0e} | {r['plan']:.1f} | {r['proof']:.1f} | {r['apply']:.2f} | {r['memory']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
