"""The data set: batches read on demand, as often as needed, in memory that does not grow with their number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from math import prod
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxcompress.data.columns import Column, Rows
from onnxcompress.errors import DataError, UsageError

__all__ = ["MAX_BATCH_BYTES", "Batch", "Chunk", "Dataset", "Role", "default_batch"]

#: default batches hold no more input than this
MAX_BATCH_BYTES = 32 * 2**20
#: default batches hold no more samples than this
MAX_BATCH_SAMPLES = 16

#: how an array relates to samples: its first axis counts them; one value serves all; or the model's input has no
#: sample axis, so that each sample is a run of its own
Role = Literal["batched", "shared", "single"]


@dataclass(frozen=True)
class Batch:
    """Samples that go through the model together.

    ``feeds`` holds {input name: array}, ``labels`` one class index a sample (int64) where the data has them. The arrays
    may be views of the data set's own memory and are not to be written to.
    """

    feeds: dict[str, NDArray[Any]]
    labels: NDArray[np.int64] | None
    samples: int


@dataclass(frozen=True, eq=False)
class Chunk:
    """Samples that have the same shapes and lie together: one file, one batch of an iterable, or all the data."""

    columns: Mapping[str, Column]
    roles: Mapping[str, Role]
    labels: Column | None
    samples: int
    #: equal for two chunks whose samples can share a batch
    signature: tuple[Any, ...]

    @property
    def sample_bytes(self) -> int:
        """Bytes of input a sample."""
        return sum(
            prod(c.shape[1:]) * c.dtype.itemsize for name, c in self.columns.items() if self.roles[name] != "shared"
        )


def default_batch(chunk: Chunk, most: int = MAX_BATCH_SAMPLES) -> int:
    """Samples that a batch holds when nobody says: at most ``most`` and at most 32 MiB of input."""
    return max(1, min(most, MAX_BATCH_BYTES // max(1, chunk.sample_bytes)))


@dataclass(eq=False)
class Dataset:
    """Batches for a model, made by :func:`~onnxcompress.data.open_data` or :func:`~onnxcompress.data.synthetic_data`.

    It can be iterated any number of times, also at once, and yields the same batches in the same order. ``take``,
    ``split`` and ``rebatch`` return views that read from the same source; close any of them, leave the ``with`` block
    or drop them all to remove a spool.
    """

    _chunks: tuple[Chunk, ...]
    #: samples a batch; None: as the source has them, one file or one dictionary a batch
    _batch: int | None
    #: the batch that the model's own shapes demand
    fixed_batch: int | None = None
    #: True where the values are made up, which a report must say
    synthetic: bool = False
    #: what happened to the data on the way in (types converted, samples dropped), for the report
    notes: tuple[str, ...] = ()
    _resource: Any = None
    _selection: Rows | None = None
    _fingerprint: str | None = None
    _offsets: Rows = field(init=False)

    def __post_init__(self) -> None:
        self._offsets = np.concatenate([[0], np.cumsum([c.samples for c in self._chunks])]).astype(np.int64)
        self._batches, self._samples = 0, 0
        for start, stop in self._ranges():
            self._batches += 1
            self._samples += stop - start
        if self._samples == 0:
            total = int(self._offsets[-1]) if self._selection is None else len(self._selection)
            if self.fixed_batch is not None and total:
                raise DataError(
                    f"the model takes batches of exactly {self.fixed_batch} samples but there are only {total}; "
                    "give more samples or a model with a free batch dimension"
                )
            raise DataError("the data holds no samples; expected at least one")

    # -- reading --------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        with closing(_Reader(self._chunks)) as reader:
            for start, stop in self._ranges():
                rows = np.arange(start, stop) if self._selection is None else self._selection[start:stop]
                yield self._gather(reader, rows)

    def __len__(self) -> int:
        """Number of batches."""
        return self._batches

    @property
    def samples(self) -> int:
        """Number of samples that one pass yields."""
        return self._samples

    @property
    def batch(self) -> int | None:
        """Samples a batch (the last one may be smaller); None where the source decides."""
        return self.fixed_batch or self._batch

    @property
    def has_labels(self) -> bool:
        """True where batches carry labels."""
        return self._chunks[0].labels is not None

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the model inputs that the batches feed."""
        return tuple(self._chunks[0].columns)

    def first(self) -> Batch:
        """The first batch; nothing else is read."""
        batches = iter(self)
        try:
            return next(batches)
        finally:
            batches.close()  # type: ignore[attr-defined]

    def sample_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs where one sample is fed, or as few as the model takes; those of the first sample."""
        return {name: array.shape for name, array in self.rebatch(1).first().feeds.items()}

    def fingerprint(self) -> str:
        """SHA-256 of names, types, shapes, values and labels in order, hexadecimal; batch sizes make no difference.

        Reads all the data once, streaming, and remembers the answer.
        """
        if self._fingerprint is None:
            hashes: dict[str, Any] = {}
            kinds: dict[str, tuple[Any, ...]] = {}
            for batch in self:
                arrays = {f"input {name}": array for name, array in batch.feeds.items()}
                if batch.labels is not None:
                    arrays["labels"] = batch.labels
                for name, array in arrays.items():
                    digest = hashes.setdefault(name, hashlib.sha256())
                    kind = (array.dtype.str, array.shape[1:])
                    if kinds.get(name) != kind:  # shapes that vary between batches are part of the contents
                        kinds[name] = kind
                        digest.update(f"{array.dtype}{list(array.shape[1:])}".encode())
                    digest.update(_bytes(array))
            whole = hashlib.sha256()
            for name in sorted(hashes):
                whole.update(f"{name}\0{hashes[name].hexdigest()}\n".encode())
            self._fingerprint = whole.hexdigest()
        return self._fingerprint

    # -- views ----------------------------------------------------------------------------------------------------

    def rebatch(self, batch: int) -> Dataset:
        """The same samples in the same order, ``batch`` at a time.

        Samples of different shapes never share a batch. A batch size that the model's own shapes demand stays.

        Raises:
            UsageError: ``batch`` is below 1.
        """
        if batch < 1:
            raise UsageError(f"a batch of {batch} samples is not possible; expected 1 or more")
        return self._view(self._selection, batch)

    def take(self, samples: int) -> Dataset:
        """The first ``samples`` samples, or all where there are fewer.

        Raises:
            UsageError: ``samples`` is below 1.
            DataError: fewer than the batch that the model demands.
        """
        if samples < 1:
            raise UsageError(f"{samples} samples cannot be taken; expected 1 or more")
        if samples >= self.samples:
            return self
        return self._view(self._delivered()[:samples], self._batch)

    def split(self, fraction: float = 0.1, seed: int = 0) -> tuple[Dataset, Dataset]:
        """``(rest, held_out)``: one sample of every ``1 / fraction`` is held out, at a random place in its stretch.

        So both parts run through the whole source, whatever its order. The same seed gives the same parts. Where
        shapes vary from batch to batch, whole batches are held out, because they cannot be mixed.

        Raises:
            UsageError: ``fraction`` is not between 0 and 1.
            DataError: too few samples for two parts.
        """
        if not 0 < fraction < 1:
            raise UsageError(f"a fraction of {fraction} cannot be held out; expected more than 0 and less than 1")
        rows = self._delivered()
        generator = np.random.default_rng(seed)
        chunk_of = np.searchsorted(self._offsets, rows, side="right") - 1
        present = np.unique(chunk_of)
        if len(present) > 1 and len({self._chunks[i].signature for i in present.tolist()}) > 1:
            held = np.isin(chunk_of, present[_spread(len(present), fraction, 1, generator)])
            batch = self._batch
        else:
            held = np.zeros(len(rows), bool)
            held[_spread(len(rows), fraction, self.fixed_batch or 1, generator)] = True
            # Holes in the batches of the source are closed up: they have no shapes of their own to keep.
            batch = self._batch or max(default_batch(c, c.samples) for c in self._chunks)
        if not held.any() or held.all():
            needed = 2 * (self.fixed_batch or 1)
            raise DataError(
                f"{self.samples} {'sample' if self.samples == 1 else 'samples'} cannot be split into two parts, at "
                f"least {needed} are needed; "
                "give more samples or separate evaluation data"
            )
        return self._view(rows[~held], batch), self._view(rows[held], batch)

    def _view(self, selection: Rows | None, batch: int | None) -> Dataset:
        return Dataset(
            self._chunks,
            batch,
            fixed_batch=self.fixed_batch,
            synthetic=self.synthetic,
            notes=self.notes,
            _resource=self._resource,
            _selection=selection,
        )

    # -- closing --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Remove the temporary files of this data set and of all its views, where there are any."""
        if self._resource is not None:
            self._resource.close()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the plan -------------------------------------------------------------------------------------------------

    def _groups(self) -> Iterator[tuple[int, int, int]]:
        """(first sample, end, samples a batch) of each stretch of samples that batches may be formed in."""
        fixed = self.fixed_batch
        if self._batch is None and fixed is None:
            for chunk, start in zip(self._chunks, self._offsets.tolist(), strict=False):
                yield start, start + chunk.samples, default_batch(chunk, max(1, chunk.samples))
            return
        start = stop = 0
        signature: tuple[Any, ...] | None = None
        for chunk in self._chunks:
            if signature is not None and chunk.signature != signature:
                yield start, stop, fixed or self._batch or 1
                start = stop
            signature = chunk.signature
            stop += chunk.samples
        yield start, stop, fixed or self._batch or 1

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """[start, stop) of each batch, counted in the selection."""
        for first, end, size in self._groups():
            if self._selection is not None:
                first, end = np.searchsorted(self._selection, (first, end)).tolist()
            for start in range(first, end, size):
                if start + size <= end or self.fixed_batch is None:
                    yield start, min(start + size, end)

    def _delivered(self) -> Rows:
        """Numbers of the samples that one pass yields."""
        rows = np.arange(int(self._offsets[-1])) if self._selection is None else self._selection
        if self.fixed_batch is None or not len(rows):
            return rows
        return np.concatenate([rows[start:stop] for start, stop in self._ranges()])

    def _gather(self, reader: _Reader, rows: Rows) -> Batch:
        first, last = (np.searchsorted(self._offsets, rows[[0, -1]], side="right") - 1).tolist()
        parts: list[tuple[dict[str, NDArray[Any]], NDArray[Any] | None]] = []
        for number in range(first, last + 1):
            lo, hi = np.searchsorted(rows, self._offsets[[number, number + 1]]).tolist()
            if lo < hi:
                parts.append(reader.read(number, rows[lo:hi] - self._offsets[number]))
        roles = self._chunks[first].roles
        feeds = {}
        for name, role in roles.items():
            arrays = [part[0][name] for part in parts]
            array = arrays[0] if len(arrays) == 1 or role == "shared" else np.concatenate(arrays)
            feeds[name] = array[0] if role == "single" else array
        labels = None
        if parts[0][1] is not None:
            labels = np.concatenate([part[1] for part in parts if part[1] is not None])
        return Batch(feeds, labels, len(rows))


