"""Sequential bias correction: shift each layer's bias by the mean error that quantisation left at its output.

Rounding weights and activations moves the mean of a layer's output, and what moves in one layer moves the inputs of all
that follow. So layers are corrected in graph order, each with every earlier correction in effect::

    bias[c] += mean over samples and positions of (teacher[c] - student[c])

which equals a full run of both networks per layer, at the cost of one (see :mod:`onnxcompress.quantization.layerwise`).
No labels. Where a layer's output only goes into an Add, the sum is what is compared: shifting the branch for itself
would undo what it makes up for on the shortcut. A layer keeps its correction only if its error on held-out samples
falls, and the corrections together only if the error of the model's outputs does not rise by more than chance.

Source: M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section
4.2, with means from data; NNCF calls it bias correction.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from onnxcompress.base import Change, Context, Decision, Detail, Guarantee, Pass, Refusal
from onnxcompress.errors import ModelError
from onnxcompress.graph import Graph, Names, copy_graph
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

__all__ = ["CorrectBias"]

#: a Conv or Gemm without a bias gets one where its error falls by at least this share
_WORTH_A_BIAS = 0.01


class CorrectBias(Pass):
    """Correct the biases of a quantised model so that the mean of each layer's output is that of the float model."""

    name: ClassVar[str] = "correct_bias"

    add_bias: bool = Field(True, description="Give a layer without a bias one where that lowers its error by 1 %")
    max_samples: int = Field(512, ge=1, description="Most calibration samples used; memory may allow fewer")

    @property
    def guarantee(self) -> Guarantee:
        """Changes values, for the better: judged by the task metric."""
        return Guarantee.APPROXIMATE

    @property
    def needs_data(self) -> bool:
        """Means come from samples."""
        return True

    def requires(self, graph: Graph, context: Context) -> None:
        """The float model must be there."""
        require_teacher(self.name, graph, context)

    def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal | Decision | Detail]:
        """Measure and correct layer after layer, then judge all corrections by the outputs."""
        assert context.teacher is not None
        student = copy_graph(graph)
        layers, skipped = find_layers(student, context.teacher)
        candidates = []
        for layer in layers:
            if layer.bias_node is None:
                skipped.append((layer.name, "no bias follows that could be corrected"))
            elif not layer.has_bias and not self.add_bias:
                skipped.append((layer.name, "it has no bias, and add_bias is off"))
            else:
                candidates.append(layer)
        yield from (Refusal(name, f"bias not corrected: {reason}") for name, reason in skipped)
        if not candidates:
            return
        try:
            lockstep = Lockstep(
                student, candidates, context, samples=self.max_samples, reads=lambda layer: layer.output.name
            )
        except ModelError as error:
            yield Refusal("", f"no bias corrected: {error}")
            return
        names = Names(student)
        changes: list[Mended] = []
        for layer in context.progress.track(candidates, "correcting biases", len(candidates)):
            train, held_out = _Errors(layer), _Errors(layer)
            for found, expected, held in lockstep.pairs():
                (held_out if held else train).update(found, expected)
            reason = held_out.reason or train.reason
            if reason is not None:
                yield Refusal(layer.name, f"bias not corrected: {reason}")
                continue
            before, after = held_out.relative(0.0), held_out.relative(train.mean)
            if not after < before * (1.0 if layer.has_bias else 1.0 - _WORTH_A_BIAS):
                continue
            old = layer.bias()
            new = layer.set_bias(old + train.mean, names)
            lockstep.student.shift(layer.output.name, new - old, layer.axis)
            changes.append(Mended(layers.index(layer), layer.name, None, new, before, after))
        yield from settle(graph, changes, lockstep, context, "bias corrected")


class _Errors:
    """Sums of teacher - student at a layer's output, per channel, over batches.

    ``reason`` says why the layer cannot be judged; None where it can.
    """

    def __init__(self, layer: Layer) -> None:
        self._axis = layer.axis
        self._count = 0
        self._sum = np.zeros(layer.channels)
        self._squares = np.zeros(layer.channels)
        self._signal = 0.0
        self._mismatch: str | None = None

    def update(self, found: NDArray[Any], expected: NDArray[Any]) -> None:
        """Take in one batch of both tensors."""
        self._mismatch = self._mismatch or mismatch(found, expected)
        if self._mismatch is not None:
            return
        rows = np.moveaxis(expected - found, self._axis, 0).reshape(len(self._sum), -1)
        self._count += rows.shape[1]
        self._sum += rows.sum(axis=1, dtype=np.float64)
        self._squares += np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
        self._signal += float(np.einsum("i,i->", expected.ravel(), expected.ravel(), dtype=np.float64))

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean error of each channel."""
        return self._sum / self._count

    @property
    def reason(self) -> str | None:
        """Why this is no basis for a correction."""
        if self._mismatch is not None:
            return self._mismatch
        return unlike(float(self._squares.sum()), self._signal)

    def relative(self, amount: NDArray[np.float64] | float) -> float:
        """Squared error over squared signal if ``amount`` were added to the student's channels."""
        squares = self._squares - 2 * amount * self._sum + self._count * np.square(amount)
        return max(float(squares.sum()), 0.0) / self._signal
