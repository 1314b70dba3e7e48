"""The passes, one file each, named by the field's term; the file's name is the recipe key and the command.

The registry is written by hand: a pass exists because it is listed here, not because a file lies in a folder. It holds
names and one-line summaries only, so listing the passes imports none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

from onnxcompress.errors import UsageError

if TYPE_CHECKING:
    from onnxcompress.base import Pass

__all__ = ["PASSES", "PassEntry", "load_pass"]


@dataclass(frozen=True)
class PassEntry:
    """Where a pass is defined and what it does in one line."""

    module: str
    cls: str
    summary: str


PASSES: Mapping[str, PassEntry] = MappingProxyType(
    {
        "fold_constants": PassEntry(
            "onnxcompress.passes.fold_constants",
            "FoldConstants",
            "Replace what does not depend on the inputs by constants.",
        ),
        "eliminate_dead_nodes": PassEntry(
            "onnxcompress.passes.eliminate_dead_nodes",
            "EliminateDeadNodes",
            "Remove nodes and weights without effect on the outputs.",
        ),
        "fold_batch_norm": PassEntry(
            "onnxcompress.passes.fold_batch_norm",
            "FoldBatchNorm",
            "Fold BatchNormalization and constant scales into Conv, Gemm and MatMul.",
        ),
        "fold_padding": PassEntry(
            "onnxcompress.passes.fold_padding",
            "FoldPadding",
            "Compute padded 1x1 convolutions without their border where a mean follows.",
        ),
        "fuse_hard_swish": PassEntry(
            "onnxcompress.passes.fuse_hard_swish",
            "FuseHardSwish",
            "Write HardSwish and HardSigmoid, which exporters spell out, as one operator each.",
        ),
        "arrange_blocks": PassEntry(
            "onnxcompress.passes.arrange_blocks",
            "ArrangeBlocks",
            "Write residual additions and projections of transformers as the runtime is fastest.",
        ),
        "prune_channels": PassEntry(
            "onnxcompress.passes.prune_channels",
            "PruneChannels",
            "Remove whole channels, neurons and attention heads, and repair what remains.",
        ),
        "prune_weights": PassEntry(
            "onnxcompress.passes.prune_weights",
            "PruneWeights",
            "Set the smallest weights to zero, for sparse runtimes and compressed files.",
        ),
        "equalize_layers": PassEntry(
            "onnxcompress.passes.equalize_layers",
            "EqualizeLayers",
            "Scale channels between layers so that they quantise better; the network stays the same.",
        ),
        "quantize_embeddings": PassEntry(
            "onnxcompress.passes.quantize_embeddings",
            "QuantizeEmbeddings",
            "Store embedding tables as int8 with one scale per row.",
        ),
        "quantize_dynamic": PassEntry(
            "onnxcompress.passes.quantize_dynamic",
            "QuantizeDynamic",
            "Dynamic INT8: int8 weights, activations quantised at run time; needs no data.",
        ),
        "insert_qdq": PassEntry(
            "onnxcompress.passes.insert_qdq",
            "InsertQdq",
            "Static INT8 quantisation by QuantizeLinear/DequantizeLinear pairs.",
        ),
        "round_weights": PassEntry(
            "onnxcompress.passes.round_weights",
            "RoundWeights",
            "Round the weights of an INT8 model anew, layer by layer, to reproduce the float model.",
        ),
        "correct_bias": PassEntry(
            "onnxcompress.passes.correct_bias",
            "CorrectBias",
            "Shift the biases of an INT8 model to the means of the float model, layer by layer.",
        ),
        "distill": PassEntry(
            "onnxcompress.passes.distill",
            "Distill",
            "Train the weights on unlabelled samples so that the model answers what the original answers.",
        ),
        "convert_float16": PassEntry(
            "onnxcompress.passes.convert_float16",
            "ConvertFloat16",
            "Convert to float16, except where that would be wrong.",
        ),
    }
)


def load_pass(name: str) -> type[Pass]:
    """The class of the pass ``name``; dashes stand for underscores.

    Raises:
        UsageError: no such pass is registered.
    """
    entry = PASSES.get(name.replace("-", "_"))
    if entry is None:
        close = get_close_matches(name.replace("-", "_"), PASSES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known passes: {', '.join(PASSES)}"
        raise UsageError(f"unknown pass {name!r}{hint}")
    cls: type[Pass] = getattr(import_module(entry.module), entry.cls)
    return cls
