"""Nodes are counted as they are once local functions are inlined, without inlining them."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.inliner
import pytest
from malicious import MALICIOUS, model, nested
from onnx import helper

from onnxcompress.errors import ModelError
from onnxcompress.expansion import MOST_NODES, expanded_nodes
from onnxcompress.io import load

IMPORTS = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]


def chain(levels: int) -> onnx.ModelProto:
    """Each function calls the next one twice."""
    functions = [helper.make_function("f", "F0", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], IMPORTS)]
    for level in range(1, levels):
        below = f"F{level - 1}"
        body = [helper.make_node(below, ["a"], ["h"], domain="f"), helper.make_node(below, ["h"], ["b"], domain="f")]
        functions.append(helper.make_function("f", f"F{level}", ["a"], ["b"], body, IMPORTS))
    call = helper.make_node(f"F{levels - 1}", ["x"], ["y"], domain="f")
    return model([call, helper.make_node("Abs", ["x"], ["z"])], [], functions=functions)


def test_without_functions() -> None:
    assert expanded_nodes(model()) == 1
    proto = model([], [])
    proto.graph.node.extend(nested(4).node)
    assert expanded_nodes(proto) == 3 + 1 + 3  # If nodes, the innermost Relu, and the Abs of each other branch


@pytest.mark.parametrize("levels", [1, 2, 5, 40])
def test_functions_count_as_often_as_they_are_called(levels: int) -> None:
    assert expanded_nodes(chain(levels)) == 2 ** (levels - 1) + 1


@pytest.mark.parametrize("levels", [2, 5, 9])
def test_as_onnx_inlines_them(levels: int) -> None:
    proto = chain(levels)
    assert expanded_nodes(proto) == len(onnx.inliner.inline_local_functions(proto).graph.node)


def test_calls_in_nested_graphs_count() -> None:
    proto = chain(3)
    inner = helper.make_graph(list(proto.graph.node[:1]), "g", [], [])
    proto.graph.node.append(helper.make_node("If", ["c"], ["i"], then_branch=inner, else_branch=inner))
    assert expanded_nodes(proto) == 4 + 1 + 1 + 2 * 4


def test_circles_are_refused() -> None:
    proto = chain(3)
    proto.functions[0].node[0].op_type, proto.functions[0].node[0].domain = "F2", "f"
    with pytest.raises(ModelError, match="circle"):
        expanded_nodes(proto)


def test_a_model_that_would_be_too_large(tmp_path: Path) -> None:
    MALICIOUS["functions_that_double"](tmp_path)
    with pytest.raises(ModelError, match=f"at most {MOST_NODES}"):
        load(tmp_path / "model.onnx")
