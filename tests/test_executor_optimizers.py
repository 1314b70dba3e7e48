"""Optimizers: orthogonal matrices, steps relative to weights, and who gets which."""

from __future__ import annotations

from typing import Any

import onnx_graphsurgeon as gs
import pytest
from models import Net, image

from onnxcompress.proto import from_proto

torch = pytest.importorskip("torch", reason="needs the extra distill")

from onnxcompress.executor.network import Network, Trained  # noqa: E402 - only where torch is
from onnxcompress.executor.optimizers import (  # noqa: E402
    Muon,
    is_matrix,
    make_optimizer,
    orthogonal,
    orthogonal_macs,
)


def trained(shape: tuple[int, ...], *readers: str, seed: int = 0) -> Trained:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    constant = gs.Constant("w", values.numpy().copy())
    return Trained("w", constant, torch.nn.Parameter(values), None, readers or ("Conv",))


@pytest.mark.parametrize("shape", [(16, 16), (8, 72), (72, 8)])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_singular_values_come_near_one(shape: tuple[int, int], scale: float) -> None:
    found = orthogonal(scale * trained(shape).parameter.detach())
    assert found.shape == shape
    values = torch.linalg.svdvals(found)
    assert values.max() < 1.3
    assert values.median() > 0.6


def test_no_gradient_changes_nothing() -> None:
    assert not orthogonal(torch.zeros(4, 9)).any()


def test_a_step_is_as_large_as_its_rate_whatever_the_gradient() -> None:
    for size in (1e-8, 1.0, 1e8):
        item = trained((6, 4, 3, 3))
        before = item.parameter.detach().clone()
        muon = Muon([{"params": [item.parameter], "matrix": True}], 1e-2)
        item.parameter.grad = size * torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
        muon.step()
        change = item.parameter.detach() - before
        assert float(change.square().mean().sqrt()) == pytest.approx(1e-2, rel=1e-3)
        assert float((change * item.parameter.grad).sum()) < 0


def test_what_is_no_matrix_is_trained_as_by_adam() -> None:
    mine, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    muon = Muon([{"params": [mine], "matrix": False, "weight_decay": 0.1}], 1e-2)
    adam = torch.optim.AdamW([theirs], 1e-2, weight_decay=0.1)
    for step in range(20):
        for parameter in (mine, theirs):
            parameter.grad = torch.sin(parameter.detach() * (3 + step))
        muon.step()
        adam.step()
    assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "readers", "wanted"),
    [
        ((8, 4, 3, 3), ("Conv",), True),
        ((8, 4, 3, 3), ("DequantizeLinear",), True),
        ((8, 16), ("Gemm",), True),
        ((16, 8), ("MatMul",), True),
        ((8, 1, 3, 3), ("Conv",), False),  # each channel has a filter of its own
        ((100, 16), ("Gather",), False),
        ((100, 16), ("Gather", "MatMul"), False),
        ((4, 16, 8), ("MatMul",), False),
        ((1, 16), ("Gemm",), False),
        ((16,), ("Add",), False),
    ],
)
def test_matrices(shape: tuple[int, ...], readers: tuple[str, ...], wanted: bool) -> None:
    item = trained(shape, *readers)
    assert is_matrix(item) is wanted
    assert (orthogonal_macs([item]) > 0) is wanted


def test_its_work_is_counted() -> None:
    assert orthogonal_macs([trained((8, 4, 3, 3)), trained((8,))]) == 5 * (2 * 8 * 8 * 36 + 8**3)


@pytest.mark.parametrize("name", ["muon", "adamw", "sgd"])
def test_every_optimizer_makes_a_loss_small(name: Any) -> None:
    net = Net()
    x = net.add("Relu", net.conv(image(net), 3, 8, bias=True))
    net.add("Flatten", net.add("GlobalAveragePool", net.conv(x, 8, 6, bias=True)), to="y")
    net.output("y", ["N", 6])
    network = Network(from_proto(net.model()))
    pixels = torch.randn((4, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    optimizer = make_optimizer(name, network.trained, 1e-2, 0.0)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (network({"x": pixels})["y"] - 1).square().mean()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-2 * group.get("scale", 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
