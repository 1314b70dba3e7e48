"""Random valid models through every pass and every recipe: nothing invalid, nothing wrong.

:mod:`fuzz_graphs` draws the models, :mod:`fuzz_checks` says what must hold. Here more than ten thousand cases run,
always the same ones; ``ONNXCOMPRESS_FUZZ=20`` runs 20 times as many, other ones each time. A model that breaks
something is made smaller by hypothesis and left as ``found-*.onnx`` in ``tests/fuzz_cases``, where those that did so
once are kept: they are run again by :func:`test_what_once_failed`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fuzz_checks import STAYS, TOO_NEW, Case, Subject, Tally, folder, fuzzed, kept, run_cases
from models import F32
from onnx import numpy_helper
from pruning_oracle import assert_exact, assert_taint_stays
from qdq_oracle import simulate

from onnxcompress.base import Change, Context, Pass, Refusal
from onnxcompress.graph import Graph, copy_graph, sort_nodes
from onnxcompress.passes.arrange_blocks import ArrangeBlocks
from onnxcompress.passes.convert_float16 import ConvertFloat16
from onnxcompress.passes.correct_bias import CorrectBias
from onnxcompress.passes.eliminate_dead_nodes import EliminateDeadNodes
from onnxcompress.passes.equalize_layers import EqualizeLayers
from onnxcompress.passes.fold_batch_norm import FoldBatchNorm
from onnxcompress.passes.fold_constants import FoldConstants
from onnxcompress.passes.fold_padding import FoldPadding
from onnxcompress.passes.fuse_hard_swish import FuseHardSwish
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.passes.prune_channels import PruneChannels
from onnxcompress.passes.prune_weights import PruneWeights
from onnxcompress.passes.quantize_dynamic import QuantizeDynamic
from onnxcompress.passes.quantize_embeddings import QuantizeEmbeddings
from onnxcompress.passes.round_weights import RoundWeights
from onnxcompress.quantization.calibration import calibrate
from onnxcompress.quantization.canonical import to_canonical_form
from onnxcompress.quantization.placement import place
from onnxcompress.quantization.qdq import insert_quantizers
from onnxcompress.recipe import load_recipe
from onnxcompress.session import Session
from onnxcompress.shapes import infer_shapes
from onnxcompress.targets import CPU

LOSSLESS = (
    Case("fold_constants", (FoldConstants(),)),
    Case("fold_constants_small", (FoldConstants(size_limit=0),)),
    Case("eliminate_dead_nodes", (EliminateDeadNodes(),)),
    Case("fold_batch_norm", (FoldBatchNorm(),)),
    Case("fold_padding", (FoldPadding(),)),
    Case("fuse_hard_swish", (FuseHardSwish(),)),
    Case("arrange_blocks", (ArrangeBlocks(residuals="sum", projections="merged"),)),
    Case("lossless", load_recipe("lossless").passes),
)
LOSSY = (
    Case("prune_weights", (PruneWeights(sparsity=0.5),)),
    Case("prune_weights_pattern", (PruneWeights(pattern="2:4"),)),
    Case("quantize_embeddings", (QuantizeEmbeddings(minimum_bytes=0),), least_sqnr=20.0),
    Case("quantize_dynamic", (QuantizeDynamic(use="always", minimum_weights=0, audit=False),), least_sqnr=10.0),
    Case("convert_float16", (ConvertFloat16(),), least_sqnr=30.0),
    Case("convert_float16_io", (ConvertFloat16(keep_io=False),), least_sqnr=30.0),
    Case("fp16", load_recipe("fp16").passes, least_sqnr=30.0),
    Case(
        "prune_channels",
        (PruneChannels(params=0.6, recover=False, importance="l2", allocation="uniform", round_to=1),),
        refusals=STAYS,
    ),
)
QDQ = InsertQdq(observer="min_max", audit=False)
CALIBRATED = (
    Case("equalize_layers", (EqualizeLayers(),)),
    Case("insert_qdq", (QDQ,), refusals=TOO_NEW),
    Case("round_weights", (QDQ, RoundWeights()), refusals=TOO_NEW),
    Case("correct_bias", (QDQ, CorrectBias()), refusals=TOO_NEW),
    Case("prune_recover", (PruneChannels(params=0.6, round_to=1),), refusals=STAYS),
)


def decided(name: str) -> tuple[Pass, ...]:
    """The passes of a recipe as a saved one has them: what is timed otherwise is decided."""
    options: dict[str, dict[str, Any]] = {
        "arrange_blocks": {"residuals": "sum", "projections": "merged"},
        "quantize_dynamic": {"use": "never"},
        "prune_channels": {"macs": None, "params": 0.6, "round_to": 1},
    }
    return tuple(type(p)(**{**p.model_dump(), **options.get(p.name, {})}) for p in load_recipe(name).passes)


RECIPES = tuple(
    Case(name, decided(name), refusals=f"{STAYS}|{TOO_NEW}") for name in ("int8", "int8-accurate", "prune-int8")
)


def told(tally: Tally, least: int) -> None:
    print(tally)
    assert tally.cases >= least


def run_group(cases: tuple[Case, ...], examples: int, **options: Any) -> None:
    """All cases on as many models."""
    tally = Tally()

    @fuzzed(examples, **options)
    def check(model: onnx.ModelProto) -> None:
        run_cases(model, cases, tally)

    check()
    print(tally)
    assert tally.models >= examples
    assert tally.cases == tally.models * len(cases)
    assert tally.ran > tally.cases // 2
    assert {step.name for case in cases for step in case.steps} - NOTHING_TO_DO <= set(tally.changed)


#: decided to do nothing, or too small a table
NOTHING_TO_DO = {"quantize_dynamic", "quantize_embeddings"}
#: models a test; with the cases on each of them that makes more than ten thousand
EXAMPLES = {"lossless": 900, "lossy": 450, "calibrated": 200, "recipes": 120, "pruned": 150, "simulated": 150}


def test_ten_thousand_cases() -> None:
    """Counted is what each test asserts of itself; one model through one pass is one case."""
    groups = {"lossless": LOSSLESS, "lossy": LOSSY, "calibrated": CALIBRATED, "recipes": RECIPES}
    assert sum(EXAMPLES[name] * len(cases) for name, cases in groups.items()) >= 10_000


def test_lossless_passes() -> None:
    """The outputs are the same."""
    run_group(LOSSLESS, EXAMPLES["lossless"])


def test_lossy_passes_without_data() -> None:
    """The outputs are finite, and where rounding is all that happens, near."""
    run_group(LOSSY, EXAMPLES["lossy"])


def test_passes_that_calibrate() -> None:
    run_group(CALIBRATED, EXAMPLES["calibrated"])


def test_whole_recipes() -> None:
    run_group(RECIPES, EXAMPLES["recipes"], dtypes=(F32,))


def test_pruned_is_masked() -> None:
    """Removing channels is the same as setting them to zero where they are read, and nothing else reads them."""
    count = 0

    @fuzzed(EXAMPLES["pruned"], dtypes=(F32,))
    def check(model: onnx.ModelProto) -> None:
        nonlocal count
        if Subject(model).expected is not None:
            kept(model, "pruned_is_masked", lambda: (assert_exact(model, seed=1), assert_taint_stays(model, seed=2)))
            count += 2

    check()
    assert count > 200


def simulated(model: onnx.ModelProto) -> int:
    """Compare the quantised model with numpy's fake quantisation; how many tensors became integers."""
    subject = Subject(model)
    context = subject.context()
    if subject.expected is None or context.data is None or subject.graph.opset > CPU.maximum_opset:
        return 0
    graph = copy_graph(subject.graph)
    if graph.opset < CPU.minimum_opset or any(node.domain for node in graph.nodes):
        return 0
    list(to_canonical_form(graph, infer_shapes(graph)))
    sort_nodes(graph)
    written = copy_graph(graph)
    placement = place(written, CPU)
    ranges = calibrate(written, [s for names in placement.sources.values() for s in names], context.data, threads=1)
    feeds = dict(context.data.first().feeds)
    defaults = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    inputs = {t.name for t in written.inputs}
    expected = simulate(written, placement, ranges, feeds | {n: v for n, v in defaults.items() if n in inputs})
    list(insert_quantizers(written, placement, ranges))
    sort_nodes(written)
    found = Session(written, optimization="disabled", threads=1).run(feeds)
    for name, value in expected.items():
        if value.dtype == np.float32 and np.isfinite(value).all():
            assert np.abs(found[name] - value).max(initial=0) <= 1e-5 * (np.abs(value).max(initial=0) + 1e-9), name
    return len(placement.quantized)


