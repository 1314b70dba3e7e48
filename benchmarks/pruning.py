"""Channel pruning on real models: points lost against multiply-accumulates and measured time.

Each model is pruned by the command as a process, on unlabelled calibration samples; the written file is judged by the
whole validation split and timed beside the original on one thread. Torch-Pruning and onnxsim prune the same models in
environments of their own, where given. Run from the root of the repository::

    python benchmarks/pruning.py
    python benchmarks/pruning.py --only resnet56-0.5 --shares 0.9,0.6 --quick
    python benchmarks/pruning.py --output benchmarks/results/pruning.json --update --only minilm
    python benchmarks/pruning.py --onnxsim ENV/bin/python --torch-pruning ENV/bin/python --plot pruning.svg
    python benchmarks/pruning.py --markdown benchmarks/results/pruning.json

The models and their data lie in the folder that ONNXCOMPRESS_CASES names (default ../shared/cases). The last line on
stdout is JSON. The exit code is 1 where a target was missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from bench import Bench, Row, interval, main, measured_on, other_rows, revision, say, target_summary, timing
from common import Case, measure_process, run_process, save_samples, table

import onnxcompress as oc
from onnxcompress.environment import describe_environment
from onnxcompress.session import Session
from onnxcompress.shapes import infer_shapes, node_macs

PEERS = Path(__file__).resolve().parent / "peers"
SAMPLES = 1024
OURS = "onnxcompress"


@dataclass(frozen=True)
class Bound:
    """What a figure must reach, and what is aimed at."""

    must: float
    aim: float | None = None


@dataclass(frozen=True)
class Job:
    """One case and what is to remain of it, with its targets."""

    case: str
    #: share of multiply-accumulates, None where the options say something else
    macs: float | None
    options: tuple[str, ...] = ()
    #: most points of the metric that may be lost
    points: Bound | None = None
    #: least agreement with the original
    agreement: Bound | None = None
    #: least factor by which it is faster on one thread
    faster: Bound | None = None
    #: most seconds and MiB of the whole command
    seconds: Bound | None = None
    peak_mib: Bound | None = None
    #: most further points that INT8 may take from the pruned file
    int8: Bound | None = None

    @property
    def asked(self) -> tuple[str, ...]:
        """Options of the command."""
        return self.options if self.macs is None else ("--macs", f"{self.macs:g}", *self.options)


JOBS = {
    "resnet56-0.75": Job("resnet56", 0.75, points=Bound(0.4, 0.1)),
    "resnet56-0.5": Job(
        "resnet56",
        0.5,
        points=Bound(3.6, 2.0),
        faster=Bound(1.45, 1.6),
        seconds=Bound(90.0, 45.0),
        peak_mib=Bound(3072.0, 2048.0),
        int8=Bound(0.3, 0.0),
    ),
    "resnet20-0.75": Job("resnet20", 0.75, points=Bound(2.2, 1.6)),
    "resnet20-0.5": Job("resnet20", 0.5, points=Bound(10.0, 8.0)),
    "mobilenetv2-0.67": Job("mobilenetv2_cifar10", 0.67, points=Bound(4.0, 2.5)),
    "squeezenet-0.72": Job("squeezenet1.1", 0.72, agreement=Bound(0.72, 0.8)),
    "minilm": Job("minilm", None, ("--ffn", "0.7", "--heads", "0.75"), points=Bound(2.0, 1.0)),
}
#: whose first output is an embedding: its largest element says nothing
EMBEDDINGS = ("minilm",)


class Pruning(Bench):
    """The parts of this script: a job each."""

    PARTS = tuple(JOBS)

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Further shares, and where peers are."""
        parser.add_argument("--shares", type=_shares, default=(), metavar="X,...", help="further shares of the MACs")
        parser.add_argument("--onnxsim", metavar="PYTHON", help="interpreter that has onnxsim")
        parser.add_argument("--torch-pruning", metavar="PYTHON", help="interpreter with torch-pruning and onnx2torch")
        parser.add_argument("--no-times", action="store_true", help="leave the timing out")
        parser.add_argument("--plot", type=Path, help="draw points lost against MACs and time, an SVG file")

    @cached_property
    def peers(self) -> dict[str, str]:
        """{tool: interpreter} of those that are given."""
        given = {"onnxsim": self.options.onnxsim, "torch-pruning": self.options.torch_pruning}
        return {tool: python for tool, python in given.items() if python}

    def part(self, name: str) -> None:
        """One job: ours against its targets, other shares of the same case, peers."""
        job = JOBS[name]
        case = self.cases[job.case]
        records = [own := self.ours(case, job)]
        self.hold(name, job, own)
        if job.macs is not None:
            records += [self.peer(tool, python, case, job.macs) for tool, python in self.peers.items()]
            known = {each.macs for each in JOBS.values() if each.case == job.case}
            records += [self.ours(case, Job(job.case, share)) for share in self.options.shares if share not in known]
        self.details.setdefault("jobs", {})[name] = records
        if job.int8 is not None:
            self.quantised(name, job, own)

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

    def output(self, job: Job) -> Path:
        """Where our file of ``job`` goes."""
        return self.folder / f"{job.case}{''.join(job.asked)}.onnx"

    def ours(self, case: Case, job: Job) -> dict[str, Any]:
        """Prune by the command, as a process."""
        command = [sys.executable, "-m", "onnxcompress", "prune_channels", case.model, "--data", self.samples(case)]
        run = run_process([*command, *job.asked, "-o", self.output(job)])
        record = self.judged(OURS, case, self.output(job), " ".join(job.asked).replace("--", ""))
        return self.told(record | {"seconds": run.seconds, "peak_mib": run.peak_mib})

    def peer(self, tool: str, python: str, case: Case, share: float) -> dict[str, Any]:
        """Prune by another tool in its own environment; a failure is a row with its reason."""
        output = self.folder / f"{case.name}_{tool}_{share}.onnx"
        script = PEERS / f"prune_{tool.replace('-', '_')}.py"
        asked = f"macs {share:g}"
        run = measure_process([python, script, case.model, self.samples(case), f"{share:g}", output])
        try:
            if run.code != 0:
                raise oc.OnnxCompressError((run.stderr.strip() or "no answer").splitlines()[-1][:160])
            record = self.judged(tool, case, output, asked)
        except oc.OnnxCompressError as error:
            record = self.labelled(tool, case.name, asked) | {"failure": str(error)}
        return self.told(record | {"seconds": run.seconds, "peak_mib": run.peak_mib})

    def told(self, record: dict[str, Any]) -> dict[str, Any]:
        """``record``, printed."""
        say("     " + " | ".join(cells(record)))
        return record

    def labelled(self, tool: str, case: str, asked: str) -> dict[str, Any]:
        """What a row of ``tool`` begins with."""
        machine = describe_environment()
        revised = revision() if tool == OURS else None
        where = {"cpu": machine["cpu"], "date": machine["date"][:10], "revision": revised, "quick": self.quick}
        return {"tool": tool, "case": case, "asked": asked, "failure": "", **where}

    def judged(self, tool: str, case: Case, output: Path, asked: str) -> dict[str, Any]:
        """Metric, agreement and time of the file ``output``."""
        dense, pruned = Session(case.model), Session(output)
        batches = self.validation(case.name)
        pairs = ((self._first(dense, feeds), self._first(pruned, feeds)) for feeds in batches)
        same = np.concatenate([a.argmax(-1) == b.argmax(-1) for a, b in pairs])
        before, after = case.evaluate(dense.run), case.evaluate(pruned.run)
        record = {
            "macs": macs(output) / macs(case.model),
            "dense": before,
            "metric": after,
            "points": 100 * (before - after),
            "agreement": None if case.name in EMBEDDINGS else float(same.mean()),
        }
        if not self.options.no_times:
            sample = {name: value[:1] for name, value in batches[0].items()}
            time = oc.benchmark(case.model, output, [sample], seconds=2 if self.quick else 10)
            record["dense_over_this"] = timing(time)
            record["interval"] = interval(time)
        return self.labelled(tool, case.name, asked) | record

    def _first(self, session: Session, feeds: Mapping[str, Any]) -> Any:
        return np.asarray(session.run(feeds)[session.output_names[0]])

    def hold(self, name: str, job: Job, record: Mapping[str, Any]) -> None:
        """Ours against the targets of its job."""
        if job.macs is not None:
            self.add(name, job.case, "MACs left", record["macs"], f"{record['macs']:.3f}", most=job.macs)
        if job.points is not None:
            text = f"{record['points']:.2f} ({record['dense']:.4f} -> {record['metric']:.4f})"
            self.bounded(name, job.case, "points lost", record["points"], text, job.points)
        if job.agreement is not None:
            share = record["agreement"]
            self.bounded(name, job.case, "agreement", share, f"{share:.1%}", job.agreement, least=True)
        if job.faster is not None and "dense_over_this" in record:
            value, text = record["dense_over_this"]["ratio"], record["interval"]
            self.bounded(name, job.case, "speed, one thread", value, text, job.faster, least=True)
        if job.seconds is not None:
            value = record["seconds"]
            self.bounded(name, job.case, "seconds of the command", value, f"{value:.1f}", job.seconds)
        if job.peak_mib is not None:
            value = record["peak_mib"]
            self.bounded(name, job.case, "peak, MiB", value, f"{value:.0f}", job.peak_mib)

    def quantised(self, name: str, job: Job, record: Mapping[str, Any]) -> None:
        """What INT8 takes beyond pruning: the plain ``compress`` of the pruned file."""
        assert job.int8 is not None
        case = self.cases[job.case]
        output = self.output(job).with_suffix(".int8.onnx")
        command = [sys.executable, "-m", "onnxcompress", "compress", self.output(job), "--data", self.samples(case)]
        run_process([*command, "--no-benchmark", "-o", output])
        metric = case.evaluate(Session(output).run)
        lost = 100 * (record["metric"] - metric)
        text = f"{lost:.2f} ({record['metric']:.4f} -> {metric:.4f})"
        self.bounded(name, job.case, "points that INT8 takes after it", lost, text, job.int8)

    def bounded(
        self, part: str, case: str, measure: str, value: float, text: str, bound: Bound, *, least: bool = False
    ) -> None:
        """Record a figure with its bound."""
        ends = {"least": bound.must} if least else {"most": bound.must}
        self.add(part, case, measure, value, text, aim=bound.aim, **ends)

    # -- earlier runs, tables -----------------------------------------------------------------------------------------

    @classmethod
    def merge(cls, earlier: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
        """``facts`` with what was not run taken from an ``earlier`` run on this machine.

        A peer's row does not depend on our commit, and says its own date. Ours is kept only at the same commit.
        """
        current = earlier["revision"] == facts["revision"] and earlier["quick"] == facts["quick"]

        def holds(record: Mapping[str, Any]) -> bool:
            own = record["tool"] == OURS and record["revision"] != facts["revision"]
            return not own and record["cpu"] == facts["environment"]["cpu"] and record["quick"] == facts["quick"]

        jobs = {}
        for name in cls.PARTS:
            new = facts["details"].get("jobs", {}).get(name, [])
            measured = {(record["tool"], record["asked"]) for record in new}
            old = [r for r in earlier["details"].get("jobs", {}).get(name, []) if holds(r)]
            jobs[name] = new + [r for r in old if (r["tool"], r["asked"]) not in measured]
        ran = {row["part"] for row in facts["rows"]}
        rows = [row for row in earlier["rows"] if current and row["part"] not in ran] + facts["rows"]
        rows.sort(key=lambda row: cls.PARTS.index(row["part"]))
        load = earlier["load_1min"] if current else {}
        kept = {name: records for name, records in jobs.items() if records}
        return facts | {"rows": rows, "details": {"jobs": kept}, "load_1min": load | facts["load_1min"]}

    @classmethod
    def markdown(cls, facts: Mapping[str, Any]) -> str:
        """The figures as they stand in README.md."""
        rows = [Row(**row) for row in facts["rows"]]
        records = [cells(record) for each in facts["details"].get("jobs", {}).values() for record in each]
        parts = [measured_on(facts, "pruning.py"), NOTE, table(HEAD, records, aligned=False), *other_rows(rows)]
        return "\n\n".join([*parts, target_summary(rows)])

    def run(self, parts: Sequence[str]) -> None:
        """See :class:`Bench`; then the plot."""
        super().run(parts)
        if self.options.plot is not None:
            plot([r for each in self.details.get("jobs", {}).values() for r in each], self.options.plot)


HEAD = ("case", "tool", "asked", "MACs", "metric", "points lost", "agreement", "time dense / this", "seconds", "MiB")
NOTE = (
    "Pruned on at most 1,024 unlabelled training samples (120 for squeezenet1.1), nothing is trained; judged on the "
    "whole validation split. Agreement: same argmax as the original. Time: one thread, batch 1, paired, 95 % interval. "
    "Seconds and peak: of the whole process."
)


def cells(record: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    first = (record["case"], record["tool"], record["asked"])
    last = (f"{record['seconds']:.1f}", f"{record['peak_mib']:.0f}")
    if record["failure"]:
        return (*first, f"fails: {record['failure']}".replace("|", "/"), "", "", "", "", *last)
    return (
        *first,
        f"{record['macs']:.3f}",
        f"{record['dense']:.4f} -> {record['metric']:.4f}",
        f"{record['points']:.2f}",
        "" if record["agreement"] is None else f"{record['agreement']:.1%}",
        record.get("interval", ""),
        *last,
    )


def macs(model: Path) -> int:
    """Multiply-accumulates of a file."""
    graph = oc.load(model)
    return sum(node_macs(graph, infer_shapes(graph)).values())


def plot(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Points lost against multiply-accumulates and time, one line a tool and case."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for label, own in _lines(records):
        for axis, key in zip(axes, ("macs", "time"), strict=True):
            points = sorted((r["macs"] if key == "macs" else _time_left(r), r["points"]) for r in own)
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1, label=label)
    for axis, words in zip(axes, ("MACs left", "time left, one thread"), strict=True):
        axis.set_xlabel(words)
        axis.grid(visible=True, color="#e3e7ec")
    axes[0].set_ylabel("points lost")
    axes[0].set_yscale("symlog", linthresh=1)
    axes[1].legend(fontsize=7, frameon=False)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pruning"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def _lines(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    timed = [record for record in records if not record["failure"] and "dense_over_this" in record]
    for tool, case in dict.fromkeys((record["tool"], record["case"]) for record in timed):
        yield f"{case}, {tool}", [record for record in timed if (record["tool"], record["case"]) == (tool, case)]


def _time_left(record: Mapping[str, Any]) -> float:
    return 1 / float(record["dense_over_this"]["ratio"])


def _shares(text: str) -> tuple[float, ...]:
    """``0.9,0.6``."""
    try:
        found = tuple(float(share) for share in text.split(","))
    except ValueError:
        found = (0.0,)
    if not all(0 < share <= 1 for share in found):
        raise argparse.ArgumentTypeError(f"{text!r}; expected shares between 0 and 1, as in 0.9,0.6")
    return found


if __name__ == "__main__":
    sys.exit(main(Pruning, "Prune real models beside peers and hold what is left against its targets."))
