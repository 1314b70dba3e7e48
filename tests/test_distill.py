"""Distillation: better weights in the same graph, never worse ones, the same again, and every refusal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from models import BY_NAME, Net, image, make_feeds

from onnxcompress.base import Change, Context, PassResult, Refusal, SilentProgress
from onnxcompress.compress import compress
from onnxcompress.data import Dataset, open_data
from onnxcompress.demo import demo_calibration, demo_evaluation, demo_model_path
from onnxcompress.errors import DataError, ModelError, UsageError
from onnxcompress.graph import Graph, constant_value, copy_graph, input_specs, model_info
from onnxcompress.io import load, save
from onnxcompress.passes.distill import Distill
from onnxcompress.passes.fold_batch_norm import FoldBatchNorm
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.pipeline import Pipeline
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.recipe import Recipe
from onnxcompress.verify import compare

torch = pytest.importorskip("torch", reason="needs the extra distill")

#: quick, and alone on its thread so that the result does not depend on the machine's cores
QUICK = {"steps": 12, "batch_size": 16, "augment": ("none",), "learning_rate": 1e-2, "average": 0.0}


@cache
def teacher() -> Graph:
    return FoldBatchNorm()(load(demo_model_path())).graph


def noisy(graph: Graph, share: float = 0.1) -> Graph:
    """A copy whose weights are off by ``share`` of their spread, as after a hard compression."""
    rng = np.random.default_rng(0)
    student = copy_graph(graph)
    for node in student.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and len(tensor.shape) in (2, 4):
                value = constant_value(tensor)
                assert value is not None
                tensor.values = (value + share * value.std() * rng.standard_normal(value.shape)).astype(value.dtype)
    return student


@cache
def student() -> Graph:
    return noisy(teacher())


def samples(count: int = 128) -> Dataset:
    return open_data({"input": demo_calibration()["input"][:count]}, input_specs(teacher()), batch=16)


def context(**options: Any) -> Context:
    return Context(**{"original": teacher(), "data": samples(), "threads": 1, "seed": 0, **options})


def sqnr(graph: Graph) -> float:
    data = open_data({"input": demo_evaluation()["input"][:200]}, input_specs(teacher()))
    return compare(teacher(), graph, data, threads=1)[0].sqnr_db


def stored(graph: Graph) -> bytes:
    return to_proto(graph).SerializeToString(deterministic=True)


@cache
def distilled() -> PassResult:
    return Distill(**QUICK)(student(), context())


# ---- what it does ------------------------------------------------------------------------------------------------


def test_the_student_gets_closer_to_its_teacher_on_other_samples() -> None:
    result = distilled()
    assert sqnr(result.graph) > sqnr(student()) + 3
    told = result.report.details["distillation"]
    assert told["outputs"] == {"logits": "classes"}
    assert len(told["blocks"]) >= 3
    assert told["loss"]["after"] < told["loss"]["before"]
    assert told["agreement"]["after"] >= told["agreement"]["before"]
    assert told["samples"] == {"train": 115, "held_out": 13}
    assert [point["step"] for point in told["curve"]] == list(range(13))
    assert told["curve"][-1]["training_loss"] < told["curve"][1]["training_loss"]
    assert [change.kind for change in result.report.changes] == ["distilled"]


def test_names_structure_and_types_stay() -> None:
    before, after = to_proto(student()), to_proto(distilled().graph)
    onnx.checker.check_model(after, full_check=True)
    assert [n.SerializeToString() for n in after.graph.node] == [n.SerializeToString() for n in before.graph.node]
    for a, b in zip(after.graph.initializer, before.graph.initializer, strict=True):
        assert (a.name, a.data_type, list(a.dims)) == (b.name, b.data_type, list(b.dims))


def test_neither_network_is_touched() -> None:
    own, theirs = stored(student()), stored(teacher())
    Distill(**{**QUICK, "steps": 2})(student(), context())
    assert (stored(student()), stored(teacher())) == (own, theirs)


def test_the_same_again() -> None:
    assert stored(Distill(**QUICK)(student(), context()).graph) == stored(distilled().graph)
    assert stored(Distill(**QUICK)(student(), context(seed=1)).graph) != stored(distilled().graph)


@pytest.mark.parametrize(
    "options", [{"optimizer": "sgd", "learning_rate": 0.02}, {"optimizer": "adamw"}, {"average": 0.8}, {"clip": 0.0}]
)
def test_other_ways_to_train(options: dict[str, Any]) -> None:
    result = Distill(**{**QUICK, **options})(student(), context())
    assert sqnr(result.graph) > sqnr(student()) + 1


def test_a_budget_of_time_becomes_steps_that_repeat() -> None:
    options = {**QUICK, "steps": None, "minutes": 0.02}
    result = Distill(**options)(student(), context())
    assert set(result.report.decisions) - {"stop_after"} == {"steps", "optimizer", "learning_rate", "augment"}
    again = Distill(**{**options, **result.report.decisions})(student(), context())
    assert stored(again.graph) == stored(result.graph)


def test_a_learning_rate_is_found_by_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxcompress.passes import distill

    monkeypatch.setattr(distill, "_LEAST_FOR_TRIALS", 10)
    monkeypatch.setattr(distill, "_TRIAL_STEPS", 8)
    monkeypatch.setattr(distill, "_TRIED", (10000.0, 5.0, 0.01))
    options = {**QUICK, "learning_rate": None}
    result = Distill(**options)(student(), context())
    assert result.report.decisions["learning_rate"] == pytest.approx(1e-2)  # not what explodes nor what stands still
    assert stored(result.graph) == stored(distilled().graph)


def test_a_schedule_that_was_cut_short_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxcompress.executor import training

    monkeypatch.setattr(training, "_PATIENCE", 0.3)
    options = {**QUICK, "steps": None, "minutes": 0.05}
    result = Distill(**options)(student(), context())
    decisions = result.report.decisions
    assert decisions["stop_after"] < decisions["steps"]
    monkeypatch.undo()
    again = Distill(**{**options, **decisions})(student(), context())
    assert stored(again.graph) == stored(result.graph)
    assert again.report.details["distillation"]["steps"] == decisions["stop_after"]


# ---- never worse -------------------------------------------------------------------------------------------------


def test_what_only_gets_worse_is_not_kept() -> None:
    wild = {**QUICK, "learning_rate": 5.0, "clip": 0.0, "optimizer": "sgd", "warmup": 0.0}
    result = Distill(**wild)(student(), context())
    assert stored(result.graph) == stored(student())
    assert not result.report.changed
    assert "no state does better" in result.report.refusals[0].reason


def test_a_perfect_student_stays() -> None:
    twin = copy_graph(teacher())
    result = Distill(**{**QUICK, "steps": 3})(twin, context())
    assert stored(result.graph) == stored(twin)


# ---- killed and taken up again -----------------------------------------------------------------------------------


class Killed(Exception):
    """The process went away."""


class Mortal(SilentProgress):
    """Progress that stops the training after some steps."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def track(self, items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
        for number, item in enumerate(items):
            if "distilling" in description and number == self._steps:
                raise Killed
            yield item


