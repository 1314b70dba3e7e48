"""``onnxcompress compress``."""

from __future__ import annotations

from typing import Any

import click

from onnxcompress.cli.files import check_files, check_pages, finish, one_process_writes
from onnxcompress.cli.options import (
    FILE,
    MODEL,
    Number,
    benchmark_seconds_option,
    data_options,
    judge_options,
    output_option,
    output_options,
    page_option,
    parsed_preprocess,
    trust_options,
)
from onnxcompress.cli.terminal import Terminal, pass_terminal

__all__ = ["compress"]


@click.command(short_help="Compress a model: passes, proof of accuracy, proof of speed.")
@click.argument("model", type=MODEL)
@output_option
@data_options
@judge_options
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    help="int8, int8-accurate, prune-int8, prune-distil-int8, prune-int8-distil, fp16, lossless, or a YAML file; "
    "default: int8 (for cuda: fp16).",
)
@click.option("--evaluate", metavar="FILE.py:FUNCTION", help="Task metric: gets a function that runs the model.")
@click.option(
    "--max-drop",
    type=Number(0),
    metavar="POINTS",
    help="Points that the metric, or without one the agreement with the original, may lose. Default: 0.5 of "
    "--evaluate; 0.5 and the sampling error with labels; without a metric the output must keep 10 dB SQNR. "
    "Layers return to float until it is kept, searched on samples held out of --data.",
)
@click.option(
    "--exclude", multiple=True, metavar="NAME", help="Leave operators float: name, type or pattern; repeatable."
)
@click.option(
    "--fail-if-slower-than",
    type=Number(0, min_open=True),
    metavar="RATIO",
    help="Fail where the result surely runs at less than RATIO times the original's speed.",
)
@click.option(
    "--benchmark/--no-benchmark", default=True, show_default=True, help="Time the result against the original."
)
@benchmark_seconds_option
@click.option("--force", is_flag=True, help="Write the result although it misses a budget.")
@click.option("--save-recipe", metavar="FILE", type=FILE, help="Write the recipe with everything that was decided.")
@click.option(
    "--work-dir",
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=str),
    help="Keep what each pass made there; passes before what changes in the recipe, the data or the model are reused.",
)
@click.option("--dry-run", is_flag=True, help="Check model, recipe and data, print the plan, write nothing.")
@page_option
@trust_options
@output_options
@pass_terminal
def compress(
    terminal: Terminal,
    /,
    model: str,
    report: str | None,
    save_recipe: str | None,
    pages: tuple[str, ...],
    **options: Any,
) -> None:
    """Compress MODEL and write the result to OUT.

    The recipe's passes run, the outputs are compared with the original's, the task metric and the speed are measured on
    the written file, and only then is it moved to OUT.
    """
    check_files(model, options, report, save_recipe, pages)
    check_pages(pages)
    options["preprocess"] = parsed_preprocess(options["preprocess"])
    options["trace"] = bool(pages)
    if options["max_drop"] is None:
        options["max_drop"] = "auto"
    from onnxcompress.compress import compress as run

    with one_process_writes(terminal, options) as writes:
        result = run(model, progress=terminal.progress, check=False, **options)
    if not writes:
        report, save_recipe, pages = None, None, ()
    if save_recipe is not None and result.saved is not None:
        from onnxcompress.report import write_text

        write_text(save_recipe, result.recipe.to_yaml())
    finish(terminal, result, report, pages)
