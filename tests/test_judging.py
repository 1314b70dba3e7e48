"""What a search is held to, for every kind of budget; the rest is tested where it is used, in test_compress.py."""

from __future__ import annotations

from typing import Any

import pytest

from onnxcompress.judging import search_goals
from onnxcompress.quantization.gauge import Goal

FLOOR = Goal("SQNR", 10.0)


@pytest.mark.parametrize(
    ("max_drop", "labels", "eval_labels", "evaluates", "goals"),
    [
        (None, True, True, True, []),
        ("auto", False, False, False, [FLOOR]),
        ("auto", True, False, False, [FLOOR]),
        ("auto", True, True, True, [FLOOR]),
        ("auto", False, True, False, [Goal("expected top-1", 0.5, lenient=True)]),
        ("auto", True, True, False, [Goal("top-1", 0.5, lenient=True)]),
        (1.0, False, False, False, [Goal("agreement", 1.0)]),
        (1.0, True, False, False, [Goal("agreement", 1.0)]),
        (1.0, False, True, False, [Goal("expected top-1", 1.0)]),
        (1.0, True, True, False, [Goal("top-1", 1.0)]),
        (1.0, False, False, True, [Goal("cosine", 1.0)]),
        (1.0, True, False, True, [Goal("top-1", 1.0)]),
    ],
)
def test_goals_of_a_search(max_drop: Any, labels: bool, eval_labels: bool, evaluates: bool, goals: list[Goal]) -> None:
    assert search_goals(max_drop, labels, eval_labels, evaluates=evaluates) == goals
