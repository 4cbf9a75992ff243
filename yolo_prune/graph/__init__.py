# SPDX-License-Identifier: AGPL-3.0-or-later
"""The graph of a model: which channels are coupled and must be removed together."""

from yolo_prune.graph.rules import Facts, read_as_is, register_block
from yolo_prune.graph.structure import Attribute, ChannelSet, Fold, Graph, Group, Rows, Slot
from yolo_prune.graph.trace import has_heads, named, trace

__all__ = [
    "Attribute",
    "ChannelSet",
    "Facts",
    "Fold",
    "Graph",
    "Group",
    "Rows",
    "Slot",
    "has_heads",
    "named",
    "read_as_is",
    "register_block",
    "trace",
]
