"""Fitting arrays to a model's inputs: names, types, ranks, shapes, sample counts, labels; each misfit in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxcompress.data.columns import Column, Rows
from onnxcompress.data.dataset import Chunk, Role
from onnxcompress.errors import DataError
from onnxcompress.graph import InputSpec

__all__ = ["LABEL_NAMES", "Fitter", "describe_spec"]

#: arrays of these names are labels unless the model has such an input
LABEL_NAMES = ("label", "labels", "target", "targets", "y")


def describe_spec(spec: InputSpec) -> str:
    """``'input' (float32, [N, 3, 32, 32])``."""
    return f"{spec.name!r} ({_type_name(spec.dtype)}, {_shape_text(spec.shape)})"


def _shape_text(shape: Sequence[int | str | None] | None) -> str:
    return "any shape" if shape is None else "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"


def _type_name(dtype: np.dtype[Any]) -> str:
    return "string" if dtype.hasobject else dtype.name


class Fitter:
    """Turns the arrays of a source into chunks that fit a model's inputs.

    Args:
        specs: the model's inputs.
        feeds: True where one mapping of arrays is one batch (a file of a folder, an item of an iterable); False where
            all samples lie in one mapping of arrays.
    """

    def __init__(self, specs: Sequence[InputSpec], *, feeds: bool) -> None:
        if not specs:
            raise DataError("the model has no inputs, so it takes no data")
        self._specs = {spec.name: spec for spec in specs}
        self._feeds = feeds
        self._notes: dict[str, None] = {}
        self._names: tuple[str, ...] | None = None
        self._labelled = False
        #: the batch that the model's shapes demand; known after the first chunk
        self.fixed_batch: int | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What was converted, each once."""
        return tuple(self._notes)

    def fit(self, arrays: Mapping[str, Column], origin: str) -> Chunk:
        """Check one mapping of arrays against the inputs and say how its values are converted.

        Raises:
            DataError: it does not fit; the message starts with ``origin``.
        """
        given = {name: array for name, array in arrays.items() if name in self._specs}
        label_name = self._label_name(arrays, origin)
        self._check_names(arrays, given, label_name, origin)
        whole = self._feeds and self._is_whole(given)
        if whole:
            given = {name: array.whole() for name, array in given.items()}
        roles = {name: self._role(self._specs[name], array, whole, origin) for name, array in given.items()}
        samples = self._count(given, roles, origin)
        self._check_symbols(given, roles, origin)
        self._check_batch(roles, origin)
        columns = {name: self._convert(self._specs[name], array, origin) for name, array in given.items()}
        labels = self._labels(arrays[label_name], samples, whole, origin) if label_name is not None else None
        if self._names is None:
            self._names, self._labelled = tuple(columns), labels is not None
        elif self._names != tuple(columns) or self._labelled != (labels is not None):
            before = ", ".join(self._names) + (" and labels" if self._labelled else " without labels")
            now = ", ".join(columns) + (" and labels" if labels is not None else " without labels")
            raise DataError(
                f"{origin}: has {now} but the batches before had {before}; give every batch the same arrays"
            )
        signature = tuple(
            (name, roles[name], column.shape[1:], _shared_value(column) if roles[name] == "shared" else None)
            for name, column in columns.items()
        )
        return Chunk(columns, roles, labels, samples, signature)

    # -- names ----------------------------------------------------------------------------------------------------

    def _label_name(self, arrays: Mapping[str, Column], origin: str) -> str | None:
        found = [name for name in arrays if name.lower() in LABEL_NAMES and name not in self._specs]
        if len(found) > 1:
            raise DataError(f"{origin}: {' and '.join(map(repr, found))} could both be the labels; keep one of them")
        return found[0] if found else None

    def _check_names(
        self, arrays: Mapping[str, Column], given: dict[str, Column], label_name: str | None, origin: str
    ) -> None:
        unknown = [name for name in arrays if name not in self._specs and name != label_name]
        missing = [spec.name for spec in self._specs.values() if not spec.optional and spec.name not in given]
        expected = ", ".join(describe_spec(s) for s in self._specs.values() if not s.optional)
        if missing:
            found = ", ".join(map(repr, arrays)) or "no arrays"
            raise DataError(
                f"{origin}: no array for model input {', '.join(map(repr, missing))}; "
                f"found {found}, expected {expected}; name the arrays as the model's inputs"
            )
        if unknown:
            raise DataError(
                f"{origin}: {', '.join(map(repr, unknown))} is neither a model input nor labels; expected {expected}; "
                f"leave it out or rename it (labels are called {', '.join(LABEL_NAMES)})"
            )

    # -- shapes ---------------------------------------------------------------------------------------------------

    def _is_whole(self, given: Mapping[str, Column]) -> bool:
        """True where the arrays of a feed do not share a sample axis, so that the feed can only be used as it is.

        That is so for the states of recurrent networks, ``[layers, batch, size]``: the model itself says that their
        first axis is another one.
        """
        firsts = []
        for name, array in given.items():
            shape = self._specs[name].shape
            if shape and array.shape:
                firsts.append((shape[0], array.shape[0], len(array.shape) == len(shape)))
        if not all(same_rank for *_, same_rank in firsts):
            return False
        declared = {dim for dim, *_ in firsts if dim is not None}
        fixed = {dim for dim in declared if isinstance(dim, int)}
        if fixed and (len(declared) > 1 or any(dim is None for dim, *_ in firsts)):
            return True
        return len(declared) > 1 and len({size for _, size, _ in firsts}) > 1

    def _role(self, spec: InputSpec, array: Column, whole: bool, origin: str) -> Role:
        given, shape = array.shape, spec.shape
        if shape is None:
            if not given:
                return "shared"
            return "single" if whole else "batched"
        role: Role
        if len(given) == len(shape) + 1 and (whole or shape == () or self._first_free(spec)):
            role = "single"
        elif len(given) == len(shape) and not whole:
            role = "batched" if given else "shared"
        else:
            raise DataError(
                f"{origin}: array {spec.name!r} has {len(given)} dimensions {_shape_text(given)} but the model takes "
                f"{len(shape)} {_shape_text(shape)}; {_rank_advice(given, shape)}"
            )
        trailing, expected = (given[1:], shape) if role == "single" else (given[1:], shape[1:])
        if any(isinstance(want, int) and want != have for have, want in zip(trailing, expected, strict=True)):
            raise DataError(
                f"{origin}: array {spec.name!r} has shape {_shape_text(given[1:] if whole else given)} but the model "
                f"takes {_shape_text(shape)}; {_shape_advice(trailing, expected)}"
            )
        return role

    def _first_free(self, spec: InputSpec) -> bool:
        """True where the model's input may well have no sample axis: no symbol on its first axis says otherwise."""
        return bool(spec.shape) and isinstance(spec.shape[0], int)  # type: ignore[index]

    def _count(self, given: Mapping[str, Column], roles: Mapping[str, Role], origin: str) -> int:
        counts = {name: array.shape[0] for name, array in given.items() if roles[name] != "shared"}
        if len(set(counts.values())) > 1:
            text = ", ".join(f"{name!r} has {count}" for name, count in counts.items())
            raise DataError(
                f"{origin}: the arrays hold different numbers of samples: {text}; the first axis is the sample"
            )
        samples = next(iter(counts.values()), 1)
        if samples == 0:
            raise DataError(f"{origin}: holds no samples (the first axis is 0); expected at least one")
        for name, array in given.items():
            if 0 in array.shape[1:]:
                raise DataError(f"{origin}: array {name!r} has shape {_shape_text(array.shape)} and so no values")
        return samples

    def _check_symbols(self, given: Mapping[str, Column], roles: Mapping[str, Role], origin: str) -> None:
        """A symbol stands for one size in all inputs."""
        sizes: dict[str, tuple[int, str]] = {}
        for name, array in given.items():
            shape = self._specs[name].shape
            if shape is None or roles[name] == "shared":
                continue
            axes = zip(array.shape[1:], shape if roles[name] == "single" else shape[1:], strict=True)
            for size, symbol in axes:
                if not isinstance(symbol, str):
                    continue
                first = sizes.setdefault(symbol, (size, name))
                if first[0] != size:
                    raise DataError(
                        f"{origin}: dimension {symbol!r} is {first[0]} in {first[1]!r} and {size} in {name!r}; "
                        "the model takes one size for both"
                    )

    def _check_batch(self, roles: Mapping[str, Role], origin: str) -> None:
        demands: dict[int, str] = {}
        for name, role in roles.items():
            shape = self._specs[name].shape
            if role == "single":
                demands.setdefault(1, name)
            elif role == "batched" and shape is not None and isinstance(shape[0], int):
                demands.setdefault(shape[0], name)
        if len(demands) > 1:
            text = " and ".join(f"{size} (input {name!r})" for size, name in sorted(demands.items()))
            raise DataError(
                f"{origin}: the inputs demand different batches, {text}, so not every first axis is the sample; "
                "give whole batches, by file.py:function or a folder with one file a batch"
            )
        if demands:
            self.fixed_batch = next(iter(demands))

    # -- values ---------------------------------------------------------------------------------------------------

    def _convert(self, spec: InputSpec, array: Column, origin: str) -> Column:
        have, want = array.dtype, spec.dtype
        where = f"{origin}: array {spec.name!r}"
        if want.hasobject:
            if have.kind not in "USO":
                raise DataError(f"{where} is {_type_name(have)} but the model takes strings; save text")
        elif have.type is np.void and have.itemsize == want.itemsize:
            pass  # NumPy's files keep bfloat16 and float8 as raw bytes
        elif have.newbyteorder("=") != want.newbyteorder("="):
            self._check_types(have, want, where)
            if have.kind != "b":
                text = f"array {spec.name!r}: {have.name} converted to {want.name}, which the model takes"
                self._notes.setdefault(text)
        return _FittedColumn(array, want, where)

    def _check_types(self, have: np.dtype[Any], want: np.dtype[Any], where: str) -> None:
        text = f"{where} is {have.name} but the model takes {want.name}"
        whole_numbers = have.kind in "iub" and want.kind in "iub"
        widening = _is_float(have) and _is_float(want) and np.can_cast(have, want, "safe")
        if whole_numbers or widening or (have == np.float64 and want == np.float32):
            return
        if have.kind in "iu" and _is_float(want):
            raise DataError(
                f"{text}; scale it as in training, for example ((x / 255 - mean) / std).astype('{want.name}')"
            )
        if _is_float(have) and want.kind in "iub":
            raise DataError(f"{text}; the fractions would be lost, save the values that the model takes")
        raise DataError(f"{text}; convert it yourself, for example x.astype('{want.name}')")

    def _labels(self, array: Column, samples: int, whole: bool, origin: str) -> Column:
        shape = array.shape
        if array.dtype.kind not in "iu" or not (len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)):
            raise DataError(
                f"{origin}: labels are {array.dtype} {_shape_text(shape)}; expected one whole number a sample, the "
                "index of its class"
            )
        if whole:
            return _LabelColumn(array, whole=True)
        if shape[0] != samples:
            raise DataError(f"{origin}: {shape[0]} labels for {samples} samples; expected one label a sample")
        return _LabelColumn(array, whole=False)


