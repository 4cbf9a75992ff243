# SPDX-License-Identifier: AGPL-3.0-or-later
"""The importances of torch-pruning as criteria: its own classes, and subclasses of its `Importance` by users."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from yolo_prune.criteria.base import Tensors, register_criterion
from yolo_prune.criteria.data import IMAGES, check_finite
from yolo_prune.cut.copies import lean_copy
from yolo_prune.data.calibration import Calibration, Progress
from yolo_prune.errors import PruneError, RecipeError
from yolo_prune.graph.structure import ChannelSet, output_dimension
from yolo_prune.recipe import code
from yolo_prune.recipe.options import whole_number

REDUCTIONS = ("mean", "sum", "max", "prod", "first")
REDUCTIONS_LEFT_OUT = ("gate", None)
NORMALIZERS = ("mean", "sum", "max", "standarization", "gaussian", "lamp", None)
REFUSED = {
    "RandomImportance": "it has no seed, so no run could be repeated. Use the criterion random, which has a seed"
}
REFUSED_OPTIONS = {
    ("OBDCImportance", "bias"): "it multiplies a bias with the Fisher information of the weights",
    ("OBDCImportance", "num_classes"): "it would skip all linear layers with so many outputs. Outputs of the model are "
    "never cut, so no layer has to be skipped",
    ("LAMPImportance", "normalizer"): "it is always lamp",
}


class Evidence(Enum):
    """What an importance reads beside the weights. All of it is the mean over training images."""

    NOTHING = "nothing"
    GRADIENTS = "the gradients of the loss, in `weight.grad`"
    SQUARES = "the squared gradients of each image, in `weight.grad`"
    INPUTS = "the absolute inputs of each layer, in `layer._importance`"


@register_criterion("torch_pruning")
class TorchPruning:
    """A class of `torch_pruning.importance`, or a user's own subclass of `torch_pruning.importance.Importance`.

    The scores are what the class returns for a `torch_pruning.Group` of all channels of a set. The class sees a copy of
    the model, so whatever it leaves on modules does not reach the model.
    """

    def __init__(self, importance: str | None = None, images: int | None = None, **options: Any) -> None:
        """Make the importance.

        Args:
            importance: the name of a class of torch-pruning, or `my.module:MyImportance`.
            images: number of training images, for a class that looks at data.
            **options: the options of the class.
        """
        from torch_pruning.pruner import importance as stock

        kind, own = _find(importance)
        self._evidence = _evidence(kind, images)
        if images is not None and self._evidence is Evidence.NOTHING:
            raise RecipeError(f"criterion.images: '{importance}' reads weights only. Leave images out.")
        wanted = IMAGES if images is None else whole_number("images", images)
        self.images = 0 if self._evidence is Evidence.NOTHING else wanted
        self._importance = _make(kind, own, str(importance), options)
        normalizer = getattr(self._importance, "normalizer", "of its own")
        self.comparable = bool(getattr(self._importance, "comparable", normalizer in (None, "lamp")))
        if isinstance(self._importance, stock.GroupMagnitudeImportance) and isinstance(normalizer, str):
            self._importance.normalizer = partial(self._normalized, normalizer)
        self._reads_fisher = issubclass(kind, stock.OBDCImportance)
        self._reads_filters = issubclass(kind, stock.FPGMImportance)
        self._name = importance
        self._layers: dict[str, nn.Module] = {}
        self._size = 0

    def read(self, model: nn.Module) -> None:
        """Copy the model whose weights are scored to the CPU; with images, `observe` makes the copy."""
        if not self.images:
            self._layers = dict(lean_copy(model).float().named_modules())

    def observe(self, model: nn.Module, calibration: Calibration, progress: Progress) -> None:
        """Provide what the class reads on training images. The model is not changed."""
        if self._evidence is Evidence.INPUTS:
            twin = _with_inputs(model, calibration, progress)
        else:
            twin = _with_gradients(model, calibration, progress, self._evidence, self._each())
        self._layers = dict(twin.named_modules())

    def __call__(self, tensors: Tensors, channels: ChannelSet) -> Tensor:
        """Score every channel; see `Criterion`. A group for which the class has no score is scored 0."""
        scores = self._scores(channels)
        return torch.zeros(channels.size, dtype=torch.float64) if scores is None else scores

    def _scores(self, channels: ChannelSet) -> Tensor | None:
        """What the class says, as float64 on the CPU; None if it has no score for a group."""
        from yolo_prune.graph.pruning_group import pruning_group

        merge = getattr(self._importance, "group_reduction", None) not in ("max", "prod")
        group, self._size = pruning_group(self._layers, channels, merge), channels.size
        if self._reads_filters:
            group._group = [item for item in group._group if not _reads_in_groups(item)]
        if self._reads_fisher:
            self._importance.Fisher, self._importance.steps = _FisherRows(self._importance, group), 1
        try:
            scores = self._importance(group)
        except Exception as e:  # the class may be the user's
            raise PruneError(
                f"criterion.importance: '{self._name}' failed on '{channels.name}': {type(e).__name__}: {e}. Use "
                "another importance, or protect this layer."
            ) from e
        if scores is None:
            return None
        scores = torch.as_tensor(scores).detach().double().cpu()
        if scores.shape not in {(channels.size,), (max(len(item.idxs) for item in group),)}:
            raise PruneError(
                f"criterion.importance: '{self._name}' returned scores of shape {tuple(scores.shape)} for "
                f"'{channels.name}', which has {channels.size} channels. It must return one score per channel."
            )
        scores = scores[: channels.size]  # longer if torch-pruning begins with a layer that has channels several times
        return scores - scores.min().clamp(max=0)  # a score may be negative in torch-pruning; only differences count

    def _normalized(self, normalizer: str, scores: Tensor) -> Tensor:
        """Scores after torch-pruning's own normalization.

        It would divide 0 by 0 if all scores are 0, or so small that single precision rounds their mean to 0. So zeros
        stay zeros, and other scores are first divided by the highest one, which changes no result.
        """
        scores = scores[: self._size]
        if not scores.any():
            return scores
        scaled = (scores.double() / scores.abs().max().double()).to(scores.dtype)
        normalized: Tensor = self._importance._normalize(scaled, normalizer)
        return normalized

    def _each(self) -> Callable[[nn.Module], None] | None:
        """The method of a user's class that is called after the gradients of each image."""
        method = getattr(type(self._importance), "accumulate_grad", None)
        return None if method is None or _is_stock(method) else self._importance.accumulate_grad