@pytest.mark.parametrize(
    "options", [{}, {"average": 0.9, "augment": ("crop", "mixup")}, {"optimizer": "sgd"}, {"optimizer": "adamw"}]
)
def test_killed_and_resumed_is_as_if_nothing_had_been(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxcompress.executor import training

    monkeypatch.setattr(training, "_CHECKPOINT_SECONDS", 0.0)
    step = Distill(**{**QUICK, **options, "checkpoint": str(tmp_path / "state.npz")})
    whole = Distill(**{**QUICK, **options})(student(), context())
    for survived in (5, 4):
        with pytest.raises(Killed):
            step(student(), context(progress=Mortal(survived)))
    assert [path.name for path in tmp_path.iterdir()] == ["state.npz"]
    resumed = step(student(), context())
    assert stored(resumed.graph) == stored(whole.graph)
    assert resumed.report.details["distillation"]["curve"] == whole.report.details["distillation"]["curve"]


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    step = Distill(**{**QUICK, "steps": 2, "checkpoint": str(tmp_path / "state.npz")})
    step(student(), context())
    with pytest.raises(DataError, match="belongs to another"):
        step(noisy(teacher(), 0.2), context())
    for content in (b"nothing", b"", b"PK\x03\x04 cut off", b"\x93NUMPY\x01\x00"):
        (tmp_path / "state.npz").write_bytes(content)
        with pytest.raises(DataError, match="is no checkpoint"):
            step(student(), context())


# ---- quantised students --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cpu", "x86-any"])
def test_a_quantised_student_trains_its_integers(target: str) -> None:
    recipe = Pipeline([InsertQdq(), Distill(**{**QUICK, "steps": 30, "learning_rate": 2e-3})])
    result = recipe(teacher(), context(target=target))
    quantised = InsertQdq()(teacher(), context(target=target)).graph
    assert sqnr(result.graph) > sqnr(quantised) + 0.5
    before, after = to_proto(quantised).graph, to_proto(result.graph).graph
    kinds = {t.name: t.data_type for t in before.initializer}
    assert {t.name: t.data_type for t in after.initializer} == kinds
    assert onnx.TensorProto.INT8 in kinds.values()
    for tensor in after.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        if value.dtype == np.int8 and value.ndim == 4:
            assert value.min() >= -127
            if target == "x86-any":
                rows = np.sort(np.abs(value.astype(int)) * (value > 0), axis=None)
                flat = np.sort(value.reshape(len(value), -1).astype(int), axis=1)
                assert (flat[:, -2:].sum(axis=1) <= 128).all()
                assert (-flat[:, :2].sum(axis=1) <= 128).all()
                assert rows.size


def test_float16_weights_stay_float16() -> None:
    half = to_proto(student())
    from onnxcompress.passes.convert_float16 import ConvertFloat16

    small = ConvertFloat16()(from_proto(half), context()).graph
    result = Distill(**QUICK)(small, context())
    assert sqnr(result.graph) > sqnr(small) + 3
    before = {t.name: t.data_type for t in to_proto(small).graph.initializer}
    assert {t.name: t.data_type for t in to_proto(result.graph).graph.initializer} == before


# ---- outputs, blocks, images ---------------------------------------------------------------------------------------


def test_what_outputs_hold() -> None:
    from onnxcompress.executor.losses import kind_of

    rng = np.random.default_rng(0)
    scores = rng.standard_normal((5, 7)).astype(np.float32)
    unit = scores / np.linalg.norm(scores, axis=1, keepdims=True)
    chances = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert kind_of("logits", scores) == "classes"
    assert kind_of("logits", scores[:, :, None, None]) == "classes"
    assert kind_of("y", unit) == "embedding"
    assert kind_of("sentence_embedding", scores) == "embedding"
    assert kind_of("prob", chances) == "probabilities"
    assert kind_of("mask", np.zeros((2, 3, 4, 4), np.float32)) == "values"
    assert kind_of("value", scores[:, :1]) == "values"
    assert kind_of("labels", np.zeros((2, 3), np.int64)) is None


def test_the_loss_of_equals_is_nothing_and_that_of_others_is_not() -> None:
    from onnxcompress.executor.losses import Objective, Target

    for kind in ("classes", "probabilities", "embedding", "values"):
        values = torch.softmax(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), 1)
        target = Target("s", "t", kind, 0.5)  # type: ignore[arg-type]
        objective = Objective([target], [Target("b", "b", "values", 2.0, {1: (0, 2)})], block_weight=3.0)
        block = torch.arange(12.0).reshape(2, 3, 2)
        same = objective.loss({"s": values, "b": block[:, [0, 2]]}, {"t": values, "b": block}, None)
        assert abs(same.item()) < 1e-6
        other = objective.loss({"s": values.flip(1), "b": block[:, [0, 2]] + 2}, {"t": values, "b": block}, None)
        assert other.item() > 3.0 * 4 / 2.0


