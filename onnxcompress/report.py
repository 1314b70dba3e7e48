"""What people and machines are told: terminal tables, and JSON with a versioned schema.

Names in a model come from outside: they are printed without control characters and never read as markup. JSON is
strict, so what is not finite (the SQNR of equal outputs) is written as null.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from onnxcompress.atomic import write_file
from onnxcompress.environment import describe_environment
from onnxcompress.units import bytes_text as _bytes
from onnxcompress.units import count_text as _count
from onnxcompress.units import decibel_text as _decibel
from onnxcompress.units import printable
from onnxcompress.units import rate_text as _rate
from onnxcompress.units import seconds_text as _seconds
from onnxcompress.version import __version__

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from onnxcompress.base import PassReport, Refusal
    from onnxcompress.benchmark import BenchmarkResult, MatrixResult
    from onnxcompress.benchmark.matrix import Comparison, Variant
    from onnxcompress.compress import CompressResult
    from onnxcompress.inspect_model import CoupledChannels, Inspection, PlannedNode
    from onnxcompress.islands import TimedIslands
    from onnxcompress.quantization.sensitivity import Sensitivity
    from onnxcompress.runtimes import Trace
    from onnxcompress.verify import OutputComparison

__all__ = [
    "SCHEMA",
    "comparison_report",
    "compress_report",
    "matrix_report",
    "print_benchmark",
    "print_comparisons",
    "print_compress",
    "print_inspection",
    "print_matrix",
    "print_plan",
    "print_sensitivity",
    "print_warnings",
    "printable",
    "to_json",
    "write_samples",
    "write_text",
]

#: version of the JSON layout; raised when a key changes its meaning or goes away
SCHEMA = 1

#: node names that are printed for one reason before the list is cut; the report has them all
_NAMES = 3
#: reasons that are printed after a run; inspect prints them all
_REASONS = 10


# ----------------------------------------------------------------------------------------------------------------------
# JSON


def compress_report(result: CompressResult) -> dict[str, Any]:
    """Everything that is known about one run of the main job, as plain data."""
    saved, verification, budget = result.saved, result.verification, result.budget
    return {
        "schema": SCHEMA,
        "tool": {"name": "onnxcompress", "version": __version__},
        "model": {"path": str(result.model), "sha256": result.source_sha256, "bytes": result.before.bytes},
        "output": None
        if saved is None
        else {
            "path": str(saved.path),
            "files": [str(file) for file in saved.files],
            "sha256": saved.sha256,
            "bytes": saved.bytes,
        },
        "target": result.target,
        "recipe": result.recipe.to_dict(),
        "guarantee": result.guarantee.value,
        "before": asdict(result.before),
        "after": None if result.after is None else asdict(result.after),
        "passes": [_pass_report(child) for child in result.report.children] if result.report is not None else [],
        "plan": [asdict(node) for node in result.planned],
        "verification": None
        if verification is None
        else {
            "source": verification.source,
            "samples": verification.samples,
            "fingerprint": verification.fingerprint,
            "agreement": verification.agreement,
            "outputs": [comparison_report(output) for output in verification.outputs],
        },
        "metrics": [
            {"name": m.name, "original": m.original, "result": m.result, "drop_points": m.drop} for m in result.metrics
        ],
        "budget": None if budget is None else {**asdict(budget), "met": budget.met},
        "samples": dict(result.samples),
        "search": result.search,
        "islands": result.islands.to_dict(),
        "returned": dict(result.returned),
        "audit": result.audit,
        "benchmark": None if result.benchmark is None else result.benchmark.to_dict(),
        "traces": {name: _trace_report(trace) for name, trace in result.traces.items()},
        "warnings": list(result.warnings),
        "failure": None if result.failure is None else str(result.failure),
        "seconds": dict(result.seconds),
        "environment": describe_environment(),
    }


def _pass_report(report: PassReport) -> dict[str, Any]:
    return {
        "name": report.name,
        "options": report.options,
        "decisions": report.decisions,
        "details": report.details,
        "changes": [asdict(change) for change in report.changes],
        "refusals": [asdict(refusal) for refusal in report.refusals],
        "warnings": list(report.warnings),
        "before": asdict(report.before),
        "after": asdict(report.after),
        "seconds": report.seconds,
        "reused": report.reused,
    }


def matrix_report(result: MatrixResult) -> dict[str, Any]:
    """Everything that is known about one run of many models on many runtimes, as plain data.

    Where two models were compared on one runtime, the keys of that comparison stand at the top too.
    """
    models = [comparison for comparison in result.comparisons if comparison.kind == "model"]
    alone = len(result.models) == 2 and len(result.runtimes) == 1 and len(models) == 1
    return {
        "schema": SCHEMA,
        **(models[0].result.to_dict() if alone else {}),
        "kind": "benchmark",
        "tool": {"name": "onnxcompress", "version": __version__},
        "models": [asdict(model) | {"path": str(model.path)} for model in result.models],
        "runtimes": [
            {"spec": spec, "facts": None if facts is None else asdict(facts)}
            for spec, facts in zip(result.runtimes, result.facts, strict=True)
        ],
        "reference_runtime": asdict(result.reference),
        "variants": [_variant_report(result, variant) for variant in result.variants],
        "comparisons": [
            {
                "kind": comparison.kind,
                "reference_variant": comparison.reference,
                "candidate_variant": comparison.candidate,
                **{key: value for key, value in comparison.result.to_dict().items() if key != "environment"},
            }
            for comparison in result.comparisons
        ],
        "output_check": result.output_check,
        "isolated": result.isolated,
        "threads": result.threads,
        "batch": result.batch,
        "seed": result.seed,
        "samples": result.samples,
        "total_seconds": result.seconds,
        "warnings": list(result.warnings),
        "environment": dict(result.environment),
    }


def _variant_report(result: MatrixResult, variant: Variant) -> dict[str, Any]:
    return {
        **asdict(variant),
        "label": result.label(variant),
        "outputs": [comparison_report(output) for output in variant.outputs],
        "against_first": [comparison_report(output) for output in variant.against_first],
        "trace": None if variant.trace is None else _trace_report(variant.trace),
    }


def _trace_report(trace: Trace) -> dict[str, Any]:
    return {**asdict(trace), "by_operator": trace.by_operator()}


def comparison_report(output: OutputComparison) -> dict[str, Any]:
    """One compared output; ``equal`` tells the infinite SQNR of equal outputs from one that is not a number."""
    return {**asdict(output), "equal": output.max_abs == 0.0}


def to_json(data: Any) -> str:
    """Strict JSON, two spaces deep; dataclasses, paths, enums and numpy scalars become plain data."""
    return json.dumps(_plain(data), indent=2, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | str) or value is None:
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _plain(value.tolist())
    return str(value)


def write_samples(path: str | os.PathLike[str], result: MatrixResult) -> None:
    """Write every time that was taken to the ``.npz`` file ``path``.

    For comparison ``i`` of the report it holds ``i/reference_ns`` and ``i/candidate_ns`` (one integer a run, all
    sessions in order) and ``i/session_log_ratios`` (one number a session).

    Raises:
        UsageError, ResourceError: as :func:`write_text`.
    """
    import numpy as np

    arrays = {
        f"{index}/{name}": values
        for index, comparison in enumerate(result.comparisons)
        for name, values in vars(comparison.samples).items()
    }
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_file(path, content.getvalue())


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` so that the file is there whole or not at all.

    Raises:
        UsageError: the file cannot be written there.
        ResourceError: the disk is full.
    """
    write_file(path, text.encode("utf-8"))


