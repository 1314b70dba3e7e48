"""A file that keeps calibrated ranges, so that the next run on the same model and data need not calibrate.

JSON, readable and small::

    {"format": "onnxcompress calibration", "version": 1,
     "model": "<SHA-256>", "data": "<SHA-256>", "observer": {...}, "ranges": {"tensor": [low, high], ...}}

The file says what it was made from. Ranges of another model, other data or another observer are never used, and a file
that is no calibration cache is never overwritten.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from onnxcompress.atomic import write_file
from onnxcompress.destination import checked_destination
from onnxcompress.errors import DataError
from onnxcompress.graph import Graph
from onnxcompress.io import serialize
from onnxcompress.quantization.affine import Range

__all__ = ["CalibrationKey", "graph_sha256", "read_ranges", "write_ranges"]

_FORMAT = "onnxcompress calibration"
_VERSION = 1
#: bytes; a model of ten thousand tensors needs less than one MiB
_SIZE_LIMIT = 1 << 26


@dataclass(frozen=True)
class CalibrationKey:
    """What ranges depend on: the float graph, the data and the observer with its options (plain JSON types)."""

    model: str
    data: str
    observer: Mapping[str, Any]

    def difference(self, other: CalibrationKey) -> str | None:
        """What differs from ``other``, in words; None where nothing does."""
        found = [name for name in ("model", "data", "observer") if getattr(self, name) != getattr(other, name)]
        words = {"model": "another model", "data": "other data", "observer": "another observer"}
        return " and ".join(words[name] for name in found) or None


def graph_sha256(graph: Graph) -> str | None:
    """SHA-256 of the graph as a file would hold it; None where it is too large for one message."""
    serialised = serialize(graph)
    return None if serialised is None else hashlib.sha256(serialised).hexdigest()


def read_ranges(path: Path) -> tuple[CalibrationKey, dict[str, Range]] | None:
    """What the cache at ``path`` holds and was made from; None where there is no such file.

    Raises:
        DataError: the file cannot be read, or is no calibration cache.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_SIZE_LIMIT + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read as a calibration cache: {error.strerror or error}") from error
    try:
        return _parse(raw)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}: is no calibration cache or is damaged ({_one_line(error)}); delete it or name another file"
        ) from error


def _parse(raw: bytes) -> tuple[CalibrationKey, dict[str, Range]]:
    if len(raw) > _SIZE_LIMIT:
        raise ValueError(f"larger than {_SIZE_LIMIT} bytes")
    content = json.loads(raw)
    if content["format"] != _FORMAT or content["version"] != _VERSION:
        raise ValueError(f"format {content['format']!r}, version {content['version']!r}")
    key = CalibrationKey(content["model"], content["data"], content["observer"])
    if not (isinstance(key.model, str) and isinstance(key.data, str) and isinstance(key.observer, dict)):
        raise TypeError("its key is malformed")
    ranges = {}
    for name, (low, high) in content["ranges"].items():
        if not all(type(end) in (int, float) and isfinite(end) for end in (low, high)) or low > high:
            raise ValueError(f"the range of {name!r} is {low} to {high}")
        ranges[name] = Range(float(low), float(high))
    return key, ranges


def write_ranges(path: Path, key: CalibrationKey, ranges: Mapping[str, Range]) -> None:
    """Write the cache, all or nothing.

    Raises:
        UsageError: ``path`` cannot be a file.
        ResourceError: there is no room for it.
    """
    checked_destination(path, {})
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": key.model,
        "data": key.data,
        "observer": dict(key.observer),
        "ranges": {name: [found.low, found.high] for name, found in ranges.items()},
    }
    write_file(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]
