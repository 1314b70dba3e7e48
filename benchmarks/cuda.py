"""What compression is worth on an NVIDIA GPU: ResNet-50 and BERT-base with random weights, for time only.

Float32, float16, half of the multiply-accumulates pruned, pruned and float16, and 8-bit Q/DQ pairs, which CUDA's
provider runs as float operators between conversions, so that they are slower there. Each at batch 1, 8 and 32, with
inputs and outputs bound to the device, once run operator by operator and once as a recorded CUDA graph. Run from the
root of the repository, where ``pip install '.[gpu]'`` found a GPU; the files can be prepared on any machine::

    python benchmarks/cuda.py --models MODELS --prepare
    python benchmarks/cuda.py --models MODELS --output benchmarks/results/cuda.json --update
    python benchmarks/cuda.py --markdown benchmarks/results/cuda.json

The file is written after each model and batch; ``--update`` goes on from there. Without a GPU every row says why there
is no time. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from architectures import build, feeds
from common import table
from runtimes import rows, say, write

import onnxcompress as oc
from onnxcompress.benchmark import benchmark_models
from onnxcompress.environment import describe_environment
from onnxcompress.errors import OnnxCompressError
from onnxcompress.recipe import parse_recipe

MODELS = ("resnet50", "bert_base")
RUNTIMES = ("onnxruntime:cuda", "onnxruntime:cuda,cuda_graph=true")
BATCHES = (1, 8, 32)
_CLEAN = ("fold_constants: {}", "eliminate_dead_nodes: {}", "fold_batch_norm: {}")
_PRUNE = (
    "prune_channels: {macs: 0.5, importance: l2, allocation: uniform, drop_branches: false, recover: false, "
    "round_to: 8}"
)
#: {file: passes}; each begins with the float32 file, the second float16 with the pruned one
FILES = {
    "fp32": (),
    "fp16": (*_CLEAN, "convert_float16: {}"),
    "pruned": (*_CLEAN, _PRUNE),
    "pruned, fp16": ("convert_float16: {}",),
    "int8 Q/DQ": (*_CLEAN, "insert_qdq: {}"),
}
HEAD = ("model", "batch", "runtime", "file", "median", "speed", "of")


def prepared(name: str, folder: Path) -> dict[str, Path]:
    """{file: path}; those that are in ``folder`` are used again."""
    paths = {label: folder / f"{name}.{label.replace(', ', '-').replace(' Q/DQ', '')}.onnx" for label in FILES}
    if not paths["fp32"].exists():
        onnx.save(build(name), paths["fp32"])
    for label, passes in FILES.items():
        if paths[label].exists():
            continue
        say(f"  {label}")
        target = "cpu" if "int8" in label else "cuda"
        lines = "".join(f"  - {line}\n" for line in passes)
        recipe = parse_recipe(f"version: 1\ntarget: {target}\npasses:\n{lines}", label)
        source = paths["pruned" if label.startswith("pruned,") else "fp32"]
        oc.compress(
            source, feeds(name, 8, seed=1), paths[label], recipe=recipe, batch=1, benchmark=False, max_drop=None,
            verify=False,
        )  # fmt: skip
    return paths


def measured(files: Mapping[str, Path], name: str, batch: int, runtimes: Sequence[str], seconds: float) -> Any:
    """The rows of one model at one batch size."""
    result = benchmark_models(
        list(files.values()),
        feeds(name, 2 * batch),
        runtimes=runtimes,
        seconds=seconds,
        batch=batch,
        output_check=False,  # what random weights compute survives neither 8 bits nor pruning
    )
    facts = [None if found is None else vars(found) | {"options": dict(found.options)} for found in result.facts]
    noise = {
        result.runtimes[result.variants[c.reference].runtime]: [c.result.low, c.result.ratio, c.result.high]
        for c in result.comparisons
        if c.kind == "noise"
    }
    found = {"rows": rows(result, list(files)), "noise": noise, "runtimes": facts, "warnings": list(result.warnings)}
    return found | {"date": result.environment["date"]}


def markdown(facts: Mapping[str, Any]) -> str:
    """The table, and below it what is missing and why."""
    lines: list[tuple[str, ...]] = []
    notes: dict[str, list[str]] = {}
    for key, found in facts["models"].items():
        name, batch = key.split(", batch ")
        for row in found["rows"]:
            where = (name, batch, row["runtime"], row["file"])
            if "failure" in row:
                lines.append((*where, "not timed", "", ""))
                notes.setdefault(row["failure"], []).append(f"{name} {row['file']}, batch {batch}, on {row['runtime']}")
                continue
            speed = f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" if "ratio" in row else ""
            lines.append((*where, f"{row['median_s'] * 1e3:.3g} ms", speed, row.get("of", "")))
    machine = facts["environment"]
    gpus = ", ".join(f"{gpu['name']} (driver {gpu['driver']})" for gpu in machine["gpus"]) or "no GPU"
    about = f"{gpus}; {machine['cpu']}; {machine['date']}"
    told = [f"Not timed: {'; '.join(which)}: {reason}" for reason, which in notes.items()]
    return "\n\n".join([about, table(HEAD, lines), *told])


def main() -> None:
    """Prepare, time, print."""
    parser = argparse.ArgumentParser(description="Compressed models on CUDA.")
    parser.add_argument("--only", default=",".join(MODELS), help="models, separated by commas")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--runtimes", default=";".join(RUNTIMES), help="runtimes, separated by semicolons")
    parser.add_argument("--seconds", type=float, default=5.0, help="limit of one comparison")
    parser.add_argument("--models", type=Path, help="folder of the files: made there, used again from there")
    parser.add_argument("--prepare", action="store_true", help="make the files only")
    parser.add_argument("--output", type=Path, help="where the JSON goes, and the table beside it")
    parser.add_argument("--update", action="store_true", help="go on with what --output has")
    parser.add_argument("--markdown", type=Path, help="print the table of this JSON file and measure nothing")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(json.loads(arguments.markdown.read_text())))
        return
    if arguments.models is None:
        parser.error("--models names the folder for the files")
    facts: dict[str, Any] = {"environment": describe_environment(), "models": {}}
    if arguments.update and arguments.output and arguments.output.exists():
        facts["models"] = json.loads(arguments.output.read_text())["models"]
    arguments.models.mkdir(parents=True, exist_ok=True)
    for name in arguments.only.split(","):
        say(name)
        try:
            files = prepared(name, arguments.models)
        except OnnxCompressError as error:
            raise SystemExit(f"{name}: {error}") from error
        for batch in () if arguments.prepare else map(int, arguments.batches.split(",")):
            key = f"{name}, batch {batch}"
            if key not in facts["models"]:
                facts["models"][key] = measured(files, name, batch, arguments.runtimes.split(";"), arguments.seconds)
                write(arguments.output, facts, markdown)
    print(markdown(facts))
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
