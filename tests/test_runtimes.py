"""The adapters of runtimes: what they run, what they say of themselves, and that none runs elsewhere in silence."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxcompress.demo import demo_calibration, demo_model_path
from onnxcompress.errors import ModelError, RuntimeUnavailableError, UsageError
from onnxcompress.runtimes import RUNTIMES, Runtime, get_runtime
from onnxcompress.runtimes.onnxruntime_cpu import installed_builds, read_trace
from onnxcompress.runtimes.onnxruntime_cuda import CudaOptions, OnnxRuntimeCuda, fallback_message
from onnxcompress.runtimes.torch_executor import TorchCuda
from onnxcompress.session import Session

FEEDS = {"input": demo_calibration()["input"][:2]}


def without_gpu() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" not in onnxruntime.get_available_providers()


def runtime(spec: str) -> Runtime:
    """The runtime, or a skip with the reason why it is not there."""
    found = get_runtime(spec)
    try:
        found.check()
    except RuntimeUnavailableError as error:
        pytest.skip(str(error))
    return found


@pytest.mark.parametrize(
    "spec",
    [
        "onnxruntime:cpu",
        "onnxruntime:cpu,io_binding=true",
        "onnxruntime:cpu,spinning=off,optimization=basic",
        "onnxruntime:cuda",
        "openvino",
        "torch",
        "torch,channels_last=off",
        "torch:cuda",
    ],
)
def test_a_runtime_gives_the_reference_outputs(spec: str) -> None:
    """Held against the unoptimised graph: float32 means float32, which bfloat16 or TF32 would miss by far."""
    expected = Session(demo_model_path(), optimization="disabled").run(FEEDS)["logits"]
    opened = runtime(spec).open(demo_model_path(), 1)
    assert opened.input_names == ["input"]
    assert opened.output_names == ["logits"]
    found = opened.run({**FEEDS, "more": np.zeros(1)})["logits"]
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
    bound = opened.bind(FEEDS)
    bound()
    bound()
    opened.close()


def test_buffers_that_are_bound_once_hold_each_run(rng: np.random.Generator) -> None:
    """Graph identifiers are CUDA's; here they only have to do no harm."""
    session = Session(demo_model_path())
    for graph_id in (None, -1, 1):
        feeds = {"input": rng.random(FEEDS["input"].shape, np.float32)}
        bound = session.bind_buffers(feeds, graph_id=graph_id)
        bound()
        bound()
        np.testing.assert_array_equal(bound.outputs[0].numpy(), session.run(feeds)["logits"])
    with pytest.raises(ModelError, match="cannot run"):
        session.bind_buffers({"input": np.zeros((1, 1), np.float32)})


@pytest.mark.parametrize("spec", ["onnxruntime:cpu", "onnxruntime:cuda", "openvino", "torch", "torch:cuda"])
def test_a_runtime_states_itself_places_nodes_and_traces(spec: str) -> None:
    found = runtime(spec)
    facts = found.facts(1)
    assert facts.spec == spec
    assert facts.version
    assert facts.threads == 1
    assert facts.precision.startswith("float32")
    assert facts.options.keys() == found.options_type.model_fields.keys()
    placed = found.open(demo_model_path(), 1).placement()
    convolutions = sum(node.op_type == "Conv" for node in onnx.load(demo_model_path()).graph.node)
    assert sum(node.op in ("Conv", "Convolution") for node in placed) == convolutions > 0
    assert all(node.provider for node in placed)
    trace = found.trace(demo_model_path(), 1, [FEEDS], 5)
    assert trace.runs == 5
    assert 0 < trace.seconds < 1
    assert sum(trace.by_operator().values()) == pytest.approx(trace.seconds)
    assert next(iter(trace.by_operator())) in ("Conv", "Convolution", "FullyConnected")
    assert trace.copies == 0


