"""Many models on many runtimes: what is compared with what, failures as rows, and the output gate."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from onnxcompress.benchmark import MatrixResult, benchmark_models
from onnxcompress.benchmark.extras import resized
from onnxcompress.benchmark.gate import check_runtime
from onnxcompress.benchmark.matrix import placed_nodes
from onnxcompress.data import open_data
from onnxcompress.environment import environment_warnings, frequency_governor, gpu_memory_used, gpus
from onnxcompress.errors import AccuracyError, RuntimeUnavailableError, UsageError
from onnxcompress.graph import InputSpec
from onnxcompress.report import matrix_report, print_matrix, to_json, write_samples
from onnxcompress.runtimes import NodePlacement
from onnxcompress.verify import OutputComparison

QUICK: dict[str, Any] = {"seconds": 0.2, "sessions": 6}


def write(path: Path, *, noise: float = 0.0, layers: int = 3, batch: str | int = "N", outputs: int = 4) -> Path:
    """Convolutions in a row and a mean over positions; ``noise`` is added to the weights."""
    generator, added = np.random.default_rng(0), np.random.default_rng(1)
    nodes, weights, previous = [], [], "x"
    for i in range(layers):
        last = i == layers - 1
        weight = generator.normal(scale=0.3, size=(outputs if last else 4, 4, 3, 3)).astype(np.float32)
        weight += added.normal(scale=noise, size=weight.shape).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{i}"))
        nodes.append(helper.make_node("Conv", [previous, f"w{i}"], [f"y{i}"], f"conv{i}", pads=[1, 1, 1, 1]))
        previous = f"y{i}"
    nodes.append(helper.make_node("GlobalAveragePool", [previous], ["pooled"], "pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["y"], "flatten"))
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, outputs])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def samples(count: int = 4) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(2).random((count, 4, 8, 8), np.float32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("matrix")
    write(path / "a.onnx")
    write(path / "close.onnx", noise=0.005)
    write(path / "other.onnx", noise=1.0)
    write(path / "wider.onnx", outputs=5)
    return path


@pytest.fixture(scope="module")
def run(folder: Path) -> Callable[..., MatrixResult]:
    def made(names: Sequence[str], **options: Any) -> MatrixResult:
        data = options.pop("data", samples())
        return benchmark_models([folder / f"{name}.onnx" for name in names], data, **{**QUICK, **options})

    return made


@pytest.fixture(scope="module")
def two_runtimes(run: Callable[..., MatrixResult]) -> MatrixResult:
    """Two models on two runtimes, which are one with different options."""
    return run(["a", "close"], runtimes=["onnxruntime:cpu", "onnxruntime:cpu,optimization=disabled"], trace=True)


def kinds(result: MatrixResult) -> list[tuple[str, int, int]]:
    return [(c.kind, c.reference, c.candidate) for c in result.comparisons]


def test_what_is_compared_with_what(two_runtimes: MatrixResult) -> None:
    assert [(v.model, v.runtime) for v in two_runtimes.variants] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert kinds(two_runtimes) == [
        ("noise", 0, 0),
        ("model", 0, 1),
        ("noise", 2, 2),
        ("runtime", 0, 2),
        ("model", 2, 3),
    ]
    for variant in two_runtimes.variants:
        assert variant.failure is None
        assert variant.timing is not None
        assert variant.trace is not None
        assert {placed.provider for placed in variant.placement} == {"CPUExecutionProvider"}
        assert variant.placement[0].macs == two_runtimes.models[0].macs > 0
    disabled = two_runtimes.variants[2].trace
    assert disabled is not None
    assert disabled.by_operator().keys() == {"Conv", "GlobalAveragePool", "Flatten"}
    best = two_runtimes.best()
    assert best is not None
    assert best.timing is not None
    assert best.timing.median_s == min(v.timing.median_s for v in two_runtimes.variants if v.timing is not None)


def test_traces_are_printed_operator_by_operator(two_runtimes: MatrixResult) -> None:
    console = Console(file=StringIO(), width=200)
    print_matrix(console, two_runtimes)
    assert isinstance(console.file, StringIO)
    lines = console.file.getvalue().splitlines()
    begin = next(i for i, line in enumerate(lines) if "time per operator" in line)
    (pool,) = [line.split() for line in lines[begin:] if line.split()[:1] == ["GlobalAveragePool"]]
    assert len(pool) == 1 + 2 * 4, "a time and its unit for each of four variants"


def test_outputs_are_held_against_the_same_and_the_first_model(two_runtimes: MatrixResult) -> None:
    same, first = two_runtimes.variants[3].outputs[0], two_runtimes.variants[3].against_first[0]
    assert same.sqnr_db > 100, "the unoptimised runtime is the reference itself"
    assert 10 < first.sqnr_db < 60
    assert two_runtimes.variants[2].against_first[0].sqnr_db > 100


def test_the_report_is_plain_and_complete(two_runtimes: MatrixResult) -> None:
    report = json.loads(to_json(matrix_report(two_runtimes)), parse_constant=pytest.fail)
    assert report["schema"] == 1
    assert report["kind"] == "benchmark"
    assert [model["name"] for model in report["models"]] == ["a.onnx", "close.onnx"]
    assert [runtime["facts"]["precision"] for runtime in report["runtimes"]] == ["float32", "float32"]
    assert report["runtimes"][1]["facts"]["options"]["optimization"] == "disabled"
    assert len(report["variants"]) == 4
    assert report["variants"][1]["label"] == "close.onnx on onnxruntime:cpu"
    assert sum(report["variants"][0]["timing"]["histogram_counts"]) == report["variants"][0]["timing"]["runs"]
    assert len(report["variants"][0]["trace"]["by_operator"])
    assert report["comparisons"][1]["low"] <= report["comparisons"][1]["ratio"] <= report["comparisons"][1]["high"]
    assert "ratio" not in report, "there is no one comparison"


def test_a_runtime_that_is_missing_is_a_row_with_its_reason(run: Callable[..., MatrixResult]) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    result = run(["a", "close"], runtimes=["onnxruntime:cuda", "onnxruntime:cpu"])
    assert [v.failure is None for v in result.variants] == [False, False, True, True]
    failure = result.variants[0].failure
    assert failure is not None
    assert failure.exit_code == 6
    assert isinstance(failure.raised(), RuntimeUnavailableError)
    assert result.variants[0].timing is None
    assert result.facts[0] is None
    assert kinds(result) == [("noise", 2, 2), ("model", 2, 3)], "nothing is compared with what did not run"
    console = Console(file=StringIO(), width=160)
    print_matrix(console, result)
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert "not timed: a.onnx on onnxruntime:cuda: onnxruntime:cuda was asked for" in text
    assert "noise floor: a.onnx on onnxruntime:cpu against itself" in text


def test_models_that_compute_something_else_are_not_timed(run: Callable[..., MatrixResult]) -> None:
    result = run(["a", "other", "wider", "close"])
    assert [v.failure is None for v in result.variants] == [True, False, False, True]
    messages = [v.failure.message for v in result.variants if v.failure is not None]
    assert "other.onnx does not compute what a.onnx computes: output 'y' has" in messages[0]
    assert "--no-output-check" in messages[0]
    assert "shape [1, 4]" in messages[1]
    assert kinds(result) == [("noise", 0, 0), ("model", 0, 3)]


def test_they_are_timed_where_that_is_asked_for_and_told(run: Callable[..., MatrixResult]) -> None:
    result = run(["a", "other", "wider"], output_check=False, noise_floor=False)
    assert kinds(result) == [("model", 0, 1), ("model", 0, 2)]
    assert not [v for v in result.variants if v.failure is not None]
    assert any("outputs were not checked" in warning for warning in result.warnings)


def test_one_model_is_timed_against_itself(run: Callable[..., MatrixResult]) -> None:
    result = run(["a"], noise_floor=False)
    assert kinds(result) == [("noise", 0, 0)]
    assert result.variants[0].timing is not None


def test_two_models_alone_are_reported_as_one_comparison(run: Callable[..., MatrixResult], tmp_path: Path) -> None:
    result = run(["a", "close"], noise_floor=False)
    console = Console(file=StringIO(), width=160)
    print_matrix(console, result)
    assert isinstance(console.file, StringIO)
    assert re.search(r"output y of B: SQNR \d+\.\d dB to A's", console.file.getvalue())
    report = json.loads(to_json(matrix_report(result)))
    assert report["ratio"] == report["comparisons"][0]["ratio"]
    assert report["candidate"]["median_s"] == report["variants"][1]["timing"]["median_s"]
    write_samples(tmp_path / "samples.npz", result)
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as saved:
        assert set(saved) == {"0/reference_ns", "0/candidate_ns", "0/session_log_ratios"}
        assert np.median(saved["0/candidate_ns"]) / 1e9 == pytest.approx(report["candidate"]["median_s"])
        np.testing.assert_allclose(np.exp(saved["0/session_log_ratios"]), report["session_ratios"])


def test_workers_give_the_same_answers(run: Callable[..., MatrixResult]) -> None:
    here = run(["a", "close"], noise_floor=False)
    there = run(["a", "close"], noise_floor=False, isolate=True, cold_starts=1)
    console = Console(file=StringIO(), width=160)
    print_matrix(console, there)
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert "A: a.onnx, B: close.onnx; batch" in text
    assert re.search(r"cold start of A: [\d.]+ m?s, peak memory [\d.]+ .B\n", text)
    assert "cold start of B: " in text
    assert there.isolated
    assert not here.isolated
    assert there.variants[1].against_first == here.variants[1].against_first
    start = there.variants[1].cold_start
    assert start is not None
    assert start.total_s > 0


def test_throughput_grows_with_the_batch_or_says_why_not(run: Callable[..., MatrixResult], folder: Path) -> None:
    free = run(["a"], batches=[1, 8], thread_counts=[1], throughput_seconds=0.2)
    rates = [figure.samples_per_second for figure in free.variants[0].throughput]
    assert [figure.batch for figure in free.variants[0].throughput] == [1, 8]
    assert all(rate is not None and rate > 0 for rate in rates)
    write(folder / "fixed.onnx", batch=2)
    fixed = run(["fixed"], batches=[2, 3], throughput_seconds=0.1)
    assert fixed.variants[0].throughput[0].samples_per_second
    assert fixed.variants[0].throughput[1].reason == "input 'x' has a fixed batch of 2"


def test_openvino_beside_onnxruntime(run: Callable[..., MatrixResult]) -> None:
    pytest.importorskip("openvino", reason="the second runtime needs the extra openvino")
    result = run(["a", "close"], runtimes=["onnxruntime:cpu", "openvino"], noise_floor=False, trace=True)
    assert [v.failure for v in result.variants] == [None] * 4
    facts = result.facts[1]
    assert facts is not None
    assert facts.precision == "float32"
    for variant in result.variants:
        assert variant.outputs[0].relative_l2 < 1e-5, "float32 on both"
        assert variant.trace is not None
        assert variant.trace.seconds > 0
    assert kinds(result) == [("model", 0, 1), ("runtime", 0, 2), ("model", 2, 3)]


def test_torch_beside_onnxruntime(run: Callable[..., MatrixResult]) -> None:
    pytest.importorskip("torch", reason="the executor needs the extra distill")
    runtimes = ["onnxruntime:cpu", "torch", "torch:cuda", "onnxruntime:cuda"]
    result = run(["a", "close"], runtimes=runtimes, noise_floor=False, trace=True)
    assert result.isolated == (result.facts[3] is not None), "only what is there can disturb"
    facts = result.facts[1]
    assert facts is not None
    assert facts.precision.startswith("float32")
    for variant in result.variants[:4]:
        assert variant.failure is None
        assert variant.outputs[0].relative_l2 < 1e-5
        assert variant.trace is not None
        assert variant.placement[0].macs == result.models[0].macs
    if result.facts[2] is None:
        assert {v.failure.exit_code for v in result.variants[4:6] if v.failure is not None} == {6}


def test_labels_give_a_metric(run: Callable[..., MatrixResult], folder: Path) -> None:
    specs = [InputSpec("x", np.dtype(np.float32), ("N", 4, 8, 8), False)]
    data = open_data({**samples(8), "labels": np.arange(8) % 4}, specs)
    result = run(["a", "close"], data=data, noise_floor=False)
    assert set(result.variants[0].metrics) >= {"top-1"}


def test_names_tell_models_apart(folder: Path, tmp_path: Path) -> None:
    copy = write(tmp_path / "a.onnx")
    result = benchmark_models([folder / "a.onnx", copy], samples(), **QUICK)
    assert [m.name for m in result.models] == [f"{folder.name}/a.onnx", f"{tmp_path.name}/a.onnx"]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a", "close", "a"], {}, "is given more than once"),
        (["a"], {"runtimes": ["onnxruntime", "onnxruntime:cpu"]}, "runtime 'onnxruntime:cpu' is given more than once"),
        (["a"], {"runtimes": ["tensorrt"]}, "unknown runtime"),
        ([], {}, "at least one model"),
    ],
)
def test_what_cannot_be_asked_for(
    run: Callable[..., MatrixResult], names: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(names, **options)


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def test_the_gate_of_a_runtime() -> None:
    close = OutputComparison("y", 0.1, 1e-2, 40.0, None)
    check_runtime([close], exact=False, where="r")
    with pytest.raises(AccuracyError, match=r"off by 0\.01 of its size"):
        check_runtime([close], exact=True, where="r")
    with pytest.raises(AccuracyError, match=r"has 5\.0 dB SQNR"):
        check_runtime([replace(close, sqnr_db=5.0)], exact=False, where="r")
    with pytest.raises(AccuracyError, match="NaN or infinity"):
        check_runtime([replace(close, nonfinite_mismatches=3)], exact=False, where="r")
    classes = OutputComparison("c", 0.0, 0.0, 0.0, None, equal_elements=0.8)
    check_runtime([classes], exact=False, where="r")
    with pytest.raises(AccuracyError, match="only 80 %"):
        check_runtime([classes], exact=True, where="r")


def test_nodes_are_placed_by_provider() -> None:
    nodes = [
        NodePlacement("c", "Conv", "CUDA"),
        NodePlacement("r", "Relu", "CUDA"),
        NodePlacement("g", "Gather", "CPU"),
    ]
    first, second = placed_nodes(nodes, {"c": 100})
    assert (first.provider, first.nodes, first.macs, dict(first.operators)) == ("CUDA", 2, 100, {"Conv": 1, "Relu": 1})
    assert (second.provider, second.nodes, second.macs) == ("CPU", 1, 0)


def test_feeds_are_resized_by_repeating() -> None:
    specs = [
        InputSpec("x", np.dtype(np.float32), ("N", 2), False),
        InputSpec("scalar", np.dtype(np.float32), (), False),
    ]
    found = resized({"x": np.arange(6).reshape(3, 2)}, specs, 4)
    np.testing.assert_array_equal(found["x"], [[0, 1], [2, 3], [4, 5], [0, 1]])
    with pytest.raises(UsageError, match="scalar"):
        resized({"scalar": np.float32(1)}, specs, 2)  # type: ignore[dict-item]


def test_warnings_that_matter() -> None:
    quiet = {"usable_cores": 4, "load_1min": 0.1, "cpu_quota": None, "governor": "performance", "int8": True}
    assert environment_warnings(quiet, threads=4, integer=True) == []
    for change, threads, words in (
        ({"load_1min": 3.0}, 1, "the load was 3 on 4 cores"),
        ({}, 8, "8 threads on 4 cores"),
        ({"cpu_quota": 1.5}, 2, "2 threads may use 1.5 cores"),
        ({"cpu_quota": 1.5}, 0, "4 threads may use 1.5 cores"),
        ({"governor": "powersave"}, 1, "governor powersave"),
        ({"int8": False}, 1, "no VNNI"),
    ):
        (found,) = environment_warnings({**quiet, **change}, threads=threads, integer=True)
        assert words in found
    assert environment_warnings({**quiet, "int8": False}, threads=1, integer=False) == []


def test_facts_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert frequency_governor(tmp_path) is None
    for number, name in enumerate(("powersave", "performance")):
        file = tmp_path / f"cpu{number}" / "cpufreq" / "scaling_governor"
        file.parent.mkdir(parents=True)
        file.write_text(f"{name}\n")
    assert frequency_governor(tmp_path) == "performance, powersave"
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, NVIDIA H100 80GB HBM3, 570.1, 81559'\necho 'no GPU line'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpus() == [{"index": 0, "name": "NVIDIA H100 80GB HBM3", "driver": "570.1", "memory_mib": 81559}]
    program.write_text("#!/bin/sh\necho 1024\n")
    assert gpu_memory_used(0) == 1 << 30
    program.write_text("#!/bin/sh\nexit 9\n")
    assert gpus() == []
    assert gpu_memory_used(0) is None
