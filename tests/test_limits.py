# SPDX-License-Identifier: AGPL-3.0-or-later
"""The advice for a target out of reach: it names what stops the cut, and following it helps."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_data import SHORT, short_checkpoint
from test_select import chain
from ultralytics import YOLO

import yolo_prune
from yolo_prune.errors import TargetError
from yolo_prune.planning.cost import Term, Timing
from yolo_prune.planning.limits import Limits
from yolo_prune.planning.select import Constraints

IMGSZ = 64
RECIPE: dict[str, Any] = {"target": {"flops": 0.5}, "criterion": "magnitude"}


def refused(model: Any, **overrides: Any) -> str:
    with pytest.raises(TargetError) as refusal:
        yolo_prune.plan(model, RECIPE, imgsz=IMGSZ, **overrides)
    return str(refusal.value)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> YOLO:
    return YOLO(short_checkpoint(tmp_path_factory.mktemp("limits")))


@pytest.mark.parametrize("field", ["min", "round_to"])
def test_the_limit_that_stops_a_cut_is_named_and_no_other(dense: YOLO, field: str) -> None:
    said = refused(dense, **{f"channels.{field}": 512})
    assert "nothing, or next to nothing, can be removed from this model" in said
    assert said.endswith(f"To remove more, lower channels.{field}.")
    assert yolo_prune.plan(dense, RECIPE, imgsz=IMGSZ)


def test_a_limit_of_single_layers_is_named_with_its_place(dense: YOLO) -> None:
    said = refused(dense, **{"channels.layers": {"model.*": {"max_removed": 0.01}}})
    assert said.endswith("To remove more, raise channels.max_removed (also in channels.layers).")


def test_limits_that_must_be_changed_together_are_named_together(dense: YOLO) -> None:
    deep = {"target.flops": 0.01, "channels.max_removed": 0.999}
    assert refused(dense, **deep).endswith("To remove more, lower channels.min and lower channels.round_to.")
    for field in ("channels.min", "channels.round_to"):
        assert "cannot be reached" in refused(dense, **deep, **{field: 1})
    yolo_prune.plan(dense, RECIPE, imgsz=IMGSZ, **deep, **{"channels.min": 1, "channels.round_to": 1})


def test_what_the_user_protects_is_named(dense: YOLO) -> None:
    said = refused(dense, protect="model.*")
    assert "(recipe: protect 'model.*')" in said
    assert said.endswith("Protect less in the recipe.")
    assert "channels." not in said


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        ("torch.nn.Softplus()", "an activation that is not 0 at 0"),
        ("torch.nn.Softmax2d()", "softmax over channels in Softmax2d"),
    ],
)
def test_where_activations_protect_everything_no_limit_is_blamed(activation: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "act.yaml").write_text(yaml.safe_dump({**SHORT, "nc": 5, "activation": activation}))
    said = refused(YOLO(tmp_path / "act.yaml"))
    assert reason in said
    assert "of 1,566 channels are protected: 1,464 (" in said
    assert "choose a model with other layers or another activation" in said.lower()
    assert "channels." not in said


def test_a_search_for_the_size_gets_the_same_advice(dense: YOLO) -> None:
    recipe = {"recipe.target.max_drop": 0.1, "recipe.protect": "model.*"}
    with pytest.raises(TargetError, match=r"target\.max_drop: nothing can be removed.* Protect less in the recipe\.$"):
        dense.train(data="x.yaml", epochs=9, callbacks="prune", **recipe)


def test_frozen_layers_are_named_with_the_argument_that_freezes_them(dense: YOLO) -> None:
    with pytest.raises(TargetError, match=r"\(frozen in this run\).* Freeze fewer layers \(freeze=\)\.$"):
        dense.train(data="x.yaml", epochs=9, freeze=12, imgsz=IMGSZ, callbacks="prune")


@pytest.mark.parametrize(("round_to", "named"), [(16, False), (32, True)])
def test_the_step_of_a_runtime_is_no_limit_that_a_user_can_change(round_to: int, named: bool) -> None:
    groups, cost = chain(64, 64, 4)
    timing = Timing({f"{i}.weight": Term(0.0, 1.0, steps=(16, 1)) for i in range(3)}, 1.0, multiple=16)
    widths = {s.name: s.size for g in groups for s in g.sets}
    limits = Limits(groups, replace(cost, timing=timing), Constraints(round_to, 1, 0.99), {}, widths)
    deepest = limits.least("latency", ["max_removed", "min", "round_to"])
    assert ("channels.round_to" in limits.advice("latency", deepest)) is named


def test_limits_that_do_not_suffice_are_told_with_what_they_allow() -> None:
    groups, cost = chain(64, 64, 4)
    protected = [replace(groups[0], protected="softmax over channels in Mine"), *groups[1:]]
    widths = {s.name: s.size for g in groups for s in g.sets}
    said = Limits(protected, cost, Constraints(8, 8, 0.5), {}, widths).advice("flops", 0.01)
    assert re.match(
        r"Without the limits in channels \(max_removed, min, round_to\), 0\.\d+ is left\. 68 of 132 channels", said
    )
