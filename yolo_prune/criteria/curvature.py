# SPDX-License-Identifier: AGPL-3.0-or-later
"""Second moments of the inputs of layers, and curvatures of the loss in their outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from yolo_prune.data import layer_samples
from yolo_prune.data.calibration import Calibration, Progress
from yolo_prune.data.layer_samples import ReadableLayer

POSITIONS = 250
"""Positions per image and layer that are sampled.

This value is a choice: 64 images give up to 16,000 samples, for matrices of some hundred to a few thousand columns.
More samples make the estimate less noisy, but time and memory grow in proportion. Neighbouring positions of an image
are similar, so more images help more than more positions.
"""


class Curvature:
    """Kronecker factors of the Hessian of the loss with respect to the weights of every layer with one group.

    Both factors are estimated as in Grosse & Martens, ICML 2016 (arXiv:1602.01407). The gradients are those of the loss
    for the true labels (the empirical Fisher matrix).
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        progress: Progress,
        each: Callable[[nn.Module], None],
    ) -> None:
        """Compute the gradients of the loss on every image.

        Args:
            model: the model; it is not changed.
            calibration: the images and the loss.
            progress: wraps the images to show a progress bar.
            each: called after each image with a copy of the model that has the gradients of this image.
        """
        self._moments: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()
        self._shifts: dict[str, Tensor] = {}  # estimated means, subtracted against rounding errors of large squares
        self._images = len(calibration)
        with calibration.differentiable(model) as copy:
            for name, layer in copy.named_modules():
                if layer_samples.readable(layer) and layer_samples.groups(layer) == 1:
                    layer.register_forward_hook(partial(self._forward, name))
            for _ in calibration.backward(copy, progress):
                each(copy)

    def __contains__(self, layer: str) -> bool:
        """True if the loss depends on the layer."""
        return layer in self._gradients

    def inputs(self, layer: str) -> Tensor:
        """`(columns, columns)`, float64: covariance of the layer's inputs, in the order of the weight's columns."""
        moment = self._moments[layer] / self._counts[layer]
        mean = moment[-1, :-1]  # subtracted because a bias can replace a constant input
        return moment[:-1, :-1] - torch.outer(mean, mean)

    def outputs(self, layer: str) -> Tensor:
        """`(outputs, outputs)`, float64: second moment of output gradients, summed over positions, mean over images."""
        return self._gradients[layer] / self._images

    def _forward(self, name: str, layer: ReadableLayer, given: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        where = layer_samples.positions(name, output, layer, POSITIONS)
        columns = layer_samples.read(layer, given[0].detach(), where, output.shape[-1])[0]
        columns = columns - self._shifts.setdefault(name, columns.mean(1, keepdim=True))
        columns = torch.cat([columns, columns.new_ones(1, columns.shape[1])])
        self._add(self._moments, name, columns)
        self._counts[name] += columns.shape[1]

        def backward(gradient: Tensor) -> None:
            self._add(self._gradients, name, layer_samples.written(layer, gradient)[0])

        output.register_hook(backward)  # type: ignore[no-untyped-call]

    @staticmethod
    def _add(sums: dict[str, Tensor], name: str, columns: Tensor) -> None:
        product = (columns @ columns.T).double()
        sums[name] = sums[name] + product if name in sums else product
