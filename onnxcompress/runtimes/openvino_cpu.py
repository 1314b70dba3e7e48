"""OpenVINO's CPU plug-in.

On processors with bfloat16 it compiles float32 models in bfloat16 unless told otherwise. Here float32 means float32:
the precision is pinned, and ``precision=bf16`` chooses the other one, which is then shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxcompress.errors import ModelError, RuntimeUnavailableError
from onnxcompress.runtimes.base import (
    Feeds,
    NodePlacement,
    Opened,
    Options,
    Runtime,
    Source,
    Trace,
    contiguous,
    median_times,
    missing_inputs,
    one_line,
)

__all__ = ["OpenVinoCpu", "OpenVinoOptions"]

_WARM_UP = 3
_PRECISIONS = {"f32": "float32", "bf16": "bfloat16 (chosen by precision)", "f16": "float16 (chosen by precision)"}


class OpenVinoOptions(Options):
    """Options of ``openvino``."""

    #: what float32 operators compute in
    precision: Literal["f32", "bf16", "f16"] = "f32"
    #: requests that the plug-in may run at once; one at a time is what latency means
    streams: int = 1
    #: bind threads to cores: steadier on an idle machine, and at the mercy of whoever else is on that core on another
    pinning: bool = False


class OpenVinoCpu(Runtime):
    """OpenVINO on the CPU."""

    name = "openvino"
    library = "openvino"
    options_type = OpenVinoOptions

    def check(self) -> None:
        _import_openvino()

    def open(self, model: Source, threads: int) -> Opened:
        return _OpenedOpenVino(self._compiled(model, threads))

    def _compiled(self, model: Source, threads: int, **more: Any) -> Any:
        ov = _import_openvino()
        options = self.options
        assert isinstance(options, OpenVinoOptions)
        core = ov.Core()
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": options.precision,
            "NUM_STREAMS": options.streams,
            "ENABLE_CPU_PINNING": options.pinning,
            **({"INFERENCE_NUM_THREADS": threads} if threads else {}),
            **more,
        }
        try:
            read = core.read_model(model=model) if isinstance(model, bytes) else core.read_model(Path(model))
            compiled = core.compile_model(read, "CPU", settings)
        except Exception as error:  # openvino raises RuntimeError and its own, which share no base below Exception
            raise ModelError(f"OpenVINO cannot open the model: {one_line(error)}") from error
        used = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if used != options.precision:
            raise RuntimeUnavailableError(
                f"{self.spec}: OpenVINO computes in {used} although {options.precision} was asked for; such a time "
                "would go by a false name"
            )
        return compiled

    def trace(self, model: Source, threads: int, feeds: Sequence[Feeds], runs: int) -> Trace:
        opened = _OpenedOpenVino(self._compiled(model, threads, PERF_COUNT=True))
        taken: dict[tuple[str, str, str], list[float]] = {}
        warm_up = _WARM_UP * len(feeds)
        for index in range(warm_up + runs):
            opened.infer(opened.request, feeds[index % len(feeds)])
            for entry in opened.request.profiling_info if index >= warm_up else ():
                if "NOT_RUN" not in str(entry.status):
                    seconds = taken.setdefault((entry.node_name, entry.node_type, "CPU"), [0.0] * runs)
                    seconds[index - warm_up] += entry.real_time.total_seconds()
        return Trace(runs, median_times(taken), 0)

    def version(self) -> str:
        return str(_import_openvino().__version__)

    def precision(self) -> str:
        options = self.options
        assert isinstance(options, OpenVinoOptions)
        return _PRECISIONS[options.precision]


class _OpenedOpenVino(Opened):
    """A compiled model. Outputs have the names that the ONNX file gives them."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self.request = compiled.create_infer_request()
        self.input_names = [_name(port) for port in compiled.inputs]
        self.output_names = [_name(port) for port in compiled.outputs]

    def infer(self, request: Any, feeds: Feeds) -> Any:
        """Run ``feeds`` in ``request``."""
        given = self._given(feeds)
        try:
            return request.infer(dict(enumerate(given)), share_inputs=True)
        except Exception as error:
            raise ModelError(f"OpenVINO cannot run the model: {one_line(error)}") from error

    def _given(self, feeds: Feeds) -> list[NDArray[Any]]:
        """The arrays of the inputs in order."""
        given = contiguous(feeds, self.input_names)
        missing = [name for name in self.input_names if name not in given]
        if missing:
            raise ModelError(f"OpenVINO cannot run the model: {missing_inputs(missing)}")
        return [given[name] for name in self.input_names]

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        self.infer(self.request, feeds)
        tensors = [self.request.get_output_tensor(index) for index in range(len(self.output_names))]
        return {name: np.array(t.data) for name, t in zip(self.output_names, tensors, strict=True)}

    def bind(self, feeds: Feeds) -> Callable[[], Any]:
        """A request of its own for ``feeds``, whose inputs are set once and read in place."""
        ov = _import_openvino()
        request = self._compiled.create_infer_request()
        try:
            for index, array in enumerate(self._given(feeds)):
                writeable = array if array.flags.writeable else array.copy()  # it shares no other memory
                request.set_input_tensor(index, ov.Tensor(writeable, shared_memory=True))
        except Exception as error:
            raise ModelError(f"OpenVINO cannot run the model: {one_line(error)}") from error
        infer = (
            request.infer
        )  # in this thread: handing the work to another one and back costs 20 us, on a busy machine ms

        def bound() -> None:
            try:
                infer(share_outputs=True)
            except Exception as error:
                raise ModelError(f"OpenVINO cannot run the model: {one_line(error)}") from error

        return bound

    def placement(self) -> tuple[NodePlacement, ...]:
        found = []
        constant: set[str] = set()  # what is computed once when the model is compiled
        for node in self._compiled.get_runtime_model().get_ordered_ops():
            facts = {key: str(value.astype(str)) for key, value in node.get_rt_info().items()}
            name, op = node.get_friendly_name(), facts.get("layerType", node.get_type_name())
            sources = [node.input_value(index).get_node().get_friendly_name() for index in range(node.get_input_size())]
            if op == "Const" or (sources and constant.issuperset(sources)):
                constant.add(name)
            elif op not in ("Input", "Output"):
                found.append(NodePlacement(name, op, f"CPU {facts.get('runtimePrecision', '')}".strip()))
        return tuple(found)

    def close(self) -> None:
        self.request = self._compiled = None


def _name(port: Any) -> str:
    """The tensor's name in the file. A port may have several, where OpenVINO removed what was between two tensors."""
    names = port.get_names()
    node = str(port.get_node().get_friendly_name()).partition("/sink_port_")[0]
    return node if node in names or not names else str(min(names))


def _import_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise RuntimeUnavailableError(
            "openvino is not installed; install it with: pip install 'onnxcompress[openvino]'"
        ) from error
    return openvino
