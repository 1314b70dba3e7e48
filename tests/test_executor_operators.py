"""Every operator of the executor's table on onnx's node tests, and its gradients against finite differences.

Each model runs as it is shipped and with its inputs promoted to initializers, twice, because the second run is the one
for known shapes. The oracle is onnxruntime, and where it has no kernel the outputs that the suite states.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
import test_backend_nodes as backend
from doubles import doubled
from models import Net

from onnxcompress.errors import ModelError
from onnxcompress.proto import from_proto

torch = pytest.importorskip("torch", reason="needs the extra distill")

from onnxcompress.executor.network import Network  # noqa: E402 - only where torch is
from onnxcompress.executor.operators_quantize import MasterWeight, quantizes  # noqa: E402
from onnxcompress.executor.spec import Spec, Unsupported  # noqa: E402
from onnxcompress.executor.table import OPERATORS  # noqa: E402

#: relative L2 by type; the suite's float inputs make sums of some thousand products at most
TOLERANCE = {"float16": 5e-3, "bfloat16": 2e-2, "float32": 2e-5, "float64": 1e-6}

#: what may be refused, with the reason as it is told
REFUSALS = (
    r"values of type (u?int(2|4|16|32|64)|float(4|8)_\w+|object) are not computed",
    r"the type of its second input is not declared",
    r"the operator as of opset \d+ is not in the table",
    r"opset \d is older than 7",
    r"the extreme of no values is not computed",
    r"it computes statistics of the batch \(training mode\)",
    r"it drops values at random \(training_mode\)",
    r"holds text or numbers below one byte",
    r"values of type \w+ are not quantised to",
)

#: in the table, but in no node test that can run here; tests below or the tests of whole networks confirm them
WITHOUT_CASE = {"CastLike", "Scatter", "GlobalLpPool", "Constant"}


def is_candidate(name: str) -> bool:
    model = backend.backend_cases()[name].model
    known = all(node.op_type in OPERATORS and not node.domain for node in model.graph.node)
    return known and not model.functions and not backend.is_random(model)


NAMES = [name for name in backend.NAMES if is_candidate(name)]


def as_array(value: Any) -> Any:
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


@cache
def case_of(name: str) -> tuple[onnx.ModelProto, dict[str, Any], list[Any]] | None:
    """(model, feeds, what is expected); None where an input is no tensor."""
    case, feeds, stated = backend.case_and_feeds(name)
    feeds = {key: as_array(value) for key, value in feeds.items()}
    if any(value is None or isinstance(value, list) for value in feeds.values()):
        return None
    wanted = backend.run_onnxruntime(case.model, feeds)
    return case.model, feeds, [as_array(value) for value in (stated if wanted is None else wanted)]


def computed(model: onnx.ModelProto, feeds: dict[str, Any], expected: list[Any]) -> bool:
    """True where the executor computes what is expected; False where it refuses for a good reason."""
    try:
        network = Network(from_proto(model))
        tensors = network.feeds(feeds)
        with torch.no_grad():
            found = [list(network(tensors).values()) for _ in range(2)]
    except ModelError as error:
        assert any(re.search(reason, str(error)) for reason in REFUSALS), error
        return False
    for answer in found:
        for value, wanted in zip(answer, expected, strict=True):
            backend.assert_equal(value.detach().numpy().astype(wanted.dtype), wanted, TOLERANCE)
    return True


@pytest.mark.parametrize("name", NAMES)
def test_node(name: str) -> None:
    known = case_of(name)
    if known is None:
        pytest.skip("an input is no tensor")
    model, feeds, expected = known
    ran = computed(model, feeds, expected)
    variant = backend.promoted(model, feeds)
    if variant is not None:
        ran = computed(variant[0], dict(variant[1]), expected) or ran
    if not ran:
        pytest.skip("refused")


def cases_with(op: str) -> Iterator[tuple[onnx.ModelProto, dict[str, Any], list[Any]]]:
    """The suite's cases of ``op``, those that consist of it alone first."""
    names = [n for n in NAMES if any(node.op_type == op for node in backend.backend_cases()[n].model.graph.node)]
    for name in sorted(names, key=lambda n: (len(backend.backend_cases()[n].model.graph.node), n)):
        known = case_of(name)
        if known is not None:
            yield known


