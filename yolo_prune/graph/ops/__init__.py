# SPDX-License-Identifier: AGPL-3.0-or-later
"""What each operation of torch does to labels: one function per kind of operation.

Sources of truth are the operations' definitions. What is not listed pins whatever it reads.
"""

from yolo_prune.graph.ops import elementwise, layers, moving, reducing  # noqa: F401  they register what they know
from yolo_prune.graph.ops.base import EFFECTS, Call

__all__ = ["EFFECTS", "Call"]
