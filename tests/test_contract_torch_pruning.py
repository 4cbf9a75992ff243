# SPDX-License-Identifier: AGPL-3.0-or-later
"""Everything of torch-pruning that this package relies on beyond its documentation, by name.

When a new release breaks one of these, read what changed, and adapt `yolo_prune/interop` and
`yolo_prune/graph/pruning_group.py`.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import textwrap
from importlib import metadata

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch_pruning import _helpers, ops
from torch_pruning.dependency import Dependency, Node
from ultralytics.nn.modules import Detect

from yolo_prune.interop import pruners

SUBCLASSES = (tp.BasePruner, tp.GroupNormPruner, tp.GrowingRegPruner, tp.BNScalePruner)


def test_the_version_is_that_of_the_installed_package() -> None:
    """`torch_pruning.__version__` of 1.6.1 says 1.6.0."""
    assert tuple(int(n) for n in metadata.version("torch-pruning").split(".")[:3]) >= (1, 6, 1)


def test_the_constructor_uses_the_model_that_it_is_given_for_the_trace_alone() -> None:
    """Elsewhere it reads `self.model` and `self.DG`, which our pruners answer."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(tp.BasePruner.__init__)))
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "model" and isinstance(n.ctx, ast.Load)]
    source = inspect.getsource(tp.BasePruner.__init__)
    assert len(uses) == 2
    assert "self.model = model" in source
    assert "self.DG = dependency.DependencyGraph().build_dependency(\n            model," in source
    assert sum(isinstance(n, ast.Name) and n.id == "example_inputs" for n in ast.walk(tree)) == 1


@pytest.mark.parametrize("cls", SUBCLASSES[1:])
def test_the_other_constructors_only_hand_the_model_on(cls: type) -> None:
    source = inspect.getsource(cls.__init__)
    assert "model=model," in source
    tree = ast.parse(textwrap.dedent(source))
    assert sum(isinstance(n, ast.Name) and n.id == "model" for n in ast.walk(tree)) == 1


@pytest.mark.parametrize("cls", SUBCLASSES)
def test_arguments_have_the_names_that_we_refuse_or_replace(cls: type) -> None:
    names = set(inspect.signature(cls.__init__).parameters)
    assert {"model", "example_inputs", "importance", "ignored_layers"} <= names
    assert {*pruners.OF_THEIR_TRACE, *pruners.COUPLINGS, *pruners.WITH_HEADS} <= names


def test_regularizers_read_the_groups_from_here() -> None:
    for cls in SUBCLASSES[1:]:
        assert "self._groups" in inspect.getsource(cls.regularize)
        assert "self._groups = list(self.DG.get_all_groups(" in inspect.getsource(cls.update_regularizer)
    source = inspect.getsource(tp.BNScalePruner)
    assert "self._l2_imp" in source
    assert "self.ignored_layers" in source


def test_groups_and_graphs_are_made_of_these() -> None:
    conv = nn.Conv2d(1, 2, 1)
    node = Node(conv, None, "conv")
    dependency = Dependency(tp.prune_conv_out_channels, tp.prune_conv_in_channels, node, node)
    item = _helpers.GroupItem(dependency, [0])
    item.root_idxs = [0]
    assert (item.dep.layer, item.dep.pruning_fn, node._name) == (conv, tp.prune_conv_in_channels, "conv")
    assert dependency.index_mapping == [None, None]
    assert _helpers._HybridIndex(idx=1, root_idx=2).root_idx == 2
    group = tp.dependency.Group()
    group.items.append(item)
    assert group[0] is group._group[0]
    graph = tp.DependencyGraph()
    assert (graph._pruning_history, graph.IGNORED_LAYERS_IN_TRACING) == ([], [])
    assert graph.is_out_channel_pruning_fn(tp.prune_conv_out_channels)
    assert graph.REGISTERED_PRUNERS[ops.OPTYPE.CONV].prune_out_channels == tp.prune_conv_out_channels


def test_types_of_layers_are_these() -> None:
    kinds = {
        ops.OPTYPE.CONV: nn.Conv2d(2, 2, 1),
        ops.OPTYPE.DEPTHWISE_CONV: nn.Conv2d(2, 2, 1, groups=2),
        ops.OPTYPE.LINEAR: nn.Linear(1, 1),
        ops.OPTYPE.BN: nn.BatchNorm2d(1),
        ops.OPTYPE.LN: nn.LayerNorm(1),
        ops.OPTYPE.PARAMETER: nn.Parameter(torch.zeros(1)),
    }
    assert {ops.module2type(layer): layer for layer in kinds.values()} == kinds
    assert ops.module2type(nn.Conv2d(4, 2, 1, groups=2)) == ops.OPTYPE.DEPTHWISE_CONV  # which `kind_of` corrects


def test_a_local_pruner_tells_groups_apart_by_the_name_of_the_root() -> None:
    source = inspect.getsource(tp.BasePruner._prune)
    assert "self.DG._module2name[group[0]" in source


def test_their_state_dict_fails_on_the_heads_of_ultralytics() -> None:
    """As docs/how-to/torch-pruning.md says."""
    with pytest.raises(AttributeError, match="one2one"):
        tp.state_dict(Detect(1, ch=(16, 16, 16)))


def test_torch_pruning_is_imported_only_where_it_is_used() -> None:
    code = "import sys, yolo_prune.api, yolo_prune.cli; print('torch_pruning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
