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


def test_without_a_gpu_every_row_of_cuda_says_why(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    cuda = script("cuda")
    monkeypatch.setattr(cuda, "prepared", lambda name, folder: {"fp32": demo_model_path()})
    monkeypatch.setattr(cuda, "feeds", lambda name, samples, seed=0: np.zeros((samples, 1, 32, 32), np.float32))
    output = tmp_path / "cuda.json"
    words = ["cuda.py", "--models", str(tmp_path), "--only", "resnet50", "--batches", "1,8", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    cuda.main()
    rows = [row for found in json.loads(output.read_text())["models"].values() for row in found["rows"]]
    assert len(rows) == 4
    assert not [row for row in rows if "median_s" in row or "pip install" not in row["failure"]]
    assert (tmp_path / "cuda.md").read_text().count("Not timed: resnet50 fp32, batch 1, on onnxruntime:cuda") == 2


def test_targets_of_trials(script: Callable[[str], ModuleType]) -> None:
    targets = script("aa").targets
    found = {"repetitions": 200, "covers_1": 184, "half_width_median": 0.02, "verdicts": {"SLOWER": 190}}
    assert [t["passed"] for t in targets(found, 0.0)] == [True, True]
    assert [t["passed"] for t in targets({**found, "covers_1": 183, "half_width_median": 0.021}, 0.0)] == [False, False]
    assert [t["passed"] for t in targets(found, 5.0)] == [True]
    assert [t["passed"] for t in targets({**found, "verdicts": {"SLOWER": 189}}, 5.0)] == [False]


def trial(aa: ModuleType, seed: int, ratio: float, half: float) -> Any:
    verdict = "SLOWER" if ratio + half < 1 else "SAME"
    return aa.Trial(seed, ratio, ratio - half, ratio + half, verdict, 10, 100, 1.0, 0.0)


def test_intervals_that_promise_too_much_are_told(script: Callable[[str], ModuleType]) -> None:
    aa = script("aa")
    ratios = 1 + 0.01 * np.random.default_rng(0).standard_normal(400)
    honest = aa.summary([trial(aa, i, float(ratio), 0.0196) for i, ratio in enumerate(ratios)])
    assert honest["spread_over_claimed"] == pytest.approx(1, abs=0.1)
    assert honest["covers_1"] == pytest.approx(380, abs=10)
    narrow = aa.summary([trial(aa, i, float(ratio), 0.0098) for i, ratio in enumerate(ratios)])
    assert narrow["spread_over_claimed"] == pytest.approx(2, abs=0.2)
    drifting = np.sin(np.arange(40) / 4)
    assert aa.autocorrelation(drifting) > 0.8 > 0.3 > abs(aa.autocorrelation(ratios))
    assert aa.autocorrelation(np.zeros(40)) is None


@pytest.mark.slow
def test_trials_go_on_where_they_were_and_say_whether_they_pass(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    output = tmp_path / "aa.json"
    command = [sys.executable, str(BENCHMARKS / "aa.py"), "--seconds", "0.2", "--sessions", "6"]
    command += ["--model", str(demo_model_path()), "--output", str(output)]

    def run(*arguments: str) -> tuple[int, str, dict[str, Any]]:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        last = done.stdout.splitlines()[-1] if done.stdout else ""
        return done.returncode, done.stdout + done.stderr, json.loads(last) if last.startswith("{") else {}

    code, said, facts = run("--trials", "3", "--minutes", "0.0001")
    assert (code, facts["repetitions"]) == (1, 1), said
    assert "2 of 3 trials are left" in said
    code, said, facts = run("--trials", "2", "--update")
    assert facts["repetitions"] == 2
    assert code == (not all(target["passed"] for target in facts["targets"]))
    (kept,) = json.loads(output.read_text())["experiments"]
    assert [t["seed"] for t in kept["trials"]] == [0, 1]
    assert script("aa").markdown({"experiments": [kept]}).count("\n") == 2
    kept["environment"]["cpu"] = "another"
    output.write_text(json.dumps({"experiments": [kept]}))
    code, said, _ = run("--trials", "3", "--update")
    assert code == 1
    assert "differ in cpu; begin anew without --update" in said


def test_models_that_were_measured_the_same_way_are_not_measured_again(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runtimes = script("runtimes")
    output, asked = tmp_path / "runtimes.json", []

    def times(name: str, *_: Any) -> dict[str, Any]:
        asked.append(name)
        return {"rows": [{"runtime": "r", "file": "fp32", "median_s": 0.001}]}

    monkeypatch.setattr(runtimes, "times", times)
    monkeypatch.setattr(runtimes, "prepared", lambda name, folder: {"fp32": folder / f"{name}.onnx"})

    def run(*arguments: str) -> list[str]:
        asked.clear()
        words = ["runtimes.py", "--models", str(tmp_path), "--output", str(output), "--update", *arguments]
        monkeypatch.setattr(sys, "argv", words)
        runtimes.main()
        return list(asked)

    assert run("--only", "resnet50") == ["resnet50"]
    assert run("--only", "resnet50,bert_base") == ["bert_base"]
    assert run("--only", "resnet50", "--again") == ["resnet50"]
    assert list(json.loads(output.read_text())["models"]) == ["resnet50", "bert_base"]
    assert "| bert_base | r" in (tmp_path / "runtimes.md").read_text()
    assert run("--only", "resnet50", "--threads", "2") == ["resnet50"]
    assert list(json.loads(output.read_text())["models"]) == ["resnet50"], "one table, one way of measuring"
    with pytest.raises(SystemExit):
        run("--only", "resnet51")