def test_quantised_is_simulated() -> None:
    count = 0

    @fuzzed(EXAMPLES["simulated"], dtypes=(F32,))
    def check(model: onnx.ModelProto) -> None:
        nonlocal count
        if not any(node.op_type in ("If", "Loop") for node in model.graph.node):
            kept(model, "quantised_is_simulated", lambda: simulated(model))
            count += 1

    check()
    assert count > 50


EVERY = {case.name: case for case in (*LOSSLESS, *LOSSY, *CALIBRATED, *RECIPES)}


@pytest.mark.parametrize("path", sorted(folder().glob("*.onnx")), ids=lambda path: path.stem)
def test_what_once_failed(path: Path) -> None:
    """Every case on every model that broke one of them."""
    run_cases(onnx.load(path), tuple(EVERY.values()), Tally())


def test_a_found_model_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that is wrong is found, its model is made small, and both are told."""
    monkeypatch.setenv("ONNXCOMPRESS_FUZZ_FOUND", str(tmp_path))

    class Wrong(EliminateDeadNodes):
        def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal]:
            yield from super().apply(graph, context)
            for node in graph.nodes:
                if node.op == "Sigmoid":
                    node.op = "Tanh"
                    yield Change("broken", node.name)

    @fuzzed(300, dtypes=(F32,))
    def check(model: onnx.ModelProto) -> None:
        run_cases(model, (Case("wrong", (Wrong(),)),), Tally())

    with pytest.raises(AssertionError, match="differs by") as caught:
        check()
    assert any("found-wrong.onnx" in note for note in caught.value.__notes__)
    found = onnx.load(tmp_path / "found-wrong.onnx")
    assert [node.op_type for node in found.graph.node] == ["Sigmoid"]
