"""The benchmark on real sessions: equal models, a clearly slower one, and everything that it reports and refuses."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxcompress.benchmark import BenchmarkResult, benchmark
from onnxcompress.benchmark.runners import LocalRunner, Started
from onnxcompress.demo import demo_calibration, demo_model_path
from onnxcompress.environment import cpu_flags, cpu_quota, describe_environment, has_int8_dot_product
from onnxcompress.errors import DataError, ModelError, UsageError
from onnxcompress.session import Session


def convolutions(count: int, *, name: str = "x", batch: str | int = "N", channels: int = 8) -> onnx.ModelProto:
    """``count`` 3x3 convolutions in a row on (batch, channels, 16, 16)."""
    generator = np.random.default_rng(0)
    nodes, weights, previous = [], [], name
    for i in range(count):
        weight = generator.normal(scale=0.1, size=(channels, channels, 3, 3)).astype(np.float32)
        weights.append(onnx.numpy_helper.from_array(weight, f"w{i}"))
        nodes.append(helper.make_node("Conv", [previous, f"w{i}"], [f"y{i}"], pads=[1, 1, 1, 1]))
        previous = f"y{i}"
    shape = [batch, channels, 16, 16]
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(previous, TensorProto.FLOAT, shape)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def samples(count: int = 4, *, name: str = "x") -> dict[str, np.ndarray]:
    return {name: np.random.default_rng(1).random((count, 8, 16, 16), np.float32)}


@pytest.fixture(scope="module")
def slower() -> BenchmarkResult:
    """A candidate with four times the work."""
    return benchmark(convolutions(2), convolutions(8), samples(), seconds=1.0, sessions=6)


def test_equal_models_are_the_same() -> None:
    """A fixed candidate of right answers: never FASTER by what matters, and nowhere near the 4x of the test below."""
    model = demo_model_path()
    result = benchmark(model, model, demo_calibration(), seconds=3.0)
    assert 0.95 < result.ratio < 1.05
    assert result.low <= result.ratio <= result.high
    assert result.low < 1.02
    assert result.high > 0.98


def test_more_work_is_slower(slower: BenchmarkResult) -> None:
    assert slower.verdict == "SLOWER"
    assert slower.high < 0.6
    assert slower.low <= slower.ratio <= slower.high
    assert slower.reference.median_s < slower.candidate.median_s


def test_less_work_is_faster() -> None:
    result = benchmark(convolutions(8), convolutions(2), samples(), seconds=1.0, sessions=6)
    assert result.verdict == "FASTER"
    assert result.low > 1.6


def test_result_counts_and_sizes(slower: BenchmarkResult) -> None:
    assert slower.sessions == len(slower.session_ratios) >= 6
    assert slower.pairs % 2 == 0
    assert slower.pairs >= 4 * slower.sessions
    for timing, model in ((slower.reference, convolutions(2)), (slower.candidate, convolutions(8))):
        assert timing.runs == slower.pairs * slower.runs_per_sample
        assert timing.bytes_on_disk == model.ByteSize()
        assert timing.session_creation_s > 0
        assert timing.first_run_s > 0
        assert timing.p50_s == timing.median_s
        assert timing.p90_s is not None
        assert timing.p90_s >= timing.p50_s
    assert slower.reference.median_s * slower.runs_per_sample >= 0.5 * 200e-6


def test_short_runs_share_a_sample() -> None:
    """A model of a few microseconds: one run a sample would measure the clock and the call."""
    result = benchmark(convolutions(1), convolutions(1), samples(1), seconds=0.5, sessions=6)
    assert result.runs_per_sample > 1
    assert result.reference.runs == result.pairs * result.runs_per_sample


def test_result_is_json(slower: BenchmarkResult) -> None:
    content = json.loads(json.dumps(slower.to_dict()))
    assert content["verdict"] == "SLOWER"
    assert len(content["session_ratios"]) == slower.sessions
    assert content["environment"]["versions"]["numpy"] == np.__version__
    assert content["candidate"]["median_s"] == slower.candidate.median_s


def test_file_size_counts_external_data(tmp_path: Path) -> None:
    onnx.save(convolutions(2), tmp_path / "inside.onnx")
    onnx.save(
        convolutions(2), tmp_path / "outside.onnx", save_as_external_data=True, location="weights", size_threshold=0
    )
    result = benchmark(tmp_path / "inside.onnx", tmp_path / "outside.onnx", samples(), seconds=0.2, sessions=6)
    assert result.reference.bytes_on_disk == (tmp_path / "inside.onnx").stat().st_size
    parts = [tmp_path / "outside.onnx", tmp_path / "weights"]
    assert result.candidate.bytes_on_disk == sum(part.stat().st_size for part in parts)


def test_one_sample_a_run_unless_the_model_or_the_caller_says_otherwise() -> None:
    """Timed by the work: sixteen samples take several times as long as one."""
    one, fixed, free = convolutions(4), convolutions(4, batch=16), convolutions(4)
    single = benchmark(one, one, samples(16), seconds=0.2, sessions=6)
    demanded = benchmark(fixed, fixed, samples(16), seconds=0.2, sessions=6)
    given = benchmark(free, free, samples(16), seconds=0.2, sessions=6, batch=None)
    assert demanded.reference.median_s > 4 * single.reference.median_s
    assert given.reference.median_s > 4 * single.reference.median_s


def test_different_inputs_are_refused() -> None:
    with pytest.raises(UsageError, match=r"different inputs, x and image"):
        benchmark(convolutions(1), convolutions(1, name="image"), samples())


def test_data_must_fit() -> None:
    with pytest.raises(DataError):
        benchmark(convolutions(1), convolutions(1), samples(name="other"))
    with pytest.raises(ModelError, match="cannot run"):
        benchmark(convolutions(1), convolutions(1, batch=7), samples(4))


@pytest.mark.parametrize("options", [{"sessions": 5}, {"seconds": 0.0}, {"seconds": float("nan")}, {"threads": -1}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        benchmark(convolutions(1), convolutions(1), samples(), **options)  # type: ignore[arg-type]


def test_progress_is_paused_and_garbage_collection_comes_back() -> None:
    class Watcher:
        paused_for: list[bool] = []

        @contextmanager
        def paused(self) -> Iterator[None]:
            enabled = gc.isenabled()
            yield
            self.paused_for.append(enabled and gc.isenabled())

        def track(self, items: object, description: str, total: int | None = None) -> object:
            raise AssertionError("nothing is drawn while time is measured")

    watcher = Watcher()
    benchmark(convolutions(1), convolutions(1), samples(), seconds=0.1, sessions=6, progress=watcher)  # type: ignore[arg-type]
    assert watcher.paused_for == [True]
    assert gc.isenabled()


def test_bound_run_gives_what_run_gives() -> None:
    session = Session(convolutions(2))
    feeds = samples(1)
    [bound] = session.bind(feeds)()
    np.testing.assert_array_equal(bound, session.run(feeds)["y1"])


def test_environment_is_complete_and_json() -> None:
    environment = json.loads(json.dumps(describe_environment()))
    assert set(environment["versions"]) >= {"onnx", "numpy"}
    assert environment["cores"] >= environment["usable_cores"] >= 1
    assert environment["cpu"]


def test_cpu_flags_of_x86_and_arm(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni\n\nprocessor\t: 1\nflags\t\t: other\n")
    assert cpu_flags(file) == {"fpu", "avx2", "avx512_vnni"}
    file.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp\n")
    assert cpu_flags(file) == {"fp", "asimd", "asimddp"}
    assert cpu_flags(tmp_path / "missing") == frozenset()


def test_int8_dot_product() -> None:
    assert has_int8_dot_product(frozenset({"avx2"})) is False
    assert has_int8_dot_product(frozenset({"avx2", "avx_vnni"})) is True
    assert has_int8_dot_product(frozenset()) is None


def test_cpu_quota_of_both_kinds_of_control_group(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("250000\n")
    assert cpu_quota(tmp_path) == 2.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path) == 1.5


def test_large_models_are_timed_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sessions are never open at once, and the answer is the same."""
    monkeypatch.setattr(import_module("onnxcompress.benchmark.pairs"), "TOGETHER_BYTES", 0)
    open_now: set[int] = set()
    most: list[int] = []
    real_open, real_close = LocalRunner.open, LocalRunner.close

    def opening(self: LocalRunner) -> Started:
        started = real_open(self)
        open_now.add(id(self))
        most.append(len(open_now))
        return started

    def closing(self: LocalRunner) -> None:
        open_now.discard(id(self))
        real_close(self)

    monkeypatch.setattr(LocalRunner, "open", opening)
    monkeypatch.setattr(LocalRunner, "close", closing)
    result = benchmark(convolutions(2), convolutions(8), samples(), seconds=1.0, sessions=6)
    assert result.apart
    assert set(most) == {1}
    assert result.verdict == "SLOWER"
    assert result.low <= result.ratio <= result.high < 0.6
