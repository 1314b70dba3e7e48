"""The union-find against the obvious one."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from onnxcompress.pruning.labels import Labels

pairs = st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=12)


@given(st.lists(pairs, max_size=6), st.lists(st.integers(0, 19), max_size=3))
def test_classes_pins_and_heads(rounds: list[list[tuple[int, int]]], marked: list[int]) -> None:
    labels = Labels()
    labels.fresh(20)
    classes = [{i} for i in range(20)]
    for number, chosen in enumerate(rounds):
        if number == 1:
            for label in marked:
                labels.pin(np.array([label]), f"reason {label}")
                labels.mark_heads(np.array([label]))
        if chosen:
            labels.join(*(np.array(side, np.int64) for side in zip(*chosen, strict=True)))
        for a, b in chosen:
            if classes[a] is not classes[b]:
                classes[a] |= classes[b]
                for member in classes[b]:
                    classes[member] = classes[a]
    roots = labels.roots(np.arange(20))
    for a in range(20):
        assert {b for b in range(20) if roots[b] == roots[a]} == classes[a]
        hit = [label for label in marked if label in classes[a]] if len(rounds) > 1 else []
        assert labels.pinned(np.array([a]))[0] == bool(hit)
        assert labels.are_heads(np.array([a]))[0] == bool(hit)
        if hit:  # the reason that was given first
            assert labels.reason(int(labels.reason_numbers(np.array([a]))[0])) == f"reason {hit[0]}"
        else:
            assert labels.reason_numbers(np.array([a]))[0] == -1


def test_broadcasting_and_growth() -> None:
    labels = Labels()
    rows = labels.fresh((3, 2000))
    labels.join(rows[:, :1], rows)
    assert len(np.unique(labels.roots(rows))) == 3
    more = labels.fresh(5000)
    assert len(np.unique(labels.roots(more))) == 5000
    assert not labels.pinned(more).any()
