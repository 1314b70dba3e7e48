"""Reports: strict JSON, tables that names from outside cannot disturb, files that are whole or absent."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from small_cnn import write_data, write_model

from onnxcompress.base import Refusal
from onnxcompress.compress import CompressResult, compress
from onnxcompress.errors import ResourceError, UsageError
from onnxcompress.inspect_model import PlannedNode, inspect_model
from onnxcompress.report import (
    comparison_report,
    compress_report,
    print_comparisons,
    print_compress,
    print_inspection,
    print_plan,
    print_warnings,
    printable,
    to_json,
    write_text,
)
from onnxcompress.verify import OutputComparison


@pytest.fixture
def console() -> Console:
    """A wide console that writes to memory, as the command line makes it."""
    return Console(file=io.StringIO(), width=160, markup=False, highlight=False, emoji=False)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> CompressResult:
    folder = tmp_path_factory.mktemp("report")
    return compress(
        write_model(folder / "model.onnx"),
        write_data(folder / "data.npz"),
        folder / "out.onnx",
        max_drop=100.0,
        benchmark_seconds=0.2,
    )


class Colour(Enum):
    RED = "red"


@dataclass
class Point:
    x: float
    path: Path


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.inf, None),
        (math.nan, None),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.arange(3), [0, 1, 2]),
        (Colour.RED, "red"),
        (Point(math.inf, Path("a/b")), {"x": None, "path": "a/b"}),
        ({1: (2, {"k": -math.inf})}, {"1": [2, {"k": None}]}),
        (np.dtype("float32"), "float32"),
    ],
    ids=repr,
)
def test_json_is_strict_and_plain(value: Any, expected: Any) -> None:
    assert json.loads(to_json(value), parse_constant=pytest.fail) == expected


def test_a_report_is_complete_and_plain(result: CompressResult) -> None:
    report = json.loads(to_json(compress_report(result)), parse_constant=pytest.fail)
    assert report["schema"] == 1
    assert report["model"]["sha256"] == result.source_sha256
    assert result.saved is not None
    assert report["output"]["bytes"] == result.saved.bytes
    assert report["benchmark"]["verdict"] in ("FASTER", "SLOWER", "SAME", "UNDECIDED")
    assert report["verification"]["source"] == "held-out"
    assert report["verification"]["fingerprint"]
    assert report["budget"]["met"] is True
    assert report["guarantee"] == "approximate"
    assert set(report["seconds"]) >= {"load", "data", "passes", "verify", "benchmark", "save"}
    folded = next(p for p in report["passes"] if p["name"] == "fold_batch_norm")
    assert folded["changes"][0]["node"]
    assert folded["after"]["nodes"] == folded["before"]["nodes"] - 1


def test_the_table_tells_what_matters(result: CompressResult, console: Console) -> None:
    print_compress(console, result)
    lines = {line.split("  ")[0].strip(): line for line in text(console).splitlines()}
    assert "x [" in lines["time, one thread"]
    assert "in brackets the 95 % interval" in text(console)
    assert "dB, agreement" in lines["output y"]
    assert "are Q or DQ, which fuse" in lines["nodes"]
    assert "held-out" in text(console)
    assert "integer in the runtime" in text(console)
    assert text(console).splitlines()[-1].startswith("written: ")


def test_equal_outputs_are_called_equal(console: Console) -> None:
    same = OutputComparison("y", 0.0, 0.0, math.inf, 1.0, score_rows=True)
    assert comparison_report(same)["equal"] is True
    broken = OutputComparison("z", math.inf, math.inf, -math.inf, None)
    assert comparison_report(broken)["equal"] is False
    print_comparisons(console, [same, broken])
    assert "equal" in text(console)
    assert text(console).count("100.00 %") == 1
    print_comparisons(console, [OutputComparison("states", 0.0, 0.0, math.inf, 1.0)])
    assert text(console).count("100.00 %") == 1, "no agreement where the output has no rows of class scores"


def test_names_from_outside_are_printed_as_they_are(console: Console) -> None:
    assert printable("a\x1b[2Jb\nc") == "a\\x1b[2Jb\\nc"
    print_plan(console, [PlannedNode("[bold]x[/bold]\x1b[2J", "Relu", False, "no [red]rule[/red]")])
    print_warnings(console, ["line\nbreak"])
    assert "[bold]x[/bold]\\x1b[2J" in text(console)
    assert "no [red]rule[/red]" in text(console)
    assert "\x1b" not in text(console)
    assert "line\\nbreak" in text(console)


def test_reasons_are_grouped_and_cut(console: Console) -> None:
    print_plan(console, [PlannedNode(f"n{i}", "Tanh", False, "no rule") for i in range(5)])
    assert "  5x Tanh: no rule (n0, n1, n2 and 2 more)\n" in text(console)


def test_many_reasons_are_cut_after_a_run(result: CompressResult, console: Console) -> None:
    refusals = tuple(Refusal(f"n{i}", f"reason {i}") for i in range(14))
    assert result.report is not None
    report = replace(result.report, details={}, children=(replace(result.report, details={}, refusals=refusals),))
    print_compress(console, replace(result, report=report, audit=None))
    assert "left alone, by reason (14):" in text(console)
    assert "reason 9" in text(console)
    assert "reason 10" not in text(console)
    assert "and 4 more reasons" in text(console)


def test_an_inspection_prints_and_reports(tmp_path: Path, console: Console) -> None:
    inspection = inspect_model(write_model(tmp_path / "model.onnx"))
    print_inspection(console, inspection)
    assert "input x: float32 [N, 3, 8, 8]" in text(console)
    assert "99.8 %" in text(console)
    report = json.loads(to_json(inspection.to_dict()), parse_constant=pytest.fail)
    assert report["macs"] == 13856
    assert {n["op"]: n["integer"] for n in report["planned"]}["Conv"] is True


def test_files_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.json"
    write_text(target, "one")
    write_text(target, "zwölf")
    assert target.read_text(encoding="utf-8") == "zwölf"
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert target.stat().st_mode == ordinary.stat().st_mode
    ordinary.unlink()
    with pytest.raises(UsageError, match="cannot be written: No such file or directory"):
        write_text(tmp_path / "nowhere" / "a.json", "x")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(ResourceError, match="No space left"):
        write_text(target, "three")
    assert target.read_text(encoding="utf-8") == "zwölf"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_reasons_that_differ_in_names_are_one(console: Console) -> None:
    reason = "the weight 't_{0}' of MatMul node_{0} is no constant; {1} of 2 are"
    items = [PlannedNode(f"n{i}", "Mul", False, reason.format(i, 1)) for i in range(3)]
    print_plan(console, [*items, PlannedNode("n3", "Mul", False, reason.format(3, 2))])
    assert "  3x Mul: the weight ... of MatMul ... is no constant; 1 of 2 are (n0, n1, n2)\n" in text(console)
    assert "  1x Mul: the weight 't_3' of MatMul node_3 is no constant; 2 of 2 are (n3)\n" in text(console)


def test_a_terminal_breaks_lines_between_words() -> None:
    screen = Console(file=io.StringIO(), width=40, force_terminal=True, color_system=None, soft_wrap=True)
    print_warnings(screen, ["it has many words that do not fit into one line, and " + "x" * 50])
    lines = text(screen).splitlines()
    assert lines[0] == "warning: it has many words that do not"
    assert lines[1] == "    fit into one line, and"
    assert lines[2] == "    " + "x" * 50