class _Reader:
    """Keeps the columns of one chunk open at a time; samples are asked for in ascending order."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = chunks
        self._number = -1
        self._columns: dict[str, Column] = {}
        self._labels: Column | None = None

    def read(self, number: int, rows: Rows) -> tuple[dict[str, NDArray[Any]], NDArray[Any] | None]:
        """The samples ``rows`` of chunk ``number``: inputs and labels."""
        if number != self._number:
            self.close()
            chunk = self._chunks[number]
            self._columns = {name: column.open() for name, column in chunk.columns.items()}
            self._labels = chunk.labels.open() if chunk.labels is not None else None
            self._number = number
        return (
            {name: column.rows(rows) for name, column in self._columns.items()},
            None if self._labels is None else self._labels.rows(rows),
        )

    def close(self) -> None:
        """Close the open chunk."""
        for column in (*self._columns.values(), self._labels):
            if column is not None:
                column.close()
        self._columns, self._labels, self._number = {}, None, -1


def _spread(count: int, fraction: float, multiple: int, generator: np.random.Generator) -> Rows:
    """About ``count * fraction`` of the numbers below ``count``, one at random in each of as many equal stretches.

    The answer has a multiple of ``multiple`` members and leaves at least as many; it is empty where that cannot be.
    """
    wanted = max(1, round(count * fraction / multiple)) * multiple
    wanted = min(wanted, (count - multiple) // multiple * multiple)
    if wanted < 1:
        return np.empty(0, np.int64)
    edges = np.arange(wanted + 1) * count // wanted
    return (edges[:-1] + (generator.random(wanted) * np.diff(edges)).astype(np.int64)).astype(np.int64)


def _bytes(array: NDArray[Any]) -> bytes | memoryview:
    if array.dtype == object:  # text
        return "\0".join(str(value) for value in array.reshape(-1).tolist()).encode() + b"\0"
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
