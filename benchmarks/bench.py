"""A benchmark script in parts: figures with their targets, what is printed of them, and the command line.

A script derives from :class:`Bench`, lists its parts, and has a method a part.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from common import Case, CasesMissingError, load_cases, table, validation

import onnxcompress as oc
from onnxcompress.environment import describe_environment

__all__ = [
    "Bench",
    "Row",
    "interval",
    "main",
    "measured_on",
    "other_rows",
    "revision",
    "rounded",
    "say",
    "some_of",
    "target_summary",
    "timing",
]


@dataclass(frozen=True)
class Row:
    """One figure: what was measured on what, its target in words, and whether that was met (None: no target)."""

    part: str
    case: str
    measure: str
    value: float
    #: the value as it is printed, with what is needed to read it
    text: str
    target: str = ""
    passed: bool | None = None
    #: whether what is aimed at beyond the target was reached (None: nothing is)
    aim: bool | None = None

    @property
    def verdict(self) -> str:
        """PASS, FAIL, or nothing; and what became of the aim."""
        aim = {True: ", aim met", False: ", aim missed", None: ""}[self.aim]
        return {True: "PASS", False: "FAIL", None: ""}[self.passed] + aim


@dataclass
class Bench:
    """One run: its options, what several parts need, and what was found."""

    #: names of the parts, in order
    PARTS: ClassVar[tuple[str, ...]] = ()
    #: those of them that run only where they are named
    ON_REQUEST: ClassVar[tuple[str, ...]] = ()

    folder: Path
    options: argparse.Namespace
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    #: measured values by part, for the JSON
    details: dict[str, Any] = field(default_factory=dict)
    #: load average of the machine when each part began
    load: dict[str, float | None] = field(default_factory=dict)

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Add the options that only this script has."""

    @classmethod
    def merge(cls, earlier: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
        """``facts`` with the parts that were not run taken from an ``earlier`` run.

        Raises:
            SystemExit: the earlier run was on another machine or commit.
        """
        same = all(earlier["environment"][key] == facts["environment"][key] for key in ("cpu", "versions", "python"))
        if not same or earlier["revision"] != facts["revision"] or earlier["quick"] != facts["quick"]:
            raise SystemExit(
                "the earlier run is of another machine, version, commit or kind of run; run all parts again"
            )
        ran = {row["part"] for row in facts["rows"]}
        rows = [row for row in earlier["rows"] if row["part"] not in ran] + facts["rows"]
        rows.sort(key=lambda row: cls.PARTS.index(row["part"]))
        return facts | {
            "rows": rows,
            "details": earlier["details"] | facts["details"],
            "load_1min": earlier["load_1min"] | facts["load_1min"],
        }

    @classmethod
    def markdown(cls, facts: Mapping[str, Any]) -> str:
        """The figures as they stand in README.md."""
        raise NotImplementedError

    @property
    def quick(self) -> bool:
        """True where the figures may be rough."""
        return bool(self.options.quick)

    @cached_property
    def cases(self) -> Mapping[str, Case]:
        """All cases; raises CasesMissingError."""
        return load_cases()

    def validation(self, name: str) -> list[dict[str, Any]]:
        """The validation split of a case; kept in memory for the last case only."""
        if self._validation[0] != name:
            self._validation = (name, validation(self.cases[name]))
        return self._validation[1]

    _validation: tuple[str, list[dict[str, Any]]] = ("", [])

    def add(
        self,
        part: str,
        case: str,
        measure: str,
        value: float,
        text: str,
        *,
        least: float | None = None,
        most: float | None = None,
        target: str = "",
        aim: float | None = None,
    ) -> None:
        """Record a figure; ``least`` and ``most`` bound the values that are good, ``aim`` those that are hoped for."""
        passed = None
        if least is not None or most is not None:
            passed = (least is None or value >= least) and (most is None or value <= most)
            target = target or (f">= {least:g}" if least is not None else f"<= {most:g}")
        reached = None if aim is None else value >= aim if most is None else value <= aim
        if aim is not None:
            target += f"; aim {aim:g}"
        row = Row(part, case, measure, float(value), text, target, passed, reached)
        self.rows.append(row)
        say(f"{row.verdict or '    '} {part}, {case}: {measure} {text} {row.target}".rstrip())

    def run(self, parts: Sequence[str]) -> None:
        """Run ``parts`` in order; those that need the cases are skipped where the cases are missing."""
        for part in parts:
            machine = describe_environment()
            self.load[part] = machine["load_1min"]
            if (machine["load_1min"] or 0) > 2 * (machine["usable_cores"] or 1):
                say(f"the load average is {machine['load_1min']}: the times of {part} will be rough")
            try:
                self.part(part)
            except CasesMissingError as error:
                self.skipped.append(part)
                say(f"skipped {part}: {error}")

    def part(self, name: str) -> None:
        """Run one part: the method of that name."""
        getattr(self, name)()


# -- what is printed --------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    """Progress goes to stdout, at once: a run takes minutes."""
    print(line, flush=True)


def interval(result: oc.BenchmarkResult) -> str:
    """The ratio with its interval."""
    return f"{result.ratio:.3f}x [{result.low:.3f}, {result.high:.3f}]"


def timing(result: oc.BenchmarkResult) -> dict[str, Any]:
    """What the JSON keeps of a comparison."""
    names = ("ratio", "low", "high", "verdict", "sessions", "pairs", "seconds")
    return {name: getattr(result, name) for name in names}


def rounded(seconds: Sequence[float]) -> list[float]:
    """Seconds to the millisecond."""
    return [round(value, 3) for value in seconds]


def revision() -> str | None:
    """The commit that is measured, with ``-dirty`` where the tree has changes; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def full_table(facts: Mapping[str, Any]) -> str:
    """Every figure with its target."""
    rows = [Row(**row) for row in facts["rows"]]
    cells = [(r.part, r.case, r.measure, r.text, r.target, r.verdict) for r in rows]
    return table(("part", "case", "measure", "value", "target", ""), cells)


def measured_on(facts: Mapping[str, Any], script: str) -> str:
    """When, at which commit, by what and on which machine the figures were measured."""
    environment = facts["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    machine = f"{environment['usable_cores']} cores of {environment['cpu']}"
    flags = ", ".join(environment["instruction_sets"])
    commit = f" at {facts['revision']}" if facts["revision"] else ""
    return (
        f"Measured {environment['date'][:10]}{commit} by `python benchmarks/{script}` on {machine} ({flags}), "
        f"Python {environment['python']}, {versions}. Times are ratios within one run{_others(facts)}."
    )


def other_rows(rows: Sequence[Row]) -> list[str]:
    """The table of ``rows`` with their targets; nothing where there are none."""
    cells = [(r.case, r.measure, r.text, r.target, r.verdict) for r in rows]
    return [table(("case", "measure", "value", "target", ""), cells, aligned=False)] if cells else []


def target_summary(rows: Sequence[Row]) -> str:
    """How many targets were met, and which were not."""
    missed = [f"{r.case}, {r.measure}" for r in rows if r.passed is False]
    judged = sum(r.passed is not None for r in rows)
    return f"{judged - len(missed)} of {judged} targets met" + "".join(f"; missed: {m}" for m in missed) + "."


def _others(facts: Mapping[str, Any]) -> str:
    """What to say about a machine that others used meanwhile."""
    busiest = max((load or 0.0 for load in facts["load_1min"].values()), default=0.0)
    if busiest <= 2 * (facts["environment"]["usable_cores"] or 1):
        return ""
    return f"; others used the machine meanwhile (load average up to {busiest:.0f})"


# -- the command line -------------------------------------------------------------------------------------------------


def some_of(names: Sequence[str], what: str) -> Callable[[str], tuple[str, ...]]:
    """A parser of ``a,b``: some of ``names``, in their order."""

    def parse(text: str) -> tuple[str, ...]:
        given = text.split(",")
        for name in given:
            if name not in names:
                raise argparse.ArgumentTypeError(f"unknown {what} {name!r}; expected some of {','.join(names)}")
        return tuple(name for name in names if name in given)

    return parse


def main(bench: type[Bench], description: str) -> int:
    """Measure, print, and tell by the exit code whether all targets were met."""
    parts = bench.PARTS
    usual = tuple(part for part in parts if part not in bench.ON_REQUEST)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", type=some_of(parts, "part"), default=usual, metavar="PART,...", help=",".join(parts))
    parser.add_argument("--quick", action="store_true", help="fewer samples and repetitions; the figures are rough")
    parser.add_argument("--output", type=Path, help="write the JSON to this file too")
    parser.add_argument("--update", action="store_true", help="keep what --output holds and this run does not measure")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="print the tables of an earlier run and stop")
    bench.add_options(parser)
    arguments = parser.parse_args()
    if arguments.markdown is not None:
        print(bench.markdown(json.loads(arguments.markdown.read_text(encoding="utf-8"))))
        return 0
    environment = describe_environment()
    with tempfile.TemporaryDirectory(prefix="onnxcompress-") as folder:
        run = bench(Path(folder), arguments)
        run.run(arguments.only)
    facts: dict[str, Any] = {
        "environment": environment,
        "revision": revision(),
        "quick": arguments.quick,
        "skipped": run.skipped,
        "load_1min": run.load,
        "rows": [asdict(row) for row in run.rows],
        "details": run.details,
    }
    if arguments.update and arguments.output is not None and arguments.output.is_file():
        facts = bench.merge(json.loads(arguments.output.read_text(encoding="utf-8")), facts)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    say(full_table(facts))
    if run.skipped:
        say(f"skipped, since the real models are missing: {', '.join(run.skipped)}")
    missed = sum(row["passed"] is False for row in facts["rows"])
    say(f"{missed} targets missed")
    print(json.dumps(facts | {"failed": missed}))
    return 1 if missed else 0
