"""Weights rounded so that each layer reproduces the float model's output from its own, quantised inputs.

Rounding every weight to the nearest integer is not best for the layer: errors of weights that see correlated inputs can
cancel. With the residual ``D = teacher - student`` at a layer's output and the student's inputs ``X`` (patches of the
image for a Conv), the weights ``W`` of each filter are moved by ``V`` and its bias by ``v`` so that ::

    ||D - V X - v||^2   becomes small, with (W + V) / scale an integer in [-127, 127]

The real solution, held to the float weights by a ridge, is rounded column by column, each rounding error being spread
over the columns still to come by the inverse of the Gram matrix ``X X'``, and then improved by coordinate descent.
Because ``X`` holds the errors that earlier layers made, the solution also mends what can be mended of these. Where
the output only goes into an Add, the sum is what is reproduced. Layers are done in graph order, each with every
earlier one in effect; grouped and depthwise convolutions group by group. No labels; scales and operators stay as they
are.

A layer keeps its new weights only if its error on held-out samples falls, and all of them together only if the error of
the model's outputs does not rise by more than chance.

Source: E. Frantar, D. Alistarh, "Optimal Brain Compression", NeurIPS 2022, and E. Frantar et al., "GPTQ", ICLR 2023,
for the rounding; M. Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020, for the
aim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from onnxcompress.base import Change, Context, Decision, Detail, Guarantee, Pass, Refusal
from onnxcompress.data import Dataset
from onnxcompress.errors import ModelError
from onnxcompress.graph import Graph, Names, attribute, constant_value, copy_graph
from onnxcompress.passes.fold_batch_norm import FoldBatchNorm
from onnxcompress.patches import Moments as RowMoments
from onnxcompress.patches import conv_pads, damped, output_sizes, unfold
from onnxcompress.quantization.layerwise import (
    Layer,
    Lockstep,
    Mended,
    find_layers,
    mismatch,
    require_teacher,
    settle,
    unlike,
)
from onnxcompress.quantization.rounding import DAMPING, integer_bounds, most_rows, round_columns
from onnxcompress.shapes import infer_shapes, node_macs
from onnxcompress.targets import get_target

__all__ = ["Moments", "Patches", "RoundWeights"]

Array = NDArray[Any]
Floats = NDArray[np.float64]

#: rows (output positions) a column (weight of a filter) that are sampled for the Gram matrix, and most rows
_ROWS_PER_COLUMN = 8
_ROWS = 65536
#: multiply-accumulates that running all samples may take, and samples that are used all the same, and at most
_MACS = 3.6e10
_FEW_SAMPLES = 24
_MOST_SAMPLES = 128
#: a model is large where the fewest samples take more; more is worth it where weights have fewer bits
_LARGE = 9e9
_LARGE_BOUNDED = 4 * _LARGE
#: a Gram matrix of more columns takes too long to factorise
_MOST_COLUMNS = 8192
#: integers that differ more from the float weight, relative to its norm, do not come from it
_SAME_WEIGHT = 0.3


class RoundWeights(Pass):
    """Round the weights of a quantised model anew so that each layer's output is that of the float model."""

    name: ClassVar[str] = "round_weights"

    ridge: tuple[float, ...] = Field(
        (1.0,),
        min_length=1,
        description="Pull towards the float weights, relative to the mean input power; the best is taken",
    )
    adjust_bias: bool = Field(True, description="Move the bias of each layer along with its weights")
    max_samples: int | None = Field(
        None,
        ge=1,
        description="Most calibration samples used; default: by the size of the model; memory may allow fewer",
    )
    large_models: bool = Field(
        True, description="Also models on which this takes longer than all the rest of quantising (above 375 M MACs)"
    )

    @property
    def guarantee(self) -> Guarantee:
        """Changes values, for the better: judged by the task metric."""
        return Guarantee.APPROXIMATE

    @property
    def needs_data(self) -> bool:
        """Gram matrices come from samples."""
        return True

    def requires(self, graph: Graph, context: Context) -> None:
        """The float model must be there."""
        require_teacher(self.name, graph, context)

    def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal | Decision | Detail]:
        """Round layer after layer, then judge all of them by the outputs."""
        assert context.teacher is not None
        student = copy_graph(graph)
        layers, skipped = find_layers(student, context.teacher)
        candidates = []
        for layer in layers:
            reason = _refusal(layer)
            if reason is None:
                candidates.append(layer)
            else:
                skipped.append((layer.name, reason))
        yield from (Refusal(name, f"weights not rounded anew: {reason}") for name, reason in skipped)
        if not candidates:
            return
        largest_pair = get_target(context.target).weights.largest_pair
        assert context.data is not None
        macs = _macs(context.teacher, context.data)
        if not self.large_models and macs * _FEW_SAMPLES > (_LARGE if largest_pair is None else _LARGE_BOUNDED):
            yield Refusal("", f"no weights rounded anew: a model of {macs / 1e6:.0f} M MACs, and large_models is false")
            return
        # Each sample costs a run of both networks.
        samples = self.max_samples or min(max(int(_MACS / max(macs, 1)), _FEW_SAMPLES), _MOST_SAMPLES)
        try:
            lockstep = Lockstep(
                student, candidates, context, samples=samples, reads=lambda layer: layer.node.inputs[0].name
            )
        except ModelError as error:
            yield Refusal("", f"no weights rounded anew: {error}")
            return
        names = Names(student)
        changes: list[Mended] = []
        originals = _float_weights(context.teacher, candidates)
        for number, layer in enumerate(context.progress.track(candidates, "rounding weights", len(candidates))):
            patches = Patches(layer, lockstep.samples.train.samples, np.random.default_rng([context.seed, number]))
            train, held_out = Moments(patches), Moments(patches)
            for inputs, expected, held in lockstep.pairs():
                (held_out if held else train).update(inputs, expected)
            reason = held_out.reason or train.reason
            if reason is not None:
                yield Refusal(layer.name, f"weights not rounded anew: {reason}")
                continue
            found = self._best(layer, originals[number], train, held_out, largest_pair)
            if found is None:
                continue
            integers, bias, before, after = found
            layer.set_integers(integers)
            if bias is not None:
                bias = layer.set_bias(bias, names)
            changes.append(Mended(layers.index(layer), layer.name, integers, bias, before, after))
        yield from settle(graph, changes, lockstep, context, "rounded")

    def _best(
        self, layer: Layer, original: Array | None, train: Moments, held_out: Moments, largest_pair: int | None
    ) -> tuple[NDArray[np.int8], Floats | None, float, float] | None:
        """Weights, bias and error before and after; None where nothing beats what is there."""
        patches = train.patches
        scale = patches.per_filter(layer.scale.astype(np.float64))[:, :, None]
        start = patches.filters(layer.integers).astype(np.float64)
        aim = start if original is None else patches.filters(original).astype(np.float64) / scale
        with_bias = self.adjust_bias and layer.has_bias
        gram, cross = train.normal_equations(centred=with_bias)
        rest = cross / scale - (aim - start) @ gram  # what the float weights leave of the residual
        wanted = [] if original is None else [aim]
        for ridge in self.ridge:
            wanted += [aim + np.linalg.solve(damped(gram, ridge), rest.swapaxes(1, 2)).swapaxes(1, 2)]
        before = best = held_out.relative(np.zeros_like(start), 0.0)
        answer = None
        # All at once, as if they were more filters: they have the Gram matrix in common.
        low, high = integer_bounds(start, largest_pair)
        start_of_each, *bounds = (np.tile(values, (1, len(wanted), 1)) for values in (start, low, high))
        rounded = round_columns(
            np.concatenate(wanted, axis=1), damped(gram, DAMPING), start_of_each, (bounds[0], bounds[1])
        )
        for integers in np.split(rounded, len(wanted), axis=1):
            change = (integers - start) * scale
            shift = train.best_shift(change) if with_bias else np.zeros(scale.shape[:2])
            after = held_out.relative(change, shift)
            if after < best:
                best, answer = after, (integers, shift)
        if answer is None:
            return None
        integers, shift = answer
        bias = layer.bias() + shift.reshape(-1) if with_bias else None
        return patches.weight(integers), bias, before, best


