"""The command line: parse, call the API, print, return a status.

Only click is imported up here. ``--help`` and a mistyped option must answer at once, so whatever reads a model is
imported by the command that needs it, and the list of passes comes from a table that imports none of them.

Exit codes: 0 done; 1 internal error; 2 usage or bad data; 3 invalid or unsafe model; 4 accuracy budget missed;
5 slower than allowed; 6 runtime or provider unavailable; 7 resource limit; 130 interrupted.
"""

from __future__ import annotations

import signal
from typing import NoReturn

from onnxcompress.cli import benchmark, compare, compress, demo, inspect
from onnxcompress.cli.group import cli
from onnxcompress.cli.status import terminate

__all__ = ["cli", "main"]

for command in (compress.compress, inspect.inspect, compare.compare, benchmark.benchmark, demo.demo):
    cli.add_command(command)


def main() -> NoReturn:
    """The console script."""
    signal.signal(signal.SIGTERM, terminate)
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows; nohup ignores it, which is left so
    if hangup is not None and signal.getsignal(hangup) == signal.SIG_DFL:
        signal.signal(hangup, terminate)
    cli.main()
