# SPDX-License-Identifier: AGPL-3.0-or-later
"""Rules: what a trace of a block cannot see, stated as facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from yolo_prune.env.registry import Registry
from yolo_prune.errors import UnsupportedModelError
from yolo_prune.graph.structure import Attribute, Fold, Rows, output_dimension

Rule = Callable[[Any, "Facts"], None]

RULES: Registry[type[nn.Module], Rule] = Registry("{} already has a rule.")
OWN_SIZES = (nn.MultiheadAttention, nn.RNNBase)  # torch modules that write out sizes that a cut would change


def register_block(*classes: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register a rule for block classes: a function `(block, facts)` that states what a trace cannot see.

    A rule also promises that the block's forward works with other widths, once the attributes that the rule names are
    set. In blocks without a rule, channels that are split by written-out sizes (`x.view(b, self.heads, ...)`,
    `x[:, :self.c]`) are protected. Subclasses that inherit `forward` inherit the rule.

    Raises:
        ValueError: If a class already has a rule.

    Example:
        >>> import yolo_prune
        >>> from torch import nn
        >>> class Swap(nn.Module):  # its forward splits what `cv` puts out into two parts of `self.c` channels
        ...     ...
        >>> @yolo_prune.register_block(Swap)
        ... def swap(block, facts):
        ...     first, second = facts.parts("cv", block.c, block.c)
        ...     facts.equal(first, second)
        ...     facts.attribute("c", first)
    """
    return RULES.register(*classes)


def read_as_is(*classes: type[nn.Module]) -> None:
    """Register blocks that need no facts: their forward works with any width, as it is.

    Raises:
        ValueError: If a class already has a rule.

    Example:
        >>> import yolo_prune
        >>> from torch import nn
        >>> class Gate(nn.Module):
        ...     ...
        >>> yolo_prune.read_as_is(Gate)
    """
    register_block(*classes)(lambda block, facts: None)


def rule_of(module: nn.Module) -> Rule | None:
    """The rule for a module: of its class, or of the class it inherits `forward` from."""
    cls = type(module)
    for base in cls.__mro__:
        if base in RULES and getattr(cls, "forward", None) is getattr(base, "forward", None):
            return RULES[base]
    return None


def trusts(module: nn.Module) -> bool:
    """Whether a module's forward may write out sizes: it has a rule, or is torch's own."""
    if type(module).__module__.startswith("torch.nn.") and not isinstance(module, OWN_SIZES):
        return True
    return rule_of(module) is not None


@dataclass
class Found:
    """What the rules said about a model."""

    equal: list[tuple[Rows, ...]] = field(default_factory=list)
    whole: list[tuple[Rows, ...]] = field(default_factory=list)
    fixed: list[tuple[Rows, str]] = field(default_factory=list)
    attributes: list[Attribute] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)
    spare: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass
