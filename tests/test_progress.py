"""Progress bars: drawn on a terminal, after a moment, never while time is measured."""

from __future__ import annotations

import io
import threading
import time

import pytest
from rich.console import Console

from onnxcompress.base import SilentProgress
from onnxcompress.progress import RichProgress, make_progress


def terminal() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=100, color_system=None), file


def wait_for(condition: object, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


def test_nothing_is_shown_where_nobody_looks() -> None:
    file = Console(file=io.StringIO())
    assert isinstance(make_progress(file), SilentProgress)
    console, _ = terminal()
    assert isinstance(make_progress(console, quiet=True), SilentProgress)
    assert isinstance(make_progress(console), RichProgress)


def test_short_work_draws_nothing() -> None:
    console, file = terminal()
    assert list(RichProgress(console, patience=5.0).track(range(100), "short")) == list(range(100))
    assert file.getvalue() == ""


def test_long_work_shows_what_how_far_and_how_long() -> None:
    console, file = terminal()
    progress = RichProgress(console, patience=0.0)
    for i in progress.track(iter(range(4)), "calibrating [red]", total=4):
        if i == 2:
            wait_for(lambda: "2/4" in file.getvalue())
    text = file.getvalue()
    assert "calibrating [red]" in text
    assert "left" in text


def test_what_is_said_of_the_work_can_change() -> None:
    console, file = terminal()
    progress = RichProgress(console, patience=0.0)
    progress.describe("nothing is going on")
    for i in progress.track(range(2), "at first", total=2):
        if i == 1:
            wait_for(lambda: "at first" in file.getvalue())
            progress.describe("by now")
            wait_for(lambda: "by now" in file.getvalue())
    assert "nothing is going on" not in file.getvalue()


def test_the_total_is_read_from_a_list() -> None:
    console, file = terminal()
    for _ in RichProgress(console, patience=0.0).track([1, 2, 3], "list"):
        wait_for(lambda: "/3" in file.getvalue())


def test_nested_work_has_a_line_each() -> None:
    console, file = terminal()
    progress = RichProgress(console, patience=0.0)
    for _ in progress.track([1], "outer"):
        for _ in progress.track([1], "inner"):
            wait_for(lambda: "outer" in file.getvalue() and "inner" in file.getvalue())


def test_nothing_is_drawn_while_paused_and_no_thread_runs() -> None:
    console, file = terminal()
    progress = RichProgress(console, patience=0.0)
    before = set(threading.enumerate())
    for _ in progress.track([1], "outer"):
        wait_for(lambda: "outer" in file.getvalue())
        with progress.paused():
            wait_for(lambda: set(threading.enumerate()) <= before)
            assert file.getvalue().endswith("outer ...\r")
            written, drawn = len(file.getvalue()), file.getvalue().count("outer")
            for _ in progress.track([1, 2], "measured"):
                time.sleep(0.05)
            assert set(threading.enumerate()) <= before
            assert len(file.getvalue()) == written
        wait_for(lambda count=drawn: file.getvalue().count("outer") > count)


def test_an_exception_leaves_a_clean_screen() -> None:
    console, file = terminal()
    progress = RichProgress(console, patience=0.0)
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="stop"):
        for _ in progress.track([1], "work"):
            wait_for(lambda: "work" in file.getvalue())
            raise ValueError("stop")
    progress.close()
    wait_for(lambda: set(threading.enumerate()) <= before)
    assert list(progress.track([1], "again")) == [1]
