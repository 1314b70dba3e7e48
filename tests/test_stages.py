"""Stages: what is reused is what a run from scratch makes, and what cannot be trusted is made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from models import BY_NAME, make_feeds
from pydantic import Field
from rich.console import Console
from small_cnn import logits, write_data, write_model

from onnxcompress import stages
from onnxcompress.base import Change, Context, Decision, Detail, Guarantee, Pass, PassReport, Refusal
from onnxcompress.compress import CompressResult, compress
from onnxcompress.data import open_data
from onnxcompress.errors import DataError, RuntimeUnavailableError, UsageError
from onnxcompress.graph import Graph, change_constant, constant_value, copy_graph, input_specs, model_info
from onnxcompress.io import content_sha256, load, serialize
from onnxcompress.pipeline import Pipeline
from onnxcompress.proto import from_proto
from onnxcompress.recipe import Recipe, load_recipe, parse_recipe
from onnxcompress.report import compress_report, print_compress, to_json
from onnxcompress.stages import open_stages

RECIPE = """version: 1
passes:
  - fold_constants
  - fold_batch_norm
  - equalize_layers
  - insert_qdq: {observer: %s}
  - round_weights
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small")
    model = write_model(path / "model.onnx")
    write_data(path / "data.npz")
    plain = write_data(path / "plain.npz", 100, seed=2)
    write_data(path / "eval.npz", 100, seed=2, labels=logits(model, plain).argmax(1))
    return path


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Callable[..., CompressResult]:
    def call(observer: str = "min_max", **options: Any) -> CompressResult:
        given: dict[str, Any] = {
            "model": folder / "model.onnx",
            "data": folder / "data.npz",
            "eval_data": folder / "eval.npz",
            "output": tmp_path / "out.onnx",
            "recipe": parse_recipe(RECIPE % observer),
            "benchmark": False,
            "max_drop": None,
            "work_dir": tmp_path / "work",
            **options,
        }
        return compress(**given)

    return call


def reused(result: CompressResult) -> list[str]:
    assert result.report is not None
    return [child.name for child in result.report.children if child.reused]


def sha256(result: CompressResult) -> str:
    assert result.saved is not None
    return result.saved.sha256


# ---- what is reused ----------------------------------------------------------------------------------------------


def test_only_what_comes_after_a_change_runs_and_the_bytes_are_those_of_a_run_from_scratch(
    run: Callable[..., CompressResult],
) -> None:
    first = run()
    assert reused(first) == []
    assert sha256(first) == sha256(run(work_dir=None))
    second = run("percentile")
    assert reused(second) == ["fold_constants", "fold_batch_norm", "equalize_layers"]
    assert sha256(second) == sha256(run("percentile", work_dir=None)) != sha256(first)
    again = run()
    assert len(reused(again)) == 5
    assert sha256(again) == sha256(first)
    told, before = (json.loads(to_json(compress_report(r))) for r in (again, first))
    assert [p["reused"] for p in told["passes"]] == [True] * 5
    for entry in (*told["passes"], *before["passes"]):
        del entry["reused"]
    assert told["passes"] == before["passes"]
    assert told["audit"] == before["audit"]
    assert again.warnings == first.warnings


def test_what_was_reused_is_printed(run: Callable[..., CompressResult]) -> None:
    run()
    stream = StringIO()
    print_compress(Console(file=stream, width=200), run("percentile"))
    assert (
        "reused from the work folder: fold_constants, fold_batch_norm, equalize_layers (3 of 5 passes)"
        in stream.getvalue()
    )
    stream = StringIO()
    print_compress(Console(file=stream, width=200), run(work_dir=None))
    assert "reused from" not in stream.getvalue()


def test_a_longer_recipe_goes_on_where_a_shorter_one_ended(run: Callable[..., CompressResult]) -> None:
    whole = parse_recipe(RECIPE % "min_max")
    run(recipe=Recipe(whole.passes[:4]))
    result = run()
    assert reused(result) == ["fold_constants", "fold_batch_norm", "equalize_layers", "insert_qdq"]
    assert sha256(result) == sha256(run(work_dir=None))


def test_a_saved_recipe_finds_the_stages_of_the_run_that_saved_it(run: Callable[..., CompressResult]) -> None:
    first = run("auto")
    assert first.recipe != parse_recipe(RECIPE % "auto")
    second = run(recipe=first.recipe)
    assert len(reused(second)) == 5
    assert second.recipe == first.recipe
    assert sha256(second) == sha256(first)


