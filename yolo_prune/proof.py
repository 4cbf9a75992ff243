# SPDX-License-Identifier: AGPL-3.0-or-later
"""The proof that a cut is right: removing channels computes what silencing them computes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from yolo_prune import surgery
from yolo_prune.errors import ProofError
from yolo_prune.plans import Plan

TOLERANCE = 1e-8  # relative, in float64


@dataclass(frozen=True)
class Proof:
    """Outcome of a proof that holds.

    Attributes:
        error: largest difference between the outputs, relative to how much an output varies over positions.
        effect: largest difference between silenced and original outputs on the same scale; 0 would be vacuous.
        seconds: time it took.
    """

    error: float
    effect: float
    seconds: float


@torch.no_grad()
def prove(model: nn.Module, plan: Plan, tolerance: float = TOLERANCE) -> Proof:
    """Compare masked reference and pruned copy of `model` on one forward pass in float64. The model is only read.

    The reference is the model with every removed output channel silenced (weights, bias and batch norm 0), consumers
    untouched. All branches run, and raw outputs are compared, before any decoding.

    Args:
        model: the model before the cut.
        plan: the cut.
        tolerance: largest relative difference allowed.

    Raises:
        ProofError: Names the first layer whose output differs.
    """
    start = time.perf_counter()
    original = _float64_copy(model)
    pruned = deepcopy(original)
    surgery.apply(pruned, plan)
    reference = deepcopy(original)
    _silence(reference, plan)
    image = _image(original)
    wanted, before = _outputs(reference, image), _outputs(original, image)
    try:
        got = _outputs(pruned, image)
    except RuntimeError as e:
        raise ProofError(
            f"The pruned model does not run: {e}. The first layer that differs is "
            f"{_first_difference(reference, pruned, plan, image, tolerance)}. The model is unchanged."
        ) from e
    error, effect = _difference(wanted, got), _difference(before, wanted)
    if not error <= tolerance:
        raise ProofError(
            "The pruned model does not compute what silencing the same channels computes: outputs differ by "
            f"{error:.1e} (allowed {tolerance:.0e}). The first layer that differs is "
            f"{_first_difference(reference, pruned, plan, image, tolerance)}. The model is unchanged."
        )
    return Proof(error, effect, time.perf_counter() - start)


def lean_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU without training-only state."""
    memo = {id(model.criterion): None} if getattr(model, "criterion", None) is not None else {}
    return deepcopy(model, memo).cpu()


def _float64_copy(model: nn.Module) -> nn.Module:
    copy = lean_copy(model).double().train()  # in training mode all branches run and nothing is decoded
    for module in copy.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout):
            module.eval()
    return copy


def _silence(model: nn.Module, plan: Plan) -> None:
    state = model.state_dict()
    for name, dims in plan.keep.items():
        if 0 in dims and not name.endswith(("running_mean", "running_var")):
            removed = torch.ones(state[name].shape[0], dtype=torch.bool)
            removed[list(dims[0])] = False
            state[name][removed] = 0


def _image(model: nn.Module) -> Tensor:
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    stride = int(max(getattr(model, "stride", torch.tensor([32]))))
    generator = torch.Generator().manual_seed(0)
    shape = (2, first.in_channels, 2 * stride, 3 * stride)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _outputs(model: nn.Module, image: Tensor) -> list[Tensor]:
    return list(_tensors(model(image)))


def _tensors(out: Any) -> Iterator[Tensor]:
    """Outputs in a fixed order; feature maps that ride along are not outputs."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, dict):
        for key in sorted(out):
            if key != "feats":
                yield from _tensors(out[key])
    elif isinstance(out, list | tuple):
        for item in out:
            yield from _tensors(item)


def _difference(a: list[Tensor], b: list[Tensor]) -> float:
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        # Relative to how much a channel varies over positions: a large constant bias must not hide a wrong channel.
        varies = (x - x.flatten(2).mean(-1).reshape(*x.shape[:2], *[1] * (x.ndim - 2))).abs().max()
        gap = float((x - y).abs().max() / varies.clamp_min(1e-300))
        worst = max(worst, gap if gap == gap else float("inf"))
    return worst


def _first_difference(reference: nn.Module, pruned: nn.Module, plan: Plan, image: Tensor, tolerance: float) -> str:
    wanted, got = _layer_outputs(reference, image), _layer_outputs(pruned, image)
    for name, x in wanted.items():
        keep = plan.keep.get(f"{name}.weight", {}).get(0)
        x = x[:, list(keep)] if keep else x
        if name not in got or _difference([x], [got[name]]) > tolerance:
            return f"'{name}'"
    return "behind the last layer"


def _layer_outputs(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Outputs of convolutions and batch norms in the order they run; ends where the model fails."""
    found: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, out, name=name: found.setdefault(name, out.detach().clone()))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)
    ]
    try:
        model(image)
    except RuntimeError:
        return found  # where it stopped is the answer
    finally:
        for hook in hooks:
            hook.remove()
    return found