class _FittedColumn(Column):
    """A column in the model's type whose values are checked as they are read."""

    def __init__(self, source: Column, dtype: np.dtype[Any], where: str) -> None:
        self.shape, self.dtype = source.shape, dtype
        self._source = source
        self._where = where

    def open(self) -> Column:
        """See :meth:`Column.open`."""
        return _FittedColumn(self._source.open(), self.dtype, self._where)

    def close(self) -> None:
        """See :meth:`Column.close`."""
        self._source.close()

    def whole(self) -> Column:
        """See :meth:`Column.whole`."""
        return _FittedColumn(self._source.whole(), self.dtype, self._where)

    def rows(self, index: Rows) -> NDArray[Any]:
        """See :meth:`Column.rows`.

        Raises:
            DataError: a NaN, an infinity, or a value that the model's type cannot hold.
        """
        raw = self._source.rows(index)
        values = self._cast(raw, index)
        if _is_float(self.dtype) and not _all_finite(values):
            self._complain(~np.isfinite(_comparable(values)), raw, index)
        return values

    def _cast(self, raw: NDArray[Any], index: Rows) -> NDArray[Any]:
        want = self.dtype
        if want.hasobject:
            return (raw.astype(np.str_) if raw.dtype.kind == "S" else raw).astype(object)
        if raw.dtype == want:
            return raw
        if raw.dtype.kind == "V":
            return raw.view(want)
        with np.errstate(over="ignore", invalid="ignore"):
            values = raw.astype(want)
        if want.kind in "iub" and not np.can_cast(raw.dtype, want, "safe"):
            wrong = values.astype(raw.dtype) != raw
            if wrong.any():
                value = raw[wrong].reshape(-1)[0]
                raise DataError(
                    f"{self._where}, sample {_sample(wrong, index)}: {value} does not fit into {want.name}, "
                    "which the model takes"
                )
        return values

    def _complain(self, wrong: NDArray[np.bool_], raw: NDArray[Any], index: Rows) -> None:
        value = _comparable(raw)[wrong].reshape(-1)[0]
        if np.isfinite(value):
            what = f"{value} does not fit into {self.dtype.name}, which the model takes"
        else:
            what = f"{'NaN' if np.isnan(value) else 'infinity'} found; remove the sample or repair the value"
        raise DataError(f"{self._where}, sample {_sample(wrong, index)}: {what}")


