"""What must hold of a pass on any valid model, and where a model on which it does not is kept.

A case is one pass (or recipe) on one model. Always: the input graph is untouched, the result passes ONNX's full
checker, the interface stays, and where the runtime runs the model it runs the result, with outputs of the same shapes
and types, finite where the model's are. Passes that promise it: the same outputs. Lossy ones: at least ``least_sqnr``.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fuzz_graphs import models
from hypothesis import HealthCheck, Phase, given, settings
from models import make_feeds
from numpy.typing import NDArray

from onnxcompress.base import Context, Guarantee, Pass
from onnxcompress.data import open_data
from onnxcompress.errors import ModelError, OnnxCompressError
from onnxcompress.graph import Graph, input_specs
from onnxcompress.proto import from_proto, to_proto
from onnxcompress.session import Session

__all__ = ["STAYS", "TOO_NEW", "Case", "Subject", "Tally", "folder", "fuzzed", "kept", "run_cases"]

Array = NDArray[Any]

#: relative L2 that reordering may cause in a lossless result, by the type of the output
TOLERANCE = {"float64": 1e-5, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
MORE = int(os.environ.get("ONNXCOMPRESS_FUZZ", "0"))

#: what prune_channels says of a model whose channels cannot go that far
STAYS = "with everything removed that may be"
#: what insert_qdq says where the runtime lacks its operators, or where local functions keep the opset too old
TOO_NEW = "whose QuantizeLinear no runtime of target|but its function"

SIZES: tuple[Mapping[str, int], ...] = ({}, {"N": 1})


def folder() -> Path:
    """Where models are written that break something."""
    return Path(os.environ.get("ONNXCOMPRESS_FUZZ_FOUND", Path(__file__).parent / "fuzz_cases"))


@dataclass(frozen=True)
class Case:
    """A pass, or several in a row, and what is asked of the outputs beside what always is."""

    name: str
    steps: tuple[Pass, ...]
    #: dB that the outputs must keep; None: nothing is asked of a lossy result; infinite: lossless
    least_sqnr: float | None = None
    #: errors that say this are answers, not defects: the model is not for this pass
    refusals: str | None = None

    @property
    def lossless(self) -> bool:
        return all(step.guarantee is not Guarantee.APPROXIMATE for step in self.steps)


@dataclass
class Tally:
    """What was done, to be told and to be held to."""

    models: int = 0
    cases: int = 0
    ran: int = 0
    refused: int = 0
    changed: Counter[str] = field(default_factory=Counter)


class Subject:
    """A model, its graph, and what it computes; the last is None where the runtime does not run it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.graph = from_proto(model)
        self.before = to_proto(self.graph).SerializeToString(deterministic=True)
        self.feeds = [make_feeds(model, seed=seed, sizes=sizes) for seed, sizes in enumerate(SIZES)]
        self.expected: list[dict[str, Array]] | None = None
        try:
            session = Session(model, optimization="disabled", threads=1)
            self.expected = [session.run(feeds) for feeds in self.feeds]
        except ModelError:  # no kernel for this type or opset
            self.expected = None

    def context(self, target: str = "cpu") -> Context:
        """With eight samples to calibrate on."""
        specs = input_specs(self.graph)
        if any(not spec.shape or spec.shape[0] != "N" for spec in specs if not spec.optional):
            return Context(threads=1, target=target)
        data = open_data(make_feeds(self.model, seed=7, sizes={"N": 8}), specs)
        return Context(data=data, threads=1, target=target)

    def check(self, case: Case, tally: Tally, *, target: str = "cpu") -> None:
        """Run one case; an AssertionError, or whatever the pass raises, is a defect."""
        tally.cases += 1
        context = self.context(target)
        if context.data is None and any(step.needs_data for step in case.steps):
            tally.refused += 1
            return
        graph = self.graph
        context.original = graph
        try:
            for step in case.steps:
                result = step(graph, context)
                for report in result.report.children or (result.report,):
                    tally.changed[report.name] += report.changed
                    assert not [r for r in report.refusals if "please report" in r.reason]
                graph = result.graph
        except OnnxCompressError as error:
            known = case.refusals is not None and re.search(case.refusals, str(error))
            if not known and not (isinstance(error, ModelError) and self.expected is None):
                raise
            assert error.exit_code in (2, 3) and "\n" not in str(error)
            tally.refused += 1
            return
        finally:
            assert to_proto(self.graph).SerializeToString(deterministic=True) == self.before, "the input was changed"
        self.valid(graph, case)
        if case.lossless and len(case.steps) == 1:
            unchanged = to_proto(graph).SerializeToString(deterministic=True) == self.before
            assert unchanged != result.report.changed, "the report does not tell the truth"
        if self.expected is not None:
            tally.ran += 1
            self.runs(graph, case)

    def valid(self, graph: Graph, case: Case) -> None:
        """The checker passes; inputs, outputs and functions are those of the model."""
        written = to_proto(graph)
        onnx.checker.check_model(written, full_check=True)
        for ours, theirs in (
            (written.graph.input, self.model.graph.input),
            (written.graph.output, self.model.graph.output),
        ):
            assert [v.name for v in ours] == [v.name for v in theirs]
            if case.name != "convert_float16_io":
                assert [v.type for v in ours] == [v.type for v in theirs], "the types of the interface"

    def runs(self, graph: Graph, case: Case) -> None:
        """The runtime runs it, and the outputs are what they must be."""
        assert self.expected is not None
        session = Session(graph, optimization="disabled", threads=1)
        for feeds, expected in zip(self.feeds, self.expected, strict=True):
            given = {n: _as(session, n, v) for n, v in feeds.items()} if case.name == "convert_float16_io" else feeds
            found = session.run(given)
            for name, wanted in expected.items():
                self.same(name, found[name], wanted, case)

    def same(self, name: str, found: Array, wanted: Array, case: Case) -> None:
        """One output of one batch."""
        assert found.shape == wanted.shape, name
        if case.name != "convert_float16_io":
            assert found.dtype == wanted.dtype, name
        if wanted.dtype.name not in TOLERANCE:
            assert np.array_equal(found, wanted), name
            return
        a, b = wanted.astype(np.float64), found.astype(np.float64)
        if not np.isfinite(a).all():
            return
        assert np.isfinite(b).all(), f"{name} is not finite"
        noise, signal = float(np.linalg.norm(a - b)), float(np.linalg.norm(a))
        if case.lossless or case.least_sqnr == math.inf:
            assert noise <= TOLERANCE[wanted.dtype.name] * signal, f"{name} differs by {noise / (signal or 1):.1e}"
        elif case.least_sqnr is not None and noise:
            sqnr = 20 * math.log10(signal / noise) if signal else -math.inf
            assert sqnr >= case.least_sqnr, f"{name} keeps {sqnr:.1f} dB"


