"""The lossless passes on the real cases: all BatchNorm folded, no shape arithmetic left, the same outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcompress.passes.eliminate_dead_nodes import EliminateDeadNodes
from onnxcompress.passes.fold_batch_norm import FoldBatchNorm
from onnxcompress.passes.fold_constants import FoldConstants
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.session import Session

#: operators of each model after the passes; None: only that no BatchNormalization is left
OPERATORS: dict[str, set[str] | None] = {
    "resnet20": {"Add", "AveragePool", "Conv", "Gemm", "Pad", "Relu", "Reshape", "Slice"},
    "resnet56": {"Add", "AveragePool", "Conv", "Gemm", "Pad", "Relu", "Reshape", "Slice"},
    "mobilenetv2_cifar10": {"Add", "Clip", "Conv", "Flatten", "Gemm", "GlobalAveragePool"},
    "squeezenet1.1": {"Concat", "Conv", "Flatten", "GlobalAveragePool", "MaxPool", "Relu", "Softmax"},
    "minilm": None,
}


@pytest.mark.cases
@pytest.mark.parametrize("name", OPERATORS)
def test_folded_equals_original(name: str, cases: Mapping[str, Any]) -> None:
    case = cases[name]
    original = onnx.load(case.model)
    graph = from_proto(original)
    for step in (FoldConstants(), EliminateDeadNodes(), FoldBatchNorm()):
        result = step(graph)
        graph = result.graph
    operators = result.report.after.operators
    assert "BatchNormalization" not in operators
    assert OPERATORS[name] is None or set(operators) == OPERATORS[name]
    onnx.checker.check_model(to_proto(graph), full_check=True)

    (feeds,) = case.calibration(samples=8, batch=8)
    expected = Session(original, optimization="disabled", threads=1).run(feeds)
    found = Session(graph, optimization="disabled", threads=1).run(feeds)
    for output, wanted in expected.items():
        assert np.linalg.norm(found[output] - wanted) <= 1e-5 * np.linalg.norm(wanted)
