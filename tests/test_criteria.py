# SPDX-License-Identifier: AGPL-3.0-or-later
"""Criteria: scores of channels, computed by hand."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

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


def pair_model(dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    model = nn.ModuleDict({"a": nn.Conv2d(2, 3, 1), "bn": nn.BatchNorm2d(3), "b": nn.Conv2d(2, 2, 1, bias=False)})
    values = {
        "a.weight": [[3.0, -4.0], [90.0, 90.0], [0.0, 1.0]],
        "a.bias": [1000.0, 1000.0, 1000.0],
        "bn.weight": [-2.0, 90.0, 2.0],
        "bn.running_var": [1000.0, 1000.0, 1000.0],
        "b.weight": [[1.0, -5.0], [1.0, 1.0]],
    }
    state = model.state_dict()
    for name, value in values.items():
        state[name].copy_(torch.tensor(value).view_as(state[name]))
    return model.to(dtype)


def scores_of(name: str, options: dict[str, object], channels: ChannelSet = PAIR, model: Any = None) -> Tensor:
    criterion: Any = create(name, options)
    criterion.read(model or pair_model())
    return criterion({}, channels)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (1, [3 + 4 + 2 + 5 + 1, 0 + 1 + 2 + 1 + 1]),
        (2, [(9 + 16 + 4 + 25 + 1) ** 0.5, (0 + 1 + 4 + 1 + 1) ** 0.5]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_magnitude_is_the_norm_of_all_weights_of_a_channel(
    norm: int, expected: list[float], dtype: torch.dtype
) -> None:
    """Of its producers, its batch norm and its consumers; of biases and statistics nothing."""
    score = scores_of("magnitude", {"norm": norm}, model=pair_model(dtype))
    assert score.dtype == torch.float64
    assert not score.requires_grad
    assert score.tolist() == pytest.approx(expected)


def test_magnitude_defaults_to_the_euclidean_norm() -> None:
    assert torch.equal(scores_of("magnitude", {}), scores_of("magnitude", {"norm": 2}))


def test_magnitude_of_half_precision_does_not_overflow() -> None:
    model = nn.ModuleDict({"a": nn.Conv2d(4096, 1, 1, bias=False)}).half()
    model["a"].weight.data.fill_(200.0)
    channels = ChannelSet("one", 1, (Slot("a.weight", 0, (0,)),))
    assert scores_of("magnitude", {}, channels, model).item() == 200 * 64


def test_lamp_is_the_share_of_the_squares_that_are_left() -> None:
    assert scores_of("lamp", {}).tolist() == pytest.approx([1, 7 / 62])


def test_bn_scale_is_the_scale_or_the_magnitude() -> None:
    model = pair_model()
    model["bn"].weight.data[0] = -3
    assert scores_of("bn_scale", {}, model=model).tolist() == [3, 2]
    bare = ChannelSet("pair", 2, tuple(s for s in PAIR.slots if not s.tensor.startswith("bn")))
    assert torch.equal(scores_of("bn_scale", {}, bare), scores_of("magnitude", {}, bare))


def test_fpgm_is_the_distance_to_the_others() -> None:
    model = nn.ModuleDict({"a": nn.Conv2d(1, 3, 1)})
    model["a"].weight.data = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1, 1)
    score = scores_of("fpgm", {}, ChannelSet("a", 3, (Slot("a.weight", 0, (0, 1, 2)),)), model)
    wanted = torch.tensor([3.0 + 15, 3 + 12, 15 + 12]).double()  # of the squares 1, 4, 16
    torch.testing.assert_close(score, wanted / wanted.mean())


@pytest.mark.parametrize(
    ("name", "comparable"), [("magnitude", False), ("lamp", True), ("bn_scale", False), ("fpgm", False)]
)
def test_only_lamp_is_compared_over_the_model(name: str, comparable: bool) -> None:
    assert getattr(create(name, {}), "comparable", False) is comparable


def test_random_depends_on_the_seed_and_the_name_alone() -> None:
    other = ChannelSet("other", 2, PAIR.slots)
    tensors = pair_model().state_dict()
    first = create("random", {"seed": 1})({}, PAIR)
    random = torch.get_rng_state()
    assert torch.equal(first, create("random", {"seed": 1})(tensors, PAIR))
    assert torch.equal(random, torch.get_rng_state())
    assert not torch.equal(first, create("random", {"seed": 2})({}, PAIR))
    assert not torch.equal(first, create("random", {"seed": 1})({}, other))
    assert 0 <= first.min() <= first.max() < 1


@pytest.mark.parametrize("name", ["magnitude", "lamp", "bn_scale", "fpgm", "random"])
def test_scores_of_a_model_are_finite_one_per_channel_and_not_negative(name: str) -> None:
    tensors, criterion = models.shared("yolo11-tiny").state_dict(), models.criterion_of("yolo11-tiny", name, {})
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
