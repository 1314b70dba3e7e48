"""The same input, recipe with its decisions, seed and versions give the same bytes, on any number of threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from models import BY_NAME

from onnxcompress import blas
from onnxcompress.blas import one_blas_thread
from onnxcompress.demo import demo_calibration, demo_model_path

#: what differs between two machines, or two runs on one: hash seeds, processors, threads asked for
PLACES = (
    {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "threads": "1"},
    {"PYTHONHASHSEED": "1", "OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2", "threads": "2"},
    {"PYTHONHASHSEED": "2", "OPENBLAS_NUM_THREADS": "4", "OMP_NUM_THREADS": "4", "threads": "0"},
)
RECIPES = ("lossless", "fp16", "int8", "prune-int8", "int8-accurate")

RUN = """
import json, sys
from pathlib import Path
import numpy as np
from onnxcompress.compress import compress

folder, own, threads, *jobs = sys.argv[1:]
found = {}
for job in jobs:
    name, recipe = job.split("=")
    saved = Path(folder) / f"{job}.yaml"
    with np.load(Path(folder) / f"{name}.npz") as arrays:
        data = dict(arrays)
    result = compress(
        Path(folder) / f"{name}.onnx", data, Path(own) / f"{job}.onnx", recipe=saved if saved.exists() else recipe,
        threads=int(threads), benchmark=False, verify=False, max_drop=None,
    )
    if not saved.exists():
        saved.write_text(result.recipe.to_yaml())
    found[job] = result.saved.sha256
print(json.dumps(found))
"""


def ran(folder: Path, place: dict[str, str], jobs: list[str]) -> dict[str, str]:
    """{job: SHA-256 of its result}, from a process of its own in its own folder."""
    own = folder / f"hash{place['PYTHONHASHSEED']}"
    own.mkdir()
    environment = {**os.environ, **{key: value for key, value in place.items() if key.isupper()}}
    command = [sys.executable, "-c", RUN, str(folder), str(own), place["threads"], *jobs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_same_bytes_everywhere(tmp_path: Path) -> None:
    (tmp_path / "digits.onnx").write_bytes(demo_model_path().read_bytes())
    np.savez(tmp_path / "digits.npz", input=demo_calibration()["input"][:96])
    onnx.save(BY_NAME["attention"].build(), tmp_path / "attention.onnx")
    np.savez(tmp_path / "attention.npz", ids=np.random.default_rng(0).integers(0, 5, (32, 5)))
    jobs = [f"digits={recipe}" for recipe in RECIPES] + ["attention=int8"]
    first, *others = (ran(tmp_path, place, jobs if number != 1 else jobs[::-1]) for number, place in enumerate(PLACES))
    assert len(set(first.values())) == len(jobs)
    for other in others:
        assert other == first


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products_do_not_depend_on_threads(dtype: type) -> None:
    functions = blas._thread_functions()
    if functions is None:
        pytest.skip("NumPy was built with another library than OpenBLAS")
    get, put = functions
    before = get()
    wide = np.random.default_rng(0).standard_normal((300, 5000)).astype(dtype)
    try:
        answers = set()
        for threads in (1, 2, 4):
            put(threads)
            with one_blas_thread():
                assert get() == 1
                answers.add((wide @ wide.T).tobytes())
            assert get() == threads
    finally:
        put(before)
    assert len(answers) == 1


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_thread_functions", lambda: None)
    with one_blas_thread():
        assert np.eye(2) @ np.eye(2) is not None
