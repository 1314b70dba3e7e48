"""One onnxruntime session, with its provider, optimisation level and threads explicit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxcompress.errors import ModelError, RuntimeUnavailableError, UsageError
from onnxcompress.graph import Graph
from onnxcompress.proto import to_proto

__all__ = ["Feeds", "Optimization", "Session", "import_onnxruntime"]

Feeds = Mapping[str, NDArray[Any]]
Optimization = Literal["disabled", "basic", "extended", "all"]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def import_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        RuntimeUnavailableError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeUnavailableError(
            "onnxruntime is not installed; install it with: pip install 'onnxcompress[cpu]' (or [gpu])"
        ) from error
    return onnxruntime


class Session:
    """An onnxruntime session on a graph, a proto, bytes or a file.

    Args:
        model: what to run. A graph is serialised in memory; a file is read by the runtime itself.
        optimization: the runtime's graph optimisation level. Compare models at ``disabled``, time them at ``all``.
        threads: intra-op threads; 0 lets the runtime choose.
        provider: ``cpu`` or ``cuda``.
        optimized_path: where the runtime writes the graph as it optimised it.
        config: further session configuration entries.

    Raises:
        RuntimeUnavailableError: onnxruntime or the provider is missing.
        ModelError: the runtime refuses the model.
    """

    def __init__(
        self,
        model: Graph | onnx.ModelProto | bytes | str | os.PathLike[str],
        *,
        optimization: Optimization = "all",
        threads: int = 0,
        provider: str = "cpu",
        optimized_path: str | os.PathLike[str] | None = None,
        config: Mapping[str, str] | None = None,
    ) -> None:
        ort = import_onnxruntime()
        if provider not in PROVIDERS:
            raise UsageError(f"unknown provider {provider!r}; expected one of {', '.join(PROVIDERS)}")
        if PROVIDERS[provider] not in ort.get_available_providers():
            raise RuntimeUnavailableError(
                f"onnxruntime {ort.__version__} here has {', '.join(ort.get_available_providers())} but not "
                f"{PROVIDERS[provider]}; install it with: pip install 'onnxcompress[gpu]' (and remove onnxruntime first)"
            )
        options = ort.SessionOptions()
        options.graph_optimization_level = {
            "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
            "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
            "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
            "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
        }[optimization]
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if provider == "cuda":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        for key, value in (config or {}).items():
            options.add_session_config_entry(key, value)
        if optimized_path is not None:
            options.optimized_model_filepath = os.fspath(optimized_path)
        source = _serialised(model)
        try:
            self._session = ort.InferenceSession(source, options, providers=[PROVIDERS[provider]])
        except Exception as error:  # onnxruntime's exceptions share no base below Exception
            raise ModelError(f"onnxruntime cannot open the model: {_one_line(error)}") from error
        self.output_names: list[str] = [o.name for o in self._session.get_outputs()]
        self.input_names: list[str] = [i.name for i in self._session.get_inputs()]

    def run(self, feeds: Feeds, outputs: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """Run one batch: {input name: array} in, {output name: array} out. Inputs that the model lacks are ignored."""
        names = list(outputs) if outputs is not None else self.output_names
        given = {name: np.ascontiguousarray(feeds[name]) for name in self.input_names if name in feeds}
        try:
            return dict(zip(names, self._session.run(names, given), strict=True))
        except Exception as error:
            raise ModelError(f"onnxruntime cannot run the model: {_one_line(error)}") from error

    __call__ = run


def _serialised(model: Graph | onnx.ModelProto | bytes | str | os.PathLike[str]) -> bytes | str:
    if isinstance(model, bytes):
        return model
    if isinstance(model, Graph):
        return to_proto(model).SerializeToString()
    if isinstance(model, onnx.ModelProto):
        return model.SerializeToString()
    return os.fspath(Path(model))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
