# SPDX-License-Identifier: AGPL-3.0-or-later
"""Criteria that use training images: they estimate the effect of a channel on the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from yolo_prune.criteria.base import Tensors, register_criterion
from yolo_prune.criteria.curvature import Curvature
from yolo_prune.criteria.surgeon import Reader, order
from yolo_prune.data.calibration import Calibration, Progress
from yolo_prune.errors import GradientError
from yolo_prune.graph.structure import ChannelSet, Slot
from yolo_prune.recipe.options import fraction, whole_number

IMAGES = 64
"""Default number of training images for a criterion.

This value is a choice: with more images, scores are less noisy but take longer. The table of criteria in docs/ was
measured with this value. No other value was compared.
"""
DAMPING = 0.01
"""Added to the diagonal of a second moment before the inversion, as a fraction of the mean of the diagonal.

This value is a choice, the same as in GPTQ (Frantar et al., ICLR 2023, arXiv:2210.17323). With a smaller value, the
scores depend on directions in which the images hardly vary. With a larger value, the inverse no longer shows which
inputs can replace each other.
"""
TINY = 1e-12
"""Also added to the diagonal: a matrix of inputs that are all 0 can then be inverted. Far below any real variance."""


class Gates:
    """Scores from the derivatives of the loss with respect to one factor ("gate") per channel and image.

    The factor multiplies all weights that read the channel. If no weight reads it, the factor multiplies the weights
    that produce it. So the derivative is the sum of weight times gradient over these weights.
    """

    comparable = True  # scores estimate the loss, so they can be compared between sets

    def __init__(self, images: int, reduce: Callable[[Tensor], Tensor]) -> None:
        """Store the number of images, and the function that reduces `(images, channels)` to `(channels,)`."""
        self.images = whole_number("images", images)
        self._reduce = reduce
        self._products: dict[tuple[str, int], list[Tensor]] = {}

    def observe(self, model: nn.Module, calibration: Calibration, progress: Progress) -> None:
        """Compute the gradients of the loss on every image. The model is not changed."""
        self.begin()
        with calibration.differentiable(model) as copy:
            for _ in calibration.backward(copy, progress):
                self.take(copy)

    def begin(self) -> None:
        """Delete all earlier observations."""
        self._products = {}

    def take(self, model: nn.Module) -> None:
        """Add the gradients of one image."""
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                continue
            product = (parameter.grad * parameter.detach()).double()
            for dim in range(min(product.ndim, 2)):
                others = [d for d in range(product.ndim) if d != dim]
                sums = self._products.setdefault((name, dim), [])
                sums.append((product.sum(others) if others else product).cpu())

    def __call__(self, tensors: Tensors, channels: ChannelSet) -> Tensor:
        """Score every channel; see `Criterion`."""
        seen_slots = [s for s in channels.slots if (s.tensor, s.dim) in self._products]
        readers = [s for s in seen_slots if s.dim == 1]
        products = [torch.stack(self._products[s.tensor, s.dim])[:, list(s.index)] for s in readers or seen_slots]
        if not products:  # the loss does not depend on these channels
            return torch.zeros(channels.size, dtype=torch.float64)
        slopes = torch.stack(products).sum(0)
        check_finite(slopes, channels.name)
        return self._reduce(slopes)


@register_criterion("taylor")
def taylor(images: int = IMAGES) -> Gates:
    """First order: the change of the loss without a channel, from the gradient; mean of absolute values over images.

    "Importance Estimation for Neural Network Pruning" (Molchanov et al., CVPR 2019, arXiv:1906.10771), with a gate
    behind each channel.

    Args:
        images: number of training images.
    """
    return Gates(images, lambda gates: gates.abs().mean(0))


@register_criterion("fisher")
def fisher(images: int = IMAGES) -> Gates:
    """Second order, with the empirical Fisher information as Hessian: half the mean of squared gradients over images.

    "Faster gaze prediction with dense networks and Fisher pruning" (Theis et al. 2018, arXiv:1801.05787).

    Args:
        images: number of training images.
    """
    return Gates(images, lambda gates: gates.square().mean(0) / 2)


@register_criterion("obs")
class Surgeon:
    """Second order, with refit: the rise of the loss without a channel, after the layers that read it are refitted.

    Structured Optimal Brain Surgeon; see `surgeon.order` for the method and its sources. Channels that no weight reads
    (queries and keys of attentions) get the scores of `fisher`.
    """

    comparable = True

    def __init__(self, images: int = IMAGES, damping: float = DAMPING) -> None:
        """Store the options.

        Args:
            images: number of training images.
            damping: added to the diagonal of each layer's input covariance, as a fraction of the diagonal's mean.
        """
        self.images = whole_number("images", images)
        self.damping = fraction("damping", damping)
        self._gates = fisher(images)
        self._curvature: Curvature | None = None

    def observe(self, model: nn.Module, calibration: Calibration, progress: Progress) -> None:
        """Compute the gradients of the loss on every image. The model is not changed."""
        self._gates.begin()
        self._curvature = Curvature(model, calibration, progress, self._gates.take)

    def __call__(self, tensors: Tensors, channels: ChannelSet) -> Tensor:
        """Score every channel; see `Criterion`."""
        if seen := self._curvature:
            readers = [self._reader(seen, tensors[s.tensor], s) for s in channels.slots if self._reads(seen, s)]
            if readers:
                return order(readers, channels.size)
        return self._gates(tensors, channels)

    def _reads(self, seen: Curvature, slot: Slot) -> bool:
        layer, _, key = slot.tensor.rpartition(".")
        return key == "weight" and slot.dim == 1 and layer in seen

    def _reader(self, seen: Curvature, weight: Tensor, slot: Slot) -> Reader:
        layer = slot.tensor.removesuffix(".weight")
        covariance, curvature = seen.inputs(layer), seen.outputs(layer)
        covariance.diagonal().add_(self.damping * covariance.diagonal().mean() + TINY)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
        taps = weight[0, 0].numel()
        index = torch.tensor(slot.index, device=weight.device)
        columns = index[:, None] * taps + torch.arange(taps, device=weight.device)
        return Reader(inverse, _root(curvature, layer) @ weight.detach().double().flatten(1), columns)


def check_finite(gradients: Tensor, layer: str) -> None:
    """Refuse gradients that say nothing.

    Raises:
        GradientError: If a gradient is NaN or infinite.
    """
    if not gradients.isfinite().all():
        raise GradientError(
            f"The gradients of the loss at '{layer}' are not finite, so no channel can be scored by them. Take a "
            "checkpoint from before the training diverged, or a criterion that uses weights only."
        )


def _root(curvature: Tensor, layer: str) -> Tensor:
    """The matrix `root` for which `root^T root` is the curvature of a layer's outputs."""
    check_finite(curvature, layer)
    largest = curvature.diagonal().max().clamp(min=1e-30)
    identity = torch.eye(len(curvature), dtype=curvature.dtype, device=curvature.device)
    for exponent in range(-9, 1):  # rounding errors in single precision can make the matrix indefinite
        root, failed = torch.linalg.cholesky_ex(curvature / largest + 10.0**exponent * identity)
        if not failed:
            break
    result: Tensor = root.T * largest.sqrt()
    return result