# ----------------------------------------------------------------------------------------------------------------------
# Terminal


def print_compress(console: Console, result: CompressResult) -> None:
    """The before/after table, what was left alone and why, what became integer, the warnings, and where the file is."""
    if result.after is None:
        _print_dry_run(console, result)
        return
    console.print(_before_after(result, result.after))
    if result.report is not None:  # what a pass with an audit refused is told by the audit
        _print_refusals(console, [r for c in result.report.children if "audit" not in c.details for r in c.refusals])
        _print_reused(console, result.report.children)
    if result.audit is not None:
        _print_audit(console, result.audit)
    if result.search is not None:
        _print_search(console, result.search)
    _print_islands(console, result.islands)
    print_warnings(console, result.warnings)
    if result.saved is not None:
        console.print(f"written: {printable(str(result.saved.path))} ({_bytes(result.saved.bytes)})")


def _print_reused(console: Console, reports: Sequence[PassReport]) -> None:
    """Which passes did not run."""
    names = [report.name for report in reports if report.reused]
    if names:
        _print_line(console, f"reused from the work folder: {', '.join(names)} ({len(names)} of {len(reports)} passes)")


def print_warnings(console: Console, warnings: Iterable[str]) -> None:
    """One line a warning."""
    for warning in warnings:
        _print_line(console, f"warning: {printable(warning)}", style="yellow")


