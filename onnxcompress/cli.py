"""The command line: parse, call the API, print, return a status.

Only click is imported up here. ``--help`` and a mistyped option must answer at once, so whatever reads a model is
imported by the command that needs it, and the list of passes comes from a table that imports none of them.

Exit codes: 0 done; 1 internal error; 2 usage or bad data; 3 invalid or unsafe model; 4 accuracy budget missed;
5 slower than allowed; 6 runtime or provider unavailable; 7 resource limit; 130 interrupted.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import click

from onnxcompress.errors import AccuracyError, OnnxCompressError, ResourceError, UsageError
from onnxcompress.passes import PASSES, load_pass
from onnxcompress.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic.fields import FieldInfo
    from rich.console import Console

    from onnxcompress.base import Pass, Progress
    from onnxcompress.compress import CompressResult

__all__ = ["cli", "main"]

INTERRUPTED = 130
TERMINATED = 143

#: errors of the operating system that mean that something ran out
_EXHAUSTED = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class Terminal:
    """Where a command's words go: results to stdout, everything else to stderr; with ``--json`` only JSON to stdout."""

    def __init__(self) -> None:
        self.debug = False
        self.json = False
        self.quiet = False
        self.silent = False
        self._answered = False
        self._progress: Progress | None = None

    @cached_property
    def human(self) -> Console:
        """The console for tables: stdout, or stderr where stdout belongs to JSON."""
        return _console(stderr=self.json, quiet=self.quiet)

    @cached_property
    def notes(self) -> Console:
        """The console for warnings and progress: stderr, also with ``--quiet``."""
        return _console(stderr=True)

    @property
    def progress(self) -> Progress:
        """Bars on stderr where that is a terminal."""
        if self._progress is None:
            from onnxcompress.progress import make_progress

            self._progress = make_progress(self.notes, quiet=self.quiet or self.json)
        return self._progress

    def result(self, data: Any) -> None:
        """Print ``data`` as JSON where that was asked for."""
        if self.json:
            from onnxcompress.report import to_json

            click.echo(to_json(data))
            self._answered = True

    def warn(self, warnings: Sequence[str]) -> None:
        """Print warnings that no table shows."""
        if self.silent:
            return
        from onnxcompress.report import print_warnings

        print_warnings(self.notes, warnings)

    def note(self, message: str) -> None:
        """Print a remark, unless only errors and warnings are wanted."""
        if not self.quiet:
            self.notes.print(message)

    def error(self, message: str, code: int, kind: str) -> None:
        """Print one line; with ``--json`` also an object where there was no answer yet, so that it is never empty."""
        click.echo(f"error: {_one_line(message)}", err=True)
        if self.json and not self._answered:
            from onnxcompress.report import SCHEMA, to_json

            click.echo(to_json({"schema": SCHEMA, "error": {"type": kind, "message": message, "exit_code": code}}))

    def close(self) -> None:
        """Clear what is drawn of the progress."""
        close = getattr(self._progress, "close", None)
        if close is not None:
            close()


