"""The main job from Python: what is written, what is proven, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from small_cnn import logits, write_data, write_model

from onnxcompress.base import Guarantee
from onnxcompress.benchmark import BenchmarkResult, ModelTiming
from onnxcompress.compress import Budget, CompressResult, Metric, compress, sampling_error, slower_error
from onnxcompress.errors import AccuracyError, DataError, ModelError, RecipeError, SlowerError, UsageError
from onnxcompress.evaluate import LabelRanks
from onnxcompress.io import file_sha256
from onnxcompress.recipe import load_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, calibration data, and evaluation data that is labelled by the model itself."""
    path = tmp_path_factory.mktemp("small")
    model = write_model(path / "model.onnx")
    write_data(path / "data.npz")
    plain = write_data(path / "plain.npz", 200, seed=2)
    write_data(path / "eval.npz", 200, seed=2, labels=logits(model, plain).argmax(1))
    return path


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Callable[..., CompressResult]:
    """compress() on that model without the benchmark; options replace the defaults."""

    def call(**options: Any) -> CompressResult:
        given: dict[str, Any] = {
            "model": folder / "model.onnx",
            "data": folder / "data.npz",
            "eval_data": folder / "eval.npz",
            "output": tmp_path / "out.onnx",
            "benchmark": False,
            "max_drop": 50.0,
            "trusted": True,  # the child process that opens models first has tests of its own, and takes half a second
            **options,
        }
        return compress(**given)

    return call


def names(folder: Path) -> list[str]:
    """The names in a folder, hidden ones included."""
    return sorted(path.name for path in folder.iterdir())


def exact_answers(model: Path, data: Path, target: Path) -> Path:
    """An evaluator file: the share of samples whose outputs are bit for bit those of ``model``."""
    np.save(target.with_suffix(".npy"), logits(model, data))
    target.write_text(
        "import numpy as np\n"
        f"def score(run):\n"
        f"    x = np.load({str(data)!r})['x']\n"
        f"    expected = np.load({str(target.with_suffix('.npy'))!r})\n"
        "    return float((run({'x': x})['y'] == expected).all(axis=1).mean())\n"
    )
    return target


