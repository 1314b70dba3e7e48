"""What a choice costs is what the cut graph costs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import BY_NAME, HAZARDS
from pruning_oracle import coupled, free_groups, random_keep
from random_graphs import random_pruning_model

from onnxcompress.graph import Graph
from onnxcompress.pruning.costs import ChannelCosts
from onnxcompress.pruning.surgery import remove_channels
from onnxcompress.shapes import graph_stats, infer_shapes, node_macs

#: MatMul over lengths that only the data knows: a symbol counts as one, and so does what a Reshape makes of it
CHECKED = tuple(h for h in HAZARDS if h.name not in ("attention",))


def macs(graph: Graph) -> dict[str, int]:
    return node_macs(graph, infer_shapes(graph))


def check(graph: Graph, costs: ChannelCosts, pruned: Graph, counts: dict[str, int]) -> None:
    assert costs.node_macs() == macs(graph)
    assert costs.node_macs(counts) == macs(pruned)
    assert costs.macs(counts) == sum(macs(pruned).values())
    assert costs.parameters() == graph_stats(graph).parameters
    assert costs.parameters(counts) == graph_stats(pruned).parameters


@pytest.mark.parametrize("hazard", CHECKED, ids=lambda hazard: hazard.name)
def test_hazards(hazard: object) -> None:
    graph, coupling = coupled(BY_NAME[hazard.name].build())  # type: ignore[attr-defined]
    keep = random_keep(coupling, 1)
    pruned, _ = remove_channels(graph, coupling.groups, keep, coupling)
    costs = ChannelCosts(graph, coupling.groups, infer_shapes(graph))
    check(graph, costs, pruned, {name: len(kept) for name, kept in keep.items()})


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 30))
def test_random_graphs(seed: int) -> None:
    graph, coupling = coupled(random_pruning_model(seed, steps=12))
    keep = random_keep(coupling, seed)
    pruned, _ = remove_channels(graph, coupling.groups, keep, coupling)
    costs = ChannelCosts(graph, coupling.groups, infer_shapes(graph))
    check(graph, costs, pruned, {name: len(kept) for name, kept in keep.items()})


@pytest.mark.parametrize("name", ["residual", "squeeze_excite", "slice_pad_shortcut", "concat_ranges"])
def test_slopes_are_differences_of_one_channel(name: str) -> None:
    graph, coupling = coupled(BY_NAME[name].build())
    costs = ChannelCosts(graph, coupling.groups, infer_shapes(graph))
    full = {g.name: g.channels for g in coupling.groups}
    hanging = costs.hanging()
    for group in free_groups(coupling):
        less = full | {group.name: group.channels - 1}
        more = costs.macs_per_channel(less)[group.name]
        saved = costs.macs() - costs.macs(less)
        assert min(more, costs.macs_per_channel()[group.name]) <= saved <= costs.macs_per_channel()[group.name]
        assert saved <= hanging[group.name]
        parameters = costs.parameters() - costs.parameters(less)
        assert np.isclose(parameters, costs.parameters_per_channel()[group.name], rtol=0.5)
