"""8-bit pixels and the levels of the quantiser that reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray

from onnxcompress.base import Context
from onnxcompress.data import open_data
from onnxcompress.graph import Graph, constant_value, copy_graph, input_specs, sort_nodes
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.quantization.input_levels import LevelCounter, affine, align_inputs, find_pictures, plain_range
from onnxcompress.session import Session
from onnxcompress.verify import compare

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


def pixels(count: int = 24, channels: int = 3, size: int = 12) -> NDArray[np.uint8]:
    """Smooth pictures, so that neighbours are alike, with black and white in them."""
    generator = np.random.default_rng(5)
    ends = generator.integers(0, 256, (count, channels, 2, 1))
    ramp = np.linspace(0, 1, size * size).reshape(1, 1, 1, -1)
    found = (ends[:, :, :1] * ramp + ends[:, :, 1:] * (1 - ramp)).reshape(count, channels, size, size)
    found += generator.normal(0, 20, found.shape)
    found[0, :, 0, :2] = (0, 255)
    return np.clip(np.rint(found), 0, 255).astype(np.uint8)


def normalised(images: NDArray[np.uint8], mean: Any = MEAN, std: Any = STD) -> NDArray[np.float32]:
    """As a loader does it, in float32."""
    scaled = images.astype(np.float32) / 255
    shape = (1, -1, 1, 1)
    return (scaled - np.float32(mean).reshape(shape)) / np.float32(std).reshape(shape)


def network(pads: int = 1, *, bias: bool = True, auto_pad: str | None = None, readers: int = 1) -> Graph:
    """Convolutions of a picture, then a dense layer."""
    generator = np.random.default_rng(3)
    picture = gs.Variable("image", np.float32, ["N", 3, 12, 12])
    graph = gs.Graph(inputs=[picture], opset=17)
    sums = []
    for number in range(readers):
        inputs = [picture, gs.Constant(f"w{number}", generator.normal(0, 0.3, (8, 3, 3, 3)).astype(np.float32))]
        if bias:
            inputs.append(gs.Constant(f"b{number}", generator.normal(0, 0.3, 8).astype(np.float32)))
        made = gs.Variable(f"conv{number}_out", np.float32)
        edge = pads + number
        attrs: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [edge] * 4}
        if auto_pad is not None:
            attrs = {"kernel_shape": [3, 3], "auto_pad": auto_pad}
        graph.nodes.append(gs.Node("Conv", f"conv{number}", attrs, inputs, [made]))
        active = gs.Variable(f"relu{number}_out", np.float32)
        graph.nodes.append(gs.Node("Relu", f"relu{number}", {}, [made], [active]))
        mean = gs.Variable(f"mean{number}", np.float32)
        graph.nodes.append(gs.Node("GlobalAveragePool", f"pool{number}", {}, [active], [mean]))
        flat = gs.Variable(f"flat{number}", np.float32, ["N", 8])
        graph.nodes.append(gs.Node("Flatten", f"flatten{number}", {}, [mean], [flat]))
        weight = gs.Constant(f"dense{number}", generator.normal(0, 1, (8, 4)).astype(np.float32))
        out = gs.Variable(f"out{number}", np.float32, ["N", 4])
        graph.nodes.append(gs.Node("Gemm", f"gemm{number}", {}, [flat, weight], [out]))
        sums.append(out)
    graph.outputs = sums
    sort_nodes(graph)
    return graph


def dataset(graph: Graph, values: NDArray[np.float32]) -> Any:
    """The values as calibration data."""
    return open_data({"image": values}, input_specs(graph))


def test_levels_are_found_in_normalised_pixels() -> None:
    images = pixels()
    values = normalised(images)
    for channel in range(3):
        counter = LevelCounter()
        for batch in np.split(values, 4):
            counter.update(batch[:, channel])
        found = counter.result()
        assert found is not None
        assert found.step == pytest.approx(1 / 255 / STD[channel], rel=1e-5)
        assert found.first == pytest.approx(-255 * MEAN[channel] + images[:, channel].min(), abs=1e-3)
        counts = np.bincount(images[:, channel].reshape(-1))[images[:, channel].min() :]
        np.testing.assert_array_equal(found.counts, counts)


@pytest.mark.parametrize("change", ["noise", "resized", "nan", "constant", "wide"])
def test_other_values_lie_on_no_levels(change: str) -> None:
    values = normalised(pixels())[:, 0]
    if change == "noise":
        values = values + np.random.default_rng(1).normal(0, 1e-3, values.shape).astype(np.float32)
    elif change == "resized":
        values = (values[:, ::2] + 2 * values[:, 1::2]) / 3
    elif change == "nan":
        values = np.concatenate([values, np.full_like(values[:1], np.nan)])
    elif change == "constant":
        values = np.zeros_like(values)
    else:  # of more than 8 bits
        values = np.concatenate([values, values + values.max() - values.min()])
    counter = LevelCounter()
    for batch in np.split(values, 1 if change == "nan" else 2):
        counter.update(np.ascontiguousarray(batch))
    assert counter.result() is None


def test_one_affine_puts_all_channels_onto_one_set_of_levels() -> None:
    images = pixels()
    values = normalised(images)
    channels = []
    for channel in range(3):
        counter = LevelCounter()
        counter.update(values[:, channel])
        found = counter.result()
        assert found is not None
        channels.append(found)
    _, noise = plain_range(channels, np.ones(3))
    assert noise > 0.5
    found = affine(channels)
    moved = values * found.factors.reshape(1, -1, 1, 1) + found.offsets.reshape(1, -1, 1, 1)
    scale = (found.range.high - found.range.low) / 255
    places = (moved - found.range.low) / scale
    np.testing.assert_allclose(places, np.rint(places), atol=5e-3)
    assert places.min() > -0.01 and places.max() < 255.01


@pytest.mark.parametrize("kind", ["plain", "no bias", "two paddings", "by a rule"])
@pytest.mark.parametrize("pads", [0, 1])
def test_the_float_network_stays_what_it_was(pads: int, kind: str) -> None:
    rule = "SAME_UPPER" if kind == "by a rule" else None
    graph = network(pads, bias=kind != "no bias", auto_pad=rule, readers=2 if kind == "two paddings" else 1)
    pads += kind in ("two paddings", "by a rule")
    data = dataset(graph, normalised(pixels()))
    changed = copy_graph(graph)
    (found,) = align_inputs(changed, find_pictures(changed), data)
    sort_nodes(changed)
    assert [node.op for node in changed.nodes][: 2 + bool(pads)] == ["Mul", "Add"] + ["Pad"] * bool(pads)
    assert found.range is not None
    assert all(output.relative_l2 < 1e-5 for output in compare(graph, changed, data))


def dequantised_input(graph: Graph, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the first convolution of a quantised graph reads."""
    conv = next(node for node in graph.nodes if node.op == "Conv")
    twin = copy_graph(graph)
    tensor = twin.tensors()[conv.inputs[0].name]
    tensor.dtype = np.dtype(np.float32)
    twin.outputs = [tensor]
    found: NDArray[np.float32] = Session(twin, optimization="disabled").run({"image": values})[tensor.name]
    return found


