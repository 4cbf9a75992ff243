# SPDX-License-Identifier: AGPL-3.0-or-later
"""Structured pruning as an ordinary part of an Ultralytics YOLO run.

After `import yolo_prune`, `YOLO.train` accepts `callbacks="prune"` and `recipe=...`. A start-up file imports this
package at every start of Python in the environment. To keep that start fast, the public names are loaded on first use.
"""

from __future__ import annotations

from yolo_prune import _startup

TYPE_CHECKING = False  # replaces `typing.TYPE_CHECKING`: importing typing would slow down every start of Python
if TYPE_CHECKING:
    from yolo_prune._version import __version__
    from yolo_prune.api import apply, is_pruned, plan, prune, write_dataset
    from yolo_prune.criteria import register_criterion
    from yolo_prune.cut.plan import Plan
    from yolo_prune.errors import PruneError
    from yolo_prune.graph import read_as_is, register_block
    from yolo_prune.interop.dependency import dependency_graph
    from yolo_prune.measure.alignment import alignment
    from yolo_prune.measure.benchmark import bench
    from yolo_prune.measure.parity_check import parity
    from yolo_prune.recipe import Recipe, load_recipe

__all__ = [
    "Plan",
    "PruneError",
    "Recipe",
    "__version__",
    "alignment",
    "apply",
    "bench",
    "dependency_graph",
    "is_pruned",
    "load_recipe",
    "parity",
    "plan",
    "prune",
    "read_as_is",
    "register_block",
    "register_criterion",
    "write_dataset",
]

_HOMES = {
    "Plan": "yolo_prune.cut.plan",
    "PruneError": "yolo_prune.errors",
    "Recipe": "yolo_prune.recipe",
    "__version__": "yolo_prune._version",
    "alignment": "yolo_prune.measure.alignment",
    "apply": "yolo_prune.api",
    "bench": "yolo_prune.measure.benchmark",
    "dependency_graph": "yolo_prune.interop.dependency",
    "is_pruned": "yolo_prune.api",
    "load_recipe": "yolo_prune.recipe",
    "parity": "yolo_prune.measure.parity_check",
    "plan": "yolo_prune.api",
    "prune": "yolo_prune.api",
    "read_as_is": "yolo_prune.graph",
    "register_block": "yolo_prune.graph",
    "register_criterion": "yolo_prune.criteria",
    "write_dataset": "yolo_prune.api",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_startup.install(imported=True)
