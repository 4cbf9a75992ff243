# SPDX-License-Identifier: AGPL-3.0-or-later
"""Every Ultralytics internal that this package relies on, by name.

When a new release breaks one of these, read what changed, adapt the named room, and only then widen the tested range in
`doctor.py`.
"""

from __future__ import annotations

import hashlib
import inspect

import pytest
import torch
from ultralytics import YOLO
from ultralytics.cfg import check_dict_alignment
from ultralytics.engine.exporter import Exporter
from ultralytics.engine.model import Model
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.engine.validator import BaseValidator
from ultralytics.nn import tasks
from ultralytics.nn.modules import block, conv, head
from ultralytics.utils import DEFAULT_CFG_DICT
from ultralytics.utils.callbacks.base import default_callbacks
from ultralytics.utils.torch_utils import EarlyStopping, ModelEMA

from yolo_prune._patch import MARK
from yolo_prune.callback import PruneCallback

# What the rules in graph/blocks.py say is true of exactly this code.
FORWARDS = {
    "block.C2f.forward": (block.C2f.forward, "b94dfd5b2548"),
    "block.C2f.forward_split": (block.C2f.forward_split, "fa70253fa5e1"),
    "block.C3.forward": (block.C3.forward, "42b6f20c9a1c"),
    "block.C2PSA.forward": (block.C2PSA.forward, "182c8b17cb29"),
    "block.PSABlock.forward": (block.PSABlock.forward, "bd4bcf3c3078"),
    "block.Attention.forward": (block.Attention.forward, "32fe4e53b6f4"),
    "block.Bottleneck.forward": (block.Bottleneck.forward, "f7ee81580320"),
    "block.SPPF.forward": (block.SPPF.forward, "98a2c19eea29"),
    "conv.Conv.forward": (conv.Conv.forward, "228765c0e764"),
    "conv.Concat.forward": (conv.Concat.forward, "00f2c77420b2"),
    "head.Detect.forward": (head.Detect.forward, "03db745457f3"),
    "head.Detect.forward_head": (head.Detect.forward_head, "7d46ffb1d655"),
}


def fingerprint(function: object) -> str:
    """Hash of what a function does, without its docstring and comments."""
    import ast
    import textwrap

    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))  # type: ignore[arg-type]
    body = tree.body[0].body  # type: ignore[attr-defined]
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        del body[0]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:12]


@pytest.mark.parametrize("name", FORWARDS)
def test_graph_blocks_rules_were_written_for_this_forward(name: str) -> None:
    function, known = FORWARDS[name]
    assert fingerprint(function) == known, f"{name} changed: check its rule in graph/blocks.py"


def test_c3k2_and_c3k_still_run_their_parents_forward() -> None:
    assert block.C3k2.forward is block.C2f.forward
    assert block.C3k.forward is block.C3.forward


def test_patch_targets_are_wrapped_once_and_keep_their_signatures() -> None:
    assert hasattr(check_dict_alignment, MARK)
    assert list(inspect.signature(check_dict_alignment).parameters) == [
        "base",
        "custom",
        "e",
        "allowed_custom_keys",
    ]
    assert hasattr(Model.train, MARK)
    assert list(inspect.signature(Model.train).parameters) == ["self", "trainer", "kwargs"]
    assert not hasattr(inspect.unwrap(Model.train), MARK)


def test_patch_finds_the_export_event() -> None:
    assert [f.__module__ for f in default_callbacks["on_export_start"]].count("yolo_prune.export") == 1
    assert "on_export_start" in inspect.getsource(Exporter)
    assert "self.metadata" in inspect.getsource(Exporter)


def test_launch_reads_these_of_a_model() -> None:
    model = YOLO("yolo11n.yaml")
    for name in (
        "_check_is_pytorch_model",
        "_smart_load",
        "overrides",
        "callbacks",
        "ckpt",
        "model_name",
        "model",
    ):
        assert hasattr(model, name), name
    for key in (
        "resume",
        "pretrained",
        "epochs",
        "imgsz",
        "compile",
        "quantize",
        "distill_model",
        "time",
        "save",
    ):
        assert key in DEFAULT_CFG_DICT, key


def test_callback_events_exist_and_epoch_start_comes_before_anything_of_the_epoch() -> None:
    assert set(PruneCallback.EVENTS) <= set(default_callbacks)
    source = inspect.getsource(BaseTrainer._do_train)
    order = [
        "on_train_epoch_start",
        "self.scheduler.step()",
        "self._model_train()",
        "enumerate(self.train_loader)",
    ]
    places = [source.index(text) for text in order]
    assert places == sorted(places)
    assert source.index("on_train_epoch_end") < source.index("self.validate()") < source.index("on_fit_epoch_end")


def test_trainer_finds_these_in_the_trainer() -> None:
    source = inspect.getsource(BaseTrainer)
    used = "ema optimizer stopper best last wdir epoch start_epoch epochs best_fitness fitness resume loss_items"
    used += " train_loader test_loader validator preprocess_batch save_model save_dir args data world_size ddp"
    missing = [name for name in used.split() if f"self.{name}" not in source]
    assert missing == []
    assert list(inspect.signature(BaseTrainer.get_model).parameters) == ["self", "cfg", "weights", "verbose"]
    assert "self.best_fitness == self.fitness" in inspect.getsource(BaseTrainer.save_model)
    assert "trainer.loss_items" in inspect.getsource(inspect.unwrap(BaseValidator.__call__))


def test_trainer_finds_the_averages_cache_of_tensors() -> None:
    ema = ModelEMA(torch.nn.Linear(2, 2))
    assert ema._pairs is None
    ema.update(torch.nn.Linear(2, 2))
    assert ema._pairs is not None


def test_trainer_finds_these_in_early_stopping() -> None:
    stopper = EarlyStopping(patience=3)
    assert {"patience", "best_fitness", "best_epoch", "possible_stop"} <= set(vars(stopper))


def test_metadata_travels_in_the_yaml_that_the_run_copies_into_the_average() -> None:
    assert '"yaml"' in inspect.getsource(BaseTrainer._do_train)
    tasks.DetectionModel({**YOLO("yolo11n.yaml").model.yaml, "pruning": {"version": 1}}, verbose=False)
