# SPDX-License-Identifier: AGPL-3.0-or-later
"""A few labelled training images, and the model's own loss on them: what criteria and recovery learn from."""

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
"""Wraps what is gone through, to show how far it is."""
PIXELS = 64 * 640 * 640
"""Most pixels that one forward pass takes; larger images are fewer."""


@dataclass(frozen=True)
class Calibration:
    """Training images as validation would show them to the model: whole, not augmented.

    Attributes:
        load: reads batches of one image each, with labels, as the task's loss takes them, before they are moved to a
            device; called when they are needed first, once.
        prepare: moves a batch to the model's device and makes its image floating point, 0 to 1.
        settings: the run's arguments, which the loss reads its gains from.
        memory: folder for what takes long to measure on them; None: nothing is kept.
    """

    load: Callable[[], Sequence[Batch]]
    prepare: Callable[[Batch], Batch]
    settings: Any
    memory: Path | None = None

    @cached_property
    def items(self) -> Sequence[Batch]:
        """What `load` reads."""
        return self.load()

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.items)

    def first(self, count: int) -> Calibration:
        """The first `count` of these images."""
        return replace(self, load=lambda: self.items[:count])

    def batches(self) -> Iterator[Batch]:
        """One image at a time, ready for the loss."""
        for item in self.items:
            yield self.prepare(dict(item))

    def images(self, count: int) -> Tensor:
        """Images `(n, channels, height, width)` of one size, as many of `count` as fit into memory."""
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
        """A `twin` of which `loss` can be differentiated."""
        twin = self.twin(model)
        twin.requires_grad_(True)
        with torch.enable_grad():
            yield twin

    @torch.no_grad()
    def mean_loss(self, twin: Any) -> float:
        """Mean of the loss of a `twin` over the images; what it draws at random is the same each time."""
        device = next(twin.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            return math.fsum(float(loss_of(twin, batch)) for batch in self.batches()) / len(self)

    def backward(self, twin: Any, progress: Progress) -> Iterator[None]:
        """Run the loss of `differentiable`'s copy backwards, image after image; its gradients are of that one alone."""
        for item in progress(self.items):
            twin.zero_grad(set_to_none=True)
            loss_of(twin, self.prepare(dict(item))).backward()  # type: ignore[no-untyped-call]
            yield


def draw(dataset: Any, collate: Callable[[list[Any]], Batch], count: int, seed: int) -> list[Batch]:
    """Up to `count` images of a dataset, each a batch of its own; same seed, same images.

    Raises:
        RunError: If the dataset is empty.
    """
    if not len(dataset):
        raise RunError("The training set is empty: there is nothing to calibrate with.")
    if getattr(dataset, "rect", False):
        dataset = copy(dataset)
        dataset.rect = False  # images of one size, for one forward pass
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count]
    return [collate([dataset[i]]) for i in order.tolist()]


def loss_of(model: Any, batch: Batch) -> Tensor:
    """The task's own loss, as a number."""
    loss = model.loss(batch)[0]
    return torch.stack([*loss.values()]).sum() if isinstance(loss, dict) else loss.sum()