class _LabelColumn(Column):
    """Class indices as int64, one a sample."""

    def __init__(self, source: Column, *, whole: bool) -> None:
        self._source, self._whole = source, whole
        self.shape, self.dtype = source.shape[:1], np.dtype(np.int64)

    def open(self) -> Column:
        """See :meth:`Column.open`."""
        return _LabelColumn(self._source.open(), whole=self._whole)

    def close(self) -> None:
        """See :meth:`Column.close`."""
        self._source.close()

    def whole(self) -> Column:
        """See :meth:`Column.whole`."""
        return _LabelColumn(self._source, whole=True)

    def rows(self, index: Rows) -> NDArray[Any]:
        """See :meth:`Column.rows`."""
        if self._whole:
            index = np.arange(self._source.shape[0])
        return self._source.rows(index).reshape(-1).astype(np.int64)


def _shared_value(column: Column) -> Any:
    return column.rows(np.zeros(1, np.int64)).tolist()


def _is_float(dtype: np.dtype[Any]) -> bool:
    """True for NumPy's floats and for bfloat16 and float8 of ml_dtypes, whose kind is 'V'."""
    return dtype.kind == "f" or (dtype.kind == "V" and dtype.names is None and "float" in dtype.name)


def _comparable(values: NDArray[Any]) -> NDArray[Any]:
    return values if values.dtype.kind == "f" else values.astype(np.float32)


def _all_finite(values: NDArray[Any]) -> bool:
    return bool(np.isfinite(_comparable(values)).all())


def _sample(wrong: NDArray[np.bool_], index: Rows) -> int:
    """Number of the first sample that has a wrong value."""
    if not wrong.ndim:
        return 0
    return int(index[int(np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1))[0])])


def _rank_advice(given: Sequence[int], shape: Sequence[int | str | None]) -> str:
    if len(given) == len(shape) - 1:
        return "for a single sample add the first axis: x[None]"
    if len(given) == len(shape) + 1 and 1 in given[1:]:
        return "remove the dimension of size 1: the first axis is the sample"
    return "the first axis is the sample"


def _shape_advice(given: Sequence[int], shape: Sequence[int | str | None]) -> str:
    def fits(candidate: Sequence[int]) -> bool:
        return all(not isinstance(want, int) or want == have for have, want in zip(candidate, shape, strict=True))

    if len(given) == 3 and fits((given[2], given[0], given[1])):
        return "it looks like channels last: use x.transpose(0, 3, 1, 2)"
    if len(given) == 3 and fits((given[1], given[2], given[0])):
        return "it looks like channels first: use x.transpose(0, 2, 3, 1)"
    return "preprocess it to the model's shape"