class Facts:
    """A rule's notepad for one block.

    Attributes:
        path: the block's name in the model.
        block: the block.
        found: where facts are taken down.
        heads: "dims" (every head of an attention keeps as many channels) or "heads" (whole heads go).
    """

    path: str
    block: nn.Module
    found: Found
    heads: str = "dims"

    def outputs(self, name: str) -> Rows:
        """The output channels of a child: a convolution, `Conv` or linear layer."""
        path, layer = self._layer(name)
        dim = output_dimension(layer)
        return Rows(f"{path}.weight", dim, 0, layer.weight.shape[dim])

    def inputs(self, name: str) -> Rows:
        """The input channels of a child."""
        path, layer = self._layer(name)
        dim = 1 - output_dimension(layer)
        return Rows(f"{path}.weight", dim, 0, layer.weight.shape[dim])

    def parts(self, name: str, *sizes: int) -> list[Rows]:
        """The output channels of a child, cut at `sizes`.

        Raises:
            UnsupportedModelError: If they do not add up to what the child has.
        """
        rows = self.outputs(name)
        if sum(sizes) != len(rows):
            raise UnsupportedModelError(
                f"'{self._layer(name)[0]}' has {len(rows)} output channels, where the rule for "
                f"{type(self.block).__name__} expects {' + '.join(map(str, sizes))}: the block was changed, or the "
                "rule is wrong."
            )
        pieces, start = [], 0
        for size in sizes:
            pieces.append(Rows(rows.tensor, rows.dim, start, start + size))
            start += size
        return pieces

    def parameter(self, name: str, dim: int = 0) -> Rows:
        """All indices along one dimension of a parameter of the block itself."""
        return Rows(self._inside(name), dim, 0, getattr(self.block, name).shape[dim])

    def equal(self, *parts: Rows) -> None:
        """Fact: these always keep equal fractions of their channels."""
        self.found.equal.append(parts)

    def whole(self, *parts: Rows) -> None:
        """Fact: these channels stay or go together."""
        self.found.whole.append(parts)

    def attribute(self, name: str, *rows: Rows, per: int = 1) -> None:
        """Fact: the block's attribute `name` is how many of `rows` there are, divided by `per`."""
        self._check_attribute(name, int)
        self.found.attributes.append(Attribute(self.path, name, rows, per))

    def attribute_list(self, name: str, *rows: Rows) -> None:
        """Fact: the block's attribute `name` is a list of how many of each of `rows` there are."""
        self._check_attribute(name, list)
        self.found.attributes.append(Attribute(self.path, name, rows, many=True))
        self.found.equal.extend((part,) for part in rows)  # on its own: each part is a set

    def fixed(self, rows: Rows, reason: str) -> None:
        """Fact: none of these may be removed."""
        self.found.fixed.append((rows, reason))

    def fold(self, name: str, rows: Rows, counted: Rows, power: float) -> None:
        """Fact: forward divides by a power of a width; the affine layer `name` makes up for what a cut changes.

        Args:
            name: a child that ends in a batch norm or is a linear layer; `rows` of it are multiplied.
            rows: output channels of that child.
            counted: the width that forward reads.
            power: `rows` are multiplied by `(kept / size of counted) ** power`.
        """
        norm = getattr(self.block.get_submodule(name), "bn", None)
        path, layer = self._layer(name) if norm is None else (self._inside(f"{name}.bn"), norm)
        for key in ("weight", "bias"):
            if getattr(layer, key, None) is not None:
                self.found.folds.append(Fold(Rows(f"{path}.{key}", 0, rows.start, rows.stop), counted, power))

    def spare(self, name: str) -> None:
        """Fact: the child `name` does not run in deployment beside its twin."""
        self.found.spare.append(f"{self._inside(name)}.")

    def because(self, reason: str) -> None:
        """Fact: what the trace finds to be fixed inside this block is so for this reason."""
        self.found.reasons[self.path] = reason

    def _check_attribute(self, name: str, kind: type) -> None:
        if type(getattr(self.block, name, None)) is not kind:
            raise UnsupportedModelError(
                f"The rule for {type(self.block).__name__} names the attribute '{name}', and '{self.path}.{name}' is "
                f"no {kind.__name__}."
            )

    def _layer(self, name: str) -> tuple[str, Any]:
        layer: Any = self.block.get_submodule(name)
        inner = next((n for n in ("conv", "conv_transpose") if isinstance(getattr(layer, n, None), nn.Module)), None)
        path = self._inside(name)
        return (f"{path}.{inner}", getattr(layer, inner)) if inner else (path, layer)

    def _inside(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


def gather(model: nn.Module, heads: str = "dims") -> Found:
    """What the rules say about a model's blocks."""
    found = Found()
    for path, module in model.named_modules():
        if rule := rule_of(module):
            try:
                rule(module, Facts(path, module, found, heads))
            except UnsupportedModelError:
                raise
            except Exception as e:  # a rule is the user's code; whatever is wrong with it has to be told as such
                raise UnsupportedModelError(
                    f"The rule for {type(module).__name__} fails on '{path}': {type(e).__name__}: {e}."
                ) from e
    return found
