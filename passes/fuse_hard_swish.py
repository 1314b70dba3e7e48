"""Write HardSwish and HardSigmoid, which exporters spell out, as one operator each.

::

    Clip(x + 3, 0, 6) / 6                              HardSigmoid(x), with alpha 1/6 and beta 1/2
    x * Clip(x + 3, 0, 6) / 6                          HardSwish(x)
    x * HardSigmoid(x), with alpha 1/6 and beta 1/2    HardSwish(x)

The division may come before or behind the product, and be a product with 1/6. PaddlePaddle, and PyTorch below operator
set 14, write MobileNetV3, PP-OCR and PicoDet like that. Each of the four operators reads and writes the whole image; as
one or two the original is faster, and what quantises and prunes meets an operator that it knows. So this comes before
:mod:`~onnxcompress.passes.fold_batch_norm`, which would fold the division into the next convolution.

HardSwish exists since operator set 14; below it the product stays, with a HardSigmoid. What others read stays too.

Operators: https://onnx.ai/onnx/operators/onnx__HardSwish.html, https://onnx.ai/onnx/operators/onnx__HardSigmoid.html
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.base import Change, Context, Guarantee, Pass
from onnxcompress.graph import (
    Graph,
    Names,
    attribute,
    constant_value,
    graph_output_ids,
    normal_domain,
    remove_nodes,
    tensors_read_inside,
)
from onnxcompress.quantization.placement import activation_bounds
from onnxcompress.shapes import TensorType, infer_shapes

__all__ = ["FuseHardSwish"]

_SIXTH = float(np.float32(1 / 6))
#: relative; exporters round 1/6 to six digits and more
_CLOSE = 2e-6
#: HardSwish exists since this operator set
_HARD_SWISH = 14


class FuseHardSwish(Pass):
    """Write HardSwish and HardSigmoid, which exporters spell out, as one operator each."""

    name: ClassVar[str] = "fuse_hard_swish"

    @property
    def guarantee(self) -> Guarantee:
        """Equal but for rounding."""
        return Guarantee.EQUIVALENT

    def apply(self, graph: Graph, context: Context) -> Iterator[Change]:
        """Rewrite every such pattern of the outermost graph."""
        if not any(node.op in ("Clip", "HardSigmoid") for node in graph.nodes):
            return
        fuser = _Fuser(graph)
        for node in [node for node in graph.nodes if node.op in ("Clip", "HardSigmoid")]:
            made = fuser.fuse(node)
            if made is not None:
                yield Change("fused", made.name, f"{len(fuser.gone) + 1} operators became one {made.op}")
                fuser.remove()


class _Fuser:
    """Finds the patterns around a Clip or HardSigmoid."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.types: Mapping[str, TensorType] = infer_shapes(graph, {})
        self.used = graph_output_ids(graph) | {id(tensor) for tensor in tensors_read_inside(graph)}
        self.names = Names(graph)
        #: what the last pattern consisted of, and no longer does
        self.gone: list[gs.Node] = []

    def fuse(self, node: gs.Node) -> gs.Node | None:
        """The operator that took the place of :attr:`gone`, the pattern around ``node``; None where there is none."""
        if normal_domain(node) != "":
            return None
        product: gs.Node | None
        if node.op == "HardSigmoid":
            if not _is_gate(node) or self.graph.opset < _HARD_SWISH:
                return None
            product = self._product(node, node.inputs[0])
            return None if product is None else self._become("HardSwish", node.inputs[0], [node, product])
        found = self._shifted(node)
        if found is None:
            return None
        x, chain = found
        sixth = self._sixth(node, x)
        if sixth is not None:  # a HardSigmoid, perhaps with its product
            chain.append(sixth)
            product = self._product(sixth, x) if self.graph.opset >= _HARD_SWISH else None
            return self._become(
                *(("HardSigmoid", x, chain) if product is None else ("HardSwish", x, [*chain, product]))
            )
        product = self._product(node, x)
        sixth = None if product is None else self._sixth(product, x)
        if product is None or sixth is None:
            return None
        if self.graph.opset >= _HARD_SWISH:
            return self._become("HardSwish", x, [*chain, product, sixth])
        return self._divide_first(x, chain, product, sixth)

    def remove(self) -> None:
        """Drop the pattern's nodes."""
        remove_nodes(self.graph, self.gone)

    def _become(self, op: str, x: gs.Tensor, chain: list[gs.Node]) -> gs.Node:
        """One operator for ``chain``, in the place and with the name and output of its last node."""
        last = chain[-1]
        last.op, last.inputs = op, [x]
        last.attrs = {"alpha": _SIXTH, "beta": 0.5} if op == "HardSigmoid" else {}
        self.gone = chain[:-1]
        return last

    def _divide_first(self, x: gs.Tensor, chain: list[gs.Node], product: gs.Node, sixth: gs.Node) -> gs.Node:
        """x * (Clip(x + 3, 0, 6) / 6) for (x * Clip(x + 3, 0, 6)) / 6, so that the first factor is a HardSigmoid."""
        result = sixth.outputs[0]
        gate = self._become("HardSigmoid", x, chain)
        gate.outputs[0].name = self.names.free(f"{gate.outputs[0].name}_sixth")  # it holds something else
        sixth.outputs.clear()
        product.outputs = [result]
        self.gone.append(sixth)
        return gate

    def _shifted(self, clip: gs.Node) -> tuple[gs.Tensor, list[gs.Node]] | None:
        """x and the nodes of Clip(x + 3, 0, 6)."""
        bounds = activation_bounds(clip)
        if bounds is None or (bounds.low, bounds.high) != (0.0, 6.0):
            return None
        tensor = clip.inputs[0]
        if len(tensor.inputs) != 1 or self._reader(tensor.inputs[0]) is not clip:
            return None
        add = tensor.inputs[0]
        x = self._other(add, 3.0) if add.op == "Add" else None
        return None if x is None or not self._is_float(x) else (x, [add, clip])

    def _sixth(self, node: gs.Node, x: gs.Tensor) -> gs.Node | None:
        """What divides the output of ``node`` by 6, where nobody else reads it."""
        reader = self._reader(node)
        if reader is None or reader.op not in ("Div", "Mul"):
            return None
        factor = 6.0 if reader.op == "Div" else 1 / 6
        return reader if self._other(reader, factor) is node.outputs[0] else None

    def _product(self, node: gs.Node, x: gs.Tensor) -> gs.Node | None:
        """What multiplies the output of ``node`` with ``x``, where nobody else reads it."""
        reader = self._reader(node)
        if reader is None or reader.op != "Mul" or len(reader.inputs) != 2 or not self._is_float(x):
            return None
        a, b = reader.inputs
        made = node.outputs[0]
        return reader if (a is made and b is x) or (b is made and a is x) else None

    def _reader(self, node: gs.Node) -> gs.Node | None:
        """The only reader of what ``node`` makes, which is no output of the model."""
        (made,) = node.outputs
        if id(made) in self.used or len(made.outputs) != 1 or normal_domain(made.outputs[0]) != "":
            return None
        reader: gs.Node = made.outputs[0]
        return reader

    def _other(self, node: gs.Node, constant: float) -> gs.Tensor | None:
        """The operand of ``node`` beside a number close to ``constant``; of a Div the dividend."""
        if len(node.inputs) != 2 or normal_domain(node) != "":
            return None
        a, b = node.inputs
        for x, number in ((a, b), *(() if node.op == "Div" else ((b, a),))):
            value = constant_value(number)
            if value is None or value.size != 1 or constant_value(x) is not None:
                continue
            known = self.types.get(x.name)
            if value.ndim and (known is None or known.shape is None or len(known.shape) < value.ndim):
                return None  # it may give the result another rank
            return x if abs(float(value.reshape(-1)[0]) - constant) <= _CLOSE * constant else None
        return None

    def _is_float(self, tensor: gs.Tensor) -> bool:
        """True for float32, the type that runtimes have these operators for."""
        known = self.types.get(tensor.name)
        return known is not None and known.dtype == np.float32


def _is_gate(node: gs.Node) -> bool:
    alpha, beta = attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)
    return bool(abs(alpha - 1 / 6) <= _CLOSE / 6 and beta == 0.5)
