"""ONNX Runtime's CPU execution provider.

The table states what the runtime fuses at optimisation level EXTENDED (its QDQ selectors) and which of its kernels take
8-bit tensors as they are. A rule that is wrong here shows up as a mismatch in the fusion audit, which reads the same
table.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.composites import composite, mark_of, silu
from onnxcompress.graph import attribute, constant_value, release
from onnxcompress.quantization.affine import QuantScheme
from onnxcompress.targets.base import Costs, OperatorRule, Role, Target, Types, WeightRule

__all__ = ["CPU"]

# ----------------------------------------------------------------------------------------------------------------------
# Conditions


def _rank(tensor: gs.Tensor, types: Types) -> int | None:
    if isinstance(tensor, gs.Constant):
        return len(tensor.shape)
    known = types.get(tensor.name)
    return None if known is None or known.shape is None else len(known.shape)


def _has_input(node: gs.Node, index: int) -> bool:
    return len(node.inputs) > index and bool(node.inputs[index].name)


def _weight_reason(node: gs.Node, index: int) -> str | None:
    if not _has_input(node, index):
        return "it has no weight"
    value = constant_value(node.inputs[index])
    if value is None:
        return f"its weight {node.inputs[index].name!r} is not constant"
    if value.dtype != np.float32:
        return f"its weight is {value.dtype}, not float32"
    if not value.size:
        return "its weight is empty"
    finite = np.isfinite(value).all()
    release(value)
    return None if finite else f"its weight {node.inputs[index].name!r} holds values that are not finite"


def _bias_reason(node: gs.Node, index: int, channels: int, *, broadcasts: bool = False) -> str | None:
    if not _has_input(node, index):
        return None
    bias = constant_value(node.inputs[index])
    if bias is None:
        return f"its bias {node.inputs[index].name!r} is not constant"
    if not np.isfinite(bias).all():
        return f"its bias {node.inputs[index].name!r} holds values that are not finite"
    vector = bias.shape == (channels,) or (broadcasts and (bias.size == 1 or bias.shape == (1, channels)))
    if not vector:
        return f"its bias has shape {list(bias.shape)}, and the integer kernel takes [{channels}] only"
    return None


def _is_weight(tensor: gs.Tensor) -> bool:
    """True for a constant, stored as it is or quantised."""
    if len(tensor.inputs) == 1 and tensor.inputs[0].op == "DequantizeLinear":
        tensor = tensor.inputs[0].inputs[0]
    return constant_value(tensor) is not None


def _conv(node: gs.Node, types: Types, opset: int) -> str | None:
    reason = _weight_reason(node, 1)
    if reason is not None:
        return reason
    weight = constant_value(node.inputs[1])
    assert weight is not None
    return _bias_reason(node, 2, weight.shape[0])


def _gemm(node: gs.Node, types: Types, opset: int) -> str | None:
    reason = _weight_reason(node, 1)
    if reason is not None:
        return reason
    weight = constant_value(node.inputs[1])
    assert weight is not None
    return _bias_reason(node, 2, weight.shape[0 if attribute(node, "transB", 0) else 1], broadcasts=True)


def _from_softmax(tensor: gs.Tensor) -> bool:
    """True for the result of a Softmax, also behind what only moves, masks or casts it."""
    for _ in range(4):
        if len(tensor.inputs) != 1:
            return False
        maker = tensor.inputs[0]
        if maker.op == "Softmax":
            return True
        if maker.op == "Where":
            return any(_from_softmax(branch) for branch in maker.inputs[1:3])
        if maker.op not in ("Transpose", "Reshape", "Dropout", "Identity", "Cast", "Mul"):
            return False
        tensor = maker.inputs[0]
    return False


def _to_softmax(tensor: gs.Tensor) -> bool:
    """True where ``tensor`` is scaled, masked and then goes into a Softmax."""
    for _ in range(6):
        if len(tensor.outputs) != 1:
            return False
        reader = tensor.outputs[0]
        if reader.op == "Softmax":
            return True
        if reader.op not in ("Mul", "Div", "Add", "Where", "Reshape", "Cast", "Sub"):
            return False
        tensor = reader.outputs[0]
    return False


def _matmul(node: gs.Node, types: Types, opset: int) -> str | None:
    if constant_value(node.inputs[0]) is not None:
        return "its left operand is constant, and weights are read from the right one"
    weight = constant_value(node.inputs[1])
    if weight is None:
        if any(_from_softmax(tensor) for tensor in node.inputs[:2]):
            return "it multiplies probabilities, and eight bits leave no resolution for the small ones"
        if _to_softmax(node.outputs[0]):
            return "it makes the scores of a Softmax, which the runtime computes as fast in floats"
        return None  # both operands are activations
    if weight.ndim != 2:
        return f"its weight has rank {weight.ndim}, and per-channel scales need rank 2"
    return _weight_reason(node, 1)


def _pool(node: gs.Node, types: Types, opset: int) -> str | None:
    if any(d != 1 for d in attribute(node, "dilations", [])):
        return "the integer pooling kernel has no dilations"
    if any(t.name for t in node.outputs[1:]):
        return "its indices are used"
    rank = _rank(node.inputs[0], types)
    return None if rank is not None and rank >= 3 else "the rank of its input is not known to be three or more"


def _average_pool(node: gs.Node, types: Types, opset: int) -> str | None:
    if attribute(node, "ceil_mode", 0) and attribute(node, "count_include_pad", 0):
        return "ceil_mode with count_include_pad counts differently in the integer kernel"
    return _pool(node, types, opset)


def _resize(node: gs.Node, types: Types, opset: int) -> str | None:
    mode = attribute(node, "mode", "nearest")
    if mode != "nearest":
        return f"mode {mode!r} interpolates, and the integer kernel truncates the result"
    if _has_input(node, 1) and constant_value(node.inputs[1]) is None:
        return "its region of interest is not constant"
    return None


def _pad(node: gs.Node, types: Types, opset: int) -> str | None:
    if attribute(node, "mode", "constant") != "constant":
        return None
    if not _has_input(node, 2):
        return None
    value = constant_value(node.inputs[2])
    if value is None:
        return "its padding value is not constant"
    if not value.size or float(value.reshape(-1)[0]) == 0.0 or mark_of(node) is not None:
        return None
    return "it pads with a value other than zero"


def _concat(node: gs.Node, types: Types, opset: int) -> str | None:
    if len(node.inputs) < 2:
        return "it has a single input"
    constants = [constant_value(t) for t in node.inputs]
    if any(value is not None and np.any(value) for value in constants):
        return "it joins constants to values, whose range would leave them little resolution, as a class token's"
    return None


def _where(node: gs.Node, types: Types, opset: int) -> str | None:
    constants = [constant_value(t) for t in node.inputs[1:3]]
    if any(c is not None and c.size and np.abs(c).max() > 1e4 for c in constants):
        return "it fills with a huge constant, which leaves no resolution for the other values"
    return None


_FUSED_WHOLE = "it is part of a {} that the runtime fuses, and which has no integer form"


def _mul(node: gs.Node, types: Types, opset: int) -> str | None:
    whole = "SiLU" if silu(node) is not None else composite(node)
    if whole is not None:
        return _FUSED_WHOLE.format(whole)
    products = [reader for reader in node.outputs[0].outputs if reader.op in ("MatMul", "Gemm")]
    for tensor in node.inputs[:2]:
        value = constant_value(tensor)
        if value is not None and value.size > 1 and products:
            return "it evens out channels for the product behind it, which a quantiser in front of it would undo"
    return None


def _sigmoid(node: gs.Node, types: Types, opset: int) -> str | None:
    return None if silu(node) is None else _FUSED_WHOLE.format("SiLU")


def _add(node: gs.Node, types: Types, opset: int) -> str | None:
    whole = composite(node)
    if whole is not None:
        return _FUSED_WHOLE.format(whole)
    for tensor, other in (node.inputs[:2], node.inputs[1::-1]):
        maker = tensor.inputs[0] if len(tensor.inputs) == 1 else None
        if maker is not None and maker.op == "MatMul" and _is_weight(maker.inputs[1]):
            bias = constant_value(other)
            if bias is not None and bias.ndim <= 1:
                return "it adds the bias of a MatMul, whose integer form writes floats: one rounding less"
    return None


# ----------------------------------------------------------------------------------------------------------------------
# The table

_RENAMING = {"Reshape": 5, "Flatten": 9, "Squeeze": 1, "Unsqueeze": 1}  # copy nothing, so nothing is saved
_MOVEMENT = {
    # operator: first opset whose kernel takes uint8
    "Transpose": 1,
    "Slice": 1,
    "Gather": 1,
    "Split": 13,
    "Expand": 8,
    "Tile": 6,
    "DepthToSpace": 1,
    "SpaceToDepth": 1,
}

# Conversions were timed alone on one thread (ONNX Runtime 1.32, AVX512-VNNI, 150,000 to 900,000 elements),
# convolutions in EfficientNets at 128 and 160 pixels, as floats in the runtime's blocked layout and as integers:
# 0.0105 and 0.0045 per multiply-accumulate of a 1x1 convolution, 0.021 and 0.024 of a depthwise one of 100 channels
# or more. A change of layout is a transposition of bytes and one or two reorderings of floats, 0.06 each. A
# HardSwish alone takes 0.22, and 0.13 in a float convolution.
_COSTS = Costs(
    quantize=0.06, dequantize=0.09, node=250.0, mac=0.006, depthwise_mac=-0.003, layout=0.18, unfused=0.09, tap=2.4
)

# Gains are what the float kernel takes per element less what the integer one takes, timed in the same way: Add 0.12
# and 0.10, Mul 0.12 and 0.18 (by a gate of one value a channel 0.09 and 0.16), Concat 0.07 and 0.02,
# GlobalAveragePool 0.05 (blocked) and 0.04, Sigmoid 0.23 and 0.24. A SiLU, x * sigmoid(x), takes 0.14 as the
# runtime fuses it in floats, and 0.42 in its two integer kernels.
CPU = Target(
    name="cpu",
    description="ONNX Runtime CPU provider: uint8 activations, int8 per-channel weights (VNNI, AMX)",
    activations=QuantScheme("uint8", symmetric=False),
    weights=QuantScheme("int8", symmetric=True),
    rules={
        "Conv": OperatorRule(
            Role.COMPUTE, ("QLinearConv",), weight=WeightRule(1, lambda node, rank: 0, bias=2), refuse=_conv
        ),
        "Gemm": OperatorRule(
            Role.COMPUTE,
            ("QGemm",),
            weight=WeightRule(1, lambda node, rank: 0 if attribute(node, "transB", 0) else 1, bias=2),
            float_output=True,
            refuse=_gemm,
        ),
        "MatMul": OperatorRule(
            Role.COMPUTE,
            ("QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger"),
            inputs=(0, 1),
            weight=WeightRule(1, lambda node, rank: rank - 1),
            float_output=True,
            refuse=_matmul,
        ),
        "Add": OperatorRule(Role.ARITHMETIC, ("QLinearAdd",), inputs=(0, 1), gain=0.02, refuse=_add),
        "Mul": OperatorRule(Role.ARITHMETIC, ("QLinearMul",), inputs=(0, 1), gain=-0.06, refuse=_mul),
        "Concat": OperatorRule(Role.ARITHMETIC, ("QLinearConcat", "Concat"), inputs=None, gain=0.05, refuse=_concat),
        "AveragePool": OperatorRule(Role.ARITHMETIC, ("QLinearAveragePool",), gain=0.3, refuse=_average_pool),
        "GlobalAveragePool": OperatorRule(Role.ARITHMETIC, ("QLinearGlobalAveragePool",), gain=0.01, refuse=_pool),
        "Sigmoid": OperatorRule(Role.ARITHMETIC, ("QLinearSigmoid",), gain=-0.01, refuse=_sigmoid),
        "LeakyRelu": OperatorRule(Role.ARITHMETIC, ("QLinearLeakyRelu",)),
        "Where": OperatorRule(Role.ARITHMETIC, ("QLinearWhere",), inputs=(1, 2), refuse=_where),
        "MaxPool": OperatorRule(Role.MOVEMENT, ("MaxPool",), since=12, gain=0.2, refuse=_pool),
        "Resize": OperatorRule(Role.MOVEMENT, ("Resize",), since=10, refuse=_resize),
        "Pad": OperatorRule(Role.MOVEMENT, ("Pad",), since=13, refuse=_pad),
        **{op: OperatorRule(Role.MOVEMENT, (op,), since=since) for op, since in _MOVEMENT.items()},
        **{op: OperatorRule(Role.MOVEMENT, (op,), since=since, gain=0.0) for op, since in _RENAMING.items()},
        "Relu": OperatorRule(Role.ACTIVATION, ("Clip",)),
        "Clip": OperatorRule(Role.ACTIVATION, ("Clip",)),
    },
    float_reasons={
        "Softmax": "an integer Softmax has no resolution for small probabilities; it stays float",
        "ConvTranspose": "the runtime has no integer ConvTranspose",
        "LayerNormalization": "the runtime has no integer LayerNormalization",
        "Gelu": "the runtime has no integer Gelu",
        "QuickGelu": "the runtime has no integer SiLU; fused in floats it is faster than Sigmoid and Mul on integers",
        "Erf": "the runtime has no integer Erf",
        "Tanh": "the runtime has no integer Tanh",
        "HardSwish": "the runtime has no integer HardSwish",
        "HardSigmoid": "the runtime has no integer HardSigmoid",
        "Sub": "the runtime has no integer Sub",
        "Div": "the runtime has no integer Div",
        "PRelu": "the runtime has no integer PRelu",
        "ReduceMean": "the runtime has no integer ReduceMean",
        "BatchNormalization": "the runtime has no integer BatchNormalization; fold it where a Conv or Gemm is near",
        "InstanceNormalization": "the runtime has no integer InstanceNormalization",
    },
    minimum_opset=13,
    costs=_COSTS,
)
