"""Matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from onnxcompress.executor.spec import Kernel, Operator, Spec, Table, Unsupported

__all__ = ["MATRIX", "same_pads", "spread_pads"]

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}

_AUTO_PADS = ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")


def spread_pads(pads: Sequence[int]) -> list[int]:
    """ONNX's pads (all begins, then all ends) in the order of torch's ``pad``: last axis first."""
    rank = len(pads) // 2
    return [pads[axis + end * rank] for axis in reversed(range(rank)) for end in (0, 1)]


def same_pads(
    sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], upper: bool
) -> list[int]:
    """ONNX's pads for auto_pad SAME_UPPER or SAME_LOWER."""
    begins, ends = [], []
    for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        less, more = total // 2, total - total // 2
        begins.append(less if upper else more)
        ends.append(more if upper else less)
    return begins + ends


def auto_pad(spec: Spec) -> str:
    """The attribute auto_pad."""
    mode = spec.attribute("auto_pad", "NOTSET")
    if mode not in _AUTO_PADS:
        raise Unsupported(f"auto_pad is {mode!r}")
    return str(mode)


# ---- matrix products ---------------------------------------------------------------------------------------------


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


def _gemm(spec: Spec) -> Kernel:
    alpha, beta = spec.attribute("alpha", 1.0), spec.attribute("beta", 1.0)
    trans_a, trans_b = bool(spec.attribute("transA", 0)), bool(spec.attribute("transB", 0))
    plain = alpha == 1.0 and beta == 1.0 and trans_b and not trans_a

    def run(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        if plain and (c is None or c.ndim == 1):
            return functional.linear(a, b, c if c is None or c.shape[0] != 1 else c.expand(b.shape[0]))
        a, b = a.t() if trans_a else a, b.t() if trans_b else b
        if c is None or beta == 0.0:
            product = a @ b
            return product if alpha == 1.0 else alpha * product
        if not a.is_floating_point():
            return (alpha * (a @ b) + beta * c).to(a.dtype)
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)

    return run


def _einsum(spec: Spec) -> Kernel:
    equation = spec.attribute("equation").replace(" ", "")
    return lambda *tensors: torch.einsum(equation, *tensors)


# ---- convolutions ------------------------------------------------------------------------------------------------


def _conv(spec: Spec) -> Kernel:
    mode, group = auto_pad(spec), spec.attribute("group", 1)
    pads, strides, dilations = spec.ints("pads"), spec.ints("strides"), spec.ints("dilations")
    spec.ints("kernel_shape")  # the weight has it too

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rank = weight.ndim - 2
        if rank not in _CONV:
            raise Unsupported(f"a convolution over {rank} axes is not computed")
        step, spread = strides or [1] * rank, dilations or [1] * rank
        if mode.startswith("SAME"):
            around = same_pads(x.shape[2:], weight.shape[2:], step, spread, mode == "SAME_UPPER")
        else:
            around = (pads if mode == "NOTSET" else None) or [0] * (2 * rank)
        if around[:rank] != around[rank:] or min(around) < 0:
            x, around = functional.pad(x, spread_pads(around)), [0] * (2 * rank)
        return _CONV[rank](x, weight, bias, step, around[:rank], spread, group)

    return run


def _conv_transpose(spec: Spec) -> Kernel:
    mode, group = auto_pad(spec), spec.attribute("group", 1)
    pads, strides, dilations = spec.ints("pads"), spec.ints("strides"), spec.ints("dilations")
    extra, wanted = spec.ints("output_padding"), spec.ints("output_shape")
    spec.ints("kernel_shape")

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rank = weight.ndim - 2
        if rank not in _TRANSPOSED:
            raise Unsupported(f"a convolution over {rank} axes is not computed")
        step, spread, more = strides or [1] * rank, dilations or [1] * rank, extra or [0] * rank
        sizes, kernel = list(x.shape[2:]), list(weight.shape[2:])
        around = (pads if mode == "NOTSET" else None) or [0] * (2 * rank)
        target = wanted[-rank:] if wanted else None
        if target is None and mode.startswith("SAME"):
            target = [size * s for size, s in zip(sizes, step, strict=True)]
        if target is not None:
            around = _output_pads(target, sizes, kernel, step, spread, more, mode == "SAME_UPPER")
        even = around[:rank] == around[rank:] and min(around) >= 0
        if even and all(m < max(s, d) for m, s, d in zip(more, step, spread, strict=True)):
            return _TRANSPOSED[rank](x, weight, bias, step, around[:rank], more, group, spread)
        whole = _TRANSPOSED[rank](x, weight, None, step, 0, 0, group, spread)
        ends = [m - end for m, end in zip(more, around[rank:], strict=True)]
        cut = functional.pad(whole, spread_pads([*(-begin for begin in around[:rank]), *ends]))
        return cut if bias is None else cut + bias.reshape([1, -1, *[1] * rank])

    return run


