# SPDX-License-Identifier: AGPL-3.0-or-later
"""How much a channel matters: a `Criterion` gives one score per channel of a set."""

from yolo_prune.criteria import data, weights  # registers them
from yolo_prune.criteria.base import CRITERIA, Criterion, Observer, create, register_criterion, score

__all__ = ["CRITERIA", "Criterion", "Observer", "create", "data", "register_criterion", "score", "weights"]