def _console(*, stderr: bool, quiet: bool = False) -> Console:
    from rich.console import Console

    class Plain(Console):
        """Leaves a closed pipe to :func:`_status`; rich's own answer is exit code 1."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    console = Plain(stderr=stderr, quiet=quiet, markup=False, highlight=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160  # a pipe has no width; rich would fold tables at 80
    return console


def _one_line(text: str) -> str:
    joined = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in joined)


# ----------------------------------------------------------------------------------------------------------------------
# The group: errors become exit codes, passes become commands


class _Group(click.Group):
    """The top-level command."""

    def main(self, args: Any = None, prog_name: str | None = None, *more: Any, **extra: Any) -> NoReturn:
        """Run the command line ``args`` and exit with its status."""
        terminal = extra.setdefault("obj", None) or Terminal()
        extra["obj"] = terminal
        extra["standalone_mode"] = False
        try:
            status = super().main(args, prog_name or "onnxcompress", *more, **extra)
            sys.stdout.flush()
        except BaseException as error:
            if isinstance(error, click.UsageError):  # may be raised before --json is read
                terminal.json |= "--json" in (args if args is not None else sys.argv)
            status = _status(error, terminal)
        finally:
            terminal.close()
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a closed pipe is kept from click, which makes exit code 1 of it."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            _discard_output()
            return 0

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *PASSES]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = super().get_command(ctx, cmd_name)
        if command is None and cmd_name.replace("-", "_") in PASSES:
            command = _pass_command(cmd_name.replace("-", "_"))
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches

            close = get_close_matches(args[0].replace("-", "_"), self.list_commands(ctx), n=1)
            if not close:
                raise
            raise click.UsageError(f"no such command {args[0]!r}; did you mean {close[0]!r}?", ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own = super().list_commands(ctx)
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.commands[name].get_short_help_str(100)) for name in own])
        with formatter.section("Passes, one at a time"):
            formatter.write_dl([(name, entry.summary) for name, entry in PASSES.items()])


def _status(error: BaseException, terminal: Terminal) -> int:
    """The exit code for ``error``, which is told in one line; a traceback only with ``--debug``."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, _Terminated) or isinstance(error.__cause__, _Terminated):
        return TERMINATED
    if isinstance(error, click.exceptions.Abort | KeyboardInterrupt):
        terminal.close()
        terminal.error("interrupted; nothing was left half-written", INTERRUPTED, "Interrupted")
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        _discard_output()
        return 0
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return error.exit_code
    if isinstance(error, click.ClickException):
        terminal.error(_usage_message(error), error.exit_code, "UsageError")
        return error.exit_code
    if terminal.debug:
        import traceback

        traceback.print_exception(error)
    kind, code, message = type(error).__name__, 1, str(error)
    if isinstance(error, OnnxCompressError):
        code = error.exit_code
    elif isinstance(error, MemoryError):
        code, message = ResourceError.exit_code, "memory ran out; try a smaller --batch or fewer --samples"
    elif isinstance(error, OSError) and error.errno in _EXHAUSTED:
        code, message = ResourceError.exit_code, f"{error.strerror}; free some and run again"
    else:
        hint = "" if terminal.debug else "; run again with --debug for the traceback"
        message = f"{kind}: {message}: this is a bug in onnxcompress, please report it{hint}"
    terminal.error(message, code, kind)
    return code


def _usage_message(error: click.ClickException) -> str:
    """click's message in one line of the form that all errors have."""
    text = error.format_message().strip().removesuffix(".")
    for kind in ("integer", "float"):  # click's name of a number with limits
        text = text.replace(f"is not a valid {kind} range", f"is not {'an' if kind == 'integer' else 'a'} {kind}")
    command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx is not None else None
    see = f"; see {command} --help" if command and not text.endswith("?") else ""
    return f"{text[:1].lower()}{text[1:]}{see}"


def _discard_output() -> None:
    """The reader has gone, which is no error of ours: write no more to stdout, nor may the interpreter at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Terminated(KeyboardInterrupt):
    """SIGTERM: like Ctrl-C, so that user code and libraries let it pass and what is half-written goes away."""


def _terminate(number: int, frame: Any) -> NoReturn:
    raise _Terminated


def main() -> NoReturn:
    """The console script."""
    signal.signal(signal.SIGTERM, _terminate)
    cli.main()


def _set(name: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    def callback(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            setattr(ctx.ensure_object(Terminal), name, True)

    return callback


def _flag(name: str, help_text: str) -> Callable[[Any], Any]:
    return click.option(
        f"--{name}", is_flag=True, expose_value=False, is_eager=True, callback=_set(name), help=help_text
    )


def _debug(command: Any) -> Any:
    return _flag("debug", "Show the traceback of an error.")(command)


def _output_options(command: Any) -> Any:
    command = _debug(command)
    command = _flag("quiet", "Print errors and warnings only.")(command)
    return _flag("json", "Print one JSON object on stdout and everything else on stderr.")(command)


class _Number(click.FloatRange):
    """A finite number: NaN is inside of every range."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


_MODEL = click.Path(dir_okay=False, path_type=str)
_FILE = click.Path(dir_okay=False, path_type=str)
pass_terminal = click.make_pass_decorator(Terminal, ensure=True)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "--version", prog_name="onnxcompress")
@_debug
def cli() -> None:
    """ONNX in, a smaller and faster ONNX out, with proof.

    onnxcompress compress model.onnx --data samples.npz -o small.onnx
    """


