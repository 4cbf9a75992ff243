# SPDX-License-Identifier: AGPL-3.0-or-later
"""`front.json`: all models of a run with a limit on the drop, each with its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from yolo_prune.env.files import write_text
from yolo_prune.env.json_files import JsonFile
from yolo_prune.report.data import Report

FRONT = "front.json"
_WITHOUT = "Delete the file to get a report without it."
FILE = JsonFile(
    "the front.json of a run with a limit",
    unreadable=f"{{path}} is damaged: {{why}}. {_WITHOUT}",
    broken=f"{{path}} is damaged: Invalid JSON: {{why}}. {_WITHOUT}",
    wrong=f"{{path}} is damaged: {{why}}. {_WITHOUT}",
)


def round_file(number: int) -> str:
    """Name of the file with the best model after a round; round 0 is the model before the first cut."""
    return f"round{number}.pt"


class FrontPoint(BaseModel):
    """One model: its cost, as fractions of the dense model, and the fitness of its best epoch.

    Attributes:
        round: number of the round that made it; 0 is the model that the run started from.
        held: whether its fitness dropped by no more than the limit.
        delivered: whether it is the model in best.pt.
        weights_kept: share of the weights that are not zero, in a run that only sets weights to zero.
        weights: path of its checkpoint, relative to the folder of the run.
    """

    round: int
    flops_kept: float | None = None
    params_kept: float | None = None
    weights_kept: float | None = None
    fitness: float | None = None
    held: bool
    delivered: bool = False
    weights: str


class Front(BaseModel):
    """The content of `front.json`. The points are in the order of the rounds."""

    version: Literal[1] = 1
    limit: float
    reference: float
    points: list[FrontPoint]

    def save(self, folder: str | Path) -> Path:
        """Write `front.json` into the folder of a run."""
        return write_text(Path(folder) / FRONT, json.dumps(self.model_dump(), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Front | None:
        """Read `front.json` in the folder of a run; None if there is no file, because the run had no limit.

        Raises:
            PruneError: If the file is damaged.
        """
        path = Path(folder) / FRONT
        return FILE.load(path, cls) if path.exists() else None


def make_front(report: Report, limit: float, reference: float, start: dict[str, float]) -> Front:
    """Collect the points of a run.

    Args:
        report: the report of the run, with judged rounds.
        limit: largest allowed drop of the fitness.
        reference: fitness from which drops are measured.
        start: cost of the model that the run started from: "flops", "params" and "weights", as far as they are known,
            as fractions of the dense model.
    """
    good = max((row.number for row in report.rounds if row.held), default=0)
    finished = report.status == "finished"
    points = [FrontPoint(round=0, fitness=reference, held=True, weights="", flops_kept=start.get("flops"),
                    params_kept=start.get("params"), weights_kept=start.get("weights"))]  # fmt: skip
    for row in report.rounds:
        points.append(
            FrontPoint(
                round=row.number,
                flops_kept=_share(row.flops, report.dense.flops),
                params_kept=_share(row.params, report.dense.params),
                weights_kept=None if row.zeros is None or "weights" not in row.target else 1 - row.zeros,
                fitness=report.pruned.fitness if finished and row.number == good else row.fitness.end,
                held=bool(row.held),
                weights="",
            )
        )
    for point in points:
        point.delivered = finished and point.round == good > 0
        point.weights = f"weights/{'best.pt' if point.round == good > 0 else round_file(point.round)}"
    return Front(limit=limit, reference=reference, points=points)


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part and whole else None
