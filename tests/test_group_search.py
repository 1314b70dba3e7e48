"""Layers that are returned by running the recipe again: few runs, and no more layers than needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hard_models import samples, spoiled

from onnxcompress.compress import compress
from onnxcompress.quantization.gauge import Goal, Reading
from onnxcompress.quantization.group_search import search_groups

NAMES = tuple(f"layer{i}" for i in range(50))


class Model:
    """Errors of layers that add up."""

    def __init__(self, **errors: float) -> None:
        self.errors = {name: errors.get(name, 1e-6) for name in NAMES}
        self.runs = 0

    def measure(self, excluded: tuple[str, ...]) -> Reading:
        self.runs += 1
        assert list(excluded) == [name for name in NAMES if name in excluded]
        error = sum(value for name, value in self.errors.items() if name not in excluded)
        return Reading(error, -10 * np.log10(error) if error else np.inf, {}, 0.0, 8)


def test_the_groups_that_cost_most_return_and_what_is_not_needed_stays() -> None:
    model = Model(layer7=0.3, layer31=0.2)
    found = search_groups(NAMES, model.measure, [Goal("SQNR", 30.0)], dict.fromkeys(NAMES, 10))
    assert found.met and not found.exhausted
    assert {"layer7", "layer31"} <= set(found.exclude)
    assert len(found.exclude) <= 6
    assert model.runs == found.variants <= 30
    assert sum(step.macs for step in found.steps) == 10 * len(found.exclude)
    assert all(step.microseconds is None for step in found.steps)
    assert "dB are left instead of 3.0" in found.steps[0].why


def test_a_budget_out_of_reach_returns_everything() -> None:
    found = search_groups(NAMES, Model().measure, [Goal("agreement", 0.0), Goal("SQNR", 1e9)], {})
    assert found.met  # without any error the SQNR is infinite
    assert set(found.exclude) == set(NAMES)

    class Stubborn(Model):
        def measure(self, excluded: tuple[str, ...]) -> Reading:
            return Reading(0.5, 3.0, {}, 0.0, 8)

    found = search_groups(NAMES, Stubborn().measure, [Goal("SQNR", 10.0)], {})
    assert not found.met and found.exhausted


@pytest.mark.parametrize("count", [0, 1, 3])
def test_few_candidates(count: int) -> None:
    model = Model(layer0=0.5)
    found = search_groups(NAMES[:count], model.measure, [Goal("SQNR", 30.0)], {})
    assert found.met is (count > 0)
    assert found.exclude == NAMES[: min(count, 1)]


def test_float16_keeps_a_budget_as_well(tmp_path: Path) -> None:
    onnx.save(spoiled(()), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", **samples(64))
    result = compress(
        tmp_path / "m.onnx",
        tmp_path / "d.npz",
        tmp_path / "o.onnx",
        recipe="fp16",
        evaluate=lambda run: 0.5,
        max_drop=0.0,
        benchmark=False,
        threads=1,
    )
    assert result.search is not None
    assert result.search["met"]
    excluded = result.recipe.passes[-1].model_dump()["exclude_nodes"]
    assert excluded
    assert set(result.returned) == set(excluded)
