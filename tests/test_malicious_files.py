"""Files of a stranger: refused with exit code 3 or 7 and one line; nothing else is opened, nothing is written.

The command line runs in this process, under an audit hook that sees every file that Python opens, and so does the child
process that opens models first: a ``sitecustomize`` installs the hook there.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon
import pytest
from malicious import MALICIOUS, SLOW

import onnxcompress
from onnxcompress.cli import cli

#: where code and what the system tells about itself lie
HARMLESS = [
    *{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")},
    *(str(Path(str(module.__file__)).parent) for module in (onnxcompress, onnx, onnx_graphsurgeon)),
    *(str(Path(onnxcompress.__file__).parents[1] / name) for name in ("passes", "onnxcompress.egg-info")),
    *(sys.prefix, sys.base_prefix),
    *(
        "/proc",
        "/sys",
        "/dev/null",
        "/dev/urandom",
        "/usr/lib",
        "/usr/share",
        "/etc/localtime",
        "/etc/os-release",
        "/lib",
    ),
]

_HOOK = """
import os, sys
_log = os.open(os.environ["OPENED_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def _hook(event, arguments):
    if event == "open" and not isinstance(arguments[0], int):
        os.write(_log, os.fsencode(arguments[0]) + b"\\n")
sys.addaudithook(_hook)
"""


class Watch:
    """Records what this process opens; a hook can never be removed, so it is switched."""

    def __init__(self) -> None:
        self.opened: list[str] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self.opened is not None and not isinstance(arguments[0], int):
            self.opened.append(os.fsdecode(arguments[0]))


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture
def watched(watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What this process and its child open while the test runs; complete once the test has read it at its end."""
    hook, log = tmp_path / "hook", tmp_path / "hook" / "opened"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(_HOOK)
    log.touch()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(hook), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("OPENED_LOG", str(log))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    opened: list[str] = []
    watch.opened = opened
    yield opened
    watch.opened = None


def outside(opened: list[str], allowed: list[Path]) -> set[str]:
    """Paths that lie neither in ``allowed`` nor where code lies. A name without a folder is opened below one."""
    inside = [os.path.realpath(path) for path in (*allowed, *HARMLESS)] + [str(path) for path in (*allowed, *HARMLESS)]
    return {
        path
        for path in opened
        if "/" in path and not any(path == folder or path.startswith(folder + "/") for folder in inside)
    }


def listing(folder: Path) -> dict[str, Any]:
    """What lies below ``folder``; of a folder only its mode, since a file may come and go."""
    found = {str(path): path.lstat() for path in sorted(folder.rglob("*"))}
    return {
        p: s.st_mode if stat.S_ISDIR(s.st_mode) else (s.st_mode, s.st_size, s.st_mtime_ns) for p, s in found.items()
    }


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code, capsys.readouterr().err


def test_there_are_enough() -> None:
    assert len(MALICIOUS) >= 40


@pytest.mark.parametrize("name", MALICIOUS)
def test_refused(
    name: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    watched: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "outer" / "model"
    folder.mkdir(parents=True)
    MALICIOUS[name](folder)
    for variable, value in SLOW.get(name, {}).items():
        monkeypatch.setenv(variable, value)
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    model, output = folder / "model.onnx", folder / "out.onnx"
    before = listing(tmp_path / "outer")
    watched.clear()
    code, said = run(["compress", str(model), "-o", str(output), "--recipe", "lossless", "--no-benchmark"], capsys)
    opened = [*watched, *(tmp_path / "hook" / "opened").read_text().splitlines()]
    assert code in (3, 7), said
    assert said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said
    assert len(said) < 1200
    assert outside(opened, [folder, temporary, tmp_path / "hook"]) == set()
    assert str(folder.parent / "secret") not in opened
    assert listing(tmp_path / "outer") == before
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("name", ["parent_folder", "truncated_file", "cycle", "hard_link"])
@pytest.mark.parametrize("command", ["inspect", "compare", "benchmark", "fold-batch-norm"])
def test_every_command_refuses(name: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    MALICIOUS[name](folder)
    model = str(folder / "model.onnx")
    words = {"compare": [model], "benchmark": [model], "fold-batch-norm": ["-o", str(folder / "out.onnx")]}
    before = listing(tmp_path)
    code, said = run([command, model, *words.get(command, [])], capsys)
    assert code == 3
    assert said.startswith("error: ") and said.count("\n") == 1
    assert listing(tmp_path) == before


def test_as_a_process(tmp_path: Path) -> None:
    MALICIOUS["bomb_expand"](tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "onnxcompress", "inspect", str(tmp_path / "model.onnx")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **SLOW["bomb_expand"]},
    )
    assert done.returncode == 7
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_the_watch_sees(tmp_path: Path, watched: list[str]) -> None:
    """Both hooks work, or the tests above would prove nothing."""
    (tmp_path / "seen").write_text("")
    subprocess.run([sys.executable, "-P", "-c", f"open({str(tmp_path / 'seen')!r})"], check=True)
    opened = (tmp_path / "hook" / "opened").read_text().splitlines()
    assert str(tmp_path / "seen") in watched and str(tmp_path / "seen") in opened
    assert outside([*watched, "/etc/passwd"], [tmp_path]) == {"/etc/passwd"}
