"""Training batches: shuffled, changed at random, the same for the same seed and step, in bounded memory.

Nothing here has a state that would have to be saved: what a step gets follows from the seed and its number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxcompress.data import Batch, Dataset
from onnxcompress.graph import InputSpec

__all__ = ["AUGMENTATIONS", "MEMORY", "MIXING", "Shuffled", "augment", "image_inputs", "rows_of"]

Array = NDArray[Any]

#: bytes of samples that are held at a time
MEMORY = 3 << 28
#: changes of images that can be asked for
AUGMENTATIONS = ("flip", "crop", "mixup", "cutmix")
#: those that make one image of two
MIXING = ("mixup", "cutmix")
#: share of the size by which a crop moves an image at most
_SHIFT = 8


def image_inputs(specs: Sequence[InputSpec], feeds: Mapping[str, Array]) -> list[str]:
    """Inputs that look like images: [N, 1, 3 or 4, H, W] of real numbers, 16 pixels or more."""
    return [
        spec.name
        for spec in specs
        if (x := feeds.get(spec.name)) is not None
        and x.ndim == 4
        and x.dtype.kind == "f"
        and x.shape[1] in (1, 3, 4)
        and min(x.shape[2:]) >= 16
    ]


def augment(
    feeds: Mapping[str, Array], images: Sequence[str], changes: Sequence[str], generator: np.random.Generator
) -> dict[str, Array]:
    """``feeds`` with its ``images`` flipped, moved and mixed, each sample at random; all of a sample's alike.

    Of the ways to mix each takes as many samples as stay unmixed.

    Source: H. Zhang et al., "mixup", ICLR 2018; S. Yun et al., "CutMix", ICCV 2019.
    """
    changed = dict(feeds)
    if not images or not changes:
        return changed
    count = len(changed[images[0]])
    mirrored = generator.random(count) < 0.5
    shifts = generator.random((count, 2))
    partners, shares = generator.permutation(count), generator.random(count)
    mixing = [change for change in MIXING if change in changes]
    ways = generator.integers(0, len(mixing) + 1, count)
    corners = generator.random((count, 2))
    for name in images:
        x = changed[name].copy()
        if "flip" in changes:
            x[mirrored] = x[mirrored][..., ::-1]
        if "crop" in changes:
            x = _cropped(x, shifts)
        whole = x.copy() if mixing else x
        for number, way in enumerate(mixing):
            for i in np.flatnonzero(ways == number):
                if way == "mixup":
                    share = x.dtype.type(shares[i])
                    x[i] = share * whole[i] + (1 - share) * whole[partners[i]]
                else:
                    place = _box(x.shape[2:], shares[i], corners[i])
                    x[i][:, *place] = whole[partners[i]][:, *place]
        changed[name] = x
    return changed


def _box(size: tuple[int, ...], share: float, corner: NDArray[np.float64]) -> tuple[slice, slice]:
    """A part of an image of which about ``share`` stays outside."""
    sides = [max(1, round(math.sqrt(1 - share) * length)) for length in size]
    starts = [int(c * (length - side + 1)) for c, length, side in zip(corner, size, sides, strict=True)]
    rows, columns = (slice(start, start + side) for start, side in zip(starts, sides, strict=True))
    return rows, columns


def _cropped(x: Array, shifts: NDArray[np.float64]) -> Array:
    """Each image moved by up to an eighth of its size; what comes in is the mirrored border."""
    height, width = x.shape[2:]
    reach = (height // _SHIFT, width // _SHIFT)
    padded = np.pad(x, [(0, 0), (0, 0), *((r, r) for r in reach)], mode="reflect")
    cut = np.empty_like(x)
    for i, (down, right) in enumerate(shifts):
        top, left = int(down * (2 * reach[0] + 1)), int(right * (2 * reach[1] + 1))
        cut[i] = padded[i, :, top : top + height, left : left + width]
    return cut


def rows_of(batch: Batch, rows: NDArray[np.int64] | slice) -> Batch:
    """Some samples of a batch; an input without a sample axis stays."""
    feeds = {n: v[rows] if v.ndim and len(v) == batch.samples else v for n, v in batch.feeds.items()}
    labels = None if batch.labels is None else batch.labels[rows]
    count = len(np.arange(batch.samples)[rows])
    return Batch(feeds, labels, count)


class Shuffled:
    """An endless stream of training batches of a data set.

    Samples of one shape are shuffled one by one, as many as :data:`MEMORY` holds at a time; batches whose shapes vary
    keep together and their order is shuffled. An incomplete last batch is left out where there is a complete one.

    Args:
        data: the samples.
        batch: samples a batch; None: as the data comes.
        seed: of the order.
        memory: bytes to hold.
    """

    def __init__(self, data: Dataset, batch: int | None, seed: int, memory: int = MEMORY) -> None:
        if batch is not None:
            data = data.rebatch(min(batch, data.samples))
        self._data = data
        self._seed = seed
        self._memory = memory
        self._each = data.batch if data.batch is not None else data.first().samples
        self._window: list[Batch] | None = None

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batch number ``start`` of the stream and those that follow."""
        number, epoch = 0, 0
        while True:
            for window, batches in enumerate(self._windows()):
                generator = np.random.default_rng([self._seed, epoch, window])
                for rows in self._shuffled(batches, generator, first=window == 0):
                    if number >= start:
                        yield batches[rows] if isinstance(rows, int) else rows_of(batches[0], rows)
                    number += 1
            epoch += 1

    def _windows(self) -> Iterator[list[Batch]]:
        if self._window is not None:
            yield self._window
            return
        held: list[Batch] = []
        size, windows = 0, 0
        for batch in self._data:
            kept = Batch({n: np.array(v) for n, v in batch.feeds.items()}, batch.labels, batch.samples)
            held.append(kept)
            size += sum(v.nbytes for v in kept.feeds.values())
            if size > self._memory:
                yield _joined(held)
                held, size, windows = [], 0, windows + 1
        if held:
            joined = _joined(held)
            self._window = joined if windows == 0 else None
            yield joined

    def _shuffled(self, batches: list[Batch], generator: np.random.Generator, *, first: bool) -> list[Any]:
        """What each training batch of a window holds: numbers of samples, or the number of a batch."""
        if len(batches) > 1 or not _mixable(batches):
            return [int(i) for i in generator.permutation(len(batches))]
        count = batches[0].samples
        each = self._each
        each = min(each, count) if first else each
        order = generator.permutation(count)
        return [order[i : i + each] for i in range(0, count - each + 1, each)]


def _mixable(batches: Sequence[Batch]) -> bool:
    """True where samples of different batches can share one."""

    def kind(batch: Batch) -> Any:
        return {n: (v.shape[1:], v.ndim > 0 and len(v) == batch.samples) for n, v in batch.feeds.items()}

    first = kind(batches[0])
    return all(each for _, each in first.values()) and all(kind(batch) == first for batch in batches)


def _joined(batches: list[Batch]) -> list[Batch]:
    """``batches`` as one where their samples can be mixed."""
    if len(batches) < 2 or not _mixable(batches):
        return batches
    feeds = {name: np.concatenate([b.feeds[name] for b in batches]) for name in batches[0].feeds}
    labels = [b.labels for b in batches if b.labels is not None]
    joined = np.concatenate(labels) if len(labels) == len(batches) else None
    return [Batch(feeds, joined, sum(b.samples for b in batches))]
