"""The page of a benchmark: many models on many runtimes, from the JSON of its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxcompress.pages.document import Block, Document, Section, Table, Text, Tile, Tiles
from onnxcompress.pages.parts import (
    SAME_DB,
    accuracy_figure,
    decibels,
    distribution_figure,
    environment_section,
    first_float,
    operator_blocks,
    ratio_text,
    speed_tone,
    sqnr_height,
    warnings_section,
)
from onnxcompress.pages.plots import Spread, lines, ratios, stacked
from onnxcompress.units import bytes_text, count_text, rate_text, seconds_text

__all__ = ["benchmark_document"]

_TURNS = "One run after the other; the models take turns."


def benchmark_document(report: Mapping[str, Any]) -> Document:
    """The page of ``report``, which :func:`onnxcompress.report.matrix_report` made."""
    timed = [variant for variant in report["variants"] if variant["timing"] is not None]
    names = [str(model["name"]) for model in report["models"]]
    title = f"{names[0]} against {names[1]}" if len(names) == 2 else f"Benchmark of {names[0]}"
    if len(names) > 2:
        title += f" and {len(names) - 1} more models"
    runtimes = ", ".join(runtime["spec"] for runtime in report["runtimes"])
    batch = "batches as the data has them" if report["batch"] is None else f"batch {report['batch']}"
    return Document.of(
        title,
        f"On {runtimes}; {batch}, {_threads(report['threads'])}.",
        [
            Section("Summary", tuple(_summary(report, timed))),
            warnings_section(report["warnings"]),
            Section("Models and times", tuple(_times(report))),
            Section("Accuracy and latency", (*_accuracy(timed), *_distributions(timed))),
            Section("Time per operator", tuple(operator_blocks([(v["label"], v["trace"]) for v in timed]))),
            Section("Throughput", tuple(_throughput(timed))),
            Section("Cold start and memory", tuple(_cold(timed))),
            Section("Where nodes run", tuple(_placement(report, timed))),
            Section("Runtimes", (_runtimes(report),)),
            environment_section(report["environment"], _facts(report)),
        ],
    )


def _threads(count: int) -> str:
    return {0: "threads chosen by the runtime", 1: "one thread"}.get(count, f"{count} threads")


def _pairs(report: Mapping[str, Any], *kinds: str) -> list[Mapping[str, Any]]:
    return [comparison for comparison in report["comparisons"] if comparison["kind"] in kinds]


def _pair_label(report: Mapping[str, Any], comparison: Mapping[str, Any]) -> str:
    return str(report["variants"][comparison["candidate_variant"]]["label"])


def _summary(report: Mapping[str, Any], timed: Sequence[Mapping[str, Any]]) -> list[Block]:
    tiles: list[Tile] = []
    if timed:
        best = min(timed, key=lambda v: v["timing"]["median_s"])
        tiles.append(Tile("Shortest latency", seconds_text(best["timing"]["median_s"]), best["label"]))
    tiles.extend(_speed_tile(report, comparison) for comparison in _pairs(report, "model")[:4])
    noise = max(_pairs(report, "noise"), key=lambda c: c["high"] / c["low"], default=None)
    if noise is not None:
        note = f"{noise['low']:.3f} to {noise['high']:.3f}: {_pair_label(report, noise)} against itself"
        tiles.append(Tile("Noise floor", f"{noise['ratio']:.3f}x", note))
    sizes = [model["bytes_on_disk"] for model in report["models"]]
    if len(sizes) > 1:
        smallest = min(range(len(sizes)), key=lambda i: sizes[i])
        note = f"{report['models'][smallest]['name']}, {sizes[smallest] / sizes[0]:.3g}x of the first"
        tiles.append(Tile("Smallest file", bytes_text(sizes[smallest]), note))
    failed = [v for v in report["variants"] if v["failure"] is not None]
    blocks: list[Block] = [Tiles(tuple(tiles))] if tiles else []
    if not report["output_check"]:
        blocks.append(
            Text("Outputs were not checked: these models may compute different things, and are only timed.", "warning")
        )
    if failed:
        blocks.append(Text(f"{len(failed)} of {len(report['variants'])} were not timed; why stands below.", "bad"))
    return blocks


def _speed_tile(report: Mapping[str, Any], comparison: Mapping[str, Any]) -> Tile:
    reference = report["models"][report["variants"][comparison["reference_variant"]]["model"]]["name"]
    return Tile(
        _pair_label(report, comparison),
        f"{comparison['ratio']:.2f}x {comparison['verdict']}",
        f"95 % interval {comparison['low']:.2f} to {comparison['high']:.2f}, against {reference}",
        speed_tone(comparison["verdict"]),
    )


def _times(report: Mapping[str, Any]) -> list[Block]:
    pairs = {c["candidate_variant"]: c for c in _pairs(report, "runtime", "model")}
    rows = []
    metrics = list(dict.fromkeys(name for v in report["variants"] for name in v["metrics"]))
    for position, variant in enumerate(report["variants"]):
        timing, pair = variant["timing"], pairs.get(position)
        name = report["models"][variant["model"]]["name"]
        spec = report["runtimes"][variant["runtime"]]["spec"]
        if timing is None:
            rows.append((name, spec, "not timed", "see below", "", *("" for _ in metrics), "", ""))
            continue
        other = ""
        if pair is not None:
            reference = report["variants"][pair["reference_variant"]]
            what = report["runtimes"][reference["runtime"]]["spec"]
            if pair["kind"] == "model":
                what = report["models"][reference["model"]]["name"]
            other = f"{ratio_text(pair)} against {what}"
        shown = first_float(variant["against_first"])
        rows.append(
            (
                name,
                spec,
                seconds_text(timing["median_s"]),
                other,
                "" if shown is None else decibels(shown),
                *(f"{variant['metrics'][m]:.4f}" if m in variant["metrics"] else "" for m in metrics),
                *("" if timing[key] is None else seconds_text(timing[key]) for key in ("p90_s", "p99_s")),
            )
        )
    columns = ("model", "runtime", "median", "speed", "output error (SQNR)", *metrics, "p90", "p99")
    caption = (
        f"Output error: to {report['models'][0]['name']} on the reference runtime, onnxruntime on the CPU without its "
        "optimisations. Speed is what was timed in pairs; medians are minutes apart. A percentile is left out where "
        "the sample does not support it."
    )
    models = tuple(
        (
            str(m["name"]),
            count_text(m["nodes"]),
            count_text(m["parameters"]),
            count_text(m["macs"]),
            bytes_text(m["bytes_on_disk"]),
        )
        for m in report["models"]
    )
    blocks: list[Block] = [Table(columns, tuple(rows), caption, frozenset({0, 1, 3}))]
    reasons: dict[str, list[str]] = {}
    for variant in report["variants"]:
        if variant["failure"] is not None:
            reasons.setdefault(variant["failure"]["message"], []).append(variant["label"])
    blocks.extend(Text(f"Not timed: {', '.join(names)}: {reason}", "bad") for reason, names in reasons.items())
    spreads = [
        Spread(_pair_label(report, c), c["ratio"], c["low"], c["high"]) for c in _pairs(report, "model", "runtime")
    ]
    noise = _pairs(report, "noise")
    if spreads:
        floor = (min(c["low"] for c in noise), max(c["high"] for c in noise)) if noise else None
        told = " The grey band is what equal models look like here." if noise else ""
        text = f"Time of the reference over time of the model, with 95 % intervals.{told}"
        blocks.append(ratios("Speed against the reference", text, spreads, floor))
    blocks.append(Table(("model", "nodes", "parameters", "MACs", "bytes on disk"), models))
    return blocks


def _accuracy(timed: Sequence[Mapping[str, Any]]) -> list[Block]:
    metric = next((name for variant in timed for name in variant["metrics"]), None)
    if metric is not None:
        points = [(v["label"], v["timing"]["median_s"], v["metrics"].get(metric)) for v in timed]
        return accuracy_figure(points, metric)
    heights = [(v["label"], v["timing"]["median_s"], sqnr_height(first_float(v["against_first"]))) for v in timed]
    return accuracy_figure(heights, f"SQNR to the first model, dB ({SAME_DB:g}: the same)")


def _distributions(timed: Sequence[Mapping[str, Any]]) -> list[Block]:
    return distribution_figure([(v["label"], v["timing"]) for v in timed])


def _throughput(timed: Sequence[Mapping[str, Any]]) -> list[Block]:
    series: dict[str, list[tuple[float, float]]] = {}
    by_threads: dict[str, list[tuple[float, float]]] = {}
    rows = []
    for variant in timed:
        for figure in variant["throughput"]:
            rate, threads = figure["samples_per_second"], figure["threads"]
            name = variant["label"] if len({f["threads"] for f in variant["throughput"]}) == 1 else ""
            name = name or f"{variant['label']}, {_threads(threads)}"
            if rate is not None:
                series.setdefault(name, []).append((figure["batch"], rate))
                by_threads.setdefault(variant["label"], []).append((threads, rate))
            spread = "" if rate is None else f"{rate_text(figure['low'])} to {rate_text(figure['high'])}"
            told = figure["reason"] or "" if rate is None else rate_text(rate)
            rows.append((variant["label"], str(figure["batch"]), str(threads or "auto"), told, spread))
    if not rows:
        return []
    blocks: list[Block] = []
    if any(len(points) > 1 for points in series.values()):
        blocks.append(lines("Throughput by batch size", _TURNS, series, "batch size", "samples a second"))
    elif any(len(points) > 1 for points in by_threads.values()) and all(x for p in by_threads.values() for x, _ in p):
        blocks.append(lines("Throughput by threads", _TURNS, by_threads, "threads", "samples a second"))
    return [*blocks, Table(("variant", "batch", "threads", "samples a second", "range of rounds"), tuple(rows))]


def _cold(timed: Sequence[Mapping[str, Any]]) -> list[Block]:
    known = [(v["label"], v["cold_start"]) for v in timed if v["cold_start"] is not None]
    if not known:
        return []
    parts = ("load_s", "session_creation_s", "first_run_s")
    names = ("loading the runtime", "creating the session", "first run")
    rows = tuple(
        (
            label,
            *(seconds_text(start[part]) for part in parts),
            "" if start["peak_bytes"] is None else bytes_text(start["peak_bytes"]),
            "" if start["device_bytes"] is None else bytes_text(start["device_bytes"]),
        )
        for label, start in known
    )
    caption = (
        f"Medians over {known[0][1]['processes']} fresh processes. Memory: the process's peak above what it held "
        "before the model was opened."
    )
    figure = stacked(
        "Cold start", "", {label: [start[part] * 1e3 for part in parts] for label, start in known}, names, "ms"
    )
    return [figure, Table(("variant", *names, "peak memory", "device memory"), rows, caption)]


def _placement(report: Mapping[str, Any], timed: Sequence[Mapping[str, Any]]) -> list[Block]:
    rows = []
    for variant in timed:
        macs = report["models"][variant["model"]]["macs"]
        for placed in variant["placement"]:
            operators = ", ".join(f"{count} {op}" for op, count in list(placed["operators"].items())[:6])
            share = f"{100 * placed['macs'] / macs:.0f} %" if macs and placed["macs"] else ""
            rows.append((variant["label"], placed["provider"], str(placed["nodes"]), share, operators))
        copies = variant["trace"]["copies"] if variant["trace"] is not None else 0
        if copies:
            rows.append((variant["label"], "copies between devices", str(copies), "", ""))
    if not rows:
        return []
    caption = (
        "onnxruntime: the provider of each node, before fusion. OpenVINO: device and precision of each node that is "
        "executed; its nodes have names of their own, so their MACs are not counted. torch: the nodes that are left "
        "once constants are folded; a QuantizeLinear and its DequantizeLinear run as one."
    )
    columns = ("variant", "provider", "nodes", "MACs", "operators")
    return [Table(columns, tuple(rows), caption, frozenset({0, 1, 4}))]


def _runtimes(report: Mapping[str, Any]) -> Table:
    rows = []
    for runtime in report["runtimes"]:
        facts = runtime["facts"]
        if facts is None:
            rows.append((runtime["spec"], "not there", "", "", "", ""))
            continue
        options = ", ".join(f"{key}={value}" for key, value in facts["options"].items())
        threads = str(facts["threads"] or "auto")
        rows.append((runtime["spec"], facts["version"], facts["device"], facts["precision"], threads, options))
    columns = ("runtime", "version", "device", "precision of float32", "threads", "options")
    return Table(columns, tuple(rows), text_columns=frozenset({0, 1, 2, 3, 5}))


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    sessions = [c["sessions"] for c in report["comparisons"]]
    pairs = [c["pairs"] for c in report["comparisons"]]
    facts = [
        ("inputs", f"{report['samples']} samples take turns"),
        ("seed", str(report["seed"])),
        ("processes", "one for each variant" if report["isolated"] else "all variants in one"),
    ]
    if sessions:
        facts.append(
            (
                "comparisons",
                f"{len(sessions)}, of {min(pairs)} to {max(pairs)} pairs in {min(sessions)} sessions or more",
            )
        )
    facts.extend((f"sha256 of {m['name']}", str(m["sha256"])) for m in report["models"] if m["sha256"])
    return facts
