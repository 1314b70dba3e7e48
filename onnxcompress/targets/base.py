"""What a target is: integer types, a rule per operator, and how the quantised graph is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import onnx_graphsurgeon as gs

from onnxcompress.quantization.affine import QuantScheme
from onnxcompress.shapes import TensorType

__all__ = ["Costs", "OperatorRule", "Role", "Target", "Types", "WeightRule"]

Types = Mapping[str, TensorType]


class Role(Enum):
    """How an operator takes part in an integer graph."""

    #: multiplies activations with weights: always worth running as integers
    COMPUTE = "compute"
    #: has an integer kernel with its own scales for inputs and output
    ARITHMETIC = "arithmetic"
    #: moves or selects values, so it runs on the integers as they are and its output shares the input's parameters
    MOVEMENT = "movement"
    #: folds into the quantiser behind it, because the quantiser's range ends where the activation's does
    ACTIVATION = "activation"


@dataclass(frozen=True)
class WeightRule:
    """Where the weight and the bias sit. ``axis`` gives the output channel axis of the weight."""

    index: int
    axis: Callable[[gs.Node, int], int]
    bias: int | None = None


@dataclass(frozen=True)
class OperatorRule:
    """When one operator becomes integer on a target.

    Attributes:
        role: see :class:`Role`.
        integer_ops: operator types that the runtime's optimiser turns the node into.
        inputs: positions of the activations; None for every input.
        weight: where the weight sits, for compute operators.
        float_output: the integer kernel can write floats, so that no output quantiser is needed.
        since: first opset whose operator has the integer kernel.
        gain: estimated nanoseconds saved per output element by running as integers, on one thread; see placement.
        refuse: the reason why this node stays float although its operator is in the table, or None.
    """

    role: Role
    integer_ops: tuple[str, ...]
    inputs: tuple[int, ...] | None = (0,)
    weight: WeightRule | None = None
    float_output: bool = False
    since: int = 1
    gain: float = 0.1
    refuse: Callable[[gs.Node, Types, int], str | None] = field(default=lambda node, types, opset: None)


@dataclass(frozen=True)
class Costs:
    """What conversions cost and integer products save, in nanoseconds on one thread; only their proportions matter.

    Attributes:
        quantize: per element.
        dequantize: per element.
        node: what any extra node costs.
        mac: saved per multiply-accumulate.
        depthwise_mac: saved per multiply-accumulate of a convolution of one channel a group; negative where it loses.
        layout: per element, where a function passes values from a float convolution to an integer one or back, and
            the layouts of both differ.
        unfused: per element, where a HardSwish follows an integer convolution, and a float one would have taken it in.
        tap: lost per tap and position by an integer convolution on an image, which copies its few channels tap by tap.
    """

    quantize: float = 0.25
    dequantize: float = 0.15
    node: float = 1000.0
    mac: float = 0.03
    depthwise_mac: float = 0.06
    layout: float = 0.0
    unfused: float = 0.0
    tap: float = 0.0


@dataclass(frozen=True)
class Target:
    """A runtime and device: integer types, the rule table, and the reasons for operators that are not in it."""

    name: str
    description: str
    activations: QuantScheme
    weights: QuantScheme
    rules: Mapping[str, OperatorRule]
    #: why well-known operators have no rule
    float_reasons: Mapping[str, str]
    #: QuantizeLinear with per-channel weights needs this opset
    minimum_opset: int
    #: newest opset whose QuantizeLinear the runtime has: ONNX Runtime 1.32 reads opset 28, but not that operator of it
    maximum_opset: int = 27
    #: by which placement decides what is worth running as integers
    costs: Costs = field(default_factory=Costs)
    #: how data movement is written: on the integers as they are, or in floats between Q/DQ pairs of equal parameters
    movement: Literal["integers", "qdq"] = "integers"
    #: the recipe that `compress` takes where none is named
    recipe: str = "int8"
    #: the rule table is proven on the graph as ONNX Runtime's CPU provider optimises it
    audited: bool = True
    #: what whoever quantises for this target has to know, in one line
    int8_note: str | None = None

    @property
    def saturates(self) -> bool:
        """True where products of this target's integers may saturate on processors that it also runs on."""
        return self.audited and self.weights.largest_pair is None
