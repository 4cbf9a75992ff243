# SPDX-License-Identifier: AGPL-3.0-or-later
"""Refit by least squares: the weights of cut layers are fitted to the outputs from before the cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from yolo_prune.cut.plan import Plan
from yolo_prune.data import layer_samples
from yolo_prune.data.layer_samples import ReadableLayer
from yolo_prune.recover.scope import inside, modes_kept, with_less_memory

RIDGE = 0.01
"""Penalty on the distance to the old weights, as a fraction of the mean variance of the layer's inputs.

This value is a choice; it was not compared with others. The results in docs/ were measured with it. With a smaller
value, the weights fit the few images too closely. With a larger value, the weights stay as they were before the cut,
and the refit has no effect.
"""
TINY = 1e-12
"""Added to the penalty, so that the equations can be solved if all inputs are 0; far below any real variance."""
LEAST = 0.05
"""Minimum of a batch norm's new variance, as a fraction of its old variance.

This value is a choice, for few or tiny images. A channel that is constant on these images would get the variance 0, and
its outputs on other images would be huge. With this minimum, outputs grow at most by `LEAST ** -0.5` = 4.5 times.
"""
NORMS = (nn.BatchNorm2d,)


@torch.no_grad()
def refit(
    before: nn.Module,
    after: nn.Module,
    plan: Plan,
    images: Tensor,
    frozen: Sequence[str] = (),
    progress: Callable[[Any], Any] = iter,
) -> int:
    """Fit every convolution and linear layer of a cut model to the outputs of the model before the cut.

    Layers are fitted in the order of the forward pass. The inputs of a layer are the outputs of the layers that are
    already refitted, so errors do not add up. The solution is a closed form, with a penalty on the distance to the old
    weights. Grouped and depthwise convolutions are fitted group by group. Transposed convolutions are fitted if their
    patches do not overlap. Each batch norm gets the statistics of its new inputs, so training starts from the model
    that evaluation uses. The idea comes from "Channel Pruning for Accelerating Very Deep Neural Networks" (He et al.,
    ICCV 2017, arXiv:1707.06168) and "ThiNet" (Luo et al., ICCV 2017, arXiv:1707.06342); here it is applied to all
    layers.

    Args:
        before: the model before the cut; it is not changed.
        after: the same model after the cut; its weights are changed in place.
        plan: the plan of the cut.
        images: `(n, channels, height, width)` on the model's device, as in validation. Labels are not needed.
        frozen: names of modules that are not changed, including all modules inside them.
        progress: wraps the fitted layers to show a progress bar.

    Returns:
        Number of images used. It is smaller than `n` if the memory is too small for all images.

    Raises:
        RuntimeError: If the memory is too small even for one image.
    """
    saved = {name: tensor.detach().clone() for name, tensor in after.state_dict().items()}
    return with_less_memory(
        images,
        lambda some: _refit(before, after, plan, some, frozen, progress),
        lambda: after.load_state_dict(saved),
    )


def _refit(
    before: nn.Module,
    after: nn.Module,
    plan: Plan,
    images: Tensor,
    frozen: Sequence[str],
    progress: Callable[[Any], Any],
) -> None:
    targets = _Targets(before, plan, images, frozen)
    bar = iter(progress(range(len(targets.wanted))))
    hooks = []
    for name, layer in after.named_modules():
        if name in targets.wanted:
            mask = plan.masks.get(f"{name}.weight")
            kept = mask.kept.to(images.device) if mask else None
            hooks.append(layer.register_forward_pre_hook(partial(_fit, targets.wanted, name, bar, kept)))
        elif isinstance(layer, NORMS) and layer.track_running_stats and not inside(name, frozen):
            hooks.append(layer.register_forward_pre_hook(_update_statistics))
    _run(after, images, hooks)
    next(bar, None)  # closes the progress bar


def _run(model: nn.Module, images: Tensor, hooks: Sequence[RemovableHandle]) -> None:
    """Run one forward pass in evaluation mode, then remove the hooks and restore the mode of the model."""
    try:
        with modes_kept(model):
            model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()


class _Targets:
    """The expected outputs of every layer, at a sample of positions."""

    def __init__(self, model: nn.Module, plan: Plan, images: Tensor, frozen: Sequence[str]) -> None:
        self.wanted: dict[str, tuple[Tensor, Tensor]] = {}
        self.plan = plan
        self._calls: Counter[str] = Counter()
        hooks = []
        for name, layer in model.named_modules():
            if inside(name, frozen) or ".dfl" in name:
                continue
            if layer_samples.readable(layer):
                hooks.append(layer.register_forward_hook(partial(self._store, name)))
            elif layer_samples.upsamples(layer):
                hooks.append(layer.register_forward_hook(partial(self._store_upsampling, name)))
        _run(model, images, hooks)
        for name, calls in self._calls.items():
            if calls > 1:  # runs on several inputs, so there is no single output to fit to
                self.wanted.pop(name)

    def _store(self, name: str, layer: ReadableLayer, given: tuple[Tensor, ...], output: Tensor) -> None:
        self._calls[name] += 1
        where = layer_samples.sample(name, output, layer)
        wanted = layer_samples.written(layer, output, where).flatten(0, 1)
        if factors := self.plan.scale.get(f"{name}.weight"):
            factor = [factors.get(i, 1.0) for i in range(len(wanted))]
            wanted = wanted * wanted.new_tensor(factor)[:, None]
        if kept := self.plan.keep.get(f"{name}.weight", {}).get(0):
            wanted = wanted[list(kept)]
        self.wanted[name] = where, wanted

    def _store_upsampling(
        self, name: str, layer: nn.ConvTranspose2d, given: tuple[Tensor, ...], output: Tensor
    ) -> None:
        self._calls[name] += 1
        if kept := self.plan.keep.get(f"{name}.weight", {}).get(1):
            output = output[:, list(kept)]
        pixels = F.pixel_unshuffle(output, layer.stride[0])
        where = layer_samples.sample(name, pixels, layer)
        self.wanted[name] = where, layer_samples.written(layer, pixels, where)[0]


def _fit_upsampling(
    layer: nn.ConvTranspose2d, value: Tensor, where: Tensor, wanted: Tensor, kept: Tensor | None
) -> None:
    """Fit a transposed convolution like a linear layer on pixels.

    It has one output per channel and place in the patch, and one bias per channel.
    """
    inputs, outputs, *patch = layer.weight.shape
    device = _precise(layer.weight.device)
    read = layer_samples.written(layer, value, where)[0].to(device, torch.float64)
    old = layer.weight.permute(1, 2, 3, 0).reshape(-1, inputs).to(device, torch.float64)
    missing = (wanted.to(device, torch.float64) - old @ read).reshape(outputs, -1, read.shape[1])
    moment = read @ read.T / read.shape[1]
    moment.diagonal().add_(RIDGE * moment.diagonal().mean() + TINY)
    factor = torch.linalg.cholesky(moment)
    if layer.bias is not None:  # the part of a constant output that the weights cannot produce
        alone = 1 - torch.cholesky_solve(read.mean(1, keepdim=True), factor).T @ read
        bias = (missing * alone).mean((1, 2)) / alone.mean()
        missing = missing - bias[:, None, None]
        layer.bias.copy_(bias)
    cross = missing.flatten(0, 1) @ read.T / read.shape[1]
    if kept is None:
        change = torch.cholesky_solve(cross.T, factor).T
    else:
        change = solve_masked(moment, cross, kept.permute(1, 2, 3, 0).reshape(-1, inputs))
    layer.weight.copy_((old + change).reshape(outputs, *patch, inputs).permute(3, 0, 1, 2))


def _fit(
    targets: dict[str, tuple[Tensor, Tensor]],
    name: str,
    bar: Any,
    kept: Tensor | None,
    layer: nn.Module,
    given: tuple[Tensor, ...],
) -> None:
    where, wanted = targets.pop(name)
    value = given[0]
    next(bar, None)
    if layer_samples.upsamples(layer):
        return _fit_upsampling(layer, value, where, wanted, kept)
    assert layer_samples.readable(layer)
    weight, offset = solve(
        layer_samples.read(layer, value, where, layer_samples.width(layer, value)), wanted, layer.weight, kept=kept
    )
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(offset)


def solve(
    read: Tensor, wanted: Tensor, old: Tensor, ridge: float = RIDGE, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Solve for the weights that best produce the wanted outputs, with a penalty on the distance to the old weights.

    Args:
        read: inputs of the layer, `(groups, columns, samples)`.
        wanted: outputs to produce, `(outputs, samples)`.
        old: old weight, `(outputs, ...)`.
        ridge: the penalty, as a fraction of the mean variance of the columns.
        kept: the weights that may change, as bools in the shape of `old`; all others are 0 in `old` and in the result.
            None: all weights.

    Returns:
        The new weight in the shape of `old`, and its bias `(outputs,)`.
    """
    device = _precise(old.device)
    groups, columns, samples = read.shape
    wanted = wanted.reshape(groups, -1, samples)
    weight = old.to(device, torch.float64).reshape(groups, -1, columns)
    centre, middle = read.double().mean(2, keepdim=True), wanted.double().mean(2, keepdim=True)
    read, missing = read - centre.float(), wanted - middle.float()
    missing = missing - old.float().reshape(groups, -1, columns) @ read
    moment = (read @ read.transpose(1, 2)).to(device, torch.float64) / samples
    cross = (missing @ read.transpose(1, 2)).to(device, torch.float64) / samples
    penalty = ridge * moment.diagonal(dim1=1, dim2=2).mean(1) + TINY
    moment.diagonal(dim1=1, dim2=2).add_(penalty[:, None])
    if kept is None:
        weight = weight + torch.cholesky_solve(cross.transpose(1, 2), torch.linalg.cholesky(moment)).transpose(1, 2)
    else:
        masks = kept.to(device).reshape(weight.shape)
        weight = weight + torch.stack([solve_masked(*part) for part in zip(moment, cross, masks, strict=True)])
    offset = middle.to(device) - weight @ centre.to(device)
    return weight.reshape(old.shape).to(old), offset.flatten().to(old)


