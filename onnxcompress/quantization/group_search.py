"""Which layers return to float where only running the recipe again tells what that does.

A pass other than static INT8 (float16, INT8 with ranges found at run time) cannot be simulated with switches, so each
choice is a run of the passes. To need few of them, layers are taken in groups of neighbours: each group alone is
returned and measured, then the groups return in the order of what they gained until the budget is met, and halves of
what returned are taken back where it stays met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from onnxcompress.quantization.gauge import Goal, Reading
from onnxcompress.quantization.layer_search import LayerSearch, ReturnedLayers
from onnxcompress.quantization.sensitivity import rounded, total

if TYPE_CHECKING:
    from onnxcompress.base import Progress

__all__ = ["search_groups"]

#: groups at first
_GROUPS = 12
#: halves that are tried to take back
_TAKEN_BACK = 12


def search_groups(
    candidates: Sequence[str],
    measure: Callable[[tuple[str, ...]], Reading],
    goals: Sequence[Goal],
    macs: Mapping[str, int],
    progress: Progress | None = None,
) -> LayerSearch:
    """Return ``candidates`` to float until all of ``goals`` are met.

    Args:
        candidates: node names, in graph order.
        measure: what the result loses when these nodes are excluded.
        goals: what to keep to.
        macs: multiply-accumulates by node, for the report.
        progress: shows how far the work is.
    """
    runs = 0
    known: dict[tuple[str, ...], Reading] = {}

    def read(chosen: Iterable[str]) -> Reading:
        nonlocal runs
        names = set(chosen)
        key = tuple(name for name in candidates if name in names)
        if key not in known:
            runs += 1
            known[key] = measure(key)
        return known[key]

    def met(reading: Reading) -> bool:
        return all(goal.met(reading) for goal in goals)

    before = after = read(())
    groups = _split(candidates, _GROUPS)
    tracked: Iterable[tuple[str, ...]] = groups
    if progress is not None:
        tracked = progress.track(groups, "measuring groups of layers", len(groups))
    errors = {group: read(group).error for group in tracked}
    chosen: list[tuple[str, ...]] = []
    for group in sorted(groups, key=lambda g: errors[g]):
        if met(after):
            break
        chosen.append(group)
        after = read(name for part in chosen for name in part)
    done = met(after)
    if done:
        chosen = _taken_back(chosen, lambda parts: met(read(name for part in parts for name in part)))
        after = read(name for part in chosen for name in part)
    steps, last, returned = [], before, list[str]()
    for group in chosen:
        returned += group
        now = read(returned)
        steps.append(
            ReturnedLayers(
                group,
                group,
                f"returned alone, {rounded(read(group).decibels)} dB are left instead of {rounded(before.decibels)}",
                rounded(last.decibels),
                rounded(now.decibels),
                total(macs, group),
                None,
            )
        )
        last = now
    return LayerSearch(tuple(returned), tuple(steps), done, not done, before, after, runs)


def _split(names: Sequence[str], parts: int) -> list[tuple[str, ...]]:
    """Contiguous groups of about the same size."""
    count = min(parts, len(names))
    edges = [len(names) * i // count for i in range(count + 1)] if count else [0]
    return [tuple(names[a:b]) for a, b in pairwise(edges)]


def _taken_back(
    chosen: Sequence[tuple[str, ...]], met: Callable[[Sequence[tuple[str, ...]]], bool]
) -> list[tuple[str, ...]]:
    """``chosen`` without what is not needed: whole groups first, from the last on, then halves of them."""
    kept = list(chosen)
    tries = 0
    queue = [(group,) for group in reversed(chosen)]
    while queue and tries < _TAKEN_BACK:
        (part,) = queue.pop(0)
        index = next(i for i, group in enumerate(kept) if set(part) <= set(group))
        rest = tuple(name for name in kept[index] if name not in part)
        without = [*kept[:index], *([rest] if rest else []), *kept[index + 1 :]]
        tries += 1
        if without and met(without):
            kept = without
        elif len(part) > 1:
            queue += [(part[: len(part) // 2],), (part[len(part) // 2 :],)]
    return kept
