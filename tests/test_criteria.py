# SPDX-License-Identifier: AGPL-3.0-or-later
"""Criteria: scores of channels, computed by hand."""

from __future__ import annotations

import models
import pytest
import torch
from torch import Tensor

from yolo_prune.criteria import CRITERIA, create, register_criterion
from yolo_prune.errors import RecipeError
from yolo_prune.graph import ChannelSet, Slot

# Two channels: rows 0 and 2 of a producer with its batch norm, columns 1 and 0 of a consumer.
PAIR = ChannelSet(
    "pair",
    2,
    (
        Slot("a.weight", 0, (0, 2)),
        Slot("a.bias", 0, (0, 2)),
        Slot("bn.weight", 0, (0, 2)),
        Slot("bn.running_var", 0, (0, 2)),
        Slot("b.weight", 1, (1, 0)),
    ),
)
TENSORS = {
    "a.weight": torch.tensor([[3.0, -4.0], [90.0, 90.0], [0.0, 1.0]])[:, :, None, None],
    "a.bias": torch.tensor([1000.0, 1000.0, 1000.0]),
    "bn.weight": torch.tensor([-2.0, 90.0, 2.0]),
    "bn.running_var": torch.tensor([1000.0, 1000.0, 1000.0]),
    "b.weight": torch.tensor([[1.0, -5.0], [1.0, 1.0]])[:, :, None, None],
}


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (1, [3 + 4 + 2 + 5 + 1, 0 + 1 + 2 + 1 + 1]),
        (2, [(9 + 16 + 4 + 25 + 1) ** 0.5, (0 + 1 + 4 + 1 + 1) ** 0.5]),
    ],
)
def test_magnitude_is_the_norm_of_all_weights_of_a_channel(norm: int, expected: list[float]) -> None:
    """Of its producers, its batch norm and its consumers; of biases and statistics nothing."""
    score = create("magnitude", {"norm": norm})(TENSORS, PAIR)
    assert score.dtype == torch.float64
    assert score.tolist() == pytest.approx(expected)


def test_magnitude_defaults_to_the_euclidean_norm() -> None:
    assert torch.equal(create("magnitude", {})(TENSORS, PAIR), create("magnitude", {"norm": 2})(TENSORS, PAIR))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_magnitude_is_summed_in_double_precision(dtype: torch.dtype) -> None:
    big: dict[str, Tensor] = {"a.weight": torch.full((1, 4096), 200.0, dtype=dtype)}
    score = create("magnitude", {})(big, ChannelSet("one", 1, (Slot("a.weight", 0, (0,)),)))
    assert score.item() == 200 * 64


def test_magnitude_scores_a_trainable_parameter_without_a_gradient() -> None:
    weights = {name: tensor.clone().requires_grad_() for name, tensor in TENSORS.items()}
    assert not create("magnitude", {})(weights, PAIR).requires_grad


def test_random_depends_on_the_seed_and_the_name_alone() -> None:
    other = ChannelSet("other", 2, PAIR.slots)
    first = create("random", {"seed": 1})({}, PAIR)
    random = torch.get_rng_state()
    assert torch.equal(first, create("random", {"seed": 1})(TENSORS, PAIR))
    assert torch.equal(random, torch.get_rng_state())
    assert not torch.equal(first, create("random", {"seed": 2})({}, PAIR))
    assert not torch.equal(first, create("random", {"seed": 1})({}, other))
    assert 0 <= first.min() <= first.max() < 1


@pytest.mark.parametrize("name", ["magnitude", "random"])
def test_scores_of_a_model_are_finite_one_per_channel_and_not_negative(name: str) -> None:
    tensors, criterion = models.shared("yolo11-tiny").state_dict(), create(name, {})
    for group in models.graph_of("yolo11-tiny").groups:
        for channels in group.sets:
            score = criterion(tensors, channels)
            assert score.shape == (channels.size,)
            assert score.dtype == torch.float64
            assert torch.isfinite(score).all()
            assert (score >= 0).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "magnitud",
            {},
            r"criterion\.name: there is no criterion 'magnitud'; choose one of taylor, fisher, obs, torch_pruning",
        ),
        ("magnitude", {"nrom": 1}, r"criterion\.nrom: 'magnitude' has no such option. The options are: norm\."),
        ("random", {"norm": 1}, r"criterion\.norm: 'random' has no such option. The options are: seed\."),
        ("magnitude", {"norm": 3}, r"criterion\.norm: must be 1 or 2, got 3"),
        ("magnitude", {"norm": True}, r"criterion\.norm: must be 1 or 2, got True"),
        ("magnitude", {"norm": "2"}, r"criterion\.norm: must be 1 or 2, got '2'"),
        ("magnitude", {"norm": None}, r"criterion\.norm: must be 1 or 2, got None"),
        ("magnitude", {"norm": [2]}, r"criterion\.norm: must be 1 or 2, got \[2\]"),
        ("bn_scale", {"sparsity": -1}, r"criterion\.sparsity: must be a number at least 0 and below 1, got -1"),
        ("bn_scale", {"sparsity": True}, r"criterion\.sparsity: must be a number at least 0 and below 1, got True"),
        ("bn_scale", {"sparsity": "1e-4"}, r"criterion\.sparsity: must be a number .* got '1e-4'"),
        ("bn_scale", {"sparsity": float("nan")}, r"criterion\.sparsity: must be a number .* got nan"),
        ("bn_scale", {"sparse": 0.1}, r"criterion\.sparse: 'bn_scale' has no such option. The options are: sparsity\."),
        ("random", {"seed": -1}, r"criterion\.seed: must be a whole number from 0 to 4294967295, got -1"),
        ("random", {"seed": 0.5}, r"criterion\.seed: must be a whole number from 0 to 4294967295, got 0\.5"),
        ("random", {"seed": True}, r"criterion\.seed: must be a whole number from 0 to 4294967295, got True"),
        ("random", {"seed": 2**32}, r"criterion\.seed: must be a whole number from 0 to 4294967295, got"),
    ],
)
def test_what_cannot_be_is_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        create(name, options)({}, PAIR)


def test_a_criterion_can_be_registered_once_and_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(CRITERIA, "flat", raising=False)

    @register_criterion("flat")
    def flat(value: float = 1.0):  # type: ignore[no-untyped-def]
        return lambda tensors, channels: torch.full((channels.size,), value, dtype=torch.float64)

    assert create("flat", {"value": 2.0})({}, PAIR).tolist() == [2, 2]
    with pytest.raises(ValueError, match="'flat' is already registered"):
        register_criterion("flat")(flat)
    CRITERIA.pop("flat")
