"""The commands and the program in README.md do what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(r"<!-- run by tests/test_readme.py -->\n```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)
#: enough to see that a command works; the figures are not looked at
SHORT = {
    "demo": "--benchmark-seconds 2",
    "benchmark": "--seconds 0.5 --sessions 6",
    "compress": "--benchmark-seconds 0.5",
    "prune_channels": "--samples 96 --sweeps 1",
}


def blocks() -> list[tuple[str, str]]:
    return [(match["language"], match["code"]) for match in BLOCK.finditer(README.read_text(encoding="utf-8"))]


def shortened(line: str) -> str:
    words = line.split()
    return " ".join([*words, SHORT.get(words[1], "")]) if words[:1] == ["onnxcompress"] else line


@pytest.mark.slow
def test_every_block_runs(tmp_path: Path) -> None:
    found = blocks()
    assert [language for language, _ in found].count("bash") >= 4
    assert "python" in [language for language, _ in found]
    # The command must be the one of this interpreter, also where the environment is not activated.
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "onnxcompress").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m onnxcompress "$@"\n')
    (commands / "onnxcompress").chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
    printed = ""
    for language, code in found:
        if language == "python":
            command = [sys.executable, "-c", code]
        else:
            command = ["bash", "-euo", "pipefail", "-c", "\n".join(map(shortened, code.splitlines()))]
        answer = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        assert answer.returncode == 0, f"{code}\n{answer.stderr}"
        printed += answer.stdout
    assert "FASTER" in printed.split("written: ")[0], "the demo must be faster"
    assert (work / "small.onnx").stat().st_size < 0.4 * (work / "digits" / "digits_cnn.onnx").stat().st_size


def test_exit_codes_are_those_of_the_errors() -> None:
    from onnxcompress import errors

    told = {int(code) for code in re.findall(r"^\| (\d+) \|", README.read_text(encoding="utf-8"), re.MULTILINE)}
    classes = [getattr(errors, name) for name in errors.__all__]
    assert {cls.exit_code for cls in classes} | {0, 130} == told


def test_every_pass_is_in_the_table() -> None:
    from onnxcompress.passes import PASSES

    told = re.findall(r"^\| `(\w+)` \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(told) == sorted(PASSES)


def test_what_is_promised_is_shown_by_tests_that_exist() -> None:
    named = re.findall(r"`tests/(\w+)\.py::(\w+)`", README.read_text(encoding="utf-8"))
    assert len(named) > 10
    for file, test in named:
        assert f"def {test}(" in (README.parent / "tests" / f"{file}.py").read_text(encoding="utf-8"), test


def test_the_floors_are_those_of_the_package() -> None:
    told = re.findall(r"^\| (\w+) \| ([\d.]+) \|", (README.parent / "SECURITY.md").read_text("utf-8"), re.MULTILINE)
    setup = (README.parent / "setup.cfg").read_text(encoding="utf-8")
    assert len(told) == 3
    assert all(f"{name}>={floor}" in setup for name, floor in told)