STEPS = 300
"""Largest number of steps of `solve_masked`. On the layers of the bundled models, it needs 20 to 150."""
ACCURACY = 1e-6
"""Residual at which `solve_masked` ends, as a fraction of the right-hand side."""


def solve_masked(moment: Tensor, cross: Tensor, kept: Tensor) -> Tensor:
    """Solve `x @ moment = cross` for each row on its own kept entries; the other entries of `x` are 0.

    Each row has other kept entries, so each would need a factorization of its own. Conjugate gradients with the
    diagonal as preconditioner solve all rows at once, and need only products with the whole matrix.

    Args:
        moment: symmetric and positive definite, `(columns, columns)`.
        cross: `(rows, columns)`.
        kept: `(rows, columns)`, bools.

    Returns:
        `(rows, columns)`.
    """
    kept = kept.to(cross)
    scale = kept / moment.diagonal()
    solution, residual = torch.zeros_like(cross), cross * kept
    direction = step = scale * residual
    size = (residual * step).sum(1, keepdim=True)
    enough = ACCURACY**2 * size
    for _ in range(STEPS):
        open_rows = (size > enough).to(cross)
        if not open_rows.any():
            break
        product = (direction @ moment) * kept
        length = open_rows * size / (direction * product).sum(1, keepdim=True).clamp(min=TINY**2)
        solution = solution + length * direction
        residual = residual - length * product
        step = scale * residual
        size, previous = (residual * step).sum(1, keepdim=True), size
        direction = step + size / previous.clamp(min=TINY**2) * direction
    return solution


def _precise(device: torch.device) -> torch.device:
    """The device on which to solve in double precision, which mps does not have."""
    return torch.device("cpu") if device.type == "mps" else device


def _update_statistics(norm: nn.BatchNorm2d, given: tuple[Tensor, ...]) -> None:
    if norm.running_mean is None or norm.running_var is None:
        return
    value = given[0].float()
    floor = LEAST * norm.running_var  # see LEAST
    norm.running_var.copy_(value.var((0, 2, 3), unbiased=False).maximum(floor))
    norm.running_mean.copy_(value.mean((0, 2, 3)))