def _macs(teacher: Graph, data: Dataset) -> int:
    """Multiply-accumulates of one sample."""
    return sum(node_macs(teacher, infer_shapes(teacher, data.sample_shapes())).values())


def _float_weights(teacher: Graph, layers: Sequence[Layer]) -> list[Array | None]:
    """The weights that the layers' integers came from; None where the float model does not show them.

    The float model may still have its BatchNormalization, which the student's weights have taken in.
    """
    folded = FoldBatchNorm()(teacher).graph
    makers = {t.name: node for node in folded.nodes for t in node.outputs if t.name}
    found: list[Array | None] = []
    for layer in layers:
        node = makers.get(layer.own_target)
        weight = None if node is None or len(node.inputs) < 2 else constant_value(node.inputs[1])
        if weight is None or node is None or node.op != layer.node.op or weight.shape != layer.integers.shape:
            found.append(None)
            continue
        if node.op == "Gemm":
            weight = weight * np.float32(attribute(node, "alpha", 1.0))
        shape = [-1 if axis == layer.channel_axis else 1 for axis in range(weight.ndim)]
        away = weight - layer.integers * layer.scale.reshape(shape)
        found.append(weight if np.linalg.norm(away) < _SAME_WEIGHT * np.linalg.norm(weight) else None)
    return found


def _refusal(layer: Layer) -> str | None:
    if layer.shared:
        return "its weight is read by other nodes, too"
    if layer.integers.size == 0:
        return "its weight is empty"
    columns = prod(layer.integers.shape[1:]) if layer.node.op == "Conv" else layer.integers.size // layer.channels
    if columns > _MOST_COLUMNS:
        return f"its filters have {columns} weights, more than the {_MOST_COLUMNS} that can be solved for"
    return None


