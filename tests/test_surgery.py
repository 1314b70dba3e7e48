"""What surgery rewrites: attributes and constants that count channels, in the forms that opsets have given them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from models import Net, image
from onnx import TensorProto
from pruning_oracle import assert_exact, coupled, free_groups

from onnxcompress.errors import UsageError
from onnxcompress.graph import Graph, constant_value
from onnxcompress.proto import from_proto
from onnxcompress.pruning.coupling import coupling_groups
from onnxcompress.pruning.surgery import masked, remove_channels


def node_of(graph: Graph, op: str) -> gs.Node:
    (found,) = [node for node in graph.nodes if node.op == op]
    return found


def first_keeps(model: onnx.ModelProto, kept: list[int]) -> Graph:
    """The model with only ``kept`` left of the first Conv's channels; held against its masked original."""
    _, coupling = coupled(model)
    first = model.graph.node[0].output[0]
    keep = {}
    for group in free_groups(coupling):
        for member in group.members:
            if member.tensor == first and member.axis == 1:
                stay = [int(c) for p, c in enumerate(member.channel_of) if c >= 0 and p in kept]
                keep[group.name] = np.array(sorted(set(stay)), np.int64)
    assert keep
    return assert_exact(model, keep)[0]


def opening(opset: int, channels: int = 6) -> tuple[Net, str]:
    net = Net(opset)
    return net, net.conv(image(net), 3, channels, bias=True)


def closing(net: Net, x: str, channels: int) -> onnx.ModelProto:
    net.conv(x, channels, 2, to="y")
    net.output("y", ["N", 2, None, None])
    return net.model()


@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("given", [True, False])
def test_split(opset: int, given: bool) -> None:
    net, x = opening(opset)
    sizes = [2, 4] if given else [3, 3]
    inputs, attributes = [x], {}
    if given and opset < 13:
        attributes["split"] = sizes
    elif given:
        inputs.append(net.ints(*sizes))
    elif opset >= 18:
        attributes["num_outputs"] = 2
    net.add("Split", *inputs, axis=1, to=["a", "b"], **attributes)
    graph = first_keeps(closing(net, net.add("Concat", "b", "a", axis=1), 6), [0, 3, 4, 5])
    split = node_of(graph, "Split")
    found = split.attrs["split"] if opset < 13 else split.inputs[1].values.tolist()
    assert found == [1, 3]
    assert "num_outputs" not in split.attrs


@pytest.mark.parametrize("opset", [9, 10, 13])
@pytest.mark.parametrize(
    ("bounds", "kept", "expected"),
    [
        ((1, 5, 1), [0, 2, 3, 5], (1, 3, 1)),
        ((-4, 1 << 40, 1), [0, 2, 5], (1, 3, 1)),
        ((1, 6, 2), [0, 1, 2, 3, 5], (1, 5, None)),
    ],
)
def test_slice(
    opset: int, bounds: tuple[int, int, int], kept: list[int], expected: tuple[int, int, int | None]
) -> None:
    start, end, step = bounds
    if opset < 10 and step != 1:
        pytest.skip("there are no steps")
    net, x = opening(opset)
    if opset < 10:
        x = net.add("Slice", x, starts=[start], ends=[end], axes=[1])
    else:
        x = net.add("Slice", x, net.ints(start), net.ints(end), net.ints(1), net.ints(step))
    width = len(range(6)[slice(start, end, step)])
    graph = first_keeps(closing(net, x, width), kept)
    if expected[2] is None:  # 1, 3, 5 are now 1, 3, 4: no window
        assert node_of(graph, "Gather").inputs[1].values.tolist() == [1, 3, 4]
        return
    node = node_of(graph, "Slice")
    if opset < 10:
        assert (node.attrs["starts"], node.attrs["ends"]) == ([expected[0]], [expected[1]])
    else:
        assert [t.values.tolist() for t in node.inputs[1:3]] == [[expected[0]], [expected[1]]]


def test_slice_of_several_axes_of_which_one_becomes_a_gather() -> None:
    net, x = opening(17)
    x = net.add("Slice", x, net.ints(0, 0, 1), net.ints(9, 5, 7), net.ints(1, 2, 3), net.ints(2, 1, 2))
    graph = first_keeps(closing(net, x, 3), [0, 1, 2, 4])
    assert node_of(graph, "Slice").inputs[3].values.tolist() == [2, 3] or "Gather" in {n.op for n in graph.nodes}


@pytest.mark.parametrize("opset", [10, 13, 19])
def test_pad(opset: int) -> None:
    net, x = opening(opset)
    if opset < 11:
        x = net.add("Pad", x, pads=[0, 2, 0, 0, 0, 1, 0, 0], value=0.5)
    elif opset < 18:
        x = net.add("Pad", x, net.ints(0, 2, 0, 0, 0, 1, 0, 0), net.floats(0.5))
    else:
        x = net.add("Pad", x, net.ints(2, 1), net.floats(0.5), net.ints(-3))
    model = closing(net, x, 9)
    _, coupling = coupled(model)
    keep = {g.name: np.arange(g.channels - 1) for g in free_groups(coupling)}
    pad = node_of(assert_exact(model, keep)[0], "Pad")
    amounts = pad.attrs["pads"] if opset < 11 else pad.inputs[1].values.tolist()
    assert sum(amounts) == 2


