"""Imports point one way, and every module says what it is for and what it offers.

The sources are read, not imported, unless a test says so; they are those of the package that is installed.
"""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import onnxcompress
import onnxcompress.passes

TESTS = Path(__file__).resolve().parent

#: these know nothing of models: they import the exceptions at most
FOUNDATIONS = (
    "atomic",
    "demo",
    "environment",
    "errors",
    "quantization.affine",
    "quantization.mincut",
    "statistics",
    "units",
    "version",
    "wire",
)
#: the upper layers, from the top; a module may import what stands below it, never what stands above or beside it
UPPER = (
    ("__main__",),
    ("cli",),
    ("pages",),
    ("compress",),
    ("budget", "inspect_model"),
    ("islands", "judging", "recipe"),
    ("pipeline", "passes"),
    ("benchmark", "report", "progress"),
)
#: packages that are slow to import, or that an extra brings
IN_FUNCTIONS_ONLY = {"PIL", "matplotlib", "onnxruntime", "openvino", "scipy", "torch"}
#: a package of ours whose modules may import what an extra brings; others import them in functions only
ROOMS = {"onnxcompress.executor": "torch"}


def find_modules() -> dict[str, ast.Module]:
    """{dotted name: parsed source} of the package, wherever its two folders lie."""
    found = {}
    for package in (onnxcompress, onnxcompress.passes):
        assert package.__file__ is not None
        folder = Path(package.__file__).parent
        for file in folder.rglob("*.py"):
            parts = [*package.__name__.split("."), *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = ast.parse(file.read_text(encoding="utf-8"), str(file))
    return found


MODULES = find_modules()


def imported(tree: ast.AST, *, functions: bool) -> Iterator[str]:
    """The dotted names that are imported, at import time or with ``functions`` ever; not those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for branch in node.orelse:
                yield from imported(branch, functions=functions)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imported(node, functions=functions)


def edges(*, functions: bool) -> dict[str, set[str]]:
    """{module: the modules of this package that it imports}."""
    return {
        name: {other for other in imported(tree, functions=functions) if other in MODULES and other != name}
        for name, tree in MODULES.items()
    }


def part(name: str) -> str:
    """``onnxcompress.passes.insert_qdq`` is part of ``passes``, ``onnxcompress.graph`` is ``graph``."""
    return name.split(".")[1] if "." in name else ""


def level(name: str) -> int:
    """0 is the top; what is in no upper layer is below them all."""
    return next((index for index, layer in enumerate(UPPER) if part(name) in layer), len(UPPER))


def test_the_sources_were_found() -> None:
    assert {"onnxcompress", "onnxcompress.passes.insert_qdq", "onnxcompress.data.images"} <= set(MODULES)
    assert {f"onnxcompress.{name}" for name in FOUNDATIONS} <= set(MODULES)
    assert {part(name) for name in MODULES} >= {name for layer in UPPER for name in layer}
    importing = edges(functions=False)
    assert "onnxcompress.graph" in importing["onnxcompress.passes.insert_qdq"]
    assert "onnxcompress.compress" not in importing["onnxcompress.cli.compress"]
    assert "onnxcompress.compress" in edges(functions=True)["onnxcompress.cli.compress"]


def test_no_cycles() -> None:
    # Not even through imports inside functions: a cycle that is put off is still a cycle.
    order = list(graphlib.TopologicalSorter(edges(functions=True)).static_order())
    assert sorted(order) == sorted(MODULES)


@pytest.mark.parametrize("name", FOUNDATIONS)
def test_foundations_import_nothing_above(name: str) -> None:
    assert {part(other) for other in edges(functions=True)[f"onnxcompress.{name}"]} <= {"errors"}


def test_imports_point_downwards() -> None:
    lowest = len(UPPER)
    wrong = [
        f"{name} -> {other}"
        for name, others in edges(functions=True).items()
        for other in others
        if name != "onnxcompress"  # see the next test
        and part(name) != part(other)
        and level(other) <= level(name)
        and not level(other) == level(name) == lowest
    ]
    assert not wrong


def test_the_package_imports_only_its_version() -> None:
    assert edges(functions=True)["onnxcompress"] == {"onnxcompress.version"}


def test_passes_are_imported_by_their_installed_name() -> None:
    trees = {**MODULES, **{file.name: ast.parse(file.read_text(encoding="utf-8")) for file in TESTS.rglob("*.py")}}
    wrong = [
        name for name, tree in trees.items() if "passes" in {i.split(".")[0] for i in imported(tree, functions=True)}
    ]
    assert not wrong
    assert "passes" not in sys.modules


def room(name: str) -> str | None:
    """The package of :data:`ROOMS` that module ``name`` lies in; the package itself imports nothing slow."""
    return next((package for package in ROOMS if name.startswith(f"{package}.")), None)


def test_slow_and_optional_packages_are_imported_where_they_are_used() -> None:
    wrong = {}
    for name, tree in MODULES.items():
        lent = {ROOMS[package]} if (package := room(name)) is not None else set()
        wrong[name] = (IN_FUNCTIONS_ONLY - lent) & {other.split(".")[0] for other in imported(tree, functions=False)}
    assert not {name: others for name, others in wrong.items() if others}


def test_modules_that_need_an_extra_are_imported_where_they_are_used() -> None:
    wrong = [
        f"{name} -> {other}"
        for name, others in edges(functions=False).items()
        for other in others
        if room(other) is not None and room(name) != room(other)
    ]
    assert not wrong
    assert any(room(name) for name in MODULES)


def test_every_imported_distribution_is_declared() -> None:
    requirements = metadata.requires("onnxcompress") or []
    declared = {re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower() for requirement in requirements}
    distributions = metadata.packages_distributions()
    missing = {}
    for name, tree in MODULES.items():
        for top in {other.split(".")[0] for other in imported(tree, functions=True)}:
            if top in sys.stdlib_module_names or top == "onnxcompress" or top in IN_FUNCTIONS_ONLY - set(distributions):
                continue
            owners = {re.sub(r"[-_.]+", "-", owner).lower() for owner in distributions[top]}
            if not owners & declared:
                missing[name] = top
    assert not missing


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_has_a_docstring_and_prints_nothing(name: str) -> None:
    assert ast.get_docstring(MODULES[name])
    if part(name) != "cli":
        calls = [node for node in ast.walk(MODULES[name]) if isinstance(node, ast.Call)]
        assert not [call.lineno for call in calls if ast.unparse(call.func) in ("print", "sys.stdout.write")]


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"onnxcompress.__main__"}))
def test_all_names_what_is_there(name: str) -> None:
    if (package := room(name)) is not None:
        pytest.importorskip(ROOMS[package], reason="an extra")
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert not public.startswith("_") or public == "__version__"
        assert hasattr(module, public), public
