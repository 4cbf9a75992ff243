# SPDX-License-Identifier: AGPL-3.0-or-later
"""The pruning record that travels inside a checkpoint: plain data in `model.yaml["pruning"]`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn

from yolo_prune._version import __version__
from yolo_prune.cut.classes import Classes, names_of
from yolo_prune.cut.masks import Masked
from yolo_prune.cut.plan import Plan
from yolo_prune.errors import PlanError, PruneError

KEY = "pruning"
VERSION = 1


@dataclass(frozen=True)
class RoundFacts:
    """The facts of a finished round in the record. An unknown fact is None, and is not in the file.

    Attributes:
        number: number of the round, counted from 1.
        plan: hash of the round's plan.
        epoch: the epoch at whose start the cut was made, counted from 0; None for a one-shot cut without training.
        target: the target of the round: `{metric: fraction of the dense model}`.
        flops: FLOPs of the model after the cut.
        params: parameters of the model after the cut.
        latency: measured latency after the cut, as plain data of `report.LatencyRow`.
        keep: fraction of the dense model after the cut, in the metric of the target.
        reference: fitness from which the drop is counted, if the drop has a limit.
        end: best fitness after the round; None until the round is judged.
        held: whether the drop was within the limit; None until the round is judged.
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
        """Read what `to_dict` wrote. Keys that a later release added are ignored.

        Raises:
            KeyError: If the number or the hash of the plan is missing.
            ValueError: If one of the two is not what it must be.
        """
        known = {key: data[key] for key in _FACTS if key in data}
        if not isinstance(data["plan"], str):
            raise ValueError("the plan of a round is a hash")
        return cls(**{**known, "number": int(data["number"]), "plan": data["plan"]})

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without unknown facts."""
        return {key: value for key in _FACTS if (value := getattr(self, key)) is not None}


_FACTS = tuple(entry.name for entry in fields(RoundFacts))


@dataclass(frozen=True)
class Record:
    """The pruning history of a model.

    Attributes:
        recipe: the resolved recipe, as plain data.
        plan: the composed plan of all cuts so far, from the dense model to this model; None before the first cut.
        widths: `{set name: number of channels}` of the dense model.
        rounds: the rounds that are finished in the run that made this checkpoint.
        start: fraction of the dense model at the start of this run, in the target's metric.
        reference: fitness at the start of this run, if the model was trained before the first cut.
        active: the checkpoint is from a pruning run that has not ended. A resumed run only prunes if this is true.
    """

    recipe: Mapping[str, Any]
    plan: Plan | None = None
    widths: Mapping[str, int] = field(default_factory=dict)
    rounds: tuple[RoundFacts, ...] = ()
    start: float = 1.0
    reference: float | None = None
    active: bool = False


def student_of(model: nn.Module) -> nn.Module:
    """The model that has the record: in a distillation the student, else the model itself."""
    student: nn.Module = getattr(model, "student_model", model)
    return student


def read_record(model: nn.Module) -> Record | None:
    """The record of a model; None if the model has no record, or if its structure differs from the record.

    Raises:
        PruneError: If the record was written by a later version of yolo-prune, or is damaged.
    """
    model = student_of(model)
    record = stored_record(model)
    return record if record is None or record.plan is None else _fitting(model, record, record.plan)


def stored_record(model: nn.Module) -> Record | None:
    """The record of a model as it is stored, whether it is true of the model or not; see `read_record`."""
    yaml = getattr(model, "yaml", None)
    data = yaml.get(KEY) if isinstance(yaml, Mapping) else None
    if data is None:
        return None
    try:
        version, maker = data["version"], data.get("yolo_prune", "unknown")
        record = _record(data) if version == VERSION else None
    except (KeyError, TypeError, ValueError, AttributeError, PlanError) as e:
        raise PruneError(
            f"This checkpoint's pruning record is damaged: {type(e).__name__}: {e}. Take another checkpoint of the run."
        ) from e
    if record is None:
        raise PruneError(
            f"This checkpoint's pruning record has version {version}; yolo-prune {__version__} reads version "
            f"{VERSION}. Install the yolo-prune that made the checkpoint ({maker})."
        )
    return record


def _fitting(model: nn.Module, record: Record, plan: Plan) -> Record | None:
    """The record, as far as it is true of the model: Ultralytics without this package trains zeros like all weights."""
    if not _fits(model, plan):
        return None
    if plan.classes and not _has_names(model, plan.classes):
        plan = replace(plan, classes=None)  # it was trained for other classes by Ultralytics without this package
        record = replace(record, plan=plan)
    if not plan.masks or Masked(model, plan.masks).holds():
        return record
    return replace(record, plan=replace(plan, masks={})) if plan.keep or plan.classes else None


def forget_lost_zeros(model: nn.Module) -> bool:
    """Delete the masks from a record whose zeros are not zero any more. Returns whether there were any."""
    stored = stored_record(model)
    if stored is None or stored.plan is None or not stored.plan.masks or not _fits(model, stored.plan):
        return False
    true = _fitting(model, stored, stored.plan)
    if true and true.plan and true.plan.masks:
        return False
    if true is None:
        delete_record(model)
    else:
        write_record(model, true)
    return True


def _has_names(model: nn.Module, classes: Classes) -> bool:
    """Whether the classes of a model are those that a plan keeps. A model without names gets those of its dataset."""
    return classes.unnamed or names_of(model) == classes.kept_names


def _fits(model: nn.Module, plan: Plan) -> bool:
    """Whether a model has the structure that the record's plan leaves.

    Ultralytics without this package rebuilds the dense model but keeps the record, which is then wrong. A missing
    tensor is no error: fusing for inference removes batch norms.
    """
    if plan.classes and len(names_of(model)) != len(plan.classes.kept):
        return False
    state = model.state_dict(keep_vars=True)
    shapes = {name: mask.shape for name, mask in plan.masks.items()}
    shapes |= {name: plan.shape_after(name) for name in plan.keep}
    return all(tuple(state[name].shape) == shape for name, shape in shapes.items() if name in state)


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
    """Put the record into the model, as plain data in the `yaml` attribute, which Ultralytics saves with the model."""
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


def after_cut(record: Record | None, plan: Plan, widths: Mapping[str, int], shown: Plan | None = None) -> Record:
    """The record of a model after a cut without training.

    Args:
        record: the record before the cut.
        plan: the plan that was applied.
        widths: `{set name: channels}` of the dense model.
        shown: the plan that is shown as the last round, if it is not `plan`.
    """
    composed = record.plan.then(plan) if record and record.plan else plan
    flops, params = (plan.forecast.flops_after, plan.forecast.params_after) if plan.forecast else (None, None)
    facts = RoundFacts(number=1, plan=(shown or plan).hash, flops=flops, params=params)
    return Record(record.recipe if record else {}, composed, widths, (facts,))


def close_record(model: nn.Module) -> None:
    """Mark the pruning run as ended. If no channels were removed from the model, delete its record."""
    record = read_record(model)
    if record and record.plan:
        write_record(model, replace(record, active=False))
    else:
        delete_record(model)


def delete_record(model: nn.Module) -> None:
    """Delete the record of a model, if there is one."""
    if isinstance(yaml := getattr(model, "yaml", None), dict):
        model.yaml = {k: v for k, v in yaml.items() if k != KEY}  # type: ignore[assignment]  # Ultralytics' own


def is_pruned(model: nn.Module) -> bool:
    """True if channels or classes were removed from this model, or weights were set to zero."""
    return composed_plan(model) is not None


def is_rebuilt(model: nn.Module) -> bool:
    """True if a model was built from the YAML of a pruned model: it has the record, but not the structure."""
    return KEY in (getattr(model, "yaml", None) or {}) and read_record(model) is None


def composed_plan(model: nn.Module) -> Plan | None:
    """Everything that was removed from this model; None if it is not pruned."""
    record = read_record(model)
    return record.plan if record and record.plan else None
