"""The top-level command: finds commands and passes, and ends with a status."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import click

from onnxcompress.cli.options import debug_option
from onnxcompress.cli.status import discard_output, exit_status
from onnxcompress.cli.terminal import Terminal
from onnxcompress.passes import PASSES
from onnxcompress.version import __version__

__all__ = ["Group", "cli"]


class Group(click.Group):
    """The top-level command."""

    def main(self, args: Any = None, prog_name: str | None = None, *more: Any, **extra: Any) -> NoReturn:
        """Run the command line ``args`` and exit with its status."""
        terminal = extra.setdefault("obj", None) or Terminal()
        extra["obj"] = terminal
        extra["standalone_mode"] = False
        try:
            status = super().main(args, prog_name or "onnxcompress", *more, **extra)
            if sys.stdout is not None:  # closed by the caller
                sys.stdout.flush()
        except BaseException as error:
            if isinstance(error, click.UsageError):  # may be raised before --json is read
                terminal.json |= "--json" in (args if args is not None else sys.argv)
            status = exit_status(error, terminal)
        finally:
            terminal.close()
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a closed pipe is kept from click, which makes exit code 1 of it."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            discard_output()
            return 0

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *PASSES]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = super().get_command(ctx, cmd_name)
        if command is None and cmd_name.replace("-", "_") in PASSES:
            from onnxcompress.cli.one_pass import pass_command

            command = pass_command(cmd_name.replace("-", "_"))
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


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "--version", prog_name="onnxcompress")
@debug_option
def cli() -> None:
    """ONNX in, a smaller and faster ONNX out, with proof.

    onnxcompress compress model.onnx --data samples.npz -o small.onnx
    """
