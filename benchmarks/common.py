"""What the benchmark scripts share: the real models, ONNX Runtime's own quantiser, processes, tables."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from onnxcompress.session import Feeds, Session, import_onnxruntime

__all__ = [
    "Case",
    "CasesMissingError",
    "ProcessRun",
    "alternate",
    "load_cases",
    "measure_process",
    "quantize_static",
    "quantize_static_input",
    "run_process",
    "save_samples",
    "table",
    "validation",
]


class Case(Protocol):
    """A real model with its data, as ``cases.py`` defines it. The metric is a fraction, higher is better."""

    @property
    def name(self) -> str:
        """The model's name."""
        ...

    @property
    def model(self) -> Path:
        """The ONNX file."""
        ...

    def calibration(self, samples: int = 256, batch: int = 16) -> Iterator[Feeds]:
        """Batches of training data, the same on every call; fewer samples where there are fewer."""
        ...

    def evaluate(self, run: Callable[..., Any]) -> float:
        """The metric of ``run`` (feeds -> outputs) over the validation split."""
        ...


class CasesMissingError(Exception):
    """The folder with the real models is not there."""


def load_cases() -> Mapping[str, Case]:
    """The cases of ``cases.py`` in the folder that ONNXCOMPRESS_CASES names; default: ../shared/cases.

    Raises:
        CasesMissingError: there is no such file.
    """
    default = Path(__file__).resolve().parents[2] / "shared" / "cases"
    source = Path(os.environ.get("ONNXCOMPRESS_CASES", default)) / "cases.py"
    if not source.is_file():
        raise CasesMissingError(f"no cases.py in {source.parent}; set ONNXCOMPRESS_CASES to the folder that holds it")
    spec = importlib.util.spec_from_file_location("onnxcompress_cases", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.dont_write_bytecode = True  # the folder is not ours to write to
    spec.loader.exec_module(module)
    cases: Mapping[str, Case] = module.CASES
    return cases


def validation(case: Case) -> list[dict[str, Any]]:
    """The batches of the validation split, in memory, as ``case.evaluate`` feeds them."""
    batches: list[dict[str, Any]] = []
    run = Session(case.model).run

    def recording(feeds: dict[str, Any]) -> Any:
        batches.append(feeds)
        return run(feeds)

    case.evaluate(recording)
    return batches


# -- ONNX Runtime's own quantiser -----------------------------------------------------------------------------------


class _Reader:
    """What ``quantize_static`` reads calibration data from."""

    def __init__(self, batches: Iterable[Feeds]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> Feeds | None:
        """The next batch, None at the end."""
        return next(self._batches, None)


def quantize_static_input(model: Path, output: Path) -> Path:
    """``model`` as ONNX Runtime's documentation has it prepared for ``quantize_static``, written to ``output``."""
    import_onnxruntime()
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(model), str(output))
    return output


def quantize_static(prepared: Path, batches: Iterable[Feeds], output: Path) -> Path:
    """ONNX Runtime's static quantisation at its best for this job: QDQ, min-max, uint8 x int8, per channel."""
    import_onnxruntime()
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize

    quantize(
        str(prepared),
        str(output),
        _Reader(batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )
    return output


# -- processes --------------------------------------------------------------------------------------------------------

#: Runs a command and prints its return code, seconds, peak and output. A process starts with the peak of the one that
#: started it, so this small one goes in between.
_LAUNCHER = """
import json, resource, subprocess, sys, time
limit = float(sys.argv[1]) or None
start = time.perf_counter()
try:
    done = subprocess.run(sys.argv[2:], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=limit)
    code, said = done.returncode, (done.stdout, done.stderr)
except subprocess.TimeoutExpired:
    code, said = None, (b"", b"no answer within %d seconds" % limit)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([code, seconds, peak, *(text.decode(errors="replace") for text in said)]))
"""


@dataclass(frozen=True)
class ProcessRun:
    """A whole process: wall time, the largest resident memory, and how it ended."""

    seconds: float
    peak_mib: float
    #: exit code; None where it was stopped because it took too long
    code: int | None
    stdout: str
    stderr: str


def measure_process(command: Sequence[str | os.PathLike[str]], limit: float = 0.0) -> ProcessRun:
    """Run ``command`` to its end, or for ``limit`` seconds where that is not 0, and measure it."""
    words = [os.fspath(word) for word in command]
    launched = subprocess.run(
        [sys.executable, "-S", "-c", _LAUNCHER, str(limit), *words], capture_output=True, text=True, check=False
    )
    if launched.returncode != 0:
        return ProcessRun(0.0, 0.0, launched.returncode, "", launched.stderr)
    code, seconds, peak, stdout, stderr = json.loads(launched.stdout)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return ProcessRun(float(seconds), float(peak) / unit, code, stdout, stderr)


def run_process(command: Sequence[str | os.PathLike[str]]) -> ProcessRun:
    """Run ``command`` to its end and measure it.

    Raises:
        SystemExit: it failed; what it said is part of the message.
    """
    run = measure_process(command)
    if run.code != 0:
        words = " ".join(os.fspath(word) for word in command)
        raise SystemExit(f"exit code {run.code} of {words}: {run.stderr.strip()[-2000:]}")
    return run


def alternate(
    jobs: Mapping[str, Callable[[], object]], repetitions: int, choose: Callable[[list[str]], None]
) -> dict[str, list[float]]:
    """Seconds of each job, {name: one a round}: each runs once untimed, then all once a round.

    ``choose`` puts the names of a round in order, in place.
    """
    for job in jobs.values():
        job()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repetitions):
        names = list(jobs)
        choose(names)
        for name in names:
            start = time.perf_counter()
            jobs[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def save_samples(path: Path, arrays: Mapping[str, NDArray[Any]]) -> Path:
    """Write ``arrays``, by input name and the first axis being the sample, to the ``.npz`` file ``path``."""
    np.savez(path, allow_pickle=False, **arrays)
    return path


# -- tables ---------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, aligned: bool = True) -> str:
    """A Markdown table; ``aligned`` fills its cells up, so that it reads well in a terminal too."""
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) if aligned else 0 for column in range(len(head))]
    cells = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    rule = "|" + "|".join("-" * max(3, width + 2) for width in widths) + "|"
    return "\n".join([cells[0], rule, *cells[1:]])
