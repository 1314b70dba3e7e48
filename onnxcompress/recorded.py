"""Outputs of a model over a data set, kept on disk, so that two large models need not be open at once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from onnxcompress.data import Batch
from onnxcompress.errors import ResourceError

__all__ = ["NotRecordableError", "Recorded"]


class NotRecordableError(Exception):
    """An output is no array of numbers: a sequence, a map, text."""


class Recorded:
    """{output name: array} of each batch, in order, in a temporary file that closing removes.

    Args:
        run: the model.
        batches: what to run it on.

    Raises:
        NotRecordableError: an output is no array of numbers.
        ResourceError: the disk is full.
    """

    def __init__(self, run: Callable[[dict[str, NDArray[Any]]], Mapping[str, Any]], batches: Iterable[Batch]) -> None:
        self._file = tempfile.TemporaryFile(prefix="onnxcompress-")  # noqa: SIM115 - closed by close()
        self._names: list[list[str]] = []
        try:
            for batch in batches:
                outputs = run(batch.feeds)
                for value in outputs.values():
                    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
                        raise NotRecordableError
                    npy.write_array(self._file, value, allow_pickle=False)
                self._names.append(list(outputs))
        except OSError as error:
            self.close()
            raise ResourceError(f"cannot keep outputs on disk: {error.strerror or error}; free some space") from error
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[dict[str, NDArray[Any]]]:
        self._file.seek(0)
        for names in self._names:
            yield {name: npy.read_array(self._file, allow_pickle=False) for name in names}

    def close(self) -> None:
        """Remove the file."""
        self._file.close()

    def __enter__(self) -> Recorded:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
