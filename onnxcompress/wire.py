"""Weights in and out of a serialised model without holding them twice.

protobuf parses a file into one arena that lives as long as any message of it, and every access to ``raw_data`` copies.
A model read that way costs its weights two or three times over, and a replaced weight is never freed. So the large
``raw_data`` fields are cut out of the byte stream before protobuf sees it (:func:`split`) and put back when it is
written (:func:`join`). What protobuf handles is the skeleton: the same message with a marker where a weight was.

Wire format: https://protobuf.dev/programming-guides/encoding; field numbers: onnx.proto.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

__all__ = ["Payload", "Split", "WireError", "join", "new_token", "split"]

Bytes = NDArray[np.uint8]

# What lies below a field of a message, for the fields on the way to a TensorProto. Functions, training information and
# sparse tensors are not followed: they are small, and are carried as they are.
_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _TENSOR = range(5)
_CHILDREN: Mapping[int, Mapping[int, int]] = {
    _MODEL: {7: _GRAPH},
    _GRAPH: {1: _NODE, 5: _TENSOR},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH},
    _TENSOR: {},
}
_RAW_DATA = 9
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# protobuf's own limit on nested messages
_MAX_DEPTH = 100
#: fields on the way to the tensors; a model of a hundred thousand nodes has about a million. A file of a few MB could
#: hold more than can be read in a minute, and each becomes an object many times as large
_MOST_FIELDS = 10_000_000
_TOKEN_BYTES = 16
_MARKER_BYTES = _TOKEN_BYTES + 8


class WireError(ValueError):
    """The bytes are no protobuf message, or end too early."""


@dataclass(frozen=True)
class Payload:
    """Raw bytes of one weight, read when they are needed."""

    nbytes: int
    read: Callable[[], Bytes]


@dataclass
class Split:
    """A serialised message without its large weights, and these by the marker that stands in their place."""

    token: bytes
    skeleton: bytes = b""
    payloads: dict[bytes, Bytes] = field(default_factory=dict)

    def marker(self) -> bytes:
        """The marker of the next payload."""
        return self.token + len(self.payloads).to_bytes(_MARKER_BYTES - _TOKEN_BYTES, "little")


def new_token() -> bytes:
    """What every marker of one message starts with; drawn anew so that no file can contain one by intent."""
    return secrets.token_bytes(_TOKEN_BYTES)


def split(file: BinaryIO, threshold: int, *, skip: bool = False) -> Split:
    """Read a ModelProto from ``file``, each ``raw_data`` of ``threshold`` bytes or more into an array of its own.

    ``skip=True`` leaves the weights unread: the payloads are empty.

    Raises:
        WireError: no protobuf message, or one that ends too early.
    """
    size = os.fstat(file.fileno()).st_size
    result = Split(new_token())
    result.skeleton = b"".join(_Splitter(file, threshold, skip, result).message(size, _MODEL, 0))
    return result


class _Splitter:
    def __init__(self, file: BinaryIO, threshold: int, skip: bool, result: Split) -> None:
        self._file = file
        self._threshold = threshold
        self._skip = skip
        self._result = result
        self._position = file.tell()
        self._fields = 0

    def message(self, end: int, kind: int, depth: int) -> list[bytes]:
        """The pieces of the message of type ``kind`` that ends at ``end``, weights replaced by markers."""
        if depth > _MAX_DEPTH:
            raise WireError(f"messages are nested deeper than {_MAX_DEPTH} levels")
        pieces: list[bytes] = []
        children = _CHILDREN[kind]
        while self._position < end:
            self._fields += 1
            if self._fields > _MOST_FIELDS:
                raise WireError(f"it has more than {_MOST_FIELDS} fields")
            key = self._varint(end)
            number, wire_type = key >> 3, key & 7
            head = _encode(key)
            if wire_type == _BYTES:
                length = self._varint(end)
                if length > end - self._position:
                    raise WireError("a field reaches beyond the end of the file")
                if kind == _TENSOR and number == _RAW_DATA and length >= self._threshold:
                    pieces += (head, _encode(_MARKER_BYTES), self._payload(length))
                elif number in children and length >= self._threshold:
                    inner = self.message(self._position + length, children[number], depth + 1)
                    pieces += (head, _encode(sum(map(len, inner))), *inner)
                else:
                    pieces += (head, _encode(length), self._read(length))
            elif wire_type == _VARINT:
                pieces += (head, _encode(self._varint(end)))
            elif wire_type in (_FIXED32, _FIXED64):
                length = 4 if wire_type == _FIXED32 else 8
                if length > end - self._position:
                    raise WireError("a field reaches beyond the end of the file")
                pieces += (head, self._read(length))
            else:
                raise WireError(f"a field has the unknown wire type {wire_type}")
            if number == 0:
                raise WireError("a field has the number 0")
        return pieces

    def _payload(self, length: int) -> bytes:
        marker = self._result.marker()
        array: Bytes = np.empty(0 if self._skip else length, np.uint8)
        if self._skip:
            self._file.seek(length, os.SEEK_CUR)
        elif self._file.readinto(array.data) != length:  # type: ignore[attr-defined]
            raise WireError("the file ends too early")
        self._position += length
        array.flags.writeable = False
        self._result.payloads[marker] = array
        return marker

    def _read(self, length: int) -> bytes:
        data = self._file.read(length)
        if len(data) != length:
            raise WireError("the file ends too early")
        self._position += length
        return data

    def _varint(self, end: int) -> int:
        value = 0
        for shift in range(0, 70, 7):
            if self._position >= end:
                raise WireError("the file ends too early")
            byte = self._read(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF
        raise WireError("a number has more than 64 bits")


def join(skeleton: bytes, token: bytes, payloads: Mapping[bytes, Payload]) -> tuple[int, Iterator[bytes | memoryview]]:
    """Size and pieces of the message that ``skeleton`` becomes with each marker replaced by its payload.

    Payloads are read one after another while the pieces are consumed, so that only one is held at a time.
    """
    pieces: list[bytes | Payload] = []
    size = _join(skeleton, 0, len(skeleton), _MODEL, token, payloads, pieces)
    return size, (piece.read().data if isinstance(piece, Payload) else piece for piece in pieces)


def _join(
    data: bytes,
    position: int,
    end: int,
    kind: int,
    token: bytes,
    payloads: Mapping[bytes, Payload],
    pieces: list[bytes | Payload],
) -> int:
    """Append the pieces of the message ``data[position:end]`` and return its new size."""
    size = 0
    plain = start = position  # data[start:plain] goes out unchanged
    children = _CHILDREN[kind]
    while position < end:
        key, position = _decode(data, position)
        wire_type = key & 7
        if wire_type == _VARINT:
            _, position = _decode(data, position)
        elif wire_type != _BYTES:
            position += 4 if wire_type == _FIXED32 else 8
        else:
            length, position = _decode(data, position)
            number, stop = key >> 3, position + length
            is_weight = kind == _TENSOR and number == _RAW_DATA and data.startswith(token, position)
            if is_weight or (number in children and data.find(token, position, stop) >= 0):
                inner: list[bytes | Payload] = []
                if is_weight:
                    payload = payloads[data[position:stop]]
                    inner.append(payload)
                    length = payload.nbytes
                else:
                    length = _join(data, position, stop, children[number], token, payloads, inner)
                head = data[start:plain] + _encode(key) + _encode(length)
                pieces.append(head)
                pieces += inner
                size += len(head) + length
                start = stop
            position = stop
        plain = position
    if plain > start:
        pieces.append(data[start:plain])
        size += plain - start
    return size


def _decode(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _encode(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
