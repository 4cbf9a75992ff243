# SPDX-License-Identifier: AGPL-3.0-or-later
"""Every Ultralytics internal that this package relies on, by name.

When a new release breaks one of these, read what changed, adapt the named room, and only then widen the tested range in
`env/versions.py`.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import io
import logging
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_pruning import importance
from torch_pruning.dependency import Dependency, Node
from ultralytics import YOLO
from ultralytics.cfg import check_dict_alignment
from ultralytics.data import build
from ultralytics.data.augment import LetterBox, Mosaic
from ultralytics.data.base import BaseDataset
from ultralytics.data.dataset import ClassificationDataset, YOLODataset
from ultralytics.data.utils import (
    check_cls_dataset,
    check_det_dataset,
    convert_ndjson_to_yolo_if_needed,
    get_split_fraction,
    img2label_paths,
)
from ultralytics.engine import trainer as engine
from ultralytics.engine.exporter import Exporter
from ultralytics.engine.model import Model
from ultralytics.engine.results import Results
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.engine.validator import BaseValidator
from ultralytics.models.yolo.classify import ClassificationTrainer, ClassificationValidator
from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator
from ultralytics.nn import tasks
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.modules import block, conv, head, transformer
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, USER_CONFIG_DIR, checks, metrics, torch_utils
from ultralytics.utils.callbacks.base import default_callbacks
from ultralytics.utils.torch_utils import EarlyStopping, ModelEMA

from yolo_prune._patch import MARK
from yolo_prune.cut import export_record
from yolo_prune.data import datasets
from yolo_prune.env import terminal, trained
from yolo_prune.graph import blocks, rules
from yolo_prune.measure import runtimes
from yolo_prune.run import inputs
from yolo_prune.run.callback import PruneCallback

# What the rules in graph/blocks.py say is true of exactly this code: `{class or function: hash of its forward}`.
FORWARDS = {
    "block.A2C2f": "2d460486b362",
    "block.AAttn": "6b35dcae5d16",
    "block.ABlock": "6da9ce41fd82",
    "block.AConv": "a57c1344c123",
    "block.ADown": "98df250350bf",
    "block.Attention": "32fe4e53b6f4",
    "block.BNContrastiveHead": "c03798d85929",
    "block.Bottleneck": "f7ee81580320",
    "block.BottleneckCSP": "c74d49475dd4",
    "block.C1": "6413c00492f6",
    "block.C2": "f547d3c8c127",
    "block.C2PSA": "182c8b17cb29",
    "block.C2f": "b94dfd5b2548",
    "block.C2f.forward_split": "fa70253fa5e1",
    "block.C2fAttn": "30961b3fa7f5",
    "block.C3": "42b6f20c9a1c",
    "block.C3f": "1e36bd80644e",
    "block.CBFuse": "6e4ab6293542",
    "block.CBLinear": "18e666af14f0",
    "block.CIB": "14c09623ddf4",
    "block.ContrastiveHead": "f31f9f75f15d",
    "block.DFL": "c25d9fa4fd27",
    "block.GhostBottleneck": "9823c9cc8624",
    "block.HGBlock": "c601e5caf065",
    "block.HGStem": "089a07a9f588",
    "block.ImagePoolingAttn": "1709c0905785",
    "block.MaxSigmoidAttnBlock": "f860d94c91e9",
    "block.PSA": "8ceee82bb39d",
    "block.PSABlock": "bd4bcf3c3078",
    "block.Proto": "48378f5c2118",
    "block.Proto26": "fe74d470ce04",
    "block.RepC3": "033d82a14f3d",
    "block.RepNCSPELAN4": "8cec64d3ee14",
    "block.RepVGGDW": "2da3c6d2c65a",
    "block.ResNetBlock": "a9f1a2779902",
    "block.ResNetLayer": "057c556a7215",
    "block.Residual": "5a3c3959ee38",
    "block.SAVPE": "d00137c7ab52",
    "block.SCDown": "c2837a1246a1",
    "block.SPP": "de6e6cd64ad4",
    "block.SPPELAN": "c9a517e7be90",
    "block.SPPF": "98a2c19eea29",
    "block.SwiGLUFFN": "7662e8b50dad",
    "block.TorchVision": "081ab6f6afa8",
    "conv.CBAM": "1ebc9b0b6758",
    "conv.ChannelAttention": "b00bd775097f",
    "conv.Concat": "00f2c77420b2",
    "conv.Conv": "228765c0e764",
    "conv.Conv2": "4c0750ff46b1",
    "conv.ConvTranspose": "942fd28bb89a",
    "conv.Focus": "a61e620da0ba",
    "conv.GhostConv": "1afe1c1bb344",
    "conv.Index": "39e42b69e6a9",
    "conv.LightConv": "75bda395543a",
    "conv.RepConv": "a4e47b6245d4",
    "conv.SpatialAttention": "4280e28de808",
    "head.Classify": "c385f0e44a36",
    "head.Depth": "b95f1e5e603a",
    "head.Detect": "03db745457f3",
    "head.Detect.forward_head": "7d46ffb1d655",
    "head.OBB": "03db745457f3",
    "head.OBB26": "03db745457f3",
    "head.Pose": "03db745457f3",
    "head.RTDETRDecoder": "acc0ab70312c",
    "head.Segment": "ead296cf919b",
    "head.Segment26": "da55adea93c6",
    "head.SemanticSegment": "3b16f2f25838",
    "head.WorldDetect": "1edc1085dea5",
    "head.YOLOEDetect": "58703b583910",
    "head.YOLOESegment": "ead296cf919b",
    "head.YOLOESegment26": "47f33dbd01a5",
    "transformer.AIFI": "f061f4b3fe71",
    "transformer.DeformableTransformerDecoder": "a406fdf8d559",
    "transformer.DeformableTransformerDecoderLayer": "0c25234edf24",
    "transformer.LayerNorm2d": "a512c9509814",
    "transformer.MLP": "b41ee03607e6",
    "transformer.MLPBlock": "a0441773dce7",
    "transformer.MSDeformAttn": "5e2607acc7ab",
    "transformer.TransformerBlock": "70a38f54e025",
    "transformer.TransformerEncoderLayer": "f4f6d58c3951",
    "transformer.TransformerLayer": "96e6375b8ea2",
}


def fingerprint(function: object) -> str:
    """Hash of what a function does, without its docstring and comments."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))  # type: ignore[arg-type]
    body = tree.body[0].body  # type: ignore[attr-defined]
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        del body[0]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:12]


