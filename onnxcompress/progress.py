"""Progress bars with a remaining time, drawn only for work that takes longer than a moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from onnxcompress.base import Progress, SilentProgress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

__all__ = ["RichProgress", "make_progress"]

Item = TypeVar("Item")

#: seconds of work before anything is drawn
PATIENCE = 2.0


def make_progress(console: Console, *, quiet: bool = False) -> Progress:
    """Bars on ``console`` where it is a terminal and ``quiet`` is not asked for; otherwise nothing is shown."""
    return RichProgress(console) if console.is_terminal and not quiet else SilentProgress()


class RichProgress:
    """Bars on a terminal: one line for each piece of work in progress, the outermost first.

    A line appears once its work has taken ``patience`` seconds and vanishes when it is done. Drawing happens on a
    thread of its own; :meth:`paused` stops that thread, since it would disturb measured times.
    """

    def __init__(self, console: Console, patience: float = PATIENCE) -> None:
        self._console = console
        self._patience = patience
        self._lock = threading.RLock()
        self._bars: Bars | None = None
        self._timer: threading.Timer | None = None
        self._pauses = 0
        self._tasks: list[_Task] = []

    def track(self, items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
        """Yield ``items`` while showing how far the work is; ``total`` defaults to ``len(items)`` where it has one."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        task = _Task(description, total)
        with self._lock:
            self._tasks.append(task)
        self._schedule()
        try:
            for item in items:
                yield item
                self._advance(task)
        finally:
            self._finish(task)

    def describe(self, description: str) -> None:
        """Say something else about the innermost piece of work."""
        with self._lock:
            if self._tasks:
                task = self._tasks[-1]
                task.description = description
                if self._bars is not None and task.line is not None:
                    self._bars.update(task.line, description=description)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which nothing is drawn and no thread of this object runs.

        The innermost piece of work is named once, before it starts, so that nobody takes the silence for a hang.
        """
        from rich.control import Control
        from rich.segment import ControlType

        with self._lock:
            self._pauses += 1
            self._stop()
            told = self._tasks[-1].description if self._tasks and self._pauses == 1 else None
        if told is not None:
            self._console.print(f"{told} ...", end="\r", markup=False, highlight=False, overflow="crop", no_wrap=True)
        try:
            yield
        finally:
            if told is not None:
                self._console.control(Control((ControlType.ERASE_IN_LINE, 2)))
            with self._lock:
                self._pauses -= 1
            self._schedule()

    def close(self) -> None:
        """Clear the screen of whatever is drawn; work that an exception ended is forgotten."""
        with self._lock:
            self._tasks.clear()
            self._stop()

    def _advance(self, task: _Task) -> None:
        with self._lock:
            task.done += 1
            if self._bars is not None and task.line is not None:
                self._bars.advance(task.line)

    def _finish(self, task: _Task) -> None:
        with self._lock:
            if task not in self._tasks:
                return  # closed
            self._tasks.remove(task)
            if self._bars is not None and task.line is not None:
                self._bars.remove_task(task.line)
            if not self._tasks:
                self._stop()

    def _schedule(self) -> None:
        """Look again when the oldest piece of work that has no line is due; at most one timer waits at a time."""
        with self._lock:
            hidden = [t for t in self._tasks if t.line is None]
            if self._pauses or self._timer is not None or not hidden:
                return
            due = min(t.start for t in hidden) + self._patience
            self._timer = threading.Timer(max(0.0, due - time.monotonic()), self._show)
            self._timer.daemon = True
            self._timer.start()

    def _show(self) -> None:
        with self._lock:
            if self._timer is not threading.current_thread():
                return  # stopped while this one was about to run
            self._timer = None
            if self._pauses:
                return
            now = time.monotonic()
            due = [t for t in self._tasks if t.line is None and now - t.start >= self._patience]
            if due and self._bars is None:
                self._bars = _bars(self._console)
                self._bars.start()
            if self._bars is not None:
                for task in due:
                    task.line = self._bars.add_task(task.description, total=task.total, completed=task.done)
            self._schedule()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        for task in self._tasks:
            task.line = None


class _Task:
    """One piece of work: what has been done of it, and its line once it has one."""

    def __init__(self, description: str, total: int | None) -> None:
        self.description = description
        self.total = total
        self.done = 0
        self.start = time.monotonic()
        self.line: TaskID | None = None


def _bars(console: Console) -> Bars:
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=30),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left", style="dim"),
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
    )
