"""The command line: exit codes, one line an error, JSON alone on stdout, and a quick start."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.compose
import pytest
from click.testing import CliRunner, Result
from small_cnn import logits, write_data, write_model

from onnxcompress.cli import cli
from onnxcompress.errors import ModelError, ResourceError, RuntimeUnavailableError
from onnxcompress.passes import PASSES
from onnxcompress.version import __version__

PROGRAM = [sys.executable, "-m", "onnxcompress"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, calibration data, and evaluation data that is labelled by the model itself."""
    path = tmp_path_factory.mktemp("small")
    model = write_model(path / "model.onnx")
    custom = onnx.load(model)
    custom.graph.node[2].domain = "nobody.knows"
    custom.opset_import.append(onnx.helper.make_opsetid("nobody.knows", 1))
    onnx.save(custom, path / "custom.onnx")
    (path / "loop.npz").symlink_to(path / "loop.npz")
    onnx.save(onnx.compose.add_prefix(onnx.load(model), "other_"), path / "other.onnx")
    write_data(path / "data.npz")
    plain = write_data(path / "plain.npz", 200, seed=2)
    write_data(path / "eval.npz", 200, seed=2, labels=logits(model, plain).argmax(1))
    return path


@pytest.fixture
def call(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Run a command line in an empty folder; MODEL, DATA and EVAL stand for the files."""
    monkeypatch.chdir(tmp_path)
    files = {"MODEL": "model.onnx", "OTHER": "other.onnx", "DATA": "data.npz", "EVAL": "eval.npz", "LOOP": "loop.npz"}
    files["CUSTOM"] = "custom.onnx"
    names = {word: folder / name for word, name in files.items()}

    def run(line: str | list[str]) -> Result:
        words = line.split() if isinstance(line, str) else line
        return CliRunner().invoke(cli, [str(names.get(word, word)) for word in words])

    return run


COMPRESS = "compress MODEL --data DATA --eval-data EVAL -o out.onnx --no-benchmark --max-drop 50"


# ----------------------------------------------------------------------------------------------------------------------
# Start and help


def test_help_is_quick() -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        answer = subprocess.run([*PROGRAM, "--help"], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
    assert "compress" in answer.stdout
    assert statistics.median(times) < 0.5


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from onnxcompress.cli import cli\n"
        "try: cli(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('onnx', 'numpy', 'pydantic', 'onnxruntime', 'rich', 'yaml') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == "[]"


def test_help_lists_commands_and_passes() -> None:
    text = CliRunner().invoke(cli, ["--help"]).output
    for name in ("benchmark", "compare", "compress", "demo", "inspect", *PASSES):
        assert f"  {name} " in text


@pytest.mark.parametrize("name", ["benchmark", "compare", "compress", "demo", "inspect", *PASSES])
def test_every_command_has_help(name: str) -> None:
    result = CliRunner().invoke(cli, [name.replace("_", "-"), "--help"])
    assert result.exit_code == 0
    assert "--json" in result.output


def test_version() -> None:
    assert CliRunner().invoke(cli, ["--version"]).output.split()[-1] == __version__


def test_a_mistyped_command_is_recognised() -> None:
    result = CliRunner().invoke(cli, ["fold-batchnorm"])
    assert result.exit_code == 2
    assert "did you mean 'fold_batch_norm'?" in result.output


# ----------------------------------------------------------------------------------------------------------------------
# compress


def test_compress_writes_and_tells(call: Callable[..., Result], tmp_path: Path) -> None:
    result = call(COMPRESS + " --report report.json --save-recipe recipe.yaml")
    assert result.exit_code == 0, result.output
    for word in ("nodes", "bytes on disk", "SQNR", "agreement", "top-1", "QLinearConv", "Softmax", "written: out.onnx"):
        assert word in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.onnx", "recipe.yaml", "report.json"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["schema"] == 1
    assert [p["name"] for p in report["passes"]][-2:] == ["insert_qdq", "round_weights"]
    assert all(p["changes"] for p in report["passes"][-2:])
    assert report["environment"]["versions"]["onnx"]


def test_a_saved_recipe_replays_to_the_same_bytes(call: Callable[..., Result], tmp_path: Path) -> None:
    assert call(COMPRESS + " --save-recipe recipe.yaml").exit_code == 0
    first = (tmp_path / "out.onnx").read_bytes()
    assert call(COMPRESS + " --recipe recipe.yaml").exit_code == 0
    assert (tmp_path / "out.onnx").read_bytes() == first


def test_json_is_alone_on_stdout(call: Callable[..., Result]) -> None:
    result = call(COMPRESS + " --json")
    report = json.loads(result.stdout)
    assert report["output"]["path"] == "out.onnx"
    assert "bytes on disk" in result.stderr


def test_quiet_leaves_warnings(call: Callable[..., Result]) -> None:
    result = call("compress MODEL --random-data -o out.onnx --no-benchmark --max-drop 50 --quiet")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "warning: calibrated on random data" in result.stderr


def test_a_dry_run_writes_nothing(call: Callable[..., Result], tmp_path: Path) -> None:
    result = call(COMPRESS + " --dry-run --save-recipe recipe.yaml --report report.json")
    assert result.exit_code == 0
    assert "would become integer" in result.output
    assert "nothing was written" in result.output
    assert list(tmp_path.iterdir()) == []


def test_benchmark_is_part_of_the_table(call: Callable[..., Result]) -> None:
    result = call(COMPRESS.replace("--no-benchmark", "--benchmark-seconds 0.2"))
    assert result.exit_code == 0
    assert "in brackets the 95 % interval" in result.output


# ----------------------------------------------------------------------------------------------------------------------
# Passes as commands


def test_a_pass_runs_alone_with_its_options(call: Callable[..., Result], tmp_path: Path) -> None:
    assert call("fold-batch-norm MODEL -o folded.onnx").exit_code == 0
    assert (tmp_path / "folded.onnx").exists()
    result = call("insert_qdq MODEL --data DATA -o q.onnx --exclude-operators Conv --exclude-operators Gemm --json")
    report = json.loads(result.stdout)
    assert report["recipe"]["passes"] == [{"insert_qdq": {"exclude_operators": ["Conv", "Gemm"]}}]
    assert report["budget"] is None


def test_wrong_options_of_a_pass_are_told(call: Callable[..., Result]) -> None:
    assert call("insert_qdq MODEL --data DATA -o q.onnx --observer middle").exit_code == 2
    result = call("fold_constants MODEL -o q.onnx --nonsense 1")
    assert result.exit_code == 2
    assert "--nonsense" in result.output


def test_verification_of_a_pass_can_be_left_out(call: Callable[..., Result]) -> None:
    report = json.loads(call("fold_batch_norm MODEL -o q.onnx --no-verify --json").stdout)
    assert report["verification"] is None
    assert report["output"] is not None


# ----------------------------------------------------------------------------------------------------------------------
# inspect, compare, benchmark


def test_inspect_tells_macs_and_reasons(call: Callable[..., Result]) -> None:
    result = call("inspect MODEL")
    for word in ("opset 17", "Conv", "13.8 k", "would become integer", "Softmax"):
        assert word in result.output
    report = json.loads(call("inspect MODEL --json").stdout)
    assert report["macs"] == 8 * 8 * 8 * 27 + 8 * 4
    assert {"conv", "head"} == {node["name"] for node in report["nodes"] if node["macs"]}
    assert report["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["N", 3, 8, 8]}]


def test_inspect_measures_layers(call: Callable[..., Result]) -> None:
    result = call("inspect MODEL --sensitivity --data DATA")
    assert "alone, SQNR" in result.output
    assert "on 16 samples that did not calibrate" in " ".join(result.output.split())
    found = json.loads(call("inspect MODEL --sensitivity --data DATA --json").stdout)["sensitivity"]
    assert {layer["node"] for layer in found["layers"]} == {"conv", "pool", "head"}
    assert found["samples"] == 16
    assert found["sqnr_db"] > 20
    assert "sensitivity" not in json.loads(call("inspect MODEL --json").stdout)


def test_inspect_tells_which_channels_go_together(call: Callable[..., Result]) -> None:
    assert "channels that go together" not in call("inspect MODEL").output
    assert json.loads(call("inspect MODEL --json").stdout)["coupling"] is None
    result = call("inspect MODEL --coupling")
    for word in ("channels that go together", "conv", "channels that stay", "normalises over it"):
        assert word in result.output
    groups = {g["producers"][0]: g for g in json.loads(call("inspect MODEL --coupling --json").stdout)["coupling"]}
    assert (groups["conv"]["channels"], groups["conv"]["kind"], groups["conv"]["pinned"]) == (8, "channels", None)
    assert groups["conv"]["macs"] == 8 * 8 * 8 * 27 + 8 * 4
    assert groups["conv"]["consumers"] == ["head"]
    assert "Softmax" in groups["head"]["pinned"]


def test_prune_channels_as_a_command(call: Callable[..., Result]) -> None:
    line = "prune_channels MODEL --data DATA --macs 0.5 --round-to 1 -o half.onnx --json"
    report = json.loads(call(line).stdout)
    assert report["after"]["macs"] <= 0.5 * report["before"]["macs"]
    again = json.loads(call("compare MODEL half.onnx --data DATA --json").stdout)
    assert again["outputs"][0]["relative_l2"] < 1
    assert call("prune_channels MODEL --macs 0.5 -o never.onnx").exit_code == 2
    assert call("prune_channels MODEL --data DATA --macs 2 -o never.onnx").exit_code == 2


def test_compare_models(call: Callable[..., Result]) -> None:
    assert call("fold_batch_norm MODEL -o folded.onnx").exit_code == 0
    report = json.loads(call("compare MODEL folded.onnx --data DATA --tolerance 1e-5 --json").stdout)
    assert report["samples"] == 64
    assert report["outputs"][0]["relative_l2"] < 1e-5
    same = json.loads(call("compare MODEL MODEL --json").stdout)["outputs"][0]
    assert same["equal"]
    assert same["sqnr_db"] is None


def test_compare_fails_above_the_tolerance(call: Callable[..., Result]) -> None:
    assert call(COMPRESS).exit_code == 0
    result = call("compare MODEL out.onnx --data DATA --tolerance 1e-6 --json")
    assert result.exit_code == 4
    assert json.loads(result.stdout)["outputs"]
    assert "error: output 'y' has a relative L2 of" in result.stderr


def test_benchmark_models(call: Callable[..., Result]) -> None:
    result = call("benchmark MODEL MODEL --seconds 0.2 --sessions 6 --json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["low"] <= report["ratio"] <= report["high"]
    assert "samples are random" in result.stderr
    assert call("benchmark MODEL MODEL --seconds 0.2 --sessions 6 --fail-if-slower-than 100").exit_code == 5


QUICK = "--seconds 0.1 --sessions 6 --no-noise-floor"


def test_benchmark_writes_files(call: Callable[..., Result], tmp_path: Path) -> None:
    result = call(f"benchmark MODEL MODEL {QUICK} --json out.json --report full.json --save-samples times.npz --trace")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["threads"] == 1
    assert json.loads((tmp_path / "full.json").read_text()) == report
    assert report["schema"] == 1
    assert report["comparisons"][0]["verdict"] in result.stdout, "the table is on stdout as well"
    assert report["variants"][0]["trace"]["nodes"]
    with np.load(tmp_path / "times.npz", allow_pickle=False) as times:
        assert len(times["0/reference_ns"]) == report["variants"][0]["timing"]["runs"]
    assert call(f"benchmark MODEL MODEL {QUICK} --json=other.json").exit_code == 0
    assert (tmp_path / "other.json").exists()


def test_a_bare_json_option_takes_no_model_for_its_file(call: Callable[..., Result], folder: Path) -> None:
    before = (folder / "model.onnx").read_bytes()
    result = call(f"benchmark --json MODEL MODEL {QUICK} --threads 0")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["models"]) == 2
    assert json.loads(result.stdout)["threads"] == 0, "the runtime chooses where that was asked for"
    assert (folder / "model.onnx").read_bytes() == before


def test_benchmark_of_one_model_and_of_a_runtime_that_is_not_there(call: Callable[..., Result]) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    result = call(f"benchmark MODEL {QUICK} --runtime onnxruntime:cpu --runtime onnxruntime:cuda --json")
    assert result.exit_code == 6
    assert "pip install 'onnxcompress[gpu]'" in result.stderr.splitlines()[-1]
    variants = json.loads(result.stdout)["variants"]
    assert [v["failure"] is None for v in variants] == [True, False]
    assert [v["timing"] is None for v in variants] == [False, True], "no CPU time under the name of CUDA"


# ----------------------------------------------------------------------------------------------------------------------
# Exit codes

FAILURES = {
    "usage": (
        "compress MODEL --data DATA",
        2,
        "error: missing option '-o' / '--output'; see ",
    ),
    "empty data": (["compress", "MODEL", "--data", "", "-o", "out.onnx"], 2, "no data was given"),
    "a loop": ("compress MODEL --data LOOP -o out.onnx", 2, "loop.npz"),
    "empty exclusion": ([*COMPRESS.split(), "--exclude", ""], 2, "--exclude is empty"),
    "empty folder": (["demo", "-o", ""], 2, "no folder was given"),
    "a name that is no text": (COMPRESS.replace("out.onnx", "\udcff.onnx"), 2, "no UTF-8"),
    "models with different inputs": ("compare MODEL OTHER", 2, "the models have different inputs"),
    "a model that the runtime cannot open": ("compare CUSTOM CUSTOM", 3, "onnxruntime cannot open the model"),
    "no runtime of that name": ("benchmark MODEL MODEL --runtime tensorrt", 2, "unknown runtime 'tensorrt'"),
    "samples over a model": ("benchmark MODEL MODEL --save-samples MODEL", 2, "is model 1 itself"),
    "JSON over the report": ("benchmark MODEL --report r.json --json r.json", 2, "is the report itself"),
    "no batches": ("benchmark MODEL MODEL --throughput-batches 1,x", 2, "'1,x' is not a list of integers"),
    "models with other inputs": ("benchmark MODEL OTHER", 2, "the models have different inputs"),
    "no second model": ("compare MODEL nowhere.onnx", 2, "nowhere.onnx does not exist"),
    "no number": ("compress MODEL --data DATA -o out.onnx --samples x", 2, "'x' is not an integer; see"),
    "not a number": ("compress MODEL --data DATA -o out.onnx --max-drop nan", 2, "nan is not a finite number"),
    "endless": ("compress MODEL --data DATA -o out.onnx --benchmark-seconds inf", 2, "inf is not a finite number"),
    "a million threads": ("compress MODEL --data DATA -o out.onnx --threads 1000000", 2, "is not in the range 0<=x<="),
    "report into nowhere": (COMPRESS + " --report nowhere/r.json", 2, "create nowhere first"),
    "recipe into nowhere": (COMPRESS + " --save-recipe nowhere/r.yaml", 2, "create nowhere first"),
    "report over the model": (COMPRESS + " --report MODEL", 2, "is the model itself"),
    "report over the data": (COMPRESS + " --report DATA", 2, "is the data itself"),
    "report over the evaluation data": (COMPRESS + " --report EVAL", 2, "is the evaluation data itself"),
    "report over the output": (COMPRESS + " --report out.onnx", 2, "is the output itself"),
    "report over the saved recipe": (COMPRESS + " --report r --save-recipe ./r", 2, "is the report itself"),
    "report of a pass over the model": ("fold_constants MODEL -o out.onnx --report MODEL", 2, "is the model itself"),
    "report to a device": (COMPRESS + " --report /dev/null", 2, "no regular file"),
    "output over the data": ("compress MODEL --data DATA -o DATA", 2, "is the data itself"),
    "output over the evaluator": (COMPRESS.replace("out.onnx", "score.py") + " --evaluate score.py:exact", 2, "itself"),
    "output to a device": (COMPRESS.replace("out.onnx", "/dev/null"), 2, "no regular file"),
    "a name that is too long": (COMPRESS.replace("out.onnx", "x" * 300), 2, "File name too long"),
    "unknown option": ("compress MODEL -o out.onnx --dta DATA", 2, "--dta"),
    "no data": ("compress MODEL -o out.onnx", 2, "give --data"),
    "no model": ("compress nowhere.onnx --data DATA -o out.onnx", 2, "nowhere.onnx"),
    "bad data": ("compress MODEL --data MODEL -o out.onnx", 2, "error: "),
    "bad recipe": ("compress MODEL --data DATA -o out.onnx --recipe int9", 2, "did you mean 'int8'?"),
    "bad preprocessing": ("compress MODEL --data DATA -o out.onnx --preprocess sise=3", 2, "preprocess"),
    "input as output": ("compress MODEL --data DATA -o MODEL", 2, "is the model itself"),
    "bad model": ("inspect DATA", 3, "error: "),
    "sensitivity without data": ("inspect MODEL --sensitivity", 2, "error: --sensitivity quantises the model"),
    "data that nobody reads": ("inspect MODEL --data DATA", 2, "error: --data is read by --sensitivity only"),
    "accuracy": (COMPRESS.replace("50", "0") + " --evaluate score.py:exact", 4, "the budget is 0"),
    "slower": (
        COMPRESS.replace("--no-benchmark", "--benchmark-seconds 0.2 --fail-if-slower-than 1000"),
        5,
        "1000x or more is asked for",
    ),
}


@pytest.mark.parametrize(("line", "code", "message"), FAILURES.values(), ids=FAILURES.keys())
def test_failures_have_a_code_and_one_line(
    call: Callable[..., Result], folder: Path, tmp_path: Path, line: str | list[str], code: int, message: str
) -> None:
    np.save(tmp_path / "expected.npy", logits(folder / "model.onnx", folder / "plain.npz"))
    (tmp_path / "score.py").write_text(
        "import numpy as np\n"
        f"X = np.load({str(folder / 'plain.npz')!r})['x']\n"
        f"Y = np.load({str(tmp_path / 'expected.npy')!r})\n"
        "def exact(run): return (run({'x': X})['y'] == Y).all(axis=1).mean()\n"
    )
    before = {path: path.read_bytes() for path in (*folder.glob("[!l]*"), tmp_path / "score.py")}
    result = call(line)
    assert result.exit_code == code, result.output
    assert {path: path.read_bytes() for path in before} == before
    assert len(result.stderr.splitlines()) == 1 + result.stderr.count("warning: ")
    assert message in result.stderr
    assert "Traceback" not in result.output
    errors = [text for text in result.stderr.splitlines() if text.lower().startswith("error: ")]
    assert len(errors) == 1
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ModelError("broken\nmodel"), 3, "error: broken model"),
        (RuntimeUnavailableError("no runtime"), 6, "error: no runtime"),
        (ResourceError("too much"), 7, "error: too much"),
        (MemoryError(), 7, "memory ran out"),
        (OSError(28, "No space left on device"), 7, "No space left on device"),
        (ValueError("odd \x1b[31m name"), 1, "ValueError: odd \\x1b[31m name: this is a bug in onnxcompress"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_every_error_has_its_code(
    call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(import_module("onnxcompress.inspect_model"), "load", fail)
    result = call("inspect MODEL --json")
    assert result.exit_code == code
    assert words in result.stderr
    assert json.loads(result.stdout)["error"]["exit_code"] == code
    assert "Traceback" not in result.stderr
    assert ("Traceback" in call("inspect MODEL --debug").stderr) is (code != 130)


@pytest.mark.parametrize("line", ["compress MODEL --json", "inspect MODEL --nonsense --json", "nothing --json"])
def test_wrong_usage_is_json_too(call: Callable[..., Result], line: str) -> None:
    result = call(line)
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "UsageError"
    assert len(result.stderr.splitlines()) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Real processes


def test_ctrl_c_leaves_nothing_behind(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\n"
        "def score(run):\n"
        f"    pathlib.Path({str(tmp_path / 'started')!r}).touch()\n"
        "    time.sleep(60)\n"
        "    return 1.0\n"
    )
    (tmp_path / "results").mkdir()
    # A job in the background of a script has SIGINT ignored, one under nohup SIGHUP, and hands that on to its children.
    for number in (signal.SIGINT, signal.SIGHUP):
        before = signal.signal(number, signal.default_int_handler)
        request.addfinalizer(partial(signal.signal, number, before))
    line = ["compress", folder / "model.onnx", "--data", folder / "data.npz", "-o", tmp_path / "results" / "out.onnx"]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)):
        (tmp_path / "started").unlink(missing_ok=True)
        process = subprocess.Popen(
            [*PROGRAM, *map(str, line), "--evaluate", f"{tmp_path / 'slow.py'}:score"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        request.addfinalizer(process.kill)
        end = time.monotonic() + 60
        while not (tmp_path / "started").exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == code
        assert "Traceback" not in stderr
        assert list((tmp_path / "results").iterdir()) == []


@pytest.mark.parametrize("option", ["--json", "--debug"])
def test_a_closed_pipe_is_no_error(folder: Path, option: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    line = [*PROGRAM, "inspect", str(folder / "model.onnx"), option]
    try:
        answer = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    assert answer.returncode == 0
    assert "rror" not in answer.stderr


def test_without_a_runtime_the_extra_is_named(folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from onnxcompress.cli import main\n"
        f"sys.argv[1:] = ['compress', {str(folder / 'model.onnx')!r}, '--data', {str(folder / 'data.npz')!r}, "
        f"'-o', {str(tmp_path / 'out.onnx')!r}]\n"
        "main()"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.returncode == 6
    assert "onnxcompress[cpu]" in answer.stderr
    assert len(answer.stderr.splitlines()) == 1


def test_public_names_are_lazy_and_complete() -> None:
    program = (
        "import sys, types, onnxcompress\n"
        "assert not {'onnx', 'numpy', 'pydantic'} & set(sys.modules), 'importing the package is not free'\n"
        "import onnxcompress.benchmark\n"
        "for name in onnxcompress.__all__:\n"
        "    assert not isinstance(getattr(onnxcompress, name), types.ModuleType), name\n"
        "assert set(onnxcompress.__all__) <= set(dir(onnxcompress))\n"
        "from onnxcompress.compress import CompressResult\n"
        "assert onnxcompress.compress.__module__ == 'onnxcompress.compress'\n"
        "try: onnxcompress.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.stderr == ""
    assert answer.stdout == "module 'onnxcompress' has no attribute 'nothing'\n"


def test_the_runtime_writes_nothing_of_its_own(tmp_path: Path) -> None:
    node = onnx.helper.make_node("StringNormalizer", ["x"], ["y"], case_change_action="UPPER", locale="no_SUCH")
    tensors = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.STRING, [3]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "text", tensors[:1], tensors[1:])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8),
        tmp_path / "text.onnx",
    )
    line = [*PROGRAM, "compare", str(tmp_path / "text.onnx"), str(tmp_path / "text.onnx"), "--quiet"]
    answer = subprocess.run(line, capture_output=True, text=True)
    assert answer.returncode == 3
    assert [text.split(":")[0] for text in answer.stderr.splitlines()] == ["warning", "error"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_an_answer_that_cannot_be_written(folder: Path) -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [*PROGRAM, "inspect", folder / "model.onnx", "--json"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert ended.returncode == 7
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1] == "error: No space left on device; free some and run again"
