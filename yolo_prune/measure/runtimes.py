# SPDX-License-Identifier: AGPL-3.0-or-later
"""The runtimes for exported models, with the settings of Ultralytics but without its pre- and postprocessing.

A session gets images once (`prepare`), runs on them any number of times (`run`, which is timed), and returns the
outputs of the last run (`outputs`).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from ultralytics.nn.autobackend import AutoBackend

from yolo_prune.env.releases import halves_onnx
from yolo_prune.errors import BenchError
from yolo_prune.measure.differences import Array


class Session(Protocol):
    """A model that is loaded into its runtime.

    Attributes:
        computed: precision of the arithmetic; None if the runtime does not report it.
    """

    computed: str | None

    def prepare(self, images: Array) -> None:
        """Copy float32 images `(n, channels, height, width)`, 0 to 1, to the inputs of the model."""

    def run(self) -> None:
        """Run one pass over the prepared images, and return when the outputs are ready."""

    def outputs(self) -> list[Array]:
        """All outputs of the last pass, in the order of the model."""


@dataclass(frozen=True)
class Format:
    """The requirements of a format.

    Attributes:
        modules: modules that have to be installed; the first one is the runtime.
        extra: the extra of this package that installs these modules.
        cpu: values of `quantize` on a CPU; empty if the format does not run on a CPU.
        gpu: values of `quantize` on a GPU; empty if the format does not run on a GPU.
    """

    modules: tuple[str, ...] = ()
    extra: str = ""
    cpu: tuple[int, ...] = ()
    gpu: tuple[int, ...] = ()


FORMATS = {
    "torch": Format(cpu=(32,), gpu=(32, 16)),
    "torchscript": Format(cpu=(32,), gpu=(32, 16)),
    "onnx": Format(("onnxruntime", "onnx", "onnxslim"), "onnx", (32, 16, 8), (32, 16, 8)),
    "openvino": Format(("openvino",), "openvino", (32, 16, 8)),
    "ncnn": Format(("ncnn", "pnnx"), "ncnn", (32, 16)),
    "engine": Format(("tensorrt", "onnx", "onnxslim"), "", gpu=(32, 16, 8)),
}
ALIASES = {"pt": "torch", "pytorch": "torch", "tensorrt": "engine", "trt": "engine", "onnxruntime": "onnx"}
SUFFIXES = {".pt": "torch", ".torchscript": "torchscript", ".onnx": "onnx", ".engine": "engine"}
CALIBRATION = {"openvino": ("nncf",)}
"""Additional modules for 8 bit exports."""


def parse(formats: str | Sequence[str]) -> list[str]:
    """Format names from a comma-separated string or a list, without duplicates.

    Raises:
        BenchError: If there is no name, or a name is unknown.
    """
    given = formats.split(",") if isinstance(formats, str) else list(formats)
    names = [name.strip().lower() for name in given if name.strip()]
    if not names:
        raise BenchError(f"format= is empty. Formats: {', '.join(FORMATS)}.")
    for name in names:
        if name not in FORMATS and name not in ALIASES:
            near = get_close_matches(name, [*FORMATS, *ALIASES])
            hint = f"Did you mean '{near[0]}'? " if near else ""
            raise BenchError(f"format={name} is not a known format. {hint}Formats: {', '.join(FORMATS)}.")
    return list(dict.fromkeys(ALIASES.get(name, name) for name in names))


def check(formats: Sequence[str], quantize: int, device: torch.device) -> None:
    """Check that every format can be exported and run here.

    Args:
        formats: format names from `parse`.
        quantize: 32, 16 or 8.
        device: the device on which the exports run.

    Raises:
        BenchError: For the first format that cannot; if a package is missing, the message says how to install it.
    """
    gpu = device.type != "cpu"
    for name in formats:
        requirements = FORMATS[name]
        if name == "engine" and not torch.cuda.is_available():
            raise BenchError("format=engine needs an NVIDIA GPU, but torch sees none. Leave engine out of format=.")
        here, there = (requirements.gpu, requirements.cpu) if gpu else (requirements.cpu, requirements.gpu)
        if not here:
            where = "on the CPU only. Pass device=cpu" if gpu else "on a GPU only. Pass device=0"
            raise BenchError(f"format={name} runs {where}, or leave {name} out of format=.")
        if name != "torch" and quantize not in here:
            other = f", only on {'the CPU' if gpu else 'a GPU'}" if quantize in there else ""
            bits = {32: "32 (the default)", 16: "16 (half)", 8: "8 (int8)"}
            raise BenchError(
                f"Ultralytics does not export format={name} with quantize={quantize} for {device}{other}. "
                f"Pass one of these values: {', '.join(bits[q] for q in here)}."
            )
        if name == "onnx" and quantize == 16 and not gpu and not halves_onnx():
            raise BenchError(
                "This Ultralytics exports format=onnx with quantize=16 on a GPU only. Install a newer release: pip "
                "install -U ultralytics"
            )
        extra = CALIBRATION.get(name, ()) if quantize == 8 else ()
        _installed(name, (*requirements.modules, *extra))
        if name == "onnx" and gpu and "CUDAExecutionProvider" not in _import("onnxruntime").get_available_providers():
            raise BenchError("The installed onnxruntime has no CUDA. Run: pip install onnxruntime-gpu")


def _installed(format: str, modules: Iterable[str]) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        extra = FORMATS[format].extra
        ours = bool(extra) and set(missing) <= set(FORMATS[format].modules)
        what = f"'yolo-prune[{extra}]'" if ours else " ".join(missing)
        raise BenchError(f"format={format} needs {', '.join(missing)}, not installed here. Run: pip install {what}")


def runtime(format: str) -> str:
    """Name and version of the runtime of a format."""
    module = (*FORMATS[format].modules, "torch")[0]
    try:
        version = metadata.version(module)
    except metadata.PackageNotFoundError:  # onnxruntime-gpu, tensorrt-cu12, ...
        version = str(getattr(_import(module), "__version__", ""))
    return f"{module} {version}".strip()


def batch_of(format: str, batch: int) -> int:
    """Batch size of an export. It is 1 for ncnn, which has no batches: its session runs images one after another."""
    return 1 if format == "ncnn" else batch


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Restore torch's number of threads and its random state, so that a measurement does not change a training."""
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