@pytest.mark.parametrize("op", sorted(set(OPERATORS) - WITHOUT_CASE))
def test_every_operator_is_confirmed(op: str) -> None:
    for opset in (None, 23):  # the suite has each operator at its newest opset only
        for model, feeds, expected in cases_with(op):
            case = onnx.ModelProto()
            case.CopyFrom(model)
            if opset is not None:
                case.opset_import[0].version = opset
            variant = backend.promoted(case, feeds)
            if computed(case, feeds, expected) or (variant and computed(variant[0], dict(variant[1]), expected)):
                return
    pytest.fail(f"no node test of {op} can be run")


# ---- gradients ---------------------------------------------------------------------------------------------------


def test_every_gradient_is_that_of_finite_differences() -> None:
    """One call for all operators tells at once which of them have none."""
    checked = {op for op in OPERATORS if has_right_gradient(op)}
    assert len(checked) >= 85, sorted(set(OPERATORS) - checked)
    for op in ("Conv", "ConvTranspose", "Gemm", "Resize", "ScatterND", "GatherND", "Pad", "TopK", "Einsum", "LRN"):
        assert op in checked


def has_right_gradient(op: str) -> bool:
    """Check up to two cases of ``op``; False where none has a gradient that can be checked."""
    rng = np.random.default_rng(0)
    count = 0
    for model, feeds, _ in cases_with(op):
        if len(model.graph.node) > 1 or count == 2 or sum(np.size(v) for v in feeds.values()) > 1000:
            break
        if quantizes(op) or any(
            v.dtype.name not in ("float32", "float64", "int64", "int32", "bool") for v in feeds.values()
        ):
            continue
        # A little off the round numbers of the suite, where some functions have no derivative.
        shift = {k: 1e-3 + v * (1 + 0.01 * rng.random(v.shape)) for k, v in feeds.items() if v.dtype.kind == "f"}
        wide = {**feeds, **shift}
        try:
            network = Network(from_proto(doubled(model)))
            tensors = network.feeds(wide)
            with torch.no_grad():
                outputs = network(tensors)
        except (ModelError, Unsupported):
            continue
        if not all(bool(torch.isfinite(v).all()) for v in (*tensors.values(), *outputs.values())):
            continue
        numbers = OPERATORS[op].numbers if op != "BatchNormalization" else (3, 4)  # running statistics never train
        names = [n.name for i, n in enumerate(model.graph.input) if i not in numbers and wide[n.name].dtype == "f8"]
        real = [k for k, v in outputs.items() if v.is_floating_point()]
        if (
            not names
            or not real
            or min(tensors[n].numel() for n in names) == 0
            or op in ("Ceil", "Floor", "Round", "Sign", "Hardmax", "EyeLike")
        ):
            continue

        def function(*values: Any, network: Any = network, names: Any = names, tensors: Any = tensors) -> Any:
            answer = network({**tensors, **dict(zip(names, values, strict=True))})
            return tuple(v for v in answer.values() if v.is_floating_point() and v.requires_grad)

        values = [tensors[name].clone().requires_grad_() for name in names]
        if not function(*values):
            continue
        try:
            torch.autograd.gradcheck(function, values, eps=1e-6, atol=1e-5, fast_mode=True)
        except RuntimeError as error:
            pytest.fail(f"{op}: {error}")
        count += 1
    return count > 0


# ---- quantisation ------------------------------------------------------------------------------------------------


def quantizer(axis: int | None = None) -> Network:
    net = Net(opset=13)
    x = net.input("x", [2, 3])
    scale = net.floats([0.5, 0.25, 1.0] if axis is not None else 0.5)
    zero = net.const([3, 0, 10] if axis is not None else 3, np.uint8)
    more = {} if axis is None else {"axis": axis}
    quantised = net.add("QuantizeLinear", x, scale, zero, **more)
    net.add("DequantizeLinear", quantised, scale, zero, **more, to="y")
    net.output("y", [2, 3])
    return Network(from_proto(net.model()))


