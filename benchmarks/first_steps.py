# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the first steps after a cut and its refit make of the model: the weights that are trained, and their average.

    python benchmarks/first_steps.py model=best.pt data=data.yaml imgsz=320
    python benchmarks/first_steps.py model=best.pt data=data.yaml imgsz=320 optimizer=AdamW lr0=0.002 warmup_epochs=0

A run of `yolo train ... callbacks=prune` that ends after the last of these steps; whatever else is given goes to it. It
prints, after so many steps, the learning rate and the mAP50-95 on val of both.
"""

from __future__ import annotations

import sys
import tempfile
from copy import deepcopy
from typing import Any

from torch import nn
from ultralytics import YOLO
from ultralytics.cfg import smart_value

from yolo_prune.run import live as live_trainer

STEPS = (1, 3, 6, 13, 26, 39)


class Watch:
    """Validates after some of the optimizer's steps."""

    def __init__(self, model: str, data: str, imgsz: int) -> None:
        self.model, self.settings, self.left = model, {"data": data, "imgsz": imgsz}, list(STEPS)

    def batch_ended(self, trainer: Any) -> None:
        """Print a line, if this made the next of the steps; the average has followed each."""
        if self.left and trainer.ema.updates == self.left[0]:
            steps = self.left.pop(0)
            live, average = (self.accuracy(of(trainer)) for of in (live_trainer.model_of, live_trainer.average_of))
            rate = trainer.optimizer.param_groups[0]["lr"]
            print(f"| {steps} | {rate:.6f} | {live:.3f} | {average:.3f} |", flush=True)
        trainer.stop = not self.left

    def accuracy(self, module: nn.Module) -> float:
        """mAP50-95 of a copy."""
        yolo = YOLO(self.model)
        yolo.model = deepcopy(module).eval().requires_grad_(False)
        found = yolo.val(**self.settings, workers=0, plots=False, verbose=False, project=tempfile.mkdtemp())
        return float(found.box.map)


def main() -> None:
    """Run, and print a table."""
    ask = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
    if not {"model", "data"} <= ask.keys():
        sys.exit(__doc__)
    settings = {key: smart_value(value) for key, value in ask.items() if key != "model"}
    watch = Watch(ask["model"], ask["data"], settings.setdefault("imgsz", 640))
    model = YOLO(ask["model"])
    model.add_callback("on_train_batch_end", watch.batch_ended)
    print("| steps | learning rate | trained weights | their average |\n|---|---|---|---|")
    shared: dict[str, Any] = {"epochs": 30, "batch": 16, "nbs": 16, "workers": 2, "amp": False, "plots": False}
    model.train(**{**shared, "project": tempfile.mkdtemp(), "callbacks": "prune", **settings})


if __name__ == "__main__":
    main()
