# SPDX-License-Identifier: AGPL-3.0-or-later
"""`yolo-prune bench` and `yolo_prune.parity`: real exports of small models, and all that can be wrong before that."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tampering
import torch
from small_data import IMGSZ, tiny
from ultralytics import RTDETR, YOLO, utils
from ultralytics.utils import checks

import yolo_prune
from yolo_prune import cli
from yolo_prune.env.image_size import Rectangle
from yolo_prune.errors import BenchError, ParityError
from yolo_prune.measure import clock, exporter, parity_check, runtimes, subjects
from yolo_prune.measure.validation import at_size
from yolo_prune.planning.planner import present_cost
from yolo_prune.report.measurement import Measurement

CPU = torch.device("cpu")


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dense.pt`, `cut.pt` of half its FLOPs, and the dataset `scenes`."""
    here = tiny(tmp_path_factory.mktemp("bench"), train=4)
    model = YOLO(here / "dense.pt")
    plan = yolo_prune.plan(model, imgsz=IMGSZ, **{"criterion": "magnitude", "channels.round_to": 2, "channels.min": 4})
    yolo_prune.apply(model, plan)
    model.save(here / "cut.pt")
    return here


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warming up takes no second here."""
    warm_up = clock.warm_up
    monkeypatch.setattr(clock, "warm_up", lambda runs: warm_up(runs, seconds=0.0, least=1))
    monkeypatch.setattr(subjects, "busy", lambda: 0.0)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["bench", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model= is missing"),
        (["model=nowhere.pt", "format=torch"], "The model 'nowhere.pt' does not exist"),
        (["model=dense.onnx", "format=torch"], "'dense.onnx' is not a checkpoint. Pass the .pt file"),
        (["model=dense.pt", "format=opnvino"], "format=opnvino is not a known format. Did you mean 'openvino'?"),
        (["model=dense.pt", "format=coreml"], "Formats: torch, torchscript, onnx"),
        (["model=dense.pt", "fromat=onnx"], "Did you mean 'format'?"),
        (["model=dense.pt", "imgsz=100"], "imgsz=100: must be a multiple of 32"),
        (["model=dense.pt", "threads=0"], "threads=0: must be a whole number of at least 1"),
        (["model=dense.pt", "threads=9999"], "threads=9999: must be at most"),
        (["model=dense.pt", "repeats=many"], "repeats=many: must be a whole number"),
        (["model=dense.pt", "device=gpu"], "device=gpu: must be cpu, or the number of one NVIDIA GPU"),
        (["model=dense.pt", "quantize=4"], "quantize=4: must be 32, 16 (half precision) or 8"),
        (["model=dense.pt", "half=True", "quantize=8"], "half=True means quantize=16"),
        (["model=dense.pt", "half=yes"], "half=yes: must be True or False"),
        (["model=dense.pt", "save=bench.txt"], "the name must end in .json"),
        (
            ["model=dense.pt", "format=torchscript", "half=True"],
            "quantize=16 for cpu, only on a GPU. Pass one of these values: 32",
        ),
        (["model=dense.pt", "format=torch", "quantize=8"], "quantize=8 needs images for the calibration"),
    ],
)
def test_mistakes_are_told_before_any_work(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], clean_cwd: Path
) -> None:
    assert message in fails(capsys, *arguments)
    assert list(clean_cwd.iterdir()) == []


def test_without_a_gpu_engines_and_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "format=engine needs an NVIDIA GPU" in fails(capsys, "model=dense.pt", "format=torch,engine")
    assert "device=0 is not available: torch sees no GPUs" in fails(capsys, "model=dense.pt", "device=0")


def test_with_a_gpu_formats_of_the_cpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(BenchError, match=r"format=openvino runs on the CPU only\. Pass device=cpu"):
        runtimes.check(["openvino"], 32, torch.device("cuda", 0))
    with pytest.raises(BenchError, match=r"format=engine runs on a GPU only\. Pass device=0"):
        runtimes.check(["engine"], 32, CPU)


@pytest.mark.parametrize(
    ("format", "gone", "quantize", "install"),
    [
        ("onnx", "onnxruntime", 32, r"needs onnxruntime, .* pip install 'yolo-prune\[onnx\]'"),
        ("onnx", "onnxslim", 32, r"needs onnxslim, .* pip install 'yolo-prune\[onnx\]'"),
        ("openvino", "openvino", 32, r"pip install 'yolo-prune\[openvino\]'"),
        ("ncnn", "pnnx", 32, r"pip install 'yolo-prune\[ncnn\]'"),
        ("openvino", "nncf", 8, r"format=openvino needs nncf, not installed here\. Run: pip install nncf"),
    ],
)
def test_a_missing_runtime_is_named_with_what_installs_it(
    format: str, gone: str, quantize: int, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == gone else object())
    monkeypatch.setattr(subjects, "open_source", lambda source: pytest.fail("work was begun"))
    with pytest.raises(BenchError, match=install):
        yolo_prune.bench("dense.pt", format, quantize=quantize, data="x.yaml")


def test_formats_are_read_in_any_way_they_are_written() -> None:
    assert runtimes.parse("ONNX, trt,pt,onnx") == ["onnx", "engine", "torch"]
    assert runtimes.parse(["openvino", "ncnn"]) == ["openvino", "ncnn"]
    with pytest.raises(BenchError, match="format= is empty"):
        runtimes.parse(",")


def test_an_export_neither_talks_nor_installs(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "AUTOINSTALL", True)
    monkeypatch.setattr(utils, "AUTOINSTALL", True)
    with exporter.quietly("Something"):
        print("chatter")
        os.system("echo chatter of a program")
        assert (checks.AUTOINSTALL, utils.AUTOINSTALL) == (False, False)
    assert (checks.AUTOINSTALL, utils.AUTOINSTALL) == (True, True)
    print("afterwards")
    assert capfd.readouterr() == ("afterwards\n", "")

    def fail() -> None:
        with exporter.quietly("Something"):
            os.system("echo this is why")
            raise ValueError("it broke")

    with pytest.raises(BenchError, match=r"Something failed: ValueError: it broke\n  this is why"):
        fail()
    assert capfd.readouterr() == ("", "")


def test_what_other_threads_write_during_an_export_is_seen() -> None:
    script = """