def test_bfloat16_is_chosen_and_shown() -> None:
    found = runtime("openvino,precision=bf16")
    assert found.facts(1).precision.startswith("bfloat16")
    try:
        opened = found.open(demo_model_path(), 1)
    except RuntimeUnavailableError as error:
        assert "bf16 was asked for" in str(error)  # a processor without it
        return
    expected = Session(demo_model_path()).run(FEEDS)["logits"]
    error = np.linalg.norm(opened.run(FEEDS)["logits"] - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.1


def test_openvino_gives_outputs_the_names_of_the_file() -> None:
    """Identity is removed there, which leaves one tensor with the names of two."""
    nodes = [helper.make_node("Relu", ["x"], ["z"]), helper.make_node("Identity", ["z"], ["a"])]
    nodes.append(helper.make_node("Identity", ["a"], ["m"]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3]) for name in ("m", "z")]
    graph = helper.make_graph(nodes, "names", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    opened = runtime("openvino").open(model.SerializeToString(), 1)
    assert opened.output_names == ["m", "z"]
    with pytest.raises(ModelError, match="no input 'x'"):
        opened.run({"y": np.zeros((1, 3), np.float32)})


@pytest.mark.parametrize("spec", ["onnxruntime:cpu", "openvino", "torch"])
def test_a_broken_model_is_a_model_error(spec: str, tmp_path: Path) -> None:
    found = runtime(spec)
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x08nothing")
    with pytest.raises(ModelError, match=r"cannot open the model|is no ONNX model"):
        found.open(tmp_path / "broken.onnx", 1)
    with pytest.raises(ModelError, match="cannot open the model"):
        found.open(b"\x08\x08nothing", 1)
    opened = found.open(demo_model_path(), 1)
    with pytest.raises(ModelError, match=r"cannot run the model|cannot be executed on torch"):
        opened.run({"input": np.zeros((1, 2, 3, 4), np.float32)})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "tensorrt",
            r"unknown runtime 'tensorrt'; expected one of onnxruntime:cpu, onnxruntime:cuda, openvino, torch,",
        ),
        ("openvino,streems=2", r"has no option 'streems'; it has precision, streams, pinning"),
        ("openvino,precision=f64", r"option 'precision': Input should be 'f32', 'bf16' or 'f16'"),
        ("openvino,precision", r"'precision' is not one option=value"),
        ("onnxruntime:cpu,spinning=on,spinning=off", r"'spinning=off' is not one option=value"),
        ("onnxruntime:cuda,cuda_graph=true,io_binding=false", r"needs io_binding=true"),
    ],
)
def test_what_cannot_be_asked_for(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        get_runtime(spec)


def test_every_runtime_is_known_by_its_name() -> None:
    for name in RUNTIMES:
        assert get_runtime(name).name == name
    assert get_runtime("onnxruntime").name == "onnxruntime:cpu"


# ----------------------------------------------------------------------------------------------------------------------
# Torch


def small_model(element: int = TensorProto.FLOAT, op: str = "Sub") -> bytes:
    """A MatMul and an operator of two inputs, from ``a`` and ``b`` to ``y``, all of the type ``element``."""
    nodes = [helper.make_node("MatMul", ["a", "b"], ["p"], "product"), helper.make_node(op, ["p", "b"], ["y"], "last")]
    inputs = [helper.make_tensor_value_info(name, element, [64, 64]) for name in "ab"]
    graph = helper.make_graph(nodes, "small", inputs, [helper.make_tensor_value_info("y", element, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    serialised: bytes = onnx.shape_inference.infer_shapes(model).SerializeToString()
    return serialised


def test_torch_runs_with_its_own_threads_and_precision_whatever_others_set(rng: np.random.Generator) -> None:
    opened = runtime("torch").open(small_model(), 1)
    import torch

    feeds = {name: rng.standard_normal((64, 64), np.float32) for name in "ab"}
    bound, threads = opened.bind(feeds), torch.get_num_threads()
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("medium")  # bfloat16 on processors that have it, TF32 on GPUs
    try:
        bound()
        assert torch.get_num_threads() == 1
        assert torch.get_float32_matmul_precision() == "highest"
        expected = feeds["a"].astype(np.float64) @ feeds["b"] - feeds["b"]
        error = opened.run(feeds)["y"] - expected
        assert np.linalg.norm(error) <= 1e-6 * np.linalg.norm(expected)
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")


def test_torch_gives_halves_where_the_file_has_halves(rng: np.random.Generator) -> None:
    model = small_model(TensorProto.FLOAT16)
    feeds = {name: rng.random((64, 64)).astype(np.float16) for name in "ab"}
    found = runtime("torch").open(model, 1).run(feeds)["y"]
    expected = Session(model, optimization="disabled").run(feeds)["y"]
    assert found.dtype == expected.dtype == np.float16
    assert np.linalg.norm((found - expected).astype(float)) <= 2e-3 * np.linalg.norm(expected.astype(float))


def test_what_torch_cannot_run_is_told_by_node() -> None:
    with pytest.raises(ModelError, match=r"node 'last' \(BitShift\) cannot be executed on torch: "):
        runtime("torch").open(small_model(TensorProto.UINT8, "BitShift"), 1)
    opened = runtime("torch").open(small_model(), 1)
    with pytest.raises(ModelError, match="torch cannot run the model: there is no input 'b'"):
        opened.run({"a": np.zeros((64, 64), np.float32)})
    opened.close()
    with pytest.raises(ModelError, match="was closed"):
        opened.run({})


def test_torch_without_cuda_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both builds of torch, without and with CUDA, on a machine without a GPU."""
    runtime("torch")
    import torch

    found = get_runtime("torch:cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for version, words in ((None, "is a build for the CPU; install one with CUDA"), ("12.8", "finds 0 devices")):
        monkeypatch.setattr(torch.version, "cuda", version)
        for call in (lambda: found.check(), lambda: found.open(small_model(), 1)):
            with pytest.raises(RuntimeUnavailableError) as caught:
                call()
            assert caught.value.exit_code == 6
            assert str(caught.value).startswith(f"torch:cuda was asked for, but torch {torch.__version__}")
            assert words in str(caught.value)


def test_torch_that_is_missing_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    for spec in ("torch", "torch:cuda"):
        with pytest.raises(RuntimeUnavailableError, match=r"pip install 'onnxcompress\[distill\]'"):
            get_runtime(spec).check()


def test_tf32_on_torch_is_off_unless_chosen_and_every_run_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """On the processor, which takes the settings and ignores them."""
    runtime("torch")
    import torch

    waits: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    feeds = {name: rng.random((64, 64), np.float32) for name in "ab"}
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for spec, level, allowed in (("torch:cuda", "highest", False), ("torch:cuda,use_tf32=true", "high", True)):
            found = get_runtime(spec)
            monkeypatch.setattr(found, "check", lambda: None)
            monkeypatch.setattr(found, "torch_device", lambda: "cpu")
            assert isinstance(found, TorchCuda)
            opened = found.open(small_model(), 1)
            monkeypatch.setattr(opened, "_on_cpu", False)
            waits.clear()
            opened.bind(feeds)()
            assert waits == [1]
            assert torch.get_float32_matmul_precision() == level
            assert torch.backends.cudnn.allow_tf32 is allowed
            assert found.precision().startswith("TF32 (chosen" if allowed else "float32 (TF32 off")
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


# ----------------------------------------------------------------------------------------------------------------------
# CUDA, as far as it goes without a GPU


def test_options_of_cuda_reach_the_provider() -> None:
    found = get_runtime("onnxruntime:cuda")
    assert isinstance(found, OnnxRuntimeCuda)
    assert found.provider_options() == {
        "device_id": "0",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "use_tf32": "0",
        "prefer_nhwc": "0",
        "enable_cuda_graph": "0",
    }
    assert found.precision() == "float32 (TF32 off)"
    chosen = get_runtime("onnxruntime:cuda,use_tf32=1,prefer_nhwc=yes,cuda_graph=on,cudnn_conv_algo_search=heuristic")
    assert isinstance(chosen, OnnxRuntimeCuda)
    assert chosen.provider_options() == {
        "device_id": "0",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "1",
        "prefer_nhwc": "1",
        "enable_cuda_graph": "1",
    }
    assert "TF32" in chosen.precision()
    assert chosen.option_texts()["use_tf32"] == "true"


@pytest.mark.skipif(not without_gpu(), reason="this onnxruntime has CUDA")
def test_cuda_on_a_cpu_build_names_what_is_there_and_what_to_install() -> None:
    for call in (lambda r: r.check(), lambda r: r.open(demo_model_path(), 1)):
        with pytest.raises(RuntimeUnavailableError) as caught:
            call(get_runtime("onnxruntime:cuda"))
        assert caught.value.exit_code == 6
        assert installed_builds()[0] in str(caught.value)
        assert "CPUExecutionProvider" in str(caught.value)
        assert "pip install 'onnxcompress[gpu]'" in str(caught.value)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> type[OnnxRuntimeCuda]:
    """The CUDA adapter on a provider that every build has and that takes no node of an ordinary model: Azure's."""
    import onnxruntime

    if "AzureExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no second provider to fall back from")

    class Elsewhere(OnnxRuntimeCuda):
        provider_name = "AzureExecutionProvider"

        def provider_options(self) -> dict[str, str]:
            return {}

    monkeypatch.setitem(import_module("onnxcompress.session").PROVIDERS, "cuda", "AzureExecutionProvider")
    return Elsewhere


def test_nodes_that_run_elsewhere_are_an_error_with_their_list(elsewhere: type[OnnxRuntimeCuda]) -> None:
    with pytest.raises(RuntimeUnavailableError) as caught:
        elsewhere().open(demo_model_path(), 1)
    assert caught.value.exit_code == 6
    assert "nodes would not run on AzureExecutionProvider: /0/Conv (Conv, CPUExecutionProvider)" in str(caught.value)
    assert "cpu_fallback=allow" in str(caught.value)


def test_a_fallback_that_was_allowed_is_placed_and_not_an_error(elsewhere: type[OnnxRuntimeCuda]) -> None:
    allowed = elsewhere(CudaOptions(cpu_fallback="allow", io_binding=False))
    opened = allowed.open(demo_model_path(), 1)
    assert {node.provider for node in opened.placement()} == {"CPUExecutionProvider"}
    np.testing.assert_array_equal(opened.run(FEEDS)["logits"], Session(demo_model_path()).run(FEEDS)["logits"])


def test_a_session_without_its_provider_is_an_error(
    elsewhere: type[OnnxRuntimeCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime goes on with the CPU where a provider's libraries cannot be loaded."""
    monkeypatch.setattr(Session, "providers", property(lambda self: ["CPUExecutionProvider"]))
    with pytest.raises(
        RuntimeUnavailableError, match="has CPUExecutionProvider only: the provider could not be loaded"
    ):
        elsewhere(CudaOptions(cpu_fallback="allow")).open(demo_model_path(), 1)


def test_a_long_list_of_nodes_is_cut() -> None:
    nodes = [(f"n{i}", "Gather", "CPUExecutionProvider") for i in range(12)] + [("c", "Conv", "CUDAExecutionProvider")]
    message = fallback_message("onnxruntime:cuda", "CUDAExecutionProvider", nodes)
    assert message.startswith("onnxruntime:cuda: 12 of 13 nodes would not run on CUDAExecutionProvider: n0 (Gather, ")
    assert " and 2 more; " in message
    assert "n10" not in message


# ----------------------------------------------------------------------------------------------------------------------
# Traces


def trace_file(path: Path, events: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(events))
    return path


def kernel(name: str, ts: int, dur: int, op: str = "Conv") -> dict[str, Any]:
    facts = {"op_name": op, "provider": "CPUExecutionProvider", "node_index": "1"}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": facts}


def test_a_trace_leaves_out_the_warm_up_and_sums_loops(tmp_path: Path) -> None:
    runs = [{"cat": "Session", "name": "model_run", "ts": ts, "dur": 90} for ts in (0, 100, 200, 300)]
    events = [*runs, kernel("a", 1, 5000), kernel("a", 101, 10), kernel("a", 150, 10), kernel("a", 201, 40)]
    events += [
        kernel("a", 301, 60),
        kernel("copy", 310, 6, "MemcpyToHost"),
        {"cat": "Node", "name": "a_fence", "ts": 2},
    ]
    trace = read_trace(trace_file(tmp_path / "t.json", events), 1)
    assert trace.runs == 3
    assert trace.by_operator() == pytest.approx({"Conv": 40e-6, "MemcpyToHost": 0.0})
    assert trace.copies == 1


def test_a_trace_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match="no trace that can be read"):
        read_trace(tmp_path / "none.json", 0)
    with pytest.raises(RuntimeUnavailableError, match="holds no run"):
        read_trace(trace_file(tmp_path / "t.json", []), 0)


def test_a_session_says_where_nodes_run_only_where_it_was_asked_to_record_it() -> None:
    config = {"session.record_ep_graph_assignment_info": "1"}
    assigned = Session(demo_model_path(), config=config).assignment()
    names = {node.name for node in onnx.load(demo_model_path()).graph.node}
    assert {name for name, _, _ in assigned} <= names
    with pytest.raises(UsageError, match="did not record"):
        Session(demo_model_path()).assignment()
