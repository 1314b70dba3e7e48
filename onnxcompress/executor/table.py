"""The operator table: every operator of ONNX's own domain that can be executed, by name."""

from __future__ import annotations

from types import MappingProxyType

from onnxcompress.executor.operators_elementwise import ELEMENTWISE
from onnxcompress.executor.operators_matrix import MATRIX
from onnxcompress.executor.operators_move import MOVE
from onnxcompress.executor.operators_quantize import QUANTIZE
from onnxcompress.executor.operators_reduce import REDUCE
from onnxcompress.executor.operators_resize import RESIZE
from onnxcompress.executor.spec import Table

__all__ = ["OPERATORS"]

OPERATORS: Table = MappingProxyType({**ELEMENTWISE, **MATRIX, **MOVE, **QUANTIZE, **REDUCE, **RESIZE})
