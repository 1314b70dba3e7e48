"""``onnxcompress compare``."""

from __future__ import annotations

from typing import Any

import click

from onnxcompress.cli.files import check_models, open_samples
from onnxcompress.cli.options import MODEL, Number, data_options, output_options, trust_options
from onnxcompress.cli.terminal import Terminal, pass_terminal
from onnxcompress.errors import AccuracyError

__all__ = ["compare"]


@click.command(short_help="Compare all outputs of two models.")
@click.argument("a", type=MODEL)
@click.argument("b", type=MODEL)
@data_options
@click.option(
    "--tolerance",
    type=Number(0),
    metavar="X",
    help="Exit with 4 where the relative L2 error of an output is above X.",
)
@click.option(
    "--optimization",
    type=click.Choice(["disabled", "basic", "extended", "all"]),
    default="disabled",
    show_default=True,
    help="The runtime's graph optimisation; 'all' is what is served.",
)
@trust_options
@output_options
@pass_terminal
def compare(
    terminal: Terminal,
    /,
    a: str,
    b: str,
    tolerance: float | None,
    optimization: Any,
    threads: int,
    trusted: bool,
    hard_links: bool,
    **data: Any,
) -> None:
    """Run A (the reference) and B on the same samples and compare every output.

    Without --data the samples are random but fit the inputs; the same seed gives the same samples.
    """
    check_models(terminal, [a, b], trusted=trusted, hard_links=hard_links)
    from onnxcompress.report import SCHEMA, comparison_report, print_comparisons
    from onnxcompress.verify import compare as run

    with open_samples(terminal, a, b, hard_links=trusted or hard_links, **data) as samples:
        outputs = run(
            a, b, samples, optimization=(optimization, optimization), threads=threads, progress=terminal.progress
        )
        count = samples.samples
    print_comparisons(terminal.human, outputs)
    terminal.result({"schema": SCHEMA, "samples": count, "outputs": [comparison_report(o) for o in outputs]})
    if tolerance is not None:
        worst = max(outputs, key=lambda o: o.relative_l2 if o.relative_l2 == o.relative_l2 else float("inf"))
        if not worst.relative_l2 <= tolerance:
            raise AccuracyError(
                f"output {worst.name!r} has a relative L2 of {worst.relative_l2:.3g}; the tolerance is {tolerance:g}"
            )
