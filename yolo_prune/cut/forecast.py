# SPDX-License-Identifier: AGPL-3.0-or-later
"""`Forecast`: the cost of a model before and after a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from yolo_prune.env.image_size import ImageSize, plain, stored_size
from yolo_prune.errors import PlanError

ZEROS = ("weights", "zeros_before", "zeros_after")


@dataclass(frozen=True)
class Forecast:
    """Cost of the dense model, and of the model before and after the plan, at one image size.

    FLOPs are 2 x MACs for one image. Milliseconds are None unless the target is a latency. They are then the sum of the
    layers' times or, if `measured` is true, the measured time of the whole model.

    `weights` is the number of weights that may become zero, and `zeros_before` and `zeros_after` are the zeros among
    them; all three are 0 in a plan without zeros.
    """

    imgsz: ImageSize
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
    weights: int = 0
    zeros_before: int = 0
    zeros_after: int = 0

    def present(self, metric: str) -> float:
        """Fraction of the dense model's "flops", "params", "latency" or "weights" that is left before the plan.

        Raises:
            PlanError: If `metric` is "latency" and the plan was not made for a latency target.
        """
        if metric == "latency":
            return self._share(self.ms_before)
        if metric == "weights":
            return self._not_zero(self.zeros_before)
        return self.flops_before / self.dense_flops if metric == "flops" else self.params_before / self.dense_params

    def kept(self, metric: str) -> float:
        """Fraction of the dense model's "flops", "params", "latency" or "weights" that is left after the plan.

        Raises:
            PlanError: If `metric` is "latency" and the plan was not made for a latency target.
        """
        if metric == "latency":
            return self._share(self.ms_after)
        if metric == "weights":
            return self._not_zero(self.zeros_after)
        return self.flops_kept if metric == "flops" else self.params_kept

    def _not_zero(self, zeros: int) -> float:
        return 1 - zeros / self.weights if self.weights else 1.0

    def _share(self, ms: float | None) -> float:
        if ms is None or self.dense_ms is None:
            raise PlanError("This plan has no latency. Make a plan with target.latency to get milliseconds.")
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
        """Compose two forecasts at the same image size: the cost before this plan, and the cost after `later`."""
        if later.dense_ms is None or self.dense_ms is None:
            before = None
        else:  # each forecast has its own measurement of the dense model
            before = later.dense_ms * self.present("latency")
        zeros = {} if later.weights else {k: getattr(self, k) for k in ("weights", "zeros_after")}
        return replace(
            later,
            flops_before=self.flops_before,
            params_before=self.params_before,
            ms_before=before,
            zeros_before=self.zeros_before,
            **zeros,
        )

    @property
    def after(self) -> Forecast:
        """The model after the plan, as the forecast of a plan that changes nothing."""
        return replace(
            self,
            flops_before=self.flops_after,
            params_before=self.params_after,
            ms_before=self.ms_after,
            zeros_before=self.zeros_after,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without unknown values."""
        known = {key: value for key, value in vars(self).items() if value}
        return {**known, "imgsz": plain(self.imgsz)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Forecast:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: If a number is not positive.
            TypeError: If a number is missing, or a value is not a number.
            KeyError: If the image size is missing.
        """
        whole, others = ("dense_params", "params_before", "params_after", *ZEROS), ("imgsz", "measured")
        numbers: dict[str, Any] = {k: (int if k in whole else float)(v) for k, v in data.items() if k not in others}
        if not all(0 < value < math.inf for value in numbers.values()):
            raise ValueError("a forecast holds positive numbers only")
        if max(numbers.get("zeros_before", 0), numbers.get("zeros_after", 0)) > numbers.get("weights", 0):
            raise ValueError("a forecast has more zeros than weights")
        return cls(stored_size(data["imgsz"], error=ValueError), **numbers, measured=bool(data.get("measured")))
