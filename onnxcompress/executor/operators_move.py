"""Operators that move, choose and repeat values, and those that make them from shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from onnxcompress.executor.operators_matrix import spread_pads
from onnxcompress.executor.spec import Kernel, Numbers, Operator, Spec, Table, Unsupported, as_tensor, torch_type

__all__ = ["MOVE"]


def _list(numbers: Numbers) -> list[int]:
    return [int(v) for v in numbers.reshape(-1)]


# ---- shape of a tensor -------------------------------------------------------------------------------------------


def _reshape(spec: Spec) -> Kernel:
    literal = bool(spec.attribute("allowzero", 0))

    def run(x: Tensor, shape: Numbers) -> Tensor:
        sizes = _list(shape)
        if not literal:
            sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
        return x.reshape(sizes)

    return run


def _flatten(spec: Spec) -> Kernel:
    axis = spec.attribute("axis", 1)

    def run(x: Tensor) -> Tensor:
        rows = 1
        for size in x.shape[: axis + x.ndim if axis < 0 else axis]:
            rows *= size
        return x.reshape(rows, x.numel() // rows if rows else 0)

    return run


def _transpose(spec: Spec) -> Kernel:
    perm = spec.ints("perm")
    return lambda x: x.permute(perm if perm is not None else tuple(reversed(range(x.ndim))))


def _squeeze(spec: Spec) -> Kernel:
    fixed = spec.ints("axes") if spec.opset < 13 else None

    def run(x: Tensor, given: Numbers | None = None) -> Tensor:
        axes = fixed if given is None else _list(given)
        gone = {a % x.ndim for a in axes} if axes is not None else {a for a, d in enumerate(x.shape) if d == 1}
        if any(x.shape[axis] != 1 for axis in gone):
            raise Unsupported("it squeezes an axis that is longer than 1")
        return x.reshape([size for axis, size in enumerate(x.shape) if axis not in gone])

    return run


def _unsqueeze(spec: Spec) -> Kernel:
    fixed = spec.ints("axes") if spec.opset < 13 else None

    def run(x: Tensor, given: Numbers | None = None) -> Tensor:
        axes = (fixed or []) if given is None else _list(given)
        rank = x.ndim + len(axes)
        new, sizes = {a % rank for a in axes}, iter(x.shape)
        return x.reshape([1 if axis in new else next(sizes) for axis in range(rank)])

    return run


def _expand(x: Tensor, shape: Numbers) -> Tensor:
    sizes = _list(shape)
    return x.expand(torch.broadcast_shapes(x.shape, sizes))


def _tile(x: Tensor, repeats: Numbers) -> Tensor:
    return x.repeat(_list(repeats))


def _concat(spec: Spec) -> Kernel:
    axis = spec.attribute("axis", 1 if spec.opset < 4 else 0)
    return lambda *tensors: torch.cat(tensors, axis)


def _split(spec: Spec) -> Kernel:
    axis, parts = spec.attribute("axis", 0), spec.outputs
    fixed = spec.ints("split") if spec.opset < 13 else None
    count = spec.attribute("num_outputs") if spec.opset >= 18 else None

    def run(x: Tensor, given: Numbers | None = None) -> Any:
        sizes = fixed if given is None else _list(given)
        if sizes is None:
            number, size = count or parts, x.shape[axis]
            each = -(-size // number)
            sizes = [each] * (number - 1) + [size - each * (number - 1)]
        return torch.split(x, sizes, axis)

    return run


def _slice(spec: Spec) -> Kernel:
    if spec.opset < 10:
        starts, ends, axes = spec.ints("starts") or [], spec.ints("ends") or [], spec.ints("axes")
        return lambda x: _cut(x, starts, ends, axes, None)

    def run(
        x: Tensor, starts: Numbers, ends: Numbers, axes: Numbers | None = None, steps: Numbers | None = None
    ) -> Tensor:
        return _cut(
            x,
            _list(starts),
            _list(ends),
            None if axes is None else _list(axes),
            None if steps is None else _list(steps),
        )

    return run


def _cut(
    x: Tensor, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int] | None, steps: Sequence[int] | None
) -> Tensor:
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = number if axes is None else axes[number] % x.ndim
        size, step = x.shape[axis], 1 if steps is None else steps[number]
        if step > 0:
            first, last, _ = slice(start, end, step).indices(size)
            x = x[(slice(None),) * axis + (slice(first, max(first, last), step),)]
        else:
            first = min(max(start + size if start < 0 else start, -1), size - 1)
            last = min(max(end + size if end < 0 else end, -1), size - 1)
            x = x.index_select(axis, torch.arange(first, last, step, device=x.device))
    return x


def _pad(spec: Spec) -> Kernel:
    mode = spec.attribute("mode", "constant")
    if mode not in ("constant", "reflect", "edge", "wrap"):
        raise Unsupported(f"mode is {mode!r}")
    if spec.opset < 11:
        fixed, value = spec.ints("pads") or [], spec.attribute("value", 0.0)
        return lambda x: _padded(x, fixed, mode, value)

    def run(x: Tensor, pads: Numbers, value: Numbers | None = None, axes: Numbers | None = None) -> Tensor:
        around, fill = _list(pads), 0 if value is None or value.size == 0 else value.reshape(-1)[0].item()
        if axes is not None:
            whole = [0] * (2 * x.ndim)
            for number, axis in enumerate(_list(axes)):
                whole[axis % x.ndim] = around[number]
                whole[axis % x.ndim + x.ndim] = around[number + axes.size]
            around = whole
        return _padded(x, around, mode, fill)

    return run


def _padded(x: Tensor, pads: Sequence[int], mode: str, value: float) -> Tensor:
    if mode == "constant":
        if x.dtype == torch.bool:
            return functional.pad(x.to(torch.uint8), spread_pads(pads), value=float(value)).to(torch.bool)
        return functional.pad(x, spread_pads(pads), value=value)
    rank = len(pads) // 2
    for axis in range(rank):
        before, after = pads[axis], pads[axis + rank]
        if not before and not after:
            continue
        size = x.shape[axis]
        if before < 0 or after < 0:
            kept = size + min(before, 0) + min(after, 0)
            x, before, after, size = x.narrow(axis, max(-before, 0), kept), max(before, 0), max(after, 0), kept
        places = np.arange(-before, size + after)
        if mode == "edge":
            places = places.clip(0, size - 1)
        elif mode == "wrap":
            places = places % size
        else:
            period = max(2 * (size - 1), 1)
            places = np.abs((places + size - 1) % period - (size - 1)) if size > 1 else np.zeros_like(places)
        x = x.index_select(axis, torch.from_numpy(places).to(x.device))
    return x


def _depth_to_space(spec: Spec) -> Kernel:
    block, mode = spec.attribute("blocksize"), spec.attribute("mode", "DCR")
    if mode not in ("DCR", "CRD"):
        raise Unsupported(f"mode is {mode!r}")

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if mode == "DCR":
            x = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
        else:
            x = x.reshape(n, c // block**2, block, block, h, w).permute(0, 1, 4, 2, 5, 3)
        return x.reshape(n, c // block**2, h * block, w * block)

    return run


def _space_to_depth(spec: Spec) -> Kernel:
    block = spec.attribute("blocksize")
    mode = spec.attribute("mode", "DCR")
    if mode not in ("DCR", "CRD"):
        raise Unsupported(f"mode is {mode!r}")

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // block, block, w // block, block)
        order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
        return x.permute(order).reshape(n, c * block**2, h // block, w // block)

    return run


def _trilu(spec: Spec) -> Kernel:
    upper = bool(spec.attribute("upper", 1))

    def run(x: Tensor, k: Numbers | None = None) -> Tensor:
        diagonal = 0 if k is None else int(k.reshape(-1)[0])
        return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)

    return run


# ---- made from shapes --------------------------------------------------------------------------------------------


def _shape(spec: Spec) -> Kernel:
    start, end = spec.attribute("start", 0), spec.attribute("end")

    def run(x: Tensor) -> Tensor:
        # Python's own slices clamp as the operator does.
        return torch.tensor(list(x.shape)[start:end], dtype=torch.int64)

    return run


def _size(x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64)


def _constant(spec: Spec) -> Kernel:
    for name, dtype in (("value_int", np.int64), ("value_ints", np.int64)):
        value = spec.attribute(name)
        if value is not None:
            return _always(np.array(value, dtype))
    for name in ("value_float", "value_floats"):
        value = spec.attribute(name)
        if value is not None:
            return _always(np.array(value, np.float32))
    array = spec.tensor("value")
    if array is None:
        raise Unsupported("it is no tensor of numbers")
    return _always(array)


def _always(array: NDArray[np.generic]) -> Kernel:
    tensor = as_tensor(array)
    return lambda: tensor


def _constant_of_shape(spec: Spec) -> Kernel:
    given = spec.tensor("value")
    array = np.zeros(1, np.float32) if given is None else given.reshape(-1)
    value = as_tensor(array)[0]
    return lambda shape: value.expand(_list(shape)).clone()


def _range(start: Numbers, limit: Numbers, delta: Numbers) -> Tensor:
    first, last, step = (value.reshape(()) for value in (start, limit, delta))
    count = max(int(np.ceil((last - first) / step)), 0)
    return as_tensor((first + np.arange(count) * step).astype(start.dtype))


def _eye_like(spec: Spec) -> Kernel:
    k, number = spec.attribute("k", 0), spec.attribute("dtype")

    def run(x: Tensor) -> Tensor:
        kind = x.dtype if number is None else torch_type(number)
        return torch.from_numpy(np.eye(x.shape[0], x.shape[1], k=k)).to(kind)

    return run


# ---- indices -----------------------------------------------------------------------------------------------------


def _wrapped(indices: Tensor, size: int) -> Tensor:
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + size, indices)


def _gather(spec: Spec) -> Kernel:
    axis = spec.attribute("axis", 0)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        along = axis % x.ndim
        places = _wrapped(indices, x.shape[along]).to(x.device)
        if along == 0 and x.ndim == 2 and x.is_floating_point():
            return functional.embedding(places, x)
        chosen = x.index_select(along, places.reshape(-1))
        return chosen.reshape([*x.shape[:along], *indices.shape, *x.shape[along + 1 :]])

    return run


def _gather_elements(spec: Spec) -> Kernel:
    axis = spec.attribute("axis", 0)
    return lambda x, indices: torch.gather(x, axis, _wrapped(indices, x.shape[axis]))


def _gather_nd(spec: Spec) -> Kernel:
    batch = spec.attribute("batch_dims", 0)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        depth = indices.shape[-1]
        leading = indices.shape[:batch]
        rows = 1
        for size in leading:
            rows *= size
        data = x.reshape([rows, *x.shape[batch:]])
        places = indices.reshape([rows, -1, depth])
        index = [torch.arange(rows, device=x.device).unsqueeze(1)]
        index += [_wrapped(places[..., i], data.shape[1 + i]) for i in range(depth)]
        return data[tuple(index)].reshape([*indices.shape[:-1], *x.shape[batch + depth :]])

    return run


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scatter_elements(spec: Spec) -> Kernel:
    axis, reduction = spec.attribute("axis", 0), spec.attribute("reduction", "none")
    if reduction != "none" and reduction not in _REDUCTIONS:
        raise Unsupported(f"reduction is {reduction!r}")

    def run(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        places = _wrapped(indices, x.shape[axis])
        if reduction == "none":
            return x.scatter(axis, places, updates)
        return x.scatter_reduce(axis, places, updates, _REDUCTIONS[reduction])

    return run


def _scatter_nd(spec: Spec) -> Kernel:
    reduction = spec.attribute("reduction", "none")
    if reduction != "none" and reduction not in _REDUCTIONS:
        raise Unsupported(f"reduction is {reduction!r}")

    def run(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        depth = indices.shape[-1]
        flat = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
        for i in range(depth):
            flat = flat * x.shape[i] + _wrapped(indices[..., i], x.shape[i])
        rows = 1
        for size in x.shape[:depth]:
            rows *= size
        data = x.reshape(rows, -1)
        new = updates.reshape(flat.numel(), -1)
        places = flat.reshape(-1, 1).expand(new.shape)
        if reduction == "none":
            return data.scatter(0, places, new).reshape(x.shape)
        return data.scatter_reduce(0, places, new, _REDUCTIONS[reduction]).reshape(x.shape)

    return run


def _one_hot(spec: Spec) -> Kernel:
    axis = spec.attribute("axis", -1)

    def run(indices: Tensor, depth: Numbers, values: Tensor) -> Tensor:
        count = int(depth.reshape(-1)[0])
        along = axis % (indices.ndim + 1)
        places = indices.to(torch.int64)
        places = torch.where(places < 0, places + count, places).unsqueeze(along)
        classes = torch.arange(count, device=places.device).reshape(
            [count if a == along else 1 for a in range(places.ndim)]
        )
        return torch.where(places == classes, values[1], values[0])

    return run


def _non_zero(x: Tensor) -> Tensor:
    found: Tensor = torch.nonzero(x if x.ndim else x.unsqueeze(0)).t()
    return found


def _compress(spec: Spec) -> Kernel:
    axis = spec.attribute("axis")

    def run(x: Tensor, condition: Tensor) -> Tensor:
        along, x = (axis, x) if axis is not None else (0, x.reshape(-1))
        return x.index_select(along, torch.nonzero(condition).reshape(-1))

    return run


def _reverse_sequence(spec: Spec) -> Kernel:
    batch, time = spec.attribute("batch_axis", 1), spec.attribute("time_axis", 0)

    def run(x: Tensor, lengths: Tensor) -> Tensor:
        steps = torch.arange(x.shape[time], device=x.device).unsqueeze(1)
        places = torch.where(steps < lengths, lengths - 1 - steps, steps)
        shape = [1] * x.ndim
        places = places if time < batch else places.t()
        shape[time], shape[batch] = x.shape[time], x.shape[batch]
        return torch.gather(x, time, places.reshape(shape).expand(x.shape))

    return run


def _of(function: Callable[..., Tensor]) -> Callable[[Spec], Kernel]:
    return lambda spec: function


MOVE: Table = MappingProxyType(
    {
        "Reshape": Operator(_reshape, numbers=(1,), weights=(0,), moves=True),
        "Flatten": Operator(_flatten, weights=(0,), moves=True),
        "Transpose": Operator(_transpose, weights=(0,), moves=True),
        "Squeeze": Operator(_squeeze, numbers=(1,), weights=(0,), moves=True),
        "Unsqueeze": Operator(_unsqueeze, numbers=(1,), weights=(0,), moves=True),
        "Expand": Operator(_of(_expand), numbers=(1,), weights=(0,), moves=True),
        "Tile": Operator(_of(_tile), numbers=(1,), moves=True),
        "Concat": Operator(_concat, moves=True),
        "Split": Operator(_split, numbers=(1,), moves=True),
        "Slice": Operator(_slice, numbers=(1, 2, 3, 4), weights=(0,), moves=True),
        "Pad": Operator(_pad, numbers=(1, 2, 3), moves=True),
        "DepthToSpace": Operator(_depth_to_space, moves=True),
        "SpaceToDepth": Operator(_space_to_depth, moves=True),
        "Trilu": Operator(_trilu, numbers=(1,), moves=True),
        "Shape": Operator(_shape, moves=True),
        "Size": Operator(_of(_size), moves=True),
        "Constant": Operator(_constant),
        "ConstantOfShape": Operator(_constant_of_shape, numbers=(0,)),
        "Range": Operator(_of(_range), numbers=(0, 1, 2)),
        "EyeLike": Operator(_eye_like),
        "Gather": Operator(_gather, weights=(0,), moves=True),
        "GatherElements": Operator(_gather_elements, moves=True),
        "GatherND": Operator(_gather_nd, moves=True),
        "Scatter": Operator(_scatter_elements, moves=True),
        "ScatterElements": Operator(_scatter_elements, moves=True),
        "ScatterND": Operator(_scatter_nd, moves=True),
        "OneHot": Operator(_one_hot, numbers=(1,)),
        "NonZero": Operator(_of(_non_zero), unshaped=True),
        "Compress": Operator(_compress, moves=True, unshaped=True),
        "ReverseSequence": Operator(_reverse_sequence, moves=True),
    }
)
