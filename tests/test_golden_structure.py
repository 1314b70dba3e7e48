"""Structure of a few hazard models after the lossless passes, kept as text in ``tests/golden``.

A change of structure shows in the diff of a golden file. To write the files anew, and then read the diff::

    ONNXCOMPRESS_UPDATE_GOLDEN=1 python -m pytest tests/test_golden_structure.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs
import pytest
from models import BY_NAME

from onnxcompress.graph import Graph, nested_graphs, normal_domain
from onnxcompress.passes.eliminate_dead_nodes import EliminateDeadNodes
from onnxcompress.passes.fold_batch_norm import FoldBatchNorm
from onnxcompress.passes.fold_constants import FoldConstants
from onnxcompress.proto import from_proto

GOLDEN = Path(__file__).parent / "golden"
MODELS = (
    "attention",
    "bn_before_conv",
    "conv_affine_chain",
    "conv_transpose_grouped",
    "dead_branch",
    "existing_qdq",
    "if_branches",
    "loop_body",
    "matmul_bn",
    "no_ops",
    "output_in_the_middle",
    "output_is_input",
    "residual",
    "shared_weight",
    "slice_pad_shortcut",
    "squeeze_excite",
)


def described(graph: Graph, indent: str = "") -> Iterator[str]:
    """One line a node: outputs, operator, inputs, attributes; constants with type and shape instead of values."""
    yield f"{indent}inputs: {', '.join(t.name for t in graph.inputs)}"
    for node in graph.nodes:
        outputs = ", ".join(t.name for t in node.outputs)
        attributes = [
            f"{name}={shown(value)}" for name, value in sorted(node.attrs.items()) if not isinstance(value, gs.Graph)
        ]
        domain = f"{normal_domain(node)}." if normal_domain(node) else ""
        operator = " ".join([f"{domain}{node.op}({', '.join(map(operand, node.inputs))})", *attributes])
        yield f"{indent}{outputs} = {operator}"
        for part in nested_graphs(node):
            yield from described(part, indent + "    ")
    yield f"{indent}outputs: {', '.join(t.name for t in graph.outputs)}"


def operand(tensor: gs.Tensor) -> str:
    return f"{tensor.name}:{shown(tensor)}" if isinstance(tensor, gs.Constant) else str(tensor.name)


def shown(value: Any) -> str:
    if isinstance(value, gs.Constant):
        return f"{value.dtype}{list(value.shape)}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@pytest.mark.parametrize("name", MODELS)
def test_structure(name: str) -> None:
    graph = from_proto(BY_NAME[name].build())
    lines = []
    for step in (FoldConstants(), EliminateDeadNodes(), FoldBatchNorm()):
        result = step(graph)
        graph = result.graph
        lines += [f"# {step.name}: refused {r.node}: {r.reason}" for r in result.report.refusals]
    text = "\n".join([*described(graph), *lines]) + "\n"
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("ONNXCOMPRESS_UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text(), f"the structure differs from {file}; see the docstring of this file"
