"""Real models and well-known architectures on every runtime: output error, ratio and interval, in one table.

Each model is compressed for ONNX Runtime's CPU provider and for OpenVINO (the two want Q/DQ pairs in different places),
and all three files run on both runtimes: whoever compresses for one and serves with the other sees what that costs.
Run from the root of the repository::

    python benchmarks/runtimes.py
    python benchmarks/runtimes.py --only resnet20,bert_base --seconds 3
    python benchmarks/runtimes.py --models /tmp/models --prepare       # compress only
    python benchmarks/runtimes.py --models /tmp/models --output benchmarks/results/runtimes.json --update
    python benchmarks/runtimes.py --markdown benchmarks/results/runtimes.json

The file, and a table beside it in Markdown, are written after each model. ``--update`` keeps the models that were
measured in the same way on the same machine, so that a run that was cut off goes on where it was; ``--again`` measures
those that are named once more.

The cases lie in the folder that ONNXCOMPRESS_CASES names (default ../shared/cases). The architectures have random
weights (:mod:`architectures`): their times are real, and of their errors only those of the original on each runtime
mean something, so no others are given. A file, a runtime or an extra that is missing is a row with the reason.
The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from architectures import ARCHITECTURES, build, feeds
from common import CasesMissingError, load_cases, table, validation

import onnxcompress as oc
from onnxcompress.benchmark import MatrixResult, benchmark_models
from onnxcompress.benchmark.gate import compare_outputs, outputs_of
from onnxcompress.benchmark.matrix import Comparison
from onnxcompress.environment import describe_environment
from onnxcompress.errors import OnnxCompressError
from onnxcompress.runtimes import get_runtime
from onnxcompress.session import Session

RUNTIMES = ("onnxruntime:cpu", "openvino", "torch")
CASES = ("resnet20", "resnet56", "mobilenetv2_cifar10", "squeezenet1.1", "minilm")
#: files of one model: the original, and one for each target
TARGETS = {"fp32": None, "int8 for cpu": "cpu", "int8 for openvino": "openvino"}
#: samples to calibrate on, to judge by, and to time with
CALIBRATION, JUDGED, TIMED = 256, 256, 8
HEAD = ("model", "runtime", "file", "median", "speed", "of", "SQNR, dB", "agreement")


def main() -> None:
    """Prepare, time, print."""
    parser = argparse.ArgumentParser(description="Models on runtimes.")
    parser.add_argument("--only", default=",".join((*CASES, *ARCHITECTURES)), help="models, separated by commas")
    parser.add_argument("--runtimes", default=";".join(RUNTIMES), help="runtimes, separated by semicolons")
    parser.add_argument("--seconds", type=float, default=5.0, help="limit of one comparison")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", type=Path, help="folder of compressed files: made there, used again from there")
    parser.add_argument("--prepare", action="store_true", help="compress only")
    parser.add_argument("--parts", default="times,errors", help="what to measure; only times need a quiet machine")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    parser.add_argument("--update", action="store_true", help="go on with what --output has")
    parser.add_argument("--again", action="store_true", help="measure the models of --only again, whatever it has")
    parser.add_argument("--markdown", type=Path, help="print the table of this JSON file and measure nothing")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(json.loads(arguments.markdown.read_text())))
        return

    if arguments.update and arguments.output is None:
        parser.error("--update needs --output")
    unknown = set(arguments.only.split(",")) - {*CASES, *ARCHITECTURES}
    if unknown:
        parser.error(f"there is no model {min(unknown)}; expected some of {', '.join((*CASES, *ARCHITECTURES))}")

    facts: dict[str, Any] = {"environment": describe_environment(), "threads": arguments.threads, "models": {}}
    how = settings(arguments, facts["environment"])
    if arguments.update and arguments.output.exists():
        before = json.loads(arguments.output.read_text())["models"]
        facts["models"] = {name: model for name, model in before.items() if model.get("settings") == how}
    temporary = tempfile.TemporaryDirectory(prefix="onnxcompress-") if arguments.models is None else nullcontext()
    with temporary as made:
        folder = Path(made) if made is not None else arguments.models
        folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.only.split(","):
            before = facts["models"].get(name, {"settings": how})
            missing = missing_parts(name, before, arguments)
            if missing or arguments.prepare:
                say(name)
                facts["models"][name] = measured(name, folder, before, missing, arguments)
                write(arguments.output, facts, markdown)
    print(markdown(facts))
    print(json.dumps(facts))


def settings(arguments: argparse.Namespace, environment: Mapping[str, Any]) -> dict[str, Any]:
    """What rows must share to stand in one table."""
    versions = {name: environment["versions"].get(name) for name in ("onnxruntime", "openvino", "torch")}
    asked = {"runtimes": arguments.runtimes.split(";"), "seconds": arguments.seconds, "threads": arguments.threads}
    return {**asked, "cpu": environment["cpu"], "versions": versions}


def missing_parts(name: str, found: Mapping[str, Any], arguments: argparse.Namespace) -> list[str]:
    """The parts of ``--parts`` that ``found`` lacks."""
    if arguments.prepare:
        return []
    known = {"times": "rows", "errors": "errors"}
    wanted = [part for part in known if part in arguments.parts.split(",")]
    if name in ARCHITECTURES:
        wanted = [part for part in wanted if part == "times"]
    return [part for part in wanted if arguments.again or known[part] not in found]


def measured(
    name: str,
    folder: Path,
    before: Mapping[str, Any],
    parts: Sequence[str],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """What is known of one model after ``parts`` were measured; or why it was not."""
    found, runtimes = dict(before), before["settings"]["runtimes"]
    try:
        files = prepared(name, folder)
        if "times" in parts:
            found |= times(name, files, runtimes, arguments.seconds, arguments.threads)
        if "errors" in parts:
            found["errors"] = output_errors(files, runtimes, judged(name))
    except (CasesMissingError, OnnxCompressError) as error:
        return {"settings": before["settings"], "skipped": str(error)}
    return found


def write(output: Path | None, facts: Mapping[str, Any], shown: Callable[[Mapping[str, Any]], str]) -> None:
    """The JSON file and the table beside it; a run that is cut off leaves the last ones whole."""
    if output is None:
        return
    for path, text in ((output, json.dumps(facts, indent=1)), (output.with_suffix(".md"), shown(facts))):
        partial = path.with_suffix(".partial")
        partial.write_text(text + "\n")
        partial.replace(path)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Files and data


def prepared(name: str, folder: Path) -> dict[str, Path]:
    """{file: path} of one model; compressed files that are in ``folder`` are used again."""
    original = folder / f"{name}.fp32.onnx"
    if name in ARCHITECTURES:
        if not original.exists():
            onnx.save(build(name), original)
        data: Any = feeds(name, TIMED, seed=1)
        batch = 1
    else:
        case = load_cases()[name]
        original, batch = case.model, 16
        data = list(case.calibration(CALIBRATION, batch))
    files = {"fp32": original}
    for label, target in TARGETS.items():
        if target is None:
            continue
        files[label] = folder / f"{name}.{target}.onnx"
        if not files[label].exists():
            say(f"  compressing for {target}")
            oc.compress(
                original, data, files[label], target=target, batch=batch, benchmark=False, max_drop=None, verify=False
            )
    return files


@cache
def judged(name: str) -> list[Mapping[str, Any]]:
    """Validation samples one by one, as many as are judged; reading them takes an evaluation."""
    return list(batches(name))


def batches(name: str) -> Iterator[Mapping[str, Any]]:
    """Validation samples one by one, as many as are judged."""
    left = JUDGED
    for batch in validation(load_cases()[name]):
        for row in range(len(next(iter(batch.values())))):
            if not left:
                return
            left -= 1
            yield {key: np.ascontiguousarray(value[row : row + 1]) for key, value in batch.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def times(
    name: str, files: Mapping[str, Path], runtimes: Sequence[str], seconds: float, threads: int
) -> dict[str, Any]:
    """One model's rows."""
    random_weights = name in ARCHITECTURES
    data: Any = feeds(name, TIMED) if random_weights else judged(name)[:TIMED]
    result = benchmark_models(
        list(files.values()),
        data,
        runtimes=runtimes,
        threads=threads,
        seconds=seconds,
        output_check=not random_weights,  # what random weights compute does not survive 8 bits
    )
    found: dict[str, Any] = {"errors": float_errors(result)} if random_weights else {}
    return found | {
        "rows": rows(result, list(files)),
        "noise": {
            result.runtimes[result.variants[c.reference].runtime]: [c.result.low, c.result.ratio, c.result.high]
            for c in result.comparisons
            if c.kind == "noise"
        },
        "warnings": list(result.warnings),
        "date": result.environment["date"],
    }


