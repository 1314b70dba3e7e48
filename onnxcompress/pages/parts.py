"""Parts that the pages share, made from the JSON of a report: environment, times, operators, layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from onnxcompress.pages.document import Block, Details, Section, Table, Text
from onnxcompress.pages.plots import Point, distributions, pareto, scatter, stacked
from onnxcompress.units import bytes_text, seconds_text

__all__ = [
    "SAME_DB",
    "accuracy_figure",
    "decibels",
    "distribution_figure",
    "environment_section",
    "first_float",
    "float_layers",
    "operator_blocks",
    "ratio_text",
    "speed_tone",
    "sqnr_height",
    "warnings_section",
]

#: an SQNR above this is rounding; plots put equal outputs here
SAME_DB = 120.0
#: operator types, and nodes, that are drawn
_OPERATORS, _NODES = 6, 20


def ratio_text(result: Mapping[str, Any]) -> str:
    """A speed ratio with its interval and verdict."""
    return f"{result['ratio']:.2f}x [{result['low']:.2f}, {result['high']:.2f}] {result['verdict']}"


def speed_tone(verdict: str) -> Any:
    """The tone of a verdict."""
    return {"FASTER": "good", "SLOWER": "bad"}.get(verdict, "plain")


def decibels(output: Mapping[str, Any]) -> str:
    """The SQNR of one compared output."""
    if output.get("equal"):
        return "equal"
    return "none" if output["sqnr_db"] is None else f"{output['sqnr_db']:.1f} dB"


def sqnr_height(output: Mapping[str, Any] | None) -> float | None:
    """Where an output stands on an axis of SQNR; equal ones at the top."""
    if output is None:
        return None
    if output.get("equal"):
        return SAME_DB
    value = output["sqnr_db"]
    return None if value is None else min(float(value), SAME_DB)


def first_float(outputs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The first floating-point output."""
    return next((output for output in outputs if output.get("equal_elements") is None), None)


def accuracy_figure(points: Iterable[tuple[str, float | None, float | None]], axis: str) -> list[Block]:
    """Accuracy against time of (label, seconds, accuracy), those without either left out."""
    known = [Point(label, s, a) for label, s, a in points if s is not None and a is not None and math.isfinite(a)]
    if len(known) < 2:
        return []
    best = ", ".join(point.label for point in pareto(known))
    caption = f"Nothing is both faster and more accurate than: {best}."
    return [scatter("Accuracy against latency", caption, known, axis)]


def distribution_figure(rows: Sequence[tuple[str, Mapping[str, Any] | None]]) -> list[Block]:
    """The latency distribution of each (label, timing)."""
    known = [
        (label, timing["histogram_edges_s"], timing["histogram_counts"], timing["median_s"])
        for label, timing in rows
        if timing is not None and timing.get("histogram_counts")
    ]
    if not known:
        return []
    caption = "Every timed run, the median marked. The few that took far longer lie to the right of what is drawn."
    return [distributions("Latency distributions", caption, known)]


def operator_blocks(traces: Sequence[tuple[str, Mapping[str, Any] | None]]) -> list[Block]:
    """Time by operator type of each (label, trace), and by node."""
    known = [(label, trace) for label, trace in traces if trace is not None]
    if not known:
        return []
    total: dict[str, float] = {}
    for _, trace in known:
        for op, seconds in trace["by_operator"].items():
            total[op] = max(total.get(op, 0.0), seconds)
    ordered = sorted(total, key=lambda op: -total[op])
    labels = [label for label, _ in known]
    shown = ordered[:_OPERATORS]
    bars: dict[str, list[float]] = {}
    for label, trace in known:
        by_operator = trace["by_operator"]
        rest = sum(seconds for op, seconds in by_operator.items() if op not in shown)
        bars[label] = [by_operator.get(op, 0.0) * 1e3 for op in shown] + ([rest * 1e3] if ordered[_OPERATORS:] else [])
    names = [*shown, "other operators"] if ordered[_OPERATORS:] else shown
    caption = (
        "From each runtime's own trace, in a run of its own: tracing costs time itself, so that the sums are not the "
        "latencies."
    )
    rows = [
        (op, *(seconds_text(t["by_operator"][op]) if op in t["by_operator"] else "" for _, t in known))
        for op in ordered
    ]
    rows.append(("all", *(seconds_text(sum(trace["by_operator"].values())) for _, trace in known)))
    nodes = [
        Details(
            f"The slowest nodes of {label}",
            (
                Table(
                    ("node", "operator", "where", "time", "share"),
                    tuple(
                        (n["node"], n["op"], n["provider"], seconds_text(n["seconds"]), _share(n["seconds"], trace))
                        for n in trace["nodes"][:_NODES]
                    ),
                    text_columns=frozenset({0, 1, 2}),
                ),
            ),
        )
        for label, trace in known
    ]
    return [
        stacked("Time per operator", caption, bars, names, "ms in one run"),
        Details("As a table", (Table(("operator", *labels), tuple(rows)),)),
        *nodes,
    ]


def _share(seconds: float, trace: Mapping[str, Any]) -> str:
    total = sum(trace["by_operator"].values())
    return f"{100 * seconds / total:.1f} %" if total else ""


def float_layers(floats: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Which layers stayed float, by reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for node in floats:
        reasons.setdefault((str(node["operator"]), str(node["reason"])), []).append(str(node["node"]))
    rows = [
        (op, str(len(names)), reason, ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else ""))
        for (op, reason), names in sorted(reasons.items(), key=lambda item: -len(item[1]))
    ]
    if not rows:
        return [Text("No operator that could be integer stayed float.", "good")]
    return [Table(("operator", "nodes", "why", "which"), tuple(rows), text_columns=frozenset({0, 2, 3}))]


def warnings_section(warnings: Sequence[str]) -> Section | None:
    """What a reader has to know before the figures."""
    if not warnings:
        return None
    return Section("Warnings", tuple(Text(warning, "warning") for warning in warnings))


def environment_section(environment: Mapping[str, Any], facts: Sequence[tuple[str, str]]) -> Section:
    """The machine and the versions, after ``facts`` of the run."""
    gpus = environment.get("gpus") or []
    quota, governor = environment.get("cpu_quota"), environment.get("governor")
    memory = environment.get("memory_bytes")
    int8 = {True: "yes", False: "no", None: "not known"}[environment.get("int8")]
    rows = [
        *facts,
        ("processor", str(environment.get("cpu", ""))),
        ("instruction sets", ", ".join(environment.get("instruction_sets", []))),
        ("8-bit dot products (VNNI, AMX)", int8),
        ("cores, usable", f"{environment.get('cores')}, {environment.get('usable_cores')}"),
        ("CPU quota of the control group", "none" if quota is None else f"{quota:g} cores"),
        ("frequency governor", "not known" if governor is None else str(governor)),
        ("virtual machine", {True: "yes", False: "no", None: "not known"}[environment.get("virtual")]),
        ("load when it began", str(environment.get("load_1min"))),
        ("memory", "not known" if memory is None else bytes_text(memory)),
        ("GPU", "; ".join(f"{g['name']}, driver {g['driver']}, {g['memory_mib']} MiB" for g in gpus) or "none"),
        ("system", f"{environment.get('platform', '')}, Python {environment.get('python', '')}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())),
        ("date", str(environment.get("date", ""))),
    ]
    return Section("Environment", (Table(("", ""), tuple(rows), text_columns=frozenset({0, 1})),))
