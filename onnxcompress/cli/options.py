"""Options that commands share, and the types of their values."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import click

from onnxcompress.cli.terminal import Terminal

__all__ = [
    "FILE",
    "MODEL",
    "Number",
    "Numbers",
    "benchmark_seconds_option",
    "data_options",
    "debug_option",
    "flag_option",
    "judge_options",
    "option_group",
    "output_option",
    "output_options",
    "page_option",
    "parsed_preprocess",
    "trust_options",
]


MODEL = click.Path(dir_okay=False, path_type=str)


FILE = click.Path(dir_okay=False, path_type=str)


def _set(name: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    def callback(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            setattr(ctx.ensure_object(Terminal), name, True)

    return callback


def flag_option(name: str, help_text: str) -> Callable[[Any], Any]:
    return click.option(
        f"--{name}", is_flag=True, expose_value=False, is_eager=True, callback=_set(name), help=help_text
    )


def debug_option(command: Any) -> Any:
    return flag_option("debug", "Show the traceback of an error.")(command)


def output_options(command: Any) -> Any:
    command = debug_option(command)
    command = flag_option("quiet", "Print errors and warnings only.")(command)
    return flag_option("json", "Print one JSON object on stdout and everything else on stderr.")(command)


class Number(click.FloatRange):
    """A finite number: NaN is inside of every range."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class Numbers(click.ParamType[Any]):
    """Whole numbers from 1 up (threads: from 0), separated by commas."""

    name = "numbers"

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            numbers = tuple(dict.fromkeys(int(part) for part in value.split(",")))
        except ValueError:
            self.fail(f"{value!r} is not a list of integers like 1,4,16", param, ctx)
        if not all(self.least <= number <= self.most for number in numbers):
            self.fail(f"{value!r} has a number outside of {self.least} to {self.most}", param, ctx)
        return numbers


def option_group(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


data_options = option_group(
    click.option(
        "--data",
        metavar="DATA",
        help="Samples: .npz, .npy, a folder of either, a folder of images (with --preprocess), or file.py:function.",
    ),
    click.option(
        "--preprocess",
        metavar="KEY=VALUE,...",
        help="How images become arrays, e.g. size=256,crop=224,mean=0.5,std=0.25; a preset (imagenet); a YAML file.",
    ),
    click.option("--batch", type=click.IntRange(1), metavar="N", help="Samples a batch; default: as the data comes."),
    click.option("--samples", type=click.IntRange(1), metavar="N", help="Read at most N samples of --data."),
    click.option("--seed", type=click.IntRange(0), metavar="N", help="Seed of everything random; default 0."),
    click.option(
        "--threads",
        type=click.IntRange(0, max(64, os.cpu_count() or 1)),
        default=0,
        metavar="N",
        help="Threads to run with; 0: the runtime chooses.",
    ),
)


judge_options = option_group(
    click.option(
        "--eval-data", metavar="DATA", help="Samples, with or without labels, to judge by; default: a tenth of --data."
    ),
    click.option("--target", metavar="NAME", help="What to compress for; default: the recipe's target, or cpu."),
    click.option("--random-data", is_flag=True, help="Calibrate on random data: the accuracy is then unknown."),
    click.option(
        "--report", metavar="FILE", type=FILE, help="Write the full report as JSON: every change and refusal."
    ),
)


def _load_libraries(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> None:
    """Every session of this process and of those that it starts loads them, so the environment carries the names."""
    if value:
        from onnxcompress.session import CUSTOM_OPERATORS_VARIABLE

        known = filter(None, os.environ.get(CUSTOM_OPERATORS_VARIABLE, "").split(os.pathsep))
        os.environ[CUSTOM_OPERATORS_VARIABLE] = os.pathsep.join((*known, *map(os.path.abspath, value)))


trust_options = option_group(
    click.option(
        "--trusted",
        is_flag=True,
        help="The models come from a source that you trust: do not open them in a child process with limits on memory "
        "and time first, and accept hard links.",
    ),
    click.option(
        "--allow-hard-links",
        "hard_links",
        is_flag=True,
        help="Accept external data that has more than one name: a hard link may belong to something else.",
    ),
    click.option(
        "--custom-ops",
        multiple=True,
        type=click.Path(exists=True, dir_okay=False, path_type=str),
        metavar="LIB",
        expose_value=False,
        callback=_load_libraries,
        help="Load this library of custom operators into ONNX Runtime; it is native code, so trust it; repeatable.",
    ),
)


output_option = click.option(
    "-o", "--output", required=True, metavar="OUT", type=FILE, help="File to write; never the model itself."
)


page_option = click.option(
    "--page", "pages", multiple=True, type=FILE, metavar="FILE.html|.md", help="Write a page to read; repeatable."
)


def parsed_preprocess(text: str | None) -> Any:
    if text is None:
        return None
    from onnxcompress.data import Preprocess

    return Preprocess.parse(text)


benchmark_seconds_option = click.option(
    "--benchmark-seconds",
    type=Number(0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="S",
    help="About how long that may take.",
)
