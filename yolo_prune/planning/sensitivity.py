# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the loss rises by as one group of channels after the other gets thinner. Measured, and remembered."""

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
"""Of the files that keep losses; files of another version are not read, and the losses are measured anew."""
Gone = dict[str, dict[int, list[int]]]  # {tensor name: {dimension: indices that are to go}}


def curves(
    model: nn.Module,
    levels: Sequence[tuple[Group, list[int]]],
    scores: Mapping[str, Tensor],
    shares: Sequence[float],
    calibration: Calibration,
    progress: Progress,
) -> dict[str, Curve]:
    """Silence the lowest scored channels of each group by itself, and see what that does to the task's loss.

    The sensitivity analysis of "Pruning Filters for Efficient ConvNets" (Li et al., ICLR 2017, arXiv:1608.08710), with
    the loss in place of the accuracy. Each measurement is a pass over all images. If the calibration has a folder for
    it, what was measured is written there after each group, and not measured again for the same model and images.

    Args:
        model: only read.
        levels: groups, each with its allowed numbers of grains, from the present one downward.
        scores: `{set name: (size,)}`: the lowest go first.
        shares: how much of what may go is silenced, as fractions.
        calibration: images and loss.
        progress: wraps the groups, to show how far it is.

    Returns:
        `{group name: ((share of the present channels removed, rise of the loss), ...)}`, ascending in both; a loss that
        falls again counts as the highest before it.

    Raises:
        GradientError: If a loss is not finite.
    """
    memory = _Memory(calibration.memory and calibration.memory / f"sensitivity-{_key(model, calibration)}.json")
    twin = calibration.twin(model)
    whole = memory.recall("whole", lambda: _finite(calibration.mean_loss(twin), "of the whole model"))
    found: dict[str, Curve] = {}
    for group, allowed in progress(levels):
        losses, knots = [], _knots(allowed, shares)
        for level in knots:
            gone = _lowest(group, level, scores)

            def measured(gone: Gone = gone, name: str = group.name) -> float:
                with _silenced(twin, gone):
                    return _finite(calibration.mean_loss(twin), f"without channels of '{name}'")

            losses.append(memory.recall(f"{group.name} {_digest(gone)}", measured) - whole)
        memory.save()
        highest = accumulate(losses, max, initial=0.0)
        next(highest)
        if knots:
            found[group.name] = [(1 - n / group.grain, loss) for n, loss in zip(knots, highest, strict=True)]
    return found


def _knots(levels: Sequence[int], shares: Sequence[float]) -> list[int]:
    """The levels nearest to these shares of what may go, from the present one downward."""
    most = levels[0] - levels[-1]
    nearest = {min(levels[1:], key=lambda n: abs(levels[0] - n - share * most)) for share in shares if most}
    return sorted(nearest, reverse=True)


def _lowest(group: Group, level: int, scores: Mapping[str, Tensor]) -> Gone:
    """What goes if a group is cut down to `level` grains."""
    gone: Gone = {}
    for channels in group.sets:
        first = ascending(scores[channels.name])[: removed(channels, group, level)].tolist()
        for slot in channels.slots:
            gone.setdefault(slot.tensor, {}).setdefault(slot.dim, []).extend(slot.index[i] for i in first)
    return gone


@contextmanager
def _silenced(model: nn.Module, gone: Gone) -> Iterator[None]:
    """Let channels of `model` put out zeros for a while."""
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
            f"The loss {which} is not finite, so that no layer can be judged by it. Take a checkpoint from before the "
            "training diverged, or another allocation."
        )
    return loss


class _Memory:
    """Losses by name, in a JSON file that outlives the process."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.losses = _read(path) if path else {}
        self.new = False

    def recall(self, name: str, measure: Callable[[], float]) -> float:
        """A loss that is known, or is measured now."""
        if name not in self.losses:
            self.losses[name] = measure()
            self.new = True
        return self.losses[name]

    def save(self) -> None:
        """Write down what is new; a disk that does not allow it must not cost what was measured."""
        if self.path and self.new:
            try:
                write_text(self.path, json.dumps({"version": VERSION, "losses": self.losses}, indent=1) + "\n")
            except OSError as e:
                warnings.warn(
                    f"What was measured could not be kept in '{self.path}': {e}", RuntimeWarning, stacklevel=2
                )
                self.path = None
        self.new = False


def _read(path: Path) -> dict[str, float]:
    """Losses in a file; none if there is no such file or it is damaged: they are measured anew then."""
    try:
        data = json.loads(path.read_bytes())
        losses = {str(name): float(loss) for name, loss in data["losses"].items()}
        known = data["version"] == VERSION and all(map(math.isfinite, losses.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return losses if known else {}


def _key(model: nn.Module, calibration: Calibration) -> str:
    """What a loss depends on: weights, images with labels and texts, numbers among the settings (gains), versions."""
    found = hashlib.sha256()
    for name, tensor in (*model.state_dict().items(), *_tensors(calibration)):
        value = tensor.detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    gains = {k: float(v) for k, v in vars(calibration.settings).items() if isinstance(v, int | float)}
    texts = [
        [repr(v) for k, v in sorted(item.items()) if isinstance(v, str | list | tuple)] for item in calibration.items
    ]
    found.update(json.dumps([gains, texts, installed()], sort_keys=True).encode())
    return found.hexdigest()[:16]


def _tensors(calibration: Calibration) -> Iterator[tuple[str, Tensor]]:
    for number, item in enumerate(calibration.items):
        yield from ((f"{number}.{k}", v) for k, v in sorted(item.items()) if isinstance(v, Tensor))


def _digest(gone: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(gone, sort_keys=True).encode()).hexdigest()[:16]
