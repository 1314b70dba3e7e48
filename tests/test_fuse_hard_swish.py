"""fuse_hard_swish: one operator, the same outputs; and everything that must stay as it is."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from models import Net

from onnxcompress.graph import Graph
from onnxcompress.passes.fuse_hard_swish import FuseHardSwish
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.session import Session


def written(
    *,
    opset: int = 17,
    gate_first: bool = True,
    multiply: bool = False,
    swapped: bool = False,
    product: bool = True,
    constants: tuple[float, float, float, float] = (3.0, 0.0, 6.0, 6.0),
    shape: tuple[int, ...] = (),
    reads: str = "",
    divide: bool = True,
) -> Graph:
    """Conv, then the pattern; ``reads`` names an inner tensor that is an output, too."""
    net = Net(opset, ir_version=8)
    x = net.add("Conv", net.input("x", ["N", 3, 5, 5]), net.random(4, 3, 3, 3), to="c")
    shift, low, high, six = (np.full(s, c, np.float32) for c, s in zip(constants, (shape, (), (), shape), strict=True))

    def two(op: str, a: str, b: str, to: str) -> str:
        return net.add(op, *((b, a) if swapped and op != "Div" else (a, b)), to=to)

    def sixth(a: str, to: str) -> str:
        if not divide:
            return a
        return two("Mul", a, net.const(1 / six), to) if multiply else two("Div", a, net.const(six), to)

    y = two("Add", x, net.const(shift), "shifted")
    if opset < 11:
        y = net.add("Clip", y, min=float(low), max=float(high), to="clipped")
    else:
        y = net.add("Clip", y, net.const(low), net.const(high), to="clipped")
    if gate_first:
        y = sixth(y, "gate")
        y = two("Mul", x, y, "product") if product else y
    else:
        y = sixth(two("Mul", x, y, "product"), "divided")
    net.add("Sigmoid", y, to="y")
    net.output("y", ["N", 4, 3, 3])
    if reads:
        net.output(reads, ["N", 4, 3, 3])
    return from_proto(net.model())


def fused(graph: Graph, rng: np.random.Generator) -> Counter[str]:
    """The operators after the pass, when the outputs are the same."""
    result = FuseHardSwish()(graph)
    onnx.checker.check_model(to_proto(result.graph), full_check=True)
    feeds = {"x": (3 * rng.normal(size=(3, 3, 5, 5))).astype(np.float32)}
    wanted, found = (Session(g, optimization="disabled").run(feeds) for g in (graph, result.graph))
    for name, value in wanted.items():
        assert np.abs(value - found[name]).max() <= 2e-6 * max(np.abs(value).max(), 1)
    ops = Counter(str(node.op) for node in result.graph.nodes)
    assert result.report.changed == (ops != Counter(str(node.op) for node in graph.nodes))
    return ops - Counter(["Conv", "Sigmoid"])


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("multiply", [True, False])
@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1)])
def test_four_operators_become_one(
    gate_first: bool, multiply: bool, swapped: bool, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    graph = written(gate_first=gate_first, multiply=multiply, swapped=swapped, shape=shape)
    assert fused(graph, rng) == Counter(["HardSwish"])


@pytest.mark.parametrize("opset", [7, 11, 13])
@pytest.mark.parametrize("gate_first", [True, False])
def test_older_operator_sets_keep_the_product(opset: int, gate_first: bool, rng: np.random.Generator) -> None:
    assert fused(written(opset=opset, gate_first=gate_first), rng) == Counter(["HardSigmoid", "Mul"])


def test_a_gate_alone_is_a_hard_sigmoid(rng: np.random.Generator) -> None:
    assert fused(written(product=False), rng) == Counter(["HardSigmoid"])
    assert fused(written(reads="gate"), rng) == Counter(["HardSigmoid", "Mul"])


@pytest.mark.parametrize(
    "options",
    [
        *(
            {"constants": c}
            for c in ((2.9, 0.0, 6.0, 6.0), (3.0, 0.1, 6.0, 6.0), (3.0, 0.0, 5.0, 6.0), (3.0, 0.0, 6.0, 5.0))
        ),
        *({"reads": tensor, "gate_first": first} for tensor in ("shifted", "clipped") for first in (True, False)),
        {"reads": "product", "gate_first": False},
        {"shape": (4, 1, 1)},
        {"divide": False},
    ],
)
def test_left_alone(options: dict[str, Any], rng: np.random.Generator) -> None:
    graph = written(**options)
    before = Counter(str(node.op) for node in graph.nodes) - Counter(["Conv", "Sigmoid"])
    assert fused(graph, rng) == before


@pytest.mark.parametrize(("alpha", "op"), [(1 / 6, "HardSwish"), (0.2, "HardSigmoid")])
def test_a_hard_sigmoid_that_gates_its_own_input(alpha: float, op: str, rng: np.random.Generator) -> None:
    net = Net(17, ir_version=8)
    x = net.add("Conv", net.input("x", ["N", 3, 5, 5]), net.random(4, 3, 3, 3))
    gate = net.add("HardSigmoid", x, alpha=alpha, beta=0.5)
    net.add("Sigmoid", net.add("Mul", gate, x), to="y")
    net.output("y", ["N", 4, 3, 3])
    assert fused(from_proto(net.model()), rng)[op] == 1


def test_numbers_of_more_axes_than_the_tensor_are_left_alone() -> None:
    """They give the result more axes."""
    net = Net(17, ir_version=8)
    x = net.input("x", [3])
    y = net.add("Clip", net.add("Add", x, net.const(np.full((1, 1), 3, np.float32))), net.floats(0.0), net.floats(6.0))
    net.add("Mul", net.add("Div", y, net.floats(6.0)), x, to="y")
    net.output("y", [1, 3])
    assert not FuseHardSwish()(from_proto(net.model())).report.changed


def test_other_types_are_left_alone() -> None:
    net = Net(17, ir_version=8)
    x = net.input("x", [3], onnx.TensorProto.DOUBLE)
    three, low, high = (net.const(np.float64(value)) for value in (3.0, 0.0, 6.0))
    y = net.add("Div", net.add("Clip", net.add("Add", x, three), low, high), high)
    net.add("Mul", x, y, to="y")
    net.output("y", [3], onnx.TensorProto.DOUBLE)
    assert not FuseHardSwish()(from_proto(net.model())).report.changed
