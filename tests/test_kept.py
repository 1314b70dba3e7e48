"""Maps of kept positions compose, and survive as text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcompress.errors import ModelError
from onnxcompress.kept import compose_kept, read_kept, read_positions, write_kept

positions = st.sets(st.integers(0, 300), max_size=60).map(lambda found: tuple(sorted(found)))
maps = st.dictionaries(st.text(max_size=8), st.dictionaries(st.integers(0, 5), positions, max_size=2), max_size=4)


def test_kept_maps_compose() -> None:
    first = {"a": {1: (0, 2, 5, 7)}, "b": {1: (3,)}}
    second = {"a": {1: (1, 3)}, "c": {0: (4, 6)}}
    assert compose_kept(first, second) == {"a": {1: (2, 7)}, "b": {1: (3,)}, "c": {0: (4, 6)}}
    assert first == {"a": {1: (0, 2, 5, 7)}, "b": {1: (3,)}}
    data = np.arange(10)
    assert (data[[0, 2, 5, 7]][[1, 3]] == data[list(compose_kept(first, second)["a"][1])]).all()


def test_kept_maps_of_two_axes_stand_beside_each_other() -> None:
    assert compose_kept({"a": {1: (0,)}}, {"a": {0: (0, 2)}}) == {"a": {1: (0,), 0: (0, 2)}}


@given(maps)
def test_a_map_survives_as_text(kept: dict[str, dict[int, tuple[int, ...]]]) -> None:
    assert read_kept(write_kept(kept)) == kept


def test_text_is_short_and_the_same_for_the_same_map() -> None:
    assert write_kept({"t": {1: (0, 1, 2, 5, 7, 8)}}) == '{"t": {"1": "0-2,5,7-8"}}'
    assert write_kept({"ü": {1: (3,), 0: (0,)}, "a": {}}) == '{"a": {}, "ü": {"0": "0", "1": "3"}}'


def test_positions_are_counted_before_they_are_listed() -> None:
    assert read_positions("0-2,5", 4) == (0, 1, 2, 5)
    assert read_positions("", 0) == ()
    for most in (2, 3):
        with pytest.raises(ValueError, match=f"more than {most} positions"):
            read_positions("0-2,5", most)
    most = 1 << 24  # of a whole map
    for text in ("0-9,0-9", "0-3,3", f"0-{most}", f"7,9-{most + 8}"):
        with pytest.raises(ModelError, match=r"not sorted|more than"):
            read_kept(f'{{"t": {{"0": "{text}"}}}}')
    with pytest.raises(ModelError, match=f"more than {most - 3} positions"):
        read_kept(f'{{"t": {{"0": "0-1", "1": "7"}}, "u": {{"0": "0-{most - 3}"}}}}')


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"t": 1}',
        '{"t": {"x": "1"}}',
        '{"t": {"1": "3-1"}}',
        '{"t": {"1": "0-99999999999"}}',
        '{"t": {"1": "5,1"}}',
        '{"t": {"1": 3}}',
    ],
)
def test_other_text_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ModelError, match="metadata 'kept'") as caught:
        read_kept(text)
    assert "\n" not in str(caught.value)
