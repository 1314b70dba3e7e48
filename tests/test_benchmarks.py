"""The scripts in benchmarks/ run, merge what they measured earlier, and say what they miss."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def quantization(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module; it and what lies beside it are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module("quantization")
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


@pytest.mark.slow
def test_quantisers_are_compared_on_the_demo(tmp_path: Path) -> None:
    """Ours and ONNX Runtime's run as processes, are judged, and the results are merged with earlier ones."""
    output, work = tmp_path / "results.json", tmp_path / "work"
    options = ["--only", "demo", "--quick", "--no-times", "--output", str(output), "--work", str(work)]
    done = script("quantization.py", *options, "--tools", "onnxcompress,onnxruntime")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    tools = facts["details"]["cases"]["demo"]["tools"]
    assert list(tools) == [
        *("onnxcompress", "ORT min-max U8S8 pc", "ORT defaults (S8S8)", "ORT percentile U8S8 pc", "ORT entropy U8S8 pc")
    ]
    for record in tools.values():
        assert record["failure"] == ""
        assert record["version"] and record["date"] and record["seconds"] > 0
        assert 15 < record["sqnr_db"] < 60 and record["agreement"] > 0.97 and 0.2 < record["size"] < 0.4
        assert 0.03 < record["peak_gib"] < 2

    # A row of another tool stays, as it says when it was measured; a row of ours at another commit does not.
    stored = json.loads(output.read_text())
    kept = stored["details"]["cases"]["demo"]["tools"]
    kept["NNCF"] = kept["ORT defaults (S8S8)"] | {"tool": "nncf", "label": "NNCF", "failure": "it crashed"}
    kept["onnxcompress"]["revision"] = "another"
    output.write_text(json.dumps(stored))
    assert script("quantization.py", *options, "--update", "--tools", "onnxruntime").returncode == 0
    merged = json.loads(output.read_text())["details"]["cases"]["demo"]["tools"]
    assert list(merged) == [*list(tools)[1:], "NNCF"]

    printed = script("quantization.py", "--markdown", str(output))
    assert printed.returncode == 0
    assert "| ORT entropy U8S8 pc 1." in printed.stdout and "fails: it crashed" in printed.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "resnet"), "unknown part 'resnet'; expected some of resnet20,"),
        (("--tools", "openvino"), "unknown tool 'openvino'; expected some of onnxcompress,"),
        (("--peer", "nncf"), "expected NAME=PYTHON"),
        (("--peer", "nncf=/nowhere/python"), "there is no /nowhere/python"),
        (("--only", "demo", "--tools", "nncf"), "where is nncf? give --peer nncf=PYTHON"),
    ],
)
def test_what_was_mistyped_is_told(arguments: tuple[str, ...], message: str) -> None:
    done = script("quantization.py", *arguments)
    assert done.returncode != 0
    assert message in done.stderr


def test_a_tool_that_fails_is_a_row_with_its_reason(quantization: ModuleType, tmp_path: Path) -> None:
    tools: Any = importlib.import_module("tools")
    (model := tmp_path / "model.onnx").write_text("no model")
    found = tools.quantise("onnxruntime", tools.STATIC, sys.executable, model, tmp_path, tmp_path / "out.onnx")
    assert found.failure and "\n" not in found.failure
    assert quantization.tool_cells("demo", vars(found) | {"date": "today"})[2].startswith("fails: ")


def test_main_job_runs() -> None:
    done = script("main_job.py", "--only", "cli", "--quick")
    facts = json.loads(done.stdout.splitlines()[-1])
    assert [row["measure"] for row in facts["rows"]] == ["seconds of the whole process"]


def test_drivers_are_python_and_named_by_their_tool(quantization: ModuleType) -> None:
    drivers = {path.stem.removeprefix("run_"): path for path in (BENCHMARKS / "peers").glob("run_*.py")}
    tools: Any = importlib.import_module("tools")
    assert set(drivers) | {"onnxcompress"} == set(tools.TOOLS)
    for tool, path in drivers.items():
        source = path.read_text(encoding="utf-8")
        compile(source, str(path), "exec")
        assert all(f'"{variant.key}":' in source for variant in tools.TOOLS[tool].variants)


def conv(weight: np.ndarray) -> onnx.ModelProto:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale"], ["weight"], axis=0),
        helper.make_node("Conv", ["x", "weight"], ["y"]),
    ]
    values = {"w": weight, "scale": np.ones(len(weight), np.float32)}
    graph = helper.make_graph(
        nodes,
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, weight.shape[1], 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


@pytest.mark.parametrize(
    ("row", "pairs"), [((64, 64, 0), 0), ((65, 64, -128), 1), ((-64, -64, 127), 0), ((-65, -64, 127), 1), ((127,), 0)]
)
def test_pairs_that_saturate_are_counted(
    quantization: ModuleType, tmp_path: Path, row: tuple[int, ...], pairs: int
) -> None:
    weight = np.array([row, [0] * len(row)], np.int8).reshape(2, len(row), 1, 1)
    onnx.save(conv(weight), tmp_path / "conv.onnx")
    assert quantization.saturating_pairs(tmp_path / "conv.onnx") == (pairs, weight.size)
