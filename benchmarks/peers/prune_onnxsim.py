"""onnxsim's structured Wanda pruning, in an environment of its own: model, samples (.npz), share of MACs, output.

The sparsity is searched for that leaves no more than the share of multiply-accumulates asked for.
"""

from __future__ import annotations

import sys
from math import prod
from typing import Any

import numpy as np
import onnx
import onnxsim


def macs(model: Any) -> int:
    """Multiply-accumulates of Conv and Gemm, batch 1."""
    del model.graph.value_info[:]
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*model.graph.value_info, *model.graph.output)
    }
    weights = {i.name: list(i.dims) for i in model.graph.initializer}
    total = 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            total += prod(shapes[node.output[0]]) * prod(weights[node.input[1]][1:])
        elif node.op_type == "Gemm":
            total += prod(weights[node.input[1]])
    return total


def main(source: str, samples: str, share: float, target: str) -> None:
    """Write the pruned model to ``target``."""
    with np.load(samples) as arrays:
        data = [{name: arrays[name][i : i + 1] for name in arrays.files} for i in range(32)]
    simple, _ = onnxsim.simplify(onnx.load(source))
    dense = macs(onnx.ModelProto.FromString(simple.SerializeToString()))
    low, high = 0.0, 0.95
    best = None
    for _ in range(8):
        middle = (low + high) / 2
        model = onnxsim.apply_structured_wanda_pruning(simple, calibration_data=data, sparsity=middle)
        if macs(onnx.ModelProto.FromString(model.SerializeToString())) <= share * dense:
            best, high = model, middle
        else:
            low = middle
    if best is None:
        raise SystemExit("the share of multiply-accumulates is out of its reach")
    onnx.save(best, target)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4])
