"""Damaged model files: two thousand of what ``benchmarks/fuzz_bytes.py`` does a hundred thousand times."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.errors import ModelError
from onnxcompress.io import load

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def fuzz_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("fuzz_bytes")
    sys.modules.pop("fuzz_bytes", None)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_damaged_files_are_refused_in_one_line(fuzz_bytes: ModuleType, tmp_path: Path) -> None:
    outcomes, findings = fuzz_bytes.fuzz(2000, 0, fuzz_bytes.sources(), keep=tmp_path)
    assert findings == []
    assert sum(outcomes.values()) == 2000
    assert outcomes["refused"] > 1000
    assert outcomes["handled"] > 200


def test_a_case_repeats(fuzz_bytes: ModuleType) -> None:
    models = fuzz_bytes.sources()
    for number in range(200):
        assert fuzz_bytes.mutate(number, 3, models) == fuzz_bytes.mutate(number, 3, models)
    assert len({fuzz_bytes.mutate(number, 3, models) for number in range(200)}) > 180


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_what_a_worker_dies_of_is_told(fuzz_bytes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash, a hang and a traceback are each counted and kept, and the cases behind them still run."""
    code = (
        "import os, time\n"
        "calls = []\n"
        "def case(path, data):\n"
        "    number = data[0]\n"
        "    if number == 2: os.abort()\n"
        "    if number == 4: time.sleep(60)\n"
        "    return ('traceback', 'KeyError: 1') if number == 6 else ('refused', '')\n"
    )
    scope: dict[str, object] = {}
    exec(code, scope)  # the workers are forked: what is replaced here is replaced there
    monkeypatch.setattr(fuzz_bytes, "_case", scope["case"])
    monkeypatch.setattr(fuzz_bytes, "mutate", lambda number, seed, models: ("m", bytes([number])))
    monkeypatch.setattr(fuzz_bytes, "SECONDS", 1.0)
    outcomes, findings = fuzz_bytes.fuzz(8, 0, [("m", b"x")], keep=tmp_path, workers=2)
    assert outcomes == {"refused": 5, "crash": 1, "hang": 1, "traceback": 1}
    assert sorted((f.number, f.outcome) for f in findings) == [(2, "crash"), (4, "hang"), (6, "traceback")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["crash-0-2.onnx", "hang-0-4.onnx", "traceback-0-6.onnx"]


# -- what it found -----------------------------------------------------------------------------------------------------


def model(weight: onnx.TensorProto, **cast: object) -> onnx.ModelProto:
    nodes = [helper.make_node("Add", ["x", "w"], ["s"], "add"), helper.make_node("Cast", ["s"], ["y"], "cast", **cast)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


WEIGHT = numpy_helper.from_array(np.ones(3, np.float32), "w")


def short_raw() -> onnx.ModelProto:
    weight = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3], raw_data=bytes(16))
    return model(weight, to=TensorProto.FLOAT)


def long_field() -> onnx.ModelProto:
    weight = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3], float_data=[1, 2, 3, 4])
    return model(weight, to=TensorProto.FLOAT)


def unknown_cast() -> onnx.ModelProto:
    return model(WEIGHT, to=12345)


def stray_reference() -> onnx.ModelProto:
    damaged = model(WEIGHT, to=TensorProto.FLOAT)
    attribute = damaged.graph.node[1].attribute[0]
    attribute.ClearField("i")
    attribute.ref_attr_name = "to"
    return damaged


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (short_raw(), "16 bytes of data, but 12 are expected"),
        (long_field(), "4 values in float_data, but 3 are expected"),
        (stray_reference(), "refers to 'to' of a function"),
    ],
)
def test_refused_when_opened(tmp_path: Path, damaged: onnx.ModelProto, reason: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(damaged.SerializeToString())
    with pytest.raises(ModelError, match=reason) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_cast_to_no_type(tmp_path: Path) -> None:
    from onnxcompress.recipe import load_recipe

    path = tmp_path / "m.onnx"
    path.write_bytes(unknown_cast().SerializeToString())
    with pytest.raises(ModelError, match="data type 12345 is unknown"):
        load_recipe("lossless").pipeline()(load(path))


def test_a_very_long_name_of_external_data(tmp_path: Path) -> None:
    weight = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="x" * 5000)
    path = tmp_path / "m.onnx"
    path.write_bytes(model(weight, to=TensorProto.FLOAT).SerializeToString())
    with pytest.raises(ModelError, match="File name too long") as caught:
        load(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("number", sorted(TensorProto.DataType.values()))
def test_sizes_that_fit_pass(tmp_path: Path, number: int) -> None:
    """Every type, raw and in its field, empty, scalar and of five elements, is taken as it is."""
    if number == TensorProto.UNDEFINED:
        return
    for dims in ([], [5], [0, 2]):
        count = int(np.prod(dims))
        values = ["a"] * count if number == TensorProto.STRING else [1] * count
        for raw in (False, True):
            try:
                array = numpy_helper.to_array(helper.make_tensor("w", number, dims, values))
                weight = numpy_helper.from_array(array, "w") if raw else helper.make_tensor("w", number, dims, values)
            except (TypeError, ValueError, RuntimeError, KeyError, AttributeError):
                continue  # onnx cannot make it
            path = tmp_path / "m.onnx"
            net = helper.make_model(
                helper.make_graph(
                    [helper.make_node("Identity", ["w"], ["y"])],
                    "g",
                    [],
                    [helper.make_tensor_value_info("y", number, dims)],
                    [weight],
                ),
                opset_imports=[helper.make_opsetid("", onnx.defs.onnx_opset_version())],
                ir_version=onnx.IR_VERSION,
            )
            path.write_bytes(net.SerializeToString())
            load(path)
