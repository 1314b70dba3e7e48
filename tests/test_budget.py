"""compress() with a budget: what is searched, on which samples, and what is written and said."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hard_models import SPOILED, ruined_everywhere, samples, spoiled
from rich.console import Console
from small_cnn import logits, write_data, write_model

from onnxcompress.compress import CompressResult, compress
from onnxcompress.errors import AccuracyError
from onnxcompress.recipe import Recipe, parse_recipe
from onnxcompress.report import compress_report, print_compress, to_json

#: without equalize_layers, which would mend some of it
PLAIN = "version: 1\npasses: [fold_constants, fold_batch_norm, insert_qdq]\n"
RETURNED = "returned to float to keep the accuracy budget"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hard")
    onnx.save(spoiled(), path / "spoiled.onnx")
    onnx.save(spoiled(()), path / "sound.onnx")
    onnx.save(spoiled((1, 5)), path / "twice.onnx")
    onnx.save(ruined_everywhere(), path / "ruined.onnx")
    np.savez(path / "data.npz", **samples(96))
    np.savez(path / "eval.npz", **samples(64, 1))
    labels = logits(path / "spoiled.onnx", path / "eval.npz").argmax(1)
    np.savez(path / "labelled.npz", labels=labels, **samples(64, 1))
    return path


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Callable[..., CompressResult]:
    def call(name: str = "spoiled", **options: Any) -> CompressResult:
        given: dict[str, Any] = {
            "model": folder / f"{name}.onnx",
            "data": folder / "data.npz",
            "eval_data": folder / "eval.npz",
            "output": tmp_path / "out.onnx",
            "recipe": parse_recipe(PLAIN),
            "benchmark": False,
            "threads": 1,
            **options,
        }
        return compress(**given)

    return call


def excluded(recipe: Recipe) -> list[str]:
    return sorted(recipe.passes[-1].model_dump()["exclude_nodes"])


def test_the_layers_that_ruin_it_return_and_nothing_else(run: Callable[..., CompressResult]) -> None:
    result = run(max_drop=3.0)
    assert result.saved is not None
    assert excluded(result.recipe) == sorted(SPOILED)
    assert result.samples == {"calibration": 72, "search": 24, "evaluation": 64}
    assert result.recipe.held_out == 0.25
    assert result.search is not None
    assert result.search["met"]
    assert [step["floats"] for step in result.search["returned"]] == [SPOILED]
    assert result.verification is not None and result.verification.outputs[0].sqnr_db > 20
    assert result.audit is not None
    reasons = {node["node"]: node["reason"] for node in result.audit["floats"] if node["node"] in SPOILED}
    assert reasons == dict.fromkeys(SPOILED, RETURNED)
    report = compress_report(result)
    assert report["returned"] == dict.fromkeys(SPOILED, RETURNED)
    assert report["search"]["returned"][0]["macs"] == 2 * 8 * 8 * 9 * 144
    assert to_json(report)


def test_a_replay_searches_nothing_and_gives_the_same_bytes(run: Callable[..., CompressResult], tmp_path: Path) -> None:
    first = run(max_drop=3.0)
    saved = parse_recipe(first.recipe.to_yaml())
    assert saved.held_out == 0.25
    for drop in (3.0, "auto", None):
        second = run(recipe=saved, max_drop=drop, output=tmp_path / "again.onnx")
        assert second.search is None
        assert first.saved is not None and second.saved is not None
        if drop is not None:
            assert second.saved.sha256 == first.saved.sha256


def test_without_a_budget_only_what_is_far_off_is_searched(run: Callable[..., CompressResult]) -> None:
    result = run("twice")
    assert result.search is not None
    assert result.search["goals"] == [{"basis": "SQNR", "limit": 10.0, "lenient": False}]
    assert excluded(result.recipe) == ["conv1", "conv2", "conv5", "conv6"]
    assert result.budget is not None and result.budget.met
    good = run("sound")
    assert good.search is None
    assert good.recipe.held_out is None
    assert good.samples == {"calibration": 96, "evaluation": 64}


def test_labels_of_the_evaluation_data_set_the_goal(run: Callable[..., CompressResult], folder: Path) -> None:
    result = run(eval_data=folder / "labelled.npz")
    assert result.search is not None
    assert result.search["goals"] == [{"basis": "expected top-1", "limit": 0.5, "lenient": True}]
    strict = run(eval_data=folder / "labelled.npz", data=folder / "labelled.npz", max_drop=10.0)
    assert strict.samples == {"calibration": 48, "search": 16, "evaluation": 64}
    assert any("same file" in warning for warning in strict.warnings)


def test_no_sample_is_used_twice(run: Callable[..., CompressResult]) -> None:
    result = run(eval_data=None, max_drop=12.0)
    assert result.samples == {"calibration": 64, "search": 22, "evaluation": 10}


def test_the_evaluator_is_asked_once_about_each_model(run: Callable[..., CompressResult], folder: Path) -> None:
    calls: list[int] = []
    x = samples(8, 3)["x"]

    def evaluate(answer: Callable[..., Any]) -> float:
        calls.append(len(answer({"x": x})["y"]))
        return 0.5

    result = run(evaluate=evaluate, max_drop=0.5)
    assert result.search is not None
    assert result.search["goals"] == [{"basis": "cosine", "limit": 0.5, "lenient": False}]
    assert calls == [8, 8]


def test_where_nothing_helps_it_says_so(run: Callable[..., CompressResult], tmp_path: Path) -> None:
    scores = iter([0.9, 0.5])
    with pytest.raises(AccuracyError) as error:
        run("ruined", evaluate=lambda answer: next(scores), max_drop=0.0)
    text = str(error.value)
    assert text.startswith("metric is 40.00 points lower, the budget is 0; also on the samples of the search")
    assert "the budget is missed even with" in text
    assert "\n" not in text
    assert not (tmp_path / "out.onnx").exists()


def test_too_few_samples_to_search_are_told(run: Callable[..., CompressResult], tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", **samples(1))
    result = run(data=tmp_path / "one.npz", max_drop=100.0)
    assert result.search is None
    assert any("no samples were held out to search with" in warning for warning in result.warnings)


def test_a_recipe_that_quantises_nothing_searches_nothing(tmp_path: Path) -> None:
    model, data = write_model(tmp_path / "m.onnx"), write_data(tmp_path / "d.npz")
    result = compress(model, data, tmp_path / "o.onnx", recipe="lossless", max_drop=0.0, benchmark=False)
    assert (result.search, result.samples) == (None, {})


def test_what_returned_is_printed(run: Callable[..., CompressResult]) -> None:
    console = Console(file=StringIO(), width=80, force_terminal=True, color_system=None)
    print_compress(console, run(max_drop=3.0))
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert "returned to float to keep the accuracy budget: 2 operators" in text
    assert "budget met on 24 samples that nothing else saw" in text
    assert "calibrated on 72, searched on 24" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


def test_a_budget_that_only_the_search_could_keep_is_told(run: Callable[..., CompressResult]) -> None:
    scores = iter([0.9, 0.5])
    with pytest.raises(AccuracyError, match=r"the budget is 1; on 24 samples of the search it is kept: calibrate on"):
        run(evaluate=lambda answer: next(scores), max_drop=1.0)


def test_what_floats_miss_as_well_is_not_searched(run: Callable[..., CompressResult]) -> None:
    """No sample is held out, and nothing runs twice, where what pruning took is far beyond the budget."""
    pruned = "version: 1\npasses: [{prune_channels: {macs: 0.1, recover: false, round_to: 1}}, insert_qdq]\n"
    result = run("sound", recipe=parse_recipe(pruned), check=False)
    assert isinstance(result.failure, AccuracyError)
    assert "in floats already" in str(result.failure)
    assert result.search is None
    assert "search" not in result.samples
    assert excluded(result.recipe) == []
    # nor where the budget was asked for, so that samples were held out
    scores = iter([0.9, 0.5])
    options = {"max_drop": 0.5, "evaluate": lambda answer: next(scores)}
    asked = run("sound", recipe=parse_recipe(pruned), check=False, **options)
    assert isinstance(asked.failure, AccuracyError)
    assert str(asked.failure).endswith(
        "in floats already; raise --max-drop, have the passes ahead of it take less or --force it; nothing was written"
    )
    assert asked.search is None and asked.samples["calibration"] < 96
    assert excluded(asked.recipe) == []
