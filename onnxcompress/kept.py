"""What pruning left of each tensor: which positions of the original the positions of the result are.

Distillation compares tensors of a pruned model with the teacher's by it. It travels in memory
(:class:`~onnxcompress.base.PassResult`) and as text in the metadata of the written model, under the key ``kept``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from typing import TypeAlias

from onnxcompress.errors import ModelError

__all__ = ["Kept", "compose_kept", "positions_text", "read_kept", "read_positions", "write_kept"]

#: {tensor: {axis: positions of the original that are left, sorted}}; what is whole is not in it
Kept: TypeAlias = dict[str, dict[int, tuple[int, ...]]]

#: most positions that a text may stand for: a range is short and may claim anything
_MOST = 1 << 24


def compose_kept(first: Kept, second: Kept) -> Kept:
    """What two removals in a row keep: ``second`` counts positions in what ``first`` left."""
    composed = {name: dict(axes) for name, axes in first.items()}
    for name, axes in second.items():
        own = composed.setdefault(name, {})
        for axis, indices in axes.items():
            old = own.get(axis)
            own[axis] = indices if old is None else tuple(old[i] for i in indices)
    return composed


def write_kept(kept: Kept) -> str:
    """JSON: ``{"tensor": {"1": "0-5,7,9"}}``; the same map gives the same text."""
    text = {name: {str(axis): positions_text(indices) for axis, indices in axes.items()} for name, axes in kept.items()}
    return json.dumps(text, sort_keys=True, ensure_ascii=False)


def read_kept(text: str) -> Kept:
    """The map that :func:`write_kept` wrote.

    Raises:
        ModelError: the text is no such map.
    """
    try:
        data = json.loads(text)
        kept: Kept = {}
        left = _MOST
        for name, axes in data.items():
            kept[str(name)] = own = {}
            for axis, positions in axes.items():
                own[int(axis)] = found = read_positions(positions, left)
                left -= len(found)
        return kept
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(
            f"the metadata 'kept' says what pruning left, but cannot be read: {' '.join(str(error).split())[:100]}; "
            "use the file that onnxcompress wrote"
        ) from error


def positions_text(indices: Iterable[int]) -> str:
    """Sorted positions as text: ``0-5,7,9``."""
    listed = list(indices)
    breaks = [0, *(i for i, (a, b) in enumerate(pairwise(listed), start=1) if b != a + 1), len(listed)]
    runs = [(listed[a], listed[b - 1]) for a, b in pairwise(breaks) if a < b]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def read_positions(text: str, most: int = _MOST) -> tuple[int, ...]:
    """The positions that :func:`positions_text` wrote.

    Raises:
        ValueError: the text is no such list, not sorted, or stands for more than ``most`` positions.
    """
    found: list[int] = []
    for run in text.split(",") if text else ():
        first, _, last = run.partition("-")
        start, end = int(first), int(last or first)
        if not 0 <= start <= end:
            raise ValueError(f"{run!r} is no range of positions")
        if found and start <= found[-1]:
            raise ValueError("positions are not sorted")
        if end - start >= most - len(found):  # before they are listed: the text may claim anything
            raise ValueError(f"{run!r} makes more than {most} positions")
        found.extend(range(start, end + 1))
    return tuple(found)
