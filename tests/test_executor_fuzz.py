"""Random valid models through the executor and through distillation: what is refused is refused by name, what runs is
what onnxruntime runs, and what was trained is a valid model with the same interface, finite outputs and no larger loss.

``ONNXCOMPRESS_FUZZ=20`` runs 20 times as many, as in :mod:`test_fuzz`.
"""

from __future__ import annotations

from collections import Counter

import onnx
import pytest
from fuzz_checks import STAYS, TOO_NEW, Case, Subject, Tally, fuzzed, kept, run_cases
from models import F32

from onnxcompress.errors import ModelError
from onnxcompress.passes.distill import Distill
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.passes.prune_channels import PruneChannels
from onnxcompress.pipeline import Pipeline

pytest.importorskip("torch", reason="needs the extra distill")

from onnxcompress.executor.check import check_network

PRUNE = PruneChannels(params=0.6, recover=False, importance="l2", allocation="uniform", round_to=1)
QUANTISE = InsertQdq(observer="min_max", audit=False)
TEACH = Distill(steps=20, batch_size=4, learning_rate=1e-2, average=0.0, augment=("none",))
CASES = (
    Case("prune_distill", (Pipeline((PRUNE, TEACH)),), refusals=STAYS),
    Case("quantise_distill", (Pipeline((QUANTISE, TEACH)),), refusals=TOO_NEW),
)


def test_outputs_are_those_of_onnxruntime() -> None:
    told: Counter[str] = Counter()

    def agrees(model: onnx.ModelProto) -> None:
        subject = Subject(model)
        if subject.expected is None:
            return
        try:
            for feeds in subject.feeds:
                check_network(subject.graph, feeds, threads=1)
        except ModelError as error:
            assert "please report" not in str(error) and "amplifies" not in str(error)
            assert any(repr(node.name) in str(error) for node in subject.graph.nodes), error
            told["refused"] += 1
        else:
            told["ran"] += 1

    @fuzzed(400)
    def check(model: onnx.ModelProto) -> None:
        kept(model, "executor", lambda: agrees(model))

    check()
    print(told)
    assert told["ran"] > told["refused"]


def test_what_was_trained_is_sound() -> None:
    tally = Tally()

    @fuzzed(60, dtypes=(F32,))
    def check(model: onnx.ModelProto) -> None:
        run_cases(model, CASES, tally)

    check()
    print(tally)
    assert tally.ran > tally.cases // 2
    assert tally.changed["distill"] > 10
