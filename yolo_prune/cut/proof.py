# SPDX-License-Identifier: AGPL-3.0-or-later
"""The proof of a cut: a model without the channels computes the same as a model with these channels silenced."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from yolo_prune.cut import surgery
from yolo_prune.cut.copies import lean_copy, silence_removed
from yolo_prune.cut.plan import Plan
from yolo_prune.errors import ProofError
from yolo_prune.graph import probes
from yolo_prune.graph.structure import output_dimension

TOLERANCE = 1e-9  # relative, in float64
OUTPUT = "the model's output "
LAYERS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.Linear)


@dataclass(frozen=True)
class Proof:
    """Result of a successful proof.

    Attributes:
        error: largest difference in any layer, relative to how much the layer's output varies over positions.
        effect: largest difference that silencing makes to the model's outputs, relative in the same way. With an
            effect of 0, the proof would show nothing.
        seconds: duration of the proof.
    """

    error: float
    effect: float
    seconds: float


@torch.no_grad()
def prove(model: nn.Module, plan: Plan, tolerance: float = TOLERANCE) -> Proof:
    """Compare a silenced copy and a pruned copy of `model` on one forward pass in float64. The model is not changed.

    The silenced copy is the reference: weights, bias and batch norm of every removed output channel are 0, and the
    layers that read these channels are unchanged. All branches run, and every layer is compared. So a wrong channel is
    detected in the layer where it is wrong, even if later layers hide it. Heads are compared before decoding.

    Args:
        model: the model before the cut.
        plan: the cut.
        tolerance: largest relative difference allowed.

    Raises:
        ProofError: If the output of a layer differs; the message names the first such layer.
    """
    start = time.perf_counter()
    surgery.check(model, plan)
    plan = replace(plan, masks={})  # zeros need no proof: no width changes
    reference_model = _float64_copy(model)
    image = _image(reference_model)
    before = _final(_outputs(reference_model, image))
    silence_removed(reference_model, plan)
    wanted = _outputs(reference_model, image)
    del reference_model  # one copy at a time
    pruned = _float64_copy(model)
    surgery.apply(pruned, plan)
    failure = None
    try:
        got = _outputs(pruned, image)
    except _StoppedError as e:
        got, failure = e.outputs, f"'{e.where}': {e.__cause__}"
    error, layers = 0.0, dict(model.named_modules())
    for name, reference in wanted.items():
        reference = _as_cut(reference, name, layers.get(name), plan)
        gap = _difference(reference, got[name]) if name in got else math.inf
        if not gap <= tolerance:
            does = f"does not run ({failure})" if failure else "does not compute what silencing its channels computes"
            raise ProofError(
                f"The pruned model {does}. The first layer that differs is '{name}', by {gap:.1e} (allowed "
                f"{tolerance:.0e}). The model is unchanged. If the layer belongs to a block of your own, protect the "
                "block (protect: in the recipe) or correct its rule."
            )
        error = max(error, gap)
    effect = max(_difference(x, y) for x, y in zip(before, _final(wanted), strict=True))
    return Proof(error, effect, time.perf_counter() - start)


def _float64_copy(model: nn.Module) -> nn.Module:
    return probes.batch_norm_off(lean_copy(model).double())


def _as_cut(reference: Tensor, name: str, layer: nn.Module | None, plan: Plan) -> Tensor:
    """The expected output of a layer after the cut: fewer channels (in dimension 1), some multiplied by a factor."""
    weight = f"{name}.weight"
    if factors := plan.scale.get(weight):
        factor = torch.tensor([factors.get(i, 1.0) for i in range(reference.shape[1])], dtype=reference.dtype)
        reference = reference * factor.view(1, -1, *[1] * (reference.ndim - 2))
    keep = plan.keep.get(weight, {}).get(output_dimension(layer))
    if isinstance(layer, nn.modules.conv._ConvTransposeNd) and layer.groups > 1:
        each = layer.weight.shape[1]
        depthwise = layer.groups == layer.in_channels
        groups = plan.keep.get(weight, {}).get(0, range(layer.groups)) if depthwise else range(layer.groups)
        keep = tuple(g * each + i for g in groups for i in keep or range(each))
    return reference[:, list(keep)] if keep else reference


def _image(model: nn.Module) -> Tensor:
    stride = probes.stride(model)
    generator = torch.Generator().manual_seed(0)
    shape = (1, probes.image_channels(model) or 3, 2 * stride, 3 * stride)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


class _StoppedError(Exception):
    """A forward pass failed. The exception has the outputs of all layers that ran before."""

    def __init__(self, outputs: dict[str, Tensor], where: str) -> None:
        super().__init__()
        self.outputs, self.where = outputs, where


class _Leaky(TorchFunctionMode):
    """Replaces activations that are 0 over a range by leaky ones, so that channels in this range are compared too."""

    LEAKY = frozenset({"relu", "relu_", "relu6", "hardtanh", "hardtanh_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.LEAKY and args:
            return nn.functional.leaky_relu(args[0], 0.1)
        return func(*args, **(kwargs or {}))


def _outputs(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Outputs of layers by name, in the order in which the layers run, then the outputs of the model itself.

    Channels are in dimension 1.
    """
    layer_outputs: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, out: Tensor) -> None:
        if name not in layer_outputs:
            layer_outputs[name] = (out.movedim(-1, 1) if isinstance(layer, nn.Linear) else out).clone()

    running: list[str] = []

    def leave(*_: Any) -> None:
        running.pop()

    hooks = [m.register_forward_pre_hook(lambda _, __, name=n: running.append(name)) for n, m in model.named_modules()]
    hooks += [
        layer.register_forward_hook(lambda layer, _, out, name=name: keep(name, layer, out))
        for name, layer in model.named_modules()
        if isinstance(layer, LAYERS)
    ]
    hooks += [m.register_forward_hook(leave) for m in model.modules()]
    finals: dict[str, Tensor] = {}
    default = torch.get_default_dtype()
    try:
        for number, probe in enumerate(probes.probes(model)):
            if number:  # passes with prompts use Python numbers, which overflow in float32
                torch.set_default_dtype(image.dtype)
            with _Leaky():
                out = list(probes.outputs(probe(model, image)))
            finals |= {f"{OUTPUT}{number}.{i}": t for i, t in enumerate(out)}
    except (RuntimeError, ValueError) as e:
        raise _StoppedError(layer_outputs, running[-1] if running else "") from e
    finally:
        torch.set_default_dtype(default)
        for hook in hooks:
            hook.remove()
    return layer_outputs | finals


def _final(outputs: dict[str, Tensor]) -> list[Tensor]:
    return [t for name, t in outputs.items() if name.startswith(OUTPUT)]


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to how much `a` varies over positions.

    It is not relative to `a` itself, because a large constant bias would hide a wrong channel.
    """
    if a.shape != b.shape:
        return math.inf
    varies = torch.zeros((), dtype=a.dtype)
    if a.ndim > 2:
        varies = (a.flatten(2) - a.flatten(2).mean(-1, keepdim=True)).abs().max()
    gap = float((a - b).abs().max() / torch.maximum(varies, 1e-4 * a.abs().max()).clamp_min(1e-300))
    return gap if gap == gap else math.inf
