# SPDX-License-Identifier: AGPL-3.0-or-later
"""The forward passes of a proof: the same image, randomness and state for every copy, in training and evaluation."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from yolo_prune.cut.plan import Plan
from yolo_prune.env.image_size import height_width
from yolo_prune.graph import foreign, probes

Outputs = dict[tuple[str, str], Tensor]
"""`{(mode, name): output}` of layers, in the order in which they run, and of the model. Channels are in dimension 1."""

TRAINING, EVALUATION = "training", "evaluation"
FINAL = "the model's output "
LAYERS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.Linear)


@dataclass(frozen=True)
class Setting:
    """The image and the precision with which all copies of a proof run.

    Attributes:
        height: of the image, in pixels.
        width: of the image, in pixels.
        dtype: of the image and of the weights.
    """

    height: int
    width: int
    dtype: torch.dtype = torch.float64

    def image(self, model: nn.Module) -> Tensor:
        """A random image for a model: `(1, channels, height, width)`, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        shape = (1, probes.image_channels(model) or 3, self.height, self.width)
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(self.dtype)

    def __str__(self) -> str:
        return f"{self.height} x {self.width} pixels in {str(self.dtype).removeprefix('torch.')}"


def settings(model: nn.Module, plan: Plan) -> Iterator[Setting]:
    """Settings for a proof, the best first. A model that does not run with one may run with the next.

    A small rectangle is quick and tells height from width. Some blocks need the image size for which the plan was
    made; others contain casts to float32.
    """
    stride = probes.stride(model)
    sizes = [(2 * stride, 3 * stride)]
    if plan.forecast:
        sizes.append(height_width(plan.forecast.imgsz))
    for dtype in (torch.float64, torch.float32):
        for height, width in sizes:
            yield Setting(height, width, dtype)


@dataclass
class Trail:
    """What a copy computed.

    Attributes:
        outputs: the outputs of layers and of the model.
        ended: `(mode, name)` of layers and of blocks of users, in the order in which they end.
    """

    outputs: Outputs
    ended: list[tuple[str, str]]


class StoppedError(Exception):
    """A forward pass failed.

    Attributes:
        trail: everything that ran before.
        where: name of the module that raised the error.
    """

    def __init__(self, trail: Trail, where: str) -> None:
        super().__init__()
        self.trail, self.where = trail, where


def run(model: nn.Module, setting: Setting) -> Trail:
    """Run a copy in training mode (all branches, without decoding) and then in evaluation mode.

    A forward pass may change the state of a module, so use every copy only once.

    Raises:
        StoppedError: If a forward pass raises an error.
    """
    outputs: Outputs = {}
    trail, mode, running = Trail(outputs, []), TRAINING, list[str]()
    modules = {n: m for n, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule)}

    def enter(name: str) -> None:
        running.append(name)

    def leave(name: str, module: nn.Module, out: Any) -> None:
        running.pop()
        layer = isinstance(module, LAYERS)
        if layer and (mode, name) not in outputs and isinstance(out, Tensor):
            outputs[mode, name] = _channels_second(out, module).clone()
        if layer or foreign.is_foreign(module):
            trail.ended.append((mode, name))

    hooks = [m.register_forward_pre_hook(lambda _, __, name=n: enter(name)) for n, m in modules.items()]
    hooks += [m.register_forward_hook(lambda m, _, out, name=n: leave(name, m, out)) for n, m in modules.items()]
    try:
        outputs.update(finals(model, setting))
        mode = EVALUATION
        outputs.update(_decoded(model, setting))
    except Exception as e:  # a block may be the user's code
        raise StoppedError(trail, running[-1] if running else "") from e
    finally:
        for hook in hooks:
            hook.remove()
    return trail


def _channels_second(out: Tensor, layer: nn.Module) -> Tensor:
    out = out if out.ndim > 1 else out[None]
    return out.movedim(-1, 1) if isinstance(layer, nn.Linear) else out


def finals(model: nn.Module, setting: Setting) -> Outputs:
    """Outputs of the model itself in training mode."""
    image, found = setting.image(model), dict[tuple[str, str], Tensor]()
    probes.batch_norm_off(model)
    default = torch.get_default_dtype()
    try:
        for number, probe in enumerate(probes.probes(model)):
            if number:  # passes with prompts use Python numbers, which overflow in float32
                torch.set_default_dtype(image.dtype)
            with _alike(model):
                out = list(probes.outputs(probe(model, image)))
            found |= {(TRAINING, f"{FINAL}{number}.{i}"): t for i, t in enumerate(out)}
    finally:
        torch.set_default_dtype(default)
    return found


def _decoded(model: nn.Module, setting: Setting) -> Outputs:
    """Outputs in evaluation mode."""
    model.eval()
    with _alike(model):
        out = list(probes.outputs(probes.plain(model, setting.image(model))))
    return {(EVALUATION, f"{FINAL}{i}"): t for i, t in enumerate(t for t in out if t.is_floating_point())}


def in_order(out: Tensor) -> Tensor:
    """The values of an output, sorted, because a head may put out its detections in any order: `(1, 1, values)`."""
    return out.flatten().nan_to_num().sort().values.view(1, 1, -1)


@contextmanager
def _alike(model: nn.Module) -> Iterator[None]:
    """What runs in here is the same in every copy of a model: seeds, draws, and no activation is dead."""
    numbers, words = random.getstate(), np.random.get_state()
    draws: AbstractContextManager[Any] = nullcontext()
    if any(map(foreign.is_foreign, model.modules())):
        draws = _Draws()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=[]), _Leaky(), draws:
            torch.default_generator.manual_seed(0)  # not torch.manual_seed, which changes CUDA's generators as well
            random.seed(0)
            np.random.seed(0)
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(words)


class _Leaky(TorchFunctionMode):
    """Replaces activations that are 0 over a range by leaky ones, so that channels in this range are compared too."""

    LEAKY = frozenset({"relu", "relu_", "relu6", "hardtanh", "hardtanh_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.LEAKY and args:
            return nn.functional.leaky_relu(args[0], 0.1)
        return func(*args, **(kwargs or {}))


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces random numbers by a constant, because a seed gives another number to a channel in a narrower tensor.

    The constant is a possible draw: 1 for Bernoulli, so that no branch and no channel is dropped, otherwise 0.5.
    """

    CONSTANT = frozenset(
        f"aten::{name}"
        for name in (
            *("rand", "randn", "rand_like", "randn_like", "normal", "normal_", "uniform", "uniform_"),
            *("exponential", "exponential_", "log_normal_", "cauchy_", "geometric_", "normal_functional"),
        )
    )
    BERNOULLI = frozenset({"aten::bernoulli", "aten::bernoulli_"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "aten::native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        out = func(*args, **(kwargs or {}))
        if name in self.CONSTANT:
            out.fill_(0.5)
        elif name in self.BERNOULLI:
            out.fill_(1)
        return out
