"""ONNX Runtime's CUDA provider.

Nothing here falls back in silence. Asking a CPU build for CUDA, a driver or library that is missing, and nodes that
would run on the CPU are all errors of their own, the last with the list of nodes. Inputs and outputs stay on the
device, so that what is timed is the model and not the bus, and every run waits until the device is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray
from pydantic import model_validator

from onnxcompress.environment import gpu_memory_used, gpus
from onnxcompress.errors import ModelError, RuntimeUnavailableError
from onnxcompress.runtimes.base import Feeds, Opened, Source, one_line
from onnxcompress.runtimes.onnxruntime_cpu import CpuOptions, OnnxRuntimeCpu, OpenedSession, installed_builds
from onnxcompress.session import Session, import_onnxruntime

__all__ = ["CudaOptions", "OnnxRuntimeCuda", "fallback_message"]

#: nodes that an error lists
_LISTED = 10
#: what onnxruntime says where nodes were left to the CPU although that is forbidden
_FALLBACK = "fallback to CPU EP has been explicitly disabled"


class CudaOptions(CpuOptions):
    """Options of ``onnxruntime:cuda``."""

    #: inputs and outputs stay on the device; False copies them at every run
    io_binding: bool = True
    #: how the convolution algorithm is chosen; ``exhaustive`` makes the first run slow and the others fast
    cudnn_conv_algo_search: Literal["exhaustive", "heuristic", "default"] = "exhaustive"
    #: multiply float32 with 10 bits of mantissa; faster, and no longer float32
    use_tf32: bool = False
    #: convolutions in NHWC layout
    prefer_nhwc: bool = False
    #: record the kernels once and replay them; needs IO binding, fixed shapes and every node on the device
    cuda_graph: bool = False
    device_id: int = 0
    #: ``allow`` accepts nodes on the CPU, and says which; otherwise they are an error
    cpu_fallback: Literal["forbid", "allow"] = "forbid"

    @model_validator(mode="after")
    def _graphs_need_buffers(self) -> CudaOptions:
        if self.cuda_graph and not self.io_binding:
            raise ValueError("cuda_graph replays fixed addresses and needs io_binding=true")
        return self


class OnnxRuntimeCuda(OnnxRuntimeCpu):
    """ONNX Runtime on an NVIDIA GPU."""

    name = "onnxruntime:cuda"
    options_type = CudaOptions
    clashes = frozenset({"torch", "torch:cuda"})
    provider = "cuda"
    provider_name = "CUDAExecutionProvider"

    def check(self) -> None:
        ort = import_onnxruntime()
        if self.provider_name not in ort.get_available_providers():
            raise RuntimeUnavailableError(
                f"{self.spec} was asked for, but {' and '.join(installed_builds()) or 'onnxruntime'} is a build "
                f"without it: it has {', '.join(ort.get_available_providers())}; "
                "run: pip uninstall -y onnxruntime && pip install 'onnxcompress[gpu]'"
            )
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA and cuDNN as pip installs them are not on the loader's path

    def provider_options(self) -> dict[str, str]:
        options = self.options
        assert isinstance(options, CudaOptions)
        return {
            "device_id": str(options.device_id),
            "cudnn_conv_algo_search": options.cudnn_conv_algo_search.upper(),
            "use_tf32": str(int(options.use_tf32)),
            "prefer_nhwc": str(int(options.prefer_nhwc)),
            "enable_cuda_graph": str(int(options.cuda_graph)),
        }

    def session(
        self, model: Source, threads: int, *, profile: Path | None = None, cpu_fallback: bool = False
    ) -> Session:
        options = self.options
        assert isinstance(options, CudaOptions)
        self.check()
        cpu_fallback |= options.cpu_fallback == "allow"
        try:
            session = super().session(model, threads, profile=profile, cpu_fallback=cpu_fallback)
        except ModelError as error:
            if _FALLBACK in str(error):
                raise RuntimeUnavailableError(self._strays(model, threads)) from error
            if "CUDA" in str(error):
                raise RuntimeUnavailableError(f"{self.spec}: {one_line(error)}; check driver, CUDA, cuDNN") from error
            raise
        if session.providers[:1] != [self.provider_name]:
            raise RuntimeUnavailableError(
                f"{self.spec} was asked for, but the session has {', '.join(session.providers)} only: the provider "
                "could not be loaded; check driver, CUDA and cuDNN"
            )
        return session

    def _strays(self, model: Source, threads: int) -> str:
        """What to say of the nodes that this provider does not take, found by a session that may leave them."""
        allowing = type(self)(self.options.model_copy(update={"cuda_graph": False}), self.spec)
        session = allowing.session(model, threads, cpu_fallback=True)
        return fallback_message(self.spec, self.provider_name, session.assignment())

    def open(self, model: Source, threads: int) -> Opened:
        options = self.options
        assert isinstance(options, CudaOptions)
        return _OpenedCuda(self.session(model, threads), options)

    def device(self) -> str:
        options = self.options
        assert isinstance(options, CudaOptions)
        names = {gpu["index"]: str(gpu["name"]) for gpu in gpus()}
        return names.get(options.device_id, f"CUDA device {options.device_id}")

    def device_memory(self) -> int | None:
        options = self.options
        assert isinstance(options, CudaOptions)
        return gpu_memory_used(options.device_id)

    def precision(self) -> str:
        options = self.options
        assert isinstance(options, CudaOptions)
        return "TF32 (chosen by use_tf32)" if options.use_tf32 else "float32 (TF32 off)"


class _OpenedCuda(OpenedSession):
    """A session whose inputs and outputs stay on the device."""

    def __init__(self, session: Session, options: CudaOptions) -> None:
        super().__init__(session, io_binding=options.io_binding)
        self._device = ("cuda", options.device_id)
        self._records = options.cuda_graph
        self._bindings = 0

    def bind(self, feeds: Feeds) -> Callable[[], Any]:
        if not self._io_binding:
            return self.session.bind(feeds)
        self._bindings += 1  # a recorded graph reads and writes fixed addresses, so each binding needs its own
        return self.session.bind_buffers(feeds, device=self._device, graph_id=self._bindings if self._records else None)

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        if not self._records:
            return self.session.run(feeds)
        bound = self.session.bind_buffers(feeds, device=self._device, graph_id=-1)
        bound()
        return {name: value.numpy() for name, value in zip(self.output_names, bound.outputs, strict=True)}


def fallback_message(spec: str, provider: str, assignment: Sequence[tuple[str, str, str]]) -> str:
    """The error for nodes that were not given to ``provider``: each by name and operator, with where it would run."""
    strays = [(name, op, where) for name, op, where in assignment if where != provider]
    listed = ", ".join(f"{name or 'unnamed'} ({op}, {where})" for name, op, where in strays[:_LISTED])
    more = f" and {len(strays) - _LISTED} more" if len(strays) > _LISTED else ""
    return (
        f"{spec}: {len(strays)} of {len(assignment)} nodes would not run on {provider}: {listed}{more}; such a time "
        "would not be that provider's. Change the model, or add cpu_fallback=allow to time it so"
    )