def open_session(format: str, path: Path, device: torch.device, threads: int, quantize: int = 32) -> Session:
    """Load a model into its runtime.

    Args:
        format: a format name from `parse`.
        path: path of the exported file or folder, or of the checkpoint.
        device: the device on which the model runs.
        threads: CPU threads of the runtime. For torch this is a setting of the whole process.
        quantize: 16 makes torch compute in half precision on a GPU.
    """
    if device.type == "cpu":
        torch.set_num_threads(threads)
    if format == "torch":
        half = quantize == 16 and device.type != "cpu"
        return Torch(_backend(path, device, half).eval().model, device, half)
    if format == "torchscript":
        importlib.import_module("torchvision")  # the file may contain its operators
        traced: Any = torch.jit.load(str(path), map_location=device)  # type: ignore[no-untyped-call]
        return Torch(traced.eval(), device, any(p.dtype == torch.float16 for p in traced.parameters()))
    if format == "engine":
        return Torch(_backend(path, device, half=False), device)
    if format == "openvino":
        return OpenVino(path, threads)
    return Ncnn(path, threads) if format == "ncnn" else OnnxRuntime(path, device, threads)


def _backend(path: Path, device: torch.device, half: bool) -> Any:
    """The backend of Ultralytics, with the same head that an export has by default."""
    takes = inspect.signature(AutoBackend.__init__).parameters
    head = {"end2end": False} if "end2end" in takes and path.suffix == ".pt" else {}
    return AutoBackend(str(path), device=device, fp16=half, verbose=False, **head)


class Torch:
    """A session in torch: a fused module (as in Ultralytics' prediction), a traced module, or a TensorRT engine."""

    computed: str | None = None

    def __init__(self, model: Any, device: torch.device, half: bool = False) -> None:
        self._model, self._device, self._half = model, device, half
        self._images = torch.empty(0)
        self._last: Any = None

    def prepare(self, images: Array) -> None:
        """See `Session`."""
        tensor = torch.from_numpy(images).to(self._device)
        self._images = tensor.half() if self._half else tensor

    def run(self) -> None:
        """See `Session`."""
        with torch.inference_mode():
            self._last = self._model(self._images)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def outputs(self) -> list[Array]:
        """See `Session`."""
        return [tensor.float().cpu().numpy() for tensor in _tensors(self._last)]


