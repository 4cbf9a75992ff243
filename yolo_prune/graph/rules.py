# SPDX-License-Identifier: AGPL-3.0-or-later
"""Rules: functions that state the facts about a block that a trace cannot see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn

from yolo_prune.env.registry import Registry
from yolo_prune.errors import UnsupportedModelError
from yolo_prune.graph.structure import Attribute, Fold, Rows, output_dimension

Rule = Callable[[Any, "Facts"], None]

RULES: Registry[type[nn.Module], Rule] = Registry("{} already has a rule.")
OWN_SIZES = (nn.MultiheadAttention, nn.RNNBase, nn.Unflatten)  # torch modules whose code uses stored widths


class RuleError(UnsupportedModelError):
    """A rule that does not fit its block.

    Attributes:
        misfit: what does not fit, in words that are the same for all blocks of a class.
    """

    def __init__(self, message: str, misfit: str) -> None:
        super().__init__(message)
        self.misfit = misfit


def register_block(*classes: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register a rule for block classes: a function `(block, facts)` that states what a trace cannot see.

    With a rule you also promise that the block's forward works with other widths, once yolo-prune has set the
    attributes that the rule names. In a block without a rule, channels are protected if the forward splits them by
    constants or by sizes in a list (`x[:, :64]`, `x.split(self.sizes)`). A subclass that inherits `forward` inherits
    the rule.

    Raises:
        ValueError: If a class already has a rule.

    Example:
        >>> import yolo_prune
        >>> from torch import nn
        >>> class Swap(nn.Module):  # its forward splits the output of `cv` into parts of `self.sizes` channels
        ...     ...
        >>> @yolo_prune.register_block(Swap)
        ... def swap(block, facts):
        ...     first, second = facts.parts("cv", *block.sizes)
        ...     facts.equal(first, second)
        ...     facts.attribute_list("sizes", first, second)
    """
    return RULES.register(*classes)


def read_as_is(*classes: type[nn.Module]) -> None:
    """Register block classes that need no facts: their forward works with any width.

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
    """The rule for a module: the rule of its class, or of the class from which it inherits `forward`."""
    cls = type(module)
    if "forward" in vars(module):  # the module chose another forward
        return None
    for base in cls.__mro__:
        if base in RULES and getattr(cls, "forward", None) is getattr(base, "forward", None):
            return RULES[base]
    return None


def trusts(module: nn.Module) -> bool:
    """Whether sizes in the code of a module's forward are safe: the module has a rule, or is one of torch's own."""
    if type(module).__module__.startswith("torch.nn.") and not isinstance(module, OWN_SIZES):
        return True
    return rule_of(module) is not None


@dataclass
class StatedFacts:
    """All facts that the rules stated about a model.

    Attributes:
        unfit: blocks whose rule was written for another version of their class. They have no rule.
    """

    equal: list[tuple[Rows, ...]] = field(default_factory=list)
    whole: list[tuple[Rows, ...]] = field(default_factory=list)
    fixed: list[tuple[Rows, str]] = field(default_factory=list)
    attributes: list[Attribute] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)
    spare: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    unfit: set[nn.Module] = field(default_factory=set)

    def add(self, others: StatedFacts) -> None:
        """Add the facts about one more block."""
        for kind in fields(self):
            mine, new = getattr(self, kind.name), getattr(others, kind.name)
            mine.extend(new) if isinstance(mine, list) else mine.update(new)

    def trusts(self, module: nn.Module) -> bool:
        """Whether sizes in the code of a module's forward are safe."""
        return module not in self.unfit and trusts(module)


