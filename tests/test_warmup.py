# SPDX-License-Identifier: AGPL-3.0-or-later
"""How long an optimizer warms up that starts anew in the middle of a run, and which one does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from yolo_prune.run.warmup import RestartWarmUp, is_new

OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
}


def weights() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(3))


def trainer_of(optimizer: Any, epoch: int, ahead: int, warmup_epochs: float = 3.0, batches: int = 40) -> Any:
    """Ten steps an epoch."""
    return SimpleNamespace(
        epoch=epoch,
        epochs=epoch + ahead,
        optimizer=optimizer,
        batch_size=4,
        args=SimpleNamespace(warmup_epochs=warmup_epochs, nbs=16),
        train_loader=range(batches),
        pruning=SimpleNamespace(ahead=lambda epoch, epochs: epochs - epoch),
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_new_until_it_has_made_a_step(name: str) -> None:
    kind, settings = OPTIMIZERS[name]
    weight = weights()
    optimizer = kind([weight], lr=0.1, **settings)
    assert is_new(optimizer)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert not is_new(optimizer)


def test_one_that_never_remembers_is_not_new_in_every_epoch() -> None:
    assert not is_new(torch.optim.SGD([weights()], lr=0.1, momentum=0.0))


@pytest.mark.parametrize(
    ("epoch", "ahead", "warmup_epochs", "batches", "steps"),
    [
        (5, 20, 3.0, 40, 30),
        (5, 4, 3.0, 40, 20),  # no more than half of what is to come
        (5, 1, 3.0, 40, 5),
        (5, 20, 3.0, 1, 2),  # one step at no rate at all would be followed by one at the whole
        (5, 20, 0.0, 40, 0),  # nobody wants it
        (0, 20, 3.0, 40, 0),  # the run's own warm-up is there
    ],
)
def test_it_warms_up_as_the_run_does(epoch: int, ahead: int, warmup_epochs: float, batches: int, steps: int) -> None:
    restart = RestartWarmUp()
    restart.epoch_starts(trainer_of(torch.optim.AdamW([weights()]), epoch, ahead, warmup_epochs, batches))
    assert restart.total == steps


def test_steps_grow_to_the_rate_that_is_there_and_leave_it_alone() -> None:
    optimizer = torch.optim.AdamW([weights()], lr=0.4)
    restart, taken = RestartWarmUp(), []
    restart.epoch_starts(trainer_of(optimizer, 3, 2, batches=16))  # an epoch of four steps
    for _ in range(6):
        with restart.short_steps(optimizer):
            taken.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[0]["lr"] == 0.4
    assert taken == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4])
