"""ONNX graphs on torch, to be trained or timed, which the extra ``distill`` brings.

The modules of this package import torch, so it is imported where it is used. This module does not: it says whether
torch is there.

- ``operators_*``: what each operator computes, one small function each; ``table`` puts them together
- ``plan``: an order of execution for given input shapes, resolved once
- ``network``: a graph as a torch module whose parameters are its weights
- ``check``: the module against onnxruntime, node by node where they differ
- ``losses``, ``samples``, ``training``, ``distributed``: what a student learns, from what, how, and with whom
"""

from __future__ import annotations

from typing import Any

from onnxcompress.errors import RuntimeUnavailableError

__all__ = ["import_torch"]


def import_torch() -> Any:
    """The torch module.

    Raises:
        RuntimeUnavailableError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise RuntimeUnavailableError(
            "torch is not installed; install it with: pip install 'onnxcompress[distill]'"
        ) from error
    return torch