@pytest.mark.parametrize("target", [(0, 6, 64), (-1, 6, 64), (0, -1, 64), (0, 0, -1)])
def test_reshape_targets(target: tuple[int, ...]) -> None:
    net, x = opening(17)
    x = net.add("Reshape", x, net.ints(*target))
    graph = first_keeps(closing(net, net.add("Reshape", x, net.ints(0, 6, 8, 8)), 6), [0, 2, 5])
    targets = [n.inputs[1].values.tolist() for n in graph.nodes if n.op == "Reshape"]
    assert targets == [[3 if t == 6 else t for t in target], [0, 3, 8, 8]]


def test_a_reshape_target_that_is_computed() -> None:
    """The batch comes from a Shape, the channels are written out: what they lose is added to the vector."""
    net, x = opening(17)
    batch = net.add("Gather", net.add("Shape", net.add("Relu", x)), net.ints(0))
    rows = net.add("Reshape", x, net.add("Concat", batch, net.ints(6), net.ints(-1), axis=0))
    x = net.add("Reshape", net.add("Exp", rows), net.add("Concat", batch, net.ints(6, 8, 8), axis=0))
    model = closing(net, x, 6)
    graph = from_proto(model)  # not folded: folding would know that the batch is the batch
    groups = coupling_groups(graph)
    (name,) = [g.name for g in groups if g.pinned is None]
    pruned, _ = remove_channels(graph, groups, {name: [1, 2]})
    amounts = [n.inputs[1].values.tolist() for n in pruned.nodes if n.op == "Add"]
    assert amounts == [[0, -4, 0], [0, -4, 0, 0]]
    assert_exact(model)


def test_expand_and_resize_to_lengths_that_are_written_out() -> None:
    net = Net(17)
    x = net.conv(net.input("x", [2, 3, 8, 8]), 3, 6, bias=True)
    x = net.add("Expand", net.add("GlobalAveragePool", x), net.ints(2, 6, 4, 4))
    x = net.add("Resize", x, "", "", net.ints(2, 6, 6, 6), mode="nearest")
    net.conv(x, 6, 2, to="y")
    net.output("y", [2, 2, 6, 6])
    graph = first_keeps(net.model(), [1, 4])
    assert node_of(graph, "Expand").inputs[1].values.tolist() == [2, 2, 4, 4]
    assert node_of(graph, "Resize").inputs[3].values.tolist() == [2, 2, 6, 6]


def test_channel_shuffle_becomes_a_gather() -> None:
    net, x = opening(17)
    x = net.add("Transpose", net.add("Reshape", x, net.ints(0, 2, 3, 8, 8)), perm=[0, 2, 1, 3, 4])
    graph = first_keeps(closing(net, net.add("Reshape", x, net.ints(0, 6, 8, 8)), 6), [0, 1, 5])
    assert node_of(graph, "Gather").inputs[1].values.tolist() == [0, 1, 2]
    assert not {"Reshape", "Transpose"} & {n.op for n in graph.nodes}


def test_groups_of_convolutions() -> None:
    net, x = opening(17, 8)
    x = net.conv(net.conv(x, 8, 8, group=8), 8, 8, group=4)
    graph = first_keeps(closing(net, x, 8), [0, 1, 6, 7])
    assert [n.attrs.get("group", 1) for n in graph.nodes if n.op == "Conv"] == [1, 4, 2, 1]


def test_names_of_tensors_stay_and_declared_shapes_follow() -> None:
    net, x = opening(17)
    y = net.add("Relu", x)
    model = closing(net, y, 6)
    model.graph.value_info.append(onnx.helper.make_tensor_value_info(y, TensorProto.FLOAT, ["N", 6, 8, 8]))
    graph, coupling = coupled(model)
    (group,) = free_groups(coupling)
    pruned, cuts = remove_channels(graph, coupling.groups, {group.name: [0, 5]}, coupling)
    assert {t.name for n in pruned.nodes for t in n.outputs} == {t.name for n in graph.nodes for t in n.outputs}
    relu = node_of(pruned, "Relu").outputs[0]
    assert list(relu.shape) == ["N", 2, 8, 8]
    assert cuts[y][1].tolist() == [0, 5]
    weight = constant_value(pruned.nodes[0].inputs[1])
    original = constant_value(graph.nodes[0].inputs[1])
    assert weight is not None
    assert original is not None
    assert np.array_equal(weight, original[[0, 5]])


def test_nothing_to_remove_gives_an_equal_graph() -> None:
    net, x = opening(17)
    graph, coupling = coupled(closing(net, x, 6))
    pruned, cuts = remove_channels(graph, coupling.groups, {coupling.groups[0].name: range(6)}, coupling)
    assert cuts == {}
    assert len(pruned.nodes) == len(graph.nodes)
    assert len(masked(graph, coupling.groups, {}, coupling).nodes) == len(graph.nodes)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"nowhere": [0]}, "there is no coupling group 'nowhere'"),
        ({"{first}": [6]}, "has the channels 0 to 5"),
        ({"{first}": []}, "would be left without positions"),
        ({"y": [0]}, "nothing of group 'y' can be removed: 'y' is a graph output"),
    ],
)
def test_impossible_choices_are_refused_in_one_line(keep: dict[str, Any], message: str) -> None:
    net, x = opening(17)
    graph, coupling = coupled(closing(net, x, 6))
    choice = {name.format(first=coupling.groups[0].name): kept for name, kept in keep.items()}
    for act in (remove_channels, masked):
        with pytest.raises(UsageError, match=message) as caught:
            act(graph, coupling.groups, choice, coupling)
        assert "\n" not in str(caught.value)