def _output_pads(
    target: Sequence[int],
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    extra: Sequence[int],
    upper: bool,
) -> list[int]:
    """ONNX's pads with which a transposed convolution has the output shape ``target``."""
    begins, ends = [], []
    for out, size, k, s, d, more in zip(target, sizes, kernel, strides, dilations, extra, strict=True):
        total = s * (size - 1) + more + (k - 1) * d + 1 - out
        less, rest = total // 2, total - total // 2
        begins.append(less if upper else rest)
        ends.append(rest if upper else less)
    return begins + ends


def _global_average_pool(x: Tensor) -> Tensor:
    return x.mean(dim=tuple(range(2, x.ndim)), keepdim=True)


def _global_max_pool(x: Tensor) -> Tensor:
    return x.amax(dim=tuple(range(2, x.ndim)), keepdim=True)


def _global_lp_pool(spec: Spec) -> Kernel:
    p = spec.attribute("p", 2)
    return lambda x: torch.linalg.vector_norm(x, p, dim=tuple(range(2, x.ndim)), keepdim=True)


# ---- pools -------------------------------------------------------------------------------------------------------

_MAX = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_AVERAGE = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


class _Window:
    """Where the windows of a pool lie."""

    def __init__(self, spec: Spec) -> None:
        self.kernel = spec.ints("kernel_shape") or []
        self.rank = len(self.kernel)
        self.mode = auto_pad(spec)
        self.strides = spec.ints("strides") or [1] * self.rank
        self.dilations = spec.ints("dilations") or [1] * self.rank
        self.ceil = bool(spec.attribute("ceil_mode", 0))
        self.given = spec.ints("pads") or [0] * (2 * self.rank)
        if self.rank not in _MAX:
            raise Unsupported(f"a pool over {self.rank} axes is not computed")

    def pads(self, sizes: Sequence[int]) -> tuple[list[int], list[int]]:
        """(ONNX's pads, what windows that stick out at the end need beyond them)."""
        rank = self.rank
        if self.mode.startswith("SAME"):
            pads = same_pads(sizes, self.kernel, self.strides, self.dilations, self.mode == "SAME_UPPER")
        else:
            pads = list(self.given) if self.mode == "NOTSET" else [0] * (2 * rank)
        beyond = []
        for axis, (size, k, s, d) in enumerate(zip(sizes, self.kernel, self.strides, self.dilations, strict=True)):
            room = size + pads[axis] + pads[axis + rank] - ((k - 1) * d + 1)
            out = -(-room // s) + 1 if self.ceil else room // s + 1
            if self.ceil and (out - 1) * s >= size + pads[axis]:
                out -= 1  # a window that would start in the padding at the end
            beyond.append(max((out - 1) * s - room, 0))
        return pads, beyond


def _max_pool(spec: Spec) -> Kernel:
    window = _Window(spec)
    columns = bool(spec.attribute("storage_order", 0))
    indices = spec.wants(1)
    rank, pool = window.rank, _MAX[window.rank]

    def run(x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        given = x.dtype
        if not x.is_floating_point():
            x = x.to(torch.float64)
        sizes = list(x.shape[2:])
        pads, beyond = window.pads(sizes)
        even = pads[:rank] == pads[rank:] and not any(beyond)
        inside = even and all(0 <= p <= k // 2 for p, k in zip(pads, window.kernel, strict=False))
        if inside and not indices:
            return pool(x, window.kernel, window.strides, pads[:rank], window.dilations).to(given)
        ends = [end + more for end, more in zip(pads[rank:], beyond, strict=True)]
        padded = functional.pad(x, spread_pads([*pads[:rank], *ends]), value=-torch.inf)
        if not indices:
            return pool(padded, window.kernel, window.strides, 0, window.dilations).to(given)
        values, places = pool(padded, window.kernel, window.strides, 0, window.dilations, return_indices=True)
        return values.to(given), _places(places, list(padded.shape[2:]), pads[:rank], list(x.shape), columns)

    return run


def _places(
    places: Tensor, padded: Sequence[int], begins: Sequence[int], shape: Sequence[int], columns: bool
) -> Tensor:
    """ONNX's indices, which count in the whole tensor without padding, from torch's, which count in a padded plane."""
    sizes = shape[2:]
    where: list[Tensor] = []
    rest = places
    for size, begin in zip(reversed(padded), reversed(begins), strict=True):
        where.insert(0, rest % size - begin)
        rest = rest // size
    flat = torch.zeros_like(places)
    order = range(len(sizes)) if not columns else reversed(range(len(sizes)))
    for axis in order:
        flat = flat * sizes[axis] + where[axis]
    planes = torch.arange(shape[0] * shape[1], device=places.device).reshape([*shape[:2], *[1] * len(sizes)])
    return flat + planes * prod(sizes)


def _average_pool(spec: Spec) -> Kernel:
    window = _Window(spec)
    include = bool(spec.attribute("count_include_pad", 0))
    rank, pool = window.rank, _AVERAGE[window.rank]
    dense = all(d == 1 for d in window.dilations)

    def run(x: Tensor) -> Tensor:
        sizes = list(x.shape[2:])
        pads, beyond = window.pads(sizes)
        even = pads[:rank] == pads[rank:] and not any(beyond)
        if dense and even and all(0 <= p <= k // 2 for p, k in zip(pads, window.kernel, strict=False)):
            return pool(x, window.kernel, window.strides, pads[:rank], False, include)
        # Sums over zeros that stand for the padding, over counts of what lies inside.
        inner = torch.ones([1, 1, *sizes], dtype=x.dtype, device=x.device)
        ends = [end + more for end, more in zip(pads[rank:], beyond, strict=True)]
        whole = functional.pad(x, spread_pads([*pads[:rank], *ends]))
        if include:
            inner = functional.pad(inner, spread_pads(pads), value=1.0)
            counted = functional.pad(inner, spread_pads([*[0] * rank, *beyond]))
        else:
            counted = functional.pad(inner, spread_pads([*pads[:rank], *ends]))
        return _window_sums(whole, window) / _window_sums(counted, window)

    return run


def _window_sums(x: Tensor, window: _Window) -> Tensor:
    for axis, (k, s, d) in enumerate(zip(window.kernel, window.strides, window.dilations, strict=True)):
        x = x.unfold(2 + axis, (k - 1) * d + 1, s)[..., ::d].sum(-1)
    return x


def _lp_pool(spec: Spec) -> Kernel:
    window, p = _Window(spec), spec.attribute("p", 2)
    rank = window.rank

    def run(x: Tensor) -> Tensor:
        pads, beyond = window.pads(list(x.shape[2:]))
        ends = [end + more for end, more in zip(pads[rank:], beyond, strict=True)]
        powers = functional.pad(x, spread_pads([*pads[:rank], *ends])).abs().pow(p)
        return _window_sums(powers, window).pow(1.0 / p)

    return run


MATRIX: Table = MappingProxyType(
    {
        "MatMul": Operator(lambda spec: _matmul, weights=(0, 1)),
        "Gemm": Operator(_gemm, weights=(0, 1, 2)),
        "Einsum": Operator(_einsum, weights=(0, 1)),
        "Conv": Operator(_conv, weights=(1, 2)),
        "ConvTranspose": Operator(_conv_transpose, weights=(1, 2)),
        "MaxPool": Operator(_max_pool, moves=True),
        "AveragePool": Operator(_average_pool),
        "LpPool": Operator(_lp_pool),
        "GlobalAveragePool": Operator(lambda spec: _global_average_pool),
        "GlobalMaxPool": Operator(lambda spec: _global_max_pool, moves=True),
        "GlobalLpPool": Operator(_global_lp_pool),
    }
)
