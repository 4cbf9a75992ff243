# SPDX-License-Identifier: AGPL-3.0-or-later
"""Makes the `Graph` of a model: collects the rules' facts, follows labels through forward passes, forms the sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from yolo_prune.env.image_size import ImageSize, height_width, stored_size
from yolo_prune.errors import RecipeError, UnsupportedModelError
from yolo_prune.graph import foreign, probes, rules
from yolo_prune.graph.labels import REQUESTED, RULE, TRACED, Ids, Labels
from yolo_prune.graph.opaque import Opaque, may_be_opaque
from yolo_prune.graph.sets import Sets, channel_sets, groups_of
from yolo_prune.graph.structure import Attribute, Graph, Rows, output_dimension
from yolo_prune.graph.tracer import Tracer
from yolo_prune.graph.twin import weightless
from yolo_prune.graph.widths import Width

UNSEEN = "does not run in a forward pass"
FROZEN = "frozen in this run"
PROTECT = "recipe: protect"
COMPILED = "compiled by torch.jit; to prune it, use the module from before torch.jit.script"


PLAIN = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)  # torch's classes that are no layers
ULTRALYTICS_OWN = ("i", "f", "np")  # what Ultralytics stores in every layer of a model


class _StoppedError(Exception):
    """A forward pass failed in the module with the name `where`."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where


def trace(
    model: nn.Module,
    protect: Sequence[str] = (),
    frozen: Sequence[str] = (),
    *,
    imgsz: ImageSize = 640,
    heads: str = "dims",
    opaque: Mapping[str, str] | None = None,
) -> Graph:
    """Find the groups of coupled channels of an Ultralytics model, and the cost of its channels.

    The model is not changed. The dependencies are those of "DepGraph: Towards Any Structural Pruning" (Fang et al.,
    CVPR 2023, arXiv:2301.12900). This function finds them in the model's own forward passes: these run on tensors
    without storage that carry a label per channel.

    Args:
        model: the module in `YOLO(...).model`.
        protect: names or globs of modules that must not be pruned. Foreign blocks among them are not traced.
        frozen: names of modules that are not trained in this run; these are not pruned either.
        imgsz: image size in pixels for which MACs are counted.
        heads: "dims" removes channels in the heads of attentions, "heads" removes whole heads.
        opaque: `{module name: reason}` of blocks that are not traced. They keep all their channels and everything that
            they read. A foreign block that cannot be traced becomes opaque as well.

    Raises:
        UnsupportedModelError: If the model is fused, or cannot run without its weights.
        RecipeError: If a protect pattern matches no module.
        PruneError: If the model cannot take images of this size.
    """
    from yolo_prune.graph import blocks  # noqa: F401  registers the rules; imported late because it imports ultralytics

    _refuse_deployed(model)
    imgsz = stored_size(imgsz, multiple=probes.stride(model))
    if probes.image_channels(model) is None:
        raise UnsupportedModelError("The model has no convolution; there is nothing to prune.")
    asked = _protected_modules(model, protect)
    protected_modules, closed = dict.fromkeys(frozen, FROZEN) | asked, _closed(model, asked)
    hidden = {p: COMPILED for p, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)}
    hidden |= opaque or {}
    while True:  # every time, one more block is opaque
        try:
            graph = _graph(model, protected_modules, hidden | closed, imgsz, heads)
            return replace(graph, opaque=hidden)
        except _StoppedError as stopped:
            path, error = foreign.block_around(model, stopped.where), stopped.__cause__
            if closed.pop(path, None):  # it does not run on real numbers: trace it; its tensors are protected anyway
                continue
            if path in hidden or not may_be_opaque(model, path):
                raise UnsupportedModelError(
                    f"{foreign.shown(model, path)} cannot be traced: {foreign.said(error)}. If the forward of a block "
                    "depends on the values of its input, give the forward another path for inputs on the 'meta' device."
                ) from error
            hidden[path] = (
                f"{foreign.shown(model, path)} cannot be traced: {foreign.said(error)}. To prune it, give its forward "
                "a path for inputs on the 'meta' device"
            )


