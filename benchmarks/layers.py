# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where the milliseconds go: time by kind of operation in ONNX Runtime, of a dense and of pruned models.

    python benchmarks/layers.py dense.pt pruned.pt [imgsz=640] [threads=1] [runs=200]

Needs the extra `onnx`. Models are exported with the standard exporter and run with ONNX Runtime's own profiler; what
the profiler adds to each operation is in the figures, so read them as shares.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from yolo_prune.measure import subjects
from yolo_prune.measure.subjects import Setting
from yolo_prune.report.table import align

MERGED = {
    "Conv": "convolution, with what is fused into it",
    "FusedConv": "convolution, with what is fused into it",
    "QuickGelu": "activation",
    "Sigmoid": "activation",
    "Mul": "activation",
    "Concat": "concatenation, split",
    "Split": "concatenation, split",
    "Slice": "concatenation, split",
    "ReorderInput": "change of memory layout",
    "ReorderOutput": "change of memory layout",
    "Transpose": "change of memory layout",
}


def times(path: Path, setting: Setting, runs: int, folder: Path) -> dict[str, float]:
    """`{kind of operation: milliseconds of one run}`, the median over runs."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = setting.threads
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    x = np.random.default_rng(0).random((1, 3, setting.imgsz, setting.imgsz), dtype=np.float32)
    for _ in range(runs):
        session.run(None, {name: x})
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            found[event["args"]["op_name"], event["name"]].append(event["dur"] / 1000)
    total: dict[str, float] = defaultdict(float)
    for (kind, _), each in found.items():
        total[MERGED.get(kind, "everything else")] += float(np.median(each))
    return total


def main(arguments: list[str]) -> None:
    """Print the table."""
    paths = [a for a in arguments if "=" not in a]
    given = {"imgsz": 640, "threads": 1, "runs": 200}
    given |= {key: int(value) for key, _, value in (a.partition("=") for a in arguments if "=" in a)}
    setting = Setting.of(given["imgsz"], threads=given["threads"])
    torch.set_num_threads(setting.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = []
        for i, path in enumerate(paths):
            subject = subjects.subject(subjects.open_source(path), Path(path).name, folder / str(i))
            found.append(times(subjects.exported("onnx", subject, setting), setting, given["runs"], folder))
    kinds = sorted(found[0], key=lambda kind: -found[0][kind])
    table = [["ms", *(Path(p).name for p in paths), "ratio"]]
    for kind in [*kinds, ""]:
        row = [sum(f.values()) if not kind else f.get(kind, 0.0) for f in found]
        table.append([kind or "all", *(f"{ms:.2f}" for ms in row), f"{row[-1] / row[0]:.3f}"])
    print(f"onnxruntime {ort.__version__}, imgsz {setting.imgsz}, {setting.threads} threads\n{align(table, left=1)}")


if __name__ == "__main__":
    main(sys.argv[1:])
