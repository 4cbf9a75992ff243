# SPDX-License-Identifier: AGPL-3.0-or-later
"""Measures how much the loss rises when single groups of channels are cut, and stores the results in a file."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yolo_prune.cut.copies import silence
from yolo_prune.data.calibration import Calibration, Progress
from yolo_prune.env.files import write_text
from yolo_prune.env.versions import installed
from yolo_prune.errors import GradientError
from yolo_prune.graph.structure import Group
from yolo_prune.planning.select import Curve, ascending, removed

VERSION = 1
"""Version of the files with losses. A file of another version is not used; the losses are measured again."""
Gone = dict[str, dict[int, list[int]]]  # {tensor name: {dimension: indices to silence}}


def curves(
    model: nn.Module,
    levels: Sequence[tuple[Group, list[int]]],
    scores: Mapping[str, Tensor],
    shares: Sequence[float],
    calibration: Calibration,
    progress: Progress,
) -> dict[str, Curve]:
    """For each group, silence its channels with the lowest scores and measure the loss. Other groups stay as they are.

    This is the sensitivity analysis of "Pruning Filters for Efficient ConvNets" (Li et al., ICLR 2017,
    arXiv:1608.08710), with the loss instead of the accuracy. Each measurement is a pass over all images. If the
    calibration has a folder for results, they are written there after each group. They are not measured again for the
    same model and images.

    Args:
        model: the model; it is not changed.
        levels: groups, each with its allowed numbers of grains, from the present number downward.
        scores: `{set name: (size,)}`; channels with the lowest scores are silenced first.
        shares: fractions of the removable channels to silence.
        calibration: images and loss.
        progress: wraps the groups to show a progress bar.

    Returns:
        `{group name: ((removed share of the present channels, rise of the loss), ...)}`, ascending in both. If the
        loss falls from one share to the next, the highest loss so far counts.

    Raises:
        GradientError: If a loss is not finite.
    """
    stored = _StoredLosses(calibration.memory and calibration.memory / f"sensitivity-{_key(model, calibration)}.json")
    twin = calibration.twin(model)
    whole = stored.get_or_measure("whole", lambda: _finite(calibration.mean_loss(twin), "of the whole model"))
    curve_of: dict[str, Curve] = {}
    for group, allowed in progress(levels):
        losses, knots = [], _knots(allowed, shares)
        for level in knots:
            gone = _lowest(group, level, scores)

            def measured(gone: Gone = gone, name: str = group.name) -> float:
                with _silenced(twin, gone):
                    return _finite(calibration.mean_loss(twin), f"without channels of '{name}'")

            losses.append(stored.get_or_measure(f"{group.name} {_digest(gone)}", measured) - whole)
        stored.save()
        highest = accumulate(losses, max, initial=0.0)
        next(highest)
        if knots:
            curve_of[group.name] = [(1 - n / group.grain, loss) for n, loss in zip(knots, highest, strict=True)]
    return curve_of


def _knots(levels: Sequence[int], shares: Sequence[float]) -> list[int]:
    """The levels nearest to these shares of the removable channels, in descending order."""
    most = levels[0] - levels[-1]
    nearest = {min(levels[1:], key=lambda n: abs(levels[0] - n - share * most)) for share in shares if most}
    return sorted(nearest, reverse=True)


def _lowest(group: Group, level: int, scores: Mapping[str, Tensor]) -> Gone:
    """The indices to silence if a group is cut down to `level` grains."""
    gone: Gone = {}
    for channels in group.sets:
        first = ascending(scores[channels.name])[: removed(channels, group, level)].tolist()
        for slot in channels.slots:
            gone.setdefault(slot.tensor, {}).setdefault(slot.dim, []).extend(slot.index[i] for i in first)
    return gone


@contextmanager
def _silenced(model: nn.Module, gone: Gone) -> Iterator[None]:
    """Silence channels of `model` inside this context."""
    state = model.state_dict()
    before = {name: state[name].clone() for name in gone}
    silence(model, gone)
    try:
        yield
    finally:
        for name, tensor in before.items():
            state[name].copy_(tensor)


def _finite(loss: float, which: str) -> float:
    if not math.isfinite(loss):
        raise GradientError(
            f"The loss {which} is not finite, so no layer can be judged by it. Take a checkpoint from before the "
            "training diverged, or choose another allocation."
        )
    return loss


class _StoredLosses:
    """Losses by name, stored in a JSON file for later processes."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.losses = _read(path) if path else {}
        self.new = False

    def get_or_measure(self, name: str, measure: Callable[[], float]) -> float:
        """The stored loss of this name; it is measured now if it is not stored."""
        if name not in self.losses:
            self.losses[name] = measure()
            self.new = True
        return self.losses[name]

    def save(self) -> None:
        """Write new losses to the file. If this fails, warn only: the losses are still in memory."""
        if self.path and self.new:
            try:
                write_text(self.path, json.dumps({"version": VERSION, "losses": self.losses}, indent=1) + "\n")
            except OSError as e:
                warnings.warn(
                    f"The measured losses could not be written to '{self.path}': {e}", RuntimeWarning, stacklevel=2
                )
                self.path = None
        self.new = False


def _read(path: Path) -> dict[str, float]:
    """The losses in a file; empty if the file is missing or damaged, so that they are measured again."""
    try:
        data = json.loads(path.read_bytes())
        losses = {str(name): float(loss) for name, loss in data["losses"].items()}
        known = data["version"] == VERSION and all(map(math.isfinite, losses.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return losses if known else {}


def _key(model: nn.Module, calibration: Calibration) -> str:
    """A hash of everything on which a loss depends: weights, images with labels and texts, loss gains, versions."""
    digest = hashlib.sha256()
    for name, tensor in (*model.state_dict().items(), *_tensors(calibration)):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    gains = {k: float(v) for k, v in vars(calibration.settings).items() if isinstance(v, int | float)}
    texts = [
        [repr(v) for k, v in sorted(item.items()) if isinstance(v, str | list | tuple)] for item in calibration.items
    ]
    digest.update(json.dumps([gains, texts, installed()], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _tensors(calibration: Calibration) -> Iterator[tuple[str, Tensor]]:
    for number, item in enumerate(calibration.items):
        yield from ((f"{number}.{k}", v) for k, v in sorted(item.items()) if isinstance(v, Tensor))


def _digest(gone: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(gone, sort_keys=True).encode()).hexdigest()[:16]
