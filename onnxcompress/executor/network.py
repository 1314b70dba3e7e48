"""A graph as a torch module: initializers are its parameters, and what is trained can be written back.

Not every constant trains. Weights and biases of convolutions and matrix products, scales and biases of normalisations,
embedding tables, and constants with several elements that are added or multiplied do; running statistics, bounds,
exponents, quantisation parameters, shapes and masks do not. A constant that one of its readers needs as it is stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray
from torch import Tensor

from onnxcompress.errors import ModelError
from onnxcompress.executor.operators_quantize import MasterWeight
from onnxcompress.executor.plan import Plan, needed_nodes
from onnxcompress.executor.spec import Kernel, Spec, Unsupported, as_tensor
from onnxcompress.executor.table import OPERATORS
from onnxcompress.graph import Graph, constant_value, default_values, normal_domain

__all__ = ["Network", "Trained", "pick_device"]

#: constants that are added or multiplied hold no weights where a value is above this: they are masks
_MASK = 1e4
#: operators with a constant operand that need not be a weight
_ARITHMETIC = ("Add", "Sub", "Mul")
_INTEGERS = ("int8", "uint8", "int32")


@dataclass(frozen=True)
class Trained:
    """One parameter and the constant that it stands for."""

    name: str
    constant: gs.Constant
    parameter: Any
    #: of an integer weight
    master: MasterWeight | None
    #: operators that read the constant
    readers: tuple[str, ...]


def pick_device() -> Any:
    """The first CUDA device, or the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Network(torch.nn.Module):  # type: ignore[misc] # torch is optional
    """Computes tensors of a graph, with gradients to its weights.

    Args:
        graph: sorted; only :meth:`write_back` changes it.
        outputs: names of the tensors to compute; default: the graph's outputs that are tensors.
        trainable: False: nothing trains.
        device: where to compute.
        channels_last: store images with their channels last, which convolutions on processors like; None: where the
            graph has a two-dimensional convolution.

    Raises:
        ModelError: a node cannot be executed; the line names it.
    """

    def __init__(
        self,
        graph: Graph,
        outputs: Sequence[str] | None = None,
        *,
        trainable: bool = True,
        device: Any = "cpu",
        channels_last: bool | None = None,
    ) -> None:
        super().__init__()
        self.device = torch.device(device)
        tensors = {t.name: t for node in graph.nodes for t in node.outputs if t.name}
        tensors |= {t.name: t for t in (*graph.inputs, *graph.outputs)}
        self.output_names = list(outputs) if outputs is not None else [t.name for t in graph.outputs]
        missing = [name for name in self.output_names if name not in tensors]
        if missing:
            raise ModelError(f"the graph has no tensor {missing[0]!r}")
        wanted = [tensors[name] for name in self.output_names]
        nodes = needed_nodes(graph, wanted)
        if channels_last is None:
            channels_last = any(_is_image_conv(node) for node in nodes)
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self.trained: list[Trained] = []
        masters: dict[int, Kernel] = {}
        if trainable:
            self._collect(nodes, graph.opset, masters)
        self.plan = Plan(graph, wanted, {id(t.constant): t.parameter for t in self.trained}, masters, self.device)
        self._defaults = default_values(graph)

    # -- parameters -------------------------------------------------------------------------------------------------

    def _collect(self, nodes: Sequence[gs.Node], opset: int, masters: dict[int, Kernel]) -> None:
        for name, (constant, readers) in _weights(nodes).items():
            array = constant_value(constant)
            if array is None or not array.size:
                continue
            master = None
            if array.dtype.name in _INTEGERS:
                ((node, _),) = readers
                try:
                    master = MasterWeight.of(Spec(node, opset), array)
                except Unsupported:
                    continue
                master.to(self.device)
                start = master.initial() if self.device.type == "cpu" else self._initial_on_device(master)
                masters[id(node)] = master.kernel(_float_of(node))
            else:
                start = as_tensor(array).to(self.device)
            if start.ndim == 4:
                start = start.contiguous(memory_format=self._format)
            parameter = torch.nn.Parameter(start)
            self.register_parameter(f"p{len(self.trained)}", parameter)
            operators = tuple(node.op for node, _ in readers)
            self.trained.append(Trained(name, constant, parameter, master, operators))

    def _initial_on_device(self, master: MasterWeight) -> Tensor:
        whole = torch.from_numpy(master.start.astype(np.float64)).to(self.device, master.scale.dtype)
        return (whole - master.zero) * master.scale

    def write_back(self) -> list[str]:
        """Give the graph's constants the values of the parameters, in their own types; names of those that changed."""
        changed = []
        for item in self.trained:
            old = constant_value(item.constant)
            assert old is not None
            if item.master is not None:
                new: NDArray[Any] = item.master.integers(item.parameter)
            else:
                new = _narrowed(item.parameter.detach().cpu().contiguous().numpy(), old.dtype)
            new = np.array(new.reshape(old.shape), order="C")
            if not np.array_equal(new, old):
                new.flags.writeable = False
                item.constant.values = new
                changed.append(item.name)
        return changed

    # -- running ----------------------------------------------------------------------------------------------------

    def feeds(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        """Tensors for the graph's inputs; inputs with a default need not be given."""
        given = {name: arrays.get(name, self._defaults.get(name)) for name in self.plan.inputs}
        return {name: self._tensor(name, array) for name, array in given.items() if array is not None}

    def _tensor(self, name: str, array: NDArray[Any]) -> Tensor:
        try:
            tensor = as_tensor(array)
        except Unsupported as error:
            raise ModelError(f"input {name!r} cannot be fed: {error}") from error
        tensor = tensor.to(self.device, non_blocking=True)
        return tensor.contiguous(memory_format=self._format) if tensor.ndim == 4 else tensor

    def forward(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{name: tensor} of what was asked for."""
        return dict(zip(self.output_names, self.plan.run(feeds), strict=True))


def _narrowed(array: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """``array`` as ``dtype``; a number too large for half precision becomes the largest that is not infinite."""
    if array.dtype == dtype:
        return array
    if np.dtype(dtype) == np.float16:
        limit = np.finfo(np.float16).max
        array = np.clip(array, -limit, limit)
    return array.astype(dtype)


def _float_of(node: gs.Node) -> Any:
    scale = constant_value(node.inputs[1])
    return torch.float64 if scale is not None and scale.dtype == np.float64 else torch.float32


def _is_image_conv(node: gs.Node) -> bool:
    return node.op in ("Conv", "ConvTranspose") and len(node.inputs[1].shape or ()) == 4


def _weights(nodes: Sequence[gs.Node]) -> dict[str, tuple[gs.Constant, list[tuple[gs.Node, int]]]]:
    """{name: (constant, its readers)} of what trains, in the order of the graph."""
    readers: dict[int, list[tuple[gs.Node, int]]] = {}
    found: dict[int, tuple[str, gs.Constant]] = {}
    for node in nodes:
        for index, tensor in enumerate(node.inputs):
            constant = _initializer(tensor)
            if constant is not None:
                found.setdefault(id(constant), (tensor.name, constant))
                readers.setdefault(id(constant), []).append((node, index))
    return {
        name: (constant, readers[key]) for key, (name, constant) in found.items() if _trains(constant, readers[key])
    }


def _initializer(tensor: gs.Tensor) -> gs.Constant | None:
    """The stored constant behind ``tensor``: itself, or the value of a Constant node."""
    if isinstance(tensor, gs.Constant):
        return tensor
    if len(tensor.inputs) == 1 and tensor.inputs[0].op == "Constant" and normal_domain(tensor.inputs[0]) == "":
        value = tensor.inputs[0].attrs.get("value")
        return value if isinstance(value, gs.Constant) else None
    return None


def _trains(constant: gs.Constant, readers: Sequence[tuple[gs.Node, int]]) -> bool:
    array = constant_value(constant)
    if array is None:
        return False
    if array.dtype.name in _INTEGERS:
        return len(readers) == 1 and readers[0][0].op == "DequantizeLinear" and readers[0][1] == 0
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        return False
    return bool(readers) and all(_reads_weight(node, index, array, 0) for node, index in readers)


def _reads_weight(node: gs.Node, index: int, array: NDArray[Any], depth: int) -> bool:
    operator = OPERATORS.get(node.op)
    if normal_domain(node) != "" or operator is None or index not in operator.weights:
        return False
    if node.op == "DequantizeLinear":
        return False
    if node.op in _ARITHMETIC:
        return bool(array.size > 1 and np.isfinite(array).all() and np.abs(array).max() <= _MASK)
    if operator.moves and node.op != "Gather":  # moved first: what reads it then decides
        if depth > 8 or not node.outputs or not node.outputs[0].outputs:
            return False
        moved = node.outputs[0]
        return all(
            _reads_weight(reader, position, array, depth + 1)
            for reader in moved.outputs
            for position, tensor in enumerate(reader.inputs)
            if tensor is moved
        )
    return True