@pytest.mark.parametrize("change", ["data", "seed", "threads", "model", "target"])
def test_what_was_made_from_something_else_is_not_used(
    run: Callable[..., CompressResult], folder: Path, tmp_path: Path, change: str
) -> None:
    run()
    other: dict[str, Any] = {"seed": 1} if change == "seed" else {"threads": 1}
    if change == "data":
        other = {"data": write_data(tmp_path / "other.npz", seed=7)}
    elif change == "target":
        other = {"target": "x86-any"}
    elif change == "model":
        model = onnx.load(folder / "model.onnx")
        weight = next(t for t in model.graph.initializer if t.name == "w1")
        weight.raw_data = (np.frombuffer(weight.raw_data, np.float32) * np.float32(1.01)).tobytes()
        onnx.save(model, tmp_path / "other.onnx")
        other = {"model": tmp_path / "other.onnx"}
    assert reused(run(**other)) == []


def test_external_data_belongs_to_the_model(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    digests = []
    for factor in (1, 2):
        weight = next(t for t in model.graph.initializer if t.name == "w1")
        weight.raw_data = (np.frombuffer(weight.raw_data, np.float32) * np.float32(factor)).tobytes()
        here = tmp_path / str(factor)
        here.mkdir()
        onnx.save(
            onnx.ModelProto.FromString(model.SerializeToString()),
            here / "m.onnx",
            save_as_external_data=True,
            location="m.data",
            size_threshold=0,
        )
        digests.append(content_sha256(load(here / "m.onnx")))
    assert (tmp_path / "1" / "m.onnx").read_bytes() == (tmp_path / "2" / "m.onnx").read_bytes()
    assert digests[0] != digests[1]


def test_evaluation_data_does_not_matter_to_passes(run: Callable[..., CompressResult], folder: Path) -> None:
    run()
    assert len(reused(run(eval_data=folder / "plain.npz"))) == 5


def test_an_external_model_is_reused_as_one(folder: Path, run: Callable[..., CompressResult], tmp_path: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    (tmp_path / "in").mkdir()
    onnx.save(model, tmp_path / "in" / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    results = [run(model=tmp_path / "in" / "m.onnx", work_dir=w) for w in (None, tmp_path / "work", tmp_path / "work")]
    assert [len(reused(r)) for r in results] == [0, 0, 5]
    assert len({sha256(r) for r in results}) == 1
    assert results[2].source_sha256 == results[0].source_sha256


@pytest.mark.parametrize("name", sorted(name for name, hazard in BY_NAME.items() if hazard.runnable))
def test_a_pass_makes_the_same_of_a_stage_as_of_the_graph(name: str, tmp_path: Path) -> None:
    """Every prefix of int8 that lies on disk, gone on from, gives the bytes of one run."""
    model = BY_NAME[name].build()
    graph = from_proto(model)
    recipe = load_recipe("int8")
    data = open_data([make_feeds(model, seed=i) for i in range(2)], input_specs(graph))

    def made(passes: tuple[Pass, ...], **options: Any) -> Any:
        context = Context(original=graph, data=data, threads=1, **options)
        return Pipeline(passes)(graph, context), context

    steps = tuple(p for p in recipe.passes if p.name in ("fold_constants", "fold_batch_norm", "insert_qdq"))
    whole, context = made(steps)
    for length in (1, len(steps)):
        work = tmp_path / str(length)
        made(steps[:length], stages=open_stages(work))
        result, own = made(steps, stages=open_stages(work))
        assert [r.reused for r in result.report.children] == [True] * length + [False] * (len(steps) - length)
        assert serialize(result.graph) == serialize(whole.graph)
        assert result.kept == whole.kept
        assert own.warnings == context.warnings
        assert (own.variants is None) == (context.variants is None)
        if own.variants is not None and context.variants is not None:
            assert serialize(own.variants.written()) == serialize(context.variants.written())
            assert own.variants.types == context.variants.types
            assert own.variants.ranges == context.variants.ranges
    assert content_sha256(graph) == content_sha256(from_proto(model))


# ---- what cannot be trusted --------------------------------------------------------------------------------------


def entries(work: Path) -> list[Path]:
    return sorted(path for path in (work / "stages").iterdir() if path.is_dir())


@pytest.mark.parametrize("damage", ["cut", "flip", "report", "no report", "no model", "empty", "other"])
def test_a_damaged_stage_is_made_again(run: Callable[..., CompressResult], tmp_path: Path, damage: str) -> None:
    first = run()
    found = entries(tmp_path / "work")
    assert len(found) == 5
    for entry in found:
        model, report = entry / "model.onnx", entry / "stage.txt"
        if damage == "cut":
            model.write_bytes(model.read_bytes()[:-40])
        elif damage == "flip":
            content = bytearray(model.read_bytes())
            content[len(content) // 2] ^= 1
            model.write_bytes(content)
        elif damage == "report":
            report.write_text(report.read_text()[:-1])
        elif damage == "no report":
            report.unlink()
        elif damage == "no model":
            model.unlink()
        elif damage == "empty":
            shutil.rmtree(entry)
            entry.mkdir()
    if damage == "other":
        copies = [shutil.copytree(entry, tmp_path / entry.name) for entry in found]
        for entry, other in zip(found, [*copies[1:], copies[0]], strict=True):
            shutil.rmtree(entry)
            shutil.copytree(other, entry)
    second = run(output=tmp_path / "again.onnx")
    assert reused(second) == []
    assert sha256(second) == sha256(first)
    assert sum("damaged" in warning for warning in second.warnings) == 5
    third = run(output=tmp_path / "third.onnx")
    assert len(reused(third)) == 5
    assert sha256(third) == sha256(first)


def test_one_damaged_stage_leaves_those_before_it(run: Callable[..., CompressResult], tmp_path: Path) -> None:
    first = run()
    for entry in entries(tmp_path / "work"):
        reports = json.loads((entry / "stage.txt").read_text().partition("\n")[2])["reports"]
        if len(reports) >= 4:
            (entry / "model.onnx").write_bytes(b"")
    second = run()
    assert reused(second) == ["fold_constants", "fold_batch_norm", "equalize_layers"]
    assert sha256(second) == sha256(first)


def test_what_was_half_written_by_a_killed_run_is_not_seen(
    run: Callable[..., CompressResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, content: bytes) -> None:
        path.write_bytes(content[:10])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("onnxcompress.stages.write_file", killed)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert entries(tmp_path / "work") == []
    assert reused(run()) == []


def test_another_process_may_be_faster(
    run: Callable[..., CompressResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = stages._write

    def overtaken(folder: Path, key: str, stage: stages.Stage) -> None:
        written(folder, key, stage)
        shutil.copytree(folder, tmp_path / "work" / "stages" / key)

    monkeypatch.setattr(stages, "_write", overtaken)
    first = run()
    assert not [w for w in first.warnings if "not kept" in w]
    assert len(reused(run())) == 5
    assert {path.name for path in entries(tmp_path / "work") if path.name.startswith(".")} == set()


def test_a_full_disk_stops_nothing(
    run: Callable[..., CompressResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("onnxcompress.stages.write_file", full)
        result = run()
    assert sha256(result) == sha256(run(work_dir=None))
    assert sum("was not kept: No space left" in w for w in result.warnings) == 5


def test_a_work_folder_that_is_a_file_is_refused(run: Callable[..., CompressResult], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be a work folder"):
        run(work_dir=tmp_path / "file")


# ---- before any pass runs ----------------------------------------------------------------------------------------


class Unavailable(Pass):
    """Needs what is never there."""

    name: ClassVar[str] = "unavailable"
    data: bool = Field(False)

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee.APPROXIMATE

    @property
    def needs_data(self) -> bool:
        return self.data

    def check_available(self) -> None:
        if not self.data:
            raise RuntimeUnavailableError("nothing is there")

    def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal | Decision | Detail]:
        yield from ()


class First(Pass):
    """Fails a test that runs it."""

    name: ClassVar[str] = "first"

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee.EXACT

    def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal | Decision | Detail]:
        pytest.fail("it ran")
        yield from ()


@pytest.mark.parametrize(("data", "error"), [(False, RuntimeUnavailableError), (True, DataError)])
def test_what_a_later_pass_lacks_is_told_before_the_first_one_runs(
    folder: Path, data: bool, error: type[Exception]
) -> None:
    with pytest.raises(error):
        Pipeline([First(), Pipeline([Unavailable(data=data)])])(load(folder / "model.onnx"))


# ---- in memory ---------------------------------------------------------------------------------------------------


class Slow(Pass):
    """Halves a weight, and says how often it ran."""

    name: ClassVar[str] = "slow"
    runs: ClassVar[list[int]] = []
    factor: float = 0.5

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee.APPROXIMATE

    def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal | Decision | Detail]:
        self.runs.append(1)
        weight = next(t for node in graph.nodes for t in node.inputs if t.name == "w1")
        value = constant_value(weight)
        assert value is not None
        change_constant(weight, value * np.float32(self.factor))
        yield Change("halved", "w1")
        yield Decision("factor", 0.5)


def test_what_took_long_does_not_run_twice_in_one_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcompress.stages._COSTLY", 0.0)
    graph, kept = load(folder / "model.onnx"), open_stages()
    Slow.runs.clear()

    def made(*passes: Pass, of: Graph = graph) -> PassReport:
        return Pipeline(passes)(of, Context(original=of, stages=kept)).report

    made(Slow(factor=0.25))
    report = made(Slow(factor=0.25), Slow())
    assert len(Slow.runs) == 2
    assert [child.reused for child in report.children] == [False, False]  # no earlier run made them
    made(Slow(factor=0.5), Slow())  # what was decided
    assert len(Slow.runs) == 2
    made(Slow(factor=0.25), of=copy_graph(graph))
    assert len(Slow.runs) == 3
    assert model_info(graph).source_sha256 is not None