def _as(session: Session, name: str, value: Array) -> Array:
    dtype = {spec.name: spec.dtype for spec in session.input_specs()}[name]
    return value.astype(dtype)


def kept(model: onnx.ModelProto, label: str, check: Callable[[], Any]) -> None:
    """Run ``check``; where it fails, write ``model`` to the folder of cases, over the larger one that failed before.

    Hypothesis calls with ever smaller models, so that what is left there in the end is the smallest.
    """
    try:
        check()
    except Exception as error:
        path = folder() / f"found-{label}.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(model.SerializeToString(deterministic=True))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        error.add_note(f"{label}: the model was written to {path} ({digest})")
        raise


def run_cases(model: onnx.ModelProto, cases: Sequence[Case], tally: Tally, *, target: str = "cpu") -> None:
    """Every case on one model."""
    tally.models += 1
    subject = Subject(model)
    for case in cases:
        kept(model, case.name, lambda case=case: subject.check(case, tally, target=target))  # type: ignore[misc]


def fuzzed(examples: int, **options: Any) -> Callable[[Callable[[onnx.ModelProto], None]], Callable[[], None]]:
    """Call a function with that many models; each time the same ones unless more were asked for."""

    def decorate(check: Callable[[onnx.ModelProto], None]) -> Callable[[], None]:
        return settings(
            max_examples=examples * max(MORE, 1),
            derandomize=not MORE,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
            print_blob=False,
        )(given(models(**options))(check))

    return decorate