def test_divergence_at_a_temperature() -> None:
    from onnxcompress.executor.losses import Objective, Target

    a, b = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[0.0, 3.0, 1.0]])
    objective = Objective([Target("s", "t", "classes", 1.0)], [], temperature=4.0, value_weight=0.0)
    p, q = (np.exp(x.numpy() / 4) / np.exp(x.numpy() / 4).sum() for x in (b, a))
    wanted = 16 * float((p * np.log(p / q)).sum())
    assert objective.loss({"s": a}, {"t": b}, None).item() == pytest.approx(wanted, rel=1e-5)


def test_blocks_end_at_joins_and_cut_tensors_are_compared_where_something_is_left() -> None:
    from onnxcompress.executor.losses import block_points, kept_positions, matched

    points = block_points(student(), teacher())
    assert points
    dead = student()  # what no output depends on is not compared, whether it can be executed or not
    dead.nodes.append(gs.Node("Add", "dead", inputs=[dead.tensors()[points[0]]] * 2, outputs=[gs.Variable("unread")]))
    with_it = teacher()
    with_it.nodes.append(gs.Node("Relu", "unread", inputs=[with_it.inputs[0]], outputs=[gs.Variable("unread")]))
    assert block_points(dead, with_it) == points
    graph = copy_graph(student())
    model_info(graph).metadata["onnxcompress.kept"] = '{"a": {"1": "0-1,3"}, "b": {"1": "0-1"}, "c": {"1": "2-3"}}'
    kept = kept_positions(graph, {})
    assert kept == {"a": {1: (0, 1, 3)}, "b": {1: (0, 1)}, "c": {1: (2, 3)}}
    assert kept_positions(graph, {"e": {2: (1,)}}) == {"e": {2: (1,)}}
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal((2, 4, 3)).astype(np.float32) for name in "abcde"}
    mine = {"a": values["a"][:, [0, 1, 3]], "b": values["b"], "c": values["c"][:, [2, 3]], "d": values["d"]}
    factors = np.linspace(0.7, 1.4, 3, dtype=np.float32)
    mine["e"] = values["e"] * factors  # scaled since
    values["f"], mine["f"] = values["e"], values["d"]  # something else
    found = matched(list("abcdef"), mine, values, kept)
    assert [(t.student, dict(t.keep)) for t in found] == [
        *(("a", {1: (0, 1, 3)}), ("c", {1: (2, 3)}), ("d", {}), ("e", {}))
    ]
    for target in found:
        np.testing.assert_allclose(
            target.of_teacher(torch.from_numpy(values[target.teacher])).numpy(), mine[target.student], rtol=1e-5
        )