def _graph(
    model: nn.Module, protected_modules: Mapping[str, str], opaque: Mapping[str, str], imgsz: ImageSize, heads: str
) -> Graph:
    """The graph of a model in which some blocks are opaque (`{path: reason}`).

    Raises:
        _StoppedError: If a forward pass raises an error.
    """
    twin = weightless(model, lambda path, module: Opaque(module, opaque[path]) if path in opaque else None)
    stated = rules.gather(twin, heads)
    unseen = {f"{path}.{name}": t for path in opaque for name, t in _labelled(model.get_submodule(path)).items()}
    labels = Labels(_labelled(twin) | {name: torch.empty_like(t, device="meta") for name, t in unseen.items()})
    _mark_numbers(twin, labels)
    tracer = Tracer(labels, stated.trusts, {**stated.reasons, **opaque}, stated.spare)
    known = {rows.tensor for rows, _ in stated.fixed}
    image = torch.empty(1, probes.image_channels(model) or 3, *height_width(imgsz), device="meta")
    deployed = _run(tracer, twin, image, known) | unseen.keys() & dict(model.named_parameters()).keys()
    _add_facts(labels, stated)
    tensors = dict.fromkeys(tensor for tensor, _ in labels.spaces)
    _pin(labels, {t: why for t in tensors if (why := _protection(t, protected_modules))}, REQUESTED)
    _pin(labels, {t: why for t in tensors if (why := _protection(t, opaque))}, RULE)
    _pin(labels, {t: UNSEEN for t in tensors if t not in tracer.ran}, TRACED)
    _pin(labels, {t: f"shared with {other.rpartition('.')[0]}" for t, other in _tied(model)}, RULE)
    labels.settle()
    sets = channel_sets(labels, _outputs(model))
    groups = groups_of(sets, labels)
    work, fixed = _work(tracer, sets)
    spare = tuple(stated.spare)
    return Graph(
        groups=tuple(groups),
        attributes=(*stated.attributes, *_stored_widths(labels)),
        folds=tuple(stated.folds),
        work={t: w for t, w in work.items() if not t.startswith(spare)},
        fixed_work=fixed,
        deployed=frozenset(n for n in deployed if not n.startswith(spare)),
        imgsz=imgsz,
    )


def has_heads(model: nn.Module) -> bool:
    """Whether a model has attentions from which whole heads can be removed."""
    from yolo_prune.graph import blocks  # noqa: F401

    return bool(rules.gather(model, "heads").whole)


def _refuse_deployed(model: nn.Module) -> None:
    """Refuse a model that was changed for inference: these changes cannot be undone.

    Raises:
        UnsupportedModelError: If the model is quantized, parametrized or fused.
    """
    if any(type(m).__name__ == "TensorQuantizer" for m in model.modules()):
        raise UnsupportedModelError(
            "The model is quantized (quantize=8 in training), and a quantized model cannot be pruned. Prune the "
            "checkpoint from before the quantization, then train the pruned checkpoint with quantize=8."
        )
    for path, module in model.named_modules():
        if hasattr(module, "weight_g") or hasattr(module, "parametrizations"):
            raise UnsupportedModelError(
                f"'{path}' computes its weight from other tensors (weight norm or another parametrization). Remove the "
                "parametrization first: call torch.nn.utils.remove_weight_norm or "
                "torch.nn.utils.parametrize.remove_parametrizations."
            )
    if getattr(model, "is_fused", lambda: False)():
        raise UnsupportedModelError(
            "The model is fused for inference, and fusing cannot be undone. Pass the checkpoint that training wrote, "
            "from before fuse()."
        )