@pytest.mark.parametrize("axis", [None, 1])
def test_gradient_goes_straight_through_rounding_and_stops_where_it_clips(axis: int | None) -> None:
    network = quantizer(axis)
    x = torch.tensor([[0.3, -1.4, 2.2], [-50.0, 300.0, -20.0]], requires_grad=True)
    y = network({"x": x})["y"]
    y.sum().backward()
    first = [0.0, 0.0, 0.0] if axis is None else [0.0, 1.0, 0.0]  # -1.4 is -6 + 0, below 0
    clipped = torch.tensor([first, [1.0, 1.0, 1.0]])
    assert torch.equal(x.grad, 1.0 - clipped)


def quantised_weight(dtype: str, axis: int | None, shape: tuple[int, ...]) -> tuple[Spec, np.ndarray]:
    rng = np.random.default_rng(0)
    net = Net(opset=13)
    limits = np.iinfo(dtype)
    values = rng.integers(limits.min + (limits.min < 0), limits.max, shape, endpoint=True).astype(dtype)
    channels = shape[axis] if axis is not None else 1
    scale = net.floats(rng.uniform(0.001, 0.02, channels) if axis is not None else 0.01)
    zeros = [net.const(rng.integers(0, 200, channels).astype(dtype))] if dtype == "uint8" and axis is not None else []
    weight = net.const(values, name="weight")
    net.add("DequantizeLinear", weight, scale, *zeros, **({} if axis is None else {"axis": axis}), to="y")
    net.output("y", shape)
    graph = from_proto(net.model())
    return Spec(graph.nodes[0], 13), values


@pytest.mark.parametrize(
    ("dtype", "axis", "shape"),
    [("int8", 0, (4, 3, 3, 3)), ("int8", 1, (5, 4)), ("int8", None, (5, 4)), ("uint8", 0, (6, 2)), ("int32", 0, (7,))],
)
def test_integer_weights_come_back_as_they_were(dtype: str, axis: int | None, shape: tuple[int, ...]) -> None:
    spec, values = quantised_weight(dtype, axis, shape)
    master = MasterWeight.of(spec, values)
    parameter = master.initial()
    np.testing.assert_array_equal(master.integers(parameter), values)
    assert master.integers(parameter).dtype == values.dtype


def test_integer_weights_stay_in_their_range() -> None:
    spec, values = quantised_weight("int8", 0, (4, 3, 3, 3))
    master = MasterWeight.of(spec, values)
    far = master.integers(torch.full(values.shape, -1e6))
    assert far.min() == far.max() == -127  # never -128: the weight was symmetric
    master.bound(np.full(values.shape, -64), np.full(values.shape, 64))
    assert master.integers(torch.full(values.shape, 1e6)).max() == 64
    parameter = torch.full(values.shape, 1e6, requires_grad=True)
    master.kernel(torch.float32)(parameter).sum().backward()
    assert not parameter.grad.any()


# ---- what must be refused ------------------------------------------------------------------------------------------


def test_an_attribute_that_is_not_understood_is_refused() -> None:
    net = Net()
    net.add("Relu", net.input("x", [2]), to="y")
    net.output("y", [2])
    graph = from_proto(net.model())
    graph.nodes[0].attrs["sharpness"] = 2
    with pytest.raises(ModelError, match=r"node 'n0_Relu' \(Relu\).*attribute 'sharpness' is not executed"):
        Network(graph)


def test_quantised_values_are_only_moved() -> None:
    net = Net(opset=13)
    x = net.add("QuantizeLinear", net.input("x", [2]), net.floats(0.5), net.const(0, np.uint8))
    net.add("Cast", x, to_=onnx.TensorProto.FLOAT, to="y")
    net.output("y", [2])
    with pytest.raises(ModelError, match=r"n1_Cast.*computes with quantised values"):
        Network(from_proto(net.model()))
