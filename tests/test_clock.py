# SPDX-License-Identifier: AGPL-3.0-or-later
"""Timing models in turn, and what is concluded from it: on a clock that the test turns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from yolo_prune.errors import BenchError, ParityError, PruneError
from yolo_prune.measure import clock
from yolo_prune.report.measurement import TOLERANCES, Measurement, Parity, TimingRow, Tolerance, render


class Machine:
    """A clock, and models that take given times on it; keeps the order of the runs."""

    def __init__(self, **seconds: list[float]) -> None:
        self.now = 0.0
        self.order: list[str] = []
        self.seconds = seconds
        self.runs = [self._run(name) for name in seconds]

    def _run(self, name: str) -> clock.Pass:
        def run() -> None:
            self.now += self.seconds[name][self.order.count(name)]
            self.order.append(name)

        return run

    def clock(self) -> float:
        return self.now


def test_models_take_turns_and_each_gets_its_own_times() -> None:
    machine = Machine(dense=[4.0, 8.0, 16.0], pruned=[1.0, 2.0, 4.0])
    times = clock.interleave(machine.runs, range(3), clock=machine.clock)
    assert machine.order == ["dense", "pruned"] * 3
    assert times == [[4.0, 8.0, 16.0], [1.0, 2.0, 4.0]]


def test_a_machine_that_slows_down_does_not_change_the_ratio() -> None:
    slowing = [2.0**i for i in range(8)]
    found = clock.paired_ratio([0.5 * t for t in slowing], slowing)
    assert found == (0.5, 0.5, 0.5)


def test_the_interval_of_the_median_is_that_of_the_sign_test() -> None:
    ratios = [float(i) for i in range(20, 0, -1)]
    assert clock.paired_ratio(ratios, [1.0] * 20) == (10.5, 6.0, 15.0)  # the tables say 6th and 15th of 20
    assert clock.paired_ratio(ratios[:6], [1.0] * 6) == (17.5, 15.0, 20.0)
    assert clock.paired_ratio(ratios[:5], [1.0] * 5) == (18.0, 16.0, 20.0)  # too few: the extremes
    assert clock.paired_ratio([3.0], [2.0]) == (1.5, 1.5, 1.5)


def test_quartiles() -> None:
    assert clock.quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (3.0, 2.0, 4.0)
    assert clock.quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_warming_up_goes_on_for_long_enough_and_tells_a_usual_round() -> None:
    machine = Machine(a=[3.0] + [0.1] * 99, b=[2.0] + [0.15] * 99)
    assert clock.warm_up(machine.runs, seconds=6.0, least=3, clock=machine.clock) == pytest.approx(0.25)
    assert machine.order.count("a") == machine.order.count("b") == 5  # 5 s, then four times a quarter
    slow = Machine(a=[9.0] * 3)
    clock.warm_up(slow.runs, seconds=1.0, least=3, clock=slow.clock)
    assert slow.order == ["a"] * 3


@pytest.mark.parametrize(("seconds", "rounds"), [(1.0, 30), (60.0, 10), (0.001, 300), (0.0, 300)])
def test_rounds_fit_into_the_time_that_there_is(seconds: float, rounds: int) -> None:
    assert clock.rounds_for(seconds, 30.0) == rounds


def measured(parity: Parity | None = None) -> Measurement:
    row = {"format": "onnx", "precision": "fp32", "runtime": "onnxruntime 1.20", "times_ms": [4.0, 4.0],
           "quartiles_ms": (3.5, 4.5), "convolutions": 88, "aligned": 83}  # fmt: skip
    dense = TimingRow(model="dense.pt", flops=6e9, flops_ratio=1.0, median_ms=4.0, **row)
    cut = TimingRow(model="cut.pt", flops=3e9, flops_ratio=0.5, median_ms=2.5, params=2_000_000, **row)
    cut.ratio, cut.ratio_interval, cut.parity = 0.625, (0.6, 0.65), parity
    where = {"device": "cpu", "hardware": "A Processor", "cores": 4, "threads": 1, "busy": 2.0}
    return Measurement(imgsz=320, batch=1, rounds={"onnx": 2}, rows=[dense, cut], **where)


def test_the_table_holds_latency_beside_flops() -> None:
    lines = str(measured()).splitlines()
    assert lines[0].startswith("imgsz 320, batch 1, A Processor, 1 of 4 cores")
    assert "onnx, fp32, onnxruntime 1.20, 2 rounds" in lines
    cut = next(line for line in lines if line.startswith("cut.pt"))
    assert cut.split() == "cut.pt 2.50 3.50 - 4.50 0.625 0.600 - 0.650 0.500 3.00 2.00 - 83 of 88".split()
    assert "2.0 of 4 cores busy" in lines[-1]
    assert "against torch" not in render(measured())


def test_a_measurement_survives_json(tmp_path: Path) -> None:
    parity = Parity(
        images=4,
        precision="fp32",
        outputs=1e-7,
        boxes=None,
        quality=0.5,
        quality_torch=0.5,
        tolerance=TOLERANCES["fp32"],
    )
    found = measured(parity)
    path = found.save(tmp_path / "bench.json")
    assert Measurement.load(path) == found
    assert json.loads(path.read_text())["rows"][1]["parity"]["boxes"] is None
    path.write_text(path.read_text()[:-40])
    with pytest.raises(PruneError, match="not complete JSON"):
        Measurement.load(path)
    path.write_text('{"version": 1, "device": "cpu"}')
    with pytest.raises(PruneError, match="is not a measurement: hardware: Field required"):
        Measurement.load(path)
    with pytest.raises(PruneError, match="There is no measurement"):
        Measurement.load(tmp_path / "nowhere.json")


def test_an_export_beyond_the_tolerance_is_an_error_that_names_format_and_number() -> None:
    found = Parity(images=4, precision="fp32", outputs=9e-4, quality=0.501, quality_torch=0.5)
    found.tolerance = Tolerance(outputs=1e-3, quality=0.002)
    measured(found).check()
    found.outputs, found.quality = 0.25, 0.4
    off, said = measured(found), r"cut\.pt as onnx \(fp32\): raw outputs differ by 0\.25 .*; .*mAP differ by 0\.1 "
    with pytest.raises(ParityError, match=said) as e:
        off.check()
    assert e.value.measurement is off
    assert "FAILS" in str(off)


def test_outputs_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    found = measured(Parity(images=4, precision="fp32", finite=False))
    with pytest.raises(ParityError, match="outputs are not finite numbers"):
        Measurement.load(found.save(tmp_path / "bench.json")).check()


def test_a_format_that_could_not_be_measured_is_an_error_in_the_end() -> None:
    found = measured()
    found.failed["ncnn"] = "The export to ncnn failed"
    with pytest.raises(BenchError, match="format=ncnn could not be measured: The export to ncnn failed"):
        found.check()


def test_thousands_of_rounds_have_an_interval() -> None:
    ratios = [float(i) for i in range(1, 3001)]
    median, low, high = clock.paired_ratio(ratios, [1.0] * 3000)
    assert median == 1500.5
    assert (low, high) == (1446.0, 1554.0 + 1)  # the normal approximation: 1500 +- 1.96 * sqrt(3000) / 2
