"""``onnxcompress demo``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from onnxcompress.atomic import replacing, write_error, write_file
from onnxcompress.cli.files import finish
from onnxcompress.cli.options import benchmark_seconds_option, output_options
from onnxcompress.cli.terminal import Terminal, pass_terminal
from onnxcompress.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["demo"]


@click.command(short_help="Compress a small network that comes along, and show the gain.")
@click.option(
    "-o", "--output", metavar="FOLDER", type=click.Path(file_okay=False), help="Keep model, data and result there."
)
@click.option("--benchmark/--no-benchmark", default=True, show_default=True, help="Time the result.")
@benchmark_seconds_option
@output_options
@pass_terminal
def demo(terminal: Terminal, /, output: str | None, **options: Any) -> None:
    """Compress a small residual network that reads handwritten digits; model and data come with the package."""
    import tempfile
    from pathlib import Path

    from onnxcompress.compress import compress as run
    from onnxcompress.demo import demo_calibration, demo_evaluation, demo_model_path
    from onnxcompress.session import import_onnxruntime

    if output == "":
        raise UsageError("no folder was given; name one with -o, or leave -o out")
    calibration, evaluation = demo_calibration(), demo_evaluation()
    import_onnxruntime()  # without one there is nothing to announce
    terminal.note(
        f"a residual network for handwritten digits (UCI), calibrated on {len(calibration['input'])} images without "
        f"labels, judged by {len(evaluation['input'])} others; it takes some 15 seconds"
    )
    with tempfile.TemporaryDirectory(prefix="onnxcompress-demo-") as temporary:
        folder = Path(output if output is not None else temporary)
        if output is not None:
            _keep_demo(folder, demo_model_path(), {"calibration": calibration, "evaluation": evaluation})
        result = run(
            demo_model_path(),
            calibration,
            folder / "digits_int8.onnx",
            eval_data=evaluation,
            progress=terminal.progress,
            check=False,
            **options,
        )
        finish(terminal, result, None)
    if output is None:
        terminal.note("that file was temporary and is gone; keep it with: onnxcompress demo -o FOLDER")


def _keep_demo(folder: Path, model: Path, data: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the model and its data into ``folder``, to go on with."""
    import numpy as np

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    write_file(folder / model.name, model.read_bytes())
    for name, arrays in data.items():
        with replacing(folder / f"{name}.npz") as file:
            np.savez(file, allow_pickle=False, **arrays)
