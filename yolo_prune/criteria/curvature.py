# SPDX-License-Identifier: AGPL-3.0-or-later
"""Second moments of what layers read, and curvatures of what they put out."""

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
"""Of an image that are looked at, per layer.

A choice: 64 images then give up to 16,000 samples for matrices of some hundred to a few thousand columns. More of them
make the estimate less noisy, and take time and memory in proportion; what lies side by side in one image is alike, so
that more images say more than more positions.
"""


class Curvature:
    """Kronecker factors of the Hessian of the loss by the weights of every layer with one group.

    Both factors are estimated as in Grosse & Martens, ICML 2016 (arXiv:1602.01407), from the gradients of the loss on
    the labels (the empirical Fisher matrix).
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        progress: Progress,
        each: Callable[[nn.Module], None],
    ) -> None:
        """Run the loss backwards on every image.

        Args:
            model: only read.
            calibration: the images.
            progress: wraps the images, to show how far it is.
            each: called with a copy of the model after each image, for its gradients.
        """
        self._moments: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()
        self._shifts: dict[str, Tensor] = {}  # of the order of the mean, so that variances do not drown in squares
        self._images = len(calibration)
        with calibration.differentiable(model) as copy:
            for name, layer in copy.named_modules():
                if layer_samples.readable(layer) and layer_samples.groups(layer) == 1:
                    layer.register_forward_hook(partial(self._forward, name))
            for _ in calibration.backward(copy, progress):
                each(copy)

    def __contains__(self, layer: str) -> bool:
        """True if the loss depends on a layer."""
        return layer in self._gradients

    def inputs(self, layer: str) -> Tensor:
        """`(columns, columns)`, float64: covariance of what a row of the weight is multiplied with."""
        moment = self._moments[layer] / self._counts[layer]
        mean = moment[-1, :-1]  # what is constant, a bias can take over
        return moment[:-1, :-1] - torch.outer(mean, mean)

    def outputs(self, layer: str) -> Tensor:
        """`(outputs, outputs)`, float64: per image, second moment of the gradients, summed over positions."""
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