def test_digits_are_moved_but_not_mirrored() -> None:
    result = Distill(**{**QUICK, "steps": 1, "augment": None})(student(), context())
    assert result.report.decisions["augment"] == ["crop"]


def test_few_images_are_mixed_unless_somebody_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {**QUICK, "steps": 2, "batch_size": 64, "augment": None}
    images = demo_calibration()
    data = {"input": images["input"][:64], "labels": np.zeros(64, np.int64)}

    def changes(**options: Any) -> Any:
        own = context(data=open_data(data, input_specs(teacher()), batch=16))
        return Distill(**{**step, **options})(student(), own).report.decisions["augment"]

    assert "cutmix" not in changes()  # a sample is seen twice
    monkeypatch.setattr("onnxcompress.passes.distill._OFTEN", 2)
    found = changes()
    assert "cutmix" in found
    assert changes(augment=tuple(found)) == sorted(found)  # a replay
    assert changes(augment=("none",)) == ["none"]
    assert "cutmix" not in changes(label_weight=1.0)  # a mixed image has no label


@pytest.mark.parametrize("change", ["flip", "crop", "mixup", "cutmix"])
def test_changes_of_images(change: str) -> None:
    from onnxcompress.executor.samples import augment

    x = np.random.default_rng(0).random((16, 3, 16, 24)).astype(np.float32)
    other = np.arange(16)
    feeds = {"image": x, "number": other}
    once = augment(feeds, ["image"], (change,), np.random.default_rng(1))
    twice = augment(feeds, ["image"], (change,), np.random.default_rng(1))
    assert once["image"].shape == x.shape
    assert once["image"].dtype == np.float32
    np.testing.assert_array_equal(once["image"], twice["image"])
    assert not np.array_equal(once["image"], x)
    assert once["number"] is other
    if change == "flip":
        assert {
            np.array_equal(a, b) or np.array_equal(a, b[..., ::-1]) for a, b in zip(once["image"], x, strict=True)
        } == {True}
    if change in ("mixup", "cutmix"):
        assert once["image"].min() >= x.min()
        assert once["image"].max() <= x.max()
        untouched = sum(np.array_equal(a, b) for a, b in zip(once["image"], x, strict=True))
        assert 2 <= untouched <= 13  # about a half
    if change == "cutmix":
        assert np.isin(once["image"], x).all()


