"""Where the words of a command go: results to stdout, all else to stderr."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from onnxcompress.base import Progress

__all__ = ["Terminal", "console", "one_line", "pass_terminal"]


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
        return console(stderr=self.json, quiet=self.quiet)

    @cached_property
    def notes(self) -> Console:
        """The console for warnings and progress: stderr, also with ``--quiet``."""
        return console(stderr=True)

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
        click.echo(f"error: {one_line(message)}", err=True)
        if self.json and not self._answered:
            from onnxcompress.report import SCHEMA, to_json

            with suppress(OSError):  # the answer may have failed because nothing can be written there
                click.echo(to_json({"schema": SCHEMA, "error": {"type": kind, "message": message, "exit_code": code}}))

    def close(self) -> None:
        """Clear what is drawn of the progress."""
        close = getattr(self._progress, "close", None)
        if close is not None:
            close()


def console(*, stderr: bool, quiet: bool = False) -> Console:
    from rich.console import Console

    class Plain(Console):
        """Leaves a closed pipe to :func:`exit_status`; rich's own answer is exit code 1."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    console = Plain(stderr=stderr, quiet=quiet, markup=False, highlight=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160  # a pipe has no width; rich would fold tables at 80
    return console


def one_line(text: str) -> str:
    joined = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in joined)


pass_terminal = click.make_pass_decorator(Terminal, ensure=True)
