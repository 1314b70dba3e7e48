"""One onnxruntime session, with its provider, optimisation level and threads explicit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxcompress.errors import ModelError, OnnxCompressError, RuntimeUnavailableError, UsageError
from onnxcompress.graph import Graph, InputSpec
from onnxcompress.io import PROTOBUF_LIMIT, copy_linked, serialize, write_files
from onnxcompress.proto import from_proto
from onnxcompress.shapes import graph_stats

__all__ = [
    "CUSTOM_OPERATORS_VARIABLE",
    "BoundBuffers",
    "Feeds",
    "Optimization",
    "Session",
    "import_onnxruntime",
    "is_large",
]

Feeds = Mapping[str, NDArray[Any]]
Optimization = Literal["disabled", "basic", "extended", "all"]

#: libraries of custom operators, separated as in PATH, that every session loads; child processes inherit it
CUSTOM_OPERATORS_VARIABLE = "ONNXCOMPRESS_CUSTOM_OPS"
#: a graph with more bytes of weights goes to the runtime as files: in memory it would be held three times for a while
MAPPED_FROM = 1 << 28

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


#: numpy dtypes of the runtime's type names
_DTYPES: Mapping[str, Any] = {
    "tensor(bool)": np.bool_,
    "tensor(double)": np.float64,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(string)": np.object_,
    **{f"tensor({name})": np.dtype(name) for name in ("int8", "int16", "int32", "int64")},
    **{f"tensor(u{name})": np.dtype(f"u{name}") for name in ("int8", "int16", "int32", "int64")},
}


class Session:
    """An onnxruntime session on a graph, a proto, bytes or a file.

    Args:
        model: what to run. A graph is serialised in memory, or with more than 256 MiB of weights into a temporary
            folder, from where the runtime maps them; a file is read by the runtime itself.
        optimization: the runtime's graph optimisation level. Compare models at ``disabled``, time them at ``all``.
        threads: intra-op threads; 0 lets the runtime choose.
        provider: ``cpu`` or ``cuda``.
        optimized_path: where the runtime writes the graph as it optimised it.
        config: further session configuration entries.
        provider_options: options of the provider.
        cpu_fallback: let the CPU run what another provider does not; otherwise that is a ModelError.
        profile: prefix of the file that the runtime's profiler writes, see :meth:`end_profiling`.
        arena: keep freed memory for the next run; without, runs are slower and take less of it.

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
        provider_options: Mapping[str, str] | None = None,
        cpu_fallback: bool = False,
        profile: Path | None = None,
        arena: bool = True,
    ) -> None:
        ort = import_onnxruntime()
        if provider not in PROVIDERS:
            raise UsageError(f"unknown provider {provider!r}; expected one of {', '.join(PROVIDERS)}")
        if PROVIDERS[provider] not in ort.get_available_providers():
            raise RuntimeUnavailableError(
                f"onnxruntime {ort.__version__} here has {', '.join(ort.get_available_providers())} but not "
                f"{PROVIDERS[provider]}; install it with: pip install 'onnxcompress[gpu]', and remove onnxruntime first"
            )
        options = ort.SessionOptions()
        options.graph_optimization_level = {
            "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
            "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
            "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
            "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
        }[optimization]
        options.intra_op_num_threads = threads
        options.enable_cpu_mem_arena = arena
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # errors are raised; the runtime's own lines on stderr would tell them twice
        if provider != "cpu" and not cpu_fallback:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = os.fspath(profile)
        for key, value in (config or {}).items():
            options.add_session_config_entry(key, value)
        if optimized_path is not None:
            options.optimized_model_filepath = os.fspath(optimized_path)
        _register_custom_operators(options)
        source = _serialised(model)
        # enable_fallback is the Python package's own: without the provider's libraries it goes on with the CPU
        chosen: dict[str, Any] = {
            "providers": [(PROVIDERS[provider], dict(provider_options or {}))],
            "enable_fallback": 0,
        }
        try:
            if isinstance(source, gs.Graph):
                # The runtime has read or mapped the weights once it is open, so the files can go.
                with tempfile.TemporaryDirectory(prefix="onnxcompress-", ignore_cleanup_errors=True) as folder:
                    path = os.fspath(write_files(source, folder))
                    self._session = ort.InferenceSession(path, options, **chosen)
            elif isinstance(source, str) and Path(source).is_symlink():
                with tempfile.TemporaryDirectory(prefix="onnxcompress-", ignore_cleanup_errors=True) as folder:
                    self._session = ort.InferenceSession(os.fspath(copy_linked(source, folder)), options, **chosen)
            else:
                self._session = ort.InferenceSession(source, options, **chosen)
        except OnnxCompressError:
            raise
        except Exception as error:  # onnxruntime's exceptions share no base below Exception
            raise ModelError(f"onnxruntime cannot open the model: {_one_line(error)}") from error
        self.output_names: list[str] = [o.name for o in self._session.get_outputs()]
        self.input_names: list[str] = [i.name for i in self._session.get_inputs()]
        #: inputs with a default value (overridable initializers), which need not be fed
        self.optional_names: list[str] = [i.name for i in self._session.get_overridable_initializers()]

    def run(self, feeds: Feeds, outputs: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """Run one batch: {input name: array} in, {output name: array} out. Inputs that the model lacks are ignored."""
        names = list(outputs) if outputs is not None else self.output_names
        known = (*self.input_names, *self.optional_names)
        given = {name: np.ascontiguousarray(feeds[name]) for name in known if name in feeds}
        try:
            return dict(zip(names, self._session.run(names, given), strict=True))
        except Exception as error:
            raise _failed_run(error) from error

    __call__ = run

    def bind(self, feeds: Feeds) -> Callable[[], Any]:
        """A function that runs ``feeds`` and nothing else, for timing: names and arrays are prepared here."""
        run = self._session.run
        given = {name: np.ascontiguousarray(feeds[name]) for name in self.input_names}
        given |= {name: np.ascontiguousarray(feeds[name]) for name in self.optional_names if name in feeds}

        def bound() -> Any:
            try:
                return run(None, given)
            except Exception as error:
                raise _failed_run(error) from error

        return bound

    def bind_buffers(
        self, feeds: Feeds, *, device: tuple[str, int] = ("cpu", 0), graph_id: int | None = None
    ) -> BoundBuffers:
        """As :meth:`bind`, with inputs and outputs in buffers on ``device`` that are filled and allocated here.

        The run returns when the device is done. ``graph_id`` names the recorded CUDA graph that these buffers belong
        to; -1 runs without recording one.
        """
        ort = import_onnxruntime()
        given = {name: np.ascontiguousarray(feeds[name]) for name in self.input_names}
        given |= {name: np.ascontiguousarray(feeds[name]) for name in self.optional_names if name in feeds}
        try:
            inputs = {name: ort.OrtValue.ortvalue_from_numpy(array, *device) for name, array in given.items()}
            binding = self._session.io_binding()
            for name, value in inputs.items():
                binding.bind_ortvalue_input(name, value)
            for name in self.output_names:
                binding.bind_output(name, *device)
            # The first run finds the shapes of the outputs; their buffers then stay where they are.
            self._session.run_with_iobinding(binding, _run_options(ort, None if graph_id is None else -1))
            outputs = list(binding.get_outputs())
            for name, value in zip(self.output_names, outputs, strict=True):
                binding.bind_ortvalue_output(name, value)
        except Exception as error:
            raise _failed_run(error) from error
        return BoundBuffers(self._session, binding, inputs, outputs, _run_options(ort, graph_id))

    @property
    def providers(self) -> list[str]:
        """The providers that the session was created with, by preference."""
        return list(self._session.get_providers())

    def assignment(self) -> list[tuple[str, str, str]]:
        """(node, operator, provider) of each node.

        Nodes are those of the graph when it was partitioned: after the basic optimisations, before the fusions.

        Raises:
            UsageError: ``config`` did not ask for it by ``session.record_ep_graph_assignment_info``.
        """
        try:
            subgraphs = self._session.get_provider_graph_assignment_info()
        except Exception as error:
            raise UsageError(f"onnxruntime did not record where nodes run: {_one_line(error)}") from error
        return [(node.name, node.op_type, subgraph.ep_name) for subgraph in subgraphs for node in subgraph.get_nodes()]

    def end_profiling(self) -> str:
        """Stop the profiler; the file that it wrote."""
        return str(self._session.end_profiling())

    def input_specs(self) -> list[InputSpec]:
        """The inputs as the runtime sees them; overridable initializers come last and are marked optional.

        Raises:
            ModelError: an input is no tensor, or of a type that numpy lacks.
        """
        specs = []
        for tensor in (*self._session.get_inputs(), *self._session.get_overridable_initializers()):
            dtype = _DTYPES.get(tensor.type)
            if dtype is None:
                raise ModelError(
                    f"input {tensor.name!r} is a {tensor.type}; expected a tensor of a type that numpy has"
                )
            shape = tuple(d if isinstance(d, int | str) and d != "" else None for d in tensor.shape)
            specs.append(InputSpec(tensor.name, np.dtype(dtype), shape, tensor.name in self.optional_names))
        return specs


class BoundBuffers:
    """Runs a session on buffers that were bound beforehand; ``outputs`` are overwritten by every run."""

    def __init__(self, session: Any, binding: Any, inputs: Any, outputs: Sequence[Any], options: Any) -> None:
        self._run = session.run_with_iobinding
        self._binding = binding
        self._inputs = inputs  # the binding does not keep them alive
        self._options = options
        self.outputs = outputs

    def __call__(self) -> None:
        """Run once and wait for the device.

        Raises:
            ModelError: the runtime fails.
        """
        try:
            self._run(self._binding, self._options)
            self._binding.synchronize_outputs()
        except Exception as error:
            raise _failed_run(error) from error


def _failed_run(error: Exception) -> ModelError:
    text = _one_line(error)
    if "out of data bounds" in text:  # of Gather and its like, whose indices are what the data gives, as a rule
        text += "; does the data hold numbers beyond the model's vocabulary or classes?"
    return ModelError(f"onnxruntime cannot run the model: {text}")


def _run_options(ort: Any, graph_id: int | None) -> Any:
    if graph_id is None:
        return None
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    return options


def is_large(graph: Graph) -> bool:
    """True where ``graph`` goes to the runtime as files, and is not held in memory beside others."""
    return graph_stats(graph).weight_bytes > MAPPED_FROM


def _serialised(model: Graph | onnx.ModelProto | bytes | str | os.PathLike[str]) -> bytes | str | Graph:
    """What the runtime opens; a graph where the model is too large for one protobuf message."""
    if isinstance(model, bytes):
        return model
    if isinstance(model, onnx.ModelProto):
        if sum(tensor.ByteSize() for tensor in model.graph.initializer) < PROTOBUF_LIMIT // 2:
            return model.SerializeToString()
        model = from_proto(model)
    if isinstance(model, gs.Graph):
        serialised = None if is_large(model) else serialize(model)
        return model if serialised is None else serialised
    return os.fspath(Path(model))


def _register_custom_operators(options: Any) -> None:
    """Load the libraries of custom operators that the environment names."""
    for library in filter(None, os.environ.get(CUSTOM_OPERATORS_VARIABLE, "").split(os.pathsep)):
        try:
            options.register_custom_ops_library(library)
        except Exception as error:  # onnxruntime's exceptions share no base below Exception
            raise UsageError(f"cannot load the library of custom operators {library}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