import logging, os, sys, threading
from ultralytics.utils import LOGGER
from yolo_prune.measure.quiet import quietly

def speak(who):
    print(f"{who} prints", flush=True)
    print(f"{who} complains", file=sys.stderr, flush=True)
    LOGGER.info(f"{who} logs")

with quietly("The export"):
    speak("export")
    os.system("echo a program writes")
    other = threading.Thread(target=speak, args=("other",))
    other.start()
    other.join()
    late = sys.stdout
speak("afterwards")
print("late", file=late)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    said = ["other prints", "other logs", "afterwards prints", "afterwards logs", "late"]
    assert done.stdout.splitlines() == said
    assert [line for line in done.stderr.splitlines() if "complains" in line] == [
        "other complains",
        "afterwards complains",
    ]


@pytest.mark.parametrize("before", [None, "1"])
def test_an_export_leaves_the_gpus_to_the_run(
    before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Early:
        def export(self, **_: object) -> Path:
            os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # as Ultralytics 8.3 does on a CPU
            return tmp_path

    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    exporter.export(Early(), "onnx")  # type: ignore[arg-type]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


@needs("onnx", "onnxruntime", "onnxslim")
def test_bench_from_the_command_line(
    folder: Path, capsys: pytest.CaptureFixture[str], clean_cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(clock, "interleave", _spied(clock.interleave, sizes))
    models = f"model={folder / 'dense.pt'},{folder / 'cut.pt'}"
    rest = [f"imgsz={IMGSZ}", "threads=1", "repeats=8", "save=bench.json", f"data={folder / 'scenes/scenes.yaml'}"]
    assert cli.main(["bench", models, "format=torch,torchscript,onnx", *rest]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    found = Measurement.load("bench.json")
    assert str(found) in out
    assert "saved bench.json" in out
    assert sizes == [2, 2, 2]  # both models in one go, format by format
    assert [(r.format, r.model) for r in found.rows] == [
        (format, model) for format in ("torch", "torchscript", "onnx") for model in ("dense.pt", "cut.pt")
    ]
    assert found.threads == 1
    for row in found.rows:
        assert len(row.times_ms) == found.rounds[row.format] == 8
        assert row.median_ms > 0
        assert row.quartiles_ms[0] <= row.median_ms <= row.quartiles_ms[1]
    cut = found.row("cut.pt", "onnx")
    assert 0.4 < cut.flops_ratio <= 0.5
    assert cut.ratio == clock.paired_ratio(cut.times_ms, found.row("dense.pt", "onnx").times_ms).median
    assert 0 < cut.aligned < cut.convolutions
    assert cut.size_mb < found.row("dense.pt", "onnx").size_mb
    assert found.row("cut.pt", "torch").parity is None
    for format in ("torchscript", "onnx"):
        parity = found.row("cut.pt", format).parity
        assert parity.outputs < 1e-4
        assert parity.quality == pytest.approx(parity.quality_torch, abs=1e-3)
        assert parity.failures == []
    assert [p.name for p in clean_cwd.iterdir()] == ["bench.json"]
    assert not list(folder.glob("*.onnx"))


def _spied(interleave, sizes: list[int]):
    def spy(runs, rounds):
        sizes.append(len(runs))
        return interleave(runs, rounds)

    return spy


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime", reason="needs the export extra")
    source = tmp_path_factory.mktemp("exported") / "cut.pt"
    source.write_bytes((folder / "cut.pt").read_bytes())
    return exporter.export(YOLO(source), "onnx", imgsz=IMGSZ, device="cpu")


def test_parity_of_an_export(folder: Path, exported: Path) -> None:
    images = folder / "scenes/images/val"
    found = yolo_prune.parity(folder / "cut.pt", exported, images, imgsz=IMGSZ, confidence=0.0)
    assert found.images == 4
    assert found.outputs < 1e-4
    assert found.boxes < 0.01
    assert found.scores < 1e-4
    assert found.detections > 0
    array = np.random.default_rng(0).random((3, 3, IMGSZ, IMGSZ), dtype=np.float32)
    assert yolo_prune.parity(YOLO(folder / "cut.pt"), exported, array, imgsz=IMGSZ).images == 3


@needs("onnx", "onnxruntime", "onnxslim")
def test_rectangles_are_measured_and_compared(folder: Path, tmp_path: Path) -> None:
    data = folder / "scenes/scenes.yaml"
    found = yolo_prune.bench(
        folder / "cut.pt", "torchscript,onnx", imgsz=(64, 96), repeats=1, data=data, save=tmp_path / "bench.json"
    )
    for format in ("torchscript", "onnx"):
        parity = found.row("cut.pt", format).parity
        assert parity.outputs < 1e-3
        assert parity.quality == pytest.approx(parity.quality_torch, abs=1e-3)
    assert found.row("cut.pt", "onnx").flops == present_cost(YOLO(folder / "cut.pt").model, Rectangle(64, 96))[0]
    assert Measurement.load(tmp_path / "bench.json").imgsz == Rectangle(64, 96)
    assert str(found).startswith("imgsz 64,96, batch 1")


def test_a_checkpoint_is_validated_at_the_size_of_the_export(folder: Path) -> None:
    model, seen = YOLO(folder / "cut.pt"), []
    model.add_callback("on_val_batch_end", lambda v: seen.append(next(iter(v.dataloader))["img"].shape[2:]))
    for size in (IMGSZ, Rectangle(64, 96)):
        settings = {"rect": False, **at_size(model, size)}
        model.val(data=folder / "scenes/scenes.yaml", plots=False, workers=0, **settings)
    assert set(seen) == {(IMGSZ, IMGSZ), (64, 96)}


@needs("onnx", "onnxruntime", "onnxslim")
def test_parity_of_a_rectangular_export(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "cut.pt"
    source.write_bytes((folder / "cut.pt").read_bytes())
    exported = exporter.export(YOLO(source), "onnx", imgsz=[64, 96], device="cpu")
    images = folder / "scenes/images/val"
    for size in ((64, 96), "64,96"):
        found = yolo_prune.parity(source, exported, images, imgsz=size, confidence=0.0)
        assert found.outputs < 1e-3
        assert found.boxes < 0.01
    with pytest.raises(BenchError, match=r"images of shape \(1, 3, 96, 64\).*Pass the imgsz"):
        yolo_prune.parity(source, exported, images, imgsz=(96, 64))


def test_parity_sees_one_changed_number(folder: Path, exported: Path, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(exported)
    bias = next(t for t in model.graph.initializer if "cv3.0.2" in t.name and t.name.endswith("bias"))
    changed = onnx.numpy_helper.to_array(bias).copy()
    changed[0] += 0.1  # of one class at one scale
    bias.CopyFrom(onnx.numpy_helper.from_array(changed, bias.name))
    onnx.save(model, tmp_path / "cut.onnx")
    with pytest.raises(ParityError, match=r"cut\.onnx \(onnx\) does not agree .* differ by ") as e:
        yolo_prune.parity(
            folder / "cut.pt", tmp_path / "cut.onnx", folder / "scenes/images/val", imgsz=IMGSZ, confidence=0.0
        )
    assert e.value.measurement.outputs > 1e-3


@needs("onnx", "onnxruntime", "onnxslim")
def test_bench_fails_where_an_export_computes_something_else(
    folder: Path, capsys: pytest.CaptureFixture[str], clean_cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tampering.install(monkeypatch)
    monkeypatch.setattr(parity_check, "validate", lambda *_: None)
    arguments = [f"model={folder / 'cut.pt'}", f"imgsz={IMGSZ}", "repeats=2", "save=bench.json"]
    assert cli.main(["bench", *arguments, f"data={folder / 'scenes/scenes.yaml'}"]) == 1
    out, err = capsys.readouterr()
    assert "cut.pt as onnx (fp32): " in err
    assert "differ by" in err
    assert "FAILS" in out
    assert Measurement.load("bench.json").rows[0].parity.failures


def test_parity_says_what_it_cannot_compare(folder: Path, exported: Path, tmp_path: Path) -> None:
    images = folder / "scenes/images/val"
    with pytest.raises(BenchError, match=r"cannot run images of shape \(1, 3, 96, 96\).*imgsz and the batch"):
        yolo_prune.parity(folder / "cut.pt", exported, images, imgsz=96)
    with pytest.raises(BenchError, match=r"'nothing\.onnx' does not exist"):
        yolo_prune.parity(folder / "cut.pt", "nothing.onnx", images)
    with pytest.raises(BenchError, match="is not an export that can be compared"):
        yolo_prune.parity(folder / "cut.pt", folder / "dense.pt", images)
    with pytest.raises(yolo_prune.PruneError, match="there are none"):
        yolo_prune.parity(folder / "cut.pt", exported, tmp_path, imgsz=IMGSZ)
    (tmp_path / "broken.onnx").write_bytes(exported.read_bytes()[:5000])
    with pytest.raises(BenchError, match=r"Loading 'broken\.onnx' as onnx failed"):
        yolo_prune.parity(folder / "cut.pt", tmp_path / "broken.onnx", images, imgsz=IMGSZ)


def test_alignment_counts_convolutions_of_a_graph(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the export extra")
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 1),
        torch.nn.Conv2d(16, 16, 3, groups=16),  # depthwise: 16 to 16
        torch.nn.Conv2d(16, 12, 1),
        torch.nn.ConvTranspose2d(12, 24, 2),
        torch.nn.Conv2d(24, 8, 1),
    )
    shapes = [m.weight.detach().numpy() for m in net]
    nodes, initializers = [], []
    for index, (module, weight) in enumerate(zip(net, shapes, strict=True)):
        kind = "ConvTranspose" if isinstance(module, torch.nn.ConvTranspose2d) else "Conv"
        initializers.append(onnx.numpy_helper.from_array(weight, f"w{index}"))
        ends = [f"x{index}", f"w{index}"], [f"x{index + 1}"], f"conv{index}"
        nodes.append(onnx.helper.make_node(kind, *ends, group=module.groups))
    value = onnx.helper.make_tensor_value_info
    ends = [value("x0", 1, [1, 3, 8, 8])], [value("x5", 1, None)]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "net", *ends, initializers)), tmp_path / "net.onnx")
    found = yolo_prune.alignment(tmp_path / "net.onnx")
    assert (found.aligned, found.convolutions) == (2, 5)
    assert found.others == {"conv0": (3, 16), "conv2": (16, 12), "conv3": (12, 24)}
    assert yolo_prune.alignment(tmp_path / "net.onnx", multiple=4).others == {"conv0": (3, 16)}
    (tmp_path / "bad.onnx").write_bytes(b"no")
    with pytest.raises(BenchError, match=r"bad\.onnx' is not an ONNX model"):
        yolo_prune.alignment(tmp_path / "bad.onnx")


@pytest.mark.parametrize(
    ("format", "quantize"),
    [
        pytest.param("onnx", 16, marks=needs("onnx", "onnxruntime", "onnxslim")),
        pytest.param("onnx", 8, marks=needs("onnx", "onnxruntime", "onnxslim")),
        pytest.param("openvino", 32, marks=needs("openvino")),
        pytest.param("openvino", 16, marks=needs("openvino")),
        pytest.param("openvino", 8, marks=needs("openvino", "nncf")),
        pytest.param("ncnn", 32, marks=needs("ncnn", "pnnx")),
        pytest.param("ncnn", 16, marks=needs("ncnn", "pnnx")),
    ],
)
@pytest.mark.slow
def test_every_runtime_and_precision(format: str, quantize: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity_check, "validate", lambda *_: None)
    data = folder / "scenes/scenes.yaml"
    models = [folder / "dense.pt", folder / "cut.pt"]
    found = yolo_prune.bench(models, format, imgsz=IMGSZ, threads=1, repeats=3, quantize=quantize, data=data)
    assert [row.precision for row in found.rows] == [{32: "fp32", 16: "fp16", 8: "int8"}[quantize]] * 2
    assert all(row.parity.outputs is not None for row in found.rows)


@needs("ncnn", "pnnx")
def test_ncnn_runs_a_batch_one_image_after_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_for: list[int] = []

    def export(*_: object, batch: int, **__: object) -> Path:
        made_for.append(batch)
        assert batch == 1, "ncnn would crash, and this process with it"
        return stock(*_, batch=batch, **__)  # type: ignore[arg-type]

    stock = subjects.export
    monkeypatch.setattr(subjects, "export", export)
    data = folder / "scenes/scenes.yaml"
    found = yolo_prune.bench(folder / "cut.pt", "ncnn", imgsz=IMGSZ, threads=1, repeats=2, batch=2, data=data)
    assert made_for == [1]
    assert found.batch == 2
    assert found.rows[0].parity.images == 4
    assert found.rows[0].parity.quality is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("yolo26n", "yolo11n-pose"),
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("yolov10n", "yolo11n-seg", "yolo11n-obb", "yolo11n-cls", "rtdetr-l")
        ),
    ],
)
@needs("onnx", "onnxruntime", "onnxslim")
def test_other_heads_are_compared(name: str) -> None:
    torch.manual_seed(0)
    kind = RTDETR if "rtdetr" in name else YOLO
    with tempfile.TemporaryDirectory() as folder:
        kind(f"{name}.yaml").save(Path(folder) / f"{name}.pt")
        model = kind(Path(folder) / f"{name}.pt")
        path = exporter.export(model, "onnx", imgsz=IMGSZ, device="cpu")
        images = np.random.default_rng(0).random((2, 3, IMGSZ, IMGSZ), dtype=np.float32)
        found = yolo_prune.parity(model, path, images, imgsz=IMGSZ, confidence=0.0)
    assert found.failures == []
    assert (found.outputs is None) == ("rtdetr" in name)  # the order of its queries may differ


