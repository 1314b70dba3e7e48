"""A model of 2.5 GB compressed end to end: peak memory, time and size of the whole command.

The model is written first, a weight at a time: an embedding table and feed-forward blocks with residuals, some with
BatchNormalization behind a Gemm and some whose weight passes through a Transpose, so that folding has work to do. Then
``onnxcompress compress`` runs on it as a process, once a recipe. Run from the root of the repository::

    python benchmarks/large_model.py
    python benchmarks/large_model.py --gigabytes 1 --recipes lossless --output out.json

What is measured is the memory of the process and all that it starts together, sampled every 20 ms, and the kernel's own
figure of the largest one (``ru_maxrss``); the larger of the two counts. Pages of files that are mapped count like any
other. The bound is 1.5 times the weights. It needs Linux, the extras ``cpu`` and ``test``, and 16 GB of free disk where
temporary files go (``TMPDIR``), which has to be no disk in memory. The last line on stdout is JSON; the exit code is 1
where the bound is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
from common import table
from numpy.typing import NDArray
from onnx import TensorProto, helper

from onnxcompress.environment import describe_environment
from onnxcompress.io import model_bytes

#: peak memory over the size of the weights
BOUND = 1.5
WIDTH, INNER, TOKENS, VOCABULARY = 2048, 8192, 16, 32000
SAMPLES = 24
#: arguments of ``compress`` by the name of the run; data is added where it is asked for
RECIPES: dict[str, tuple[str, ...]] = {
    "lossless": ("--recipe", "lossless"),
    "dynamic": ("--recipe", "{folder}/dynamic.yaml"),
    "int8": ("--recipe", "int8", "--data", "{folder}/calibration.npz", "--batch", "4"),
    "static": ("--recipe", "{folder}/static.yaml", "--data", "{folder}/calibration.npz", "--batch", "4"),
}
DYNAMIC = "version: 1\npasses:\n  - fold_constants: {}\n  - eliminate_dead_nodes: {}\n  - quantize_dynamic: {}\n"
STATIC = """version: 1
passes:
  - fold_constants: {}
  - eliminate_dead_nodes: {}
  - fold_batch_norm: {}
  - equalize_layers: {}
  - quantize_embeddings: {}
  - insert_qdq: {observer: weighted_mse}
"""


class Writer:
    """Nodes of the model, and its weights, which go to the file as they are made."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.path = folder / "model.onnx"
        self._data = (folder / "model.data").open("wb")
        self._random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.bytes = 0

    def weight(self, name: str, *shape: int, spread: float) -> str:
        """A random weight of this standard deviation."""
        values = self._random.standard_normal(shape, np.float32)
        values *= np.float32(spread)
        return self.store(name, values)

    def store(self, name: str, values: NDArray[Any]) -> str:
        """A weight, on a page of its own."""
        offset = -(-self._data.tell() // 4096) * 4096
        self._data.seek(offset)
        values.tofile(self._data)
        tensor = onnx.TensorProto(name=name, dims=values.shape, data_type=TensorProto.FLOAT)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "model.data"), ("offset", offset), ("length", values.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        self.bytes += values.nbytes
        return name

    def node(self, operator: str, inputs: list[str], **attributes: Any) -> str:
        """A node with one output, whose name is the answer."""
        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def close(self, outputs: list[onnx.ValueInfoProto]) -> None:
        """Write the model file."""
        self._data.close()
        inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", TOKENS])]
        graph = helper.make_graph(self.nodes, "large", inputs, outputs, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        self.path.write_bytes(model.SerializeToString())


def write_model(folder: Path, size: int, seed: int = 0) -> tuple[Path, int]:
    """Write a model of about ``size`` bytes of weights; its path and how many bytes they are."""
    writer = Writer(folder, seed)
    writer.weight("embedding", VOCABULARY, WIDTH, spread=1.0)
    hidden = writer.node("Gather", ["embedding", "ids"])
    block = 0
    while writer.bytes < size:
        hidden = _block(writer, hidden, block)
        block += 1
    pooled = writer.node("ReduceMean", [hidden], axes=[1], keepdims=0)
    writer.weight("head", WIDTH, 10, spread=WIDTH**-0.5)
    scores = writer.node("MatMul", [pooled, "head"])
    writer.nodes.append(helper.make_node("Identity", [scores], ["scores"], "scores"))
    writer.close([helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 10])])
    return writer.path, writer.bytes


def _block(writer: Writer, hidden: str, block: int) -> str:
    """Two layers with a residual around them, of one of three kinds."""
    kind, name = ("plain", "transposed", "normalised")[block % 3], f"block{block}"
    up = writer.weight(f"{name}.up", *((INNER, WIDTH) if kind == "transposed" else (WIDTH, INNER)), spread=WIDTH**-0.5)
    down = writer.weight(f"{name}.down", INNER, WIDTH, spread=0.5 * INNER**-0.5)
    if kind == "normalised":
        flat = writer.node("Reshape", [hidden, _shape(writer, f"{name}.flat", [-1, WIDTH])])
        inner = writer.node("Gemm", [flat, up, writer.weight(f"{name}.bias", INNER, spread=0.1)])
        statistics = [writer.store(f"{name}.{part}", np.full(INNER, v, np.float32)) for part, v in _STATISTICS.items()]
        inner = writer.node("Relu", [writer.node("BatchNormalization", [inner, *statistics])])
        outer = writer.node("MatMul", [inner, down])
        outer = writer.node("Reshape", [outer, _shape(writer, f"{name}.back", [-1, TOKENS, WIDTH])])
    else:
        if kind == "transposed":
            up = writer.node("Transpose", [up], perm=[1, 0])
        inner = writer.node("Relu", [writer.node("MatMul", [hidden, up])])
        outer = writer.node("MatMul", [inner, down])
    return writer.node("Add", [hidden, outer])


