# SPDX-License-Identifier: AGPL-3.0-or-later
"""Every architecture that Ultralytics ships, built from its YAML at its smallest scale, and what feeds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import ultralytics
from torch import Tensor, nn
from ultralytics.cfg import get_cfg
from ultralytics.nn import tasks

CONFIGURATIONS = Path(ultralytics.__file__).parent / "cfg/models"
NAMES = sorted(p.stem for p in CONFIGURATIONS.rglob("*.yaml"))
NC = 3
CLASSES = {
    "detect": "DetectionModel",
    "segment": "SegmentationModel",
    "semantic": "SemanticSegmentationModel",
    "depth": "DepthModel",
    "pose": "PoseModel",
    "obb": "OBBModel",
    "classify": "ClassificationModel",
}
MODELS: dict[str, type[Any]] = {task: getattr(tasks, name) for task, name in CLASSES.items() if hasattr(tasks, name)}
"""Early releases lack some of them. This package is not imported here: this file is also used where it is missing."""


def task_of(name: str) -> str:
    """The task of an architecture."""
    if "rtdetr" in name:
        return "detect"
    return str(tasks.guess_model_task(tasks.yaml_model_load(f"{name}.yaml")))


def model_class(name: str) -> type[Any]:
    """The class of an architecture's models."""
    if "rtdetr" in name:
        return tasks.RTDETRDetectionModel
    if "yoloe" in name:
        return tasks.YOLOESegModel if name.endswith("seg") else tasks.YOLOEModel
    return tasks.WorldModel if "world" in name else MODELS[task_of(name)]


def configuration(name: str, width: float | None = None) -> dict[str, Any]:
    """What the YAML file says; backbones that would be downloaded start untrained.

    Args:
        name: without `.yaml`.
        width: at most this width multiple, for a quick model.
    """
    config: dict[str, Any] = tasks.yaml_model_load(f"{name}.yaml")
    for layer in config["backbone"]:
        if layer[2] == "TorchVision":
            layer[3] = [None if a == "DEFAULT" else a for a in layer[3]]
    if width is not None and "v9e" not in name:  # whose auxiliary branch has widths of its own
        scales = config.get("scales") or {"n": [config.get("depth_multiple", 1.0), 1.0, 1024]}
        depth, wide, most = (
            next(iter(scales.values())) if config.get("scale") not in scales else scales[config["scale"]]
        )
        config |= {"scales": {"n": [depth, min(wide, width), most]}, "scale": "n"}
    return config


def build(name: str, width: float | None = None, seed: int = 0) -> Any:
    """An untrained model with three classes, with the attributes that training gives it."""
    torch.manual_seed(seed)
    model = model_class(name)(configuration(name, width), nc=NC, verbose=False)
    model.args, model.task, model.nc = get_cfg(), task_of(name), NC
    if "yoloe" in name:
        model.model[-1].nc = NC  # as set_classes does
        model.pe = nn.functional.normalize(torch.randn(1, NC, 512), dim=-1)
    return model


def image_size(name: str) -> int:
    """Pixels that are enough for an architecture; YOLO-World pools to 3 x 3, which ONNX wants to divide its input."""
    return 128 if "p6" in name else 96 if name == "yolov8-world" else 64


@torch.no_grad()
def randomise(model: Any, seed: int = 0) -> Any:
    """Draw every tensor anew, zero-initialised ones included, so that a value says where in its tensor it came from.

    Scaled so that signals neither fade nor blow up; the box distribution is left alone.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=torch.float64) * (high - low) + low

    def normal(like: Tensor, std: float) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64) * std

    for name, layer in model.named_modules():
        if ".dfl" in name:
            continue
        own = dict(layer.named_parameters(recurse=False))
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.copy_(normal(layer.running_mean, 0.1))
            layer.running_var.copy_(uniform(layer.running_var, 0.5, 1.5))
        for key, tensor in own.items():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.LayerNorm):
                tensor.copy_(uniform(tensor, 0.5, 1.5) if key == "weight" else normal(tensor, 0.2))
            elif tensor.ndim > 1:
                fan = tensor[0].numel() if not isinstance(layer, nn.ConvTranspose2d) else tensor.shape[0]
                tensor.copy_(normal(tensor, (2 / max(fan, 1)) ** 0.5))
            else:
                tensor.copy_(normal(tensor, 0.5))
    return model


def images(model: nn.Module, name: str, count: int = 2, seed: int = 0) -> Tensor:
    """`(count, 3, height, width)` in the model's dtype: not square, so that height is not taken for width."""
    generator = torch.Generator().manual_seed(seed)
    size = image_size(name)
    dtype = next(model.parameters()).dtype
    width = size * 2 if size == 96 else size * 3 // 2
    return torch.rand(count, 3, size, width, generator=generator).to(dtype)


def batch(model: Any, name: str, count: int = 2) -> dict[str, Any]:
    """A made-up training batch for the task's own loss: one object an image."""
    generator = torch.Generator().manual_seed(1)
    img = images(model, name, count, seed=1)
    height, width = img.shape[2:]
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.6], [0.4, 0.6, 0.7, 0.5]])[:count]
    task = task_of(name)
    found: dict[str, Any] = {
        "img": img,
        "batch_idx": torch.arange(count).float(),
        "cls": torch.zeros(count, 1),
        "bboxes": boxes,
    }
    if task == "classify":
        found["cls"] = torch.arange(count) % NC
    elif task == "obb":
        found["bboxes"] = torch.cat((boxes, torch.full((count, 1), 0.3)), 1)
    elif task == "pose":
        found["keypoints"] = torch.cat(
            (torch.rand(count, *model.kpt_shape[:1], 2, generator=generator), torch.full((count, 17, 1), 2.0)), 2
        )
    elif task == "segment":
        masks = torch.zeros(count, height // 4, width // 4)
        masks[:, 4:10, 6:16] = 1
        found |= {"masks": masks, "sem_masks": masks.long()}
    elif task == "semantic":
        found["semantic_mask"] = torch.randint(0, NC, (count, height, width), generator=generator)
    elif task == "depth":
        found["depth"] = torch.rand(count, height, width, generator=generator) * 5 + 0.5
    if "world" in name or "yoloe" in name:
        found["txt_feats"] = torch.nn.functional.normalize(torch.randn(count, NC, 512, generator=generator), dim=-1)
    return found


def outputs(out: Any) -> list[Tensor]:
    """What a model returns, as tensors in a fixed order; feature maps that ride along are left out."""
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, dict):
        return [t for key in sorted(out) if key != "feats" for t in outputs(out[key])]
    return [t for item in out for t in outputs(item)] if isinstance(out, list | tuple) else []


def decoded(model: Any, image: Tensor) -> list[Tensor]:
    """What is used in deployment."""
    with torch.no_grad():
        out = model(image)
    return outputs(out[0] if isinstance(out, tuple) else out)


def relative(wanted: list[Tensor], got: list[Tensor]) -> float:
    """Largest difference relative to the largest value.

    Where only the best rows are put out, one in twenty may be another: scores tie, one is just in, another just out.
    """
    assert [w.shape for w in wanted] == [g.shape for g in got], "another shape"
    worst = 0.0
    for w, g in zip(wanted, got, strict=True):
        w, g = w.double(), g.double()
        assert w.std() > 0, "the output does not vary"
        best = w.ndim == 3 and w.shape[-1] in (6, 7, 57, 38)
        gap = (w.sort(1).values - g.sort(1).values if best else w - g).abs() / w.abs().max()
        worst = max(worst, float(gap.quantile(0.95) if best else gap.max()))
    return worst