def _print_line(console: Console, text: str, style: str | None = None) -> None:
    """One line in a pipe; on a terminal it is broken between words, and what follows is indented."""
    if console.is_terminal:
        indent = " " * (len(text) - len(text.lstrip()) + 4)
        lines = textwrap.wrap(
            text, console.width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        text = "\n".join(lines)
    console.print(text, style=style)


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 or i == len(columns) - 1 else "right", overflow="fold")
    return table


def _before_after(result: CompressResult, after: Any) -> Table:
    before = result.before
    table = _table("", "original", "result", "")
    for name, old, new, unit in (
        ("nodes", before.nodes, after.nodes, _count),
        ("parameters", before.parameters, after.parameters, _count),
        ("MACs", before.macs, after.macs, _count),
        ("bytes on disk", before.bytes, after.bytes, _bytes),
    ):
        note = _conversions(result) if name == "nodes" else ""
        table.add_row(name, unit(old), unit(new), (f"{new / old:.3g}x" if old else "") + note)
    timing = result.benchmark
    if timing is not None:
        table.add_row(
            "time, one thread",
            _seconds(timing.reference.median_s),
            _seconds(timing.candidate.median_s),
            _ratio(timing),
        )
    if result.verification is not None:
        for output in result.verification.outputs:
            shown = output.same_argmax if output.score_rows else None
            agreement = "" if shown is None else f", agreement {100 * shown:.2f} %"
            sqnr = "equal to the original's" if output.sqnr_db == math.inf else f"SQNR {_decibel(output.sqnr_db)}"
            table.add_row(f"output {printable(output.name)}", "", "", f"{sqnr}{agreement}")
    for metric in result.metrics:
        change = f"{0.0 - metric.drop:+.2f} points"
        table.add_row(metric.name, f"{metric.original:.4f}", f"{metric.result:.4f}", change)
    if result.verification is not None:
        samples = result.verification.samples
        table.caption = (
            f"outputs judged on {samples} sample{'' if samples == 1 else 's'} ({result.verification.source})"
        )
        others = {"calibration": "calibrated on", "search": "searched on"}
        table.caption += "".join(f", {what} {result.samples[k]}" for k, what in others.items() if k in result.samples)
        if timing is not None:
            table.caption += "; in brackets the 95 % interval"
        table.caption_justify = "left"
    return table


def _conversions(result: CompressResult) -> str:
    """QDQ files have more nodes than the original, which says nothing about the work that is left."""
    operators = result.report.after.operators if result.report is not None else {}
    count = operators.get("QuantizeLinear", 0) + operators.get("DequantizeLinear", 0)
    return f"; {count} are Q or DQ, which fuse" if count else ""


def _ratio(timing: BenchmarkResult) -> str:
    return f"{timing.ratio:.2f}x [{timing.low:.2f}, {timing.high:.2f}] {timing.verdict}"


def _print_refusals(console: Console, refusals: Sequence[Refusal]) -> None:
    if not refusals:
        return
    console.print(f"left alone, by reason ({len(refusals)}):")
    _print_groups(console, [(refusal.reason, refusal.node) for refusal in refusals], _REASONS)


