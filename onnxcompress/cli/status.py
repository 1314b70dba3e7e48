"""Errors and signals become exit codes and one line each."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import click

from onnxcompress.atomic import NO_ROOM
from onnxcompress.cli.terminal import Terminal
from onnxcompress.errors import OnnxCompressError, ResourceError

__all__ = ["INTERRUPTED", "TERMINATED", "Terminated", "discard_output", "exit_status", "terminate"]


INTERRUPTED = 130


TERMINATED = 143


def exit_status(error: BaseException, terminal: Terminal) -> int:
    """The exit code for ``error``, which is told in one line; a traceback only with ``--debug``."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, Terminated) or isinstance(error.__cause__, Terminated):
        return TERMINATED
    if isinstance(error, click.exceptions.Abort | KeyboardInterrupt):
        terminal.close()
        terminal.error("interrupted; nothing was left half-written", INTERRUPTED, "Interrupted")
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        discard_output()
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
    elif isinstance(error, OSError) and error.errno in NO_ROOM:
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


def discard_output() -> None:
    """The reader has gone, which is no error of ours: write no more to stdout, nor may the interpreter at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: like Ctrl-C, so that user code and libraries let it pass; what is half-written goes away."""


def terminate(number: int, frame: Any) -> NoReturn:
    raise Terminated