_STATISTICS = {"scale": 1.1, "shift": 0.05, "mean": 0.02, "variance": 1.3}


def _shape(writer: Writer, name: str, values: list[int]) -> str:
    writer.initializers.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
    return name


def write_samples(folder: Path) -> None:
    """Calibration samples, and the recipes that have no name."""
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (SAMPLES, TOKENS))
    np.savez(folder / "calibration.npz", allow_pickle=False, ids=ids)
    (folder / "dynamic.yaml").write_text(DYNAMIC)
    (folder / "static.yaml").write_text(STATIC)


@dataclass
class Peak:
    """The most memory in bytes that a process and all that it starts had at once, and what part of it was no file."""

    total: int = 0
    anonymous: int = 0
    largest: int = 0


@contextmanager
def watched(process: int) -> Iterator[Peak]:
    """Sample the memory of a process and its descendants until the block ends."""
    peak, done = Peak(), threading.Event()

    def watch() -> None:
        root = psutil.Process(process)
        while not done.wait(0.02):
            total = anonymous = 0
            try:
                for part in (root, *root.children(recursive=True)):
                    memory = part.memory_info()
                    total += memory.rss
                    anonymous += memory.rss - memory.shared
            except psutil.NoSuchProcess:
                continue
            peak.total, peak.anonymous = max(peak.total, total), max(peak.anonymous, anonymous)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


#: runs a command, prints its exit code and the kernel's figure of its largest process: a process starts with the peak
#: of the one that started it, so this small one goes in between
_LAUNCHER = (
    "import json, resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode; "
    "print(json.dumps([code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024]))"
)


def compress(model: Path, folder: Path, name: str, options: list[str], weights: int) -> dict[str, Any]:
    """Run the command once; what it took."""
    output = folder / f"{name}.onnx"
    words = [word.format(folder=folder) for word in RECIPES[name]]
    report = folder / f"{name}.json"
    command = ["-m", "onnxcompress", "compress", str(model), "-o", str(output), "--report", str(report), "--quiet"]
    start = time.perf_counter()
    launcher = [sys.executable, "-S", "-c", _LAUNCHER, sys.executable, *command, *words, *options]
    with (
        subprocess.Popen(launcher, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
        watched(process.pid) as peak,
    ):
        stdout, stderr = process.communicate()
    seconds = time.perf_counter() - start
    code, peak.largest = json.loads(stdout.splitlines()[-1]) if process.returncode == 0 else (None, 0)
    most = max(peak.total, peak.largest)
    row: dict[str, Any] = {
        "recipe": name,
        "exit_code": code,
        "seconds": round(seconds, 1),
        "peak_bytes": most,
        "peak_over_weights": round(most / weights, 3),
        "anonymous_over_weights": round(peak.anonymous / weights, 3),
        "within_bound": code == 0 and most <= BOUND * weights,
    }
    if code != 0:
        row["error"] = " ".join(stderr.split())[-500:]
        return row
    facts = json.loads(report.read_text())
    row["size"] = round(model_bytes(output) / model_bytes(model), 4)
    row["stages"] = {stage: round(taken, 1) for stage, taken in facts["seconds"].items()}
    row["warnings"] = facts["warnings"]
    for file in folder.glob(f"{name}*"):
        file.unlink()
    return row


def main() -> int:
    """Measure, print a table and JSON; 1 where the bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.5, help="size of the weights (default: %(default)s)")
    parser.add_argument(
        "--recipes", default=",".join(RECIPES), help=f"which to run of {', '.join(RECIPES)} (default: %(default)s)"
    )
    parser.add_argument("--work", type=Path, help="folder for the model and the results; default: a temporary one")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="large-model-", dir=arguments.work) as made:
        folder = Path(made)
        model, weights = write_model(folder, int(arguments.gigabytes * 1e9))
        write_samples(folder)
        print(f"{weights / 1e9:.2f} GB of weights", file=sys.stderr)
        rows = []
        for name in arguments.recipes.split(","):
            rows.append(compress(model, folder, name, options, weights))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    figures = {"weights": weights, "bound": BOUND, "environment": describe_environment(), "runs": rows}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n")
    cells = [
        (
            row["recipe"],
            f"{row['peak_over_weights']:.2f}x",
            f"{row['anonymous_over_weights']:.2f}x",
            f"{row['seconds']} s",
            f"{row.get('size', '-')}",
            "PASS" if row["within_bound"] else "FAIL",
        )
        for row in rows
    ]
    print(table(("recipe", "peak / weights", "of that no file", "time", "size", f"bound {BOUND}x"), cells))
    print(json.dumps(figures))
    return 0 if all(row["within_bound"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
