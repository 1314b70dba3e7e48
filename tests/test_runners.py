"""Runners: a worker process answers what this process answers, tells its errors, and ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx  # noqa: F401  (numpy knows bfloat16 from it)
import pytest

from onnxcompress.benchmark.extras import cold_start
from onnxcompress.benchmark.pairs import Subject, compare_subjects
from onnxcompress.benchmark.runners import LocalRunner, Runner, WorkerRunner, make_runner, read_arrays, write_arrays
from onnxcompress.benchmark.worker import Worker, resident_memory
from onnxcompress.demo import demo_calibration, demo_model_path
from onnxcompress.errors import ModelError, OnnxCompressError, RuntimeUnavailableError, UsageError
from onnxcompress.runtimes import get_runtime

FEEDS = [{"input": demo_calibration()["input"][i : i + 1]} for i in range(2)]


@pytest.fixture(params=[False, True], ids=["local", "worker"])
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    made = make_runner(get_runtime("onnxruntime:cpu"), demo_model_path(), 1, isolated=request.param)
    made.feed(FEEDS)
    yield made
    made.end()


def test_a_runner_opens_times_runs_places_and_traces(runner: Runner) -> None:
    started = runner.open()
    assert 0 < started.first_run_s < 5
    assert 0 < started.creation_s < 5
    assert len(runner.sample(0, 3, settle=True)) == 3
    taken = runner.sample(1, 5)
    assert len(taken) == 5
    assert all(1_000 < nanoseconds < 5_000_000_000 for nanoseconds in taken)
    runner.close()
    expected = LocalRunner(get_runtime("onnxruntime:cpu"), demo_model_path(), 1).run(FEEDS[1])
    np.testing.assert_array_equal(runner.run(FEEDS[1])["logits"], expected["logits"])
    assert any(node.op == "Conv" for node in runner.placement())
    assert runner.trace(3).runs == 3


def test_errors_keep_their_kind(runner: Runner) -> None:
    with pytest.raises(ModelError, match="onnxruntime cannot run the model"):
        runner.run({"input": np.zeros((1, 3, 5, 5), np.float32)})
    runner.open()  # and it still answers


def test_a_worker_takes_bytes_and_measures_memory() -> None:
    worker = WorkerRunner("onnxruntime:cpu", demo_model_path().read_bytes(), 1)
    try:
        worker.feed(FEEDS)
        worker.open()
        memory = worker.memory()
        assert worker.load_s > 0
    finally:
        worker.end()
    if memory is not None:
        assert memory.peak > memory.before > 0
    with pytest.raises(RuntimeUnavailableError, match="has ended"):
        worker.open()
    worker.end()  # twice is once


def test_a_worker_that_cannot_start_says_why() -> None:
    with pytest.raises(UsageError, match="unknown runtime"):
        WorkerRunner("nothing", demo_model_path(), 1)


def test_a_worker_that_dies_is_an_error() -> None:
    worker = WorkerRunner("onnxruntime:cpu", demo_model_path(), 1)
    assert worker._process is not None
    os.kill(worker._process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeUnavailableError, match="ended with status -9 while it should open"):
        worker.open()
    worker.end()


def test_what_goes_wrong_in_a_worker_is_an_answer() -> None:
    worker = Worker()
    assert worker.answer({"do": "open"})["error"] == OnnxCompressError.__name__
    assert worker.answer({"do": "start", "spec": "x", "model": "", "threads": 1})["error"] == "UsageError"
    assert Worker().answer({"do": "memory"}) == {"before": None, "peak": None, "device": None}


def test_memory_is_none_where_the_system_does_not_tell(tmp_path: Path) -> None:
    assert resident_memory(tmp_path / "status") is None
    (tmp_path / "status").write_text("VmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\n")
    found = resident_memory(tmp_path / "status")
    assert found is not None
    assert (found.before, found.peak) == (1 << 20, 2 << 20)


def test_arrays_survive_files(tmp_path: Path) -> None:
    arrays = {
        "a/b:0": np.arange(6, dtype=np.int64).reshape(2, 3),
        "texts": np.array(["x", "zwölf"], dtype=np.object_),
        "half": np.ones((2, 2), np.float16),
        "brain": np.array([1.5, -2.0]).astype(np.dtype("bfloat16")),
    }
    write_arrays(tmp_path / "arrays.npz", arrays)
    found = read_arrays(tmp_path / "arrays.npz")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name].astype(array.dtype), array)
    assert found["brain"].dtype == arrays["brain"].dtype


def test_a_cold_start_is_measured_in_fresh_processes() -> None:
    start = cold_start("onnxruntime:cpu", demo_model_path(), FEEDS, 1, 2)
    assert start.processes == 2
    assert start.load_s > 0.001, "the module was imported"
    assert start.total_s == pytest.approx(start.load_s + start.session_creation_s + start.first_run_s)
    if start.peak_bytes is not None:
        assert 1e5 < start.peak_bytes < 1e9


class Recorder(LocalRunner):
    """A runner that remembers when it was asked for a sample, and whether the caches were to be filled before."""

    def __init__(self, log: list[tuple[float, bool]], lingers_s: float) -> None:
        super().__init__(get_runtime("onnxruntime:cpu"), demo_model_path(), 1)
        self.lingers_s = lingers_s
        self._log = log

    def sample(self, index: int, repeats: int, *, settle: bool = False) -> list[int]:
        self._log.append((time.perf_counter(), settle))
        return super().sample(index, repeats, settle=settle)


@pytest.mark.parametrize("lingers_s", [0.0, 0.02])
def test_samples_find_their_caches_and_wait_for_threads_that_linger(lingers_s: float) -> None:
    log: list[tuple[float, bool]] = []
    subjects = [Subject(Recorder(log, lingers_s), 1), Subject(Recorder(log, 0.0), 1)]
    for subject in subjects:
        subject.runner.feed(FEEDS)
    result, _ = compare_subjects(subjects[0], subjects[1], len(FEEDS), sessions=6, seconds=0.1)
    timed = [when for when, settle in log if settle]
    assert len(timed) == 2 * result.pairs
    gaps = np.diff([when for when, _ in log])[[settle for _, settle in log[1:]]]
    assert gaps.min() >= lingers_s


def test_threads_that_linger_are_known() -> None:
    for spec, one, two in (
        ("onnxruntime:cpu", 0.0, 0.0),
        ("onnxruntime:cpu,spinning=on", 0.0, 0.01),
        ("openvino", 0.0, 0.0),
        ("torch", 0.0, 0.01),
    ):
        assert get_runtime(spec).lingers(1) == one
        assert get_runtime(spec).lingers(2) == get_runtime(spec).lingers(0) == two
