# SPDX-License-Identifier: AGPL-3.0-or-later
"""Criteria: a `Criterion` gives every channel of a set a score of its importance."""

from yolo_prune.criteria import data, weights  # registers the criteria
from yolo_prune.criteria.base import CRITERIA, Criterion, Observer, create, register_criterion, score

__all__ = ["CRITERIA", "Criterion", "Observer", "create", "data", "register_criterion", "score", "weights"]
