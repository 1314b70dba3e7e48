"""What takes the steps: SGD and AdamW from torch, and Muon for weights that are matrices.

With folded BatchNormalization, weights of one layer are twenty times as large as those of another, so the rates of
AdamW and Muon are relative to the root mean square of each weight.

Source: N. Shazeer, M. Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", ICML 2018, section 8, for
relative rates; K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from onnxcompress.executor.network import Trained

__all__ = ["Muon", "OptimizerName", "is_matrix", "make_optimizer", "orthogonal", "orthogonal_macs"]

OptimizerName = Literal["muon", "adamw", "sgd"]

#: least root mean square that a weight and a vector are taken to have
_SMALL_WEIGHT, _SMALL_VECTOR = 1e-3, 1e-2
#: Newton-Schulz iterations and the coefficients of their polynomial, as in the source
_ITERATIONS = 5
_LINEAR, _CUBIC, _QUINTIC = 3.4445, -4.7750, 2.0315
_TINY = 1e-12
#: operators whose weights are rows that are looked up, or stacks of matrices
_NO_MATRICES = frozenset({"Gather", "MatMul"})


def make_optimizer(
    name: OptimizerName, trained: Sequence[Trained], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer of that name for ``trained``. A group's ``scale`` multiplies its rate, where there is one."""
    if name == "sgd":
        parameters = [item.parameter for item in trained]
        return torch.optim.SGD(parameters, learning_rate, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    groups: list[dict[str, Any]] = [
        {
            "params": [item.parameter],
            "scale": _size(item.parameter),
            # a weight decays, a bias or a scale does not
            "weight_decay": weight_decay if item.parameter.ndim > 1 else 0.0,
        }
        for item in trained
    ]
    if name == "adamw":  # its step is as large as its rate, whatever the weight
        return torch.optim.AdamW(groups, learning_rate)
    return Muon([{**group, "matrix": is_matrix(item)} for group, item in zip(groups, trained, strict=True)])


def is_matrix(item: Trained) -> bool:
    """True for a weight whose filters are rows of one matrix: of dense layers and of convolutions that mix channels."""
    shape = item.parameter.shape
    if len(shape) < 2 or min(shape[0], shape[1:].numel()) < 2 or shape[1] < 2:
        return False
    return "Gather" not in item.readers if len(shape) == 2 else _NO_MATRICES.isdisjoint(item.readers)


def orthogonal_macs(trained: Sequence[Trained]) -> int:
    """Multiply-accumulates that a step of :class:`Muon` takes beside forwards and backwards."""
    total = 0
    for item in trained:
        if is_matrix(item):
            rows, columns = len(item.parameter), item.parameter[0].numel()
            short, long = min(rows, columns), max(rows, columns)
            total += _ITERATIONS * (2 * short**2 * long + short**3)
    return total


class Muon(torch.optim.Optimizer):  # type: ignore[misc] # torch is optional
    """Momentum whose matrices are made orthogonal; everything else as Adam does it.

    A layer with few strong directions in its gradient learns along all of them. ``torch.optim.Muon`` takes parameters
    of two dimensions only and rounds to bfloat16, so convolutions could not use it.

    The groups hold one parameter each, ``matrix``, ``lr`` and ``weight_decay``. A step changes a weight by ``lr`` in
    its root mean square. The state is tensors, named as in AdamW where they are the same.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], lr: float = 1e-3, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "betas": (0.9, 0.999), "weight_decay": 0.0})

    def step(self, closure: Any = None) -> None:
        """Change all parameters that have a gradient."""
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    if group["weight_decay"]:
                        parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    change = self._orthogonal if group["matrix"] else self._adaptive
                    parameter.add_(change(parameter, group), alpha=-group["lr"])

    def _orthogonal(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(parameter)
        average = state["exp_avg"].lerp_(parameter.grad, 1 - group["momentum"])
        ahead = parameter.grad.lerp(average, group["momentum"])
        found = orthogonal(ahead.reshape(len(ahead), -1)).reshape(parameter.shape)
        return found / (found.square().mean().sqrt() + _TINY)

    def _adaptive(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        first, second = group["betas"]
        state["step"] += 1
        steps = float(state["step"])
        state["exp_avg"].lerp_(parameter.grad, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
        spread = (state["exp_avg_sq"] / (1 - second**steps)).sqrt_().add_(1e-8)
        found: Tensor = state["exp_avg"] / (1 - first**steps) / spread
        return found


def orthogonal(matrix: Tensor) -> Tensor:
    """[rows, columns]: ``matrix`` with singular values near one, by Newton-Schulz iterations."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + _TINY)
    for _ in range(_ITERATIONS):
        square = wide @ wide.T
        wide = _LINEAR * wide + (_CUBIC * square + _QUINTIC * square @ square) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def _size(parameter: Tensor) -> float:
    """The root mean square of a parameter, which its rate is relative to."""
    least = _SMALL_WEIGHT if parameter.ndim > 1 else _SMALL_VECTOR
    return max(float(parameter.detach().double().square().mean().sqrt()), least)
