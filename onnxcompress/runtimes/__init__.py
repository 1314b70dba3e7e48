"""Runtimes by name: each is one small adapter that opens a model and runs it.

A runtime is asked for as ``name`` or ``name,option=value,...``, e.g. ``onnxruntime:cuda,use_tf32=true``. The adapters
import their runtime when it is used, so that one that is missing costs nothing, and is told by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from pydantic import ValidationError

from onnxcompress.errors import UsageError
from onnxcompress.runtimes.base import NodePlacement, NodeTime, Opened, Options, Runtime, RuntimeFacts, Source, Trace

__all__ = [
    "RUNTIMES",
    "NodePlacement",
    "NodeTime",
    "Opened",
    "Options",
    "Runtime",
    "RuntimeFacts",
    "Source",
    "Trace",
    "get_runtime",
]

#: {name: module, class}
RUNTIMES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "onnxruntime:cpu": ("onnxcompress.runtimes.onnxruntime_cpu", "OnnxRuntimeCpu"),
        "onnxruntime:cuda": ("onnxcompress.runtimes.onnxruntime_cuda", "OnnxRuntimeCuda"),
        "openvino": ("onnxcompress.runtimes.openvino_cpu", "OpenVinoCpu"),
        "torch": ("onnxcompress.runtimes.torch_executor", "TorchCpu"),
        "torch:cuda": ("onnxcompress.runtimes.torch_executor", "TorchCuda"),
    }
)
#: other spellings
_ALIASES = {
    "onnxruntime": "onnxruntime:cpu",
    "ort": "onnxruntime:cpu",
    "openvino:cpu": "openvino",
    "torch:cpu": "torch",
}


def get_runtime(spec: str) -> Runtime:
    """The runtime that ``spec`` asks for, with its options; whether it is installed is not looked at yet.

    Raises:
        UsageError: there is no such runtime or option, or the value does not fit.
    """
    name, *pairs = (part.strip() for part in spec.split(","))
    name = _ALIASES.get(name, name)
    if name not in RUNTIMES:
        raise UsageError(f"unknown runtime {name!r}; expected one of {', '.join(RUNTIMES)}")
    module, attribute = RUNTIMES[name]
    cls: type[Runtime] = getattr(import_module(module), attribute)
    given: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key or key in given:
            raise UsageError(f"runtime {spec!r}: {pair!r} is not one option=value; separate several by commas")
        given[key] = value
    try:
        options = cls.options_type.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]) if first["loc"] else ""
        known = ", ".join(cls.options_type.model_fields) or "no options"
        if first["type"] == "extra_forbidden":
            raise UsageError(f"runtime {name} has no option {option!r}; it has {known}") from error
        raise UsageError(f"runtime {name}, option {option!r}: {first['msg']}") from error
    return cls(options, ",".join([name, *(f"{key}={value}" for key, value in given.items())]))
