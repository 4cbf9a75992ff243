# SPDX-License-Identifier: AGPL-3.0-or-later
"""Criteria: a `Criterion` gives every channel of a set a score of its importance."""

from yolo_prune.criteria import data, importances, weights  # registers the criteria
from yolo_prune.criteria.base import CRITERIA, Criterion, ModelReader, Observer, create, register_criterion, score

__all__ = [
    "CRITERIA",
    "Criterion",
    "ModelReader",
    "Observer",
    "create",
    "data",
    "importances",
    "register_criterion",
    "score",
    "weights",
]