def _print_groups(console: Console, items: Iterable[tuple[str, str]], most: int | None = None) -> None:
    """Names by reason, the most frequent reason first, at most ``most`` reasons.

    Reasons that differ only in the names of tensors and nodes are one.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for reason, name in items:
        groups.setdefault(_NAMED.sub(lambda found: f"{found[1] or ''}...", reason), []).append((reason, name))
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    for general, members in ordered[:most]:
        names = [name for _, name in members]
        text = members[0][0] if len({reason for reason, _ in members}) == 1 else general
        more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
        _print_line(console, f"  {len(names)}x {printable(text)} ({printable(', '.join(names[:_NAMES]))}{more})")
    if most is not None and len(ordered) > most:
        console.print(f"  and {len(ordered) - most} more reasons, all of them in the report (--report FILE)")


#: a name in a reason: quoted, or after the operator whose name it is
_NAMED = re.compile(r"'[^']*'|(\b[A-Z]\w* )(?=\S*[_/])[\w/.:-]*\w")


def _print_audit(console: Console, audit: Mapping[str, Any]) -> None:
    counts = sorted(audit["integer"].items(), key=lambda item: -item[1])
    _print_line(console, f"integer in the runtime: {', '.join(f'{count} {op}' for op, count in counts) or 'nothing'}")
    console.print(f"conversions left in the optimised graph: {audit['quantize']} Q, {audit['dequantize']} DQ")
    if audit["floats"]:
        console.print(f"float in the runtime ({len(audit['floats'])}):")
        floats = [(f"{node['operator']}: {node['reason']}", node["node"]) for node in audit["floats"]]
        _print_groups(console, floats, _REASONS)


def _print_search(console: Console, search: Mapping[str, Any]) -> None:
    """What returned to float for the sake of the budget: by step, what it was worth and what it cost."""
    floats = [name for step in search["returned"] for name in step["floats"]]
    share = _share(sum(step["macs"] for step in search["returned"]), search["macs"]) or "0 %"
    _print_line(console, f"returned to float to keep the accuracy budget: {len(floats)} operators, {share} of the MACs")
    for step in search["returned"][:_REASONS]:
        names = ", ".join(step["floats"][:_NAMES])
        more = f" and {len(step['floats']) - _NAMES} more" if len(step["floats"]) > _NAMES else ""
        before, after = (
            "equal" if step[key] is None else f"{step[key]:.1f}" for key in ("sqnr_before_db", "sqnr_after_db")
        )
        cost = f"{_count(step['macs'])} MACs"
        if step["microseconds"] is not None:
            cost += f", about {_seconds(max(step['microseconds'], 0.0) * 1e-6)}"
        _print_line(
            console, f"  SQNR {before} -> {after} dB for {cost}: {printable(names)}{more}; {printable(step['why'])}"
        )
    if len(search["returned"]) > _REASONS:
        console.print(
            f"  and {len(search['returned']) - _REASONS} more steps, all of them in the report (--report FILE)"
        )
    verdict = "met" if search["met"] else "missed"
    _print_line(
        console,
        f"  budget {verdict} on {search['samples']['judging']} samples that nothing else saw: "
        f"{search['before']['found']}; now {search['after']['found']}",
    )


def _print_islands(console: Console, islands: TimedIslands) -> None:
    """Integer regions that were timed, because they may have cost more than they saved."""
    if not islands.comparisons:
        return
    count = len({name for comparison in islands.comparisons for name in comparison.nodes})
    _print_line(
        console,
        f"integer regions that may cost more time than they save: {count} operators in {len(islands.comparisons)} "
        f"comparisons, {len(islands.returned)} returned to float",
    )
    for comparison in islands.comparisons:
        if comparison.low > 1.0 and set(comparison.nodes) & set(islands.returned):
            names = ", ".join(comparison.nodes[:_NAMES])
            more = f" and {len(comparison.nodes) - _NAMES} more" if len(comparison.nodes) > _NAMES else ""
            interval = f"{comparison.ratio:.2f}x [{comparison.low:.2f}, {comparison.high:.2f}]"
            _print_line(console, f"  as integers the model took {interval} of the time: {printable(names)}{more}")


def _print_dry_run(console: Console, result: CompressResult) -> None:
    console.print(f"model: {printable(str(result.model))}: {_size_line(result)}")
    console.print(f"recipe {printable(result.recipe.source)} for target {printable(result.target)}:")
    for step in result.recipe.to_dict()["passes"]:
        for name, options in step.items():
            told = ", ".join(f"{key}={value}" for key, value in options.items())
            console.print(f"  {name}{f' ({printable(told)})' if told else ''}")
    if any(p.name == "insert_qdq" for p in result.recipe.passes):
        print_plan(console, result.planned)
    print_warnings(console, result.warnings)
    console.print("dry run: nothing was written")


def _size_line(result: CompressResult) -> str:
    size = result.before
    figures = (f"{_count(size.nodes)} nodes", f"{_count(size.parameters)} parameters", f"{_count(size.macs)} MACs")
    return ", ".join((*figures, _bytes(size.bytes)))


def print_plan(console: Console, planned: Sequence[PlannedNode]) -> None:
    """What would become integer, counted by operator, and what would not, by reason."""
    counts: dict[str, int] = {}
    for node in planned:
        if node.integer:
            counts[node.op] = counts.get(node.op, 0) + 1
    integer = ", ".join(f"{count} {printable(op)}" for op, count in sorted(counts.items(), key=lambda item: -item[1]))
    _print_line(console, f"would become integer, once folded: {integer or 'nothing'}")
    rest = [(f"{node.op}: {node.reason}", node.name) for node in planned if not node.integer]
    if rest:
        console.print(f"would stay float ({len(rest)}):")
        _print_groups(console, rest)


def print_inspection(console: Console, inspection: Inspection) -> None:
    """Operators, parameters, MACs by node, and what would be quantised."""
    stats = inspection.stats
    console.print(
        f"{printable(str(inspection.path))}: opset {inspection.opset}, IR version {inspection.ir_version}, "
        f"{_bytes(inspection.bytes)}, {_count(stats.nodes)} nodes, {_count(stats.parameters)} parameters, "
        f"{_count(inspection.macs)} MACs{_symbolic(inspection)}"
    )
    for kind, tensors in (("input", inspection.inputs), ("output", inspection.outputs)):
        for tensor in tensors:
            console.print(f"{kind} {printable(tensor.name)}: {tensor.dtype} {_shape(tensor.shape)}")
    operators = _table("operator", "count", "MACs", "share")
    macs: dict[str, int] = {}
    for node in inspection.nodes:
        macs[node.op] = macs.get(node.op, 0) + (node.macs or 0)
    for op, count in sorted(stats.operators.items(), key=lambda item: (-macs.get(item[0], 0), -item[1], item[0])):
        used = macs.get(op, 0)
        operators.add_row(printable(op), str(count), _count(used) if used else "", _share(used, inspection.macs))
    console.print(operators)
    heavy = sorted((node for node in inspection.nodes if node.macs), key=lambda node: -(node.macs or 0))
    if heavy:
        nodes = _table("node", "operator", "MACs", "output shape", "share")
        for node in heavy:
            nodes.add_row(
                printable(node.name),
                printable(node.op),
                _count(node.macs or 0),
                _shape(node.shape),
                _share(node.macs or 0, inspection.macs),
            )
        console.print(nodes)
    print_plan(console, inspection.planned)
    if inspection.coupling is not None:
        _print_coupling(console, inspection.coupling, inspection.macs)


def _print_coupling(console: Console, groups: Sequence[CoupledChannels], macs: int) -> None:
    """Groups that can be pruned, then those that cannot, by reason."""
    table = _table("channels that go together", "kind", "channels", "producers", "consumers", "MACs", "share")
    for group in groups:
        if group.pinned is None:
            table.add_row(
                printable(group.name),
                group.kind,
                str(group.channels),
                _some(group.producers),
                _some(group.consumers),
                _count(group.macs),
                _share(group.macs, macs),
            )
    console.print(table)
    pinned = [group for group in groups if group.pinned is not None]
    if pinned:
        table = _table("channels that stay", "kind", "channels", "producers", "because")
        for group in pinned:
            table.add_row(
                printable(group.name),
                group.kind,
                str(group.channels),
                _some(group.producers),
                printable(group.pinned or ""),
            )
        console.print(table)


def _some(names: Sequence[str]) -> str:
    """The first two names and how many there are beside."""
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return printable(", ".join(names[:2])) + more


def _symbolic(inspection: Inspection) -> str:
    sizes = {str(d) for tensor in inspection.inputs for d in (tensor.shape or ())[1:] if not isinstance(d, int)}
    return f" a sample, with {printable(', '.join(sorted(sizes)))} counted as 1" if sizes else ""


def print_sensitivity(console: Console, sensitivity: Sensitivity) -> None:
    """What each integer layer costs, the most sensitive first."""
    table = _table("layer", "operator", "MACs", "alone, SQNR", "float, gain")
    for layer in sensitivity.layers:
        table.add_row(
            printable(layer.node),
            printable(layer.op),
            _count(layer.macs) if layer.macs else "",
            _decibel(math.inf if layer.sqnr_db is None else layer.sqnr_db),
            f"{layer.gain_db:+.2f} dB",
        )
    table.caption = (
        "alone: at the outputs, with only this layer in 8 bits; float: what the outputs gain when only it returns to "
        f"float; all layers in 8 bits: {_decibel(math.inf if sensitivity.sqnr_db is None else sensitivity.sqnr_db)}; "
        f"on {sensitivity.samples} samples that did not calibrate"
    )
    table.caption_justify = "left"
    console.print(table)


def print_comparisons(console: Console, outputs: Sequence[OutputComparison]) -> None:
    """One line an output."""
    table = _table("output", "max abs", "relative L2", "SQNR", "same argmax")
    for output in outputs:
        shown = output.same_argmax if output.score_rows else None
        argmax = "" if shown is None else f"{100 * shown:.2f} %"
        table.add_row(
            printable(output.name),
            f"{output.max_abs:.3g}",
            f"{output.relative_l2:.3g}",
            _decibel(output.sqnr_db),
            argmax,
        )
    console.print(table)


def print_benchmark(console: Console, result: BenchmarkResult) -> None:
    """Both models' times beside each other, and the verdict."""
    a, b = result.reference, result.candidate
    table = _table("", "A", "B", "")
    table.add_row("median", _seconds(a.median_s), _seconds(b.median_s), f"B: {_ratio(result)}")
    for name, x, y in (
        ("p50", a.p50_s, b.p50_s),
        ("p90", a.p90_s, b.p90_s),
        ("session creation", a.session_creation_s, b.session_creation_s),
        ("first run", a.first_run_s, b.first_run_s),
    ):
        if x is not None and y is not None:
            table.add_row(name, _seconds(x), _seconds(y), "")
    table.add_row("bytes on disk", _bytes(a.bytes_on_disk), _bytes(b.bytes_on_disk), "")
    table.caption = f"{result.pairs} pairs in {result.sessions} sessions; in brackets the 95 % interval of A / B"
    table.caption_justify = "left"
    console.print(table)


