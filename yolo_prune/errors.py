# SPDX-License-Identifier: AGPL-3.0-or-later
"""The errors that a user can see. Every message says what is wrong, where it is wrong, and what to do."""

from __future__ import annotations


class PruneError(Exception):
    """Base class of all errors that this package raises on purpose.

    Example:
        >>> import yolo_prune
        >>> try:
        ...     yolo_prune.load_recipe("half-flop")
        ... except yolo_prune.PruneError as error:
        ...     print(error)
        There is no recipe 'half-flop'. Did you mean 'half-flops'? ...
    """


class ArgumentError(PruneError, SyntaxError):
    """An argument with a wrong name or value, or in a wrong place.

    It is also a `SyntaxError`, as the argument errors of Ultralytics are.
    """


class RecipeError(PruneError):
    """A recipe that cannot be read, or that asks for something impossible."""


class ScheduleError(RecipeError):
    """Rounds that do not fit the epochs of the run."""


class TargetError(RecipeError):
    """A target that this model cannot reach under the recipe's constraints.

    Attributes:
        reached: the smallest fraction of the dense model that can be kept, if it is known.
    """

    def __init__(self, message: str, reached: float | None = None) -> None:
        super().__init__(message)
        self.reached = reached


class NothingToRemoveError(TargetError):
    """A target that the model already meets."""


class UnsupportedModelError(PruneError):
    """A model with a part whose channel dependencies are not known."""


class PlanError(PruneError):
    """A plan that does not fit the model to which it is applied."""


class ProofError(PruneError):
    """The pruned model does not compute what the masked reference computes."""


class RunError(PruneError):
    """A training run that cannot be pruned, or that did not end pruned."""


class OutputError(PruneError):
    """A result that cannot be written."""


class GradientError(PruneError):
    """The loss of the model or its gradients are not finite, so they cannot be used to score channels."""


class BenchError(PruneError):
    """A measurement that is not possible on this machine with these arguments."""


class ParityError(PruneError):
    """An exported model that does not agree with its checkpoint.

    Attributes:
        measurement: everything that was measured: a `Measurement` or a `Parity`.
    """

    def __init__(self, message: str, measurement: object = None) -> None:
        super().__init__(message)
        self.measurement = measurement