# ----------------------------------------------------------------------------------------------------------------------
# From tensors to columns and rows


class Patches:
    """A layer as a matrix product: its weight as [groups, filters, columns], its input as [groups, columns, rows].

    A row is one output position of one sample. Where there are many, the same random positions are taken of every
    sample of a batch.
    """

    def __init__(self, layer: Layer, samples: int, generator: np.random.Generator) -> None:
        node = layer.node
        self.layer = layer
        self.conv = node.op == "Conv"
        self.transposed = layer.channel_axis == 1
        self.groups = int(attribute(node, "group", 1)) if self.conv else 1
        shape = layer.integers.shape
        self.columns = prod(shape[1:]) if self.conv else layer.integers.size // layer.channels
        rows = min(max(self.columns, 32) * _ROWS_PER_COLUMN, _ROWS, most_rows(self.columns))
        self._positions = -(-rows // max(samples, 1))
        self._generator = generator

    def filters(self, weight: Array) -> Array:
        """The weight as [groups, filters, columns]."""
        if not self.conv and self.transposed:
            weight = weight.T
        return weight.reshape(self.groups, -1, self.columns)

    def weight(self, filters: Floats) -> NDArray[np.int8]:
        """The inverse of :meth:`filters`, as it is stored."""
        shape = self.layer.integers.shape
        if not self.conv and self.transposed:
            return np.ascontiguousarray(filters.reshape(shape[::-1]).T.astype(np.int8))
        return filters.reshape(shape).astype(np.int8)

    def per_filter(self, values: Array) -> Array:
        """One value a channel as [groups, filters]."""
        return np.ascontiguousarray(values).reshape(self.groups, -1)

    def rows(self, inputs: Array, expected: Array) -> tuple[Array, Array] | str:
        """([groups, columns, rows], [groups, filters, rows]) of one batch, or why they do not fit."""
        if self.conv:
            return self._conv_rows(inputs, expected)
        if inputs.shape[:-1] != expected.shape[:-1] or expected.shape[-1] != self.layer.channels:
            return mismatch(np.empty((*inputs.shape[:-1], self.layer.channels)), expected) or "its shapes do not fit"
        flat_in, flat_out = inputs.reshape(-1, inputs.shape[-1]), expected.reshape(-1, expected.shape[-1])
        many = self._positions * max(1, inputs.shape[0])
        if many < len(flat_in):
            chosen = np.sort(self._generator.choice(len(flat_in), many, replace=False))
            flat_in, flat_out = flat_in[chosen], flat_out[chosen]
        return flat_in.T[None], flat_out.T[None]

    def _conv_rows(self, inputs: Array, expected: Array) -> tuple[Array, Array] | str:
        node = self.layer.node
        kernel = self.layer.integers.shape[2:]
        strides = attribute(node, "strides", [1] * len(kernel))
        dilations = attribute(node, "dilations", [1] * len(kernel))
        spatial = inputs.shape[2:]
        pads = conv_pads(node, spatial, kernel, strides, dilations)
        padded = np.pad(inputs, [(0, 0), (0, 0), *pads])
        sizes = output_sizes(padded.shape[2:], kernel, strides, dilations)
        if expected.shape != (len(inputs), self.layer.channels, *sizes):
            return mismatch(np.empty((len(inputs), self.layer.channels, *sizes)), expected) or "its shapes do not fit"
        positions = np.arange(prod(sizes))
        if self._positions < len(positions):
            positions = np.sort(self._generator.choice(len(positions), self._positions, replace=False))
        columns = unfold(padded, self.groups, kernel, strides, dilations, positions)
        batch = len(inputs)
        chosen = expected.reshape(batch, self.groups, -1, prod(sizes))
        if self._positions < prod(sizes):
            chosen = chosen[..., positions]
        return columns, np.moveaxis(chosen, 0, 2).reshape(self.groups, chosen.shape[2], -1)


class Moments(RowMoments):
    """The sums for one layer, from its inputs and what it should give."""

    def __init__(self, layout: Patches) -> None:
        self.patches = layout
        layer = layout.layer
        weight = layout.filters(layer.integers).astype(np.float32) * layout.per_filter(layer.scale)[:, :, None]
        super().__init__(weight, layout.per_filter(layer.bias().astype(np.float32)))
        self._mismatch: str | None = None

    def update(self, inputs: Array, expected: Array) -> None:
        """Take in one batch of the layer's input and of what it should give."""
        rows = self.patches.rows(inputs, expected) if self._mismatch is None else self._mismatch
        if isinstance(rows, str):
            self._mismatch = rows
        else:
            self.add(*rows)

    @property
    def reason(self) -> str | None:
        """Why nothing can be learned from these rows; None where it can."""
        return self._mismatch or unlike(float(self.squares.sum()), self.signal)
