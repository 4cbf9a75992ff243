# SPDX-License-Identifier: AGPL-3.0-or-later
"""From a model to its `Graph`: gather the rules' facts, follow labels through forward passes, sort out the sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor, nn

from yolo_prune.errors import PruneError, RecipeError, UnsupportedModelError
from yolo_prune.graph import probes, rules
from yolo_prune.graph.labels import ASKED, FOUND, RULE, Labels
from yolo_prune.graph.sets import Sets, channel_sets, groups_of
from yolo_prune.graph.structure import Graph, Rows, output_dimension
from yolo_prune.graph.tracer import Tracer
from yolo_prune.graph.twin import weightless

UNSEEN = "does not run in a forward pass"


def trace(
    model: nn.Module,
    protect: Sequence[str] = (),
    frozen: Sequence[str] = (),
    *,
    imgsz: int = 640,
    heads: str = "dims",
) -> Graph:
    """Find the groups of coupled channels of an Ultralytics model, and what its channels cost. It is only read.

    The dependencies are those of "DepGraph: Towards Any Structural Pruning" (Fang et al., CVPR 2023, arXiv:2301.12900);
    they are read off the model's own forward passes, on tensors without storage that carry a label per channel.

    Args:
        model: what `YOLO(...).model` holds.
        protect: names or globs of modules that must not be touched.
        frozen: names of modules that are not trained in this run; they are not touched either.
        imgsz: image height and width in pixels at which work is counted.
        heads: "dims" thins the heads of attentions, "heads" removes whole heads.

    Raises:
        UnsupportedModelError: If the model is fused, or cannot be run without its weights.
        RecipeError: If a protect pattern matches no module.
        PruneError: If the model cannot take images of that size.
    """
    from yolo_prune.graph import blocks  # noqa: F401  registers the rules; here, as it imports ultralytics

    _refuse_deployed(model)
    stride = probes.stride(model)
    if isinstance(imgsz, bool) or not isinstance(imgsz, int) or imgsz < 1 or imgsz % stride:
        raise PruneError(f"imgsz: must be a multiple of {stride}, got {imgsz}.")
    channels = probes.image_channels(model)
    if channels is None:
        raise UnsupportedModelError("The model has no convolution; there is nothing to prune.")
    guarded = dict.fromkeys(frozen, "frozen in this run") | _match(model, protect)
    twin = weightless(model)
    found = rules.gather(twin, heads)
    labels = Labels(_labelled(twin))
    tracer = Tracer(labels, rules.trusts, found.reasons, found.spare)
    settled = {rows.tensor for rows, _ in found.fixed}
    deployed = _run(tracer, twin, torch.empty(1, channels, imgsz, imgsz, device="meta"), settled)
    _state(labels, found)
    tensors = dict.fromkeys(tensor for tensor, _ in labels.spaces)
    _pin(labels, {t: why for t in tensors if (why := _guard(t, guarded))}, ASKED)
    _pin(labels, {t: UNSEEN for t in tensors if t not in tracer.ran}, FOUND)
    _pin(labels, {t: f"shared with {other.rpartition('.')[0]}" for t, other in _tied(twin)}, RULE)
    sets = channel_sets(labels, _outputs(twin))
    groups = groups_of(sets, labels)
    work, fixed = _work(tracer, sets)
    spare = tuple(found.spare)
    return Graph(
        groups=tuple(groups),
        attributes=tuple(found.attributes),
        folds=tuple(found.folds),
        work={t: w for t, w in work.items() if not t.startswith(spare)},
        fixed_work=fixed,
        deployed=frozenset(n for n in deployed if not n.startswith(spare)),
        imgsz=imgsz,
    )


def has_heads(model: nn.Module) -> bool:
    """Whether a model has attentions whose heads can go whole."""
    from yolo_prune.graph import blocks  # noqa: F401

    return bool(rules.gather(model, "heads").whole)


def _refuse_deployed(model: nn.Module) -> None:
    """A model that was changed for inference is the end of the road."""
    if any(type(m).__name__ == "TensorQuantizer" for m in model.modules()):
        raise UnsupportedModelError(
            "The model is quantized (quantize=8 in training), and scales belong to widths. Prune the checkpoint it was "
            "quantized from, then train the pruned one with quantize=8."
        )
    for path, module in model.named_modules():
        if hasattr(module, "weight_g") or hasattr(module, "parametrizations"):
            raise UnsupportedModelError(
                f"'{path}' computes its weight from other tensors (weight norm or another parametrization). Remove "
                "that first: torch.nn.utils.remove_weight_norm, or torch.nn.utils.parametrize.remove_parametrizations."
            )
    if getattr(model, "is_fused", lambda: False)():
        raise UnsupportedModelError(
            "The model is fused for inference, which cannot be undone. Pass the checkpoint that training wrote, as it "
            "was before fuse()."
        )


def _labelled(twin: nn.Module) -> dict[str, Tensor]:
    """The tensors that are cut: parameters, and the statistics of batch norms."""
    parameters = dict(twin.named_parameters())
    statistics = {n: b for n, b in twin.named_buffers() if n.endswith(("running_mean", "running_var"))}
    return {n: t for n, t in twin.state_dict(keep_vars=True).items() if n in parameters or n in statistics}


def _tied(twin: nn.Module) -> Iterator[tuple[str, str]]:
    """`(tensor, other)`: parameters that two layers share; cut in one of them, they would come apart."""
    seen: dict[int, str] = {}
    for path, module in twin.named_modules():
        for key, parameter in module._parameters.items():
            name = f"{path}.{key}" if path else key
            if parameter is not None and (first := seen.setdefault(id(parameter), name)) != name:
                yield first, name


def _run(tracer: Tracer, twin: nn.Module, image: Tensor, settled: set[str]) -> set[str]:
    """The forward passes, as many as it takes to see what is not `settled`; returns what runs in deployment."""
    try:
        with tracer.running(twin):
            twin.eval()
            tracer.counting = True
            tracer.outputs(probes.plain(twin, image))
            tracer.counting = False
            everything = {n for n, _ in twin.named_parameters()}
            deployed = tracer.ran & everything
            if everything - deployed - settled:  # parts that run in training alone, or with other inputs
                probes.batch_norm_off(twin)
                for probe in probes.probes(twin):
                    tracer.outputs(probe(twin, image))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, AssertionError) as e:
        where = tracer.failed or "the model"
        raise UnsupportedModelError(
            f"'{where}' cannot be traced: {type(e).__name__}: {e}. A block whose forward depends on the values of its "
            "input needs another path when its input is on the 'meta' device."
        ) from e
    return deployed


def _state(labels: Labels, found: rules.Found) -> None:
    """Add what the rules say to what was traced."""
    for parts in found.equal:
        labels.equal([labels.of(*_range(p)) for p in parts])
    for parts in found.whole:
        ids = np.concatenate([labels.of(*_range(p)) for p in parts])
        labels.unify(torch.from_numpy(ids), torch.from_numpy(ids[:1]).expand(len(ids)))
        labels.wholes.append(ids)
    for rows, reason in found.fixed:
        labels.pin(labels.of(*_range(rows)), reason, RULE)


def _range(rows: Rows) -> tuple[str, int, int, int]:
    return rows.tensor, rows.dim, rows.start, rows.stop


def _pin(labels: Labels, reasons: Mapping[str, str], rank: int) -> None:
    """Pin whole tensors: `{tensor: why}`."""
    for tensor, dim in labels.spaces:
        if tensor in reasons:
            labels.pin(labels.along(tensor, dim), reasons[tensor], rank)


def _guard(tensor: str, guarded: Mapping[str, str]) -> str | None:
    """Why a tensor must not be touched, if it is inside a module that must not."""
    module = tensor.rpartition(".")[0]
    return next((why for name, why in guarded.items() if module == name or module.startswith(f"{name}.")), None)


def _outputs(twin: nn.Module) -> dict[tuple[str, int], str]:
    """`{(tensor, dimension): layer}` of what layers put out."""
    found = {}
    for name, layer in twin.named_modules():
        if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear | nn.Embedding):
            found[f"{name}.weight", output_dimension(layer)] = name
        elif isinstance(layer, nn.MultiheadAttention):
            found[f"{name}.in_proj_weight", 0] = name
    return found


def named(model: nn.Module, pattern: str, field: str) -> list[str]:
    """Names of the modules that a name or a glob in a recipe's `field` means.

    Raises:
        RecipeError: If it matches none.
    """
    hits = [name for name, _ in model.named_modules() if name and fnmatchcase(name, pattern)]
    if not hits:
        names = [name for name, _ in model.named_modules() if name]
        tops = [name for name in names if name.count(".") == 1] or names
        near = get_close_matches(pattern.partition("[")[0], names, n=1)
        raise RecipeError(
            f"{field}: '{pattern}' matches no module of this model. Its layers are {tops[0]} to {tops[-1]}; "
            + (f"did you mean '{near[0]}'?" if near else "give the name of one, of a part of one, or a glob.")
        )
    return hits


def _match(model: nn.Module, protect: Sequence[str]) -> dict[str, str]:
    """`{module name: reason}` of the modules that a pattern names."""
    found: dict[str, str] = {}
    for pattern in protect:
        found.update(dict.fromkeys(named(model, pattern, "protect"), f"recipe: protect '{pattern}'"))
    return found


def _work(tracer: Tracer, found: Sets) -> tuple[dict[str, float], float]:
    """MACs per element of each tensor, and what no width changes.

    Products of activations (attention) belong to channels, not to a weight: they are written as MACs per element of
    the one-dimensional tensors that these channels have, which is exact where those tell the sets apart.
    """
    labels = tracer.labels
    work = {t: macs / labels.numel[t] for t, macs in tracer.work.items()}
    owed = np.zeros(len(found.sets) + 1)  # the last one: what is in no set
    for ids, macs in tracer.label_work:
        np.add.at(owed, found.home[ids], macs)
    fixed = tracer.fixed_work + float(owed[-1])
    numbers = np.flatnonzero(owed[:-1])
    sets = [found.sets[n] for n in numbers]
    places = {s.tensor for c in sets for s in c.slots if s.tensor.endswith("weight")}
    columns = sorted(t for t in places if labels.numel[t] == labels.size(t, 0))
    holds = np.array([[sum(s.tensor == t for s in c.slots) for t in columns] for c in sets], dtype=np.float64)
    told = holds.any(1) if holds.size else np.zeros(len(sets), dtype=bool)
    fixed += float(owed[numbers[~told]].sum())  # torch's own attention: its width is protected
    if not told.any():
        return work, fixed
    solution = np.linalg.lstsq(holds, owed[numbers] / [c.size for c in sets], rcond=None)[0]
    for tensor, macs in zip(columns, solution, strict=True):
        work[tensor] = work.get(tensor, 0.0) + float(macs)
    return work, fixed