def _find(name: Any) -> tuple[Any, bool]:
    """The class that a recipe names, and whether it is a user's own."""
    from torch_pruning.pruner import importance as theirs

    stock = {
        key: value
        for key, value in vars(theirs).items()
        if inspect.isclass(value) and issubclass(value, theirs.Importance) and value is not theirs.Importance
    }
    usable = [key for key in stock if key not in REFUSED]
    if name is None:
        raise RecipeError(
            "criterion.importance: is missing; add the name of a class of torch-pruning, for example "
            "'criterion: {name: torch_pruning, importance: GroupTaylorImportance}'."
        )
    if not isinstance(name, str):
        raise RecipeError(
            f"criterion.importance: must be a text, got {name!r}. Write a class of your own as 'module:Class'."
        )
    found = code.load(name) if code.is_code(name) else stock.get(name)
    if found is None:
        near = get_close_matches(name, usable, 1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise RecipeError(
            f"criterion.importance: torch-pruning has no importance '{name}'; choose one of {', '.join(usable)}, "
            f"or name a class of your own as module:Class.{hint}"
        )
    if not (inspect.isclass(found) and issubclass(found, theirs.Importance)):
        raise RecipeError(f"criterion.importance: '{name}' is not a subclass of torch_pruning.importance.Importance.")
    if found in stock.values() and found.__name__ in REFUSED:
        raise RecipeError(f"criterion.importance: '{name}' is refused: {REFUSED[found.__name__]}.")
    return found, found not in stock.values()


def _is_stock(thing: Any) -> bool:
    return str(thing.__module__).partition(".")[0] == "torch_pruning"


def _evidence(kind: Any, images: int | None) -> Evidence:
    """What a class reads. A user's class reads gradients if the recipe has images for it."""
    from torch_pruning.pruner import importance as theirs

    if issubclass(kind, theirs.GroupHessianImportance | theirs.OBDCImportance):
        return Evidence.SQUARES
    if issubclass(kind, theirs.ActivationImportance):
        return Evidence.INPUTS
    if issubclass(kind, theirs.GroupTaylorImportance) or (images is not None and not _is_stock(kind)):
        return Evidence.GRADIENTS
    return Evidence.NOTHING


def _make(kind: Any, own: bool, name: str, options: Mapping[str, Any]) -> Any:
    """Make an importance, after all its options are checked."""
    parameters = inspect.signature(kind).parameters
    names = [p.name for p in parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = [n for n in names if (kind.__name__, n) not in REFUSED_OPTIONS]
    given = dict(options)
    for option, value in options.items():
        if reason := REFUSED_OPTIONS.get((kind.__name__, option)):
            raise RecipeError(
                f"criterion.{option}: '{name}' cannot be used with {option}: {reason}. Leave {option} out."
            )
        if option not in known and not takes_all:
            remedy = f"The options are: {', '.join(known)}" if known else "Leave it out"
            raise RecipeError(f"criterion.{option}: '{name}' has no such option. {remedy}.")
        if option == "target_types":
            given[option] = _types(value)
        elif not own:
            _check(option, value)
    if "num_classes" in names and not own:
        given["num_classes"] = None
    try:
        return kind(**given)
    except Exception as e:  # a constructor of the user can raise any error
        raise RecipeError(f"criterion.importance: '{name}' cannot be made: {type(e).__name__}: {e}.") from e


def _types(names: Any) -> list[type[nn.Module]]:
    """The classes of `torch.nn` that a recipe names."""
    if not isinstance(names, list | tuple) or not names:
        raise RecipeError(
            f"criterion.target_types: must be a list of classes of torch.nn, as in [Conv2d], got {names!r}."
        )
    types = []
    for name in names:
        found = getattr(nn, name, None) if isinstance(name, str) else None
        if not (inspect.isclass(found) and issubclass(found, nn.Module)):
            raise RecipeError(
                f"criterion.target_types: torch.nn has no layer {name!r}. Write names as in [Conv2d, Linear]."
            )
        types.append(found)
    return types


def _check(option: str, value: Any) -> None:
    """Check an option of a class of torch-pruning, which checks none itself."""
    if option in ("bias", "multivariable") and not isinstance(value, bool):
        raise RecipeError(f"criterion.{option}: must be true or false, got {value!r}.")
    if option == "p" and (
        isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf")
    ):
        raise RecipeError(f"criterion.p: must be a number above 0, got {value!r}.")
    if option == "group_reduction" and value not in REDUCTIONS:
        why = " (the order of the layers of a group has no meaning here)" if value == "gate" else ""
        raise RecipeError(f"criterion.{option}: must be one of {', '.join(REDUCTIONS)}, got {value!r}{why}.")
    if option == "normalizer" and value not in NORMALIZERS and not _is_sentinel(value):
        names = ", ".join("null" if n is None else n for n in NORMALIZERS)
        raise RecipeError(f"criterion.normalizer: must be one of {names}, or sentinel_0.5, got {value!r}.")


def _is_sentinel(value: Any) -> bool:
    """Whether a normalizer is `sentinel_` with the share of the channels that have lower scores."""
    kind, _, share = str(value).partition("_")
    try:
        return kind == "sentinel" and 0 <= float(share) < 1
    except ValueError:
        return False


def _with_gradients(
    model: nn.Module,
    calibration: Calibration,
    progress: Progress,
    evidence: Evidence,
    each: Callable[[nn.Module], None] | None,
) -> nn.Module:
    """A copy of the model whose parameters have the mean gradients, or the mean squared gradients of single images."""
    with calibration.differentiable(model) as twin:
        parameters = dict(twin.named_parameters())
        sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for _ in calibration.backward(twin, progress):
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    squares = evidence is Evidence.SQUARES
                    sums[name] += parameter.grad.square() if squares else parameter.grad
            if each:
                each(twin)
    for name, parameter in parameters.items():
        check_finite(sums[name], name)
        parameter.grad = sums[name] / len(calibration)
    return twin  # type: ignore[no-any-return]


def _with_inputs(model: nn.Module, calibration: Calibration, progress: Progress) -> nn.Module:
    """A copy of the model whose layers have the mean absolute input of each channel, in `_importance`."""
    twin: Any = calibration.twin(model)
    sums: dict[nn.Module, Tensor] = {}
    passes: dict[nn.Module, int] = {}

    def take(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        """Linear layers are summed over positions, and convolutions averaged, as in torch-pruning."""
        value = given[0].detach().abs()
        linear = isinstance(layer, nn.Linear)
        mean = value.flatten(0, -2).sum(0) if linear else value.transpose(0, 1).flatten(1).mean(1)
        sums[layer] = sums[layer] + mean if layer in sums else mean
        passes[layer] = passes.get(layer, 0) + 1

    readers = [m for m in twin.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    hooks = [m.register_forward_pre_hook(take) for m in readers]
    with torch.no_grad():
        calibration.forward(twin, progress)
    for hook in hooks:
        hook.remove()
    for layer in readers:
        silent = torch.zeros(layer.weight.shape[1 - output_dimension(layer)])
        layer._importance = sums[layer] / passes[layer] if layer in sums else silent
    return twin  # type: ignore[no-any-return]


class _FisherRows:
    """What `OBDCImportance` looks up once per item of a group, in their order: the rows for the outputs of this item.

    torch-pruning's own dictionary has all rows of a layer, also for a group that has only some of its outputs.
    """

    def __init__(self, importance: Any, group: Any) -> None:
        types = tuple(importance.target_types)
        self._items = iter([item for item in group if isinstance(item.dep.target.module, types)])

    def __getitem__(self, layer: nn.Module) -> Tensor:
        item = next(self._items)
        gradients: Any = layer.weight.grad
        if not _is_output(item) or gradients.ndim < 2:
            return gradients  # type: ignore[no-any-return]  # it is looked up, but not used
        return gradients.movedim(output_dimension(layer), 0)[item.idxs].flatten(1)  # type: ignore[no-any-return]


def _is_output(item: Any) -> bool:
    return bool(item.dep.handler.__name__ == "prune_out_channels")


def _reads_in_groups(item: Any) -> bool:
    """Whether an item is the inputs of a convolution with groups, for which `FPGMImportance` raises an error."""
    layer = item.dep.target.module
    return not _is_output(item) and 1 < getattr(layer, "groups", 1) < layer.in_channels
