# SPDX-License-Identifier: AGPL-3.0-or-later
"""Scores of single weights: how much is lost if a weight becomes zero."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from yolo_prune.data import layer_samples
from yolo_prune.recover.scope import modes_kept, with_less_memory
from yolo_prune.zeros.layers import SparseLayer

DAMPING = 0.01
"""Added to the diagonal of the inputs' second moment before it is inverted, as a fraction of its mean (SparseGPT)."""
TINY = 1e-12
"""Also added: inputs that are all 0 then have an inverse. Far below any real variance."""
FROM_INPUTS = ("wanda", "obs")
"""The scores that look at inputs of layers, and so need images."""


def magnitude(layer: SparseLayer) -> Tensor:
    """|w|: the score of `torch.nn.utils.prune.l1_unstructured`, float64 in the shape of the weight."""
    return _with_merged(layer, lambda weight, _: weight.detach().cpu().double().abs())


def random(layer: SparseLayer, seed: int) -> Tensor:
    """Uniform random scores: a control for lottery tickets. The same seed gives the same scores on every machine."""
    generator = torch.Generator().manual_seed(zlib.crc32(layer.name.encode()) + seed)
    return torch.rand(layer.weight.shape, generator=generator, dtype=torch.float64)


def from_inputs(
    model: nn.Module,
    layers: Sequence[SparseLayer],
    images: Tensor,
    score: str,
    relative: bool,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, Tensor]:
    """Scores that look at the inputs of layers: "wanda" or "obs".

    Both are mean squared errors that a zero adds to the output of the layer, per position. "wanda" leaves the other
    weights as they are: `w^2 * mean(x^2)`, the square of the score of "A Simple and Effective Pruning Approach for
    Large Language Models" (Sun et al., ICLR 2024, arXiv:2306.11695). "obs" lets them take over: `w^2 / [H^-1]`, with
    the second moment `H` of the inputs, as in "SparseGPT" (Frantar & Alistarh, ICML 2023, arXiv:2301.00774).

    Args:
        model: the model in which the layers are; it is not changed.
        layers: the layers to score.
        images: `(n, channels, height, width)` on the model's device.
        score: "wanda" or "obs".
        relative: errors are divided by the variance of the layer's output, so that layers can be compared.
        progress: wraps the layers to show a progress bar.

    Returns:
        `{tensor name: score}`, float64 in the shape of the weight. A layer that did not run is left out.
    """
    costs: dict[str, list[Tensor]] = {}  # one entry per pass through a layer
    bar = iter(progress(range(len(layers))))
    watched = [pair for layer in layers for pair in ((layer.name, layer.layer), layer.merged) if pair]

    def look(images: Tensor) -> None:
        costs.clear()
        hooks = [m.register_forward_hook(partial(_observe, costs, n, score, relative, bar)) for n, m in watched]
        try:
            with modes_kept(model), torch.no_grad():
                model.eval()(images)
        finally:
            for hook in hooks:
                hook.remove()

    with_less_memory(images, look)
    next(bar, None)  # closes the progress bar
    mean = {name: torch.stack(found).mean(0) for name, found in costs.items()}

    def of(weight: Tensor, name: str) -> Tensor:
        return weight.detach().cpu().double().square() * mean[name] if name in mean else torch.zeros_like(weight)

    return {layer.tensor: _with_merged(layer, of) for layer in layers if layer.name in mean}


def _with_merged(layer: SparseLayer, score: Callable[[Tensor, str], Tensor]) -> Tensor:
    """The score of a layer, plus that of the smaller kernel that shares its zeros."""
    scores = score(layer.weight, layer.name)
    if layer.merged:
        name, small = layer.merged
        scores = scores + layer.spread(score(small.weight, name))  # type: ignore[arg-type]
    return scores


def _observe(
    costs: dict[str, list[Tensor]],
    name: str,
    score: str,
    relative: bool,
    bar: Any,
    layer: nn.Module,
    given: tuple[Tensor, ...],
    output: Tensor,
) -> None:
    if name not in costs:
        next(bar, None)
    read, written = _samples(name, layer, given[0], output)
    read, written = (t.cpu() if t.device.type == "mps" else t for t in (read, written))  # mps has no double precision
    cost = unit_cost(read.double(), score)
    if relative:
        cost = cost / written.double().var(-1).sum().clamp(min=TINY)
    costs.setdefault(name, []).append(_in_shape(layer, cost).cpu())


def _samples(name: str, layer: Any, value: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of a layer at a sample of positions: `(groups, columns or outputs, samples)`."""
    if layer_samples.upsamples(layer):
        where = layer_samples.sample(name, value, layer)
        pixels = torch.nn.functional.pixel_unshuffle(output, layer.stride[0])
        return layer_samples.written(layer, value, where), layer_samples.written(layer, pixels, where)
    where = layer_samples.sample(name, output, layer)
    read = layer_samples.read(layer, value, where, layer_samples.width(layer, value))
    return read, layer_samples.written(layer, output, where)


def unit_cost(read: Tensor, score: str) -> Tensor:
    """The error of the output, per position, if a weight of size 1 becomes zero.

    Args:
        read: inputs of the layer, `(groups, columns, samples)`, float64.
        score: "wanda" or "obs".

    Returns:
        `(groups, columns)`.
    """
    if score == "wanda":
        return read.square().mean(2)
    moment = read @ read.transpose(1, 2) / read.shape[2]
    diagonal = moment.diagonal(dim1=1, dim2=2)
    diagonal.add_(DAMPING * diagonal.mean(1, keepdim=True) + TINY)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    return 1 / inverse.diagonal(dim1=1, dim2=2)


def _in_shape(layer: Any, cost: Tensor) -> Tensor:
    """`(groups, columns)` in the shape of the weight, in which all outputs of a group have the same inputs."""
    weight: Tensor = layer.weight
    if layer_samples.upsamples(layer):
        return cost[0].view(-1, *[1] * (weight.ndim - 1)).expand(weight.shape)
    each = len(weight) // len(cost)
    return cost.repeat_interleave(each, 0).reshape(weight.shape)
