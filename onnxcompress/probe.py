"""Opening a file of a stranger in a process of its own first, with limits on its memory and time.

ONNX's checker, its shape inference, its version converter and ONNX Runtime are native code that was not made for
hostile input: a file can crash them, make them allocate without end or never come back. So they meet a file in a child
process (``python -m onnxcompress.probe``) that does, once, what the parent is about to do: load, infer shapes, convert,
open a session with and without optimisation, and run one made-up sample. If the child dies, the parent says so in one
line and lives. Where the system has no such limits (Windows), crashes and hangs are still caught, memory is not.

The parent that goes on reads the same bytes (their SHA-256 is compared), so what ended in the child ends there too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from onnxcompress import errors
from onnxcompress.errors import ModelError, ResourceError, UsageError

__all__ = ["Limits", "Probe", "check_unchanged", "limits_for", "limits_note", "probe_models", "probes"]

#: what may be set from outside, in seconds and in bytes
SECONDS_VARIABLE, MEMORY_VARIABLE = "ONNXCOMPRESS_PROBE_SECONDS", "ONNXCOMPRESS_PROBE_MEMORY"
#: without that: seconds for any model and for each GB of it, bytes for any model and for each byte of it
_SECONDS, _SECONDS_PER_GB = 120.0, 120.0
_MEMORY, _MEMORY_PER_BYTE = 4 << 30, 4
#: what allocators say when there is no more
_OUT_OF_MEMORY = (
    *("bad_alloc", "bad allocation", "length_error", "MemoryError"),
    *("Failed to allocate memory", "Cannot allocate memory", "Memory allocation"),
)
#: what the child writes its limits to where it extends them
_LIMITS_FILE = "limits.json"
#: the newest opset that a pass raises a model to
_CONVERTED_TO = 13
_STAGES = {
    "start": "starting",
    "load": "reading and checking",
    "shapes": "shape inference of",
    "convert": "converting the opset of",
    "session": "opening an onnxruntime session of",
    "run": "running one made-up sample through",
}


@dataclass(frozen=True)
class Limits:
    """Seconds of wall time, and bytes of memory of its own, that the child may use."""

    seconds: float
    memory: int


def limits_for(size: int, environment: Mapping[str, str] | None = None) -> Limits:
    """The limits for models of ``size`` bytes altogether, which the environment may set.

    Raises:
        UsageError: the environment holds what is no positive number.
    """
    given = os.environ if environment is None else environment
    memory = _MEMORY + _MEMORY_PER_BYTE * size
    physical = _physical_memory()
    if physical is not None:
        memory = min(memory, max(physical, _MEMORY))
    seconds = _number(given, SECONDS_VARIABLE, _SECONDS + _SECONDS_PER_GB * size / 1e9)
    return Limits(seconds, int(_number(given, MEMORY_VARIABLE, memory)))


def _number(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e18:
        raise UsageError(f"the environment variable {name} is {text!r}; expected a number above 0")
    return value


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows, and systems that do not tell
        return None


# ---------------------------------------------------------------------------------------------------------------------
# The parent


def probes(target: str) -> bool:
    """False for targets that run on a GPU: a context there takes seconds to create, and one device has room for few."""
    return target != "cuda"


def limits_note() -> str | None:
    """What a report must say where this system cannot limit the memory of the child process; None where it can."""
    try:
        import resource  # noqa: F401
    except ImportError:
        return "this system cannot limit memory: a model that asks for too much is stopped by nothing but time"
    return None


def check_unchanged(path: str | os.PathLike[str], probed: Mapping[str, str], sha256: str | None) -> None:
    """Refuse a model whose bytes are not those that a child process has opened.

    Raises:
        ModelError: ``sha256`` of what was read is not that of ``probed``.
    """
    expected = probed.get(os.fspath(path))
    if expected is not None and sha256 != expected:
        raise ModelError(f"{path} changed while it was being read; wait until it is written, then run again")


def probe_models(paths: Sequence[str | os.PathLike[str]], *, hard_links: bool = False) -> dict[str, str]:
    """Open every model once in a child process, and wait for it; {path: SHA-256 of the model} of what it has read.

    Raises:
        As :meth:`Probe.wait`.
    """
    with Probe(paths, hard_links=hard_links) as probe:
        return probe.wait()


class Probe:
    """A child process that opens models; it starts at once, so that the parent can do other work until :meth:`wait`.

    Args:
        paths: model files.
        hard_links: accept external data with more than one name.
        limits: None: by the size of the files and the environment.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        hard_links: bool = False,
        limits: Limits | None = None,
    ) -> None:
        self._paths = list(dict.fromkeys(os.fspath(path) for path in paths))
        # Only a file system is asked here: what a file says of its external data is read by the child.
        self._limits = limits if limits is not None else limits_for(sum(map(_file_bytes, self._paths)))
        # What the child leaves behind when it is killed lies in here.
        self._folder = tempfile.TemporaryDirectory(prefix="onnxcompress-probe-", ignore_cleanup_errors=True)
        self._process: subprocess.Popen[bytes] | None = None
        request = {
            "paths": [os.path.abspath(path) for path in self._paths],  # noqa: PTH100 - links stay as they are
            "hard_links": hard_links,
            "limits": asdict(self._limits),
            "extend": limits is None,
        }
        quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONFAULTHANDLER": ""}
        self._deadline = time.monotonic() + self._limits.seconds
        try:
            # -P: a file called onnx.py beside the model is not what is imported
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "onnxcompress.probe", json.dumps(request)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=self._folder.name,
                env={**os.environ, **quiet, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), self._folder.name)},
            )
        except OSError as error:
            self.close()
            raise ResourceError(
                f"cannot start the process that checks models: {error.strerror or error}; free some memory, or use "
                "--trusted for files that you trust"
            ) from error

    def wait(self) -> dict[str, str]:
        """Wait for the child; {path: SHA-256 of the model} of what it has read.

        Raises:
            ModelError: what the child raised, or it crashed.
            ResourceError: the child took too long or too much memory.
            OnnxCompressError: of the kind that the child raised.
        """
        process = self._process
        assert process is not None
        try:
            output, said = self._communicate(process)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            raise ResourceError(
                f"{self._doing(_lines(output))} takes more than {self._limits.seconds:g} seconds; set "
                f"{SECONDS_VARIABLE} to wait longer, or use --trusted for files that you trust"
            ) from None
        finally:
            self.close()
        lines = _lines(output)
        last = lines[-1] if lines else {}
        if process.returncode == 0 and "done" in last:
            return dict(zip(self._paths, last["done"], strict=True))
        if "error" in last:
            kind: Any = getattr(errors, str(last["error"]), ModelError)
            message = str(last["message"])
            for path in self._paths:
                message = message.replace(os.path.abspath(path), path)  # noqa: PTH100
            raise kind(message)
        raise self._died(process.returncode, lines, said.decode(errors="replace"))

    def _communicate(self, process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
        """What the child said, within its limits, which it extends once it knows the size of the external data."""
        try:
            return process.communicate(timeout=max(0.1, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            if not self._extended():
                raise
            return process.communicate(timeout=max(0.1, self._deadline - time.monotonic()))
        finally:
            self._extended()

    def _extended(self) -> bool:
        try:
            told = json.loads((Path(self._folder.name) / _LIMITS_FILE).read_bytes())
        except (OSError, ValueError):
            return False
        more = Limits(**told)
        self._deadline += more.seconds - self._limits.seconds
        extended = more.seconds > self._limits.seconds
        self._limits = more
        return extended

    def _died(self, status: int, lines: list[dict[str, Any]], said: str) -> errors.OnnxCompressError:
        """What to raise about a child that ended without an answer."""
        doing = self._doing(lines)
        exhausted = [getattr(signal, name, None) for name in ("SIGKILL", "SIGXCPU")]
        if any(text in said for text in _OUT_OF_MEMORY) or (status < 0 and -status in exhausted):
            return ResourceError(
                f"{doing} takes more than {self._limits.memory / 1e9:.1f} GB of memory; set {MEMORY_VARIABLE} to allow "
                "more bytes, or use --trusted for files that you trust"
            )
        if "Traceback (most recent call last)" in said or "No module named" in said:
            return errors.OnnxCompressError(
                f"{doing} failed in the process that checks models: {said.strip().splitlines()[-1][:300]}; this is a "
                "bug in onnxcompress, please report it"
            )
        reason = f"with status {status}"
        if status < 0:
            with contextlib.suppress(ValueError):
                reason = f"by {signal.Signals(-status).name}"
        words = " ".join(said.split())
        told = f": {words[-200:]}" if words else ""
        return ModelError(f"{doing} ended a child process {reason}, so the file is not safe to open{told}")

    def _doing(self, lines: list[dict[str, Any]]) -> str:
        stage = next((line for line in reversed(lines) if "stage" in line), {"stage": "start", "path": self._paths[0]})
        path = next((p for p in self._paths if os.path.abspath(p) == stage["path"]), stage["path"])  # noqa: PTH100
        return f"{_STAGES[stage['stage']]} {path}"

    def close(self) -> None:
        """End the child and remove what it left."""
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()
            process.communicate()
        self._folder.cleanup()

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _lines(output: bytes) -> list[dict[str, Any]]:
    """What the child said; a last line that it did not finish is left out."""
    found = []
    for line in output.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]


def _file_bytes(path: str) -> int:
    """Size of one file; 0 where there is none, which the child tells better."""
    try:
        return Path(path).stat().st_size
    except (OSError, ValueError):
        return 0


# ---------------------------------------------------------------------------------------------------------------------
# The child


def _extend(paths: Sequence[str]) -> Limits:
    """The limits for the models with their external data, told to the parent in a file: it may be waiting."""
    from onnxcompress.atomic import write_file
    from onnxcompress.io import model_bytes

    limits = limits_for(sum(model_bytes(path) for path in paths))
    write_file(_LIMITS_FILE, json.dumps(asdict(limits)).encode())  # in the folder that this process was started in
    _limit(limits)
    return limits


def _limit(limits: Limits) -> None:
    """Limit this process; what the system does not know is left out."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft = {
        "RLIMIT_CORE": 0,
        "RLIMIT_DATA": limits.memory,
        # as many threads may run, and addresses are also used up by files that are mapped and by stacks
        "RLIMIT_AS": 4 * limits.memory + (16 << 30),
        "RLIMIT_CPU": int(4 * limits.seconds) + 1,
    }
    for name, value in soft.items():
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        with contextlib.suppress(OSError, ValueError):
            _, hard = resource.getrlimit(kind)
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, hard))


def _tell(**facts: Any) -> None:
    os.write(sys.stdout.fileno(), json.dumps(facts).encode() + b"\n")


def _open(path: str, hard_links: bool) -> str:
    """Do with one file what commands do; its SHA-256.

    Errors of later stages are left to the parent, which meets them where they matter: not every command needs a
    session. What counts here is that each stage ends.
    """
    _tell(stage="load", path=path)
    from onnxcompress.graph import copy_graph, model_info
    from onnxcompress.io import load

    graph = load(path, trusted=hard_links)
    _tell(stage="shapes", path=path)
    from onnxcompress.shapes import infer_shapes

    with contextlib.suppress(Exception):
        infer_shapes(graph)
        infer_shapes(graph, {t.name: tuple(t.shape) for t in graph.inputs if t.shape is not None})
    if graph.opset < _CONVERTED_TO:
        _tell(stage="convert", path=path)
        from onnxcompress.opset import raise_opset

        with contextlib.suppress(Exception):
            raise_opset(copy_graph(graph), _CONVERTED_TO)
    _tell(stage="session", path=path)
    with contextlib.suppress(errors.RuntimeUnavailableError):
        _run(path, graph)
    return str(model_info(graph).source_sha256)


def _run(path: str, graph: Any) -> None:
    from onnxcompress.session import Session

    try:
        Session(path, optimization="all", threads=1)  # one after the other: a large model is not held twice
        session = Session(path, optimization="disabled", threads=1)
    except ModelError as error:
        _refuse_exhaustion(error)
        return
    _tell(stage="run", path=path)
    try:
        from onnxcompress.data import synthetic_data
        from onnxcompress.graph import input_specs

        with synthetic_data(input_specs(graph), graph=graph, samples=1) as data:
            session.run(data.first().feeds)
    except errors.OnnxCompressError as error:  # made-up samples need not be what the model takes
        _refuse_exhaustion(error)


def _refuse_exhaustion(error: errors.OnnxCompressError) -> None:
    if any(text in str(error) for text in _OUT_OF_MEMORY):
        raise MemoryError(str(error)) from error


def main(request: Mapping[str, Any]) -> None:
    """Open every model of ``request`` and tell how it went, a line of JSON a stage."""
    limits = Limits(**request["limits"])
    _limit(limits)
    path = request["paths"][0]
    try:
        digests = []
        _tell(stage="load", path=path)
        if request.get("extend", False):
            limits = _extend(request["paths"])
        for path in request["paths"]:
            digests.append(_open(path, bool(request["hard_links"])))
        _tell(done=digests)
    except errors.OnnxCompressError as error:
        _tell(error=type(error).__name__, message=str(error))
    except MemoryError:
        _tell(
            error="ResourceError",
            message=f"opening {path} takes more than {limits.memory / 1e9:.1f} GB of memory; set "
            f"{MEMORY_VARIABLE} to allow more bytes, or use --trusted for files that you trust",
        )


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        main(json.loads(sys.argv[1]))