class OnnxRuntime:
    """A session in ONNX Runtime; on a GPU, inputs and outputs stay in GPU memory."""

    computed: str | None = None

    def __init__(self, path: Path, device: torch.device, threads: int) -> None:
        ort = _import("onnxruntime")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self._gpu = device.type != "cpu"
        if not self._gpu:
            options.intra_op_num_threads = threads
            # The waiting threads of a session must not use processor time while other sessions run.
            options.add_session_config_entry("session.force_spinning_stop", "1")
        providers: list[Any] = ["CPUExecutionProvider"]
        if self._gpu:
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        self._session = ort.InferenceSession(str(path), options, providers=providers)
        self._ort, self._device = ort, device
        self._input = self._session.get_inputs()[0]
        self._names = [output.name for output in self._session.get_outputs()]
        self._feed: dict[str, Array] = {}
        self._last: list[Array] = []

    def prepare(self, images: Array) -> None:
        """See `Session`."""
        images = np.ascontiguousarray(images, np.float16 if "float16" in self._input.type else np.float32)
        if not self._gpu:
            self._feed = {self._input.name: images}
            return
        index = self._device.index or 0
        self._binding = self._session.io_binding()
        there = self._ort.OrtValue.ortvalue_from_numpy(images, "cuda", index)
        self._binding.bind_ortvalue_input(self._input.name, there)
        for name in self._names:
            self._binding.bind_output(name, "cuda", index)

    def run(self) -> None:
        """See `Session`."""
        if self._gpu:
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
        else:
            self._last = self._session.run(self._names, self._feed)

    def outputs(self) -> list[Array]:
        """See `Session`."""
        last = self._binding.copy_outputs_to_cpu() if self._gpu else self._last
        return [np.asarray(array, np.float32) for array in last]


class OpenVino:
    """A session in OpenVINO on the CPU, with the hint for latency that Ultralytics uses."""

    def __init__(self, path: Path, threads: int) -> None:
        ov = _import("openvino")
        file = path if path.is_file() else next(path.glob("*.xml"))
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        self._model = ov.Core().compile_model(str(file), "CPU", settings)
        kind = self._model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self.computed: str | None = {"f32": "fp32", "f16": "fp16"}.get(kind, kind)
        self._images = np.empty(0, np.float32)
        self._last: Any = None

    def prepare(self, images: Array) -> None:
        """See `Session`."""
        self._images = images

    def run(self) -> None:
        """See `Session`."""
        self._last = self._model(self._images)

    def outputs(self) -> list[Array]:
        """See `Session`."""
        return [np.array(array, np.float32) for array in self._last.values()]


class Ncnn:
    """A session in ncnn on the CPU. ncnn has no batches: images run one after another."""

    computed: str | None = None

    def __init__(self, path: Path, threads: int) -> None:
        self._ncnn = _import("ncnn")
        file = path if path.is_file() else next(path.glob("*.param"))
        self._net = self._ncnn.Net()
        self._net.opt.use_vulkan_compute = False
        self._net.opt.num_threads = threads
        if self._net.load_param(str(file)) or self._net.load_model(str(file.with_suffix(".bin"))):
            raise BenchError(f"ncnn cannot load '{path}'. Export the model again.")
        self._input, self._names = self._net.input_names()[0], sorted(self._net.output_names())
        self._images: list[Any] = []
        self._last: list[list[Any]] = []

    def prepare(self, images: Array) -> None:
        """See `Session`."""
        self._kept = np.ascontiguousarray(images)  # the matrices below share its memory
        self._images = [self._ncnn.Mat(image) for image in self._kept]

    def run(self) -> None:
        """See `Session`."""
        self._last = [self._one(image) for image in self._images]

    def _one(self, image: Any) -> list[Any]:
        with self._net.create_extractor() as extractor:
            extractor.input(self._input, image)
            return [extractor.extract(name)[1] for name in self._names]

    def outputs(self) -> list[Array]:
        """See `Session`."""
        return [np.stack([np.array(mat) for mat in mats]) for mats in zip(*self._last, strict=True)]


def _tensors(outputs: Any) -> Iterator[Tensor]:
    """The floating point tensors of nested outputs, in order."""
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, dict):
        for value in outputs.values():
            yield from _tensors(value)
    elif isinstance(outputs, list | tuple):
        for value in outputs:
            yield from _tensors(value)


def _import(name: str) -> Any:
    return importlib.import_module(name)
