# SPDX-License-Identifier: AGPL-3.0-or-later
"""`front.json`: the models that a run with a limit on the drop has been at, each with its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from yolo_prune.env.files import write_text
from yolo_prune.env.json_files import JsonFile
from yolo_prune.report.data import Report

FRONT = "front.json"
_WITHOUT = "Delete it, and the report goes without it."
FILE = JsonFile(
    "what a run with a limit leaves",
    unreadable=f"{{path}} is damaged: {{why}}. {_WITHOUT}",
    broken=f"{{path}} is damaged: Invalid JSON: {{why}}. {_WITHOUT}",
    wrong=f"{{path}} is damaged: {{why}}. {_WITHOUT}",
)


def round_file(number: int) -> str:
    """Name of the file with the best model after a round; 0 is before the first."""
    return f"round{number}.pt"


class FrontPoint(BaseModel):
    """One model: what it costs, as fractions of the dense one, and how good its best epoch was.

    Attributes:
        round: that made it; 0 is the model that the run started from.
        held: its fitness dropped by no more than the limit.
        delivered: it is the one in best.pt.
        weights: its checkpoint, relative to the run's folder.
    """

    round: int
    flops_kept: float | None = None
    params_kept: float | None = None
    fitness: float | None = None
    held: bool
    delivered: bool = False
    weights: str


class Front(BaseModel):
    """The content of `front.json`; points in the order in which the run came to them."""

    version: Literal[1] = 1
    limit: float
    reference: float
    points: list[FrontPoint]

    def save(self, folder: str | Path) -> Path:
        """Write `front.json` into a run's folder."""
        return write_text(Path(folder) / FRONT, json.dumps(self.model_dump(), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Front | None:
        """Read `front.json` of a run's folder; None if the run had no limit and left none.

        Raises:
            PruneError: If the file is damaged.
        """
        path = Path(folder) / FRONT
        return FILE.load(path, cls) if path.exists() else None


def front(report: Report, limit: float, reference: float, start: dict[str, float]) -> Front:
    """Gather the points of a run.

    Args:
        report: of the run; its rounds are judged.
        limit: on the drop of the fitness.
        reference: fitness that drops are counted from.
        start: "flops" and "params", as far as known, that the run started from, as fractions of the dense model.
    """
    good = max((row.number for row in report.rounds if row.held), default=0)
    finished = report.status == "finished"
    points = [FrontPoint(round=0, fitness=reference, held=True, weights="", flops_kept=start.get("flops"),
                    params_kept=start.get("params"))]  # fmt: skip
    for row in report.rounds:
        points.append(
            FrontPoint(
                round=row.number,
                flops_kept=_share(row.flops, report.dense.flops),
                params_kept=_share(row.params, report.dense.params),
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