@pytest.mark.parametrize("name", FORWARDS)
def test_graph_blocks_rules_were_written_for_this_forward(name: str) -> None:
    home, *path = name.split(".")
    found = functools.reduce(
        getattr, path, {"block": block, "conv": conv, "head": head, "transformer": transformer}[home]
    )
    forward = found.forward if isinstance(found, type) else found
    assert fingerprint(forward) == FORWARDS[name], f"{name} changed: check its rule in graph/blocks.py"


def test_every_rule_for_an_ultralytics_block_is_in_the_list() -> None:
    ruled = {
        f"{c.__module__.rpartition('.')[2]}.{c.__qualname__}"
        for c in rules.RULES
        if "ultralytics.nn.mod" in c.__module__
    }
    assert blocks.__name__ in {rule.__module__ for rule in rules.RULES.values()}
    assert ruled == {n for n in FORWARDS if n.count(".") == 1}


def test_every_block_of_ultralytics_has_a_rule_or_a_reason_not_to() -> None:
    """A new block that is not listed here is read as a stranger's: what its forward cuts up is protected."""
    listed = {*block.__all__, *conv.__all__, *head.__all__, *transformer.__all__}
    homes = (block, conv, head, transformer)
    classes = [next(getattr(m, n) for m in homes if hasattr(m, n)) for n in sorted(listed)]
    without = {c.__name__ for c in classes if isinstance(c, type) and not any(_inherits(c, r) for r in rules.RULES)}
    assert without == {"DWConvTranspose2d"}  # torch's own forward


def _inherits(cls: type, ruled: type) -> bool:
    return issubclass(cls, ruled) and cls.forward is ruled.forward


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
    assert hasattr(Model.val, MARK)
    assert list(inspect.signature(Model.val).parameters) == ["self", "validator", "kwargs"]
    assert not hasattr(inspect.unwrap(Model.val), MARK)
    assert hasattr(tasks.BaseModel.load, MARK)
    assert list(inspect.signature(tasks.BaseModel.load).parameters) == ["self", "weights", "verbose"]
    assert not hasattr(inspect.unwrap(tasks.BaseModel.load), MARK)


