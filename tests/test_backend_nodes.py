"""The node tests of onnx's backend suite through the lossless passes.

Each model runs as it is shipped, and once more with its inputs promoted to initializers, so that folding really acts:
as shipped the models have no constants at all. The oracle is onnxruntime at ORT_DISABLE_ALL on the model before the
passes; where it has no kernel, onnx's reference implementation on both; and where that fails too, the outputs that the
suite states.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.case.test_case import TestCase as BackendCase
from onnx.reference import ReferenceEvaluator

from onnxcompress.base import PassResult
from onnxcompress.node_evaluation import EVALUATED
from onnxcompress.passes.eliminate_dead_nodes import EliminateDeadNodes
from onnxcompress.passes.fold_batch_norm import FoldBatchNorm
from onnxcompress.passes.fold_constants import FoldConstants
from onnxcompress.proto import from_proto, to_proto

PASSES = (FoldConstants(), EliminateDeadNodes(), FoldBatchNorm())
RANDOM = frozenset(
    ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
)
#: relative L2 between numpy and onnxruntime on one operator, by type; integers and the like must be equal
TOLERANCE = {"float16": 5e-3, "bfloat16": 2e-2, "float32": 2e-6, "float64": 1e-6}

Feeds = Mapping[str, Any]


@cache
def backend_cases() -> dict[str, BackendCase]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.random.seed(0)  # noqa: NPY002 - the suite draws from the global generator
        found = {case.name: case for case in collect_testcases(None)}
    return {name: case for name, case in found.items() if case.model is not None and case.data_sets}


def is_random(model: onnx.ModelProto) -> bool:
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    if any(node.op_type in RANDOM for node in nodes):
        return True
    return any(node.op_type == "Dropout" and len(node.input) > 2 for node in nodes)


def run_onnxruntime(model: onnx.ModelProto, feeds: Feeds) -> list[Any] | None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return list(session.run(None, dict(feeds)))
    except Exception:  # onnxruntime's exceptions share no base below Exception
        return None


def run_reference(model: onnx.ModelProto, feeds: Feeds) -> list[Any] | None:
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return list(ReferenceEvaluator(model).run(None, dict(feeds)))
    except Exception:  # the reference raises whatever its Python code meets
        return None


def promoted(model: onnx.ModelProto, feeds: Feeds) -> tuple[onnx.ModelProto, Feeds] | None:
    """``model`` with its tensor inputs as initializers, and what is left to feed."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.input[:]
    rest: dict[str, Any] = {}
    for value in model.graph.input:
        fed = feeds.get(value.name)
        if isinstance(fed, np.ndarray) and value.type.HasField("tensor_type"):
            tensor = onnx.numpy_helper.from_array(fed, value.name)
            if tensor.data_type != value.type.tensor_type.elem_type:
                return None
            copy.graph.initializer.append(tensor)
        else:
            copy.graph.input.append(value)
            rest[value.name] = fed
    return copy, rest


def passed(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[PassResult]]:
    graph, results = from_proto(model), []
    for step in PASSES:
        results.append(step(graph))
        graph = results[-1].graph
    return to_proto(graph), results


def assert_equal(found: Any, wanted: Any, tolerance: Mapping[str, float]) -> None:
    if wanted is None or found is None:
        assert found is wanted
        return
    if isinstance(wanted, list):
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert_equal(a, b, tolerance)
        return
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    if wanted.dtype.name not in tolerance:
        np.testing.assert_array_equal(found, wanted)
        return
    limit = tolerance[wanted.dtype.name]
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    special = ~np.isfinite(wanted)
    np.testing.assert_array_equal(found[special], wanted[special])
    difference = np.linalg.norm(found[~special] - wanted[~special])
    assert difference <= limit * np.linalg.norm(wanted[~special])


def check(case: BackendCase, model: onnx.ModelProto, feeds: Feeds, stated: Sequence[Any], rest: Feeds) -> None:
    """Run the passes on ``model`` and hold the result against the shipped model."""
    after, results = passed(model)
    for run in (run_onnxruntime, run_reference):
        wanted = run(case.model, feeds)
        if wanted is None:
            continue
        found = run(after, rest)
        assert found is not None, f"{run.__name__} runs the model before the passes and not after"
        for a, b in zip(found, wanted, strict=True):
            assert_equal(a, b, TOLERANCE)
        return
    found = run_onnxruntime(after, rest)
    if found is None:
        if any(result.report.changed for result in results):
            pytest.skip("neither onnxruntime nor the reference implementation runs this model")
        return  # the passes did nothing, and said so
    for a, b in zip(found, stated, strict=True):
        assert_equal(a, b, dict.fromkeys(TOLERANCE, case.rtol))


NAMES = sorted(backend_cases())


def case_and_feeds(name: str) -> tuple[BackendCase, Feeds, Sequence[Any]]:
    case = backend_cases()[name]
    if is_random(case.model):
        pytest.skip("random: two runs differ")
    inputs, outputs = case.data_sets[0]
    names = [value.name for value in case.model.graph.input]
    inputs = [np.asarray(x) if isinstance(x, np.generic) else x for x in inputs]
    return case, dict(zip(names, inputs, strict=False)), outputs


@pytest.mark.parametrize("name", NAMES)
def test_as_shipped(name: str) -> None:
    case, feeds, stated = case_and_feeds(name)
    check(case, case.model, feeds, stated, feeds)


@pytest.mark.parametrize("name", NAMES)
def test_with_inputs_promoted(name: str) -> None:
    case, feeds, stated = case_and_feeds(name)
    variant = promoted(case.model, feeds)
    if variant is None:
        pytest.skip("the suite feeds another type than the model declares")
    model, rest = variant
    check(case, model, feeds, stated, rest)


@pytest.mark.parametrize("op", sorted(EVALUATED))
def test_every_evaluated_operator_is_confirmed(op: str) -> None:
    """For each operator that folding evaluates there is a case in which it does, and onnxruntime agrees."""
    for name in NAMES:
        case = backend_cases()[name]
        if not any(node.op_type == op and not node.domain for node in case.model.graph.node) or is_random(case.model):
            continue
        _, feeds, _ = case_and_feeds(name)
        variant, wanted = promoted(case.model, feeds), run_onnxruntime(case.model, feeds)
        if variant is None or wanted is None:
            continue
        result = PASSES[0](from_proto(variant[0]))
        if any(change.detail.startswith(f"{op}:") for change in result.report.changes):
            found = run_onnxruntime(to_proto(result.graph), variant[1])
            assert found is not None
            for a, b in zip(found, wanted, strict=True):
                assert_equal(a, b, TOLERANCE)
            return
    pytest.fail(f"no backend case of {op} is folded and run by onnxruntime")
