# SPDX-License-Identifier: AGPL-3.0-or-later
"""The effect of each torch operation on labels: one function per kind of operation.

The effects follow from the definitions of the operations. An operation that is not registered pins all its inputs.
"""

from yolo_prune.graph.ops import elementwise, layers, moving, reducing  # noqa: F401  registers the effects
from yolo_prune.graph.ops.base import EFFECTS, Call

__all__ = ["EFFECTS", "Call"]