@pytest.mark.parametrize("pads", [0, 1])
def test_pixels_are_not_rounded_and_no_operator_is_left(pads: int) -> None:
    graph = network(pads)
    images = pixels()
    values = normalised(images)
    context = Context(data=dataset(graph, values))
    result = InsertQdq()(graph, context)
    quantiser = next(node for node in result.graph.nodes if node.op == "QuantizeLinear")
    assert not {"Mul", "Add"} & {node.op for node in result.graph.nodes}
    scale = constant_value(quantiser.inputs[1])
    assert scale is not None and scale.shape == (3,)
    np.testing.assert_allclose(scale, 1 / 255 / STD, rtol=1e-5)
    read = dequantised_input(result.graph, values)
    assert read.shape[1] == 3 + bool(pads)
    # one step for all channels, and every pixel where it was but for a constant
    places = read[:, :3] / scale.max() - images
    for channel in range(3):
        np.testing.assert_allclose(places[:, channel], places[0, channel, 0, 0], atol=1e-2)
    assert context.data is not None
    assert compare(graph, result.graph, context.data)[0].sqnr_db > 38
    proof = result.report.details["audit"]
    assert not proof["mismatches"] and not proof["stranded"]
    assert not [f for f in proof["floats"] if f["operator"] != "Flatten"]


def test_pixels_between_two_levels_keep_the_addition() -> None:
    """(k - 127.5) / 127.5 ties everywhere: rounding would go up or down by chance."""
    graph = network()
    values = normalised(pixels(), 0.5, 0.5)
    result = InsertQdq()(graph, Context(data=dataset(graph, values)))
    assert [node.op for node in result.graph.nodes if node.op in ("Pad", "Mul", "Add")] == ["Add", "Pad"]
    reasons = {found["operator"]: found["reason"] for found in result.report.details["audit"]["floats"]}
    assert reasons["Add"] == "it puts the input onto the levels of its pixels"
    places = dequantised_input(result.graph, values)[:, :3] * 127.5 - pixels()
    np.testing.assert_allclose(places, places.flat[0], atol=1e-2)


def test_pixels_from_0_to_1_need_nothing() -> None:
    graph = network()
    values = normalised(pixels(), 0.0, 1.0)
    result = InsertQdq(observer="percentile", percentile=90)(graph, Context(data=dataset(graph, values)))
    assert not {"Pad", "Mul", "Add"} & {node.op for node in result.graph.nodes}
    np.testing.assert_allclose(dequantised_input(result.graph, values), values, atol=1e-6)


def test_normalising_inside_of_the_graph_is_followed() -> None:
    graph = network()
    image = graph.inputs[0]
    conv = graph.nodes[0]
    scaled, moved = gs.Variable("scaled", np.float32), gs.Variable("moved", np.float32)
    shape = (1, 3, 1, 1)
    graph.nodes.append(
        gs.Node("Sub", "sub", {}, [image, gs.Constant("mean", np.float32(255 * MEAN).reshape(shape))], [moved])
    )
    graph.nodes.append(
        gs.Node("Div", "div", {}, [moved, gs.Constant("std", np.float32(255 * STD).reshape(shape))], [scaled])
    )
    conv.inputs[0] = scaled
    sort_nodes(graph)
    values = pixels().astype(np.float32)
    result = InsertQdq()(graph, Context(data=dataset(graph, values)))
    quantiser = next(node for node in result.graph.nodes if node.op == "QuantizeLinear")
    assert constant_value(quantiser.inputs[1]).shape == (3,)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["excluded", "given", "another runtime"])
def test_where_nothing_can_be_done_nothing_changes(kind: str) -> None:
    graph = network()
    context = Context(data=dataset(graph, normalised(pixels())))
    step = InsertQdq()
    if kind == "excluded":
        step = InsertQdq(exclude_nodes=("conv0",))
    elif kind == "given":
        step = InsertQdq(ranges={"image": (-2.2, 2.7)})
    elif kind == "another runtime":
        context.target = "openvino"
    result = step(graph, context)
    assert not {"Pad", "Mul", "Add"} & {node.op for node in result.graph.nodes}
    assert all(output.sqnr_db > 25 for output in compare(graph, result.graph, context.data))
