"""Graphs as torch modules: outputs, gradients, what trains, and what is written back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from doubles import doubled
from models import BY_NAME, F16, HAZARDS, U8, Hazard, Net, make_feeds

from onnxcompress.errors import ModelError
from onnxcompress.graph import copy_graph
from onnxcompress.passes.fold_batch_norm import FoldBatchNorm
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.session import Session

torch = pytest.importorskip("torch", reason="needs the extra distill")

from onnxcompress.executor.check import check_network, first_difference  # noqa: E402 - only where torch is
from onnxcompress.executor.network import Network  # noqa: E402

#: hazards that cannot be trained, and what the refusal says
REFUSED = {
    "weight_shared_with_branch": "control flow",
    "if_branches": "control flow",
    "loop_body": "control flow",
    "scan_body": "control flow",
    "local_function": "domain 'local'",
    "dropout_training": "training_mode",
    "training_bn": "training mode",
    "bn_statistics": "training mode",
    "constant_kinds": "no tensor of numbers",
    "random_and_stateful": "not in the table",
    "sequences": "not in the table",
    "dynamic_quantised": "not in the table",
}

RUNNABLE = [hazard for hazard in HAZARDS if hazard.runnable and hazard.name not in REFUSED]


@pytest.mark.parametrize("hazard", RUNNABLE, ids=lambda h: h.name)
def test_outputs_are_those_of_onnxruntime(hazard: Hazard) -> None:
    model = hazard.build()
    network = Network(from_proto(model))
    reference = Session(model, optimization="disabled", threads=1)
    # The last one comes back to shapes that have been seen.
    for seed, sizes in ((0, {}), (1, {"N": 1, "S": 1, "H": 6}), (2, {"N": 4, "S": 2, "H": 10}), (3, {})):
        feeds = make_feeds(model, seed=seed, sizes=sizes)
        with torch.no_grad():
            found = network(network.feeds(feeds))
        for name, wanted in reference.run(feeds).items():
            value = found[name].detach().numpy()
            assert value.shape == wanted.shape
            limit = 2e-3 if wanted.dtype == np.float16 else 2e-6
            difference = np.linalg.norm(value.astype(np.float64) - wanted.astype(np.float64))
            assert difference <= limit * np.linalg.norm(wanted.astype(np.float64))


def test_a_silu_as_insert_qdq_writes_it_is_executed() -> None:
    net = Net()
    net.input("x", ["N", 4])
    net.add("Sigmoid", "x", to="y")
    net.output("y", ["N", 4])
    model = net.model()
    model.graph.node[0].op_type, model.graph.node[0].domain = "QuickGelu", "com.microsoft"
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("alpha", 1.0))
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    feeds = make_feeds(model)
    network = Network(from_proto(model))
    with torch.no_grad():
        found = network(network.feeds(feeds))["y"].numpy()
    assert np.allclose(found, Session(model, threads=1).run(feeds)["y"], atol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_by_name(name: str) -> None:
    graph = from_proto(BY_NAME[name].build())
    with pytest.raises(ModelError, match=REFUSED[name]) as caught:
        Network(graph)
    assert any(repr(node.name) in str(caught.value) for node in graph.nodes)
    assert "\n" not in str(caught.value)


GRADIENTS = ("residual", "squeeze_excite", "attention", "concat_ranges", "conv_transpose_grouped", "channel_shuffle")


@pytest.mark.parametrize("name", [*GRADIENTS, "slice_pad_shortcut", "silu", "conv_3d", "conv_affine_chain", "pools"])
def test_gradients_are_finite_differences(name: str, rng: np.random.Generator) -> None:
    model = doubled(BY_NAME[name].build())
    network = Network(from_proto(model))
    feeds = network.feeds(make_feeds(model))
    weights: Mapping[str, Any] = {
        key: torch.from_numpy(rng.standard_normal(value.shape)) for key, value in network(feeds).items()
    }

    def loss() -> Any:
        return sum((value * weights[key]).sum() for key, value in network(feeds).items())

    loss().backward()
    step = 1e-6
    for item in network.trained:
        direction = torch.from_numpy(rng.standard_normal(item.parameter.shape))
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                item.parameter.add_(direction, alpha=sign * step)
                ends.append(loss().item())
                item.parameter.sub_(direction, alpha=sign * step)
        numeric, exact = (ends[0] - ends[1]) / (2 * step), (item.parameter.grad * direction).sum().item()
        assert numeric == pytest.approx(exact, rel=2e-5, abs=2e-6), item.name


def names(network: Network) -> list[str]:
    return [item.name for item in network.trained]


def test_statistics_bounds_exponents_and_masks_do_not_train() -> None:
    net = Net()
    x = net.batch_norm(net.input("x", ["N", 4]), 4)
    x = net.add("Clip", x, net.floats(-3.0, "low"), net.floats(3.0, "high"))
    x = net.add("Pow", x, net.floats(2.0, "exponent"))
    x = net.add("Mul", x, net.floats([1.0, 2.0, 3.0, 4.0], "factor"))
    x = net.add("Add", x, net.floats([0.0, -1e9, 0.0, 0.0], "mask"))
    net.add("Div", x, net.floats([1.0, 2.0, 1.0, 2.0], "divisor"), to="y")
    net.output("y", ["N", 4])
    assert names(Network(from_proto(net.model()))) == ["gamma_1", "beta_2", "factor"]


def test_a_weight_that_is_read_in_two_ways_stays() -> None:
    net = Net()
    x = net.input("x", ["N", 4])
    shared, other = net.random(4, 4, name="shared"), net.random(4, 4, name="other")
    y = net.add("MatMul", net.add("MatMul", x, shared), net.add("Transpose", other, perm=[1, 0]))
    net.add("Div", y, net.add("ReduceSum", net.add("Abs", shared), keepdims=0), to="y")
    net.output("y", ["N", 4])
    assert names(Network(from_proto(net.model()))) == ["other"]


def test_shape_arithmetic_runs_once_for_each_shape() -> None:
    model = BY_NAME["slice_pad_shortcut"].build()
    network = Network(from_proto(model))
    feeds = make_feeds(model)
    network(network.feeds(feeds))
    ((steps, _),) = network.plan._known.values()
    assert {step.node.op for step in steps} <= {
        *("Conv", "BatchNormalization", "Relu", "Slice", "Pad", "Add", "AveragePool", "Reshape", "Gemm")
    }


def test_dead_tensors_are_freed() -> None:
    model = BY_NAME["residual"].build()
    network = Network(from_proto(model))
    network(network.feeds(make_feeds(model)))
    ((steps, _),) = network.plan._known.values()
    freed = [slot for step in steps for slot in step.dead]
    assert len(freed) == len(set(freed)) == len(steps)  # the input and all but the output


@pytest.mark.parametrize("dtype", [None, F16])
def test_written_back_in_place_of_the_constants(dtype: int | None) -> None:
    hazard = BY_NAME["conv_bn_relu" if dtype is None else "conv_bn_relu_float16"]
    original = from_proto(hazard.build())
    graph = copy_graph(original)
    network = Network(graph)
    assert network.write_back() == []
    before = to_proto(original).SerializeToString()
    with torch.no_grad():
        for item in network.trained:
            item.parameter.add_(0.25)
    assert network.write_back() == names(network)
    assert to_proto(original).SerializeToString() == before  # copies share weights, which are not written into
    changed = to_proto(graph)
    onnx.checker.check_model(changed, full_check=True)
    assert [n.name for n in changed.graph.node] == [n.name for n in to_proto(original).graph.node]
    for a, b in zip(changed.graph.initializer, to_proto(original).graph.initializer, strict=True):
        assert (a.name, a.data_type, list(a.dims)) == (b.name, b.data_type, list(b.dims))
        difference = onnx.numpy_helper.to_array(a).astype(np.float64) - onnx.numpy_helper.to_array(b)
        wanted = 0.25 if a.name in names(network) else 0.0
        np.testing.assert_allclose(difference, wanted, atol=1e-3 if dtype else 1e-6)
    feeds = make_feeds(changed)
    served = Session(graph, optimization="disabled", threads=1).run(feeds)["y"]
    np.testing.assert_allclose(
        network(network.feeds(feeds))["y"].detach().numpy(), served, atol=0.02 if dtype else 1e-5
    )


def test_weights_in_constant_nodes_train_too() -> None:
    net = Net()
    value = onnx.numpy_helper.from_array(np.eye(3, dtype=np.float32))
    net.add("MatMul", net.input("x", ["N", 3]), net.add("Constant", value=value, to="weight"), to="y")
    net.output("y", ["N", 3])
    graph = from_proto(net.model())
    network = Network(graph)
    assert names(network) == ["weight"]
    with torch.no_grad():
        network.trained[0].parameter.mul_(2)
    assert network.write_back() == ["weight"]
    y = Session(graph, threads=1).run({"x": np.ones((1, 3), np.float32)})["y"]
    np.testing.assert_array_equal(y, [[2, 2, 2]])


def quantised() -> onnx.ModelProto:
    """int8 weights per channel, an int32 bias, a Slice between Q and DQ."""
    net = Net(opset=13)
    rng = net.rng
    x = net.input("x", ["N", 3, 8, 8])
    to_input = (net.floats(0.03), net.const(128, np.uint8))
    x = net.add("DequantizeLinear", net.add("QuantizeLinear", x, *to_input), *to_input)
    scales = rng.uniform(0.002, 0.004, 4)
    weight = net.const(rng.integers(-127, 128, (4, 3, 3, 3)), np.int8, name="weight")
    weight = net.add("DequantizeLinear", weight, net.floats(scales), net.const(np.zeros(4), np.int8), axis=0)
    bias = net.const(rng.integers(-3000, 3000, 4), np.int32, name="bias")
    bias = net.add("DequantizeLinear", bias, net.floats(scales * 0.03), axis=0)
    y = net.add("Relu", net.add("Conv", x, weight, bias, pads=[1, 1, 1, 1]))
    to_output = (net.floats(0.02), net.const(0, np.uint8))
    y = net.add("QuantizeLinear", y, *to_output)
    y = net.add("Slice", y, net.ints(0), net.ints(4), net.ints(2))
    y = net.add("DequantizeLinear", y, *to_output)
    net.add("Flatten", net.add("GlobalAveragePool", y), to="y")
    net.output("y", ["N", 4])
    return net.model()


def test_a_quantised_network_trains_its_integers() -> None:
    model = quantised()
    graph = from_proto(model)
    feeds = make_feeds(model)
    agreement = check_network(graph, feeds, threads=1)
    assert agreement.nodes == 11
    network = Network(graph)
    assert names(network) == ["weight", "bias"]
    assert network.write_back() == []
    target = torch.full((3, 4), 0.5)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (network(network.feeds(feeds))["y"] - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert network.write_back() == ["weight", "bias"]
    kinds = {t.name: t.data_type for t in to_proto(graph).graph.initializer}
    assert (kinds["weight"], kinds["bias"]) == (onnx.TensorProto.INT8, onnx.TensorProto.INT32)
    served = Session(graph, optimization="disabled", threads=1).run(feeds)["y"]
    assert np.mean((served - 0.5) ** 2) == pytest.approx(losses[-1], rel=0.5)


def test_a_pair_with_one_scale_is_one_step_with_the_same_result() -> None:
    model = quantised()
    network = Network(from_proto(model), trainable=False)
    feeds = make_feeds(model)
    with torch.no_grad():
        found = network(network.feeds(feeds))["y"].numpy()
    ((steps, _),) = network.plan._known.values()
    assert [step.node.op for step in steps] == [
        *("DequantizeLinear", "Conv", "Relu", "QuantizeLinear", "Slice", "DequantizeLinear"),
        *("GlobalAveragePool", "Flatten"),
    ]
    wanted = Session(model, optimization="disabled", threads=1).run(feeds)["y"]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


# ---- the check against onnxruntime ---------------------------------------------------------------------------------


def test_the_first_node_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import MappingProxyType

    from onnxcompress.executor import plan
    from onnxcompress.executor.spec import Operator

    wrong = Operator(lambda spec: lambda x: torch.relu(x) * 1.01)
    monkeypatch.setattr(plan, "OPERATORS", MappingProxyType({**plan.OPERATORS, "Relu": wrong}))
    model = BY_NAME["residual"].build()
    graph, feeds = from_proto(model), make_feeds(model)
    blamed, _ = first_difference(graph, feeds, threads=1)
    first = next(node.name for node in graph.nodes if node.op == "Relu")
    assert blamed is not None
    assert f"{first!r} (Relu) is the first that differs" in blamed
    with pytest.raises(ModelError, match=f"{first}.*relative L2 0.01.*allowed"):
        check_network(graph, feeds, threads=1)


def test_a_wrong_rounding_is_found_though_the_outputs_hardly_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import MappingProxyType

    from onnxcompress.executor import plan
    from onnxcompress.executor.spec import Operator

    wrong = Operator(lambda spec: lambda x, s, z: torch.clamp(torch.floor(x / s) + z, 0, 255))
    monkeypatch.setattr(plan, "OPERATORS", MappingProxyType({**plan.OPERATORS, "QuantizeLinear": wrong}))
    with pytest.raises(ModelError, match=r"\(QuantizeLinear\) is the first.*integers are up to 1 off"):
        check_network(from_proto(quantised()), make_feeds(quantised()), threads=1)


def test_quantised_outputs_and_unfed_inputs() -> None:
    net = Net(opset=13)
    net.add("QuantizeLinear", net.input("x", [3]), net.floats(0.5), net.const(1, np.uint8), to="y")
    net.output("y", [3], U8)
    graph = from_proto(net.model())
    assert check_network(graph, {"x": np.array([1.0, -3.0, 500.0], np.float32)}, threads=1).relative_l2 == 0.0
    model = BY_NAME["overridable_initializer"].build()
    assert check_network(from_proto(model), make_feeds(model), threads=1).relative_l2 < 1e-6
    # node by node, too
    assert first_difference(from_proto(model), make_feeds(model), threads=1) == (None, len(model.graph.node))


@pytest.mark.cases
@pytest.mark.parametrize("name", ["resnet20", "resnet56", "mobilenetv2_cifar10", "squeezenet1.1", "minilm"])
def test_cases(cases: Mapping[str, Any], name: str) -> None:
    from onnxcompress.io import load

    graph = load(cases[name].model)
    for feeds in cases[name].calibration(4, 2):
        assert check_network(graph, feeds, threads=1).relative_l2 < 1e-5
    folded = FoldBatchNorm()(graph).graph
    assert check_network(folded, feeds, threads=1).relative_l2 < 1e-5
    blamed, compared = first_difference(folded, feeds, threads=1)
    assert blamed is None
    assert compared > 60