def float_errors(result: MatrixResult) -> dict[str, dict[str, Any]]:
    """{runtime, file: SQNR} of the original on each runtime, which random weights have as well."""
    errors = {}
    for variant in result.variants:
        if variant.model == 0 and variant.outputs:
            first = variant.outputs[0]
            sqnr = None if first.max_abs == 0 else round(first.sqnr_db, 2)
            errors[f"{result.runtimes[variant.runtime]}, fp32"] = {"sqnr_db": sqnr, "samples": result.samples}
    return errors


def output_errors(
    files: Mapping[str, Path], runtimes: Sequence[str], data: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """{runtime, file: SQNR and agreement with the original}, on ONNX Runtime without its optimisations."""
    expected = outputs_of(Session(files["fp32"], optimization="disabled").run, data)
    errors: dict[str, dict[str, Any]] = {}
    for runtime in runtimes:
        for label, path in files.items():
            try:
                opened = get_runtime(runtime).open(path, 0)
                first = compare_outputs(expected, outputs_of(opened.run, data), data)[0]
            except OnnxCompressError:
                continue  # the row of the time has the reason
            sqnr = None if first.max_abs == 0 else round(first.sqnr_db, 2)
            agreement = first.same_argmax if first.score_rows else None
            errors[f"{runtime}, {label}"] = {"sqnr_db": sqnr, "agreement": agreement, "samples": len(data)}
    return errors


def rows(result: MatrixResult, labels: Sequence[str]) -> list[dict[str, Any]]:
    """A row a variant, as JSON."""
    pairs: dict[int, Comparison] = {c.candidate: c for c in result.comparisons if c.kind != "noise"}
    found = []
    for position, variant in enumerate(result.variants):
        label, runtime = labels[variant.model], result.runtimes[variant.runtime]
        row: dict[str, Any] = {"file": label, "runtime": runtime}
        pair = pairs.get(position)
        if variant.timing is not None:
            row["median_s"] = variant.timing.median_s
        if variant.failure is not None:
            row["failure"] = variant.failure.message
        if pair is not None:
            reference = result.variants[pair.reference]
            other = result.runtimes[reference.runtime] if pair.kind == "runtime" else labels[reference.model]
            row |= {"ratio": pair.result.ratio, "low": pair.result.low, "high": pair.result.high, "of": other}
            row["verdict"] = pair.result.verdict
        found.append(row)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The table


def markdown(facts: Mapping[str, Any]) -> str:
    """The table of all models, and below it what is missing and why."""
    lines: list[tuple[str, ...]] = []
    notes: list[str] = []
    for name, model in facts["models"].items():
        if "skipped" in model:
            notes.append(f"{name}: not measured: {model['skipped']}")
        for row in model.get("rows", ()):
            row = {**row, **model.get("errors", {}).get(f"{row['runtime']}, {row['file']}", {})}
            if "failure" in row:
                lines.append((name, row["runtime"], row["file"], "not timed", "", "", "", ""))
                notes.append(f"{name}, {row['file']} on {row['runtime']}: {row['failure']}")
                continue
            speed = f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" if "ratio" in row else ""
            sqnr = "" if "sqnr_db" not in row else "equal" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"
            agreement = "" if row.get("agreement") is None else f"{100 * row['agreement']:.1f} %"
            median = f"{row['median_s'] * 1e3:.3g} ms"
            lines.append((name, row["runtime"], row["file"], median, speed, row.get("of", ""), sqnr, agreement))
    machine, threads = facts.get("environment", {}), facts.get("threads", 1)
    versions = ", ".join(
        f"{name} {machine['versions'][name]}"
        for name in ("onnxruntime", "openvino", "torch")
        if name in machine.get("versions", {})
    )
    about = [f"{machine['cpu']}, {threads} thread{'s' * (threads != 1)}, batch 1; {versions}"] if machine else []
    return "\n\n".join([*about, table(HEAD, lines), *notes])


if __name__ == "__main__":
    main()
