# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a plan does to the cost of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from yolo_prune.errors import PlanError


@dataclass(frozen=True)
class Forecast:
    """What the plan does to the cost of the model, at one image size. FLOPs are 2 x MACs for one image.

    Milliseconds, where the target is a latency, are what the layers' times add up to, or what was measured; None
    elsewhere.
    """

    imgsz: int
    dense_flops: float
    flops_before: float
    flops_after: float
    dense_params: int
    params_before: int
    params_after: int
    dense_ms: float | None = None
    ms_before: float | None = None
    ms_after: float | None = None
    measured: bool = False

    def present(self, metric: str) -> float:
        """Fraction of the dense model that is left before the plan is applied, in "flops", "params" or "latency".

        Raises:
            PlanError: If the latency is asked for, and the plan was not made for one.
        """
        if metric == "latency":
            return self._share(self.ms_before)
        return self.flops_before / self.dense_flops if metric == "flops" else self.params_before / self.dense_params

    def kept(self, metric: str) -> float:
        """Fraction of the dense model that is left after the plan is applied, in "flops", "params" or "latency".

        Raises:
            PlanError: If the latency is asked for, and the plan was not made for one.
        """
        if metric == "latency":
            return self._share(self.ms_after)
        return self.flops_kept if metric == "flops" else self.params_kept

    def _share(self, ms: float | None) -> float:
        if ms is None or self.dense_ms is None:
            raise PlanError("This plan was not made for a latency: plan with target.latency to have milliseconds.")
        return ms / self.dense_ms

    @property
    def flops_kept(self) -> float:
        """FLOPs kept, as a fraction of the dense model."""
        return self.flops_after / self.dense_flops

    @property
    def params_kept(self) -> float:
        """Parameters kept, as a fraction of the dense model."""
        return self.params_after / self.dense_params

    def then(self, later: Forecast) -> Forecast:
        """Of two plans one after the other, at the same image size: before this one, after the later one."""
        if later.dense_ms is None or self.dense_ms is None:
            before = None
        else:  # each was measured beside a dense model of its own
            before = later.dense_ms * self.present("latency")
        return replace(later, flops_before=self.flops_before, params_before=self.params_before, ms_before=before)

    def to_dict(self) -> dict[str, float]:
        """Plain data, without what is not known."""
        return {key: value for key, value in vars(self).items() if value is not None and value is not False}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Forecast:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: If a number is not positive.
            TypeError: If one is missing, or is no number.
        """
        whole = ("imgsz", "dense_params", "params_before", "params_after")
        measured = bool(data.get("measured"))
        numbers: dict[str, Any] = {k: (int if k in whole else float)(v) for k, v in data.items() if k != "measured"}
        if not all(0 < value < math.inf for value in numbers.values()):
            raise ValueError("a forecast holds positive numbers only")
        return cls(**numbers, measured=measured)