def test_all_weights_pass_through_the_load_that_is_patched() -> None:
    models = [c for c in vars(tasks).values() if isinstance(c, type) and issubclass(c, tasks.BaseModel)]
    assert {cls.__name__ for cls in models if "load" in vars(cls)} == {"BaseModel"}
    assert "self.model.load(weights)" in inspect.getsource(Model.load)
    assert '(weights.get("ema") or weights["model"]) if isinstance(weights, dict)' in inspect.getsource(
        inspect.unwrap(tasks.BaseModel.load)
    )
    assert 'self.overrides["pretrained"] = False' in inspect.getsource(Model.reset_weights)


def test_keep_overrides_get_model_as_all_trainers_define_it_and_as_it_is_called() -> None:
    trainers = [DetectionTrainer]
    trainers += [cls for base in BaseTrainer.__subclasses__() for cls in (base, *base.__subclasses__())]
    assert len(trainers) > 5
    for cls in trainers:
        if cls.__module__.startswith("ultralytics."):
            assert list(inspect.signature(cls.get_model).parameters) == ["self", "cfg", "weights", "verbose"], cls
    called = "self.trainer.get_model(weights=weights, cfg=self.model.yaml)"
    assert called in inspect.getsource(inspect.unwrap(Model.train))
    assert "self.model = self.get_model(cfg=cfg, weights=weights, " in inspect.getsource(BaseTrainer.setup_model)
    assert "ckpt = self.setup_model()" in inspect.getsource(BaseTrainer._setup_train)


def test_patch_finds_the_export_event() -> None:
    assert default_callbacks["on_export_start"].count(export_record.on_export_start) == 1
    assert "on_export_start" in inspect.getsource(Exporter)
    assert "self.metadata" in inspect.getsource(Exporter)


def test_the_trainer_checks_arguments_as_launch_does_before_it() -> None:
    assert "get_cfg(cfg, overrides)" in inspect.getsource(BaseTrainer.__init__)
    assert "check_imgsz(self.args.imgsz, stride=gs, floor=gs, max_dim=1)" in inspect.getsource(BaseTrainer)
    assert {"cfg", "lr0", "model", "task", "mode", "data"} <= DEFAULT_CFG_DICT.keys()
    train = inspect.getsource(
        inspect.unwrap(Model.train)
    )  # with a file of arguments, the model's overrides do not count
    assert 'overrides = YAML.load(checks.check_yaml(kwargs["cfg"])) if kwargs.get("cfg") else self.overrides' in train
    assert 'args = {**overrides, **custom, **kwargs, "mode": "train"}' in train


def test_a_validator_takes_rectangles_after_it_is_made() -> None:
    assert "self.args.imgsz = check_imgsz(self.args.imgsz, max_dim=1)" in inspect.getsource(BaseValidator.__init__)
    assert "imgsz=cfg.imgsz" in inspect.getsource(build.build_yolo_dataset)
    assert "LetterBox(new_shape=self.imgsz" in inspect.getsource(YOLODataset.build_transforms)


def test_labels_are_filtered_by_class_and_read_with_the_names_of_the_dataset() -> None:
    assert list(inspect.signature(BaseDataset.update_labels).parameters) == ["self", "include_class"]
    assert 'len(self.data["names"])' in inspect.getsource(YOLODataset.verify_args)  # a number without a name is refused
    assert "names" in inspect.signature(ClassificationDataset.__init__).parameters
    assert "names=self.names" in inspect.getsource(ClassificationValidator.build_dataset)
    assert 'names=self.data["names"]' in inspect.getsource(ClassificationTrainer.build_dataset)
    metrics = inspect.getsource(DetectionValidator.init_metrics)
    assert "self.args.save_json |= self.args.val and (self.is_coco or self.is_lvis)" in metrics
    for trainer in (DetectionTrainer, ClassificationTrainer):
        assert {"build_dataset", "get_validator"} <= vars(trainer).keys()
    assert "self.build_dataset(" in inspect.getsource(DetectionValidator.get_dataloader)
    assert '(validator or self._smart_load("validator"))(args=args' in inspect.getsource(inspect.unwrap(Model.val))
    assert img2label_paths(["a/images/b/c.jpg"]) == [str(Path("a/labels/b/c.txt"))]


