"""The recipes that prune, distil and quantise, in either order: one command, one report, an integer graph."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxcompress.compress import CompressResult, compress
from onnxcompress.demo import demo_calibration, demo_model_path
from onnxcompress.io import load, model_sha256
from onnxcompress.quantization.audit import audit
from onnxcompress.recipe import Recipe, load_recipe, parse_recipe
from onnxcompress.targets import get_target

NAMES = ("prune-distil-int8", "prune-int8-distil")
#: what takes long, made quick
QUICK: dict[str, dict[str, Any]] = {
    "prune_channels": {"macs": 0.6, "round_to": 1, "importance": "l2", "allocation": "uniform"},
    "distill": {"steps": 150, "batch_size": 16, "learning_rate": 2e-3, "average": 0.0},
}


def quick(name: str, **distill: Any) -> Recipe:
    recipe = load_recipe(name).to_dict()
    passes = [
        {key: {**options, **QUICK.get(key, {}), **(distill if key == "distill" else {})}}
        for entry in recipe["passes"]
        for key, options in entry.items()
    ]
    return parse_recipe(json.dumps({**recipe, "passes": passes}))


def run(name: str, folder: Path, **options: Any) -> CompressResult:
    images = {"input": demo_calibration()["input"][:160]}
    given = {"recipe": quick(name), "benchmark": False, "max_drop": None, "threads": 1, **options}
    return compress(demo_model_path(), images, folder / f"{name}.onnx", **given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch", reason="needs the extra distill")
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture(scope="module", params=NAMES)
def result(request: pytest.FixtureRequest, folder: Path) -> CompressResult:
    """What each recipe makes, with a work folder."""
    return run(request.param, folder, work_dir=folder / "work")


def test_the_orders_are_what_they_are_called() -> None:
    orders = {name: [step.name for step in load_recipe(name).passes] for name in NAMES}
    for steps in orders.values():
        assert steps.index("prune_channels") < min(steps.index("distill"), steps.index("insert_qdq"))
    assert orders[NAMES[0]].index("distill") < orders[NAMES[0]].index("insert_qdq")
    assert orders[NAMES[1]].index("distill") > orders[NAMES[1]].index("insert_qdq")


def test_one_report_tells_all_and_what_pruning_left_reaches_distillation(result: CompressResult) -> None:
    assert result.report is not None
    reports = {child.name: child for child in result.report.children}
    told = reports["distill"].details["distillation"]
    cut = {name for name, axes in json.loads(kept(result)).items() if axes}
    assert cut & set(told["blocks"]), "no block that lost channels was compared"
    assert told["loss"]["after"] <= told["loss"]["before"]
    assert reports["distill"].changed
    assert reports["prune_channels"].changed
    assert result.after is not None
    assert result.after.macs <= 0.6 * result.before.macs


def kept(result: CompressResult) -> str:
    import onnx

    assert result.saved is not None
    return {p.key: p.value for p in onnx.load(result.saved.path).metadata_props}["onnxcompress.kept"]


def test_the_written_file_is_an_integer_graph(result: CompressResult) -> None:
    assert result.saved is not None
    assert result.audit is not None
    proof = audit(load(result.saved.path), get_target("cpu"))
    assert proof.integer["QLinearConv"] == result.audit["integer"]["QLinearConv"] > 0
    assert not proof.mismatches
    assert (proof.quantize, proof.dequantize) == (result.audit["quantize"], result.audit["dequantize"])
    assert result.verification is not None
    assert result.verification.outputs[0].sqnr_db > 10


def test_only_distillation_and_what_follows_runs_again(result: CompressResult, folder: Path, tmp_path: Path) -> None:
    """The work folder gives what a run from scratch gives."""
    assert result.report is not None
    assert result.saved is not None
    name = result.saved.path.stem
    changed = quick(name, steps=5)
    again = run(name, tmp_path, recipe=changed, work_dir=folder / "work")
    assert again.report is not None
    assert again.saved is not None
    position = [step.name for step in changed.passes].index("distill")
    assert [child.reused for child in again.report.children] == [
        number < position for number in range(len(changed.passes))
    ]
    replayed = run(name, tmp_path, recipe=again.recipe, work_dir=None)
    assert replayed.saved is not None
    assert replayed.saved.sha256 == model_sha256(again.saved.path) != result.saved.sha256


# ---- what is missing is told first -------------------------------------------------------------------------------


@cache
def samples() -> Any:
    return demo_calibration()["input"][:32]


def command(folder: Path, *words: str, torch: bool) -> subprocess.CompletedProcess[str]:
    """``compress`` in a process of its own, in which no pass may run."""
    code = (
        "import sys\n"
        + ("" if torch else "sys.modules['torch'] = None\n")
        + "from onnxcompress.passes.fold_constants import FoldConstants\n"
        "def fails(*_): sys.exit('a pass ran')\n"
        "FoldConstants.apply = fails\n"
        "from onnxcompress.cli import main\n"
        "main()\n"
    )
    np.save(folder / "data.npy", samples())
    given = ["compress", str(demo_model_path()), "-o", str(folder / "out.onnx"), *words]
    return subprocess.run(
        [sys.executable, "-c", code, *given], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--work-dir", "work"]])
def test_without_torch_no_pass_runs(tmp_path: Path, more: list[str]) -> None:
    more = [str(tmp_path / word) if word == "work" else word for word in more]
    told = command(tmp_path, "--recipe", NAMES[0], "--data", str(tmp_path / "data.npy"), *more, torch=False)
    assert told.returncode == 6
    assert told.stderr.strip() == "error: torch is not installed; install it with: pip install 'onnxcompress[distill]'"
    assert not (tmp_path / "out.onnx").exists()
    assert not (tmp_path / "work").exists()


def test_without_data_no_pass_runs(tmp_path: Path) -> None:
    told = command(tmp_path, "--recipe", NAMES[1], torch=True)
    assert told.returncode == 2
    assert "needs samples; give --data" in told.stderr
    assert len(told.stderr.strip().splitlines()) == 1


def test_a_teacher_that_is_not_there_is_told_first(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs the extra distill")
    (tmp_path / "r.yaml").write_text("version: 1\npasses: [fold_constants, {distill: {teacher: none.onnx}}]\n")
    recipe = str(tmp_path / "r.yaml")
    told = command(tmp_path, "--recipe", recipe, "--data", str(tmp_path / "data.npy"), torch=True)
    assert told.returncode == 2
    assert "none.onnx" in told.stderr
    assert "a pass ran" not in told.stderr
