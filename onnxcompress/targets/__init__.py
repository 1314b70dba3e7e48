"""What a runtime can run as integers: one rule table per target, read by placement, by `inspect` and by the audit.

Each target has a module of its own: :mod:`~onnxcompress.targets.cpu` (ONNX Runtime's CPU provider),
:mod:`~onnxcompress.targets.x86_any`, :mod:`~onnxcompress.targets.cuda` and :mod:`~onnxcompress.targets.openvino`.
"""

from __future__ import annotations

from onnxcompress.errors import UsageError
from onnxcompress.targets.base import OperatorRule, Role, Target, WeightRule
from onnxcompress.targets.cpu import CPU
from onnxcompress.targets.cuda import CUDA
from onnxcompress.targets.openvino import OPENVINO
from onnxcompress.targets.x86_any import X86_ANY

__all__ = [
    "CPU",
    "CUDA",
    "OPENVINO",
    "TARGETS",
    "X86_ANY",
    "OperatorRule",
    "Role",
    "Target",
    "WeightRule",
    "get_target",
]

#: Targets by name.
TARGETS: dict[str, Target] = {target.name: target for target in (CPU, X86_ANY, CUDA, OPENVINO)}


def get_target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        UsageError: there is none.
    """
    if name not in TARGETS:
        raise UsageError(f"unknown target {name!r}; expected one of {', '.join(TARGETS)}")
    return TARGETS[name]
