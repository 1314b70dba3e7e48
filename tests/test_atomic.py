"""Files are whole or not there: at whatever instant the writer is killed, on full disks and in read-only folders."""

from __future__ import annotations

import ast
import ctypes
import io as stdio
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import onnx
import pytest
from models import Net

import onnxcompress.passes
from onnxcompress import atomic, io
from onnxcompress.atomic import remove_abandoned, replacing, staging_folder, write_file
from onnxcompress.errors import OnnxCompressError, ResourceError, UsageError
from onnxcompress.graph import Graph
from onnxcompress.io import load, model_files, model_sha256, save
from onnxcompress.quantization.affine import Range
from onnxcompress.quantization.calibration_cache import CalibrationKey, write_ranges
from onnxcompress.report import write_text

KILLED = 86


def model(seed: int, rows: int = 300) -> onnx.ModelProto:
    net = Net(seed=seed)
    net.add("MatMul", net.input("x", ["N", rows]), net.random(rows, rows), to="y")
    net.output("y", ["N", rows])
    return net.model()


def external(folder: Path, seed: int, rows: int = 300) -> Path:
    folder.mkdir()
    path = folder / "model.onnx"
    onnx.save(model(seed, rows), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def forked(child: Callable[[], object], *, kill_after: float | None = None) -> int:
    """Run ``child`` in a process of its own; its exit status: 0, what it ended with, or minus the signal's number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of the runtime, which the child does not use
        process = os.fork()
    if not process:
        status = 1
        try:
            signal.alarm(60)
            child()
            status = 0
        except OnnxCompressError as error:
            status = error.exit_code
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def die() -> None:
    os._exit(KILLED)


class Deadly:
    """Ends the process at the n-th operation on files; a write gets half of its bytes out first."""

    def __init__(self, fatal: int) -> None:
        self.left = fatal
        self.log: list[tuple[str, str]] = []

    def tick(self, kind: str, what: object) -> None:
        self.log.append((kind, str(what)))
        if self.left == 0:
            die()
        self.left -= 1

    def install(self) -> None:
        for kind in ("open", "fsync", "replace", "unlink", "mkdir", "rmdir"):
            setattr(os, kind, self.counted(kind, getattr(os, kind)))
        deadly = self

        class File(stdio.FileIO):
            def write(self, data: Any) -> int:
                view = memoryview(data).cast("B") if len(data) else memoryview(b"")
                if deadly.left == 0:
                    super().write(view[: len(view) // 2])
                deadly.tick("write", self.name)
                return super().write(view) or 0

        os.fdopen = lambda descriptor, mode: File(descriptor, mode)  # type: ignore[assignment, misc]

    def counted(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.tick(kind, args[0])
            return real(*args, **options)

        return call


def at_line(number: int, files: tuple[str, ...]) -> Callable[[], None]:
    """End the process before the n-th line of the modules ``files`` that runs once the first file is made.

    What runs again and again counts once.
    """
    seen: set[tuple[str, int]] = set()
    started = False

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal started
        if frame.f_code.co_filename not in files:
            return None
        started = started or frame.f_code.co_name == "create"
        if started and event == "line":
            seen.add((frame.f_code.co_filename, frame.f_lineno))
            if len(seen) > number:
                die()
        return trace

    return lambda: sys.settrace(trace)


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: what is killed in it is the process, never the machine."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="onnxcompress-tests-", dir=memory) as folder:
        yield Path(folder)


class Scene:
    """A destination with an old model and its data, a new graph to write there, and how to tell which one is there."""

    def __init__(self, folder: Path, rows: int = 300) -> None:
        self.folder = folder / "out"
        self.folder.mkdir()
        self.target = self.folder / "m.onnx"
        self.old: Graph = load(external(folder / "old", 1, rows))
        self.new: Graph = load(external(folder / "new", 2, rows))
        self.new_sha256 = save(self.new, self.target).sha256
        self.old_sha256 = save(self.old, self.target).sha256
        self.before = {file: file.read_bytes() for file in self.folder.iterdir()}

    def reset(self) -> None:
        for file in self.folder.iterdir():
            file.unlink()
        for file, content in self.before.items():
            file.write_bytes(content)

    def write(self) -> None:
        save(self.new, self.target)

    def check(self) -> bool:
        """True where the new model is there; whatever else lies in the folder is ours, and goes with the next one."""
        found = model_sha256(self.target)
        assert found in (self.old_sha256, self.new_sha256)
        assert len(model_files(self.target)) == 2
        others = {p for p in self.folder.iterdir() if p not in model_files(self.target)}
        for file in others:
            assert file.name.startswith(".onnxcompress-") or (file.name.startswith("m-") and file.suffix == ".data")
        assert len(others) <= 2
        return found == self.new_sha256


def test_a_finished_save_leaves_the_model_and_its_data(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    assert forked(scene.write) == 0
    assert scene.check()
    assert names(scene.folder) == sorted(p.name for p in model_files(scene.target))


def test_killed_at_every_operation(quick_path: Path) -> None:
    scene = Scene(quick_path)
    done: list[bool] = []
    while True:
        deadly = Deadly(len(done))

        def child(deadly: Deadly = deadly) -> None:
            deadly.install()
            scene.write()

        status = forked(child)
        assert status in (0, KILLED)
        done.append(scene.check())
        if status == 0:
            break
        scene.reset()
    assert done[-1]
    assert done.index(True) > 8  # two files written, flushed and renamed
    assert done == sorted(done), "once the new model is there, it stays"


def test_killed_at_every_line(quick_path: Path) -> None:
    scene = Scene(quick_path)
    files = tuple(str(module.__file__) for module in (atomic, io))
    seen: set[bool] = set()
    number = 0
    while True:

        def child(number: int = number) -> None:
            at_line(number, files)()
            scene.write()

        status = forked(child)
        assert status in (0, KILLED)
        new = scene.check()
        seen.add(new)
        if status == 0:
            break
        scene.reset()
        number += 1
    assert seen == {False, True}
    assert number > 100


def test_killed_at_random_instants(quick_path: Path, rng: np.random.Generator) -> None:
    """500 times SIGKILL, anywhere between the start and the end of a save of two files."""
    scene = Scene(quick_path, rows=200)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert forked(scene.write) == 0
        times.append(time.perf_counter() - start)
        scene.reset()
    longest = 1.2 * min(times)
    outcomes = []
    for _ in range(500):
        status = forked(scene.write, kill_after=float(rng.uniform(0, longest)))
        assert status in (0, -signal.SIGKILL)
        outcomes.append((scene.check(), status))
        scene.reset()
    assert any(status for _, status in outcomes)
    assert {new for new, _ in outcomes} == {False, True}


def test_power_may_fail_at_any_time(tmp_path: Path) -> None:
    """Every file is flushed before it is renamed, and the data's name is on the disk before the model's."""
    scene = Scene(tmp_path)
    log = tmp_path / "log"

    def child() -> None:
        deadly = Deadly(1 << 30)
        real = os.open, os.fsync, os.replace
        deadly.install()
        scene.write()
        os.open, os.fsync, os.replace = real  # type: ignore[assignment]
        log.write_text("\n".join(" ".join(entry) for entry in deadly.log))

    assert forked(child) == 0
    kinds = [line.split(" ")[0] for line in log.read_text().splitlines()]
    order = [kind for kind in kinds if kind in ("write", "fsync", "replace", "unlink")]
    compact = [kind for i, kind in enumerate(order) if kind != "write" or order[i - 1 : i] != ["write"]]
    assert compact == ["write", "fsync", "replace", "fsync", "write", "fsync", "replace", "fsync", *["unlink"] * 3]


def test_the_data_of_the_old_model_stays_while_another_model_reads_it(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    (scene.folder / "copy.onnx").write_bytes(scene.target.read_bytes())
    data = model_files(scene.target)[1]
    scene.write()
    assert data.exists()
    assert model_files(scene.folder / "copy.onnx")[1] == data
    (scene.folder / "copy.onnx").unlink()
    save(scene.old, scene.target)
    (scene.folder / "broken.onnx").write_bytes(b"not a model")
    scene.write()
    assert data.exists(), "what reads it cannot be told"


def test_data_of_others_is_left_alone(tmp_path: Path) -> None:
    """The data beside a model that another tool wrote, and data that is the input's."""
    path = external(tmp_path / "theirs", 1)
    graph = load(external(tmp_path / "new", 2))
    save(graph, path)
    assert (path.parent / "weights.bin").exists()
    folder = tmp_path / "ours"
    folder.mkdir()
    first = save(graph, folder / "m.onnx")
    (folder / "n.onnx").write_bytes(first.path.read_bytes())
    read = load(folder / "n.onnx")
    first.path.unlink()
    save(load(external(tmp_path / "third", 3)), folder / "m.onnx", source=folder / "n.onnx")
    assert model_sha256(folder / "n.onnx") == first.sha256
    assert read.nodes[0].inputs[1].values.size


# -- what a killed process leaves --------------------------------------------------------------------------------------


def age(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (0, 0), follow_symlinks=False)


def test_what_was_abandoned_goes_with_the_next_file(tmp_path: Path) -> None:
    def child() -> None:
        with staging_folder(tmp_path) as folder, replacing(tmp_path / "a") as file:
            (folder / "staged").write_bytes(bytes(100))
            file.write(b"half")
            file.flush()
            die()

    assert forked(child) == KILLED
    assert len(names(tmp_path)) == 2
    write_file(tmp_path / "b", b"1")
    assert len(names(tmp_path)) == 3, "just left: it may be about to be locked"
    age(tmp_path)
    write_file(tmp_path / "b", b"2")
    assert names(tmp_path) == ["b"]


def test_what_is_being_written_stays(tmp_path: Path) -> None:
    with staging_folder(tmp_path) as folder, replacing(tmp_path / "a") as file:
        (folder / "staged").write_bytes(bytes(100))
        file.write(b"whole")
        file.flush()
        age(tmp_path)
        remove_abandoned(tmp_path)
        assert (folder / "staged").exists()
        assert len(names(tmp_path)) == 2
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_only_our_own_leftovers_go(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / ".onnxcompress-link.tmp").symlink_to(outside / "precious")
    (folder / ".onnxcompress-folder").symlink_to(outside)
    (folder / ".onnxcompress-notes.txt").write_text("x")
    (folder / ".other-1.tmp").write_text("x")
    os.mkfifo(folder / ".onnxcompress-pipe.tmp")
    age(folder)
    before = names(folder)
    remove_abandoned(folder)
    assert names(folder) == before
    assert (outside / "precious").exists()


# -- full disks and read-only folders ----------------------------------------------------------------------------------


def ranges(path: Path) -> None:
    write_ranges(path, CalibrationKey("m", "d", {}), {f"t{i}": Range(-1.0, 1.0) for i in range(300)})


def checkpoint(path: Path) -> None:
    with replacing(path) as file:
        np.savez(file, allow_pickle=False, a=np.zeros(3000), b=np.ones(300))


def text(path: Path) -> None:
    write_text(path, "a report, a page or a recipe\n" * 500)


WRITERS = [text, ranges, checkpoint]


@pytest.mark.parametrize("write", WRITERS)
def test_every_writer_survives_a_kill(tmp_path: Path, write: Callable[[Path], None]) -> None:
    target = tmp_path / "file"
    write(target)
    new = target.read_bytes()
    number = 0
    while True:
        target.write_bytes(b"old")

        def child(number: int = number) -> None:
            Deadly(number).install()
            write(target)

        status = forked(child)
        assert status in (0, KILLED)
        assert target.read_bytes() in (b"old", new)
        if status == 0:
            break
        number += 1
    assert number >= 4
    assert target.read_bytes() == new


@pytest.mark.parametrize("write", [*WRITERS, None])
@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk(tmp_path: Path, write: Callable[[Path], None] | None, existing: bool) -> None:
    """No file may grow beyond a limit: the system refuses the write that crosses it, as a full disk does."""
    if write is None:
        graph = load(external(tmp_path / "source", 1))

        def write(path: Path) -> None:
            save(graph, path)

    folder = tmp_path / "folder"
    folder.mkdir()
    target = folder / "m.onnx"
    write(target)
    size = max(p.stat().st_size for p in folder.iterdir())
    for file in folder.iterdir():
        file.unlink()
    if existing:
        target.write_bytes(b"old")
    before = names(folder)
    for limit in (0, 1, size // 3, size - 1):

        def child(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            write(target)

        assert forked(child) == ResourceError.exit_code
        assert names(folder) == before
        if existing:
            assert target.read_bytes() == b"old"


def drop_privileges() -> None:
    """Root may write anywhere unless it gives up its capabilities (capset, version 3, all sets empty)."""
    if os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
            raise OSError(ctypes.get_errno(), "capset")


@pytest.mark.parametrize("write", [*WRITERS, None])
def test_a_read_only_folder(tmp_path: Path, write: Callable[[Path], None] | None) -> None:
    graph = load(external(tmp_path / "source", 1))
    folder = tmp_path / "folder"
    folder.mkdir()
    target = folder / "m.onnx"
    target.write_bytes(b"old")
    folder.chmod(0o555)

    def child() -> None:
        drop_privileges()
        write(target) if write is not None else save(graph, target)

    try:
        assert forked(child) == UsageError.exit_code
        assert names(folder) == ["m.onnx"]
        assert target.read_bytes() == b"old"
    finally:
        folder.chmod(0o755)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], list[str]]]:
    """A command that runs another one with a file system of 64 KiB in ``disk``; skips where that is not allowed."""
    (tmp_path / "disk").mkdir()

    def wrapped(command: str) -> list[str]:
        mount = f"mount -t tmpfs -o size=64k none {tmp_path}/disk"
        return ["unshare", "--map-root-user", "--mount", "sh", "-c", f"{mount} && ({command}); ls -A {tmp_path}/disk"]

    try:
        subprocess.run(wrapped("true"), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a mount namespace of its own")
    yield wrapped


def test_the_command_on_a_full_disk(tmp_path: Path, small_disk: Callable[[str], list[str]]) -> None:
    onnx.save(model(1), tmp_path / "m.onnx")
    command = f"{sys.executable} -m onnxcompress fold_constants {tmp_path}/m.onnx -o {tmp_path}/disk/out.onnx"
    done = subprocess.run(small_disk(f"{command}; echo status $?"), capture_output=True, text=True, check=False)
    assert done.stdout == "status 7\n", "and nothing is left on the disk"
    assert "No space left on device; nothing was written" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# -- one way to write --------------------------------------------------------------------------------------------------

#: what else opens files for writing: temporary folders that go away with the process, and the system's own files
ELSEWHERE = {
    "io.py": {"copy_linked", "write_files"},
    "data/columns.py": {"__init__", "write"},
    "benchmark/runners.py": {"_written", "write_arrays"},
    "benchmark/worker.py": {"_forget_peak", "main"},
}


def writing_functions(tree: ast.Module) -> set[str]:
    """Functions that open a file for writing, by whatever call."""
    found = set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            modes = [a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
            opens = name in ("open", "fdopen") and any(isinstance(m, str) and set(m) & set("wax+") for m in modes)
            if name in ("write_text", "write_bytes") and not isinstance(node.func, ast.Name):
                opens = True
            if name.startswith("savez"):
                opens = getattr(node.args[0], "id", "") not in ("file", "content")
            if opens or name in ("mkstemp", "NamedTemporaryFile"):
                found.add(function.name)
    return found


def test_all_files_are_written_by_the_atomic_writer() -> None:
    assert onnxcompress.__file__ is not None
    package = Path(onnxcompress.__file__).parent
    passes = Path(onnxcompress.passes.__file__ or "").parent
    found = {}
    for file in (*package.rglob("*.py"), *passes.glob("*.py")):
        where = str(file.relative_to(package)) if file.is_relative_to(package) else f"passes/{file.name}"
        writing = writing_functions(ast.parse(file.read_text(encoding="utf-8")))
        if writing and where != "atomic.py":
            found[where] = writing
    assert found == ELSEWHERE
