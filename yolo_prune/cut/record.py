# SPDX-License-Identifier: AGPL-3.0-or-later
"""The pruning record that travels inside a checkpoint: plain data in `model.yaml["pruning"]`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn

from yolo_prune._version import __version__
from yolo_prune.cut.plan import Plan
from yolo_prune.errors import PlanError, PruneError

KEY = "pruning"
VERSION = 1


@dataclass(frozen=True)
class RoundFacts:
    """A round that was performed, as the record keeps it. What is not known is None, and left out of the file.

    Attributes:
        number: of the round, counted from 1.
        plan: hash of what it removed.
        epoch: at whose start it was made, counted from 0; None for a cut in one shot.
        target: `{metric: fraction of the dense model}` that it aimed at.
        flops: of the model that it left.
        params: of the model that it left.
        latency: as it was timed, plain data as in `report.LatencyRow`.
        keep: fraction of the dense model that it left, in the metric of the target.
        reference: fitness that the drop is counted from, where there is a limit on it.
        end: best fitness after the round, once it is judged.
        held: whether the drop was within the limit, once it is judged.
    """

    number: int
    plan: str
    epoch: int | None = None
    target: Mapping[str, float] | None = None
    flops: float | None = None
    params: int | None = None
    latency: Mapping[str, Any] | None = None
    keep: float | None = None
    reference: float | None = None
    end: float | None = None
    held: bool | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RoundFacts:
        """Read what `to_dict` wrote; keys that a later release added are left out.

        Raises:
            KeyError: If the number or the hash of the plan is missing.
        """
        known = {key: data[key] for key in _FACTS if key in data}
        return cls(**{**known, "number": int(data["number"]), "plan": str(data["plan"])})

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without what is not known."""
        return {key: value for key in _FACTS if (value := getattr(self, key)) is not None}


_FACTS = tuple(entry.name for entry in fields(RoundFacts))


@dataclass(frozen=True)
class Record:
    """What was done to a model.

    Attributes:
        recipe: the resolved recipe, plain data.
        plan: everything removed so far, composed: dense model in, this model out; None before the first cut.
        widths: `{set name: channels}` of the dense model.
        rounds: those finished in the run that made this checkpoint.
        start: fraction of the dense model that this run started from, in the target's metric.
        reference: fitness of the model that this run started from, where it was trained before the first cut.
        active: a pruning run is under way; a resumed run goes on pruning only then.
    """

    recipe: Mapping[str, Any]
    plan: Plan | None = None
    widths: Mapping[str, int] = field(default_factory=dict)
    rounds: tuple[RoundFacts, ...] = ()
    start: float = 1.0
    reference: float | None = None
    active: bool = False


def student_of(model: nn.Module) -> nn.Module:
    """The model that carries the record: of a distillation, the student."""
    student: nn.Module = getattr(model, "student_model", model)
    return student


def read_record(model: nn.Module) -> Record | None:
    """The record of a model, or None if it was never touched or does not have the structure it speaks of.

    Raises:
        PruneError: If the record was written by a later version of yolo-prune, or is damaged.
    """
    model = student_of(model)
    yaml = getattr(model, "yaml", None)
    data = yaml.get(KEY) if isinstance(yaml, Mapping) else None
    if data is None:
        return None
    try:
        version, maker = data["version"], data.get("yolo_prune", "unknown")
        record = _record(data) if version == VERSION else None
    except (KeyError, TypeError, ValueError, AttributeError, PlanError) as e:
        raise PruneError(f"This checkpoint's pruning record is damaged: {type(e).__name__}: {e}.") from e
    if record is None:
        raise PruneError(
            f"This checkpoint's pruning record has version {version}; yolo-prune {__version__} reads version "
            f"{VERSION}. Install the yolo-prune that made it ({maker})."
        )
    return None if record.plan and not _fits(model, record.plan) else record


def _fits(model: nn.Module, plan: Plan) -> bool:
    """Stock Ultralytics, where this package is missing, rebuilds the dense model and keeps the record: then it lies.

    Batch norms that were folded into their convolutions for inference are not missed.
    """
    state = model.state_dict(keep_vars=True)
    return all(tuple(state[name].shape) == plan.shape_after(name) for name in plan.keep if name in state)


def _record(data: Mapping[str, Any]) -> Record:
    return Record(
        recipe=dict(data["recipe"]),
        plan=Plan.from_dict(data["plan"]) if data["plan"] else None,
        widths={str(name): int(width) for name, width in data["widths"].items()},
        rounds=tuple(RoundFacts.from_dict(r) for r in data["rounds"]),
        start=float(data["start"]),
        reference=data.get("reference"),
        active=bool(data["active"]),
    )


def write_record(model: nn.Module, record: Record) -> None:
    """Put the record into the model, as plain data that stock Ultralytics carries along."""
    yaml = dict(getattr(model, "yaml", None) or {})
    yaml[KEY] = {
        "version": VERSION,
        "yolo_prune": __version__,
        "recipe": dict(record.recipe),
        "plan": record.plan.to_dict() if record.plan else None,
        "widths": dict(record.widths),
        "rounds": [r.to_dict() for r in record.rounds],
        "start": record.start,
        "reference": record.reference,
        "active": record.active,
    }
    model.yaml = yaml  # type: ignore[assignment]  # an Ultralytics attribute


def close_record(model: nn.Module) -> None:
    """Say that no pruning run is under way; a model from which nothing was removed loses its record."""
    record = read_record(model)
    if record and record.plan:
        write_record(model, replace(record, active=False))
    elif isinstance(yaml := getattr(model, "yaml", None), dict):
        model.yaml = {k: v for k, v in yaml.items() if k != KEY}  # type: ignore[assignment]  # Ultralytics' own


def is_pruned(model: nn.Module) -> bool:
    """True if channels were removed from this model."""
    record = read_record(model)
    return bool(record and record.plan)
