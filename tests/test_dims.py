"""Monomials for dimensions, and the runs of axes that a Reshape leaves together."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcompress.pruning.dims import Dim, inner_symbols, match_axes, periods, product

N, S = Dim(1, ("N",)), Dim(1, ("S",))


def dims(*sizes: int | Dim) -> list[Dim]:
    return [Dim(s) if isinstance(s, int) else s for s in sizes]


@pytest.mark.parametrize(
    ("before", "after", "runs"),
    [
        (dims(N, 4, 6, 8), dims(N, 2, 2, 48), [([0], [0]), ([1], [1, 2]), ([2, 3], [3])]),
        (dims(N, 12), dims(N * Dim(12)), [([0, 1], [0])]),
        (dims(5, N, 768), dims(5, N * Dim(12), 64), [([0], [0]), ([1, 2], [1, 2])]),
        (dims(N, S, 6), dims(N, S, 3, 2), [([0], [0]), ([1], [1]), ([2], [2, 3])]),
        (dims(4, 6), dims(6, 4), [([0, 1], [0, 1])]),
        (dims(N, 3, 1, 1), dims(N, 3), [([0], [0]), ([1], [1]), ([2], []), ([3], [])]),
        (dims(N, 3), dims(N, 4), None),
        (dims(N, 3), dims(S, 3), None),
    ],
)
def test_runs(before: list[Dim], after: list[Dim], runs: list[tuple[list[int], list[int]]] | None) -> None:
    assert match_axes(before, after) == runs


@given(st.lists(st.integers(1, 6), max_size=5), st.randoms(use_true_random=False))
def test_runs_hold_the_same_elements_and_cover_all_axes(sizes: list[int], random: object) -> None:
    other = list(sizes)
    random.shuffle(other)  # type: ignore[attr-defined]
    runs = match_axes(dims(*sizes), dims(*other))
    assert runs is not None
    assert [a for run in runs for a in run[0]] == list(range(len(sizes)))
    assert [a for run in runs for a in run[1]] == list(range(len(other)))
    for left, right in runs:
        assert prod(sizes[a] for a in left) == prod(other[a] for a in right)


def test_division_and_periods() -> None:
    assert product(dims(N, 3, S, 2)) == Dim(6, ("N", "S"))
    assert Dim(6, ("N",)).over(Dim(2)) == Dim(3, ("N",))
    assert Dim(6).over(Dim(4)) is None
    assert Dim(6).over(N) is None
    assert periods(dims(N, S, 12, 2)) == [1, 1, 12, 2]
    assert periods(dims(12, N)) is None
    assert inner_symbols(dims(12, N, S)) == [12, 1, 1]
    assert inner_symbols(dims(4, N * Dim(3), S)) == [4, 3, 1]
    assert inner_symbols(dims(N, 12)) is None
