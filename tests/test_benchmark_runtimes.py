"""The scripts behind the figures of runtimes: architectures as published, and a table that tells what failed."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from onnxcompress.demo import demo_model_path
from onnxcompress.inspect_model import total_macs
from onnxcompress.proto import from_proto
from onnxcompress.session import Session
from onnxcompress.shapes import graph_stats

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """A script as a module; it and what lies beside it are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    # torchvision's counts; BatchNormalization is folded here, which leaves one bias a channel of its four vectors
    [("mobilenetv2", 3.504872e6, 0.300774e9), ("resnet50", 25.557032e6, 4.089184e9)],
)
def test_architectures_are_those_that_were_published(
    script: Callable[[str], ModuleType], name: str, parameters: float, macs: float
) -> None:
    architectures = script("architectures")
    model = architectures.build(name)
    graph = from_proto(model)
    assert graph_stats(graph).parameters == pytest.approx(parameters, rel=0.006)
    assert total_macs(graph) == pytest.approx(macs, rel=1e-5)
    outputs = Session(model).run(architectures.feeds(name, 2))["logits"]
    assert outputs.shape == (2, 1000)
    assert 0.1 < outputs.std() < 10, "activations keep their size"
    assert model.SerializeToString() == architectures.build(name).SerializeToString()


def test_tokens_look_like_real_ones(script: Callable[[str], ModuleType]) -> None:
    feeds = script("architectures").feeds("bert_base", 4)
    assert {array.shape for array in feeds.values()} == {(4, 128)}
    assert ((feeds["input_ids"] > 0) == (feeds["attention_mask"] == 1)).all()
    assert (np.diff(feeds["attention_mask"], axis=1) <= 0).all(), "padding comes last"


def test_the_table_tells_what_was_not_timed(script: Callable[[str], ModuleType]) -> None:
    facts: dict[str, Any] = {
        "models": {
            "a": {
                "rows": [
                    {"runtime": "r", "file": "fp32", "median_s": 0.001},
                    {
                        "runtime": "r",
                        "file": "int8",
                        "median_s": 0.0005,
                        "ratio": 2.0,
                        "low": 1.9,
                        "high": 2.1,
                        "of": "x",
                    },
                    {"runtime": "q", "file": "fp32", "failure": "the reason"},
                ],
                "errors": {
                    "r, fp32": {"sqnr_db": None, "agreement": 1.0},
                    "r, int8": {"sqnr_db": 31.2, "agreement": 0.9},
                },
            },
            "b": {"skipped": "no cases"},
        }
    }
    lines = script("runtimes").markdown(facts).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| a")]
    assert cells[0] == ["a", "r", "fp32", "1 ms", "", "", "equal", "100.0 %"]
    assert cells[1] == ["a", "r", "int8", "0.5 ms", "2.00 [1.90, 2.10]", "x", "31.2", "90.0 %"]
    assert cells[2][3] == "not timed"
    assert "a, fp32 on q: the reason" in lines
    assert "b: not measured: no cases" in lines


def test_targets_of_trials(script: Callable[[str], ModuleType]) -> None:
    targets = script("aa").targets
    found = {"repetitions": 200, "covers_1": 184, "half_width_median": 0.02, "verdicts": {"SLOWER": 190}}
    assert [t["passed"] for t in targets(found, 0.0)] == [True, True]
    assert [t["passed"] for t in targets({**found, "covers_1": 183, "half_width_median": 0.021}, 0.0)] == [False, False]
    assert [t["passed"] for t in targets(found, 5.0)] == [True]
    assert [t["passed"] for t in targets({**found, "verdicts": {"SLOWER": 189}}, 5.0)] == [False]


@pytest.mark.slow
def test_trials_run_and_say_whether_they_pass() -> None:
    command = [sys.executable, str(BENCHMARKS / "aa.py"), "--trials", "2", "--seconds", "0.3", "--sessions", "6"]
    done = subprocess.run([*command, "--model", str(demo_model_path())], capture_output=True, text=True, check=False)
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["repetitions"] == 2
    assert done.returncode == (not all(target["passed"] for target in facts["targets"]))
