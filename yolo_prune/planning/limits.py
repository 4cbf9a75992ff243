# SPDX-License-Identifier: AGPL-3.0-or-later
"""What keeps a cut from removing more, and what a user can change about it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from yolo_prune.graph.structure import Group
from yolo_prune.graph.trace import FROZEN, PROTECT
from yolo_prune.planning.cost import Cost, Shapes
from yolo_prune.planning.select import Constraints, least

WAYS = {"max_removed": "raise", "min": "lower", "round_to": "lower"}
"""The limits on widths in `channels`, and the direction that allows more."""
WORTH = 0.01
"""A change counts as help if it removes this fraction of the dense model or more. This value is a choice."""
SHOWN = 4
"""Number of reasons for protection in a message."""
NATURAL = ("task output", "box distribution (DFL)")
"""Reasons for protection in every model: nobody can do anything about them."""


@dataclass(frozen=True)
class Limits:
    """What limits the cuts of a model: the constraints on widths, and the protected groups.

    Attributes:
        groups: all groups of the model.
        cost: the cost of the model.
        constraints: the constraints on widths.
        dense: shapes in the dense model, for the tensors that earlier cuts made smaller.
        widths: `{set name: channels in the dense model}`.
    """

    groups: Sequence[Group]
    cost: Cost
    constraints: Constraints
    dense: Shapes
    widths: Mapping[str, int]

    def present(self, metric: str) -> float:
        """Cost of the model as a fraction of the dense model's cost."""
        return self.cost.total(metric) / self.cost.total(metric, self.dense)

    def least(self, metric: str, lifted: Collection[str] = ()) -> float:
        """The smallest fraction of the dense model that the limits allow.

        Args:
            metric: "flops", "params" or "latency".
            lifted: fields of `channels` without which it is computed.
        """
        timing = self.cost.timing if metric == "latency" else None  # a recipe cannot change the step of the runtime
        free = Constraints(timing.multiple if timing else 1, 1, 1.0)
        constraints = _lift(self.constraints, lifted, free)
        left = least(self.groups, self.cost, metric, constraints, self.widths)
        return left / self.cost.total(metric, self.dense)

    def advice(self, metric: str, keep: float) -> str:
        """What to change so that the fraction `keep` of the dense model can be reached, as sentences.

        Only changes that help are named. If no change of the limits on widths is enough, the text says what they
        allow together, and which channels are protected.
        """
        floor, free = self.least(metric), self.least(metric, WAYS)
        for count in range(1, len(WAYS) + 1):
            each = {fields: self.least(metric, fields) for fields in combinations(WAYS, count)}
            if enough := [fields for fields, left in each.items() if left <= min(keep, floor - WORTH)]:
                return f"To remove more, {self._said(enough)}."
        limits = f"Without the limits in channels ({', '.join(WAYS)}), {free:.3f} is left."
        return " ".join(filter(None, [limits if free <= floor - WORTH else "", self._protected()]))

    def _said(self, changes: Sequence[Sequence[str]]) -> str:
        texts = [" and ".join(f"{WAYS[field]} channels.{field}" for field in fields) for fields in changes]
        return ", or ".join(texts) + (" (also in channels.layers)" if self.constraints.layers else "")

    def _protected(self) -> str:
        """Which channels are protected, why, and what to do about it; empty if nothing can be done."""
        counts: dict[str, int] = {}
        for group in self.groups:
            if group.protected:
                counts[group.protected] = counts.get(group.protected, 0) + sum(s.size for s in group.sets)
        ordered = sorted(counts, key=lambda reason: -counts[reason])
        own = any(reason.startswith(PROTECT) for reason in counts)
        built = bool(ordered) and not ordered[0].startswith((*NATURAL, PROTECT, FROZEN))
        if not (own or built or FROZEN in counts):
            return ""
        everything = sum(s.size for group in self.groups for s in group.sets)
        shown = [f"{counts[reason]:,} ({reason})" for reason in ordered[:SHOWN]]
        rest = sum(counts[reason] for reason in ordered[SHOWN:])
        shown += [f"{rest:,} (other reasons)"] if rest else []
        advice = {
            "Protect less in the recipe.": own,
            "Freeze fewer layers (freeze=).": FROZEN in counts,
            "Choose a model with other layers or another activation there; blocks of your own can be described with "
            "yolo_prune.register_block.": built,
        }
        said = f"{sum(counts.values()):,} of {everything:,} channels are protected: {', '.join(shown)}."
        return " ".join([said, *(text for text, helps in advice.items() if helps)])


def _lift(limits: Constraints, fields: Collection[str], free: Constraints) -> Constraints:
    """Constraints with the values of `free` in some fields, for all layers and for single layers."""
    layers = {name: _lift(own, fields, free) for name, own in limits.layers.items()}
    return replace(limits, **{field: getattr(free, field) for field in fields}, layers=layers)