def test_texts_of_classes_are_attributes_of_open_vocabulary_models() -> None:
    assert "self.txt_feats = " in inspect.getsource(tasks.WorldModel)
    assert "self.pe = embeddings" in inspect.getsource(tasks.YOLOEModel.set_classes)
    assert "self.model[-1].nc = len(names)" in inspect.getsource(tasks.YOLOEModel.set_classes)


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


def test_the_folder_for_what_was_measured_is_a_folder_of_the_users() -> None:
    assert USER_CONFIG_DIR.is_dir()
    assert datasets.MEMORY == USER_CONFIG_DIR / "yolo-prune"


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


def test_a_warm_up_sets_how_often_to_step_before_the_batch_is_prepared() -> None:
    source = inspect.getsource(BaseTrainer._do_train)
    order = ["on_train_batch_start", "self.accumulate = max(", "self.preprocess_batch(", ">= self.accumulate:"]
    places = [source.index(text) for text in order]
    assert places == sorted(places)


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


def test_trainer_overrides_these_and_they_do_what_it_builds_on() -> None:
    save = inspect.getsource(BaseTrainer.save_model)
    assert save.count("self.last.write_bytes(") == save.count("self.best.write_bytes(") == 1
    assert 'f"epoch{self.epoch}.pt").write_bytes(' in save
    final = inspect.getsource(BaseTrainer.final_eval)
    assert final.count("strip_optimizer(") == 2
    assert engine.strip_optimizer is torch_utils.strip_optimizer
    assert list(inspect.signature(torch_utils.strip_optimizer).parameters) == ["f", "s", "updates"]
    setup = inspect.getsource(BaseTrainer._setup_train)
    assert setup.index("self.resume_training(ckpt)") < setup.index('"on_pretrain_routine_end"')
    resumed = inspect.getsource(BaseTrainer.resume_training)
    assert "assert 0 < start_epoch < self.epochs" in resumed
    scheduler = inspect.getsource(BaseTrainer._setup_scheduler)
    assert "LambdaLR(self.optimizer, lr_lambda=self.lf)" in scheduler
    assert inspect.getsource(engine).count("LambdaLR(") == 1
    train = inspect.getsource(BaseTrainer._do_train)
    assert 'x["initial_lr"] * self.lf(epoch)' in train
    assert train.index("self.final_eval()") < train.index('"on_train_end"')
    assert "last_opt_step = -1" in train
    assert "if ni - last_opt_step >= self.accumulate:" in train
    assert "self.optimizer_step()" in train


def test_resume_draws_what_these_draw() -> None:
    loader = inspect.getsource(build.InfiniteDataLoader)
    assert {"def reset", "self.iterator = None"} <= {
        text for text in ("def reset", "self.iterator = None") if text in loader
    }
    assert "generator=generator" in inspect.getsource(build.build_dataloader)
    dataset = inspect.getsource(BaseDataset)
    for name in ("self.buffer", "self.max_buffer_length", "self.ims", "self.im_hw0", "self.im_hw"):
        assert name in dataset
    assert "self.dataset.buffer" in inspect.getsource(Mosaic.get_indexes)
    assert "epoch >= self.epochs - self.args.close_mosaic" in inspect.getsource(BaseTrainer._do_train)
    assert "nan_recovery_attempts" in inspect.getsource(BaseTrainer._handle_nan_recovery)
    state = inspect.getsource(BaseTrainer._load_checkpoint_state)
    assert "self.ema.updates" in state
    assert "self.optimizer.load_state_dict" in state


def test_the_live_trainer_finds_the_student_and_what_leads_to_the_teacher() -> None:
    source = inspect.getsource(DistillationModel)
    for name in (
        "self.student_model",
        "self.projector",
        "self.feats_idx",
        "self._teacher_feats",
        "self._student_feats",
    ):
        assert name in source
    assert "self.ema.teacher_model = None" in inspect.getsource(ModelEMA)


def test_live_wraps_as_the_trainer_does() -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(BaseTrainer._setup_train)))
    wraps = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and "DistributedDataParallel" in ast.unparse(n.func)]
    assert [keyword.arg or ast.unparse(keyword.value) for wrap in wraps for keyword in wrap.keywords] == [
        "device_ids",
        "find_unused_parameters",
        "ddp_kwargs",
    ]
    others = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert {"static_graph", "forward_sync_buffers", "broadcast_buffers"} <= others


