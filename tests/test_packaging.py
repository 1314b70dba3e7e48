"""What is installed: the archives' contents, the wheel away from its sources, and life without a runtime."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import onnxcompress
import onnxcompress.demo
from onnxcompress.errors import RuntimeUnavailableError

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("onnxcompress", "passes", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
DEMO = Path(onnxcompress.demo.__file__).parent

needs_sources = pytest.mark.skipif(
    not (ROOT / "passes").is_dir(), reason="runs without the package's sources, which it builds"
)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive and the wheel that was built from it."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    (copy / "tests").mkdir()
    shutil.copy(__file__, copy / "tests")
    out = tmp_path_factory.mktemp("dist")
    # The backend is that of this environment, so that no registry is needed.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    answer = subprocess.run(command, cwd=out, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return out


@pytest.fixture(scope="module")
def wheel(archives: Path) -> Path:
    (file,) = archives.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the installed wheel; what it depends on stays where it is."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    answer = subprocess.run(command, cwd=target, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return target


def run_installed(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in ``folder`` with the installed wheel before everything else."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def run_without_runtime(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in ``folder`` where importing onnxruntime fails as if it were not installed."""
    code = "import sys; sys.modules['onnxruntime'] = None; from onnxcompress.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, timeout=120
    )


def package_files() -> set[str]:
    """What the wheel must hold, by its place there, from the folders of the sources."""
    patterns = ("*.py", "py.typed", "recipes/*.yaml", "demo/*.onnx", "demo/*.npz", "demo/*.md")
    places = {"onnxcompress": ROOT / "onnxcompress", "onnxcompress/passes": ROOT / "passes"}
    return {
        f"{place}/{file.relative_to(folder).as_posix()}"
        for place, folder in places.items()
        for pattern in patterns
        for file in folder.rglob(pattern)
    }


@needs_sources
def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        information = {name.split("/", 1)[1] for name in archive.namelist() if ".dist-info/" in name}
    assert len(names) == len(set(names))
    assert set(names) == package_files()
    for needed in (
        "onnxcompress/py.typed",
        "onnxcompress/data/__init__.py",
        "onnxcompress/demo/digits_cnn.onnx",
        "onnxcompress/demo/digits.npz",
        "onnxcompress/passes/__init__.py",
        "onnxcompress/passes/insert_qdq.py",
        "onnxcompress/recipes/int8.yaml",
    ):
        assert needed in names
    assert {"licenses/LICENSE", "entry_points.txt"} <= information


@needs_sources
def test_source_archive_holds_the_passes_once(archives: Path) -> None:
    (file,) = archives.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    assert "passes/insert_qdq.py" in names
    assert "tests/test_packaging.py" in names
    assert not [name for name in names if name.startswith("onnxcompress/passes")]


@needs_sources
def test_installed_wheel_runs_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    assert sorted(child.name for child in installed.iterdir() if child.suffix != ".dist-info") == [
        "bin",
        "onnxcompress",
    ]
    answer = run_installed(installed, tmp_path, "-m", "onnxcompress", "--version")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split()[-1] == onnxcompress.__version__
    code = (
        "import importlib.util, onnxcompress as oc, onnxcompress.passes as passes\n"
        "print(oc.__file__, passes.__file__, importlib.util.find_spec('passes'), sep='\\n')\n"
        "[oc.load_pass(name) for name in oc.PASSES]\n"
        "[getattr(oc, name) for name in oc.__all__]\n"
        "print(sorted(step.name for step in oc.load_recipe('lossless').pipeline().passes))\n"
    )
    answer = run_installed(installed, tmp_path, "-c", code)
    assert answer.returncode == 0, answer.stderr
    package, passes, top_level, *_ = answer.stdout.splitlines()
    assert Path(package) == installed / "onnxcompress" / "__init__.py"
    assert Path(passes) == installed / "onnxcompress" / "passes" / "__init__.py"
    assert top_level == "None"


@needs_sources
def test_packages_are_listed_by_hand_and_all_there() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = config["options"]["packages"].split()
    folders = {file.parent.relative_to(ROOT).as_posix() for file in (ROOT / "onnxcompress").rglob("__init__.py")}
    expected = {folder.replace("/", ".") for folder in folders if not folder.startswith("onnxcompress/passes")}
    assert sorted(listed) == sorted({*expected, "onnxcompress.passes"})


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["compress", "--help"], ["fold-batch-norm", "--help"]]
)
def test_help_needs_no_runtime(arguments: Sequence[str], tmp_path: Path) -> None:
    answer = run_without_runtime(tmp_path, *arguments)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout


def test_inspect_needs_no_runtime(tmp_path: Path) -> None:
    answer = run_without_runtime(tmp_path, "inspect", str(DEMO / "digits_cnn.onnx"))
    assert answer.returncode == 0, answer.stderr
    assert "would become integer" in answer.stdout


def test_lossless_passes_in_python_need_no_runtime(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None; import onnxcompress as oc\n"
        "graph = oc.load(sys.argv[1])\n"
        "folded = oc.load_recipe('lossless').pipeline()(graph).graph\n"
        "oc.save(folded, 'folded.onnx')\n"
        "print(sum(node.op == 'BatchNormalization' for node in graph.nodes))\n"
        "print(sum(node.op == 'BatchNormalization' for node in folded.nodes))\n"
    )
    command = [sys.executable, "-c", code, str(DEMO / "digits_cnn.onnx")]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    before, after = map(int, answer.stdout.split())
    assert before > 0
    assert after == 0
    assert (tmp_path / "folded.onnx").stat().st_size > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["compress", "MODEL", "--random-data", "-o", "out.onnx"],
        ["compress", "MODEL", "--random-data", "-o", "out.onnx", "--dry-run"],
        ["insert-qdq", "MODEL", "--random-data", "-o", "out.onnx"],
        ["fold-batch-norm", "MODEL", "-o", "out.onnx"],
        ["compare", "MODEL", "MODEL"],
        ["benchmark", "MODEL", "MODEL"],
        ["demo"],
    ],
    ids=" ".join,
)
def test_without_a_runtime_one_line_names_the_extra(arguments: Sequence[str], tmp_path: Path) -> None:
    model = str(DEMO / "digits_cnn.onnx")
    answer = run_without_runtime(tmp_path, *(model if word == "MODEL" else word for word in arguments))
    assert answer.returncode == RuntimeUnavailableError.exit_code == 6
    errors = [line for line in answer.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1, answer.stderr
    assert errors[0].startswith("error: onnxruntime is not installed")
    assert "onnxcompress[cpu]" in errors[0]
    assert answer.stdout == ""
    assert not list(tmp_path.iterdir())
