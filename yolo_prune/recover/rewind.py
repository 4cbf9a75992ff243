# SPDX-License-Identifier: AGPL-3.0-or-later
"""Weight rewinding: after a cut, the remaining weights get their values of an early epoch."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from yolo_prune.cut import surgery
from yolo_prune.cut.plan import Plan
from yolo_prune.env.files import write_bytes
from yolo_prune.env.releases import DAMAGED
from yolo_prune.errors import PlanError, RunError

FILE = "rewind.pt"  # in the folder of the weights, until the run ends
RESTORE = "Restore the file of this run, or start the run again."


@dataclass(frozen=True)
class Early:
    """The weights of an early epoch of a run.

    Attributes:
        tensors: the model's state on the CPU; floating point tensors are float32.
        plan: the composed plan of all cuts before the run, from the dense model to these weights; None if there were
            no cuts.
        updates: number of updates of the moving average at that time.
    """

    tensors: Mapping[str, Tensor]
    plan: Plan | None = None
    updates: int = 0

    @classmethod
    def of(cls, model: nn.Module, plan: Plan | None, updates: int) -> Early:
        """Copy the present weights of a model."""
        state = {n: t.detach().cpu().clone() for n, t in model.state_dict().items()}
        return cls({n: t.float() if t.is_floating_point() else t for n, t in state.items()}, plan, updates)

    def write(self, path: Path) -> None:
        """Write the file. If this fails, no incomplete file is left.

        Raises:
            RunError: If the file cannot be written: without it, the run could not rewind later.
        """
        plan = self.plan.to_dict() if self.plan else None
        buffer = io.BytesIO()
        torch.save({"model": dict(self.tensors), "plan": plan, "updates": self.updates}, buffer)
        try:
            write_bytes(path, buffer.getvalue())
        except OSError as e:
            raise RunError(f"The weights to rewind to could not be written to '{path}': {e}. Free disk space.") from e

    @classmethod
    def read(cls, path: Path) -> Early:
        """Read what `write` wrote.

        Raises:
            RunError: If the file is missing or damaged.
        """
        try:
            data = torch.load(path, map_location="cpu", weights_only=True)
            plan = Plan.from_dict(data["plan"]) if data["plan"] else None
            return cls(dict(data["model"]), plan, int(data["updates"]))
        except (*DAMAGED, ValueError, TypeError, PlanError) as e:
            what = "missing" if isinstance(e, FileNotFoundError) else f"damaged ({type(e).__name__}: {e})"
            raise RunError(f"The file with the weights to rewind to, '{path}', is {what}. {RESTORE}") from e

    def thinned(self, plan: Plan, wanted: Mapping[str, tuple[int, ...]]) -> Early:
        """Cut these weights to the structure of the model after a cut.

        "Stabilizing the Lottery Ticket Hypothesis" (Frankle et al., arXiv:1912.05671 and arXiv:1903.01611): the part of
        a network that pruning keeps is trained again from its weights of an early epoch.

        Args:
            plan: the composed plan of all cuts, including the last one, from the dense model to the cut model.
            wanted: `{name: shape}` of the state of the cut model.

        Raises:
            RunError: If these are weights of another model.
        """
        try:
            tensors = dict(self.tensors)
            since = plan.since(self.plan) if self.plan else plan
            for name in {**since.keep, **since.scale}:
                if tuple(tensors[name].shape) != since.shapes[name]:
                    raise PlanError(f"'{name}' has shape {tuple(tensors[name].shape)}, not {since.shapes[name]}")
                dims = since.keep.get(name, {})
                tensors[name] = surgery.cut(tensors[name], dims)
                if name in since.scale:
                    surgery.rescale(tensors[name], since.scale[name], dims.get(0))
            if {n: tuple(t.shape) for n, t in tensors.items()} != wanted:
                raise PlanError("it has other layers")
        except (KeyError, PlanError) as e:
            raise RunError(
                f"The weights to rewind to, {FILE}, are not those of this run's model: {e}. {RESTORE}"
            ) from e
        return replace(self, tensors=tensors, plan=plan)
