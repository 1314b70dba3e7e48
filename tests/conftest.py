"""Fixtures that several test files use."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that repeat from run to run."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def cases() -> Iterator[Mapping[str, Any]]:
    """The real models with data of ``cases.py``: {name: case}; skips where the folder is missing.

    The folder is named by the environment variable ONNXCOMPRESS_CASES; the default is ../shared/cases beside the
    repository.
    """
    default = Path(__file__).resolve().parents[1].parent / "shared" / "cases"
    folder = Path(os.environ.get("ONNXCOMPRESS_CASES", default))
    source = folder / "cases.py"
    if not source.is_file():
        pytest.skip(f"no cases.py in {folder}; set ONNXCOMPRESS_CASES to the folder that holds it")
    spec = importlib.util.spec_from_file_location("onnxcompress_cases", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = writes
    yield module.CASES
    del sys.modules[spec.name]