# ----------------------------------------------------------------------------------------------------------------------
# Options that commands share


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


_data_options = _options(
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

_judge_options = _options(
    click.option(
        "--eval-data", metavar="DATA", help="Samples, with or without labels, to judge by; default: a tenth of --data."
    ),
    click.option("--target", metavar="NAME", help="What to compress for; default: the recipe's target, or cpu."),
    click.option("--random-data", is_flag=True, help="Calibrate on random data: the accuracy is then unknown."),
    click.option(
        "--report", metavar="FILE", type=_FILE, help="Write the full report as JSON: every change and refusal."
    ),
)

_output_option = click.option(
    "-o", "--output", required=True, metavar="OUT", type=_FILE, help="File to write; never the model itself."
)


def _preprocess(text: str | None) -> Any:
    if text is None:
        return None
    from onnxcompress.data import Preprocess

    return Preprocess.parse(text)


def _check_files(
    model: str,
    options: Mapping[str, Any],
    report: str | None,
    save_recipe: str | None = None,
    pages: Sequence[str] = (),
) -> None:
    """Refuse files that cannot be written, or that would replace one that is read or written too, before any work."""
    others = {"the model": model, "the output": options["output"]}
    named = {"data": "data", "eval_data": "evaluation data", "recipe": "recipe", "evaluate": "evaluator"}
    named |= {"teacher": "teacher", "checkpoint": "checkpoint"}
    others |= {f"the {what}": options.get(name) for name, what in {**named, "preprocess": "preprocessing"}.items()}
    _check_written({"the report": report, "the saved recipe": save_recipe, **_numbered("page", pages)}, others, [model])


def _numbered(what: str, paths: Sequence[str]) -> dict[str, str]:
    return {f"{what} {number}": path for number, path in enumerate(paths, 1)}


def _check_written(files: Mapping[str, str | None], others: dict[str, Any], models: Sequence[str]) -> None:
    """Refuse ``files`` that would replace one of ``others``, of each other, or of what belongs to ``models``."""
    from onnxcompress.destination import checked_destination
    from onnxcompress.io import model_files

    for what, path in files.items():
        if path is not None:
            if checked_destination(path, others).exists():
                for model in models:
                    checked_destination(path, {f"the model's {file.name}": file for file in model_files(model)})
            others[what] = path


def _finish(terminal: Terminal, result: CompressResult, report: str | None, pages: Sequence[str] = ()) -> None:
    """Print and write what there is to tell, then raise the budget that was missed."""
    from onnxcompress.report import compress_report, print_compress, to_json, write_text

    full = compress_report(result) if terminal.json or report is not None or pages else None
    if report is not None and result.after is not None:
        write_text(report, to_json(full) + "\n")
    if pages and full is not None and result.after is not None:
        from onnxcompress.pages import compress_document

        _write_pages(pages, lambda plain: compress_document(plain, result.recipe.to_yaml()), full)
    if terminal.quiet:
        terminal.warn(result.warnings)
    print_compress(terminal.human, result)
    terminal.result(full)
    if result.failure is not None:
        raise result.failure


def _write_pages(pages: Sequence[str], document: Callable[[Any], Any], full: Mapping[str, Any]) -> None:
    """Write every page of a report; pages are made from what its JSON file would hold."""
    import json

    from onnxcompress.pages import render_page
    from onnxcompress.report import to_json, write_text

    plain = json.loads(to_json(full))
    made = document(plain)
    for page in pages:
        write_text(page, render_page(page, made, plain["tool"]))


def _check_pages(pages: Sequence[str]) -> None:
    """Refuse pages that cannot be made, before any work."""
    if pages:
        from onnxcompress.pages import check_page

        for page in pages:
            check_page(page)


_page_option = click.option(
    "--page", "pages", multiple=True, type=_FILE, metavar="FILE.html|.md", help="Write a page to read; repeatable."
)


@contextmanager
def _one_process_writes(terminal: Terminal, options: dict[str, Any]) -> Iterator[bool]:
    """Of the processes that torchrun started the first one writes and speaks (True); the others work for it."""
    if os.environ.get("RANK", "0") == "0" or "MASTER_ADDR" not in os.environ:
        yield True
        return
    import tempfile
    from pathlib import Path

    terminal.silent, terminal.quiet, terminal.json = True, True, False
    with tempfile.TemporaryDirectory(prefix="onnxcompress-") as folder:
        options["output"] = Path(folder) / "other.onnx"
        yield False


# ----------------------------------------------------------------------------------------------------------------------
# Commands


@cli.command(short_help="Compress a model: passes, proof of accuracy, proof of speed.")
@click.argument("model", type=_MODEL)
@_output_option
@_data_options
@_judge_options
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    help="int8, int8-accurate, prune-int8, fp16, lossless, or a YAML file; default: int8 (for cuda: fp16).",
)
@click.option("--evaluate", metavar="FILE.py:FUNCTION", help="Task metric: gets a function that runs the model.")
@click.option(
    "--max-drop",
    type=_Number(0),
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
    type=_Number(0, min_open=True),
    metavar="RATIO",
    help="Fail where the result surely runs at less than RATIO times the original's speed.",
)
@click.option(
    "--benchmark/--no-benchmark", default=True, show_default=True, help="Time the result against the original."
)
@click.option(
    "--benchmark-seconds",
    type=_Number(0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="S",
    help="About how long that may take.",
)
@click.option("--force", is_flag=True, help="Write the result although it misses a budget.")
@click.option("--save-recipe", metavar="FILE", type=_FILE, help="Write the recipe with everything that was decided.")
@click.option("--dry-run", is_flag=True, help="Check model, recipe and data, print the plan, write nothing.")
@_page_option
@_output_options
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
    _check_files(model, options, report, save_recipe, pages)
    _check_pages(pages)
    options["preprocess"] = _preprocess(options["preprocess"])
    options["trace"] = bool(pages)
    if options["max_drop"] is None:
        options["max_drop"] = "auto"
    from onnxcompress.compress import compress as run

    with _one_process_writes(terminal, options) as writes:
        result = run(model, progress=terminal.progress, check=False, **options)
    if not writes:
        report, save_recipe, pages = None, None, ()
    if save_recipe is not None and result.saved is not None:
        from onnxcompress.report import write_text

        write_text(save_recipe, result.recipe.to_yaml())
    _finish(terminal, result, report, pages)


@cli.command(short_help="Operators, parameters, MACs, and what would be quantised and why not.")
@click.argument("model", type=_MODEL)
@click.option("--target", default="cpu", show_default=True, metavar="NAME", help="What to plan the quantisation for.")
@click.option(
    "--coupling", is_flag=True, help="Also list the channels that can be removed together, and why others stay."
)
@click.option(
    "--sensitivity", is_flag=True, help="Measure what each layer costs in accuracy once it is quantised; needs --data."
)
@_data_options
@_output_options
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
    from onnxcompress.inspect_model import inspect_model, inspect_sensitivity
    from onnxcompress.report import print_inspection, print_sensitivity

    inspection = inspect_model(model, target=target, coupling=coupling, progress=terminal.progress)
    report = inspection.to_dict()
    print_inspection(terminal.human, inspection)
    if sensitivity:
        options["preprocess"] = _preprocess(options["preprocess"])
        found = inspect_sensitivity(model, data, target=target, seed=seed or 0, progress=terminal.progress, **options)
        print_sensitivity(terminal.human, found)
        report["sensitivity"] = found.to_dict()
    terminal.result(report)


@cli.command(short_help="Compare all outputs of two models.")
@click.argument("a", type=_MODEL)
@click.argument("b", type=_MODEL)
@_data_options
@click.option(
    "--tolerance",
    type=_Number(0),
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
@_output_options
@pass_terminal
def compare(
    terminal: Terminal, /, a: str, b: str, tolerance: float | None, optimization: Any, threads: int, **data: Any
) -> None:
    """Run A (the reference) and B on the same samples and compare every output.

    Without --data the samples are random but fit the inputs; the same seed gives the same samples.
    """
    from onnxcompress.report import SCHEMA, comparison_report, print_comparisons
    from onnxcompress.verify import compare as run

    with _samples(terminal, a, b, **data) as samples:
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


class _Numbers(click.ParamType[Any]):
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


@cli.command(cls=_BenchmarkCommand, short_help="Time models against each other, in pairs, with an interval.")
@click.argument("models", type=_MODEL, nargs=-1, required=True)
@_data_options
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    metavar="NAME[,OPTION=VALUE...]",
    help="onnxruntime:cpu (the default), onnxruntime:cuda or openvino; repeatable.",
)
@click.option(
    "--seconds",
    type=_Number(0, min_open=True),
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
    type=_Number(0, min_open=True),
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
    "--throughput-batches", "batches", type=_Numbers(1, 1 << 20), metavar="N,N,...", help="Batches to run, one by one."
)
@click.option(
    "--throughput-threads",
    "thread_counts",
    type=_Numbers(0, max(64, os.cpu_count() or 1)),
    metavar="N,N,...",
    help="Thread counts to run them with.",
)
@click.option(
    "--isolate/--no-isolate", default=None, help="One process a model and runtime; default: where runtimes clash."
)
@_page_option
@click.option("--report", type=_FILE, metavar="FILE", help="Write the full report as JSON.")
@click.option(
    "--json-file", type=_FILE, metavar="FILE.json", help="The same; `--json FILE.json` is short for it.", hidden=True
)
@click.option("--save-samples", type=_FILE, metavar="FILE.npz", help="Write every time that was taken, in nanoseconds.")
@_output_options
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
    **options: Any,
) -> None:
    """Time MODELS on every runtime: pairs in random order, one thread unless --threads says otherwise.

    The first model and the first runtime are what the others are compared with; above 1 the other one is faster.
    `--json` prints JSON on stdout, `--json FILE.json` writes it to a file.
    """
    files = {"the report": report, "the JSON file": json_file, "the samples": save_samples, **_numbered("page", pages)}
    _check_written(files, {"the data": data, "the preprocessing": preprocess, **_numbered("model", models)}, models)
    from onnxcompress.benchmark import benchmark_models
    from onnxcompress.compress import slower_error
    from onnxcompress.report import matrix_report, print_matrix, to_json, write_samples, write_text

    _check_pages(pages)
    if pages:
        options["trace"] = True if options["trace"] is None else options["trace"]
        options["cold_starts"] = 3 if options["cold_starts"] is None else options["cold_starts"]
    given = {name: value for name, value in options.items() if value is not None}
    with _samples(
        terminal, models[0], models[-1], data=data, preprocess=preprocess, batch=batch, samples=samples, seed=seed
    ) as dataset:
        result = benchmark_models(
            models,
            dataset,
            runtimes=runtimes or ("onnxruntime:cpu",),
            threads=threads or 1,
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

        _write_pages(pages, benchmark_document, full)
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


def _samples(
    terminal: Terminal,
    model: str,
    other: str,
    *,
    data: str | None,
    preprocess: str | None,
    batch: int | None,
    samples: int | None,
    seed: int | None,
) -> Any:
    """The samples of ``--data``, or made-up ones that fit the inputs of ``model``."""
    from onnxcompress.data import open_data, synthetic_data
    from onnxcompress.graph import input_specs
    from onnxcompress.io import load, model_bytes

    graph = load(model)
    model_bytes(other)  # there, before any work
    specs = input_specs(graph)
    if data is None:
        terminal.warn(["no --data: the samples are random"])
        return synthetic_data(specs, graph=graph, samples=samples or 16, batch=batch or 1, seed=seed or 0)
    return open_data(data, specs, batch=batch, preprocess=_preprocess(preprocess), limit=samples)


@cli.command(short_help="Compress a small network that comes along, and show the gain.")
@click.option(
    "-o", "--output", metavar="FOLDER", type=click.Path(file_okay=False), help="Keep model, data and result there."
)
@click.option("--benchmark/--no-benchmark", default=True, show_default=True, help="Time the result.")
@click.option(
    "--benchmark-seconds",
    type=_Number(0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="S",
    help="About how long that may take.",
)
@_output_options
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
        _finish(terminal, result, None)
    if output is None:
        terminal.note("that file was temporary and is gone; keep it with: onnxcompress demo -o FOLDER")


def _keep_demo(folder: Path, model: Path, data: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the model and its data into ``folder``, to go on with."""
    import numpy as np

    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / model.name).write_bytes(model.read_bytes())
        for name, arrays in data.items():
            np.savez(folder / f"{name}.npz", allow_pickle=False, **arrays)
    except OSError as error:
        if error.errno in _EXHAUSTED:
            raise
        raise UsageError(f"{folder}: cannot be written to: {error.strerror or error}") from error


# ----------------------------------------------------------------------------------------------------------------------
# Passes as commands


def _pass_command(name: str) -> click.Command:
    """The command of one pass; its options are the pass's fields."""
    cls = load_pass(name)
    fields = {field: _field_option(field, info) for field, info in cls.model_fields.items()}

    def callback(model: str, report: str | None, verify: bool, **options: Any) -> None:
        terminal = click.get_current_context().ensure_object(Terminal)
        given = {field: options.pop(field) for field in fields}
        step = _make_pass(cls, {field: value for field, value in given.items() if value is not None})
        _check_files(model, {**given, **options}, report)
        options["preprocess"] = _preprocess(options["preprocess"])
        from onnxcompress.compress import compress as run
        from onnxcompress.destination import checked_destination
        from onnxcompress.recipe import Recipe

        checked_destination(options["output"], {"the teacher": given.get("teacher"), "the model": model})
        recipe = Recipe((step,), source=name)
        with _one_process_writes(terminal, options) as writes:
            result = run(
                model,
                recipe=recipe,
                max_drop=None,
                benchmark=False,
                verify=verify,
                progress=terminal.progress,
                check=False,
                **options,
            )
        _finish(terminal, result, report if writes else None)

    shared = _options(_output_option, _data_options, _judge_options, _verify_option, _output_options)
    command = click.command(name, help=_help(cls), short_help=PASSES[name].summary)(shared(callback))
    command.params[:0] = [click.Argument(["model"], type=_MODEL), *fields.values()]
    return command


_verify_option = click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Compare the outputs with the original's."
)


def _help(cls: type[Pass]) -> str:
    return (cls.__doc__ or "").strip().split("\n\n")[0]


def _make_pass(cls: type[Pass], options: Mapping[str, Any]) -> Pass:
    from pydantic import ValidationError

    from onnxcompress.recipe import option_error

    try:
        return cls.model_validate(options)
    except ValidationError as error:
        path, text = option_error(error, cls)
        raise UsageError(f"--{'.'.join(str(part) for part in path).replace('_', '-')}: {text}") from error


def _field_option(name: str, info: FieldInfo) -> click.Option:
    """The option for one field; what click has no type for is given as YAML, as in a recipe."""
    from typing import Literal, get_args, get_origin

    flag = "--" + name.replace("_", "-")
    annotation: Any = info.annotation
    arguments = [a for a in get_args(annotation) if a is not type(None)]
    if type(None) in get_args(annotation) and len(arguments) == 1:
        annotation = arguments[0]
    told = f"{info.description.removesuffix('.')}." if info.description else ""
    if not info.is_required() and info.default not in (None, (), [], {}):
        told = f"{told} Default: {getattr(info.default, 'value', info.default)}.".strip()
    if annotation is bool:
        return click.Option([f"{flag}/--no-{name.replace('_', '-')}", name], default=None, help=told)
    origin = get_origin(annotation)
    if origin is Literal and all(isinstance(value, str) for value in get_args(annotation)):
        return click.Option([flag, name], type=click.Choice(get_args(annotation)), default=None, help=told)
    if origin in (tuple, list, frozenset, set) and get_args(annotation)[:1] == (str,):
        return click.Option([flag, name], multiple=True, callback=_none_if_empty, help=f"{told} Repeatable.".strip())
    if annotation in (int, float, str):
        return click.Option([flag, name], type=annotation, default=None, help=told)
    return click.Option([flag, name], default=None, metavar="YAML", callback=_yaml, help=told)


def _none_if_empty(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...] | None:
    return value or None


def _yaml(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    if value is None:
        return None
    from onnxcompress.recipe import parse_yaml

    return parse_yaml(value, param.opts[0])
