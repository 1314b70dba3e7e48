"""Torch, which runs a graph node by node through :mod:`onnxcompress.executor`.

It tells what the same network costs where it is not exported at all. Nothing is fused or compiled; 8-bit integers and
half precision are computed in float32 there, so that a compressed model's time on torch says nothing about what it
gains elsewhere. Threads and the precision of float32 products are settings of the whole process in torch: each run sees
to its own before it starts, so that others in the process cannot change what is timed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from onnxcompress.environment import gpu_memory_used
from onnxcompress.errors import ModelError, OnnxCompressError, RuntimeUnavailableError
from onnxcompress.executor import import_torch
from onnxcompress.graph import Graph
from onnxcompress.io import load
from onnxcompress.proto import from_proto
from onnxcompress.runtimes.base import (
    Feeds,
    NodePlacement,
    Opened,
    Options,
    Runtime,
    Source,
    Trace,
    median_times,
    missing_inputs,
    one_line,
)

__all__ = ["TorchCpu", "TorchCuda", "TorchCudaOptions", "TorchOptions"]

_WARM_UP = 3
#: seconds after which OpenMP's threads sleep: they spin for 3 ms each, measured, before they do
_LINGERS = 0.01


class TorchOptions(Options):
    """Options of ``torch``."""

    #: whether images are stored with their channels last; ``auto``: where the graph has a two-dimensional convolution
    channels_last: Literal["auto", "on", "off"] = "auto"


class TorchCudaOptions(TorchOptions):
    """Options of ``torch:cuda``."""

    #: multiply float32 with 10 bits of mantissa; faster, and no longer float32
    use_tf32: bool = False
    device_id: int = 0


class TorchCpu(Runtime):
    """Torch on the CPU."""

    name = "torch"
    library = "torch"
    options_type = TorchOptions
    clashes = frozenset({"onnxruntime:cuda"})
    kind: ClassVar[str] = "CPU"

    def check(self) -> None:
        import_torch()

    def open(self, model: Source, threads: int) -> Opened:
        return self._opened(model, threads)

    def _opened(self, model: Source, threads: int) -> _OpenedTorch:
        self.check()
        options = self.options
        assert isinstance(options, TorchOptions)
        layout = {"auto": None, "on": True, "off": False}[options.channels_last]
        return _OpenedTorch(_read(model), self.torch_device(), layout, threads, self.is_reduced(), self.kind)

    def lingers(self, threads: int) -> float:
        return _LINGERS if threads != 1 else 0.0

    def torch_device(self) -> str:
        """The device as torch spells it."""
        return "cpu"

    def is_reduced(self) -> bool:
        """True where float32 products may be computed with fewer bits."""
        return False

    def trace(self, model: Source, threads: int, feeds: Sequence[Feeds], runs: int) -> Trace:
        opened = self._opened(model, threads)
        bound = [opened.bind_tensors(f) for f in feeds]
        for index in range(_WARM_UP * len(bound)):
            opened.execute(bound[index % len(bound)])
        taken: dict[tuple[str, str, str], list[float]] = {}
        for run in range(runs):
            for name, op, seconds in opened.timed(bound[run % len(bound)]):
                taken.setdefault((name, op, self.kind), [0.0] * runs)[run] += seconds
        return Trace(runs, median_times(taken), 0)

    def version(self) -> str:
        return str(import_torch().__version__)

    def precision(self) -> str:
        return "float32 (integers and half precision too)"


class TorchCuda(TorchCpu):
    """Torch on an NVIDIA GPU."""

    name = "torch:cuda"
    options_type = TorchCudaOptions
    kind = "CUDA"

    def check(self) -> None:
        torch = import_torch()
        options = self.options
        assert isinstance(options, TorchCudaOptions)
        if torch.version.cuda is None:
            raise RuntimeUnavailableError(
                f"{self.spec} was asked for, but torch {torch.__version__} is a build for the CPU; install one with "
                "CUDA, or use --runtime torch"
            )
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if options.device_id >= found:
            raise RuntimeUnavailableError(
                f"{self.spec} was asked for, but torch {torch.__version__} (CUDA {torch.version.cuda}) finds {found} "
                f"devices and device_id is {options.device_id}; check the driver, or use --runtime torch"
            )

    def torch_device(self) -> str:
        options = self.options
        assert isinstance(options, TorchCudaOptions)
        return f"cuda:{options.device_id}"

    def is_reduced(self) -> bool:
        options = self.options
        assert isinstance(options, TorchCudaOptions)
        return options.use_tf32

    def device(self) -> str:
        return str(import_torch().cuda.get_device_name(self.torch_device()))

    def device_memory(self) -> int | None:
        options = self.options
        assert isinstance(options, TorchCudaOptions)
        return gpu_memory_used(options.device_id)

    def precision(self) -> str:
        if self.is_reduced():
            return "TF32 (chosen by use_tf32)"
        return "float32 (TF32 off; integers and half precision too)"


class _OpenedTorch(Opened):
    """A graph as a torch module, with the settings that it runs under."""

    def __init__(
        self, graph: Graph, device: str, channels_last: bool | None, threads: int, reduced: bool, kind: str
    ) -> None:
        from onnxcompress.executor.network import Network

        self._torch = import_torch()
        self._threads = threads or _usable_cores()
        self._precision = "high" if reduced else "highest"
        self._on_cpu = device == "cpu"
        self._kind = kind
        self._settle()
        self._network: Any = Network(graph, trainable=False, device=device, channels_last=channels_last)
        self._types = {tensor.name: tensor.dtype for tensor in graph.outputs}
        self.input_names = [tensor.name for tensor in graph.inputs]
        self.output_names = list(self._network.output_names)

    def _settle(self) -> None:
        """Give the process the threads and the precision of this model, where others changed them."""
        torch = self._torch
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        if torch.get_float32_matmul_precision() != self._precision:
            torch.set_float32_matmul_precision(self._precision)
        if not self._on_cpu:
            torch.backends.cudnn.allow_tf32 = self._precision != "highest"

    def bind_tensors(self, feeds: Feeds) -> Any:
        """The inputs as tensors on the device.

        Raises:
            ModelError: one is missing or cannot be fed.
        """
        given = self.network.feeds(feeds)
        missing = [name for name in self.input_names if name not in given]
        if missing:
            raise ModelError(f"torch cannot run the model: {missing_inputs(missing)}")
        return given

    @property
    def network(self) -> Any:
        """The module.

        Raises:
            ModelError: it was closed.
        """
        if self._network is None:
            raise ModelError("the model was closed")
        return self._network

    def execute(self, given: Any) -> list[Any]:
        """The outputs for bound tensors, when the device is done."""
        self._settle()
        try:
            with self._torch.inference_mode():
                found: list[Any] = self.network.plan.run(given)
            self._wait()
        except OnnxCompressError:
            raise
        except Exception as error:  # of the device, whose errors share no base below RuntimeError
            raise ModelError(f"torch cannot run the model: {one_line(error)}") from error
        return found

    def _wait(self) -> None:
        if not self._on_cpu:
            self._torch.cuda.synchronize()

    def timed(self, given: Any) -> list[tuple[str, str, float]]:
        """(node, operator, seconds) of each step of a run on shapes that were run before."""
        self._settle()

        def clock() -> float:
            self._wait()
            return time.perf_counter()

        with self._torch.inference_mode():
            steps = list(self.network.plan.run_timed(given, clock))
        return [(node.name or node.outputs[0].name, node.op, seconds) for node, seconds in steps]

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        values = self.execute(self.bind_tensors(feeds))
        return {
            name: _as_declared(value, self._types.get(name))
            for name, value in zip(self.output_names, values, strict=True)
        }

    def bind(self, feeds: Feeds) -> Callable[[], Any]:
        given = self.bind_tensors(feeds)

        def bound() -> None:
            self.execute(given)

        return bound

    def placement(self) -> tuple[NodePlacement, ...]:
        return tuple(
            NodePlacement(node.name or node.outputs[0].name, node.op, "CPU" if of_shapes else self._kind)
            for node, of_shapes in self.network.plan.nodes()
        )

    def close(self) -> None:
        self._network = None


def _read(model: Source) -> Graph:
    if not isinstance(model, bytes):
        return load(Path(model))
    try:
        return from_proto(onnx.load_model_from_string(model))
    except DecodeError as error:
        raise ModelError(f"torch cannot open the model: {one_line(error)}") from error


def _as_declared(value: Any, dtype: Any) -> NDArray[Any]:
    """An output as numpy has it, in the type that the file declares: halves were computed in float32."""
    array = np.ascontiguousarray(value.cpu().numpy())
    return array if dtype is None or array.dtype == dtype else array.astype(dtype)


def _usable_cores() -> int:
    """As many threads as the process may run at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
