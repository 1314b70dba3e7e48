"""Damaged model files through load, checks and a lossless recipe: each is refused in one line or handled.

    python benchmarks/fuzz_bytes.py --count 100000 --output benchmarks/results/fuzz_bytes.json

Small real models are damaged in two ways: bytes (flipped, set, inserted, deleted, repeated, moved, cut off) and
structure (fields of the protobuf message changed, dropped, repeated, exchanged). A case of a seed is always the same.
Cases run in forked workers with limits on memory and time; what a worker dies of is seen, counted and kept as a file.

Outcomes: ``handled`` (loaded, compressed, saved and loaded again), ``refused`` (an error of ours that is the file's
fault or a matter of resources, exit code 3 or 7, one line), and the failures: ``traceback`` (any other exception, and
errors that ask for a report), ``crash`` (a signal), ``hang`` (over the time limit).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from onnxcompress.demo import demo_model_path
from onnxcompress.errors import OnnxCompressError
from onnxcompress.version import __version__

__all__ = ["FAILURES", "OUTCOMES", "Finding", "Sources", "fuzz", "mutate", "sources"]

OUTCOMES = ("handled", "refused", "traceback", "crash", "hang")
FAILURES = ("traceback", "crash", "hang")
#: limits on one worker: bytes of address space, seconds a case
MEMORY, SECONDS = 8 << 30, 20.0

Sources = Sequence[tuple[str, bytes]]


@dataclass(frozen=True)
class Finding:
    """One case that failed: its number, outcome, what was said, and the source of the file."""

    number: int
    outcome: str
    message: str
    source: str


# ----------------------------------------------------------------------------------------------------------------------
# Damage


def mutate(number: int, seed: int, models: Sources) -> tuple[str, bytes]:
    """Case ``number``: the name of the model that is damaged, and the damaged file."""
    rng = np.random.default_rng((seed, number))
    name, data = models[int(rng.integers(len(models)))]
    if rng.random() < 0.5:
        return name, _bytes(data, rng)
    return name, _structure(data, rng)


def _position(data: bytes, rng: np.random.Generator) -> int:
    """Anywhere, or near an end of the file, where the structure of small models is densest."""
    size = len(data)
    if rng.random() < 0.5 or size < 2048:
        return int(rng.integers(size))
    offset = int(rng.integers(1024))
    return offset if rng.random() < 0.5 else size - 1 - offset


_SPECIAL = (0, 1, 0x7F, 0x80, 0xFF)


def _bytes(data: bytes, rng: np.random.Generator) -> bytes:
    damaged = bytearray(data)
    for _ in range(int(rng.choice([1, 1, 1, 2, 4, 16]))):
        if not damaged:
            break
        at = _position(bytes(damaged), rng) if len(damaged) < 1 << 14 else min(_position(data, rng), len(damaged) - 1)
        length = int(rng.choice([1, 2, 4, 8, 64]))
        kind = rng.integers(7)
        if kind == 0:
            damaged[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            damaged[at] = int(rng.choice(_SPECIAL))
        elif kind == 2:
            damaged[at:at] = rng.bytes(length)
        elif kind == 3:
            del damaged[at : at + length]
        elif kind == 4:
            damaged[at:at] = damaged[at : at + length]
        elif kind == 5:
            other = int(rng.integers(len(damaged)))
            damaged[at : at + length] = damaged[other : other + length]
        else:
            del damaged[at:]
    return bytes(damaged)


def _messages(message: Message) -> Iterator[Message]:
    yield message
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        for item in (value,) if isinstance(value, Message) else value:
            yield from _messages(item)


_INTEGERS = (0, 1, -1, 2, 7, 11, 16, 99, 255, 1 << 20, 1 << 31, (1 << 31) - 1, -(1 << 31), 1 << 40, (1 << 63) - 1)
_TEXTS = ("", "x", "../x", "\0", "é🙂", "x" * 5000, "Relu", "Loop", "If", "BatchNormalization", "ai.onnx", "Constant")
_FLOATS = (0.0, -1.0, float("nan"), float("inf"), 1e38, 1e-45)
_LIMITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}


def _structure(data: bytes, rng: np.random.Generator) -> bytes:
    model = onnx.ModelProto.FromString(data)
    for _ in range(int(rng.choice([1, 1, 2, 3]))):
        messages = [m for m in _messages(model) if m.ListFields()]
        target = messages[int(rng.integers(len(messages)))]
        fields = target.ListFields() if rng.random() < 0.8 else [(d, None) for d in target.DESCRIPTOR.fields]
        descriptor, _ = fields[int(rng.integers(len(fields)))]
        _change(target, descriptor, messages, rng)
    try:
        return model.SerializePartialToString()
    except ValueError:  # too deep
        return data


def _change(target: Message, field: FieldDescriptor, messages: Sequence[Message], rng: np.random.Generator) -> None:
    repeated = field.is_repeated
    kind = rng.integers(4)
    if kind == 0:
        target.ClearField(field.name)
        return
    if field.message_type is not None:
        donors = [m for m in messages if m.DESCRIPTOR is field.message_type and m.ByteSize() < 1 << 14]
        if not donors:
            return
        donor = type(donors[0]).FromString(donors[int(rng.integers(len(donors)))].SerializePartialToString())
        if not repeated:
            getattr(target, field.name).CopyFrom(donor)
            return
        items = getattr(target, field.name)
        if kind == 1 or not items:
            items.append(donor)
        elif kind == 2:
            del items[int(rng.integers(len(items)))]
        else:
            first, second = (int(i) for i in rng.integers(len(items), size=2))
            held = type(donor).FromString(items[first].SerializePartialToString())
            items[first].CopyFrom(items[second])
            items[second].CopyFrom(held)
        return
    value = _scalar(field, messages, rng)
    if not repeated:
        setattr(target, field.name, value)
        return
    items = getattr(target, field.name)
    if kind == 1 or not len(items):
        items.append(value)
    elif kind == 2:
        del items[int(rng.integers(len(items)))]
    else:
        items[int(rng.integers(len(items)))] = value


def _scalar(field: FieldDescriptor, messages: Sequence[Message], rng: np.random.Generator) -> Any:
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        if field.type == FieldDescriptor.TYPE_BYTES:
            return rng.bytes(int(rng.choice([0, 1, 3, 4, 16, 400])))
        donor = messages[int(rng.integers(len(messages)))]
        texts = [v for d, v in donor.ListFields() if d.type == FieldDescriptor.TYPE_STRING and isinstance(v, str)]
        return str(rng.choice(texts)) if texts and rng.random() < 0.6 else _TEXTS[int(rng.integers(len(_TEXTS)))]
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return _FLOATS[int(rng.integers(len(_FLOATS)))]
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return bool(rng.integers(2))
    if field.enum_type is not None:
        return int(rng.choice([v.number for v in field.enum_type.values]))
    low, high = _LIMITS[field.cpp_type]
    return min(max(_INTEGERS[int(rng.integers(len(_INTEGERS)))], low), high)


# ----------------------------------------------------------------------------------------------------------------------
# What is damaged


def sources() -> list[tuple[str, bytes]]:
    """The demo's network, the tests' hazard models below 32 KiB, and one with external data, which is not damaged."""
    found = [("digits_cnn", demo_model_path().read_bytes())]
    tests = Path(__file__).resolve().parents[1] / "tests"
    sys.path.insert(0, str(tests))
    try:
        from models import HAZARDS
    finally:
        sys.path.remove(str(tests))
    for hazard in HAZARDS:
        data = hazard.build().SerializeToString()
        if len(data) < 1 << 15:
            found.append((hazard.name, data))
    with tempfile.TemporaryDirectory() as folder:
        model = onnx.ModelProto.FromString(found[1][1])
        path = Path(folder) / "m.onnx"
        onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
        found.append(("external", path.read_bytes()))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Workers


def _case(path: Path, data: bytes) -> tuple[str, str]:
    """Open, check, fold, save and open again."""
    from onnxcompress.io import load, save
    from onnxcompress.recipe import load_recipe

    path.write_bytes(data)
    stage = "load"
    try:
        graph = load(path)
        stage = "passes"
        result = load_recipe("lossless").pipeline()(graph)
        stage = "save"
        load(save(result.graph, path.with_name("out.onnx")).path)
    except OnnxCompressError as error:
        told = f"{stage}: {error}"
        if error.exit_code in (3, 7) and "\n" not in str(error):
            return "refused", told
        return "traceback", f"{type(error).__name__} {told}"
    except Exception as error:
        return "traceback", f"{stage}: {type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}"
    return "handled", ""


def _work(pipe: Connection, numbers: Sequence[int], seed: int, models: Sources, folder: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # native libraries print what they refuse
    warnings.simplefilter("error")  # one would be a line on stderr that nobody asked for
    path = Path(folder) / "m.onnx"
    (Path(folder) / "weights.bin").write_bytes(bytes(1 << 14))
    for number in numbers:
        name, data = mutate(number, seed, models)
        pipe.send((number, name, *_case(path, data)))
    pipe.send(None)


def fuzz(
    count: int, seed: int, models: Sources, *, first: int = 0, keep: Path | None = None, workers: int = 1
) -> tuple[Counter[str], list[Finding]]:
    """Run cases ``first`` to ``first + count``; what failed is written to ``keep``.

    Returns how often each of :data:`OUTCOMES` came, and the failures.
    """
    outcomes: Counter[str] = Counter()
    findings: list[Finding] = []
    lanes = [_Lane(range(first + lane, first + count, workers), seed, models) for lane in range(workers)]
    try:
        while running := [lane for lane in lanes if lane.busy]:
            for lane in running:
                for number, name, outcome, message in lane.poll(0.02 if len(running) > 1 else 0.5):
                    outcomes[outcome] += 1
                    if outcome in FAILURES:
                        findings.append(Finding(number, outcome, message, name))
                        if keep is not None:
                            keep.mkdir(parents=True, exist_ok=True)
                            (keep / f"{outcome}-{seed}-{number}.onnx").write_bytes(mutate(number, seed, models)[1])
    finally:
        for lane in lanes:
            lane.stop()
    return outcomes, findings


class _Lane:
    """One worker and the cases that it still has to do; it is started again after what it died of."""

    def __init__(self, numbers: Sequence[int], seed: int, models: Sources) -> None:
        self._numbers = list(numbers)
        self._seed, self._models = seed, models
        self._folder = tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
        self.busy = bool(self._numbers)
        if self.busy:
            self._start()

    def _start(self) -> None:
        self._pipe, there = multiprocessing.Pipe(duplex=False)
        arguments = (there, self._numbers, self._seed, self._models, self._folder.name)
        self._process = multiprocessing.get_context("fork").Process(target=_work, args=arguments, daemon=True)
        self._process.start()
        there.close()
        self._since = time.monotonic()

    def poll(self, seconds: float) -> Iterator[tuple[int, str, str, str]]:
        """The cases that are done by now."""
        try:
            while self._pipe.poll(seconds):
                answer = self._pipe.recv()
                self._since, seconds = time.monotonic(), 0.0
                if answer is None:
                    self.busy = False
                    return
                self._numbers.pop(0)
                yield answer
        except EOFError:
            self._process.join()
            yield self._lost("crash", f"signal {-(self._process.exitcode or 0)}")
            return
        if time.monotonic() - self._since > SECONDS:
            self._process.kill()
            self._process.join()
            yield self._lost("hang", f"over {SECONDS:g} s")

    def _lost(self, outcome: str, message: str) -> tuple[int, str, str, str]:
        number = self._numbers.pop(0)
        name, _ = mutate(number, self._seed, self._models)
        self.busy = bool(self._numbers)
        if self.busy:
            self._start()
        return number, name, outcome, message

    def stop(self) -> None:
        """End the worker and remove its folder."""
        if hasattr(self, "_process") and self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._folder.cleanup()


def main() -> int:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-found"), help="where files that fail are written")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    models = sources()
    start = time.monotonic()
    outcomes, findings = fuzz(
        arguments.count, arguments.seed, models, first=arguments.first, keep=arguments.keep, workers=arguments.workers
    )
    facts = {
        "cases": sum(outcomes.values()),
        "first": arguments.first,
        "seed": arguments.seed,
        "sources": len(models),
        **{name: outcomes[name] for name in OUTCOMES},
        "seconds": round(time.monotonic() - start, 1),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"onnxcompress": __version__, "onnx": onnx.__version__, "python": platform.python_version()},
    }
    for finding in findings[:40]:
        print(f"{finding.outcome} {finding.number} ({finding.source}): {finding.message}")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
