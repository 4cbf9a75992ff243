# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the package costs in an epoch without a cut, and what a cut takes, on a model and a dataset of yours.

    python benchmarks/overhead.py model=best.pt data=data.yaml imgsz=320

One run with a single cut before its third epoch. All that the package does is timed inside the run, so that nothing of
the noise between runs counts: its callbacks, the state it writes beside last.pt, and checkpoints that appear whole.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from ultralytics import YOLO

from yolo_prune.env import files
from yolo_prune.run import resume, rounds
from yolo_prune.run.callback import PruneCallback

EPOCHS, CUT = 8, 2


class Clock:
    """Seconds spent in some functions, calls inside one another counted once."""

    def __init__(self) -> None:
        self.spent, self._inside = 0.0, 0

    def watch(self, owner: Any, name: str) -> None:
        """Count the time of a function."""
        setattr(owner, name, self.timed(getattr(owner, name)))

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._inside += 1
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._inside -= 1
                self.spent += 0.0 if self._inside else time.perf_counter() - began

        return call


def main() -> None:
    """Run, and print what each epoch and the cut took."""
    ask = {"imgsz": "640", **dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)}
    if not {"model", "data"} <= ask.keys():
        sys.exit(__doc__)
    ours, cuts = Clock(), Clock()
    for event in PruneCallback.EVENTS:
        ours.watch(PruneCallback, event)
    ours.watch(resume, "save")
    ours.watch(resume, "forget")
    ours.watch(files, "write_bytes")
    cuts.watch(rounds, "perform")
    epochs: list[tuple[float, float]] = []
    marks = [0.0, 0.0]

    def begin(trainer: Any) -> None:
        marks[:] = time.perf_counter(), ours.spent

    def end(trainer: Any) -> None:
        epochs.append((time.perf_counter() - marks[0], ours.spent - marks[1]))

    model = YOLO(ask["model"])
    model.add_callback("on_train_epoch_start", begin)
    model.add_callback("on_model_save", end)
    recipe: Any = {"recipe.schedule.start": CUT, "recipe.schedule.rounds": 1}
    model.train(data=ask["data"], imgsz=int(ask["imgsz"]), epochs=EPOCHS, batch=16, nbs=16, amp=False, workers=2,
                plots=False, project=tempfile.mkdtemp(), callbacks="prune", recipe="half-flops", **recipe)  # fmt: skip
    whole = [(total, own) for i, (total, own) in enumerate(epochs) if i != CUT][1:]
    print("| | seconds |\n|---|---|")
    print(f"| an epoch without a cut | {median(t for t, _ in whole):.2f} |")
    print(f"| of which yolo-prune | {median(o for _, o in whole):.3f} ({median(o / t for t, o in whole):.2%}) |")
    print(f"| the cut: plan, proof, surgery, refit and two validations | {cuts.spent:.1f} |")


if __name__ == "__main__":
    main()