def test_ways_to_mix_share_the_samples() -> None:
    from onnxcompress.executor.samples import augment

    x = np.random.default_rng(0).random((300, 1, 16, 16)).astype(np.float32)
    mixed = augment({"x": x}, ["x"], ("mixup", "cutmix"), np.random.default_rng(1))["x"]
    known = np.isin(mixed, x).reshape(300, -1)  # an average of two is no pixel of the data
    same = np.array([np.array_equal(a, b) for a, b in zip(mixed, x, strict=True)])
    assert 70 <= same.sum() <= 130
    assert 70 <= (~known.all(axis=1)).sum() <= 130


def test_only_images_are_taken_for_images() -> None:
    from onnxcompress.executor.samples import image_inputs

    net = Net()
    net.input("image", ["N", 3, 32, 32])
    net.input("maps", ["N", 16, 32, 32])
    net.input("ids", ["N", 3, 32, 32], onnx.TensorProto.INT64)
    graph = from_proto(BY_NAME["residual"].build())
    graph.inputs = [gs.Variable(v.name, np.float32, [1]) for v in net.inputs]
    feeds = {"image": np.zeros((1, 3, 32, 32)), "maps": np.zeros((1, 16, 32, 32)), "ids": np.zeros((1, 3, 32, 32), int)}
    assert image_inputs(input_specs(graph), feeds) == ["image"]


def test_an_embedding_with_lengths_that_vary() -> None:
    model = BY_NAME["attention"].build()
    original = from_proto(model)
    rng = np.random.default_rng(0)
    batches = [make_feeds(model, seed=i, sizes={"N": 4, "S": int(rng.integers(3, 8))}) for i in range(20)]
    own = noisy(original, 0.2)
    data = open_data(batches, input_specs(original))
    result = Distill(**{**QUICK, "steps": 40, "learning_rate": 2e-2})(own, context(original=original, data=data))
    told = result.report.details["distillation"]
    assert told["outputs"] == {"y": "values"}
    assert told["sqnr_db"]["after"] > told["sqnr_db"]["before"] + 3
    assert told["augment"] == []


def test_labels_count_where_they_are_asked_for() -> None:
    arrays = demo_evaluation()
    data = open_data({k: v[:200] for k, v in arrays.items()}, input_specs(teacher()), batch=32)
    plain = Distill(**QUICK)(student(), context(data=data))
    labelled = Distill(**{**QUICK, "label_weight": 1.0})(student(), context(data=data))
    assert stored(plain.graph) != stored(labelled.graph)


# ---- the stream of batches -------------------------------------------------------------------------------------------


def test_every_sample_once_an_epoch_and_taken_up_anywhere() -> None:
    from onnxcompress.executor.samples import Shuffled

    x = np.arange(50, dtype=np.float32)[:, None]
    net = Net()
    net.add("Relu", net.input("x", ["N", 1]), to="y")
    net.output("y", ["N", 1])
    data = open_data({"x": x}, input_specs(from_proto(net.model())))
    for memory in (1 << 20, 40):  # all at once, and in windows
        stream = Shuffled(data, 8, 3, memory).batches()
        batches = [next(stream).feeds["x"][:, 0].tolist() for _ in range(18)]
        if memory > 40:
            assert len({value for batch in batches[:6] for value in batch}) == 48
            assert batches[:6] != batches[6:12]
        assert all(len(batch) == 8 for batch in batches)
        for start in (0, 5, 11):
            late = Shuffled(data, 8, 3, memory).batches(start)
            assert [next(late).feeds["x"][:, 0].tolist() for _ in range(3)] == batches[start : start + 3]


