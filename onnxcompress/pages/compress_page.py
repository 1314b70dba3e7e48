"""The page of ``compress``: what it cost and what it gained, layer by layer, from the JSON of its report."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from onnxcompress.pages.document import Block, Code, Details, Document, Section, Table, Text, Tile, Tiles
from onnxcompress.pages.parts import (
    SAME_DB,
    accuracy_figure,
    decibels,
    distribution_figure,
    environment_section,
    first_float,
    float_layers,
    operator_blocks,
    ratio_text,
    speed_tone,
    sqnr_height,
    warnings_section,
)
from onnxcompress.pages.plots import bars
from onnxcompress.units import bytes_text, count_text, seconds_text

__all__ = ["compress_document"]

#: layers that are drawn, and changes of a pass that are listed
_LAYERS, _CHANGES = 25, 200


def compress_document(report: Mapping[str, Any], recipe: str) -> Document:
    """The page of ``report``, which :func:`onnxcompress.report.compress_report` made.

    Args:
        report: as plain data.
        recipe: the recipe as YAML.
    """
    name = PurePath(report["model"]["path"]).name
    layers = [(label, report["traces"].get(label)) for label in ("original", "result")]
    return Document.of(
        f"{name}, compressed",
        f"Recipe for target {report['target']}; {_written(report)}",
        [
            Section("Summary", tuple(_summary(report))),
            warnings_section(report["warnings"]),
            Section("Before and after", (_before_after(report),)),
            Section("Accuracy and latency", tuple(_accuracy(report))),
            Section("Time per operator, before and after", tuple(operator_blocks(layers))),
            Section("Sensitivity per layer", tuple(_sensitivity(report))),
            Section("Pruning per layer", tuple(_pruning(report))),
            Section("Layers that stayed float", tuple(_floats(report))),
            Section("What each pass did", tuple(_passes(report))),
            Section("Recipe", (Code(recipe),)),
            environment_section(report["environment"], _facts(report)),
        ],
    )


def _written(report: Mapping[str, Any]) -> str:
    if report["output"] is None:
        return f"nothing was written: {report['failure']}" if report["failure"] else "nothing was written"
    return f"written to {PurePath(report['output']['path']).name}"


def _summary(report: Mapping[str, Any]) -> list[Block]:
    before, after, timing = report["before"], report["after"], report["benchmark"]
    tiles = []
    if after is not None:
        ratio = after["bytes"] / before["bytes"] if before["bytes"] else 1.0
        tiles.append(Tile("Size", f"{ratio:.3g}x", f"{bytes_text(before['bytes'])} to {bytes_text(after['bytes'])}"))
    if timing is not None:
        times = " to ".join(seconds_text(timing[key]["median_s"]) for key in ("reference", "candidate"))
        interval = f"{times}; 95 % interval {timing['low']:.2f} to {timing['high']:.2f}"
        tiles.append(
            Tile("Speed", f"{timing['ratio']:.2f}x {timing['verdict']}", interval, speed_tone(timing["verdict"]))
        )
    for metric in report["metrics"][:1]:
        change = f"{metric['original']:.4f} to {metric['result']:.4f}"
        tiles.append(Tile(metric["name"], f"{0.0 - metric['drop_points']:+.2f} points", change))
    verification = report["verification"]
    if verification is not None:
        shown = first_float(verification["outputs"])
        on = f"{verification['samples']} samples ({verification['source']})"
        if shown is not None:
            tiles.append(Tile("Output error (SQNR)", decibels(shown), f"of {shown['name']} on {on}"))
        if verification["agreement"] is not None:
            tiles.append(Tile("Agreement", f"{100 * verification['agreement']:.2f} %", f"same class on {on}"))
    if report["audit"] is not None:
        count = sum(report["audit"]["integer"].values())
        tiles.append(Tile("Integer operators", str(count), f"{len(report['audit']['floats'])} stayed float"))
    blocks: list[Block] = [Tiles(tuple(tiles))] if tiles else []
    budget = report["budget"]
    if budget is not None:
        blocks.append(Text(_budget_text(budget), "good" if budget["met"] else "bad"))
    if report["failure"]:
        blocks.append(Text(report["failure"], "bad"))
    return blocks


def _budget_text(budget: Mapping[str, Any]) -> str:
    """One sentence; what is not finite, such as the SQNR of equal outputs, is null in a report."""
    head = f"Accuracy budget {'met' if budget['met'] else 'missed'}: {budget['basis']}"
    found, limit = budget["found"], budget["limit"]
    if budget["basis"] == "SQNR":
        if found is None and budget["met"]:
            return f"{head}, the outputs are equal, {limit:.2f} dB asked for."
        kept = "no number" if found is None else f"{found:.2f} dB"
        return f"{head}, {kept} kept of the {limit:.2f} asked for."
    lost = "no number" if found is None else f"{found:.2f}"
    return f"{head}, {lost} points lost of {limit:.2f} allowed."


def _before_after(report: Mapping[str, Any]) -> Table:
    before, after = report["before"], report["after"]
    rows: list[tuple[str, ...]] = []
    if after is not None:
        for name, key, text in (
            ("nodes", "nodes", count_text),
            ("parameters", "parameters", count_text),
            ("MACs", "macs", count_text),
            ("bytes on disk", "bytes", bytes_text),
        ):
            change = f"{after[key] / before[key]:.3g}x" if before[key] else ""
            rows.append((name, text(before[key]), text(after[key]), change))
    timing = report["benchmark"]
    if timing is not None:
        for name, key in (
            ("median time, one thread", "median_s"),
            ("p90", "p90_s"),
            ("p99", "p99_s"),
            ("session creation", "session_creation_s"),
            ("first run", "first_run_s"),
        ):
            values = [timing[model][key] for model in ("reference", "candidate")]
            if None not in values:
                told = ratio_text(timing) if key == "median_s" else ""
                rows.append((name, *(seconds_text(value) for value in values), told))
    for metric in report["metrics"]:
        change = f"{0.0 - metric['drop_points']:+.2f} points"
        rows.append((metric["name"], f"{metric['original']:.4f}", f"{metric['result']:.4f}", change))
    verification = report["verification"]
    for output in verification["outputs"] if verification is not None else ():
        agreement = output["same_argmax"] if output["score_rows"] else None
        told = "" if agreement is None else f", agreement {100 * agreement:.2f} %"
        rows.append((f"output {output['name']}", "", "", f"SQNR {decibels(output)}{told}"))
    return Table(("", "original", "result", "change"), tuple(rows))


def _accuracy(report: Mapping[str, Any]) -> list[Block]:
    timing, verification = report["benchmark"], report["verification"]
    if timing is None:
        return [Text("Not timed.")]
    seconds = [timing[model]["median_s"] for model in ("reference", "candidate")]
    blocks: list[Block] = []
    if report["metrics"]:
        metric = report["metrics"][0]
        values = [("original", seconds[0], metric["original"]), ("result", seconds[1], metric["result"])]
        blocks.extend(accuracy_figure(values, metric["name"]))
    elif verification is not None:
        height = sqnr_height(first_float(verification["outputs"]))
        points = [("original", seconds[0], SAME_DB), ("result", seconds[1], height)]
        blocks.extend(accuracy_figure(points, f"SQNR to the original, dB ({SAME_DB:g}: the same)"))
    blocks.extend(distribution_figure([("original", timing["reference"]), ("result", timing["candidate"])]))
    return blocks


def _details(report: Mapping[str, Any], key: str) -> Iterator[Any]:
    """The values of ``key`` wherever the report has it: at the top, in the search, in the details of a pass."""
    for place in (report, report.get("search") or {}, *(step["details"] for step in report["passes"])):
        if place.get(key):
            yield place[key]


def _sensitivity(report: Mapping[str, Any]) -> list[Block]:
    """What each layer costs when it alone is quantised, and what returned to float for it."""
    blocks: list[Block] = []
    for number, found in enumerate(_details(report, "sensitivity"), 1):
        layers = [_sensitive(layer) for layer in (found["layers"] if isinstance(found, Mapping) else found)]
        known = sorted((layer for layer in layers if layer[2] is not None), key=lambda layer: layer[2] or 0.0)
        if not known:
            continue
        caption = "The outputs' SQNR when nothing but this is in 8 bits: the shortest bars cost the most."
        groups: dict[str, list[float | None]] = {name: [sqnr] for name, _, sqnr in known[:_LAYERS]}
        title = "The most sensitive layers" + (f" ({number})" if number > 1 else "")  # plots are told apart by titles
        blocks.append(bars(title, caption, groups, ["SQNR"], "dB"))
        rows = tuple((name, what, f"{sqnr:.1f}") for name, what, sqnr in known)
        table = Table(("layer", "what", "SQNR alone, dB"), rows, text_columns=frozenset({0, 1}))
        blocks.append(Details("All of them", (table,)))
    for steps in _details(report, "returned"):
        rows = tuple(
            (
                ", ".join(step["floats"][:6]) + (f" and {len(step['floats']) - 6} more" if step["floats"][6:] else ""),
                *(_db(step[key]) for key in ("sqnr_before_db", "sqnr_after_db")),
                count_text(step["macs"]),
                step["why"],
            )
            for step in (steps if isinstance(steps, Sequence) else ())
        )
        if rows:
            columns = ("returned to float", "SQNR before", "after", "MACs", "why")
            blocks.append(Table(columns, rows, "For the sake of the accuracy budget.", frozenset({0, 4})))
    return blocks


def _sensitive(layer: Mapping[str, Any]) -> tuple[str, str, float | None]:
    """(name, operator or kind, SQNR) of a layer, as a search or a measurement of sensitivity tells it."""
    name, what = layer.get("node", layer.get("name")), layer.get("op", layer.get("kind", ""))
    return str(name), str(what), layer.get("sqnr_db", layer.get("alone_sqnr_db"))


def _db(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f} dB"


def _pruning(report: Mapping[str, Any]) -> list[Block]:
    """Channels of each layer before and after, where a pass tells them: ``[{"node", "before", "after"}, ...]``."""
    blocks: list[Block] = []
    for number, layers in enumerate((*_details(report, "channels"), *_pruned(report)), 1):
        known = [layer for layer in layers if layer["before"]]
        if not known:
            continue
        groups: dict[str, list[float | None]] = {
            layer["node"]: [float(layer["before"]), float(layer["after"])] for layer in known[:_LAYERS]
        }
        title = "Channels per layer" + (f" ({number})" if number > 1 else "")
        blocks.append(bars(title, "", groups, ["before", "after"], "channels"))
        rows = tuple(
            (
                layer["node"],
                str(layer["before"]),
                str(layer["after"]),
                f"{100 * (1 - layer['after'] / layer['before']):.0f} %",
            )
            for layer in known
        )
        blocks.append(Details("All layers", (Table(("layer", "before", "after", "removed"), rows),)))
    return blocks


def _pruned(report: Mapping[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """What each ``prune_channels`` says of its changes: how many channels of a node stay."""
    for step in report["passes"]:
        found = [
            {"node": change["node"], "before": int(counts[2]), "after": int(counts[1])}
            for change in step["changes"]
            if change["kind"] == "pruned" and (counts := re.match(r"(\d+) of (\d+) ", change["detail"]))
        ]
        if found:
            yield found


def _floats(report: Mapping[str, Any]) -> list[Block]:
    audit = report["audit"]
    if audit is None:
        return []
    integer = ", ".join(
        f"{count} {op}" for op, count in sorted(audit["integer"].items(), key=lambda item: (-item[1], item[0]))
    )
    left = f"{audit['quantize']} QuantizeLinear and {audit['dequantize']} DequantizeLinear are left."
    blocks: list[Block] = [
        Text(f"Integer in the runtime: {integer or 'nothing'}. {left}"),
        *float_layers(audit["floats"]),
    ]
    timed = (report.get("islands") or {}).get("comparisons", ())
    rows = tuple(
        (", ".join(c["nodes"][:6]) + (f" and {len(c['nodes']) - 6} more" if c["nodes"][6:] else ""), _interval(c))
        for c in timed
    )
    if rows:
        caption = "Time as integers over time as floats, with 95 % intervals: above 1 the region is faster in float."
        blocks.append(Table(("integer regions that were timed", "as integers"), rows, caption))
    return blocks


def _interval(comparison: Mapping[str, Any]) -> str:
    return f"{comparison['ratio']:.2f}x [{comparison['low']:.2f}, {comparison['high']:.2f}]"


def _passes(report: Mapping[str, Any]) -> list[Block]:
    rows = tuple(
        (
            step["name"],
            str(len(step["changes"])),
            str(len(step["refusals"])),
            f"{step['before']['nodes']} to {step['after']['nodes']}",
            seconds_text(step["seconds"]),
        )
        for step in report["passes"]
    )
    blocks: list[Block] = [Table(("pass", "changes", "left alone", "nodes", "took"), rows)] if rows else []
    for step in report["passes"]:
        changes = tuple((c["node"], c["kind"], c["detail"]) for c in step["changes"][:_CHANGES])
        refusals = tuple((r["node"], "left alone", r["reason"]) for r in step["refusals"][:_CHANGES])
        if changes or refusals:
            table = Table(("node", "what", "detail"), changes + refusals, text_columns=frozenset({0, 1, 2}))
            blocks.append(Details(f"{step['name']}, node by node", (table,)))
    return blocks


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [("model", PurePath(report["model"]["path"]).name), ("its sha256", str(report["model"]["sha256"]))]
    if report["output"] is not None:
        facts += [("result", PurePath(report["output"]["path"]).name), ("its sha256", str(report["output"]["sha256"]))]
    if report["verification"] is not None:
        verification = report["verification"]
        facts.append(("evaluation data", f"{verification['source']}, {verification['samples']} samples"))
    facts.append(("seconds by stage", ", ".join(f"{k} {v:.2f}" for k, v in report["seconds"].items())))
    return facts
