"""Labels of positions, joined by a union-find in numpy, and the states of tensors that carry them.

Each position of a tensor axis that may be cut has a label. Positions that can only be removed together have labels of
one class. A class is pinned, with a reason, where nothing of it may be removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxcompress.pruning.dims import Dim

__all__ = ["Bundle", "Labels", "State"]

Ints = NDArray[np.int64]

_NO_REASON = np.iinfo(np.int64).max


class Labels:
    """A growing union-find whose classes may be pinned; every operation takes and gives whole arrays."""

    def __init__(self) -> None:
        self._parent: Ints = np.empty(0, np.int64)
        self._reason: Ints = np.empty(0, np.int64)
        self._heads: NDArray[np.bool_] = np.empty(0, bool)
        self._count = 0
        self._reasons: dict[str, int] = {}

    def fresh(self, shape: int | Sequence[int]) -> Ints:
        """New labels, each a class of its own."""
        size = int(np.prod(shape, dtype=np.int64))
        start, self._count = self._count, self._count + size
        if self._count > len(self._parent):
            grown = max(2 * len(self._parent), self._count, 1024)
            parent, reason, heads = np.arange(grown), np.full(grown, _NO_REASON), np.zeros(grown, bool)
            parent[:start], reason[:start] = self._parent[:start], self._reason[:start]
            heads[:start] = self._heads[:start]
            self._parent, self._reason, self._heads = parent, reason, heads
        return np.arange(start, self._count).reshape(shape)

    def roots(self, labels: Ints) -> Ints:
        """The representative of each label: the same for labels of one class."""
        found = self._parent[labels]
        while True:
            further = self._parent[found]
            if np.array_equal(further, found):
                break
            found = further
        self._parent[labels] = found
        return found

    def join(self, first: Ints, second: Ints) -> None:
        """Put each label of ``first`` into the class of its partner in ``second``; the arrays broadcast."""
        first, second = (np.ascontiguousarray(x).reshape(-1) for x in np.broadcast_arrays(first, second))
        while True:
            a, b = self.roots(first), self.roots(second)
            different = a != b
            if not different.any():
                return
            first, second, a, b = first[different], second[different], a[different], b[different]
            low, high = np.minimum(a, b), np.maximum(a, b)
            np.minimum.at(self._parent, high, low)
            touched = np.concatenate([low, high])
            merged = self.roots(touched)
            np.minimum.at(self._reason, merged, self._reason[touched])
            np.logical_or.at(self._heads, merged, self._heads[touched])

    def pin(self, labels: Ints, reason: str) -> None:
        """Nothing of the classes of ``labels`` may be removed; the first reason given is kept."""
        number = self._reasons.setdefault(reason, len(self._reasons))
        np.minimum.at(self._reason, self.roots(labels).reshape(-1), number)

    def pinned(self, labels: Ints) -> NDArray[np.bool_]:
        """Which of ``labels`` are pinned so far."""
        return np.asarray(self._reason[self.roots(labels)] != _NO_REASON)

    def reason_numbers(self, labels: Ints) -> Ints:
        """The reason of each label as a number for :meth:`reason`; -1 where it is not pinned."""
        found = self._reason[self.roots(labels)]
        return np.where(found == _NO_REASON, -1, found)

    def reason(self, number: int) -> str:
        """The text of a reason."""
        return list(self._reasons)[number]

    def mark_heads(self, labels: Ints) -> None:
        """The classes of ``labels`` are attention heads."""
        self._heads[self.roots(labels)] = True

    def are_heads(self, labels: Ints) -> NDArray[np.bool_]:
        """Which of ``labels`` are attention heads."""
        return np.asarray(self._heads[self.roots(labels)])


@dataclass(frozen=True)
class Bundle:
    """Labels of the positions on one axis, or of all combinations of positions on several.

    ``labels`` has one axis for each of ``axes``, which are sorted. Attention heads that a Reshape took apart are a
    bundle over (head, position in the head) until it is known which of the two is cut.
    """

    axes: tuple[int, ...]
    labels: Ints

    def moved(self, axes: Sequence[int]) -> Bundle:
        """The bundle with its axes renamed to ``axes``, which need not be sorted."""
        order = sorted(range(len(axes)), key=axes.__getitem__)
        return Bundle(tuple(axes[i] for i in order), self.labels.transpose(order))


@dataclass
class State:
    """What is known of a tensor: its dimensions (None: unknown rank), its labels, and whether it is constant."""

    dims: tuple[Dim, ...] | None
    bundles: list[Bundle] = field(default_factory=list)
    constant: bool = False
    #: elements of a small integer tensor: ints, :class:`~onnxcompress.pruning.walk.Size`, None for unknown ones
    vector: NDArray[Any] | None = None

    def at(self, axis: int) -> Bundle | None:
        """The bundle that covers ``axis``."""
        return next((b for b in self.bundles if axis in b.axes), None)

    @property
    def all_labels(self) -> Ints:
        """Every label of the tensor, flat."""
        return np.concatenate([b.labels.reshape(-1) for b in self.bundles] or [np.empty(0, np.int64)])