def print_matrix(console: Console, result: MatrixResult) -> None:
    """A row a variant: its time, how that compares, and how right its outputs are; a failure with its reason."""
    pairs = {c.candidate: c for c in result.comparisons if c.kind != "noise"}
    failed = [variant for variant in result.variants if variant.failure is not None]
    if len(pairs) == 1 and not failed and len(result.models) == 2 and len(result.runtimes) == 1:
        samples = "batches as the data has them" if result.batch is None else f"batch {result.batch}"
        names = [printable(model.name) for model in result.models]
        _print_line(console, f"A: {names[0]}, B: {names[1]}; {samples}")
        print_benchmark(console, next(iter(pairs.values())).result)
        for letter, variant in zip("AB", result.variants, strict=True):
            if (start := variant.cold_start) is not None:
                peak = "" if start.peak_bytes is None else f", peak memory {_bytes(start.peak_bytes)}"
                _print_line(console, f"cold start of {letter}: {_seconds(start.total_s)}{peak}")
        shown = _shown_output(result.variants[1])
        if shown is not None:
            error = "equal to A's" if shown.sqnr_db == math.inf else f"SQNR {_decibel(shown.sqnr_db)} to A's"
            _print_line(console, f"output {printable(shown.name)} of B: {error}")
    elif len(failed) < len(result.variants):
        _print_variants(console, result, pairs)
    for comparison in result.comparisons:
        if comparison.kind == "noise":
            label = printable(result.label(result.variants[comparison.reference]))
            _print_line(console, f"noise floor: {label} against itself {_ratio(comparison.result)}")
    for variant in failed:
        if variant.failure is not None:
            label = printable(result.label(variant))
            _print_line(console, f"not timed: {label}: {printable(variant.failure.message)}", style="red")
    for variant in result.variants:
        for figure in variant.throughput:
            rate = figure.samples_per_second
            what = f"not measured: {printable(figure.reason or '')}" if rate is None else f"{_rate(rate)} samples/s"
            label = printable(result.label(variant))
            threads = {0: "threads chosen by the runtime", 1: "1 thread"}.get(
                figure.threads, f"{figure.threads} threads"
            )
            _print_line(console, f"throughput: {label}, batch {figure.batch}, {threads}: {what}")
    _print_placement(console, result)
    _print_traces(console, result)


