"""What a student is to reproduce of its teacher, and how far it is from it.

- class scores ``[N, classes]``: Kullback-Leibler divergence of the softmax at a temperature, and squared error
- embeddings ``[N, size]``: one minus the cosine, and squared error
- all other outputs: squared error
- block outputs: squared error

Squared errors are relative to the teacher's mean square on held-out samples, a constant, so that the loss is a mean
over samples: processes that share a batch add up to the loss of the whole.

Source: G. Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; A. Romero et al., "FitNets", ICLR 2015.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from onnxcompress.executor.plan import needed_nodes
from onnxcompress.graph import Graph, model_info, normal_domain
from onnxcompress.kept import Kept, read_kept

__all__ = ["Kind", "Objective", "Target", "block_points", "class_scores", "kept_positions", "kind_of", "matched"]

Kind = Literal["classes", "probabilities", "embedding", "values"]
Array = NDArray[Any]

_EMBEDDING = re.compile(r"embed|feature|hidden|pool|encod|represent|vector", re.IGNORECASE)
#: what may follow a join or a layer as part of it
_ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "PRelu", "HardSwish", "Gelu", "Sigmoid", "Elu", "Mish")
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Concat", "MaxPool", "LayerNormalization")
#: most block outputs that are compared
MOST_POINTS = 16
#: squared error over squared signal up to which a student's tensor is taken for its teacher's
_ALIKE = 0.7
_ALIKE_SCALED = 0.1
#: times that the error may be larger than it were if each channel had the best scale, and what is no error at all
_SCALED = 3.0
_EXACT = 1e-3


@dataclass(frozen=True)
class Target:
    """One tensor to reproduce.

    ``power`` is its mean square, ``keep`` what is left of the teacher's, by axis, and ``scale`` what its channels were
    multiplied by (empty: nothing).
    """

    student: str
    teacher: str
    kind: Kind
    power: float
    keep: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    scale: tuple[float, ...] = ()

    def of_teacher(self, value: Tensor) -> Tensor:
        """The part of the teacher's tensor that the student has, as the student has it."""
        for axis, indices in self.keep.items():
            value = value.index_select(axis, torch.tensor(indices, device=value.device))
        if self.scale:
            axis = _channel_axis(value.ndim)
            factors = torch.tensor(self.scale, dtype=value.dtype, device=value.device)
            value = value * factors.reshape([-1 if a == axis else 1 for a in range(value.ndim)])
        return value


def kind_of(name: str, value: Array) -> Kind | None:
    """What an output holds, judged by its shape, values and name; None for what is no real number."""
    if value.dtype.kind != "f":
        return None
    rows = value.ndim >= 2 and value.shape[1] > 1 and all(d == 1 for d in value.shape[2:])
    if not rows:
        return "values"
    flat = value.reshape(len(value), -1).astype(np.float64)
    if flat.min() >= 0 and np.allclose(flat.sum(axis=1), 1, atol=1e-3):
        return "probabilities"
    if _EMBEDDING.search(name) or np.allclose(np.linalg.norm(flat, axis=1), 1, atol=1e-3):
        return "embedding"
    return "classes"


def class_scores(value: Tensor, kind: Kind) -> Tensor:
    """[N, classes]: scores whose softmax are the probabilities."""
    rows = value.reshape(value.shape[0], -1)
    return torch.log(rows.clamp_min(1e-12)) if kind == "probabilities" else rows


