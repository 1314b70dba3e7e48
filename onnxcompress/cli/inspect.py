"""``onnxcompress inspect``."""

from __future__ import annotations

from typing import Any

import click

from onnxcompress.cli.files import check_models
from onnxcompress.cli.options import MODEL, data_options, output_options, parsed_preprocess, trust_options
from onnxcompress.cli.terminal import Terminal, pass_terminal
from onnxcompress.errors import UsageError

__all__ = ["inspect"]


@click.command(short_help="Operators, parameters, MACs, and what would be quantised and why not.")
@click.argument("model", type=MODEL)
@click.option("--target", default="cpu", show_default=True, metavar="NAME", help="What to plan the quantisation for.")
@click.option(
    "--coupling", is_flag=True, help="Also list the channels that can be removed together, and why others stay."
)
@click.option(
    "--sensitivity", is_flag=True, help="Measure what each layer costs in accuracy once it is quantised; needs --data."
)
@data_options
@trust_options
@output_options
@pass_terminal
def inspect(
    terminal: Terminal,
    /,
    model: str,
    target: str,
    coupling: bool,
    sensitivity: bool,
    data: str | None,
    seed: int | None,
    trusted: bool,
    hard_links: bool,
    **options: Any,
) -> None:
    """Describe MODEL: operators, parameters, MACs by node, and what would be quantised and what not and why.

    With --sensitivity and --data also what each layer costs: the SQNR at the outputs when only it is quantised, and
    what the quantised model gains when only it returns to float.
    """
    if sensitivity and data is None:
        raise UsageError("--sensitivity quantises the model and needs samples; give --data")
    if data is not None and not sensitivity:
        raise UsageError("--data is read by --sensitivity only; give both or neither")
    check_models(terminal, [model], trusted=trusted, target=target, hard_links=hard_links)
    from onnxcompress.inspect_model import inspect_model, inspect_sensitivity
    from onnxcompress.report import print_inspection, print_sensitivity

    inspection = inspect_model(
        model, target=target, coupling=coupling, trusted=trusted or hard_links, progress=terminal.progress
    )
    report = inspection.to_dict()
    print_inspection(terminal.human, inspection)
    if sensitivity:
        options["preprocess"] = parsed_preprocess(options["preprocess"])
        options["trusted"] = trusted or hard_links
        found = inspect_sensitivity(model, data, target=target, seed=seed or 0, progress=terminal.progress, **options)
        print_sensitivity(terminal.human, found)
        report["sensitivity"] = found.to_dict()
    terminal.result(report)
