# SPDX-License-Identifier: AGPL-3.0-or-later
"""A few labelled training images, and the loss of the model on them: the data for criteria and recovery."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yolo_prune.cut.copies import bare_copy
from yolo_prune.errors import RunError

Batch = dict[str, Any]
Progress = Callable[[Iterable[Any]], Iterable[Any]]
"""Wraps an iterable to show the progress."""
PIXELS = 64 * 640 * 640
"""Largest number of pixels in one forward pass. If images are larger, fewer of them are used."""


@dataclass(frozen=True)
class Calibration:
    """Training images, prepared as for validation: complete images without augmentation.

    Attributes:
        load: reads batches of one image each, with the labels that the loss needs, not yet moved to a device. It is
            called once, when the batches are needed for the first time.
        prepare: moves a batch to the device of the model and makes its image floating point, 0 to 1.
        settings: the arguments of the run; the loss reads its gains from them.
        memory: folder for results on these images that take long to measure; None: they are not stored.
    """

    load: Callable[[], Sequence[Batch]]
    prepare: Callable[[Batch], Batch]
    settings: Any
    memory: Path | None = None

    @cached_property
    def items(self) -> Sequence[Batch]:
        """The batches that `load` returns."""
        return self.load()

    def __len__(self) -> int:
        """Number of images."""
        return len(self.items)

    def first(self, count: int) -> Calibration:
        """The first `count` of these images."""
        return replace(self, load=lambda: self.items[:count])

    def batches(self) -> Iterator[Batch]:
        """The batches, one image each, prepared for the loss."""
        for item in self.items:
            yield self.prepare(dict(item))

    def images(self, count: int) -> Tensor:
        """At most `count` images of one size, `(n, channels, height, width)`; fewer if they exceed `PIXELS`."""
        sizes = [tuple(item["img"].shape[-2:]) for item in self.items]
        common = max(set(sizes), key=sizes.count)
        count = min(count, max(1, PIXELS // (common[0] * common[1])))
        alike = [item for item, size in zip(self.items, sizes, strict=True) if size == common][:count]
        return torch.cat([self.prepare(dict(item))["img"] for item in alike])

    def twin(self, model: nn.Module) -> Any:
        """A copy of `model` in evaluation mode, with the loss of this run."""
        twin: Any = bare_copy(model).eval()
        twin.args, twin.criterion = self.settings, None
        return twin

    @contextmanager
    def differentiable(self, model: nn.Module) -> Iterator[Any]:
        """A `twin` whose loss can be differentiated."""
        twin = self.twin(model)
        twin.requires_grad_(True)
        with torch.enable_grad():
            yield twin

    @torch.no_grad()
    def mean_loss(self, twin: Any) -> float:
        """Mean loss of a `twin` over the images. Its random numbers are the same in each call."""
        device = next(twin.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            return math.fsum(float(loss_of(twin, batch)) for batch in self.batches()) / len(self)

    def forward(self, twin: Any, progress: Progress) -> None:
        """Compute the loss of a `twin` for one image after the other."""
        for item in progress(self.items):
            loss_of(twin, self.prepare(dict(item)))

    def backward(self, twin: Any, progress: Progress) -> Iterator[None]:
        """Compute the gradients of a `differentiable` copy for one image after the other.

        Yields after each image. The gradients are those of this image only.
        """
        for item in progress(self.items):
            twin.zero_grad(set_to_none=True)
            loss_of(twin, self.prepare(dict(item))).backward()  # type: ignore[no-untyped-call]
            yield


def draw(dataset: Any, collate: Callable[[list[Any]], Batch], count: int, seed: int) -> list[Batch]:
    """Up to `count` images of a dataset, as batches of one image. The same seed gives the same images.

    Raises:
        RunError: If the dataset is empty.
    """
    if not len(dataset):
        raise RunError("The training set is empty, and pruning needs training images. Check data=.")
    if getattr(dataset, "rect", False):
        dataset = copy(dataset)
        dataset.rect = False  # images of one size, for one forward pass
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count]
    return [collate([dataset[i]]) for i in order.tolist()]


def loss_of(model: Any, batch: Batch) -> Tensor:
    """The loss of the task, as one number."""
    loss = model.loss(batch)[0]
    return torch.stack([*loss.values()]).sum() if isinstance(loss, dict) else loss.sum()