def _print_traces(console: Console, result: MatrixResult) -> None:
    """What each operator takes of a run, a column a variant, the longest first."""
    traces = [(result.label(variant), variant.trace) for variant in result.variants if variant.trace is not None]
    if not traces:
        return
    columns = [trace.by_operator() for _, trace in traces]
    longest = {op: max(column.get(op, 0.0) for column in columns) for column in columns for op in column}
    table = _table("time per operator", *(printable(label) for label, _ in traces))
    for column in table.columns[1:]:
        column.justify = "right"
    for op in sorted(longest, key=lambda op: (-longest[op], op)):
        table.add_row(printable(op), *(_seconds(column[op]) if op in column else "" for column in columns))
    table.caption = "from each runtime's own trace, in a run of its own: tracing costs time itself"
    table.caption_justify = "left"
    console.print(table)


def _print_variants(console: Console, result: MatrixResult, pairs: Mapping[int, Comparison]) -> None:
    table = _table("", "median", "p90", "output error", "cold start", "peak memory", "speed, and of what")
    for position, variant in enumerate(result.variants):
        timing, pair, start = variant.timing, pairs.get(position), variant.cold_start
        if timing is None:
            continue
        told = "" if pair is None else f"{_ratio(pair.result)} vs {_other(result, pair)}"
        shown = _shown_output(variant)
        table.add_row(
            printable(result.label(variant)),
            _seconds(timing.median_s),
            "" if timing.p90_s is None else _seconds(timing.p90_s),
            "" if shown is None else "none" if shown.sqnr_db == math.inf else _decibel(shown.sqnr_db),
            "" if start is None else _seconds(start.total_s),
            "" if start is None or start.peak_bytes is None else _bytes(start.peak_bytes),
            printable(told),
        )
    first = printable(result.models[0].name)
    table.caption = (
        f"output error: SQNR to {first} on onnxruntime:cpu without its optimisations; in brackets the 95 % interval\n"
        "of what was timed in pairs, while medians are minutes apart"
    )
    table.caption_justify = "left"
    console.print(table)


