"""ONNX in, a smaller and faster ONNX out, with proof.

::

    import onnxcompress as oc

    result = oc.compress("model.onnx", "samples.npz", "small.onnx")          # the main job
    graph = oc.Pipeline([...])(oc.load("model.onnx")).graph                  # or by hand

The public names are imported when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from onnxcompress.version import __version__

if TYPE_CHECKING:
    from onnxcompress.base import (
        Change,
        Context,
        Decision,
        Guarantee,
        Pass,
        PassReport,
        PassResult,
        Refusal,
    )
    from onnxcompress.benchmark import BenchmarkResult, MatrixResult, benchmark, benchmark_models
    from onnxcompress.compress import CompressResult, compress
    from onnxcompress.data import Batch, Dataset, open_data, synthetic_data
    from onnxcompress.errors import (
        AccuracyError,
        DataError,
        ModelError,
        OnnxCompressError,
        RecipeError,
        ResourceError,
        RuntimeUnavailableError,
        SlowerError,
        UnsafeModelError,
        UsageError,
    )
    from onnxcompress.graph import Graph, input_specs
    from onnxcompress.inspect_model import Inspection, inspect_model
    from onnxcompress.io import SavedModel, load, save
    from onnxcompress.passes import PASSES, load_pass
    from onnxcompress.pipeline import Pipeline
    from onnxcompress.quantization.audit import FusionAudit, audit
    from onnxcompress.recipe import Recipe, load_recipe
    from onnxcompress.session import Session
    from onnxcompress.verify import OutputComparison, check_equivalent, compare

__all__ = [
    "PASSES",
    "AccuracyError",
    "Batch",
    "BenchmarkResult",
    "Change",
    "CompressResult",
    "Context",
    "DataError",
    "Dataset",
    "Decision",
    "FusionAudit",
    "Graph",
    "Guarantee",
    "Inspection",
    "MatrixResult",
    "ModelError",
    "OnnxCompressError",
    "OutputComparison",
    "Pass",
    "PassReport",
    "PassResult",
    "Pipeline",
    "Recipe",
    "RecipeError",
    "Refusal",
    "ResourceError",
    "RuntimeUnavailableError",
    "SavedModel",
    "Session",
    "SlowerError",
    "UnsafeModelError",
    "UsageError",
    "__version__",
    "audit",
    "benchmark",
    "benchmark_models",
    "check_equivalent",
    "compare",
    "compress",
    "input_specs",
    "inspect_model",
    "load",
    "load_pass",
    "load_recipe",
    "open_data",
    "save",
    "synthetic_data",
]

#: public names by the module that defines them
_MODULES = {
    "base": ("Change", "Context", "Decision", "Guarantee", "Pass", "PassReport", "PassResult", "Refusal"),
    "benchmark": ("BenchmarkResult", "MatrixResult", "benchmark", "benchmark_models"),
    "compress": ("CompressResult", "compress"),
    "data": ("Batch", "Dataset", "open_data", "synthetic_data"),
    "errors": (
        "AccuracyError",
        "DataError",
        "ModelError",
        "OnnxCompressError",
        "RecipeError",
        "ResourceError",
        "RuntimeUnavailableError",
        "SlowerError",
        "UnsafeModelError",
        "UsageError",
    ),
    "graph": ("Graph", "input_specs"),
    "inspect_model": ("Inspection", "inspect_model"),
    "io": ("SavedModel", "load", "save"),
    "passes": ("PASSES", "load_pass"),
    "pipeline": ("Pipeline",),
    "quantization.audit": ("FusionAudit", "audit"),
    "recipe": ("Recipe", "load_recipe"),
    "session": ("Session",),
    "verify": ("OutputComparison", "check_equivalent", "compare"),
}
_ORIGIN = {name: module for module, names in _MODULES.items() for name in names}


class _Package(ModuleType):
    """Keeps public functions reachable whose module has the same name, such as ``onnxcompress.compress``.

    The import system binds every submodule to its package when it is first imported. Which of the two
    ``onnxcompress.compress`` is would then depend on what was imported before; here it is always the function, and the
    module is there for ``from onnxcompress.compress import ...``.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _ORIGIN and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _ORIGIN:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{self.__name__}.{_ORIGIN[name]}"), name)
        super().__setattr__(name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
