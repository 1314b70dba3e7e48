"""``onnxcompress benchmark``."""

from __future__ import annotations

import os
from typing import Any

import click
from click.core import ParameterSource

from onnxcompress.cli.files import check_models, check_pages, check_written, numbered, open_samples, write_pages
from onnxcompress.cli.options import (
    FILE,
    MODEL,
    Number,
    Numbers,
    data_options,
    output_options,
    page_option,
    trust_options,
)
from onnxcompress.cli.terminal import Terminal, pass_terminal

__all__ = ["benchmark"]


class _BenchmarkCommand(click.Command):
    """Reads ``--json FILE.json`` as ``--json-file FILE.json``, and a bare ``--json`` as the flag that it is elsewhere.

    An optional value that could be anything would take the next model for it.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words: list[str] = []
        for word in args:
            option, equals, value = word.partition("=")
            if option == "--json" and equals:
                words.extend(("--json-file", value))
            elif words[-1:] == ["--json"] and word.endswith(".json"):
                words[-1:] = ["--json-file", word]
            else:
                words.append(word)
        return super().parse_args(ctx, words)


@click.command(cls=_BenchmarkCommand, short_help="Time models against each other, in pairs, with an interval.")
@click.argument("models", type=MODEL, nargs=-1, required=True)
@data_options
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    metavar="NAME[,OPTION=VALUE...]",
    help="onnxruntime:cpu (the default), onnxruntime:cuda, openvino, torch or torch:cuda; repeatable.",
)
@click.option(
    "--seconds",
    type=Number(0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="S",
    help="About how long to measure each comparison; less where its interval is narrow before.",
)
@click.option(
    "--sessions",
    type=click.IntRange(6),
    default=10,
    show_default=True,
    metavar="N",
    help="How often the sessions are created anew, at least.",
)
@click.option(
    "--fail-if-slower-than",
    type=Number(0, min_open=True),
    metavar="RATIO",
    help="Exit with 5 where a model surely runs at less than RATIO times the first one's speed.",
)
@click.option(
    "--output-check/--no-output-check",
    default=True,
    show_default=True,
    help="Refuse to time models that do not compute the same thing.",
)
@click.option(
    "--noise-floor/--no-noise-floor",
    default=True,
    show_default=True,
    help="Time the first model against itself: what no difference looks like here.",
)
@click.option("--trace/--no-trace", default=None, help="Record the time of each operator; default: with --page.")
@click.option(
    "--cold-starts",
    type=click.IntRange(0),
    metavar="N",
    help="Start each model in N fresh processes, for load, first run and peak memory; default: 3 with --page.",
)
@click.option(
    "--throughput-batches", "batches", type=Numbers(1, 1 << 20), metavar="N,N,...", help="Batches to run, one by one."
)
@click.option(
    "--throughput-threads",
    "thread_counts",
    type=Numbers(0, max(64, os.cpu_count() or 1)),
    metavar="N,N,...",
    help="Thread counts to run them with.",
)
@click.option(
    "--isolate/--no-isolate", default=None, help="One process a model and runtime; default: where runtimes clash."
)
@page_option
@click.option("--report", type=FILE, metavar="FILE", help="Write the full report as JSON.")
@click.option(
    "--json-file", type=FILE, metavar="FILE.json", help="The same; `--json FILE.json` is short for it.", hidden=True
)
@click.option("--save-samples", type=FILE, metavar="FILE.npz", help="Write every time that was taken, in nanoseconds.")
@trust_options
@output_options
@pass_terminal
def benchmark(
    terminal: Terminal,
    /,
    models: tuple[str, ...],
    fail_if_slower_than: float | None,
    pages: tuple[str, ...],
    report: str | None,
    json_file: str | None,
    save_samples: str | None,
    runtimes: tuple[str, ...],
    threads: int,
    seed: int | None,
    batch: int | None,
    data: str | None,
    preprocess: str | None,
    samples: int | None,
    trusted: bool,
    hard_links: bool,
    **options: Any,
) -> None:
    """Time MODELS on every runtime: pairs in random order, one thread unless --threads says otherwise.

    The first model and the first runtime are what the others are compared with; above 1 the other one is faster.
    `--json` prints JSON on stdout, `--json FILE.json` writes it to a file.
    """
    threads_given = click.get_current_context().get_parameter_source("threads") is not ParameterSource.DEFAULT
    files = {"the report": report, "the JSON file": json_file, "the samples": save_samples, **numbered("page", pages)}
    check_written(files, {"the data": data, "the preprocessing": preprocess, **numbered("model", models)}, models)
    from onnxcompress.benchmark import benchmark_models
    from onnxcompress.compress import slower_error
    from onnxcompress.report import matrix_report, print_matrix, to_json, write_samples, write_text

    check_pages(pages)
    on_gpu = any("cuda" in runtime for runtime in runtimes)
    check_models(terminal, models, trusted=trusted, target="cuda" if on_gpu else "cpu", hard_links=hard_links)
    if pages:
        options["trace"] = True if options["trace"] is None else options["trace"]
        options["cold_starts"] = 3 if options["cold_starts"] is None else options["cold_starts"]
    given = {name: value for name, value in options.items() if value is not None}
    with open_samples(
        terminal,
        models[0],
        models[-1],
        hard_links=trusted or hard_links,
        data=data,
        preprocess=preprocess,
        batch=batch,
        samples=samples,
        seed=seed,
    ) as dataset:
        result = benchmark_models(
            models,
            dataset,
            runtimes=runtimes or ("onnxruntime:cpu",),
            threads=threads if threads_given else 1,
            batch=batch,
            seed=seed or 0,
            progress=terminal.progress,
            **given,
        )
    full = matrix_report(result)
    for path in (report, json_file):
        if path is not None:
            write_text(path, to_json(full) + "\n")
    if pages:
        from onnxcompress.pages import benchmark_document

        write_pages(pages, benchmark_document, full)
    if save_samples is not None:
        write_samples(save_samples, result)
    print_matrix(terminal.human, result)
    terminal.warn(result.warnings)
    terminal.result(full)
    failed = [variant for variant in result.variants if variant.failure is not None]
    if failed and failed[0].failure is not None:
        raise failed[0].failure.raised(f"{len(failed)} of {len(result.variants)} not timed: ")
    if fail_if_slower_than is not None:
        for comparison in (c for c in result.comparisons if c.kind == "model"):
            slower = slower_error(comparison.result, fail_if_slower_than)
            if slower is not None:
                raise slower
