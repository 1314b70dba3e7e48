"""What the drivers in this folder share: each quantises one model with one tool and says how it went.

A driver runs as a process of its own, in an environment that holds its tool and not onnxcompress::

    python benchmarks/peers/run_nncf.py defaults model.onnx calibration.npz quantised.onnx

The calibration data is a ``.npz`` file, one array an input, or a folder of such files, a file a batch. The last line on
stdout is JSON: the tool's version, the versions beneath it, and the seconds that the tool took, imports left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

__all__ = ["BATCH", "Job", "Reader", "main"]

#: samples a batch, where the data is one file
BATCH = 16
Feeds = dict[str, np.ndarray]


@dataclass(frozen=True)
class Job:
    """One model to quantise."""

    #: a copy of the model in a folder of its own: there are tools that write to it
    model: Path
    data: Path
    output: Path

    @property
    def folder(self) -> Path:
        """Where files may be left; it goes away."""
        return self.model.parent

    @property
    def transformer(self) -> bool:
        """True for a network of attention layers: some tools want to be told."""
        import onnx

        operators = {node.op_type for node in onnx.load(self.model, load_external_data=False).graph.node}
        return "Softmax" in operators and "MatMul" in operators and "Conv" not in operators

    def batches(self) -> Iterator[Feeds]:
        """The calibration data, batch by batch, from the start at every call."""
        if self.data.is_dir():
            for file in sorted(self.data.glob("*.npz")):
                with np.load(file, allow_pickle=False) as arrays:
                    yield {name: arrays[name] for name in arrays.files}
            return
        with np.load(self.data, allow_pickle=False) as arrays:
            whole = {name: arrays[name] for name in arrays.files}
        for start in range(0, len(next(iter(whole.values()))), BATCH):
            yield {name: array[start : start + BATCH] for name, array in whole.items()}


class Reader:
    """The calibration data as ONNX Runtime's quantiser, and those that are built on it, read it."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.rewind()

    def get_next(self) -> Feeds | None:
        """The next batch, None at the end."""
        return next(self._batches, None)

    def get_first(self) -> Feeds:
        """The first batch, without taking it."""
        return next(self._job.batches())

    def rewind(self) -> None:
        """Back to the start."""
        self._batches = self._job.batches()

    def __len__(self) -> int:
        return sum(1 for _ in self._job.batches())


def main(distribution: str, variants: Mapping[str, Callable[[Job], None]]) -> None:
    """Run the variant that the command line names; ``distribution`` is the tool's name in the package registry."""
    parser = argparse.ArgumentParser(description=f"Quantise one ONNX file with {distribution}.")
    parser.add_argument("variant", choices=list(variants))
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, help="a .npz file, or a folder of them, a file a batch")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        model = Path(shutil.copy(arguments.model, Path(folder) / "model.onnx"))
        job = Job(model, arguments.data.resolve(), arguments.output.resolve())
        with contextlib.chdir(folder):  # some tools leave files wherever they run, weights among them
            start = time.perf_counter()
            variants[arguments.variant](job)
            seconds = time.perf_counter() - start
    print(
        json.dumps(
            {
                "version": metadata.version(distribution),
                "seconds": round(seconds, 3),
                "python": platform.python_version(),
                "versions": {name: _version(name) for name in ("onnx", "onnxruntime", "numpy", "torch")},
            }
        )
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