def _shown_output(variant: Variant) -> OutputComparison | None:
    """The first floating-point output against the first model's."""
    return next((output for output in variant.against_first if output.equal_elements is None), None)


def _other(result: MatrixResult, pair: Comparison) -> str:
    """What the candidate of a comparison is held against, by what tells them apart."""
    reference = result.variants[pair.reference]
    return result.runtimes[reference.runtime] if pair.kind == "runtime" else result.models[reference.model].name


def _print_placement(console: Console, result: MatrixResult) -> None:
    """Where nodes run, where that is more than one place."""
    for variant in result.variants:
        if len({placed.provider.split()[0] for placed in variant.placement}) < 2:
            continue
        macs = result.models[variant.model].macs
        _print_line(console, f"placement of {printable(result.label(variant))}:")
        for placed in variant.placement:
            share = f", {_share(placed.macs, macs)} of the MACs" if placed.macs else ""
            _print_line(console, f"  {printable(placed.provider)}: {placed.nodes} nodes{share}")
        if variant.trace is not None and variant.trace.copies:
            _print_line(console, f"  copies between devices in a run: {variant.trace.copies}")


def _shape(shape: Sequence[int | str | None] | None) -> str:
    if shape is None:
        return "[unknown rank]"
    return "[" + ", ".join("?" if d is None else printable(str(d)) for d in shape) + "]"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if part and whole else ""
