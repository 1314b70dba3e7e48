"""The quantisers that are compared: ours, ONNX Runtime's, and peers in environments of their own.

Each runs as a process on the same files, so that its time and its memory are its own. Ours is the plain command line;
every other tool has a driver in ``peers/``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import measure_process

import onnxcompress as oc
from onnxcompress.io import model_bytes

__all__ = ["DYNAMIC", "OURS", "STATIC", "TOOLS", "Quantised", "Tool", "Variant", "quantise", "variants"]

#: seconds after which a peer is not waited for any longer
LIMIT = 900.0


@dataclass(frozen=True)
class Variant:
    """One way to use a tool: its key in the driver, and its name in the tables."""

    key: str
    label: str
    #: "all", or only "transformer"
    networks: str = "all"


@dataclass(frozen=True)
class Tool:
    """A tool and the ways it is used here."""

    name: str
    variants: tuple[Variant, ...]


OURS = Variant("plain", "onnxcompress")
STATIC = Variant("min_max", "ORT min-max U8S8 pc")
DYNAMIC = Variant("dynamic", "ORT dynamic pc", "transformer")
TOOLS = {
    tool.name: tool
    for tool in (
        Tool("onnxcompress", (OURS,)),
        Tool(
            "onnxruntime",
            (
                STATIC,
                Variant("defaults", "ORT defaults (S8S8)"),
                Variant("percentile", "ORT percentile U8S8 pc"),
                Variant("entropy", "ORT entropy U8S8 pc"),
                DYNAMIC,
            ),
        ),
        Tool("quark", (Variant("U8S8_AAWS", "Quark U8S8_AAWS"), Variant("default", "Quark default"))),
        Tool("aimet", (Variant("defaults", "AIMET"),)),
        Tool("nncf", (Variant("defaults", "NNCF"),)),
        Tool("modelopt", (Variant("defaults", "ModelOpt"),)),
        Tool(
            "onnxsim",
            (
                Variant("defaults", "onnxsim static"),
                Variant("full_graph", "onnxsim static, full graph"),
                Variant("dynamic", "onnxsim dynamic", "transformer"),
            ),
        ),
    )
}


@dataclass(frozen=True)
class Quantised:
    """What a tool made of a model, or why it made nothing of it. Seconds and peak are those of the whole process."""

    tool: str
    label: str
    version: str = ""
    seconds: float = 0.0
    peak_gib: float = 0.0
    bytes: int = 0
    #: what else the driver told: the seconds without imports, the versions beneath
    facts: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""


def variants(tool: str, *, transformer: bool) -> tuple[Variant, ...]:
    """The ways in which ``tool`` is used on such a network."""
    return tuple(v for v in TOOLS[tool].variants if v.networks == "all" or transformer)


def quantise(
    tool: str, variant: Variant, python: str, model: Path, data: Path, output: Path, options: Sequence[str] = ()
) -> Quantised:
    """Run ``variant`` of ``tool`` by the interpreter ``python`` on ``model`` and write ``output``.

    ``options`` are further ones of our command line.
    """
    if tool == "onnxcompress":
        command = [python, "-m", "onnxcompress", "compress", str(model), "--data", str(data), "-o", str(output)]
        command += options
    else:
        driver = Path(__file__).parent / "peers" / f"run_{tool}.py"
        command = [python, str(driver), variant.key, str(model), str(data), str(output)]
    run = measure_process(command, LIMIT)
    seconds, peak = round(run.seconds, 2), round(run.peak_mib / 1024, 3)
    if run.code != 0:
        return Quantised(tool, variant.label, seconds=seconds, peak_gib=peak, failure=_reason(run.stderr, run.code))
    if not output.is_file():
        return Quantised(tool, variant.label, seconds=seconds, peak_gib=peak, failure="it wrote no file")
    facts = {"version": oc.__version__} if tool == "onnxcompress" else json.loads(run.stdout.splitlines()[-1])
    return Quantised(tool, variant.label, facts.pop("version"), seconds, peak, model_bytes(output), facts)


def _reason(stderr: str, code: int | None) -> str:
    """The last line that a failed process wrote."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return (lines[-1] if lines else f"exit code {code}")[:300]


def interpreters(given: Mapping[str, str]) -> dict[str, str]:
    """{tool: interpreter}: ours and ONNX Runtime's run by this one, the others by those that were ``given``."""
    return {"onnxcompress": sys.executable, "onnxruntime": sys.executable, **given}
