"""How far ``benchmark`` can be trusted on this machine: a model against itself, and against a slightly slower copy.

Against itself the true ratio is 1, so the share of intervals that hold 1 is the coverage; it should be near 95 %. With
``--slower 5`` the candidate gets enough extra operators to be about 5 % slower, and the share of SLOWER verdicts is
what counts. Each trial is a process of its own, as a comparison is for whoever asks for one: in one process memory
would lie about the same in every trial, and the trials would agree better than they should. Run from the root of the
repository, on a machine that does nothing else::

    python benchmarks/aa.py --trials 200 --output benchmarks/results/aa.json
    python benchmarks/aa.py --trials 40 --slower 5 --seconds 30 --output benchmarks/results/aa.json --update
    python benchmarks/aa.py --trials 200 --output benchmarks/results/aa.json --update --minutes 10    # in parts
    python benchmarks/aa.py --markdown benchmarks/results/aa.json

``--trials`` is how many there shall be in the end. The file is written after each; ``--update`` keeps the trials and
the slower copy that it has of the same experiment, and goes on until there are enough or ``--minutes`` are over.

Targets: 1 lies outside of the interval in at most 8 % of the trials (16 of 200), and half of the intervals reach no
further than 2 %; a copy that is 5 % slower is called SLOWER in at least 95 % of the trials. The last line on stdout is
JSON. The exit code is 1 where a target was missed or trials are left.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from common import table
from onnx import TensorProto, helper

from onnxcompress.benchmark import BenchmarkResult, benchmark
from onnxcompress.demo import demo_model_path
from onnxcompress.environment import describe_environment, environment_warnings
from onnxcompress.session import Session

#: share of intervals that may miss 1 where nothing differs, half-width of half of them, share of right verdicts
MISSES_SHARE, HALF_WIDTH, SLOWER_SHARE = 0.08, 0.02, 0.95
#: what the trials of one experiment must share
MACHINE = ("cpu", "instruction_sets", "cores", "usable_cores")
#: what tells experiments apart
ASKED = ("model", "slower_percent", "seconds", "sessions", "seed")
HEAD = ("model", "candidate", "limit, s", "trials", "ratio", "half-width", "spread / claimed", "verdicts", "targets")


@dataclass(frozen=True)
class Trial:
    """One comparison."""

    seed: int
    ratio: float
    low: float
    high: float
    verdict: str
    sessions: int
    pairs: int
    seconds: float
    #: correlation of each session's log ratio with the one before it; None where there are too few
    autocorrelation: float | None
    load_1min: float | None = None

    @classmethod
    def of(cls, result: BenchmarkResult) -> Trial:
        """What is kept of a comparison."""
        return cls(
            seed=result.seed,
            ratio=result.ratio,
            low=result.low,
            high=result.high,
            verdict=result.verdict,
            sessions=result.sessions,
            pairs=result.pairs,
            seconds=result.seconds,
            autocorrelation=autocorrelation(np.log(result.session_ratios)),
            load_1min=result.environment.get("load_1min"),
        )


def autocorrelation(values: np.ndarray) -> float | None:
    """Correlation of the values with those before them; positive: the interval, which takes them for independent, is
    too narrow."""
    centred = values - np.median(values)
    size = float((centred**2).sum())
    return float((centred[1:] * centred[:-1]).sum() / size) if len(values) >= 8 and size > 0 else None


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


def slowed(model: onnx.ModelProto, percent: float, feeds: dict[str, np.ndarray], seconds: float) -> tuple[int, float]:
    """(how many more operators make a copy about ``percent`` % slower, how many % that were): both are measured."""
    operators = 16
    for attempt in range(3):
        result = benchmark(
            model, with_extra_work(model, operators), feeds, seconds=seconds, batch=None, seed=12345 + attempt
        )
        found = 100 * (1 / result.ratio - 1)
        print(f"{operators} more operators: {found:.2f} % slower", flush=True)
        wanted = max(1, round(percent * operators / found)) if found > 0 else 2 * operators
        if wanted == operators or abs(found - percent) < 0.05 * percent:
            break
        operators = wanted
    if abs(found - percent) > 0.5 * percent:
        raise SystemExit(f"no copy is about {percent:g} % slower: {operators} operators make {found:.2f} %")
    return operators, found


def run_trial(reference: str, candidate: str, seconds: float, sessions: int, seed: int, feeds_seed: int) -> Trial:
    """One comparison of two files."""
    feeds = random_feeds(onnx.load(reference), feeds_seed)
    return Trial.of(
        benchmark(reference, candidate, feeds, sessions=sessions, seconds=seconds, batch=None, seed=seed),
    )


def trials(
    reference: onnx.ModelProto,
    candidate: onnx.ModelProto,
    seeds: Sequence[int],
    *,
    seconds: float = 10.0,
    sessions: int = 10,
    feeds_seed: int = 0,
) -> Iterator[Trial]:
    """The same comparison with each of ``seeds``, each in a fresh process; one line a comparison on stdout."""
    with tempfile.TemporaryDirectory(prefix="onnxcompress-aa-") as folder:
        files = [os.path.join(folder, f"{name}.onnx") for name in ("reference", "candidate")]  # noqa: PTH118
        for file, model in zip(files, (reference, candidate), strict=True):
            onnx.save(model, file)
        context = multiprocessing.get_context("spawn")
        for number, seed in enumerate(seeds):
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                trial = pool.submit(run_trial, *files, seconds, sessions, seed, feeds_seed).result()
            print(
                f"{number + 1:3d}: {trial.ratio:.4f} [{trial.low:.4f}, {trial.high:.4f}] {trial.verdict}, "
                f"{trial.sessions} sessions, {trial.pairs} pairs, {trial.seconds:.1f} s",
                flush=True,
            )
            yield trial


def repeat(model: onnx.ModelProto, repetitions: int, *, seconds: float = 10.0) -> list[Trial]:
    """A model against itself, over and over."""
    return list(trials(model, model, range(repetitions), seconds=seconds))


def summary(results: Sequence[Trial]) -> dict[str, Any]:
    """How often the interval holds 1, the verdicts, and how wide the intervals are; JSON types.

    ``spread_over_claimed`` is the spread of the ratios from trial to trial over what the intervals say it is, both as
    standard deviations: above 1 the intervals promise too much.
    """
    half_widths = [(r.high - r.low) / 2 for r in results]
    claimed = statistics.median(math.log(r.high / r.low) for r in results) / (2 * 1.96)
    correlations = [r.autocorrelation for r in results if r.autocorrelation is not None]
    many = len(results) >= 8 and claimed > 0
    spread = float(np.std([math.log(r.ratio) for r in results], ddof=1)) if many else None
    return {
        "repetitions": len(results),
        "covers_1": sum(r.low <= 1.0 <= r.high for r in results),
        "verdicts": dict(Counter(r.verdict for r in results)),
        "ratio_median": round(statistics.median(r.ratio for r in results), 5),
        "ratio_worst": round(max(results, key=lambda r: abs(r.ratio - 1)).ratio, 5),
        "half_width_median": round(statistics.median(half_widths), 5),
        "half_width_worst": round(max(half_widths), 5),
        "spread_over_claimed": None if spread is None else round(spread / claimed, 3),
        "autocorrelation_mean": round(statistics.mean(correlations), 3) if correlations else None,
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


# ----------------------------------------------------------------------------------------------------------------------
# Experiments, which a file keeps


def begun(stored: Mapping[str, Any], arguments: argparse.Namespace, machine: Mapping[str, Any]) -> dict[str, Any]:
    """The experiment that ``arguments`` ask for: as it is in ``stored``, or without trials.

    Raises:
        SystemExit: it was begun on another machine or with other versions.
    """
    named = {
        "model": arguments.model.name,
        "slower_percent": arguments.slower,
        "seconds": arguments.seconds,
        "sessions": arguments.sessions,
        "seed": arguments.seed,
    }
    found: dict[str, Any] | None = next((e for e in stored.get("experiments", ()) if is_same(e, named)), None)
    if found is None:
        return {**named, "operators": None, "measured_percent": None, "environment": dict(machine), "trials": []}
    before = found["environment"]
    differ = [key for key in MACHINE if before[key] != machine[key]]
    differ += [
        name
        for name in ("onnxruntime", "onnxcompress")
        if before["versions"].get(name) != machine["versions"].get(name)
    ]
    if differ:
        raise SystemExit(f"the trials in {arguments.output} differ in {', '.join(differ)}; begin anew without --update")
    return found


def is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """True where both ask for the same."""
    return all(one[key] == other[key] for key in ASKED)


def written(output: Path | None, stored: Mapping[str, Any], experiment: Mapping[str, Any]) -> None:
    """Put ``experiment`` into the file, in the place of the same one where there is one."""
    if output is None:
        return
    everything = list(stored.get("experiments", ()))
    place = next((i for i, other in enumerate(everything) if is_same(other, experiment)), len(everything))
    everything[place : place + 1] = [experiment]
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps({"experiments": everything}, indent=1) + "\n")
    partial.replace(output)


def conduct(experiment: dict[str, Any], arguments: argparse.Namespace, stored: Mapping[str, Any]) -> None:
    """Make the trials that are missing; the experiment and its file grow by each."""
    begin = time.monotonic()
    reference = onnx.load(arguments.model)
    candidate = reference
    if arguments.slower:
        if experiment["operators"] is None:
            feeds = random_feeds(reference, arguments.seed)
            experiment["operators"], percent = slowed(reference, arguments.slower, feeds, arguments.seconds)
            experiment["measured_percent"] = round(percent, 3)
        candidate = with_extra_work(reference, experiment["operators"])
    done = {trial["seed"] for trial in experiment["trials"]}
    seeds = [s for s in range(arguments.seed, arguments.seed + arguments.trials) if s not in done]
    if not seeds:
        return
    wanted = {"seconds": arguments.seconds, "sessions": arguments.sessions, "feeds_seed": arguments.seed}
    for trial in trials(reference, candidate, seeds, **wanted):
        experiment["trials"].append(asdict(trial))
        experiment["summary"] = summary([Trial(**t) for t in experiment["trials"]])
        experiment["targets"] = targets(experiment["summary"], arguments.slower)
        written(arguments.output, stored, experiment)
        if arguments.minutes and time.monotonic() - begin > 60 * arguments.minutes:
            return


def markdown(stored: Mapping[str, Any]) -> str:
    """A row an experiment."""
    rows = []
    for e in stored["experiments"]:
        found = e["summary"]
        held = "; ".join(
            f"{t['measure']} {t['found']:g} ({t['target']}): {'PASS' if t['passed'] else 'FAIL'}" for t in e["targets"]
        )
        candidate = f"{e['measured_percent']:.1f} % slower" if e["slower_percent"] else "itself"
        claimed = "" if found["spread_over_claimed"] is None else f"{found['spread_over_claimed']:.2f}"
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in found["verdicts"].items())
        width = f"{100 * found['half_width_median']:.2f} %"
        cells = (e["model"], candidate, f"{e['seconds']:g}", str(found["repetitions"]), f"{found['ratio_median']:.4f}")
        rows.append((*cells, width, claimed, verdicts, held))
    return table(HEAD, rows)


def main() -> None:
    """Repeat one comparison and count."""
    parser = argparse.ArgumentParser(description="Repeat one comparison and count right and wrong answers.")
    parser.add_argument("--model", type=Path, default=demo_model_path())
    parser.add_argument("--trials", type=int, default=20, help="how many there shall be in the end")
    parser.add_argument("--seconds", type=float, default=10.0, help="limit of one comparison")
    parser.add_argument("--sessions", type=int, default=10, help="least number of sessions of one comparison")
    parser.add_argument("--slower", type=float, default=0.0, metavar="PERCENT", help="slow the candidate down")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="the JSON file that keeps the trials")
    parser.add_argument("--update", action="store_true", help="go on with the trials that --output has")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no further trial after so many; 0: no limit")
    parser.add_argument("--markdown", type=Path, help="print the table of this JSON file and measure nothing")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(json.loads(arguments.markdown.read_text())))
        return
    if arguments.update and arguments.output is None:
        parser.error("--update needs --output")

    environment = describe_environment()
    for warning in environment_warnings(environment, threads=1, integer=False):
        print(f"warning: {warning}")
    stored: dict[str, Any] = {"experiments": []}
    if arguments.output and arguments.output.exists():
        stored = json.loads(arguments.output.read_text())
    experiment = begun(stored if arguments.update else {}, arguments, environment)
    conduct(experiment, arguments, stored)
    for target in experiment["targets"]:
        verdict = "PASS" if target["passed"] else "FAIL"
        print(f"{target['measure']}: {target['found']}, target {target['target']}: {verdict}")
    left = arguments.trials - len(experiment["trials"])
    if left > 0:
        print(f"{left} of {arguments.trials} trials are left; go on with --update")
    print(json.dumps({key: value for key, value in experiment.items() if key != "trials"} | experiment["summary"]))
    raise SystemExit(left > 0 or not all(target["passed"] for target in experiment["targets"]))


if __name__ == "__main__":
    main()
