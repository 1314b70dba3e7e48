"""Channel pruning on real models: points lost against multiply-accumulates and measured time.

Each model is pruned by the command as a process, on unlabelled calibration samples; the written file is judged by the
whole validation split and timed beside the original on one thread. Torch-Pruning and onnxsim prune the same models in
environments of their own, where given. Run from the root of the repository::

    python benchmarks/pruning.py
    python benchmarks/pruning.py --only resnet56 --macs 0.75,0.5 --quick
    python benchmarks/pruning.py --onnxsim ENV/bin/python --torch-pruning ENV/bin/python --plot pruning.html

The models and their data lie in the folder that ONNXCOMPRESS_CASES names (default ../shared/cases). The last line on
stdout is JSON. The exit code is 1 where a target was missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import Case, CasesMissingError, load_cases, run_process, save_samples, table, validation

import onnxcompress as oc
from onnxcompress.environment import describe_environment
from onnxcompress.session import Session
from onnxcompress.shapes import infer_shapes, node_macs

PEERS = Path(__file__).resolve().parent / "peers"
SAMPLES = 1024


@dataclass(frozen=True)
class Job:
    """One case and what is to remain of it, with what it may lose and what time it must gain."""

    case: str
    options: tuple[str, ...]
    #: share of multiply-accumulates, None where the options say something else
    macs: float | None
    #: most points of the metric
    points: float | None = None
    #: least agreement with the original
    agreement: float | None = None
    #: least factor by which it is faster on one thread
    faster: float | None = None
    seconds: float | None = None
    peak_mib: float | None = None


def by_macs(case: str, share: float, **targets: Any) -> Job:
    """A job that is given a share of the multiply-accumulates."""
    return Job(case, ("--macs", str(share)), share, **targets)


JOBS = (
    by_macs("resnet56", 0.75, points=0.4),
    by_macs("resnet56", 0.5, points=3.6, faster=1.45, seconds=90.0, peak_mib=3072.0),
    by_macs("resnet20", 0.75, points=2.2),
    by_macs("resnet20", 0.5, points=10.0),
    by_macs("mobilenetv2_cifar10", 0.67, points=4.0),
    by_macs("squeezenet1.1", 0.72, agreement=0.72),
    Job("minilm", ("--ffn", "0.7", "--heads", "0.75"), None, points=2.0),
)


@dataclass(frozen=True)
class Row:
    """What one tool made of one case."""

    tool: str
    case: str
    asked: str
    macs: float
    dense: float
    metric: float
    agreement: float | None
    speed: float
    speed_interval: tuple[float, float]
    seconds: float
    peak_mib: float
    missed: tuple[str, ...] = ()

    @property
    def points(self) -> float:
        """Points of the metric that are lost."""
        return 100 * (self.dense - self.metric)


@dataclass
class Bench:
    """One run: where it works, what it found, and what was left out."""

    folder: Path
    quick: bool
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def samples(self, case: Case) -> Path:
        """The calibration samples of ``case`` as a file; texts are filled up to one length."""
        path = self.folder / f"{case.name}.npz"
        if not path.exists():
            batches = list(case.calibration(256 if self.quick else SAMPLES, 64))
            arrays = {}
            for name in batches[0]:
                values = [batch[name] for batch in batches]
                longest = max(value.shape[1] for value in values)
                if values[0].ndim == 2:
                    values = [np.pad(value, ((0, 0), (0, longest - value.shape[1]))) for value in values]
                arrays[name] = np.concatenate(values)
            save_samples(path, arrays)
        return path

    def ours(self, case: Case, job: Job) -> Row:
        """Prune by the command, as a process."""
        output = self.folder / f"{case.name}{'_'.join(job.options)}.onnx"
        command = [sys.executable, "-m", "onnxcompress", "prune_channels", case.model, "--data", self.samples(case)]
        run = run_process([*command, *job.options, "-o", output])
        return self.judged("onnxcompress", case, job, output, run.seconds, run.peak_mib)

    def peer(self, tool: str, python: str, case: Case, job: Job) -> Row | None:
        """Prune by another tool in its own environment; None where it has no answer, which is noted."""
        output = self.folder / f"{case.name}_{tool}_{job.macs}.onnx"
        script = PEERS / f"prune_{tool.replace('-', '_')}.py"
        try:
            run = run_process([python, script, case.model, self.samples(case), str(job.macs), output])
            return self.judged(tool, case, job, output, run.seconds, run.peak_mib)
        except (SystemExit, oc.OnnxCompressError) as error:
            self.skipped.append(f"{tool}, {case.name} at {job.macs}: {str(error).splitlines()[-1][:160]}")
            return None

    def judged(self, tool: str, case: Case, job: Job, output: Path, seconds: float, peak: float) -> Row:
        """Metric, agreement and time of the file ``output``."""
        dense, pruned = Session(case.model), Session(output)
        batches = validation(case)
        first = dense.output_names[0]
        same, rows = 0, 0
        for feeds in batches:
            a, b = (np.asarray(s.run(feeds)[name]) for s, name in ((dense, first), (pruned, pruned.output_names[0])))
            same += int((a.argmax(-1) == b.argmax(-1)).sum())
            rows += len(a)
        sample = {name: value[:1] for name, value in batches[0].items()}
        time = oc.benchmark(case.model, output, [sample], seconds=2 if self.quick else 10)
        whole = macs(case.model)
        metric = {
            "dense": case.evaluate(dense.run),
            "metric": case.evaluate(pruned.run),
            "agreement": same / rows if case.name != "minilm" else None,
        }
        row = Row(
            tool,
            case.name,
            " ".join(job.options) if tool == "onnxcompress" else f"macs {job.macs}",
            macs(output) / whole,
            speed=time.ratio,
            speed_interval=(time.low, time.high),
            seconds=seconds,
            peak_mib=peak,
            **metric,
        )
        return Row(**{**asdict(row), "missed": missed(row, job) if tool == "onnxcompress" else ()})


def missed(row: Row, job: Job) -> tuple[str, ...]:
    """The targets that ``row`` misses, in words."""
    found = []
    if job.macs is not None and row.macs > job.macs:
        found.append(f"MACs <= {job.macs}")
    if job.points is not None and row.points > job.points:
        found.append(f"points <= {job.points}")
    if job.agreement is not None and (row.agreement or 0.0) < job.agreement:
        found.append(f"agreement >= {job.agreement}")
    if job.faster is not None and row.speed < job.faster:
        found.append(f"time >= {job.faster}x")
    if job.seconds is not None and row.seconds > job.seconds:
        found.append(f"seconds <= {job.seconds}")
    if job.peak_mib is not None and row.peak_mib > job.peak_mib:
        found.append(f"MiB <= {job.peak_mib}")
    return tuple(found)


def macs(model: Path) -> int:
    """Multiply-accumulates of a file."""
    graph = oc.load(model)
    return sum(node_macs(graph, infer_shapes(graph)).values())


def printed(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    head = ("tool", "case", "asked", "MACs", "metric", "points lost", "agreement", "time", "seconds", "MiB", "")
    cells = [
        (
            row.tool,
            row.case,
            row.asked,
            f"{row.macs:.3f}",
            f"{row.dense:.4f} -> {row.metric:.4f}",
            f"{row.points:.2f}",
            "" if row.agreement is None else f"{row.agreement:.1%}",
            f"{row.speed:.2f}x [{row.speed_interval[0]:.2f}, {row.speed_interval[1]:.2f}]",
            f"{row.seconds:.1f}",
            f"{row.peak_mib:.0f}",
            "" if row.tool != "onnxcompress" else f"FAIL: {', '.join(row.missed)}" if row.missed else "PASS",
        )
        for row in rows
    ]
    return table(head, cells)


def plot(rows: Sequence[Row], path: Path) -> str | None:
    """Points lost against multiply-accumulates and time, as one HTML page; why there is none, or None."""
    try:
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots
    except ImportError:
        return "no plot: plotly is not installed; pip install 'onnxcompress[report]'"
    figure = make_subplots(1, 2, shared_yaxes=True, subplot_titles=("MACs left", "time left, one thread"))
    for key in sorted({(row.tool, row.case) for row in rows}):
        own = sorted((row for row in rows if (row.tool, row.case) == key), key=lambda row: row.macs)
        points = [row.points for row in own]
        name = " ".join(key)
        for column, values in ((1, [row.macs for row in own]), (2, [1 / row.speed for row in own])):
            figure.add_trace(go.Scatter(x=values, y=points, name=name, showlegend=column == 1), 1, column)
    figure.update_yaxes(title_text="points lost", col=1)
    path.write_text(figure.to_html(include_plotlyjs=True), encoding="utf-8")
    return None


def main() -> int:
    """Run what was asked for; 1 where a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases, by comma")
    parser.add_argument("--macs", default="", help="other shares for all cases that are given one, by comma")
    parser.add_argument("--quick", action="store_true", help="fewer samples and shorter timings")
    parser.add_argument("--onnxsim", metavar="PYTHON", help="interpreter that has onnxsim")
    parser.add_argument("--torch-pruning", metavar="PYTHON", help="interpreter that has torch-pruning and onnx2torch")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--plot", type=Path, help="write a plot here, an HTML page")
    given = parser.parse_args()
    jobs = [job for job in JOBS if not given.only or job.case in given.only.split(",")]
    if given.macs:
        cases = dict.fromkeys(job.case for job in jobs if job.macs is not None)
        jobs = [by_macs(case, float(share)) for case in cases for share in given.macs.split(",")]
    with tempfile.TemporaryDirectory(prefix="onnxcompress-pruning-") as folder:
        bench = Bench(Path(folder), given.quick)
        try:
            cases_by_name = load_cases()
        except CasesMissingError as error:
            bench.skipped.append(str(error))
            jobs = []
        peers = {"onnxsim": given.onnxsim, "torch-pruning": given.torch_pruning}
        bench.skipped += [f"{tool}: not given, see --{tool}" for tool, python in peers.items() if not python]
        for job in jobs:
            case = cases_by_name[job.case]
            print(f"pruning {case.name} {' '.join(job.options)}", file=sys.stderr)
            bench.rows.append(bench.ours(case, job))
            if job.macs is not None:
                found = [bench.peer(tool, python, case, job) for tool, python in peers.items() if python]
                bench.rows += [row for row in found if row is not None]
    print(printed(bench.rows))
    if given.plot is not None and (reason := plot(bench.rows, given.plot)):
        bench.skipped.append(reason)
    for line in bench.skipped:
        print(f"skipped: {line}")
    result = {
        "rows": [{**asdict(row), "points": row.points} for row in bench.rows],
        "skipped": bench.skipped,
        "environment": describe_environment(),
        "commit": commit(),
    }
    text = json.dumps(result)
    if given.output is not None:
        given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(text)
    return int(any(row.missed for row in bench.rows))


def commit() -> str | None:
    """The commit that is measured; None outside of a repository."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
