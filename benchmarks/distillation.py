"""Distillation on real models, each figure with its target: the time of a step, and what students gain.

Run from the root of the repository, with the extra ``distill``::

    python benchmarks/distillation.py
    python benchmarks/distillation.py --only step --quick
    python benchmarks/distillation.py --only student --student pruned.onnx --teacher resnet56 --minutes 6

The models and their data lie in the folder that ONNXCOMPRESS_CASES names (default ../shared/cases). Students learn from
1,024 unlabelled training images and are judged by the validation split. The last line on stdout is JSON. The exit code
is 1 where a target was missed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import Bench, Row, main, measured_on, other_rows, target_summary
from common import Case, alternate
from torch import nn
from torch.nn import functional

import onnxcompress as oc
from onnxcompress.base import Context
from onnxcompress.data import open_data
from onnxcompress.graph import input_specs
from onnxcompress.passes.distill import Distill
from onnxcompress.passes.insert_qdq import InsertQdq

SAMPLES = 1024
BATCH = 64


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters, BatchNormalization folded."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels_out, 3, stride, 1)
        self.second = nn.Conv2d(channels_out, channels_out, 3, 1, 1)
        self.stride, self.more = stride, (channels_out - channels_in) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(functional.relu(self.first(x)))
        if self.stride != 1:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more, self.more))
        return functional.relu(x + y)


class ResNet56(nn.Module):
    """What a person would write for the case resnet56."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        sizes = (
            [(16, 16, 1)] + [(16, 16, 1)] * 8 + [(16, 32, 2)] + [(32, 32, 1)] * 8 + [(32, 64, 2)] + [(64, 64, 1)] * 8
        )
        self.blocks = nn.Sequential(*(Block(*size) for size in sizes))
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.blocks(functional.relu(self.stem(x)))
        return self.head(functional.avg_pool2d(y, 8).flatten(1))


class Distillation(Bench):
    """The parts of this script."""

    PARTS = ("step", "int8", "student")
    ON_REQUEST = ("student",)

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Which student to teach."""
        parser.add_argument("--student", type=Path, help="of part student: an ONNX file made from a case")
        parser.add_argument("--teacher", default="resnet56", help="of part student: the case")
        parser.add_argument("--minutes", type=float, default=6.0, help="of part student: how long to train")
        parser.add_argument("--samples", type=int, default=SAMPLES, help="of part student: unlabelled training images")

    @classmethod
    def markdown(cls, facts: Mapping[str, Any]) -> str:
        """The figures as they stand in README.md."""
        rows = [Row(**row) for row in facts["rows"]]
        parts = [measured_on(facts, "distillation.py"), *other_rows(rows), target_summary(rows)]
        return "\n\n".join(parts)

    # -- the parts ------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """A training step of the executor against one of a hand-written module of the same network."""
        from onnxcompress.executor.network import Network

        graph = oc.load_recipe("lossless").pipeline()(oc.load(self.cases["resnet56"].model)).graph
        images = np.random.default_rng(0).standard_normal((BATCH, 3, 32, 32)).astype(np.float32)
        network = Network(graph)
        feeds = network.feeds({"input": images})
        module = ResNet56().to(memory_format=torch.channels_last)
        x = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
        runs = {
            "executor": trainer(network.parameters(), lambda: network(feeds)["logits"]),
            "module": trainer(module.parameters(), lambda: module(x)),
        }
        seconds = alternate(runs, 4 if self.quick else 15, random.Random(0).shuffle)
        ratio = statistics.median(a / b for a, b in zip(seconds["executor"], seconds["module"], strict=True))
        self.details["step"] = {name: statistics.median(values) for name, values in seconds.items()}
        text = f"{ratio:.3f}x ({1000 * self.details['step']['executor']:.0f} ms, batch {BATCH})"
        self.add(
            "step", "resnet56", "training step / hand-written module", ratio, text, most=1.5, target="<= 1.5, aim 1.2"
        )

    def int8(self) -> None:
        """An INT8 student, distilled: SQNR above what calibration alone reaches."""
        case = self.cases["mobilenetv2_cifar10"]
        graph = oc.load_recipe("lossless").pipeline()(oc.load(case.model)).graph
        data = open_data(list(case.calibration(SAMPLES, 16)), input_specs(graph))
        context = Context(original=graph, data=data)
        calibrated = InsertQdq()(graph, context).graph
        step = Distill(steps=20 if self.quick else 300)
        result = step(calibrated, context)
        before, after = self.judged(case, calibrated), self.judged(case, result.graph)
        text = f"{after['sqnr_db']:.2f} dB, before {before['sqnr_db']:.2f}; metric {after['metric']:.4f}"
        text += f", before {before['metric']:.4f}"
        self.details["int8"] = {"before": before, "after": after, **result.report.details["distillation"]}
        self.add(
            *("int8", case.name, "SQNR gained over calibration, dB", after["sqnr_db"] - before["sqnr_db"], text),
            least=0.0,
            target="> 0",
        )

    def student(self) -> None:
        """A student from a file, judged before and after."""
        if self.options.student is None:
            raise SystemExit("part student needs --student FILE")
        case = self.cases[self.options.teacher]
        graph = oc.load(self.options.student)
        data = open_data(list(case.calibration(self.options.samples, 16)), input_specs(graph))
        step = Distill(teacher=str(case.model), minutes=self.options.minutes)
        result = step(graph, Context(original=graph, data=data))
        whole = case.evaluate(oc.Session(case.model).run)
        before, after = self.judged(case, graph), self.judged(case, result.graph)
        lost = 100 * (whole - after["metric"])
        self.details["student"] = {"before": before, "after": after, **result.report.details["distillation"]}
        text = f"{lost:.2f}, before {100 * (whole - before['metric']):.2f} ({self.options.samples} samples)"
        self.add("student", case.name, f"points lost after {self.options.minutes:g} min", lost, text)

    def judged(self, case: Case, graph: Any) -> dict[str, float]:
        """Metric and SQNR of the first output on the whole validation split."""
        data = open_data(self.validation(case.name), input_specs(graph))
        found = oc.compare(case.model, graph, data, optimization=("all", "all"))[0]
        return {"metric": case.evaluate(oc.Session(graph).run), "sqnr_db": found.sqnr_db}


def trainer(parameters: Any, answer: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """One training step: forwards, backwards, AdamW."""
    optimizer = torch.optim.AdamW(parameters, 1e-4)

    def run() -> None:
        optimizer.zero_grad()
        answer().square().mean().backward()
        optimizer.step()

    return run


if __name__ == "__main__":
    sys.exit(main(Distillation, "Distillation on real models, with targets."))