@dataclass
class Objective:
    """The loss and its parts."""

    outputs: Sequence[Target]
    blocks: Sequence[Target]
    temperature: float = 4.0
    output_weight: float = 1.0
    value_weight: float = 1.0
    block_weight: float = 1.0
    label_weight: float = 0.0

    def loss(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        """The number to make small."""
        total = self.output_loss(student, teacher)
        for target in self.blocks:
            total = total + self.block_weight / len(self.blocks) * _squared(student, teacher, target)
        if self.label_weight and labels is not None:
            scored = next((t for t in self.outputs if t.kind in ("classes", "probabilities")), None)
            if scored is not None:
                scores = class_scores(student[scored.student], scored.kind)
                total = total + self.label_weight * functional.cross_entropy(scores, labels)
        return total

    def output_loss(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """The part that outputs have in it."""
        return self.sample_losses(student, teacher).mean()

    def sample_losses(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """[samples]: the same, sample by sample."""
        total: Any = 0.0
        for target in self.outputs:
            found, wanted = student[target.student], target.of_teacher(teacher[target.teacher])
            a, b = found.reshape(len(found), -1), wanted.reshape(len(found), -1)
            if target.kind in ("classes", "probabilities"):
                total = total + self.output_weight * self._divergence(found, wanted, target.kind)
            elif target.kind == "embedding":
                total = total + self.output_weight * (1 - functional.cosine_similarity(a, b))
            total = total + self.value_weight * (a - b).square().mean(1) / target.power
        return total / max(len(self.outputs), 1)

    def _divergence(self, found: Tensor, wanted: Tensor, kind: Kind) -> Tensor:
        t = self.temperature
        a = functional.log_softmax(class_scores(found, kind) / t, 1)
        b = functional.log_softmax(class_scores(wanted, kind) / t, 1)
        return functional.kl_div(a, b, reduction="none", log_target=True).sum(1) * t * t

    def agreement(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """[samples]: how far outputs agree: 1 or 0 for the top class, else the cosine; the mean over outputs."""
        figures = []
        for target in self.outputs:
            a = student[target.student].reshape(len(student[target.student]), -1)
            b = target.of_teacher(teacher[target.teacher]).reshape(len(a), -1)
            if target.kind in ("classes", "probabilities"):
                figures.append((a.argmax(1) == b.argmax(1)).to(torch.float32))
            else:
                figures.append(functional.cosine_similarity(a, b))
        return torch.stack(figures).mean(0)


def _squared(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], target: Target) -> Tensor:
    difference = student[target.student] - target.of_teacher(teacher[target.teacher])
    return difference.square().mean() / target.power


# ---- block outputs -----------------------------------------------------------------------------------------------


def kept_positions(graph: Graph, run: Kept) -> Kept:
    """What pruning left of tensors: of this ``run``, or else what the file's metadata say.

    Raises:
        ModelError: the metadata cannot be read.
    """
    text = model_info(graph).metadata.get("onnxcompress.kept", "")
    return run or (read_kept(text) if text else {})


def block_points(student: Graph, teacher: Graph) -> list[str]:
    """Names of tensors of both graphs at which blocks end, in order: residual joins, or layers where there are few."""
    known = {t.name for node in teacher.nodes for t in node.outputs}
    outputs = {t.name for t in student.outputs}
    joins, layers = [], []
    for node in needed_nodes(student, student.outputs):
        if normal_domain(node) != "" or not node.outputs:
            continue
        place = _after_activation(node.outputs[0], known)
        if place is None or place in outputs:
            continue
        if node.op == "Add" and len(node.inputs) == 2 and all(_is_computed(t) for t in node.inputs):
            joins.append(place)
        elif node.op in _LAYERS:
            layers.append(place)
    points = list(dict.fromkeys(joins if len(joins) >= 3 else [*joins, *layers]))
    if len(points) > MOST_POINTS:
        chosen = np.linspace(0, len(points) - 1, MOST_POINTS).round().astype(int)
        points = [points[i] for i in chosen]
    return points


def _after_activation(tensor: gs.Tensor, known: set[str]) -> str | None:
    """The last tensor that the teacher has of ``tensor``, its activation and its quantised form; None for none.

    A quantised tensor has its old name behind the DequantizeLinear.
    """
    found = str(tensor.name) if tensor.name in known else None
    for _ in range(4):
        readers = tensor.outputs
        if tensor.inputs and tensor.inputs[0].op == "QuantizeLinear":
            readers = [r for r in readers if r.op == "DequantizeLinear" and r.outputs[0].name in known][:1]
        if len(readers) != 1 or readers[0].op not in (*_ACTIVATIONS, "QuantizeLinear", "DequantizeLinear"):
            break
        tensor = readers[0].outputs[0]
        if readers[0].op != "QuantizeLinear" and tensor.name in known:
            found = str(tensor.name)
    return found


def _is_computed(tensor: gs.Tensor) -> bool:
    """False for constants, also behind a DequantizeLinear."""
    if isinstance(tensor, gs.Constant):
        return False
    if not tensor.inputs:
        return True
    producer = tensor.inputs[0]
    if producer.op == "DequantizeLinear":
        return _is_computed(producer.inputs[0])
    return bool(producer.op != "Constant")


def matched(
    points: Sequence[str],
    student: Mapping[str, Array],
    teacher: Mapping[str, Array],
    kept: Mapping[str, Mapping[int, tuple[int, ...]]],
) -> list[Target]:
    """Those ``points`` at which both networks compute the same thing, from the values of one batch.

    Shapes must be the same once what pruning removed is left out, and so, roughly, must be the values, once channels
    that a pass scaled are scaled back.
    """
    found = []
    for name in points:
        a, b = student[name], teacher[name]
        keep = kept.get(name, {})
        if a.dtype.kind != "f" or b.dtype.kind != "f" or a.ndim != b.ndim or a.ndim < 2:
            continue
        if any(axis >= b.ndim or not indices or max(indices) >= b.shape[axis] for axis, indices in keep.items()):
            continue
        for axis, indices in keep.items():
            b = np.take(b, indices, axis)
        if a.shape != b.shape:
            continue
        scale = _scale(a.astype(np.float64), b.astype(np.float64))
        if scale is None:
            continue
        power = float(np.mean(np.square(_scaled(b, scale), dtype=np.float64)))
        found.append(Target(name, name, "values", power, dict(keep), tuple(scale.tolist())))
    return found


def _channel_axis(rank: int) -> int:
    return 1 if rank > 3 else rank - 1


def _scaled(value: Array, scale: NDArray[np.float64]) -> Array:
    axis = _channel_axis(value.ndim)
    return value * scale.reshape([-1 if a == axis else 1 for a in range(value.ndim)]) if scale.size else value


def _scale(a: Array, b: Array) -> NDArray[np.float64] | None:
    """Factors of the channels of ``b`` with which it is ``a`` but for an error: none where there is no need for any.

    A pass that evens out ranges scales channels, and the tensor keeps its name. None for something else.
    """
    axis = _channel_axis(b.ndim)
    x, y = (np.moveaxis(v, axis, 0).reshape(v.shape[axis], -1) for v in (a, b))
    signal, error = float(np.sum(y * y)), float(np.sum(np.square(x - y)))
    if not signal > 0 or not np.isfinite(error):
        return None
    powers = np.sum(y * y, axis=1)
    scale = np.divide(np.sum(x * y, axis=1), powers, out=np.zeros_like(powers), where=powers > 0)
    rest, own = float(np.sum(np.square(x - y * scale[:, None]))), float(np.sum(x * x))
    if error > _SCALED * rest + _EXACT * signal:
        return scale if rest <= _ALIKE_SCALED * own and (scale[powers > 0] > 0).all() else None
    return np.empty(0) if error <= _ALIKE * signal else None
