"""What other systems lack is done without, and where that is less safe or less exact, nothing crashes.

A ``sitecustomize`` takes away what Windows and macOS do not have before anything of ours is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from malicious import MALICIOUS, model

from onnxcompress import io
from onnxcompress.errors import UnsafeModelError
from onnxcompress.io import load, save

_WITHOUT = """
import errno, mmap, os, signal, sys
for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None
# the interpreter's own modules have read what they need of these
import subprocess, tempfile, shutil, random
shutil._use_fd_functions = False  # as shutil itself finds where os.supports_dir_fd is empty
for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_DIRECTORY", "O_NONBLOCK", "sched_getaffinity", "sysconf", "getloadavg"):
    if hasattr(os, name):
        delattr(os, name)
os.supports_dir_fd = set()
for name in ("MADV_DONTNEED", "MADV_WILLNEED"):
    if hasattr(mmap, name):
        delattr(mmap, name)
for name in ("SIGXCPU", "SIGXFSZ", "SIGHUP", "SIGALRM", "SIGUSR1"):
    if hasattr(signal, name):
        delattr(signal, name)
del errno.EDQUOT
os.environ["HIDDEN"] = "1"
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python where these things are missing, child processes included."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(_WITHOUT)
    paths = (str(hook), os.environ.get("PYTHONPATH"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)

    return run


def external_model(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    onnx.save(model(), folder / "model.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
    return folder / "model.onnx"


def test_compressing(elsewhere: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    check = elsewhere("-c", "import os; print(hasattr(os, 'O_NOFOLLOW'), os.environ['HIDDEN'])")
    assert check.stdout.split() == ["False", "1"]
    path, out = external_model(tmp_path / "m"), tmp_path / "out.onnx"
    words = ["compress", str(path), "-o", str(out), "--recipe", "lossless", "--benchmark-seconds", "0.5", "--json"]
    done = elsewhere("-m", "onnxcompress", *words)
    assert done.returncode == 0, done.stderr
    assert any("cannot limit memory" in warning for warning in json.loads(done.stdout)["warnings"])
    assert {p.name for p in tmp_path.iterdir()} == {"hook", "m", "out.onnx", *(p.name for p in tmp_path.glob("*.data"))}
    assert io.model_sha256(out)


@pytest.mark.parametrize("name", ["parent_folder", "link_to_outside", "linked_folder", "device_by_path"])
def test_refusing(name: str, elsewhere: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    MALICIOUS[name](folder)
    done = elsewhere("-m", "onnxcompress", "inspect", str(folder / "model.onnx"))
    assert done.returncode == 3, done.stderr
    said = [line for line in done.stderr.splitlines() if "cannot limit memory" not in line]
    assert len(said) == 1 and said[0].startswith("error: ")


def test_paths_of_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a backslash separates folders."""
    MALICIOUS["windows_parent_folder"](tmp_path)
    monkeypatch.setattr(os, "sep", "\\")
    with pytest.raises(UnsafeModelError, match="leaves the model's folder"):
        load(tmp_path / "model.onnx")


def test_a_cache_of_links_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where files cannot be opened below an open folder, links are looked at by name."""
    monkeypatch.setattr(os, "supports_dir_fd", set())
    path = external_model(tmp_path / "blobs")
    link = tmp_path / "snapshot"
    link.mkdir()
    for name in ("model.onnx", "w.data"):
        (link / name).symlink_to(path.with_name(name))
    assert save(load(link / "model.onnx"), tmp_path / "out.onnx").bytes > 0
    (link / "w.data").unlink()
    (link / "w.data").symlink_to(tmp_path / "out.onnx")
    with pytest.raises(UnsafeModelError, match="link"):
        load(link / "model.onnx")
