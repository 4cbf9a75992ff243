# SPDX-License-Identifier: AGPL-3.0-or-later
"""`yolo-prune demo`: the complete workflow on a small synthetic dataset, with the same calls that a user makes."""

from __future__ import annotations

import importlib.util
import shutil
import time
from pathlib import Path
from typing import Any

from yolo_prune import _startup
from yolo_prune.env import outputs
from yolo_prune.errors import PruneError
from yolo_prune.report import Report, rounds_table, summary_table

IMGSZ = 128
IMAGES = {"train": 320, "val": 48}
SETTINGS: dict[str, Any] = {
    "imgsz": IMGSZ,
    "batch": 16,
    "nbs": 16,
    "optimizer": "AdamW",
    "mosaic": 0.0,
    "scale": 0.3,
    "translate": 0.2,
    "flipud": 0.5,
    "amp": False,
    "workers": 0,
    "device": "cpu",
    "plots": False,
    "verbose": False,
    "exist_ok": True,
}
DENSE = {"epochs": 16, "lr0": 0.002, "warmup_epochs": 1}
PRUNE: dict[str, Any] = {"epochs": 10, "lr0": 0.0005}  # a low learning rate, because the model is trained already
PARITY = 1e-3
SPACE = 50 * outputs.MB  # a choice: the files of a finished demo had 27 MB, and training needs some more


def run(folder: Path) -> int:
    """Make a dataset, train a dense model, prune it while training, export it, check the export, print the results.

    Args:
        folder: folder for all files. It is made if it is missing, and an earlier demo in it is replaced.

    Raises:
        PruneError: If the export extra is missing, or the folder holds other files.
    """
    began = time.perf_counter()
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise PruneError(f"The demo exports to ONNX and needs {', '.join(missing)}: pip install 'yolo-prune[export]'.")
    _prepare(folder)
    from ultralytics import YOLO

    from yolo_prune.demo import scenes

    _startup.install(force=True)
    _say("1/4 drawing a dataset of simple shapes")
    data = scenes.make_dataset(folder / "scenes", imgsz=IMGSZ, **IMAGES)
    _say(f"2/4 training a dense YOLO11n on this dataset for {DENSE['epochs']} epochs")
    dense = YOLO("yolo11n.yaml")
    dense.train(data=str(data), project=str(folder.resolve()), name="dense", **DENSE, **SETTINGS)
    _say(f"3/4 pruning the model to half of its FLOPs, in a run of {PRUNE['epochs']} epochs")
    keys = {"callbacks": "prune", "recipe": "half-flops"}
    place = {"project": str(folder.resolve()), "name": "pruned"}
    YOLO(folder / "dense/weights/best.pt").train(data=str(data), **place, **keys, **PRUNE, **SETTINGS)
    report = Report.load(folder / "pruned")
    _say("4/4 exporting the pruned model to ONNX and comparing onnxruntime with torch")
    best = folder / "pruned/weights/best.pt"
    exported = Path(YOLO(best).export(format="onnx", imgsz=IMGSZ, device="cpu"))
    difference = compare_onnx(best, exported, sorted((folder / "scenes/images/val").iterdir())[:8])
    _conclude(report, folder, exported, difference, time.perf_counter() - began)
    return 0


def compare_onnx(checkpoint: Path, exported: Path, images: list[Path]) -> float:
    """Largest difference between torch and onnxruntime over `images`, relative to the largest output.

    Raises:
        PruneError: If the difference is more than 1e-3.
    """
    import cv2
    import onnxruntime
    import torch

    from yolo_prune.env.releases import load_checkpoint

    model, _ = load_checkpoint(checkpoint)
    session = onnxruntime.InferenceSession(str(exported))
    name, worst = session.get_inputs()[0].name, 0.0
    for path in images:
        pixels = cv2.imread(str(path))
        if pixels is None:
            raise PruneError(f"'{path}' cannot be read as an image.")
        pixels = cv2.resize(pixels, (IMGSZ, IMGSZ))[..., ::-1].transpose(2, 0, 1)[None]
        image = torch.from_numpy(pixels.copy()).float() / 255
        with torch.no_grad():
            wanted = model(image)[0]
        (got,) = session.run(None, {name: image.numpy()})
        worst = max(worst, float((wanted - torch.from_numpy(got)).abs().max() / wanted.abs().max()))
    if not worst <= PARITY:
        raise PruneError(
            f"{exported} does not agree with {checkpoint}: outputs differ by {worst:.1e}, relative to the largest. Run "
            "'yolo-prune doctor', and report this with its output."
        )
    return worst


def _prepare(folder: Path) -> None:
    outputs.check_folder(folder, SPACE)
    ours = folder / "scenes"
    if folder.exists() and any(folder.iterdir()) and not ours.is_dir():
        raise PruneError(f"'{folder}' holds other files. Pass an empty or new folder: yolo-prune demo folder=NAME.")
    for old in ("dense", "pruned"):
        shutil.rmtree(folder / old, ignore_errors=True)


def _conclude(report: Report, folder: Path, exported: Path, difference: float, seconds: float) -> None:
    run = folder / "pruned"
    print(f"\n{rounds_table(report)}\n\n{summary_table(report)}\n")
    print(f"onnxruntime agrees with torch to {difference:.0e} (relative) on {exported}")
    print(f"The report is in {run}: open {run / 'report.html'}; the figures are in prune.json.")
    print(f"The pruned model is {run / 'weights/best.pt'}. The demo took {seconds / 60:.1f} minutes.")
    print("\nOn your own model: yolo train model=best.pt data=data.yaml epochs=60 callbacks=prune recipe=half-flops")


def _say(text: str) -> None:
    print(f"\nyolo-prune demo: {text}", flush=True)