def test_chance_does_not_win() -> None:
    from onnxcompress.executor.training import SURE, Evaluation, surely

    rng = np.random.default_rng(0)
    start = rng.random(100)
    noise = [surely(start, start + rng.normal(0, 0.5, 100)) for _ in range(200)]
    assert np.mean(np.array(noise) >= SURE) < 0.25  # 0.16 of a normal distribution
    assert surely(start, start - 0.2 + rng.normal(0, 0.5, 100)) >= SURE
    begin, good = Evaluation(0, 1.0, 0.9), Evaluation(5, 0.5, 0.9, None, 3.0)
    assert good.better_than(begin)
    assert not Evaluation(5, 0.5, 0.9, None, 0.9).better_than(begin)
    assert Evaluation(5, 0.5, 0.89, None, 3.0, 0.9).better_than(begin)  # one sample of a hundred
    assert not Evaluation(5, 0.5, 0.8, None, 3.0, 1.1).better_than(begin)
    assert not Evaluation(6, 0.6, 0.9, None, 3.0).better_than(good)


def test_images_are_judged_by_changed_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A student that was fitted to the held-out samples is no better for it."""
    judged: list[np.ndarray[Any, Any]] = []
    step = {**QUICK, "steps": 1, "augment": ("crop",)}
    told = Distill(**step)(student(), context()).report.details["distillation"]
    assert told["samples"] == {"train": 115, "held_out": 13}
    from onnxcompress.executor.training import Trainer

    first = Trainer.__init__

    def spy(self: Any, network: Any, objective: Any, ask: Any, data: Any, held: Any, *rest: Any) -> None:
        judged.extend(np.asarray(batch.feeds["input"]) for batch in held)
        first(self, network, objective, ask, data, held, *rest)

    monkeypatch.setattr(Trainer, "__init__", spy)
    Distill(**step)(student(), context())
    copies = np.concatenate(judged)
    assert len(copies) == 8 * 13
    held = Distill(**step).hold_out(samples(), 0)
    assert held is not None
    originals = np.concatenate([batch.feeds["input"] for batch in held[1]])
    assert not np.array_equal(copies[:13], originals)
    assert not np.array_equal(copies[:13], copies[13:26])


@pytest.mark.parametrize(("given", "held"), [(2, 1), (4, 2), (8, 4), (30, 4), (100, 10), (128, 13)])
def test_some_samples_are_held_out_of_few(given: int, held: int) -> None:
    """One or two cannot tell a gain from chance, so that nothing would ever be learned."""
    parts = Distill().hold_out(samples().take(given), 0)
    assert parts is not None
    assert [part.samples for part in parts] == [given - held, held]


def test_passes_before_it_do_not_see_what_it_judges_by() -> None:
    class Sees(FoldBatchNorm):
        seen: ClassVar[list[int]] = []

        def requires(self, graph: Graph, context: Context) -> None:
            assert context.data is not None
            self.seen.append(context.data.samples)

    own = context()
    Pipeline([Sees(), Distill(**{**QUICK, "steps": 1}), Sees()])(noisy(load(demo_model_path())), own)
    assert Sees.seen == [115, 128]
    assert own.data is not None
    assert own.data.samples == 128


def test_the_learning_rate_warms_up_and_falls() -> None:
    from onnxcompress.executor.training import Settings

    rates = [Settings(steps=1000).rate(step) for step in range(1000)]
    assert rates[0] < 0.02
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == 100
    assert rates[-1] < 1e-4
    assert Settings(steps=1).rate(0) > 0
    assert max(Settings(steps=40).rate(step) for step in range(40)) <= 1.0


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_without_a_teacher_there_is_nothing_to_learn() -> None:
    graph = student()
    with pytest.raises(UsageError, match="--teacher"):
        Distill()(graph, context(original=graph))
    with pytest.raises(UsageError, match="folder of the checkpoint"):
        Distill(checkpoint="/nowhere/state.npz")(graph, context())


def test_what_cannot_be_executed_is_refused_and_stays() -> None:
    model = BY_NAME["training_bn"].build()
    graph, original = from_proto(model), from_proto(model)
    data = open_data([make_feeds(model, seed=i) for i in range(4)], input_specs(graph))
    given = context(original=original, data=data)
    result = Distill(**QUICK)(graph, given)
    assert stored(result.graph) == stored(graph)
    assert "training mode" in result.report.refusals[0].reason
    assert "n1_BatchNormalization" in given.warnings[0]


def test_what_has_no_weights_is_refused_and_stays() -> None:
    net = Net()
    net.add("Relu", net.add("Mul", image(net), net.floats(2.0)), to="y")
    net.output("y", ["N", 3, 8, 8])
    graph, original = from_proto(net.model()), from_proto(net.model())
    data = open_data([make_feeds(net.model(), seed=i) for i in range(4)], input_specs(graph))
    result = Distill(**QUICK)(graph, context(original=original, data=data))
    assert stored(result.graph) == stored(graph)
    assert "no weight that could be trained" in result.report.refusals[0].reason


def test_a_teacher_of_another_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="takes an input 'x'"):
        Distill(**QUICK)(student(), context(original=from_proto(BY_NAME["residual"].build())))


@pytest.mark.parametrize("options", [{"augment": ("rotate",)}, {"steps": 0}, {"minutes": 0.0}, {"batch": 3}])
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rotate|greater|Extra"):
        Distill(**options)


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distill")
    save(student(), path / "student.onnx")
    save(teacher(), path / "teacher.onnx")
    np.savez(path / "images.npz", allow_pickle=False, input=demo_calibration()["input"][:128])
    return path


COMMAND = "distill student.onnx --teacher teacher.onnx --data images.npz --threads 1 --seed 0 --batch-size 16"
COMMAND += " --steps 12 --learning-rate 1e-2 --augment none --average 0"


def run(folder: Path, *line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *line],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_writes_a_better_file_and_two_processes_write_the_same(folder: Path) -> None:
    one = run(folder, "-m", "onnxcompress", *COMMAND.split(), "-o", "one.onnx")
    assert one.returncode == 0, one.stderr
    assert one.stdout.count("written: one.onnx") == 1
    assert sqnr(load(folder / "one.onnx")) > sqnr(student()) + 3
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 -m onnxcompress"
    two = run(folder, *launch.split(), *COMMAND.split(), "-o", "two.onnx", OMP_NUM_THREADS="1")
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("written: two.onnx") == 1
    weights = [
        {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(folder / f).graph.initializer}
        for f in ("one.onnx", "two.onnx")
    ]
    start = {t.name: onnx.numpy_helper.to_array(t) for t in to_proto(student()).graph.initializer}
    moved = np.sqrt(sum(np.square(weights[0][name] - start[name]).sum() for name in start))
    apart = np.sqrt(sum(np.square(weights[0][name] - weights[1][name]).sum() for name in start))
    assert apart < 0.02 * moved


def test_the_teacher_is_not_overwritten(folder: Path) -> None:
    result = run(folder, "-m", "onnxcompress", *COMMAND.split(), "-o", "teacher.onnx")
    assert result.returncode == 2
    assert "is the teacher itself" in result.stderr


def test_without_torch_the_extra_is_named(folder: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from onnxcompress.cli import main; main()"
    result = run(folder, "-c", code, *COMMAND.split(), "-o", "none.onnx")
    assert result.returncode == 6
    assert result.stderr.strip().splitlines()[-1].startswith("error: torch is not installed")
    assert "onnxcompress[distill]" in result.stderr
    assert not (folder / "none.onnx").exists()


def test_report_entries_are_what_passes_report() -> None:
    report = distilled().report
    assert all(isinstance(change, Change) for change in report.changes)
    assert all(isinstance(refusal, Refusal) for refusal in report.refusals)


def test_the_teachers_file_is_tried_in_a_child_process_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(paths: list[str], **_: object) -> None:
        raise ModelError(f"tried {paths}")

    monkeypatch.setattr(sys.modules[compress.__module__], "Probe", refuse)
    recipe = Recipe((Distill(teacher="teacher.onnx"), Distill(teacher="teacher.onnx"), Distill()))
    with pytest.raises(ModelError, match=r"tried \['student.onnx', 'teacher.onnx'\]"):
        compress("student.onnx", {}, tmp_path / "out.onnx", recipe=recipe)
