"""A file is opened in a child process first: what crashes, hangs or swells there is one line here."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from malicious import SIZE, model
from onnx import helper

import onnxcompress as oc
from onnxcompress import probe as probing
from onnxcompress.demo import demo_model_path
from onnxcompress.errors import ModelError, ResourceError, UnsafeModelError, UsageError
from onnxcompress.io import load, model_sha256
from onnxcompress.probe import Limits, Probe, check_unchanged, limits_for, probe_models
from onnxcompress.session import CUSTOM_OPERATORS_VARIABLE, Session

#: in the child: opening ``crash.onnx`` does what CRASH says, as a defect of native code would
_CRASH = """
import os, signal, sys, time
def _hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith("crash.onnx"):
        if os.environ["CRASH"] == "hang":
            time.sleep(1000)
        os.write(2, os.environ.get("WORDS", "").encode())
        os.kill(os.getpid(), getattr(signal, os.environ["CRASH"]))
sys.addaudithook(_hook)
"""


@pytest.fixture
def crashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(_CRASH)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path / "hook"), os.environ.get("PYTHONPATH"))))
    )
    path = tmp_path / "crash.onnx"
    onnx.save(model(), path)
    return path


@pytest.mark.parametrize(
    ("how", "words", "kind", "reason"),
    [
        ("SIGSEGV", "", ModelError, "ended a child process by SIGSEGV"),
        ("SIGABRT", "munmap_chunk(): invalid pointer", ModelError, "by SIGABRT.*invalid pointer"),
        ("SIGABRT", "terminate called after throwing an instance of 'std::bad_alloc'", ResourceError, "GB of memory"),
        ("SIGKILL", "", ResourceError, "GB of memory"),
        ("hang", "", ResourceError, "more than 3 seconds"),
    ],
)
def test_a_child_that_dies(
    crashing: Path, how: str, words: str, kind: type[Exception], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRASH", how)
    monkeypatch.setenv("WORDS", words)
    if how == "hang":
        monkeypatch.setenv("ONNXCOMPRESS_PROBE_SECONDS", "3")
    with pytest.raises(kind, match=reason) as caught:
        oc.compress(crashing, output=crashing.with_name("out.onnx"), recipe="lossless")
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value) and str(crashing) in str(caught.value)
    assert not crashing.with_name("out.onnx").exists()


def test_what_it_read_is_what_is_there(tmp_path: Path) -> None:
    onnx.save(model(), tmp_path / "a.onnx")
    paths = [demo_model_path(), tmp_path / "a.onnx", demo_model_path()]
    assert probe_models(paths) == {str(path): model_sha256(path) for path in paths}


def test_a_model_that_changes_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    onnx.save(model(), path)
    digests = probe_models([path])
    check_unchanged(path, digests, model_sha256(path))
    check_unchanged(path, {}, "anything")
    onnx.save(model(opset=16), path)
    with pytest.raises(ModelError, match="changed while"):
        check_unchanged(path, digests, model_sha256(path))


def test_errors_are_those_of_the_parent(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    broken = model([helper.make_node("Relu", ["nowhere"], ["y"])], [])
    path.write_bytes(broken.SerializeToString())
    with pytest.raises(ModelError) as here:
        load(path)
    with pytest.raises(ModelError) as there:
        probe_models([path])
    assert str(here.value) == str(there.value)
    with pytest.raises(UsageError, match="does not exist"):
        probe_models([tmp_path / "missing.onnx"])


@pytest.mark.parametrize("options", [{"trusted": True}, {"target": "cuda", "recipe": "fp16", "benchmark": False}])
def test_it_can_be_left_out(options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a child process was started")

    monkeypatch.setattr(importlib.import_module("onnxcompress.compress"), "Probe", fail)
    settings = {"recipe": "lossless", "benchmark": False, "verify": False} | options
    assert oc.compress(demo_model_path(), output=tmp_path / "out.onnx", **settings).saved is not None
    with pytest.raises(AssertionError, match="child"):
        oc.compress(demo_model_path(), output=tmp_path / "out.onnx", recipe="lossless")


def test_limits() -> None:
    small, large = limits_for(0, {}), limits_for(10**9, {})
    assert small.seconds < large.seconds and small.memory <= large.memory
    given = {"ONNXCOMPRESS_PROBE_SECONDS": "5", "ONNXCOMPRESS_PROBE_MEMORY": "2e9"}
    assert limits_for(10**12, given) == Limits(5.0, 2_000_000_000)
    for text in ("", "much", "-1", "nan", "inf"):
        with pytest.raises(UsageError, match="above 0"):
            limits_for(0, {"ONNXCOMPRESS_PROBE_SECONDS": text})


def test_memory_is_limited() -> None:
    """Too little to import anything: the interpreter says so, and the line is ours."""
    with Probe([demo_model_path()], limits=Limits(60.0, 20_000_000)) as probe, pytest.raises(ResourceError) as caught:
        probe.wait()
    assert "GB of memory" in str(caught.value)


def test_nothing_is_left_when_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt), Probe([demo_model_path()]) as probe:
        process = probe._process
        raise KeyboardInterrupt
    assert process is not None and process.poll() is not None
    assert list(tmp_path.iterdir()) == []


def test_modules_beside_the_model_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(demo_model_path(), tmp_path / "model.onnx")
    for name in ("onnx", "numpy", "onnxcompress"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    probe_models(["model.onnx"])
    assert not (tmp_path / "imported").exists()


def test_a_system_without_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    probing._limit(Limits(1.0, 1))  # would end this process soon
    monkeypatch.delattr(os, "sysconf")
    assert limits_for(0, {}).memory > 0


# -- models that a runtime refuses as they lie there -----------------------------------------------------------------


def external_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    onnx.save(model(), folder / "model.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
    return folder / "model.onnx"


def hugging_face_cache(folder: Path) -> Path:
    """``snapshots/rev/model.onnx`` and its data as links into ``blobs``."""
    source = external_model(folder / "download")
    (folder / "blobs").mkdir()
    (folder / "snapshots" / "rev").mkdir(parents=True)
    for number, name in enumerate(("model.onnx", "w.data")):
        source.with_name(name).rename(folder / "blobs" / str(number))
        (folder / "snapshots" / "rev" / name).symlink_to(f"../../blobs/{number}")
    return folder / "snapshots" / "rev" / "model.onnx"


def feeds() -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    return {"x": np.ones((1, SIZE), np.float32)}


def test_the_hugging_face_cache_from_end_to_end(tmp_path: Path) -> None:
    path = hugging_face_cache(tmp_path / "cache")
    np.testing.assert_array_equal(Session(path).run(feeds())["y"], np.full((1, SIZE), SIZE, np.float32))
    result = oc.compress(path, output=tmp_path / "out.onnx", recipe="lossless", benchmark_seconds=0.5)
    assert result.saved is not None and result.verification is not None
    assert result.verification.outputs[0].max_abs == 0
    done = subprocess.run(
        [sys.executable, "-m", "onnxcompress", "compare", str(path), str(tmp_path / "out.onnx")],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_hard_links_by_flag_only(tmp_path: Path) -> None:
    path = external_model(tmp_path / "m")
    path.with_name("second").hardlink_to(path.with_name("w.data"))
    options = {"recipe": "lossless", "benchmark_seconds": 0.5}
    with pytest.raises(UnsafeModelError, match="--allow-hard-links"):
        oc.compress(path, output=tmp_path / "out.onnx", **options)
    result = oc.compress(path, output=tmp_path / "out.onnx", hard_links=True, **options)
    assert result.saved is not None


# -- custom operators ------------------------------------------------------------------------------------------------

_LIBRARY = """
#include <stdio.h>
#include <stdlib.h>
void *RegisterCustomOps(void *options, const void *api) {
    FILE *file = fopen(getenv("REGISTERED"), "a");
    fputs("x", file);
    fclose(file);
    return 0;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_libraries_of_custom_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every session loads them, in this process and in the child."""
    (tmp_path / "ops.c").write_text(_LIBRARY)
    library, log = tmp_path / "ops.so", tmp_path / "log"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "ops.c"], check=True)
    monkeypatch.setenv("REGISTERED", str(log))
    words = ["compress", str(demo_model_path()), "-o", str(tmp_path / "out.onnx"), "--recipe", "lossless"]
    words += ["--no-benchmark", "--custom-ops", str(library)]
    done = subprocess.run([sys.executable, "-m", "onnxcompress", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(log.read_text()) >= 4  # two sessions of the child, two that verify
    monkeypatch.setenv(CUSTOM_OPERATORS_VARIABLE, str(tmp_path / "ops.c"))
    with pytest.raises(UsageError, match="custom operators"):
        Session(demo_model_path())


def test_only_the_child_reads_what_a_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny messages become objects of many times their size: nothing is made of them where memory is not limited."""

    def read(*given: object, **more: object) -> None:
        raise AssertionError("read in the parent")

    monkeypatch.setattr("onnxcompress.io._split", read)
    path = external_model(tmp_path / "m")
    assert list(probe_models([path])) == [str(path)]
    functions = b"\x0a\x01F" + b"\x3a\x00" * 3_000_000
    length, head = len(functions), bytearray(b"\xca\x01")
    while length > 127:
        head.append(length & 127 | 128)
        length >>= 7
    (tmp_path / "tiny.onnx").write_bytes(b"\x08\x0a" + bytes([*head, length]) + functions + b"\x3a\x02\x12\x00")
    monkeypatch.setenv("ONNXCOMPRESS_PROBE_MEMORY", "200000000")
    with pytest.raises((ResourceError, ModelError)):
        probe_models([tmp_path / "tiny.onnx"])


def test_limits_grow_with_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcompress.probe._SECONDS", 60.0)
    path = external_model(tmp_path / "m")
    with Probe([path]) as probe:
        before = probe._limits
        probe.wait()
        assert probe._limits.seconds > before.seconds