def test_compat_finds_one_of_each() -> None:
    assert hasattr(tasks, "load_checkpoint")
    assert {"unwrap_model", "strip_qat"} <= set(dir(torch_utils))


def test_journal_adds_its_figures_before_the_trackers_read_them() -> None:
    source = inspect.getsource(BaseTrainer.__init__)
    assert source.index("self.callbacks = copy(_callbacks)") < source.index("add_integration_callbacks")
    train = inspect.getsource(BaseTrainer._do_train)
    assert train.index("self.save_metrics(") < train.index('"on_fit_epoch_end"')


def test_measuring_relies_on_these_names(tmp_path: Path) -> None:
    assert hasattr(checks, "AUTOINSTALL")  # which keeps it from installing packages
    YOLO("yolo11n.yaml").save(tmp_path / "model.pt")
    model = runtimes.AutoBackend(
        str(tmp_path / "model.pt"), device=torch.device("cpu"), fp16=False, verbose=False
    ).model
    assert isinstance(model, tasks.DetectionModel)
    assert LetterBox((64, 64), auto=False)(image=np.zeros((32, 48, 3), np.uint8)).shape == (64, 64, 3)


def test_journal_tells_arguments_from_defaults() -> None:
    assert {"model", "data", "imgsz", "epochs", "batch", "optimizer", "device", "plots"} <= DEFAULT_CFG_DICT.keys()


def test_quality_finds_ap_by_class() -> None:
    for name, part in (
        ("DetMetrics", "box"),
        ("SegmentMetrics", "seg"),
        ("PoseMetrics", "pose"),
        ("OBBMetrics", "box"),
    ):
        measured = getattr(metrics, name)(names={0: "a"})
        found = getattr(measured, part)
        assert measured.names == {0: "a"}
        assert len(found.ap_class_index) == len(found.ap) == 0
        assert found.map == found.map50 == 0


def test_evaluate_finds_outlines_in_results() -> None:
    image, names = np.zeros((8, 16, 3), np.uint8), {0: "a"}
    plain = Results(image, "", names, boxes=torch.tensor([[4.0, 2, 12, 6, 0.9, 0]]))
    assert (plain.masks, plain.keypoints, plain.obb) == (None, None, None)
    assert plain.boxes.xyxyn.tolist() == [[0.25, 0.25, 0.75, 0.75]]
    turned = Results(image, "", names, obb=torch.tensor([[8.0, 4, 8, 4, 0, 0.9, 0]]))
    assert turned.boxes is None
    assert turned.obb.xyxyxyxyn.shape == (1, 4, 2)
    mask = Results(image, "", names, boxes=plain.boxes.data, masks=torch.ones(1, 8, 16)).masks
    assert mask.xyn[0].shape[1] == 2
    dots = Results(image, "", names, boxes=plain.boxes.data, keypoints=torch.ones(1, 5, 3)).keypoints
    assert dots.xyn.shape == (1, 5, 2)


def test_timing_builds_engines_of_single_layers_with_this() -> None:
    engine = pytest.importorskip(
        "ultralytics.utils.export.engine", reason="releases before 8.4 build engines elsewhere"
    )
    assert {"onnx_file", "output_file", "quantize", "shape"} <= set(inspect.signature(engine.onnx2engine).parameters)


def test_a_model_is_saved_into_memory() -> None:
    buffer = io.BytesIO()
    YOLO("yolo11n.yaml").save(buffer)  # type: ignore[arg-type]
    assert isinstance(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)["model"], tasks.DetectionModel)


def test_an_export_is_named_after_the_path_of_the_model() -> None:
    source = inspect.getsource(Exporter.__call__)
    assert 'getattr(model, "pt_path", None) or getattr(model, "yaml_file", None)' in source
    assert "self.file = file" in source


def test_inputs_knows_what_a_run_writes_and_reads() -> None:
    assert 'self.wdir / f"epoch{self.epoch}.pt"' in inspect.getsource(BaseTrainer.save_model)
    assert set(inputs.READ) <= set(DEFAULT_CFG_DICT)
    source = inspect.getsource(BaseTrainer.__init__)
    assert 'YAML.save(self.save_dir / "args.yaml", vars(self.args))' in source
    assert source.index("self.wdir.mkdir") < source.index("self.ddp =")


