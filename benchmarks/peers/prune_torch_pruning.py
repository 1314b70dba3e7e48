"""Torch-Pruning with L1 importance and BatchNormalization re-estimated, in an environment of its own.

Arguments: model, samples (.npz), share of MACs, output. The model is read by onnx2torch, pruned step by step until no
more than the share of multiply-accumulates is left, run in training mode over the samples so that BatchNormalization
sees what is left, and exported again.
"""

from __future__ import annotations

import sys

import numpy as np
import onnx
import torch
import torch_pruning as tp
from onnx2torch import convert


def main(source: str, samples: str, share: float, target: str) -> None:
    """Write the pruned model to ``target``."""
    torch.manual_seed(0)
    proto = onnx.load(source)
    network = convert(proto).eval()
    with np.load(samples) as arrays:
        data = torch.from_numpy(arrays[arrays.files[0]])
    example = data[:1]
    dense, _ = tp.utils.count_ops_and_params(network, example)
    graph = tp.DependencyGraph().build_dependency(network, example)
    ignored = [m for m in network.modules() if isinstance(m, torch.nn.Linear)]
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            group = graph.get_pruning_group(layer, tp.prune_conv_out_channels, idxs=[0])
            made = [d for d, _ in group if d.handler == tp.prune_conv_out_channels]
            # Streams that a converted Slice or Pad passes on come out wrong: channels inside of blocks only.
            if len(made) > 1 or any("Pad" in str(d) or "Slice" in str(d) for d, _ in group):
                ignored.append(layer)
    pruner = tp.pruner.BasePruner(
        network,
        example,
        importance=tp.importance.MagnitudeImportance(p=1),
        iterative_steps=100,
        pruning_ratio=0.95,
        ignored_layers=ignored,
    )
    for _ in range(100):
        if tp.utils.count_ops_and_params(network, example)[0] <= share * dense:
            break
        pruner.step()
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for start in range(0, len(data), 64):
            network(data[start : start + 64])
    network.eval()
    names = [i.name for i in proto.graph.input], [o.name for o in proto.graph.output]
    axes = {name: {0: "N"} for group in names for name in group}
    torch.onnx.export(
        network,
        (example,),
        target,
        input_names=names[0],
        output_names=names[1],
        dynamic_axes=axes,
        opset_version=17,
        dynamo=False,
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4])
