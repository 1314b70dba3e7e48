"""Dimensions as monomials, so that Reshape can be followed although the batch is not known.

A :class:`Dim` is an integer times symbols: ``[N, 12, 64] -> [12 N, 64]`` merges two axes into ``12 * N``. Positions on
such an axis are counted with the symbols outermost, so that what is known of one period of 12 positions holds for all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ONE", "Dim", "inner_symbols", "match_axes", "periods", "product"]


@dataclass(frozen=True)
class Dim:
    """``size`` times all of ``symbols`` (sorted)."""

    size: int
    symbols: tuple[str, ...] = ()

    @property
    def known(self) -> bool:
        """True where the dimension is a plain number."""
        return not self.symbols

    def __mul__(self, other: Dim) -> Dim:
        return Dim(self.size * other.size, tuple(sorted((*self.symbols, *other.symbols))))

    def over(self, other: Dim) -> Dim | None:
        """The monomial that ``other`` has to be multiplied by to give this one; None where there is none."""
        if other.size == 0 or self.size % other.size:
            return None
        left, right = Counter(self.symbols), Counter(other.symbols)
        if right - left:
            return None
        return Dim(self.size // other.size, tuple(sorted((left - right).elements())))


ONE = Dim(1)


def product(dims: Sequence[Dim]) -> Dim:
    """The product of ``dims``."""
    result = ONE
    for dim in dims:
        result = result * dim
    return result


def match_axes(before: Sequence[Dim], after: Sequence[Dim]) -> list[tuple[list[int], list[int]]] | None:
    """Shortest runs of axes that hold the same elements before and after a Reshape; None where the sizes differ.

    ``[N, 4, 6, 8] -> [N, 2, 2, 48]`` gives ``([0], [0]), ([1], [1, 2]), ([2, 3], [3])``.
    """
    if product(before) != product(after):
        return None
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = ([i] if i < len(before) else []), ([j] if j < len(after) else [])
        a, b = (before[i] if left else ONE), (after[j] if right else ONE)
        i, j = i + len(left), j + len(right)
        while a != b:
            grow_left = i < len(before) and (b.over(a) is not None or (a.over(b) is None and a.size <= b.size))
            if grow_left or j >= len(after):
                if i >= len(before):
                    return None
                a, i = a * before[i], i + 1
                left.append(i - 1)
            else:
                b, j = b * after[j], j + 1
                right.append(j - 1)
        runs.append((left, right))
    return runs


def periods(dims: Sequence[Dim]) -> list[int] | None:
    """Positions of each axis of a run that differ; None where symbols stand inside of a known number.

    The symbols of a run have to be outermost: a later axis must not have any once an axis has a known size above one.
    """
    sized = False
    for dim in dims:
        if dim.symbols and sized:
            return None
        sized = sized or dim.size > 1
    return [dim.size for dim in dims]


def inner_symbols(dims: Sequence[Dim]) -> list[int] | None:
    """As :func:`periods` where the symbols of a run are innermost: ``[16, H, W]``, ``[4, 4 H W]``; None elsewhere.

    Positions of an axis with symbols then come in blocks, one for each position of its known size.
    """
    seen = False
    for dim in dims:
        if seen and dim.size > 1:
            return None
        seen = seen or bool(dim.symbols)
    return [dim.size for dim in dims]
