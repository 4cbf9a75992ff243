# SPDX-License-Identifier: AGPL-3.0-or-later
"""Least-squares reconstruction: layers that read a thinned input put out again what they did before."""

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
from yolo_prune.recover.scope import inside, modes_kept

POSITIONS = 8000
"""Of all images together that a layer is fitted to. A choice: more take memory and time in proportion."""
PER_COLUMN = 3
"""But at least so many positions for each unknown weight of an output.

A choice: with one for each, the fit would follow every one of them and the ridge alone would hold it; from a few on, it
is an average.
"""
RIDGE = 0.01
"""Penalty on the distance to the old weights, as a fraction of the mean variance of what the layer reads.

A choice; the README's results were reached with it, and it was not compared with others. Less lets the weights follow
the few images; more leaves them as they were before the cut, and undoes the refit.
"""
TINY = 1e-12
"""Added to it, so that a layer that reads nothing but zeros can be solved for; far below any real variance."""
LEAST = 0.05
"""Of a batch norm's variance that always stays, as a fraction.

A choice, for few or tiny images: a channel that is constant on them would have none, and be blown up on others. The
bound lets a deviation grow to `LEAST ** -0.5`, 4.5 times what it was, and no further.
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

    Layer after layer in the order of the forward pass, each on what the layers refitted before it put out, so that
    errors do not add up; closed form, with a penalty on the distance to the old weights; grouped and depthwise
    convolutions group by group; transposed ones if their patches do not overlap. Each batch norm gets the statistics of
    what it now reads, so that training starts from what evaluation sees. The idea is that of "Channel Pruning for
    Accelerating Very Deep Neural Networks" (He et al., ICCV 2017, arXiv:1707.06168) and "ThiNet" (Luo et al., ICCV
    2017, arXiv:1707.06342), applied to all layers.

    Args:
        before: the model before the cut; only read.
        after: the same model after the cut; its weights change in place.
        plan: the cut.
        images: `(n, channels, height, width)` on the model's device, as validation shows them; labels are not needed.
        frozen: names of modules that stay as they are, with everything inside them.
        progress: wraps the layers that are fitted, to show how far it is.

    Returns:
        Number of images that were used: fewer than given where memory did not suffice for all.

    Raises:
        RuntimeError: If memory does not even suffice for one image.
    """
    saved = {name: tensor.detach().clone() for name, tensor in after.state_dict().items()}
    while True:
        try:
            _refit(before, after, plan, images, frozen, progress)
            return len(images)
        except (RuntimeError, MemoryError) as e:
            after.load_state_dict(saved)
            if len(images) == 1 or not _out_of_memory(e):
                raise
            del e
        images = images[: len(images) // 2]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _out_of_memory(error: BaseException) -> bool:
    said = str(error).lower()  # PyTorch has a class of error for some devices only
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said


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
            hooks.append(layer.register_forward_pre_hook(partial(_fit, targets.wanted, name, bar)))
        elif isinstance(layer, NORMS) and layer.track_running_stats and not inside(name, frozen):
            hooks.append(layer.register_forward_pre_hook(_restate))
    _run(after, images, hooks)
    next(bar, None)  # lets it close


def _run(model: nn.Module, images: Tensor, hooks: Sequence[RemovableHandle]) -> None:
    """One forward pass in evaluation mode; afterwards the model is without the hooks, and in the mode it was in."""
    try:
        with modes_kept(model):
            model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()


class _Targets:
    """What every layer has to put out, at a sample of positions."""

    def __init__(self, model: nn.Module, plan: Plan, images: Tensor, frozen: Sequence[str]) -> None:
        self.wanted: dict[str, tuple[Tensor, Tensor]] = {}
        self.plan = plan
        self._calls: Counter[str] = Counter()
        hooks = []
        for name, layer in model.named_modules():
            if inside(name, frozen) or ".dfl" in name:
                continue
            if layer_samples.readable(layer):
                hooks.append(layer.register_forward_hook(partial(self._note, name)))
            elif layer_samples.upsamples(layer):
                hooks.append(layer.register_forward_hook(partial(self._note_upsampling, name)))
        _run(model, images, hooks)
        for name, calls in self._calls.items():
            if calls > 1:  # shared by several inputs: no single one to fit to
                self.wanted.pop(name)

    def _note(self, name: str, layer: ReadableLayer, given: tuple[Tensor, ...], output: Tensor) -> None:
        self._calls[name] += 1
        columns = layer.weight[0].numel()
        count = max(POSITIONS, PER_COLUMN * columns)
        where = layer_samples.positions(name, output, layer, max(1, count // len(output)))
        wanted = layer_samples.written(layer, output, where).flatten(0, 1)
        if factors := self.plan.scale.get(f"{name}.weight"):
            factor = [factors.get(i, 1.0) for i in range(len(wanted))]
            wanted = wanted * wanted.new_tensor(factor)[:, None]
        if kept := self.plan.keep.get(f"{name}.weight", {}).get(0):
            wanted = wanted[list(kept)]
        self.wanted[name] = where, wanted

    def _note_upsampling(self, name: str, layer: nn.ConvTranspose2d, given: tuple[Tensor, ...], output: Tensor) -> None:
        self._calls[name] += 1
        if kept := self.plan.keep.get(f"{name}.weight", {}).get(1):
            output = output[:, list(kept)]
        pixels = F.pixel_unshuffle(output, layer.stride[0])
        where = layer_samples.positions(name, pixels, layer, max(1, POSITIONS // len(output)))
        self.wanted[name] = where, layer_samples.written(layer, pixels, where)[0]


def _fit_upsampling(layer: nn.ConvTranspose2d, value: Tensor, where: Tensor, wanted: Tensor) -> None:
    """A linear layer on pixels, with an output for each channel and place in the patch; a channel has one bias."""
    inputs, outputs, *patch = layer.weight.shape
    device = _precise(layer.weight.device)
    read = layer_samples.written(layer, value, where)[0].to(device, torch.float64)
    old = layer.weight.permute(1, 2, 3, 0).reshape(-1, inputs).to(device, torch.float64)
    missing = (wanted.to(device, torch.float64) - old @ read).reshape(outputs, -1, read.shape[1])
    moment = read @ read.T / read.shape[1]
    moment.diagonal().add_(RIDGE * moment.diagonal().mean() + TINY)
    factor = torch.linalg.cholesky(moment)
    if layer.bias is not None:  # what of a constant the pixels cannot put out by themselves
        alone = 1 - torch.cholesky_solve(read.mean(1, keepdim=True), factor).T @ read
        bias = (missing * alone).mean((1, 2)) / alone.mean()
        missing = missing - bias[:, None, None]
        layer.bias.copy_(bias)
    change = torch.cholesky_solve(read @ missing.flatten(0, 1).T / read.shape[1], factor).T
    layer.weight.copy_((old + change).reshape(outputs, *patch, inputs).permute(3, 0, 1, 2))


def _fit(
    targets: dict[str, tuple[Tensor, Tensor]], name: str, bar: Any, layer: nn.Module, given: tuple[Tensor, ...]
) -> None:
    where, wanted = targets.pop(name)
    value = given[0]
    next(bar, None)
    if layer_samples.upsamples(layer):
        return _fit_upsampling(layer, value, where, wanted)
    assert layer_samples.readable(layer)
    weight, offset = solve(
        layer_samples.read(layer, value, where, layer_samples.width(layer, value)), wanted, layer.weight
    )
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(offset)


def solve(read: Tensor, wanted: Tensor, old: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """The weights nearest to a layer's outputs, with a penalty on the distance to the old ones.

    Args:
        read: `(groups, columns, samples)`.
        wanted: `(outputs, samples)`.
        old: weight, `(outputs, ...)`.
        ridge: the penalty, as a fraction of the mean variance of the columns.

    Returns:
        The weight, in the shape of `old`, and the offset `(outputs,)` that goes with it.
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
    weight = weight + torch.cholesky_solve(cross.transpose(1, 2), torch.linalg.cholesky(moment)).transpose(1, 2)
    offset = middle.to(device) - weight @ centre.to(device)
    return weight.reshape(old.shape).to(old), offset.flatten().to(old)


def _precise(device: torch.device) -> torch.device:
    """Where to solve; mps has no double precision."""
    return torch.device("cpu") if device.type == "mps" else device


def _restate(norm: nn.BatchNorm2d, given: tuple[Tensor, ...]) -> None:
    if norm.running_mean is None or norm.running_var is None:
        return
    value = given[0].float()
    floor = LEAST * norm.running_var  # what hardly varies on a few images would be blown up
    norm.running_var.copy_(value.var((0, 2, 3), unbiased=False).maximum(floor))
    norm.running_mean.copy_(value.mean((0, 2, 3)))
