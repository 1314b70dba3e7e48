"""Vectors that an exporter merged are taken apart, and put together again where they stay equal."""

from __future__ import annotations

import numpy as np
from models import BY_NAME, Net, image, make_feeds

from onnxcompress.graph import Graph
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.pruning.coupling import coupling_groups
from onnxcompress.pruning.prepare import share_vectors, unshare_vectors
from onnxcompress.pruning.surgery import remove_channels
from onnxcompress.session import Session


def merged_biases() -> Graph:
    """Three layers with one bias, as an exporter writes parameters of equal value."""
    net = Net()
    zero = net.floats(np.zeros(4), name="zero")
    x = image(net, 4)
    for _ in range(3):
        x = net.add("Relu", net.add("Conv", x, net.random(4, 4, 3, 3), zero, pads=[1, 1, 1, 1]))
    net.add("Conv", x, net.random(2, 4, 1, 1), to="y")
    net.output("y", ["N", 2, 8, 8])
    return from_proto(net.model())


def test_layers_that_share_a_bias_are_cut_apart() -> None:
    graph = merged_biases()
    assert [g.channels for g in coupling_groups(graph) if g.pinned is None] == [4]
    before = Session(graph, optimization="disabled").run(make_feeds(to_proto(graph)))
    copies = unshare_vectors(graph)
    assert set(copies.values()) == {"zero"}
    assert len(copies) == 2
    groups = [g for g in coupling_groups(graph) if g.pinned is None]
    assert [g.channels for g in groups] == [4, 4, 4]
    after = Session(graph, optimization="disabled").run(make_feeds(to_proto(graph)))
    assert after["y"].tobytes() == before["y"].tobytes()


def test_copies_that_stay_equal_are_one_again() -> None:
    graph = merged_biases()
    written = to_proto(graph).SerializeToString()
    share_vectors(graph, unshare_vectors(graph))
    assert to_proto(graph).SerializeToString() == written

    copies = unshare_vectors(graph)
    groups = [g for g in coupling_groups(graph) if g.pinned is None]
    pruned, _ = remove_channels(graph, coupling_groups(graph), {groups[1].name: [0, 1]})
    share_vectors(pruned, copies)
    biases = [node.inputs[2] for node in pruned.nodes if node.op == "Conv" and len(node.inputs) > 2]
    assert [tuple(b.shape) for b in biases] == [(4,), (2,), (4,)]
    assert biases[0] is biases[2]


def test_matrices_and_shapes_stay_shared() -> None:
    for name in ("shared_weight", "channel_shuffle", "weight_shared_with_branch"):
        graph = from_proto(BY_NAME[name].build())
        written = to_proto(graph).SerializeToString()
        assert unshare_vectors(graph) == {}
        assert to_proto(graph).SerializeToString() == written
