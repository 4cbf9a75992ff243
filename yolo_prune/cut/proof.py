# SPDX-License-Identifier: AGPL-3.0-or-later
"""The proof of a cut: a model without the channels computes the same as a model with these channels silenced."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from yolo_prune.cut import passes, surgery
from yolo_prune.cut.classes import Classes
from yolo_prune.cut.copies import lean_copy, silence_removed
from yolo_prune.cut.passes import Setting, Trail
from yolo_prune.cut.plan import Plan
from yolo_prune.errors import ProofError
from yolo_prune.graph import foreign
from yolo_prune.graph.structure import output_dimension

TOLERANCE = 1e-9  # relative, in float64
SINGLE = 1e-3  # the same in float32


@dataclass(frozen=True)
class Proof:
    """Result of a successful proof.

    Attributes:
        error: largest difference in any layer, relative to how much the layer's output varies over positions.
        effect: largest difference that silencing makes to the model's outputs, relative in the same way. With an
            effect of 0, the proof would show nothing.
        seconds: duration of the proof.
    """

    error: float
    effect: float
    seconds: float


@torch.no_grad()
def prove(model: nn.Module, plan: Plan, tolerance: float = TOLERANCE) -> Proof:
    """Compare a silenced copy and a pruned copy of `model` in training and in evaluation mode. `model` is not changed.

    The silenced copy is the reference: weights, bias and batch norm of every removed output channel are 0, and the
    layers that read these channels are unchanged. All branches run, and every layer is compared. So a wrong channel is
    detected in the layer where it is wrong, even if later layers hide it. In training mode, heads are compared before
    decoding. The copies run in float64 on a small rectangle; a model that cannot do so runs at the image size of the
    plan, or in float32 with a larger tolerance. Random numbers are the same in both copies.

    Removed classes are silenced by a score with which they are never predicted. A plan that removes classes and
    channels is proved in these two steps. Removed text embeddings (YOLO-World, YOLOE) are inputs of the model and need
    no proof.

    Args:
        model: the model before the cut.
        plan: the cut.
        tolerance: largest relative difference allowed in float64.

    Raises:
        ProofError: If the output of a layer differs; the message names the first such layer. Or if the model itself
            does not run.
    """
    surgery.check(model, plan)
    plan = replace(plan, masks={})  # zeros need no proof: no width changes
    if plan.classes is None:
        return _prove(model, plan, tolerance)
    first = replace(plan.class_part, forecast=plan.forecast)
    proofs = [_prove(model, first, tolerance)] if first.keep else []
    if (rest := plan.since(first)).keep:
        after = lean_copy(model)
        surgery.apply(after, first)
        proofs.append(_prove(after, replace(rest, forecast=plan.forecast), tolerance))
    error, effect = (max((getattr(p, key) for p in proofs), default=0.0) for key in ("error", "effect"))
    return Proof(error, effect, sum(p.seconds for p in proofs))


def _prove(model: nn.Module, plan: Plan, tolerance: float) -> Proof:
    start = time.perf_counter()
    setting, reference = _reference(model, plan)
    exact = setting.dtype == torch.float64
    tolerance = tolerance if exact else max(tolerance, SINGLE)
    before = passes.finals(_copy(model, setting), setting)
    pruned = _copy(model, setting)
    surgery.apply(pruned, plan)
    failed: passes.StoppedError | None = None
    try:
        got = passes.run(pruned, setting).outputs
    except passes.StoppedError as e:
        got, failed = e.trail.outputs, e
    error, layers = 0.0, dict(model.named_modules())
    for (mode, name), out in reference.outputs.items():
        if plan.classes and (mode, name) == DETECTIONS and out.ndim > 2:
            continue  # detections are numbered by class: their scores and boxes are compared instead
        out = _as_cut(out, name, layers.get(name), plan)
        gap = math.inf
        if (mine := got.get((mode, name))) is not None:
            if plan.classes and name.startswith(passes.FINAL):
                out = _of_kept_classes(out, mine, plan.classes)
            if mode == passes.EVALUATION and name.startswith(passes.FINAL):
                out, mine = passes.in_order(out), passes.in_order(mine)
            gap = _difference(out, mine, exact)
        if not gap <= tolerance:
            stopped = failed if (mode, name) not in got else None
            raise _refutation(model, reference, (mode, name), (gap, tolerance), stopped)
        error = max(error, gap)
    if failed:
        raise _refutation(model, reference, (passes.EVALUATION, passes.FINAL), (math.inf, tolerance), failed)
    effect = max(_difference(out, reference.outputs[key], exact) for key, out in before.items())
    return Proof(error, effect, time.perf_counter() - start)


DETECTIONS = (passes.EVALUATION, f"{passes.FINAL}0")


def _of_kept_classes(reference: Tensor, mine: Tensor, classes: Classes) -> Tensor:
    """The part of an output of the reference that belongs to the kept classes, if it has a dimension of classes."""
    before, after = len(classes.names), len(classes.kept)
    sizes = zip(reference.shape, mine.shape, strict=False)
    dims = [dim for dim, (size, now) in enumerate(sizes) if (size, now) == (before, after) != (now, size)]
    return reference.index_select(dims[0], torch.tensor(classes.kept)) if len(dims) == 1 else reference


def _copy(model: nn.Module, setting: Setting) -> nn.Module:
    return lean_copy(model).to(setting.dtype)


def _reference(model: nn.Module, plan: Plan) -> tuple[Setting, Trail]:
    """The outputs of the silenced copy, with the first setting with which it runs.

    Raises:
        ProofError: If the model runs with no setting.
    """
    failures: list[tuple[Setting, passes.StoppedError]] = []
    for setting in passes.settings(model, plan):
        silenced = _copy(model, setting)
        silence_removed(silenced, plan)
        try:
            return setting, passes.run(silenced, setting)
        except passes.StoppedError as e:
            failures.append((setting, e))
    setting, stopped = next((f for f in failures if f[0].dtype == torch.float32), failures[0])
    raise ProofError(
        f"The cut cannot be proved, because the model itself does not run on an image of {setting}. "
        f"{foreign.shown(model, stopped.where)} stops with {foreign.said(stopped.__cause__)}. The model is "
        "unchanged. Correct the block, plan with the image size with which the model runs (imgsz=...), or cut without "
        "the proof (proof: false in the recipe)."
    ) from stopped


class RefutedError(ProofError):
    """A proof that found a difference.

    Attributes:
        suspects: blocks of users that may be the cause, the most likely first.
        why: what was found, without the advice.
    """

    def __init__(self, message: str, suspects: Sequence[str], why: str) -> None:
        super().__init__(message)
        self.suspects, self.why = tuple(suspects), why


def _refutation(
    model: nn.Module,
    reference: Trail,
    place: tuple[str, str],
    gap: tuple[float, float],
    stopped: passes.StoppedError | None,
) -> RefutedError:
    """The error for the first layer that differs.

    Args:
        model: the model before the cut.
        reference: what the silenced copy computed.
        place: mode and name of the layer.
        gap: the difference, and the difference that is allowed.
        stopped: the error of the pruned copy, if it did not reach the layer.
    """
    mode, name = place
    does, differs = "does not compute what silencing its channels computes", f"'{name}'"
    if stopped:
        does = f"does not run ({foreign.shown(model, stopped.where)}: {foreign.said(stopped.__cause__)})"
    if mode != passes.TRAINING:
        differs += f" in {mode} mode"
    at = stopped.where if stopped else name
    block = foreign.block_around(model, name) if name in dict(model.named_modules()) else ""
    owner = f" It belongs to the block {foreign.shown(model, block)}." if block not in ("", name) else ""
    return RefutedError(
        f"The pruned model {does}. The first layer that differs is {differs}, by {gap[0]:.1e} (allowed {gap[1]:.0e})."
        f"{owner} The model is unchanged. If the layer belongs to a block of your own, protect the block (protect: in "
        "the recipe) or correct its rule.",
        _suspects(model, stopped.trail.ended if stopped else reference.ended, (mode, name), at),
        foreign.said(stopped.__cause__) if stopped else f"{differs} differs after a cut",
    )


def _suspects(model: nn.Module, ended: Sequence[tuple[str, str]], place: tuple[str, str], at: str) -> list[str]:
    """Blocks of users that ran before a layer, the last first; blocks inside of a block come before it."""
    modules = dict(model.named_modules())
    before = ended[: ended.index(place)] if place in ended else ended
    names = [name for mode, name in reversed(before) if mode == place[0] and foreign.is_foreign(modules[name])]
    if at in modules:
        names.insert(0, foreign.block_around(model, at))
    names = [name for name in dict.fromkeys(names) if foreign.is_foreign(modules[name])]
    order: list[str] = []
    for name in names:
        order += [inner for inner in names if inner.startswith(f"{name}.") and inner not in order]
        order += [name] if name not in order else []
    return order


def _as_cut(reference: Tensor, name: str, layer: nn.Module | None, plan: Plan) -> Tensor:
    """The expected output of a layer after the cut: fewer channels (in dimension 1), some multiplied by a factor."""
    weight = f"{name}.weight"
    if factors := plan.scale.get(weight):
        factor = torch.tensor([factors.get(i, 1.0) for i in range(reference.shape[1])], dtype=reference.dtype)
        reference = reference * factor.view(1, -1, *[1] * (reference.ndim - 2))
    keep = plan.keep.get(weight, {}).get(output_dimension(layer))
    if isinstance(layer, nn.modules.conv._ConvTransposeNd) and layer.groups > 1:
        each = layer.weight.shape[1]
        depthwise = layer.groups == layer.in_channels
        groups = plan.keep.get(weight, {}).get(0, range(layer.groups)) if depthwise else range(layer.groups)
        keep = tuple(g * each + i for g in groups for i in keep or range(each))
    return reference[:, list(keep)] if keep else reference


def _difference(a: Tensor, b: Tensor, exact: bool) -> float:
    """Largest difference, relative to how much `a` varies over positions.

    It is not relative to `a` itself, because a large constant bias would hide a wrong channel. In float32 (not
    `exact`), the rounding of such a bias counts as well.
    """
    if a.shape != b.shape:
        return math.inf
    varies, floor = torch.zeros((), dtype=a.dtype), 1e-4 if exact else 1e-2
    if a.ndim > 2:
        varies = (a.flatten(2) - a.flatten(2).mean(-1, keepdim=True)).abs().max()
    gap = float((a - b).abs().max() / torch.maximum(varies, floor * a.abs().max()).clamp_min(torch.finfo(a.dtype).tiny))
    return gap if gap == gap else math.inf