def test_int8_is_smaller_and_proven(run: Callable[..., CompressResult], folder: Path, tmp_path: Path) -> None:
    before = file_sha256(folder / "model.onnx")
    result = run(benchmark=True, benchmark_seconds=0.2)
    assert result.saved is not None
    assert result.after is not None
    assert result.saved.path == tmp_path / "out.onnx"
    assert result.guarantee is Guarantee.APPROXIMATE
    model = onnx.load(result.saved.path)
    onnx.checker.check_model(model)
    operators = {node.op_type for node in model.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    assert "BatchNormalization" not in operators
    assert result.verification is not None
    assert (result.verification.source, result.verification.samples) == ("eval-data", 200)
    assert result.verification.outputs[0].sqnr_db > 20
    assert [m.name for m in result.metrics] == ["top-1"]
    assert result.metrics[0].original == 1.0
    assert result.metrics[0].result == result.verification.agreement
    assert result.audit is not None
    assert result.audit["integer"]["QLinearConv"] == 1
    assert result.benchmark is not None
    assert result.benchmark.low <= result.benchmark.ratio <= result.benchmark.high
    assert file_sha256(folder / "model.onnx") == before
    assert names(tmp_path) == ["out.onnx"]


def test_the_result_carries_its_provenance(run: Callable[..., CompressResult], folder: Path) -> None:
    result = run()
    assert result.saved is not None
    properties = {p.key: p.value for p in onnx.load(result.saved.path).metadata_props}
    assert properties["onnxcompress.source_sha256"] == file_sha256(folder / "model.onnx")
    assert properties["onnxcompress.recipe"] == result.recipe.to_yaml()
    assert properties["onnxcompress.version"]


@pytest.mark.parametrize("recipe", ["int8", "lossless"])
def test_large_results_are_judged_with_their_weights_on_disk(
    recipe: str, run: Callable[..., CompressResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes as without."""
    monkeypatch.setattr("onnxcompress.io.INLINE_LIMIT", 100)
    monkeypatch.setattr("onnxcompress.io.EXTERNAL_FROM", 64)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = run(recipe=recipe, output=tmp_path / "a" / "out.onnx")
    module = import_module("onnxcompress.compress")
    monkeypatch.setattr(module, "REOPENED_FROM", 0)
    read: list[Path] = []

    def load(path: Path, **options: Any) -> Any:
        read.append(path)
        return real(path, **options)

    real = module.load
    monkeypatch.setattr(module, "load", load)
    large = run(recipe=recipe, output=tmp_path / "b" / "out.onnx")
    assert len(read) == 2
    assert whole.saved is not None and large.saved is not None
    assert len(large.saved.files) == 2
    assert names(tmp_path / "a") == names(tmp_path / "b")
    for file in names(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_replay_gives_the_same_bytes(run: Callable[..., CompressResult], tmp_path: Path) -> None:
    first = run()
    recipe = tmp_path / "saved.yaml"
    recipe.write_text(first.recipe.to_yaml())
    second = run(recipe=recipe, output=tmp_path / "again.onnx")
    assert first.saved is not None
    assert second.saved is not None
    assert first.saved.sha256 == second.saved.sha256


def test_lossless_needs_no_data(run: Callable[..., CompressResult]) -> None:
    result = run(recipe="lossless", data=None, eval_data=None, max_drop=0.0)
    assert result.guarantee is Guarantee.EQUIVALENT
    assert result.verification is not None
    assert result.verification.source == "synthetic"
    assert result.verification.outputs[0].relative_l2 <= 1e-5
    assert result.after is not None
    assert result.after.nodes < result.before.nodes


def test_lossless_is_judged_on_all_data(run: Callable[..., CompressResult]) -> None:
    verification = run(recipe="lossless", eval_data=None).verification
    assert verification is not None
    assert (verification.source, verification.samples) == ("data", 64)


def test_a_tenth_is_held_out(run: Callable[..., CompressResult]) -> None:
    verification = run(eval_data=None).verification
    assert verification is not None
    assert (verification.source, verification.samples) == ("held-out", 6)


def test_samples_limits_what_is_read(run: Callable[..., CompressResult]) -> None:
    verification = run(recipe="lossless", eval_data=None, samples=5).verification
    assert verification is not None
    assert verification.samples == 5


def test_random_data_is_told(run: Callable[..., CompressResult]) -> None:
    result = run(data=None, eval_data=None, random_data=True)
    assert result.verification is not None
    assert result.verification.source == "random"
    assert any("random data" in warning for warning in result.warnings)


def test_exclusions_stay_float(run: Callable[..., CompressResult]) -> None:
    result = run(exclude=["Conv"])
    assert result.audit is not None
    assert "QLinearConv" not in result.audit["integer"]
    step = {"insert_qdq": {"observer": "weighted_mse", "exclude_operators": ["Conv"]}}
    assert step in result.recipe.to_dict()["passes"]


def test_an_exclusion_that_matches_nothing_is_told(run: Callable[..., CompressResult]) -> None:
    result = run(exclude=["con", "hea*", "Relu", "Celu"])
    assert [warning for warning in result.warnings if "excludes nothing" in warning] == [
        "'con' excludes nothing: no node and no operator is called so; did you mean 'conv'?",
        "'Celu' excludes nothing: the model has no such operator",
    ]


def test_lossless_passes_calibrate_nothing(run: Callable[..., CompressResult]) -> None:
    result = run(recipe="lossless", data=None, eval_data=None, random_data=True)
    assert not any("calibrated" in warning for warning in result.warnings)


@pytest.mark.parametrize("overridable", [False, True])
def test_a_model_without_inputs_is_compressed(
    run: Callable[..., CompressResult], tmp_path: Path, overridable: bool
) -> None:
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["a", "b"], ["y"])],
        "constant",
        [value("a", onnx.TensorProto.FLOAT, [2])] if overridable else [],
        [value("y", onnx.TensorProto.FLOAT, [2])],
        [onnx.numpy_helper.from_array(np.ones(2, np.float32), name) for name in "ab"],
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8),
        tmp_path / "none.onnx",
    )
    options = {"model": tmp_path / "none.onnx", "data": None, "eval_data": None, "max_drop": "auto"}
    for recipe, random in (("lossless", False), ("int8", True)):
        result = run(**options, recipe=recipe, random_data=random, benchmark=True, benchmark_seconds=0.1)
        assert result.verification is not None
        assert result.verification.outputs[0].max_abs == 0.0


def test_a_missed_budget_writes_nothing(run: Callable[..., CompressResult], folder: Path, tmp_path: Path) -> None:
    score = exact_answers(folder / "model.onnx", folder / "plain.npz", tmp_path / "score.py")
    output = tmp_path / "out.onnx"
    output.write_bytes(b"the older one")
    with pytest.raises(AccuracyError, match=r"metric is \d+\.\d\d points lower, the budget is 0\.5"):
        run(evaluate=f"{score}:score", max_drop=0.5)
    assert output.read_bytes() == b"the older one"
    # Python keeps its own copy of score.py, unless it is told not to.
    assert set(names(tmp_path)) - {"__pycache__"} == {"out.onnx", "score.npy", "score.py"}


def test_a_missed_budget_can_be_told_or_forced(
    run: Callable[..., CompressResult], folder: Path, tmp_path: Path
) -> None:
    score = f"{exact_answers(folder / 'model.onnx', folder / 'plain.npz', tmp_path / 'score.py')}:score"
    told = run(evaluate=score, max_drop=0.5, check=False)
    assert told.saved is None
    assert isinstance(told.failure, AccuracyError)
    assert told.budget is not None
    assert not told.budget.met
    assert told.benchmark is None
    forced = run(evaluate=score, max_drop=0.5, force=True)
    assert forced.saved is not None
    assert forced.failure is None
    (told,) = [warning for warning in forced.warnings if "written because of --force" in warning]
    assert "--force it" not in told and "nothing was written" not in told


def test_agreement_is_the_budget_without_a_metric(run: Callable[..., CompressResult], folder: Path) -> None:
    result = run(eval_data=folder / "plain.npz")
    assert result.verification is not None
    assert result.verification.agreement is not None
    assert result.budget == Budget("agreement", 50.0, 100 * (1 - result.verification.agreement))


@pytest.mark.parametrize(
    ("original", "result", "points"),
    [([0, 0, 0, 3], [0, 0, 0, 3], 0.0), ([0, 1, 0, 3], [0, 0, 2, 3], 100 * 2**0.5 / 4), ([2], [5], 0.0)],
)
def test_only_samples_that_one_model_has_right_make_a_sampling_error(
    original: list[int], result: list[int], points: float
) -> None:
    ranks = [LabelRanks(np.array(r), 10) for r in (original, result)]
    assert sampling_error(*ranks) == pytest.approx(points)


def relabelled(folder: Path, target: Path, samples: int, wrong: int) -> Path:
    """The first ``samples`` of the labelled data, ``wrong`` of them with another class than the model's."""
    with np.load(folder / "eval.npz") as arrays:
        x, labels = arrays["x"][:samples], arrays["labels"][:samples].copy()
    labels[:wrong] = (labels[:wrong] + 1) % 4
    np.savez(target, allow_pickle=False, x=x, labels=labels)
    return target


def test_one_flipped_sample_of_26_is_no_failure(
    run: Callable[..., CompressResult], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = relabelled(folder, tmp_path / "few.npz", 26, 0)
    module = import_module("onnxcompress.compress")
    real = module.label_ranks

    def flipped(*arguments: Any, **options: Any) -> LabelRanks:
        answer: LabelRanks = real(*arguments, **options)
        flipped.calls += 1  # type: ignore[attr-defined]
        ranks = np.zeros(26, np.int64)
        ranks[: flips if flipped.calls % 2 == 0 else 0] = 3  # type: ignore[attr-defined]
        return LabelRanks(ranks, answer.classes)

    flipped.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "label_ranks", flipped)
    flips = 1
    result = run(eval_data=data, max_drop="auto")
    assert result.saved is not None
    assert result.budget is not None
    assert (result.budget.limit, result.budget.found) == pytest.approx((0.5 + 100 / 26, 100 / 26))
    with pytest.raises(AccuracyError, match=r"top-1 is 3\.85 points lower on 26 samples .* the budget is 0\.5;"):
        run(eval_data=data, max_drop=0.5)
    flips = 4
    with pytest.raises(AccuracyError, match=r"top-1 is 15\.38 points lower .* the budget is 8\.19;"):
        run(eval_data=data, max_drop="auto")


def test_a_metric_of_the_users_own_is_held_strictly(run: Callable[..., CompressResult]) -> None:
    scores = iter([0.900, 0.894, 0.900, 0.896])
    with pytest.raises(AccuracyError, match=r"metric is 0\.60 points lower, the budget is 0\.5;"):
        run(evaluate=lambda answer: next(scores), max_drop="auto")
    kept = run(evaluate=lambda answer: next(scores), max_drop="auto").budget
    assert kept is not None
    assert (kept.basis, kept.limit) == ("metric", 0.5)
    assert kept.found == pytest.approx(0.4)


def test_without_a_metric_a_low_agreement_is_told(
    run: Callable[..., CompressResult], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("onnxcompress.compress")
    share, rows, real = 0.98, True, module.compare

    def lowered(*arguments: Any, **options: Any) -> list[Any]:
        return [replace(o, same_argmax=share, score_rows=rows) for o in real(*arguments, **options)]

    def told() -> list[str]:
        result = run(eval_data=folder / "plain.npz", max_drop="auto")
        assert result.saved is not None
        assert result.budget is not None
        assert (result.budget.basis, result.budget.limit) == ("SQNR", 10.0)
        return [warning for warning in result.warnings if "agreement" in warning]

    monkeypatch.setattr(module, "compare", lowered)
    assert told() == [
        "agreement 98.00 % with the original on 200 samples; give labels or --evaluate to judge accuracy, "
        "--max-drop to enforce"
    ]
    with pytest.raises(AccuracyError, match=r"agreement with the original is 2\.00 points lower"):
        run(eval_data=folder / "plain.npz", max_drop=1)
    rows = False
    assert told() == []
    share, rows = 0.995, True
    assert told() == []


def test_without_a_metric_what_computes_something_else_is_turned_down(
    run: Callable[..., CompressResult], folder: Path, tmp_path: Path
) -> None:
    x = np.random.default_rng(0).normal(size=(64, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "tiny.npz", allow_pickle=False, x=x * np.float32(1e-3))
    np.savez(tmp_path / "large.npz", allow_pickle=False, x=x * np.float32(100))
    model = write_model(tmp_path / "raw.onnx", softmax=False)
    options = {"model": model, "data": tmp_path / "tiny.npz", "eval_data": tmp_path / "large.npz", "max_drop": "auto"}
    with pytest.raises(AccuracyError, match=r"output 'y' kept -?\d+\.\d dB SQNR on 64 samples .* below 10 dB"):
        run(**options)
    forced = run(**options, force=True)
    assert forced.saved is not None
    assert any("computes something else" in warning and "--force" in warning for warning in forced.warnings)


def test_a_budget_that_nothing_can_judge_is_told(run: Callable[..., CompressResult], tmp_path: Path) -> None:
    model = write_model(tmp_path / "one.onnx", classes=1, softmax=False)
    result = run(model=model, eval_data=None)
    assert result.budget is None
    assert any("budget was not checked" in warning for warning in result.warnings)


def test_too_slow_writes_nothing(run: Callable[..., CompressResult], tmp_path: Path) -> None:
    options = {"benchmark": True, "benchmark_seconds": 0.2, "fail_if_slower_than": 1000.0}
    with pytest.raises(SlowerError, match="1000x or more is asked for"):
        run(**options)
    assert names(tmp_path) == []
    assert run(**options, force=True).saved is not None


def timing(low: float, ratio: float, high: float) -> BenchmarkResult:
    model = ModelTiming(1.0, None, None, None, None, 1, 1.0, 1.0, 1)
    return BenchmarkResult(ratio, low, high, "UNDECIDED", 1, 6, 1, model, model, (), 1, "cpu", 1, 0, 1.0, {})


@pytest.mark.parametrize(
    ("interval", "limit", "fails"),
    [((0.8, 0.9, 0.95), 1.0, True), ((0.9, 0.97, 1.0), 1.0, False), ((0.9, 1.0, 1.1), 1.0, False)],
)
def test_only_a_decided_ratio_is_too_slow(interval: tuple[float, float, float], limit: float, fails: bool) -> None:
    assert (slower_error(timing(*interval), limit) is not None) is fails


def test_a_dry_run_reads_plans_and_writes_nothing(run: Callable[..., CompressResult], tmp_path: Path) -> None:
    result = run(dry_run=True)
    assert result.saved is None
    assert result.after is None
    planned = {node.name: node for node in result.planned}
    assert planned["conv"].integer
    assert not planned["prob"].integer
    assert "Softmax" in planned["prob"].reason
    assert "norm" not in planned
    assert names(tmp_path) == []


def test_a_dry_run_finds_bad_values(run: Callable[..., CompressResult], tmp_path: Path) -> None:
    values = np.zeros((40, 3, 8, 8), np.float32)
    values[33, 0, 0, 0] = np.nan
    np.savez(tmp_path / "nan.npz", x=values)
    with pytest.raises(DataError, match=r"NaN|nan|finite"):
        run(dry_run=True, data=tmp_path / "nan.npz")


def test_drops_are_counted_in_points() -> None:
    assert Metric("m", 0.92, 0.91).drop == pytest.approx(1.0)
    assert Metric("m", 76.1, 75.6).drop == pytest.approx(0.5)
    assert not Budget("m", 0.5, float("nan")).met
    assert Budget("m", 0.0, 0.0).met
    assert Budget("SQNR", 10.0, 10.0).met
    assert not Budget("SQNR", 10.0, float("-inf")).met


UNUSABLE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no data": ({"data": None}, UsageError, "recipe 'int8' calibrates and needs samples"),
    "both": ({"random_data": True}, UsageError, "both data and random data"),
    "budget": ({"max_drop": -1.0}, UsageError, "budget of -1.0 points"),
    "a budget that is no number": ({"max_drop": float("nan")}, UsageError, "budget of nan points"),
    "a budget in words": ({"max_drop": "none"}, UsageError, "budget of 'none'"),
    "ratio": ({"benchmark": True, "fail_if_slower_than": 0.0}, UsageError, "ratio of 0.0"),
    "limit without benchmark": ({"fail_if_slower_than": 1.0}, UsageError, "needs the benchmark"),
    "samples": ({"samples": 0}, UsageError, "samples is 0"),
    "threads": ({"threads": 1_000_000}, UsageError, "threads is 1000000"),
    "seconds": ({"benchmark_seconds": float("inf")}, UsageError, "benchmark of inf seconds"),
    "seed": ({"seed": -1}, UsageError, "seed is -1"),
    "a null byte": ({"output": "a\0b"}, UsageError, "null byte"),
    "target": ({"target": "tpu"}, UsageError, "unknown target 'tpu'"),
    "recipe": ({"recipe": "int9"}, RecipeError, "no recipe named 'int9'"),
    "no output": ({"output": ""}, UsageError, "no output file"),
    "no such folder": ({"output": "nowhere/out.onnx"}, UsageError, "its folder does not exist"),
    "a folder": ({"output": "."}, UsageError, "is a folder"),
    "no evaluator": ({"evaluate": "nowhere.py:f"}, UsageError, "no such file"),
    "no model": ({"model": "nowhere.onnx"}, UsageError, "nowhere.onnx"),
    "no such data": ({"data": "nowhere.npz"}, UsageError, "nowhere.npz"),
}


@pytest.mark.parametrize(("options", "kind", "message"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_what_cannot_be_used_is_told_before_any_work(
    run: Callable[..., CompressResult], options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as error:
        run(**options)
    assert "\n" not in str(error.value)


def test_the_model_is_never_overwritten(run: Callable[..., CompressResult], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link.onnx").symlink_to(folder / "model.onnx")
    (tmp_path / "hard.onnx").hardlink_to(folder / "model.onnx")
    before = (folder / "model.onnx").read_bytes()
    for output in (folder / "model.onnx", tmp_path / "link.onnx", tmp_path / "hard.onnx"):
        with pytest.raises(UsageError, match="is the model itself"):
            run(output=output)
    assert (folder / "model.onnx").read_bytes() == before


def test_a_damaged_model_is_refused(run: Callable[..., CompressResult], tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x07not a model")
    with pytest.raises(ModelError):
        run(model=tmp_path / "bad.onnx")


def test_an_evaluator_may_be_a_function(run: Callable[..., CompressResult], folder: Path) -> None:
    calls: list[Any] = []

    def evaluate(answer: Callable[..., Any]) -> float:
        calls.append(answer({"x": np.zeros((2, 3, 8, 8), np.float32)})["y"].shape)
        return 0.5

    result = run(evaluate=evaluate)
    assert calls == [(2, 4), (2, 4)]
    assert result.metrics == (Metric("metric", 0.5, 0.5),)


def test_an_evaluator_that_feeds_the_model_wrongly_is_bad_data(run: Callable[..., CompressResult]) -> None:
    with pytest.raises(DataError, match=r"evaluate: onnxruntime cannot run the model: .*; check what it feeds"):
        run(evaluate=lambda answer: answer({"nonsense": np.zeros(1, np.float32)})["y"].sum())


def test_a_recipe_object_is_taken_as_it_is(run: Callable[..., CompressResult]) -> None:
    recipe = load_recipe("lossless")
    assert run(recipe=recipe).recipe == recipe