def test_terminal_finds_the_logger_without_an_import_of_ultralytics() -> None:
    assert logging.getLogger(terminal.LOGGING_NAME) is LOGGER
    assert any(type(handler) is logging.StreamHandler for handler in LOGGER.handlers)


def test_trained_finds_the_settings_of_a_training() -> None:
    assert trained.HELD == (*trained.JUDGING, *trained.LOSS)  # this release has all of them
    assert '"train_args": vars(self.args)' in inspect.getsource(BaseTrainer.save_model)
    assert DEFAULT_CFG_DICT["imgsz"] == trained.SIZE
    assert 'data["names"] = {0: "item"}' in inspect.getsource(BaseTrainer.get_dataset)  # with single_cls


def test_datasets_finds_labels_and_the_splits_of_classification(tmp_path: Path) -> None:
    """Labels are looked for in `labels`, each with `cls`; a classification without val is validated on test."""
    assert "self.labels = self.get_labels()" in inspect.getsource(BaseDataset.__init__)
    assert '"cls"' in inspect.getsource(BaseDataset.update_labels)
    assert "self.test_loader = self.get_dataloader(" in inspect.getsource(BaseTrainer)
    for split, name in (("train", "a"), ("test", "a")):
        (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / name / "0.png").write_bytes(b"")
    assert check_cls_dataset(str(tmp_path))["val"] is None
    assert check_cls_dataset(str(tmp_path), "val")["val"] == tmp_path / "test"
    (tmp_path / "valid").mkdir()
    assert check_cls_dataset(str(tmp_path), "val")["val"] == tmp_path / "valid"
    (tmp_path / "validation").mkdir()
    assert check_cls_dataset(str(tmp_path), "val")["val"] == tmp_path / "validation"


def test_datasets_finds_images_as_ultralytics_does() -> None:
    """A split is folders and text files; a missing dataset is not downloaded if that is not wanted."""
    source = inspect.getsource(BaseDataset.get_img_files)
    assert "recursive=True" in source
    assert 'encoding="utf-8-sig"' in source
    assert "autodownload" in inspect.signature(check_det_dataset).parameters
    assert "self.data[self.args.split]" in inspect.getsource(BaseTrainer)
    assert all(hasattr(DetectionTrainer, name) for name in ("get_dataset", "get_dataloader", "build_dataset"))


def test_releases_converts_datasets_as_trainer_and_validator_do() -> None:
    assert list(inspect.signature(convert_ndjson_to_yolo_if_needed).parameters) == ["data", "fraction", "split"]
    for source in (inspect.getsource(BaseTrainer.get_dataset), inspect.getsource(BaseValidator.__call__)):
        assert "convert_ndjson_to_yolo_if_needed(" in source
        assert "self.args.fraction, split=self.args.split" in " ".join(source.split())


def test_trained_knows_which_settings_a_validation_reads() -> None:
    """One number in `fraction` is for training images; masks are read in segmentation only."""
    assert [get_split_fraction(0.5, split) for split in trained.SPLITS] == [0.5, 1.0, 1.0]
    assert [get_split_fraction([0.5, 0.2], split) for split in trained.SPLITS] == [0.5, 0.2, 1.0]


# What criteria/importances.py provides to the classes of torch-pruning, and docs/reference/criteria.md says of them.
IMPORTANCES = {
    "GroupMagnitudeImportance._reduce": "6e278a6c33da",
    "GroupMagnitudeImportance._normalize": "403b9161db5b",
    "GroupTaylorImportance.__call__": "c59b28646f72",
    "GroupHessianImportance.__call__": "f5c4e89791f0",  # with an empty `_accu_grad`, it reads `weight.grad`
    "OBDCImportance.__call__": "124643fb153f",  # it looks into `Fisher` once per item
    "ActivationImportance.__call__": "39088a770d5e",  # it reads `layer._importance`
}


@pytest.mark.parametrize("name", IMPORTANCES)
def test_criteria_importances_was_written_for_this_torch_pruning(name: str) -> None:
    function = functools.reduce(getattr, name.split("."), importance)
    assert fingerprint(function) == IMPORTANCES[name], f"{name} changed: check criteria/importances.py and its docs"


def test_graph_pruning_group_makes_items_of_torch_pruning() -> None:
    assert list(inspect.signature(Dependency).parameters) == ["trigger", "handler", "source", "target"]
    assert list(inspect.signature(Node).parameters) == ["module", "grad_fn", "name"]