def _labelled(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that a cut makes smaller: parameters, and the statistics of batch norms."""
    parameters = dict(module.named_parameters())
    statistics = {n: b for n, b in module.named_buffers() if n.endswith(("running_mean", "running_var"))}
    return {n: t for n, t in module.state_dict(keep_vars=True).items() if n in parameters or n in statistics}


def _tied(model: nn.Module) -> Iterator[tuple[str, str]]:
    """`(tensor, other)`: two names of a parameter that two layers share. A cut would make two parameters of it."""
    seen: dict[int, str] = {}
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            name = f"{path}.{key}" if path else key
            if parameter is not None and (first := seen.setdefault(id(parameter), name)) != name:
                yield first, name


def _run(tracer: Tracer, twin: nn.Module, image: Tensor, known: set[str]) -> set[str]:
    """Run the forward passes that are needed to see every parameter, except those in `known`.

    Returns:
        Names of the parameters that run in deployment.

    Raises:
        _StoppedError: If a forward pass raises an error.
    """
    for module in twin.modules():
        if isinstance(module, Opaque):
            module.tracer = tracer
    try:
        with tracer.running(twin):
            twin.eval()
            tracer.counting = True
            tracer.outputs(probes.plain(twin, image))
            tracer.counting = False
            everything = {n for n, _ in twin.named_parameters()}
            deployed = tracer.ran & everything
            if everything - deployed - known:  # parts that run in training only, or with other inputs only
                probes.batch_norm_off(twin)
                for probe in probes.probes(twin):
                    tracer.outputs(probe(twin, image))
    except Exception as e:  # a block may be the user's code
        raise _StoppedError(tracer.failed) from e
    return deployed


def _mark_numbers(twin: nn.Module, labels: Labels) -> None:
    """Let the numbers that blocks of users store know where they come from, if these blocks have no rule."""
    for path, module in twin.named_modules():
        layer = any(base.__module__.startswith("torch.nn.") and base not in PLAIN for base in type(module).__mro__)
        if layer or not foreign.is_foreign(module) or rules.trusts(module):
            continue
        for name, value in vars(module).items():
            private = name.startswith("_")  # a plan sets no private attribute
            if type(value) is int and value > 1 and name not in ULTRALYTICS_OWN and not private:
                vars(module)[name] = Width.of(value, labels, labels.number(path, name, value))


def _stored_widths(labels: Labels) -> Iterator[Attribute]:
    """The numbers that blocks store and that follow a cut."""
    firsts = np.array([labels.start[s] for s in labels.spaces], dtype=np.int64)
    for number in labels.stored:
        spaces = np.searchsorted(firsts, number.part, side="right") - 1
        breaks = np.flatnonzero((np.diff(number.part) != 1) | (np.diff(spaces) != 0)) + 1
        rows = []
        for ids, space in zip(np.split(number.part, breaks), np.split(spaces, breaks), strict=True):
            (tensor, dim), first = labels.spaces[space[0]], int(ids[0] - firsts[space[0]])
            rows.append(Rows(tensor, dim, first, first + len(ids)))
        yield Attribute(number.module, number.name, tuple(rows) * number.factor)


def _add_facts(labels: Labels, stated: rules.StatedFacts) -> None:
    """Add the facts of the rules to the traced labels."""
    for parts in stated.equal:
        labels.equal([labels.of(*_range(p)) for p in parts])
    for parts in stated.whole:
        ids = np.concatenate([labels.of(*_range(p)) for p in parts])
        labels.unify(torch.from_numpy(ids), torch.from_numpy(ids[:1]).expand(len(ids)))
        labels.wholes.append(ids)
    for rows, reason in stated.fixed:
        labels.pin(labels.of(*_range(rows)), reason, RULE)


def _range(rows: Rows) -> tuple[str, int, int, int]:
    return rows.tensor, rows.dim, rows.start, rows.stop


def _pin(labels: Labels, reasons: Mapping[str, str], rank: int) -> None:
    """Pin whole tensors: `{tensor: why}`."""
    for tensor, dim in labels.spaces:
        if tensor in reasons:
            labels.pin(labels.along(tensor, dim), reasons[tensor], rank)


def _protection(tensor: str, protected_modules: Mapping[str, str]) -> str | None:
    """Why a tensor is protected; None if it is not inside a protected module."""
    module = tensor.rpartition(".")[0]
    return next(
        (why for name, why in protected_modules.items() if module == name or module.startswith(f"{name}.")), None
    )


def _outputs(model: nn.Module) -> dict[tuple[str, int], str]:
    """`{(tensor, dimension): layer}` for the output channels of all layers."""
    producers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear | nn.Embedding):
            producers[f"{name}.weight", output_dimension(layer)] = name
        elif isinstance(layer, nn.MultiheadAttention):
            producers[f"{name}.in_proj_weight", 0] = name
    return producers


def named(model: nn.Module, pattern: str, field: str) -> list[str]:
    """Names of the modules that a pattern (a name or a glob) in a recipe's `field` matches.

    Raises:
        RecipeError: If the pattern matches no module.
    """
    hits = [name for name, _ in model.named_modules() if name and fnmatchcase(name, pattern)]
    if not hits:
        names = [name for name, _ in model.named_modules() if name]
        tops = [name for name in names if name.count(".") == 1] or names
        near = get_close_matches(pattern.partition("[")[0], names, n=1)
        raise RecipeError(
            f"{field}: '{pattern}' matches no module of this model. Its layers are {tops[0]} to {tops[-1]}; "
            + (f"did you mean '{near[0]}'?" if near else "give the name of a layer or of a part of one, or a glob.")
        )
    return hits


def _protected_modules(model: nn.Module, protect: Sequence[str]) -> dict[str, str]:
    """`{module name: reason}` of the modules that the patterns match."""
    reasons: dict[str, str] = {}
    for pattern in protect:
        reasons.update(dict.fromkeys(named(model, pattern, "protect"), f"{PROTECT} '{pattern}'"))
    return reasons


def _closed(model: nn.Module, asked: Mapping[str, str]) -> dict[str, str]:
    """`{module name: reason}` of the protected modules that are not traced.

    Stock blocks are traced: to protect their weights is enough, and none of them can stop the trace.
    """
    return {path: why for path, why in asked.items() if may_be_opaque(model, path)}


def _work(tracer: Tracer, all_sets: Sets) -> tuple[dict[str, float], float]:
    """MACs per element of each tensor, and the MACs that do not depend on any width.

    The MACs of a product of activations (attention) belong to channels and not to a weight. They are counted as MACs
    per element of the one-dimensional tensors of these channels. This is exact if every set has its own such tensors.
    """
    labels = tracer.labels
    work = {t: macs / labels.numel[t] for t, macs in tracer.work.items()}
    label_macs = np.zeros(len(all_sets.sets) + 1)  # the last entry: labels in no set
    for ids, macs in tracer.label_work:
        np.add.at(label_macs, all_sets.set_of[ids], macs)
    fixed = tracer.fixed_work + float(label_macs[-1])
    numbers = np.flatnonzero(label_macs[:-1])
    counted = _charge(work, labels, all_sets, numbers, label_macs, "weight")
    left = numbers[~counted]
    pruned = np.array([n not in all_sets.reasons for n in left], dtype=bool)
    counted = np.zeros(len(left), dtype=bool)  # layers without a batch norm have a bias
    counted[pruned] = _charge(work, labels, all_sets, left[pruned], label_macs, "bias")
    return work, fixed + float(label_macs[left[~counted]].sum())


def _charge(
    work: dict[str, float], labels: Labels, all_sets: Sets, numbers: Ids, label_macs: NDArray[np.float64], kind: str
) -> NDArray[np.bool_]:
    """Add the MACs of sets to the one-dimensional tensors of a kind that have the channels of these sets.

    Args:
        work: `{tensor: MACs per element}`; it is changed.
        labels: the labels of the model.
        all_sets: the sets of the model.
        numbers: the sets with MACs.
        label_macs: MACs of every set.
        kind: "weight" or "bias".

    Returns:
        Which of the sets have such a tensor.
    """
    sets = [all_sets.sets[n] for n in numbers]
    places = {s.tensor for c in sets for s in c.slots if s.tensor.endswith(kind)}
    columns = sorted(t for t in places if labels.numel[t] == labels.size(t, 0))
    slot_counts = np.array([[sum(s.tensor == t for s in c.slots) for t in columns] for c in sets], dtype=np.float64)
    counted = np.asarray(slot_counts.any(1) if slot_counts.size else np.zeros(len(sets)), dtype=bool)
    if counted.any():
        solution = np.linalg.lstsq(slot_counts, label_macs[numbers] / [c.size for c in sets], rcond=None)[0]
        for tensor, macs in zip(columns, solution, strict=True):
            work[tensor] = work.get(tensor, 0.0) + float(macs)
    return counted
