"""Mutation testing: one small change to a module at a time, and whether its tests notice.

    python benchmarks/mutation.py onnxcompress.graph tests/test_graph.py --output benchmarks/results/mutation.json

Comparisons, operators, conditions and constants are exchanged, answers become None, statements go away; messages of
errors, docstrings and type hints stay. Each mutant runs in a forked process that imports the module anew, so that
nothing is installed or written. ``killed``: a test failed or took too long; ``survived``: none did. Survivors are
listed with their lines: some are equivalent to the original, the others are what no test says.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib.abc
import importlib.util
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["Mutant", "main", "mutants"]

SECONDS = 10
"""A mutant that takes so much longer than ten times what the tests take without a change has been noticed."""
MEMORY = 4 << 30
"""So has one whose data need more bytes: an endless loop that collects would otherwise end the machine first."""

_COMPARE = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.BitOr: ast.BitAnd, ast.FloorDiv: ast.Mult}


@dataclass(frozen=True)
class Mutant:
    """A part of a module's tree, what takes its place, and how to tell."""

    node: ast.AST
    replacement: ast.AST
    line: int
    change: str


def mutants(tree: ast.Module) -> Iterator[Mutant]:
    """Every mutant of a module, in the order of its lines; ``tree`` is not changed."""
    for node, replacement, change in _changes(tree):
        yield Mutant(node, replacement, getattr(node, "lineno", 0), change)


def _put(tree: ast.Module, mutant: Mutant) -> None:
    """Make ``tree`` the mutant."""
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is mutant.node:
                setattr(parent, name, mutant.replacement)
            elif isinstance(value, list):
                value[:] = [mutant.replacement if item is mutant.node else item for item in value]
    ast.fix_missing_locations(tree)


def _changes(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.AST, str]]:
    for node in _code(tree):
        text = ast.unparse(node)[:70] if isinstance(node, ast.expr | ast.stmt) else ""
        for replacement in _replacements(node):
            yield node, replacement, f"{text}  ->  {ast.unparse(replacement)[:70]}"


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that do something: no annotations, docstrings, errors that are raised, nor ``__all__``."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(
                child, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom
            ):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue
            if isinstance(child, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in child.targets):
                continue
            if isinstance(child, ast.AnnAssign) and getattr(child.annotation, "id", "") == "TypeAlias":
                continue
            yield child
            yield from _code(child)


def _replacements(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        yield ast.Compare(node.left, [_COMPARE[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        for index in range(len(node.values)):
            rest = [value for i, value in enumerate(node.values) if i != index]
            yield rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        yield ast.BinOp(node.left, _BINARY[type(node.op)](), node.right)
    elif isinstance(node, ast.AugAssign) and type(node.op) in _BINARY:
        yield ast.AugAssign(node.target, _BINARY[type(node.op)](), node.value)
    elif isinstance(node, ast.If | ast.While | ast.IfExp):
        twin = copy.copy(node)
        twin.test = ast.UnaryOp(ast.Not(), node.test)
        yield twin
    elif isinstance(node, ast.comprehension) and node.ifs:
        twin_of = copy.copy(node)
        twin_of.ifs = []
        yield twin_of
    elif isinstance(node, ast.Constant):
        yield from _constants(node.value)
    elif isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield ast.Return(ast.Constant(None))
    elif isinstance(node, ast.Expr | ast.Continue | ast.AugAssign | ast.Delete) or (
        isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name)
    ):
        yield ast.Pass()


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _constants(value: Any) -> Iterator[ast.AST]:
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int | float):
        yield ast.Constant(value + 1)
    elif isinstance(value, str):
        yield ast.Constant(f"{value}X")


# ----------------------------------------------------------------------------------------------------------------------
# Running


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a changed tree."""

    def __init__(self, name: str, path: str, tree: ast.Module) -> None:
        self._name, self._path, self._tree = name, path, tree

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self._name:
            return None
        return importlib.util.spec_from_file_location(name, self._path, loader=self)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self._tree, self._path, "exec"), module.__dict__)


def _child(name: str, path: str, tree: ast.Module, mutant: Mutant | None, tests: list[str], limit: int) -> None:
    """Run the tests on the changed module, then end the process: status 0 where all pass within ``limit`` seconds."""
    import pytest

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(limit)  # 0: without limit
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)
    if mutant is not None:
        _put(tree, mutant)
        sys.meta_path.insert(0, _Finder(name, path, tree))
    status = 1
    with contextlib.suppress(BaseException):
        status = int(pytest.main([*tests, "-x", "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler"]))
    os._exit(0 if status == 0 else 1)


def _spawn(name: str, path: str, tree: ast.Module, mutant: Mutant | None, tests: list[str], limit: int = 0) -> int:
    process = os.fork()
    if not process:
        _child(name, path, tree, mutant, tests, limit)
    return process


def main() -> int:
    """The script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("module")
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="take only every N-th mutant")
    parser.add_argument("--output", type=Path, help="JSON file; the record of the module in it is replaced")
    options = parser.parse_args()
    for package in ("numpy", "onnx", "onnx_graphsurgeon", "onnxruntime", "pydantic", "rich"):
        importlib.import_module(package)
    path = str(Path(*options.module.split(".")).with_suffix(".py"))
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    changed = list(mutants(tree))[:: options.every]
    start = time.monotonic()
    if os.waitpid(_spawn(options.module, path, tree, None, options.tests), 0)[1]:
        print("the tests fail without any change", file=sys.stderr)
        return 2
    limit = SECONDS + round(10 * (time.monotonic() - start))
    running: dict[int, Mutant] = {}
    survived: list[Mutant] = []
    waiting = iter(changed)
    while True:
        while len(running) < options.workers and (mutant := next(waiting, None)) is not None:
            running[_spawn(options.module, path, tree, mutant, options.tests, limit)] = mutant
        if not running:
            break
        process, status = os.wait()
        mutant = running.pop(process)
        if status == 0:
            survived.append(mutant)
            print(f"survived, line {mutant.line}: {mutant.change}", file=sys.stderr, flush=True)
    killed = len(changed) - len(survived)
    record = {
        "tests": options.tests,
        "mutants": len(changed),
        "killed": killed,
        "score": round(killed / max(len(changed), 1), 4),
        "survived": [f"line {m.line}: {m.change}" for m in sorted(survived, key=lambda m: m.line)],
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.monotonic() - start, 1),
    }
    if options.output is not None:
        known = json.loads(options.output.read_text()) if options.output.exists() else {}
        options.output.write_text(json.dumps(known | {options.module: record}, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(record, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