@pytest.mark.parametrize("batch", [1, 3])
@needs("onnx", "onnxruntime", "onnxslim")
def test_a_batch_is_what_the_export_is_made_for(batch: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity_check, "validate", lambda *_: None)
    data = folder / "scenes/scenes.yaml"
    found = yolo_prune.bench(folder / "cut.pt", "onnx", imgsz=IMGSZ, repeats=1, batch=batch, data=data)
    assert found.rows[0].parity.images == 4


def test_what_was_measured_is_kept_where_another_format_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(format: str, found: subjects.Subject, setting: subjects.Setting) -> Path:
        if format == "torch":
            return found.path
        raise BenchError("The export to torchscript failed: no luck")

    monkeypatch.setattr(subjects, "exported", broken)
    arguments = [f"model={folder / 'cut.pt'}", "format=torchscript,torch", f"imgsz={IMGSZ}", "repeats=1"]
    assert cli.main(["bench", *arguments]) == 1
    out, err = capsys.readouterr()
    assert "torch, fp32" in out
    assert "format=torchscript could not be measured: The export to torchscript failed: no luck" in err


def test_models_get_names_that_differ() -> None:
    assert subjects.names(["a/best.pt", "b/last.pt"]) == ["best.pt", "last.pt"]
    assert subjects.names(["a/best.pt", "b/best.pt"]) == ["a/best.pt", "b/best.pt"]
    assert subjects.names(["a/best.pt", "a/best.pt"]) == ["best.pt #1", "best.pt #2"]


def test_the_clock_and_the_tables_do_not_need_ultralytics() -> None:
    for name in ("yolo_prune.measure.clock", "yolo_prune.measure.differences", "yolo_prune.report.measurement"):
        assert "ultralytics" not in vars(sys.modules[name])


def test_a_quiet_export_leaves_no_handler_that_writes_to_a_closed_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    with exporter.quietly("The export"):
        logging.warning("of an exporter")  # as they do
        assert logging.root.handlers
    assert not logging.root.handlers
