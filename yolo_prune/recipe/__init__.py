# SPDX-License-Identifier: AGPL-3.0-or-later
"""Recipes: the user's settings for pruning as validated data, and the functions that read them."""

from yolo_prune.recipe.load import bundled_names, load_recipe
from yolo_prune.recipe.schema import (
    AllocationSpec,
    CriterionSpec,
    LayerLimits,
    Recipe,
    Schedule,
    Target,
    as_yaml,
    json_schema,
)

__all__ = [
    "AllocationSpec",
    "CriterionSpec",
    "LayerLimits",
    "Recipe",
    "Schedule",
    "Target",
    "as_yaml",
    "bundled_names",
    "json_schema",
    "load_recipe",
]
