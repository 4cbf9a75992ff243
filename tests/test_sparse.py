# SPDX-License-Identifier: AGPL-3.0-or-later
"""Sparse training: the scales of channels that may be cut shrink, by exactly what was asked, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import small_data
import torch
from small_runs import RECIPES, RUNS
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint

from yolo_prune.graph import Graph, trace
from yolo_prune.run.sparse import scales_of, shrink

SPARSITY = 0.5
RUN = RUNS["sparse"]
RECIPE: dict[str, Any] = {
    **RECIPES["sparse"],
    "criterion": {"name": "bn_scale", "sparsity": SPARSITY},
    "protect": ["model.4"],
}


def free(graph: Graph) -> set[tuple[str, int]]:
    """`(tensor, index)` of all that may be cut."""
    sets = [s for g in graph.groups if not g.protected for s in g.sets]
    return {(slot.tensor, i) for s in sets for slot in s.slots for i in slot.index}


def test_a_proximal_step_by_hand() -> None:
    chosen, other = (nn.Parameter(torch.tensor([0.5, -0.25, 0.03125, -0.03125, 1.0])) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [chosen], "lr": 0.25}, {"params": [other], "lr": 1.0}], momentum=0.9)
    shrink(optimizer, {chosen: torch.tensor([True, True, True, True, False])}, 0.25)
    assert chosen.tolist() == [0.4375, -0.1875, 0, 0, 1]
    assert other.tolist() == [0.5, -0.25, 0.03125, -0.03125, 1.0]


def test_only_scales_of_channels_that_may_be_cut_are_chosen() -> None:
    model = models.build("yolo26-tiny")
    model.model[2].requires_grad_(False)
    graph = trace(model, ["model.4"], ["model.2"], imgsz=models.IMGSZ)
    names = {p: n for n, p in model.named_parameters()}
    chosen = {names[p]: mask for p, mask in scales_of(model, graph).items()}
    assert all(n.endswith("bn.weight") for n in chosen)
    assert not [n for n in chosen if n.startswith(("model.2.", "model.4."))]
    everywhere = {n: t for n, t in model.named_parameters() if n.endswith("bn.weight")}
    cuttable = free(graph)
    for name, weight in everywhere.items():
        wanted = [(name, i) in cuttable for i in range(len(weight))]
        mask = chosen[name].tolist() if name in chosen else [False] * len(weight)
        assert mask == (wanted if weight.requires_grad else [False] * len(weight)), name
    assert len(chosen) > len(everywhere) / 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data.tiny(tmp_path_factory.mktemp("sparsity"), train=12)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["SGD", pytest.param("AdamW", marks=pytest.mark.long), "MuSGD"])
def test_the_scales_of_a_run_shrink_up_to_its_last_cut(optimizer: str, folder: Path, tmp_path: Path) -> None:
    stepped: dict[str, Tensor] = {}
    found: list[tuple[int, list[str]]] = []
    dense = load_checkpoint(folder / "dense.pt")[0]
    may_go = {tensor for tensor, _ in free(trace(dense, ["model.4"], ["model.0"], imgsz=32))}

    def norms(model: nn.Module) -> dict[str, Tensor]:
        layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
        return {n: m.weight.detach().clone() for n, m in layers.items()}

    def watch(trainer: Any) -> None:
        trainer.ema.decay = lambda updates: 0.0  # the average is what it has last been shown
        trainer.optimizer.register_step_post_hook(lambda *_: stepped.update(norms(trainer.model)))

    def compare(trainer: Any) -> None:
        if not stepped:  # its gradients wait for those of the next batch
            return
        rates = {p: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
        changed, now = [], norms(trainer.model)
        for name, before in stepped.items():
            assert torch.equal(norms(trainer.ema.ema)[name], now[name])
            rate = rates[trainer.model.get_parameter(f"{name}.weight")]
            amount = rate * SPARSITY if trainer.epoch < 2 and f"{name}.weight" in may_go else 0.0
            wanted = before.sign() * (before.abs() - amount).clamp(min=0)
            assert torch.equal(now[name], wanted), (trainer.epoch, name)
            changed += [name] if not torch.equal(before, now[name]) else []
        found.append((trainer.epoch, changed))
        stepped.clear()

    model = YOLO(folder / "dense.pt")
    model.add_callback("on_train_start", watch)
    model.add_callback("on_train_batch_end", compare)
    places = {"data": str(folder / "scenes/scenes.yaml"), "project": str(tmp_path)}
    model.train(**RUN, optimizer=optimizer, freeze=[0], recipe=RECIPE, **places)
    shrinking = {epoch: changed for epoch, changed in found if changed}
    assert sorted(shrinking) == [0, 1]  # before the first cut and before the second
    assert {epoch for epoch, _ in found} == {0, 1, 2, 3}
    assert min(len(changed) for changed in shrinking.values()) > 20
    assert not {n for n in may_go if n.startswith(("model.0.", "model.4."))}


@pytest.mark.slow
@pytest.mark.parametrize(("start", "warned"), [(0, True), (1, False)])
def test_a_first_cut_before_any_sparse_training_is_remarked_on(
    start: int, warned: bool, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = {**RECIPE, "schedule": {"rounds": 1, "start": start}}
    places = {"data": str(folder / "scenes/scenes.yaml"), "project": str(tmp_path)}
    YOLO(folder / "dense.pt").train(**{**RUN, "epochs": 2}, recipe=recipe, **places)
    assert ("the first cut comes before any sparse training" in caplog.text) is warned