@dataclass
class Facts:
    """The object that a rule uses to state facts about one block.

    Attributes:
        path: the block's name in the model.
        block: the block.
        stated: collects the facts of all blocks.
        heads: "dims" (every head of an attention loses the same number of channels) or "heads" (whole heads are
            removed).
    """

    path: str
    block: nn.Module
    stated: StatedFacts
    heads: str = "dims"

    def outputs(self, name: str) -> Rows:
        """The output channels of a child, which is a convolution, a `Conv` or a linear layer."""
        path, layer = self._layer(name)
        dim = output_dimension(layer)
        return Rows(f"{path}.weight", dim, 0, layer.weight.shape[dim])

    def inputs(self, name: str) -> Rows:
        """The input channels of a child."""
        path, layer = self._layer(name)
        dim = 1 - output_dimension(layer)
        return Rows(f"{path}.weight", dim, 0, layer.weight.shape[dim])

    def parts(self, name: str, *sizes: int) -> list[Rows]:
        """The output channels of a child, divided into consecutive parts of these `sizes`.

        Raises:
            RuleError: If the sum of the sizes is not the number of output channels.
        """
        return self._parts(name, self.outputs(name), "output", sizes)

    def input_parts(self, name: str, *sizes: int) -> list[Rows]:
        """The input channels of a child, divided into consecutive parts of these `sizes`.

        Raises:
            RuleError: If the sum of the sizes is not the number of input channels.

        Example:
            >>> import yolo_prune
            >>> from torch import nn
            >>> class Parts(nn.Module):  # its forward is self.cv(torch.cat(x.split(self.sizes, 1)[::-1], 1))
            ...     ...
            >>> @yolo_prune.register_block(Parts)
            ... def parts(block, facts):
            ...     second, first = facts.input_parts("cv", *block.sizes[::-1])
            ...     facts.attribute_list("sizes", first, second)
        """
        return self._parts(name, self.inputs(name), "input", sizes)

    def _parts(self, name: str, rows: Rows, side: str, sizes: Sequence[int]) -> list[Rows]:
        if sum(sizes) != len(rows):
            expected = " + ".join(map(str, sizes))
            raise RuleError(
                f"'{self._layer(name)[0]}' has {len(rows)} {side} channels, but the rule for "
                f"{type(self.block).__name__} expects {expected}. Either the block was changed or the rule is wrong: "
                "correct the rule.",
                f"'{name}' has {len(rows)} {side} channels, not {expected}",
            )
        pieces, start = [], 0
        for size in sizes:
            pieces.append(replace(rows, start=start, stop=start + size))
            start += size
        return pieces

    def parameter(self, name: str, dim: int = 0) -> Rows:
        """All indices along one dimension of a parameter of the block itself.

        Raises:
            RuleError: If it is a buffer or anything else that a cut does not make smaller.
        """
        if not isinstance(getattr(self.block, name), nn.Parameter):
            raise RuleError(
                f"The rule for {type(self.block).__name__} names '{name}', but '{self._inside(name)}' is no parameter, "
                "and only parameters get smaller. Store it as nn.Parameter(..., requires_grad=False).",
                f"'{name}' is no parameter",
            )
        return Rows(self._inside(name), dim, 0, getattr(self.block, name).shape[dim])

    def equal(self, *parts: Rows) -> None:
        """Fact: all of these parts keep the same fraction of their channels."""
        self.stated.equal.append(parts)

    def whole(self, *parts: Rows) -> None:
        """Fact: these channels are kept together or removed together."""
        self.stated.whole.append(parts)

    def attribute(self, name: str, *rows: Rows, per: int = 1) -> None:
        """Fact: the block's attribute `name` is the number of channels in `rows`, divided by `per`."""
        self._check_attribute(name, int)
        self.stated.attributes.append(Attribute(self.path, name, rows, per))

    def attribute_list(self, name: str, *rows: Rows) -> None:
        """Fact: the block's attribute `name` is a list: the number of channels in each of `rows`."""
        self._check_attribute(name, list)
        self.stated.attributes.append(Attribute(self.path, name, rows, many=True))
        self.stated.equal.extend((part,) for part in rows)  # alone, so that each part becomes a channel set

    def fixed(self, rows: Rows, reason: str) -> None:
        """Fact: none of these channels may be removed."""
        self.stated.fixed.append((rows, reason))

    def fold(self, name: str, rows: Rows, counted: Rows, power: float) -> None:
        """Fact: forward divides by a power of a width. The child `name` is rescaled to compensate for a cut.

        Args:
            name: a child that ends in a batch norm or is a linear layer; its `rows` are multiplied.
            rows: output channels of that child.
            counted: the channels whose number is the width that forward reads.
            power: `rows` are multiplied by `(kept / size of counted) ** power`.
        """
        norm = getattr(self.block.get_submodule(name), "bn", None)
        path, layer = self._layer(name) if norm is None else (self._inside(f"{name}.bn"), norm)
        for key in ("weight", "bias"):
            if getattr(layer, key, None) is not None:
                self.stated.folds.append(Fold(Rows(f"{path}.{key}", 0, rows.start, rows.stop), counted, power))

    def spare(self, name: str) -> None:
        """Fact: in deployment the twin of the child `name` runs, and the child itself does not."""
        self.stated.spare.append(f"{self._inside(name)}.")

    def because(self, reason: str) -> None:
        """Fact: show this reason for every channel inside this block that the trace protects."""
        self.stated.reasons[self.path] = reason

    def _check_attribute(self, name: str, kind: type) -> None:
        if type(getattr(self.block, name, None)) is not kind:
            raise RuleError(
                f"The rule for {type(self.block).__name__} names the attribute '{name}', but '{self.path}.{name}' is "
                f"not of type {kind.__name__}. Correct the rule.",
                f"'{name}' is not of type {kind.__name__}",
            )

    def _layer(self, name: str) -> tuple[str, Any]:
        layer: Any = self.block.get_submodule(name)
        inner = next((n for n in ("conv", "conv_transpose") if isinstance(getattr(layer, n, None), nn.Module)), None)
        path = self._inside(name)
        return (f"{path}.{inner}", getattr(layer, inner)) if inner else (path, layer)

    def _inside(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


def gather(model: nn.Module, heads: str = "dims") -> StatedFacts:
    """Run the rules of all blocks of a model and collect the facts.

    A rule of this package was written for the classes of some releases. A block of another release may lack what the
    rule names: such a block is traced, as a block without a rule is. The failure of any other rule is an error.

    Raises:
        RuleError: If a rule that was registered from outside this package does not fit.
    """
    stated = StatedFacts()
    for path, module in model.named_modules():
        if rule := rule_of(module):
            try:
                stated.add(_facts_of(rule, path, module, heads))
            except RuleError as e:
                if not _is_ours(rule):
                    raise
                stated.unfit.add(module)
                stated.reasons[path] = f"the rule for {type(module).__name__} does not fit ({e.misfit})"
    return stated


def _facts_of(rule: Rule, path: str, block: nn.Module, heads: str) -> StatedFacts:
    """The facts that a rule states about one block.

    Raises:
        RuleError: If the rule does not fit the block.
    """
    stated = StatedFacts()
    try:
        rule(block, Facts(path, block, stated, heads))
    except RuleError:
        raise
    except Exception as e:  # a rule may be the user's code, so the message has to name the rule
        what = f"{type(e).__name__}: {e}"
        raise RuleError(f"The rule for {type(block).__name__} fails on '{path}': {what}. Correct it.", what) from e
    if _is_ours(rule):
        for attribute in stated.attributes:
            _check_value(block, attribute)
    return stated


def _check_value(block: nn.Module, attribute: Attribute) -> None:
    """Check that an attribute is the number that the rule says, because its meaning may differ between releases.

    Raises:
        RuleError: If it is another number.
    """
    value, counts = getattr(block, attribute.name), [len(rows) for rows in attribute.rows]
    expected = counts if attribute.many else sum(counts) // attribute.per
    if value != expected:
        misfit = f"'{attribute.name}' is {value}, not {expected}"
        raise RuleError(f"The rule for {type(block).__name__} does not fit '{attribute.module}': {misfit}.", misfit)


def _is_ours(rule: Rule) -> bool:
    """Whether a rule is one of this package."""
    return str(getattr(rule, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]
