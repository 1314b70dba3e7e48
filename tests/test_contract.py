"""Every pass keeps the contract of :mod:`onnxcompress.base` on every hazard model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import onnx
import pytest
from models import BY_NAME, HAZARDS, Hazard, make_feeds

from onnxcompress.base import Guarantee, Pass, PassResult
from onnxcompress.graph import walk_graphs
from onnxcompress.passes.eliminate_dead_nodes import EliminateDeadNodes
from onnxcompress.passes.fold_batch_norm import FoldBatchNorm
from onnxcompress.passes.fold_constants import FoldConstants
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.session import Session

#: every registered pass that needs no data, with the options worth a run of their own
PASSES: tuple[Pass, ...] = (FoldConstants(), FoldConstants(size_limit=0), EliminateDeadNodes(), FoldBatchNorm())

#: relative L2 that floating-point reordering may cause, by the type of the output
TOLERANCE = {"float64": 1e-5, "float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-2}


def label(item: Pass | Hazard) -> str:
    if isinstance(item, Hazard):
        return item.name
    return "-".join([item.name, *(f"{k}={v}" for k, v in item.model_dump(exclude_defaults=True).items())])


every_pass = pytest.mark.parametrize("step", PASSES, ids=label)
every_hazard = pytest.mark.parametrize("hazard", HAZARDS, ids=label)


def hazard_bytes(hazard: Hazard) -> bytes:
    """The model as the toolkit writes it without any pass."""
    return to_proto(from_proto(hazard.build())).SerializeToString()


@cache
def applied(hazard_name: str, index: int) -> PassResult:
    return PASSES[index](from_proto(BY_NAME[hazard_name].build()))


def result_of(step: Pass, hazard: Hazard) -> PassResult:
    return applied(hazard.name, next(i for i, p in enumerate(PASSES) if p is step))


def interface(values: Sequence[onnx.ValueInfoProto]) -> list[tuple[str, bytes]]:
    return [(value.name, value.type.SerializeToString()) for value in values]


@every_hazard
@every_pass
def test_input_is_untouched(step: Pass, hazard: Hazard) -> None:
    graph = from_proto(hazard.build())
    before = to_proto(graph).SerializeToString()
    step(graph)
    assert to_proto(graph).SerializeToString() == before == hazard_bytes(hazard)


@every_hazard
@every_pass
def test_output_is_a_valid_model(step: Pass, hazard: Hazard) -> None:
    model = to_proto(result_of(step, hazard).graph)
    onnx.checker.check_model(model, full_check=True)


@every_hazard
@every_pass
def test_interface_is_unchanged(step: Pass, hazard: Hazard) -> None:
    before = to_proto(from_proto(hazard.build()))
    after = to_proto(result_of(step, hazard).graph)
    assert interface(after.graph.input) == interface(before.graph.input)
    assert interface(after.graph.output) == interface(before.graph.output)
    assert list(after.opset_import) == list(before.opset_import)
    assert after.ir_version == before.ir_version
    assert [f.name for f in after.functions] == [f.name for f in before.functions]


@every_hazard
@every_pass
def test_same_bytes_again(step: Pass, hazard: Hazard) -> None:
    again = step(from_proto(hazard.build()))
    first = result_of(step, hazard)
    assert to_proto(again.graph).SerializeToString() == to_proto(first.graph).SerializeToString()
    assert again.report.changes == first.report.changes
    assert again.report.refusals == first.report.refusals


@every_hazard
@every_pass
def test_idempotent(step: Pass, hazard: Hazard) -> None:
    if step.guarantee is Guarantee.APPROXIMATE:
        pytest.skip("only lossless passes are idempotent")
    once = result_of(step, hazard).graph
    twice = step(once)
    assert twice.report.changes == ()
    assert to_proto(twice.graph).SerializeToString() == to_proto(once).SerializeToString()


@every_hazard
@every_pass
def test_report_tells_the_truth(step: Pass, hazard: Hazard) -> None:
    """Where bytes differ there is a change on record, and the other way round; every entry names something."""
    result = result_of(step, hazard)
    different = to_proto(result.graph).SerializeToString() != hazard_bytes(hazard)
    assert result.report.changed == different
    names = {node.name for part in walk_graphs(from_proto(hazard.build())) for node in part.nodes}
    for refusal in result.report.refusals:
        assert refusal.node in names
        assert refusal.reason
        assert "\n" not in refusal.reason


@every_hazard
@every_pass
def test_names_do_not_move(step: Pass, hazard: Hazard) -> None:
    """A tensor that survives keeps its name: no name stands for a tensor of another type or shape afterwards."""

    def shapes(model: onnx.ModelProto) -> dict[str, bytes]:
        inferred = onnx.shape_inference.infer_shapes(model)
        return {v.name: v.type.SerializeToString() for v in inferred.graph.value_info if v.type.tensor_type.elem_type}

    before = shapes(to_proto(from_proto(hazard.build())))
    for name, described in shapes(to_proto(result_of(step, hazard).graph)).items():
        if name in before:
            known, now = onnx.TypeProto.FromString(before[name]), onnx.TypeProto.FromString(described)
            assert now.tensor_type.elem_type == known.tensor_type.elem_type
            assert len(now.tensor_type.shape.dim) == len(known.tensor_type.shape.dim) or not known.tensor_type.HasField(
                "shape"
            )


@every_hazard
@every_pass
def test_guarantee_holds(step: Pass, hazard: Hazard) -> None:
    if not hazard.runnable:
        pytest.skip("onnxruntime's CPU provider has no kernel for this model")
    model = hazard.build()
    reference = Session(model, optimization="disabled", threads=1)
    candidate = Session(result_of(step, hazard).graph, optimization="disabled", threads=1)
    for seed, sizes in ((0, {}), (1, {"N": 1, "S": 1, "H": 6}), (2, {"N": 4, "S": 2, "H": 10})):
        feeds = make_feeds(model, seed=seed, sizes=sizes)
        expected, found = reference.run(feeds), candidate.run(feeds)
        for name, wanted in expected.items():
            assert found[name].shape == wanted.shape
            assert found[name].dtype == wanted.dtype
            if step.guarantee is Guarantee.EXACT or wanted.dtype.name not in TOLERANCE:
                assert found[name].tobytes() == wanted.tobytes() or list(found[name]) == list(wanted)
            else:
                assert relative_l2(found[name], wanted) <= TOLERANCE[wanted.dtype.name]


def relative_l2(found: np.ndarray, wanted: np.ndarray) -> float:
    difference = np.linalg.norm(found.astype(np.float64) - wanted.astype(np.float64))
    size = np.linalg.norm(wanted.astype(np.float64))
    return float(difference / size) if size else float(difference)
