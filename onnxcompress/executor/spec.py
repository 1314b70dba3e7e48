"""What the operator table is made of: an :class:`Operator` builds a kernel from the :class:`Spec` of a node.

A kernel is a function of the node's inputs, in order, with None for an input that is left out; it returns one tensor,
or a tuple where the node has several outputs. Attributes are resolved when it is built, not when it runs. Inputs on the
operator's ``numbers`` list (shapes, axes, bounds) arrive as numpy arrays, all others as tensors.

An attribute that a builder does not ask for makes the node unsupported, so nothing is silently ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray
from torch import Tensor

from onnxcompress.graph import attribute, constant_value

__all__ = [
    "LATEST",
    "Builder",
    "Kernel",
    "Numbers",
    "Operator",
    "Spec",
    "Table",
    "Unsupported",
    "as_tensor",
    "torch_type",
]

Kernel = Callable[..., Any]
#: an input whose values are needed as numbers
Numbers = NDArray[Any]

#: the newest opset whose operators were read for the table; one that changed later is unsupported
LATEST = 24


class Unsupported(Exception):
    """The node cannot be executed; the message is the reason, one line."""


@dataclass
class Spec:
    """One node as a builder sees it."""

    node: gs.Node
    opset: int
    #: attributes that were asked for
    asked: set[str] = field(default_factory=set)

    def attribute(self, name: str, default: Any = None) -> Any:
        """Value of an attribute, or ``default`` where it is left out."""
        self.asked.add(name)
        return attribute(self.node, name, default)

    def ints(self, name: str, default: list[int] | None = None) -> list[int] | None:
        """A list of integers; a value that is one integer counts as a list of one."""
        value = self.attribute(name, default)
        if value is None:
            return None
        return [int(v) for v in (value if isinstance(value, list | tuple) else [value])]

    def tensor(self, name: str) -> Numbers | None:
        """The value of a tensor attribute."""
        value = self.attribute(name)
        if value is None:
            return None
        array = constant_value(value) if isinstance(value, gs.Constant) else None
        if array is None:
            raise Unsupported(f"attribute {name!r} is no tensor of numbers")
        return array

    def has(self, index: int) -> bool:
        """True where input ``index`` is given."""
        return index < len(self.node.inputs) and bool(self.node.inputs[index].name)

    def constant(self, index: int) -> Numbers | None:
        """The value of input ``index`` where it is a constant."""
        return constant_value(self.node.inputs[index]) if self.has(index) else None

    def wants(self, index: int) -> bool:
        """True where output ``index`` is given a name."""
        return index < len(self.node.outputs) and bool(self.node.outputs[index].name)

    @property
    def outputs(self) -> int:
        """How many outputs the node lists."""
        return len(self.node.outputs)

    def unread(self) -> list[str]:
        """Attributes of the node that nobody asked for."""
        return sorted(set(self.node.attrs) - self.asked)


Builder = Callable[[Spec], Kernel]


@dataclass(frozen=True)
class Operator:
    """How to execute an operator.

    ``numbers`` lists the inputs that are needed as numbers, ``weights`` those that may be trained where they are
    constants. ``moves`` is True where values only change places, so that quantised ones may pass.
    """

    build: Builder
    numbers: tuple[int, ...] = ()
    weights: tuple[int, ...] = ()
    moves: bool = False
    #: True where the output's shape follows from values and not only from shapes and ``numbers``
    unshaped: bool = False


Table = Mapping[str, Operator]

_TYPES: Mapping[str, Any] = {
    "float16": torch.float32,
    "bfloat16": torch.float32,
    "float32": torch.float32,
    "float64": torch.float64,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def torch_type(dtype: Any) -> Any:
    """The torch type that computes values of ``dtype``, a numpy type or ONNX's number.

    float16 and bfloat16 are computed in float32.

    Raises:
        Unsupported: torch computes no such type.
    """
    if isinstance(dtype, int):
        dtype = onnx.helper.tensor_dtype_to_np_dtype(dtype)
    name = np.dtype(dtype).name
    if name not in _TYPES:
        raise Unsupported(f"values of type {name} are not computed")
    return _TYPES[name]


def as_tensor(array: NDArray[Any]) -> Tensor:
    """A tensor with a copy of ``array``, in the type that computes it."""
    kind = torch_type(array.dtype)
    if kind is torch.float32 and array.dtype != np.float32:
        array = array.astype(np.float32)
    return torch.from_numpy(np.array(array, order="C")).to(kind)
