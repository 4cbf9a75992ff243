# SPDX-License-Identifier: AGPL-3.0-or-later
"""Times single layers in a runtime: probes (small models of a layer) are exported and run like whole models."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yolo_prune.data.calibration import Progress
from yolo_prune.env import outputs
from yolo_prune.errors import BenchError
from yolo_prune.latency.fit import LayerTime
from yolo_prune.latency.layers import COPIES, Layer
from yolo_prune.measure import clock, runtimes
from yolo_prune.measure.quiet import quietly
from yolo_prune.measure.runtimes import Session
from yolo_prune.measure.subjects import Setting

SECONDS = 0.15
"""Time for the rounds of one layer, all its widths together; at least `clock.LEAST` rounds are run.

This value is a choice: `clock.LEAST` rounds of eight widths of 2 ms each. The least time counts, so only one of the
rounds has to be without disturbance. With the exports, the layers of a YOLO11n take half a minute (see docs/).
"""
OPSET = 17
"""ONNX opset of the exports. All supported torch releases can write it; later opsets have the same convolutions."""


def time_layers(
    layers: Sequence[Layer], format: str, setting: Setting, progress: Progress
) -> dict[str, list[LayerTime]]:
    """Time layers, each at several widths.

    Args:
        layers: the layers.
        format: a format name from `runtimes.parse`.
        setting: batch, device, threads and precision.
        progress: wraps the layers to show a progress bar.

    Returns:
        `{key of a layer: [(input channels, output channels, milliseconds), ...]}`.

    Raises:
        BenchError: If a layer cannot be exported or run.
    """
    return {layer.key: _time(layer, format, setting) for layer in progress(layers)}


def _time(layer: Layer, format: str, setting: Setting) -> list[LayerTime]:
    widths = layer.widths()
    with outputs.scratch() as folder:
        with quietly(f"The export of a layer ({layer.key}) to {format}"):
            sessions = [_open(layer.at(*pair), format, setting, Path(folder) / str(i)) for i, pair in enumerate(widths)]
        if setting.device.type == "cpu":
            torch.set_num_threads(setting.threads)
        runs = [session.run for session in sessions]
        each = clock.warm_up(runs, seconds=0.02)
        rounds = clock.rounds_for(each, SECONDS)
        times = clock.interleave(runs, range(rounds))
    # The minimum, because other work of the machine can only make a time longer.
    return [(*pair, 1000 * min(layer_times) / COPIES) for pair, layer_times in zip(widths, times, strict=True)]


def _open(layer: Layer, format: str, setting: Setting, folder: Path) -> Session:
    """Export the probe of a layer and load it into a runtime, together with its input."""
    model, x = layer.probe(setting.batch)
    half = setting.quantize == 16 and setting.device.type != "cpu"
    model, x = model.to(setting.device), x.to(setting.device)
    if half:
        model, x = model.half(), x.half()
    folder.mkdir()
    if format == "torch":
        session: Session = runtimes.Torch(model, setting.device, half)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one = x[: runtimes.batch_of(format, setting.batch)]
            path = EXPORTERS[format](model, one, folder, setting)
        session = runtimes.open_session(format, path, setting.device, setting.threads, setting.quantize)
    session.prepare(x.float().cpu().numpy())
    return session


def _torchscript(model: nn.Module, x: Tensor, folder: Path, setting: Setting) -> Path:
    path = folder / "layer.torchscript"
    torch.jit.trace(model, x).save(str(path))  # type: ignore[no-untyped-call]
    return path


def _onnx(model: nn.Module, x: Tensor, folder: Path, setting: Setting) -> Path:
    path = folder / "layer.onnx"
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["output0"], "opset_version": OPSET}
    torch.onnx.export(model, (x,), str(path), dynamo=False, **names)
    if setting.quantize == 16 and setting.device.type == "cpu":  # as Ultralytics does; on a GPU the model is half
        onnx: Any = importlib.import_module("onnx")
        half: Any = importlib.import_module("onnxruntime.transformers.float16")
        onnx.save(half.convert_float_to_float16(onnx.load(str(path))), str(path))
    return path


def _openvino(model: nn.Module, x: Tensor, folder: Path, setting: Setting) -> Path:
    ov: Any = importlib.import_module("openvino")
    path = folder / "layer.xml"
    converted = ov.convert_model(model, example_input=x, input=[tuple(x.shape)])
    ov.save_model(converted, str(path), compress_to_fp16=setting.quantize == 16)
    return path


def _ncnn(model: nn.Module, x: Tensor, folder: Path, setting: Setting) -> Path:
    pnnx: Any = importlib.import_module("pnnx")
    path = folder / "layer.ncnn.param"
    files = {"ncnnparam": path.name, "ncnnbin": "layer.ncnn.bin", "ncnnpy": "ncnn.py", "ptpath": "layer.pt"}
    files |= {f"pnnx{kind}": f"pnnx.{kind}" for kind in ("param", "bin", "py", "onnx")}
    places = {key: str(folder / name) for key, name in files.items()}
    pnnx.export(model, inputs=x, **places, fp16=setting.quantize == 16, device="cpu")
    return path


def _engine(model: nn.Module, x: Tensor, folder: Path, setting: Setting) -> Path:
    try:
        build = importlib.import_module("ultralytics.utils.export.engine").onnx2engine
    except (ImportError, AttributeError) as e:
        raise BenchError(
            "Timing layers in TensorRT needs a newer Ultralytics than the installed one: pip install -U ultralytics"
        ) from e
    path = folder / "layer.engine"
    quantize = 16 if setting.quantize == 16 else None
    build(str(_onnx(model.float(), x.float(), folder, setting)), path, quantize=quantize, shape=tuple(x.shape))
    return path


EXPORTERS = {
    "torchscript": _torchscript,
    "onnx": _onnx,
    "openvino": _openvino,
    "ncnn": _ncnn,
    "engine": _engine,
}
