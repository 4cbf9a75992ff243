# SPDX-License-Identifier: AGPL-3.0-or-later
"""The Python API, in the states of torch in which notebooks and services call it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from small_data import IMGSZ, tiny
from torch import Tensor
from ultralytics import YOLO

import yolo_prune
from yolo_prune.errors import RunError

RECIPE: dict[str, Any] = {"target": {"flops": 0.6}, "channels": {"round_to": 2, "min": 4}}
STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("api"), train=4)


def cut(
    folder: Path, criterion: str, state: Callable[[], AbstractContextManager[Any]]
) -> tuple[str, dict[str, Tensor]]:
    """Open, plan and cut a model inside a context: the plan's hash and the state of the model."""
    data = folder / "scenes/scenes.yaml"
    with state():
        model = YOLO(folder / "dense.pt")
        plan = yolo_prune.plan(model, RECIPE, imgsz=IMGSZ, data=data, criterion=criterion)
        proof = yolo_prune.apply(model, plan, imgsz=IMGSZ, data=data, refit=4)
    assert proof.error < 1e-8
    return plan.hash, model.model.state_dict()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("criterion", ["taylor", "obs", "magnitude"])
def test_a_cut_is_the_same_where_gradients_are_off(criterion: str, state: str, folder: Path) -> None:
    plain, there = (cut(folder, criterion, how) for how in (nullcontext, STATES[state]))
    assert there[0] == plain[0]
    assert all(torch.equal(tensor, plain[1][name]) for name, tensor in there[1].items())
    assert not any(tensor.is_inference() for tensor in there[1].values())  # else nobody could train it


def test_a_model_that_was_cut_in_inference_mode_can_be_trained(folder: Path, tmp_path: Path) -> None:
    with torch.inference_mode():
        model = YOLO(folder / "dense.pt")
        yolo_prune.apply(model, yolo_prune.plan(model, RECIPE, imgsz=IMGSZ, criterion="magnitude"))
    settings = {"epochs": 1, "imgsz": IMGSZ, "workers": 0, "plots": False, "device": "cpu", "project": str(tmp_path)}
    model.train(data=folder / "scenes/scenes.yaml", **settings)
    assert yolo_prune.is_pruned(model)


def test_parameters_that_need_no_gradients_are_scored_nevertheless(folder: Path) -> None:
    model = YOLO(folder / "dense.pt")
    model.model.requires_grad_(False)
    data = folder / "scenes/scenes.yaml"
    found = yolo_prune.plan(model, RECIPE, imgsz=IMGSZ, data=data, criterion="taylor")
    assert found.hash == cut(folder, "taylor", nullcontext)[0]
    assert not any(p.requires_grad for p in model.model.parameters())


@pytest.mark.parametrize("state", STATES)
def test_training_without_gradients_is_refused_before_any_work(state: str, folder: Path, clean_cwd: Path) -> None:
    with STATES[state]():
        model = YOLO(folder / "dense.pt")
        with pytest.raises(RunError, match=r"needs gradients, and they are off here.*Call train outside of it"):
            model.train(data=folder / "scenes/scenes.yaml", epochs=1, imgsz=IMGSZ, callbacks="prune")
    assert list(clean_cwd.iterdir()) == []
