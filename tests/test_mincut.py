from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.quantization.mincut import MinCut

Edges = list[tuple[int, int, int]]


def cost(edges: Edges, side: set[int]) -> int:
    return sum(capacity for tail, head, capacity in edges if tail in side and head not in side)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 5).flatmap(
        lambda extra: st.tuples(
            st.just(extra + 2),
            st.lists(
                st.tuples(st.integers(0, extra + 1), st.integers(0, extra + 1), st.integers(0, 9)),
                max_size=20,
            ),
        )
    )
)
def test_equals_the_best_of_all_partitions(case: tuple[int, Edges]) -> None:
    count, edges = case
    edges = [edge for edge in edges if edge[0] != edge[1]]
    cut = MinCut()
    for _ in range(count - 2):
        cut.vertex()
    for edge in edges:
        cut.edge(*edge)
    found = cut.source_side()
    sides = [
        {0, *(v for v, chosen in zip(range(2, count), choice, strict=True) if chosen)}
        for choice in product([False, True], repeat=count - 2)
    ]
    best = min(cost(edges, side) for side in sides)
    assert MinCut.SOURCE in found and MinCut.SINK not in found
    assert cost(edges, found) == best
    assert len(found) == min(len(side) for side in sides if cost(edges, side) == best)


def test_a_long_chain_is_no_problem() -> None:
    cut = MinCut()
    previous = MinCut.SOURCE
    for index in range(5000):
        vertex = cut.vertex()
        cut.edge(previous, vertex, 3 if index != 2500 else 1)
        previous = vertex
    cut.edge(previous, MinCut.SINK, 3)
    assert len(cut.source_side()) == 2501
