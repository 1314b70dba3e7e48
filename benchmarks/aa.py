"""How far ``benchmark`` can be trusted on this machine: a model against itself, and against a slightly slower copy.

Against itself the true ratio is 1, so the share of intervals that hold 1 is the coverage; it should be near 95 %. With
``--slower 5`` the candidate gets enough extra operators to be about 5 % slower, and the share of SLOWER verdicts is
what counts. Run from the root of the repository, on a machine that does nothing else::

    python benchmarks/aa.py --trials 200
    python benchmarks/aa.py --trials 40 --slower 5 --seconds 30 --model resnet20.onnx

Targets: 1 lies outside of the interval in at most 8 % of the trials (16 of 200), and half of the intervals reach no
further than 2 %; a copy that is 5 % slower is called SLOWER in at least 95 % of the trials. The last line on stdout is
JSON. The exit code is 1 where a target was missed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxcompress.benchmark import BenchmarkResult, benchmark
from onnxcompress.demo import demo_model_path
from onnxcompress.environment import describe_environment, environment_warnings
from onnxcompress.session import Session

#: share of intervals that may miss 1 where nothing differs, half-width of half of them, share of right verdicts
MISSES_SHARE, HALF_WIDTH, SLOWER_SHARE = 0.08, 0.02, 0.95


def random_feeds(model: onnx.ModelProto, seed: int) -> dict[str, np.ndarray]:
    """One sample of uniform values for models whose inputs are float; free dimensions become 1."""
    generator = np.random.default_rng(seed)
    feeds = {}
    for spec in Session(model).input_specs():
        if spec.dtype.kind != "f" or spec.shape is None:
            raise SystemExit(f"input {spec.name!r} is {spec.dtype}; this script feeds float inputs of known rank only")
        shape = [d if isinstance(d, int) else 1 for d in spec.shape]
        feeds[spec.name] = generator.random(shape).astype(spec.dtype)
    return feeds


def with_extra_work(model: onnx.ModelProto, operators: int) -> onnx.ModelProto:
    """A copy that computes ``operators`` times Erf of the first input in a row, and gives it as one more output."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    initializers = {i.name for i in copy.graph.initializer}
    source = next(i for i in copy.graph.input if i.name not in initializers)
    name = source.name
    for number in range(operators):
        copy.graph.node.append(helper.make_node("Erf", [name], [f"extra_work_{number}"]))
        name = f"extra_work_{number}"
    copy.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return copy


def slowed(model: onnx.ModelProto, percent: float, feeds: dict[str, np.ndarray], seconds: float) -> onnx.ModelProto:
    """A copy about ``percent`` % slower; how many operators that takes is measured."""
    trial = 16
    result = benchmark(model, with_extra_work(model, trial), feeds, seconds=seconds, batch=None, seed=12345)
    per_operator = (1 / result.ratio - 1) / trial
    if per_operator <= 0:
        raise SystemExit(f"{trial} more operators did not show in {seconds} s; give more --seconds")
    operators = max(1, round(percent / 100 / per_operator))
    print(f"{operators} more operators at {per_operator:.2%} each")
    return with_extra_work(model, operators)


def repeat(
    reference: onnx.ModelProto,
    candidate: onnx.ModelProto,
    feeds: dict[str, np.ndarray],
    repetitions: int,
    *,
    seconds: float = 10.0,
    sessions: int = 10,
    seed: int = 0,
) -> list[BenchmarkResult]:
    """The same comparison over and over, each with a seed of its own; one line a comparison on stdout."""
    results: list[BenchmarkResult] = []
    for number in range(repetitions):
        result = benchmark(
            reference, candidate, feeds, sessions=sessions, seconds=seconds, batch=None, seed=seed + number
        )
        results.append(result)
        print(
            f"{number + 1:3d}: {result.ratio:.4f} [{result.low:.4f}, {result.high:.4f}] {result.verdict}, "
            f"{result.sessions} sessions, {result.pairs} pairs, {result.seconds:.1f} s",
            flush=True,
        )
    return results


def summary(results: Sequence[BenchmarkResult]) -> dict[str, Any]:
    """How often the interval holds 1, the verdicts, and how wide the intervals are; JSON types."""
    half_widths = [(r.high - r.low) / 2 for r in results]
    return {
        "repetitions": len(results),
        "covers_1": sum(r.low <= 1.0 <= r.high for r in results),
        "verdicts": dict(Counter(r.verdict for r in results)),
        "ratio_median": round(statistics.median(r.ratio for r in results), 5),
        "ratio_worst": round(max(results, key=lambda r: abs(r.ratio - 1)).ratio, 5),
        "half_width_median": round(statistics.median(half_widths), 5),
        "half_width_worst": round(max(half_widths), 5),
        "seconds_median": round(statistics.median(r.seconds for r in results), 2),
    }


def targets(found: Mapping[str, Any], slower: float) -> list[dict[str, Any]]:
    """What :func:`summary` found held against the targets: {measure, found, target, passed} each."""
    trials = found["repetitions"]
    if slower:
        called, least = found["verdicts"].get("SLOWER", 0), math.ceil(SLOWER_SHARE * trials)
        return [
            {
                "measure": "called SLOWER",
                "found": called,
                "target": f">= {least} of {trials}",
                "passed": called >= least,
            }
        ]
    misses, most = trials - found["covers_1"], math.floor(MISSES_SHARE * trials)
    width = found["half_width_median"]
    return [
        {
            "measure": "intervals without 1",
            "found": misses,
            "target": f"<= {most} of {trials}",
            "passed": misses <= most,
        },
        {"measure": "median half-width", "found": width, "target": f"<= {HALF_WIDTH}", "passed": width <= HALF_WIDTH},
    ]


def main() -> None:
    """Repeat one comparison and count."""
    parser = argparse.ArgumentParser(description="Repeat one comparison and count right and wrong answers.")
    parser.add_argument("--model", type=Path, default=demo_model_path())
    parser.add_argument("--trials", "--repetitions", dest="repetitions", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=10.0, help="limit of one comparison")
    parser.add_argument("--sessions", type=int, default=10, help="least number of sessions of one comparison")
    parser.add_argument("--slower", type=float, default=0.0, metavar="PERCENT", help="slow the candidate down")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    environment = describe_environment()
    for warning in environment_warnings(environment, threads=1, integer=False):
        print(f"warning: {warning}")
    reference = onnx.load(arguments.model)
    feeds = random_feeds(reference, arguments.seed)
    candidate = reference
    if arguments.slower:
        candidate = slowed(reference, arguments.slower, feeds, arguments.seconds)
    results = repeat(
        reference,
        candidate,
        feeds,
        arguments.repetitions,
        seconds=arguments.seconds,
        sessions=arguments.sessions,
        seed=arguments.seed,
    )
    found = summary(results)
    held = targets(found, arguments.slower)
    for target in held:
        verdict = "PASS" if target["passed"] else "FAIL"
        print(f"{target['measure']}: {target['found']}, target {target['target']}: {verdict}")
    facts = {
        "model": arguments.model.name,
        "slower_percent": arguments.slower,
        **found,
        "targets": held,
        "environment": environment,
    }
    print(json.dumps(facts))
    raise SystemExit(not all(target["passed"] for target in held))


if __name__ == "__main__":
    main()
