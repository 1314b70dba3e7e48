"""Distillation on real models, each figure with its target: the time of a step, and what students gain.

Run from the root of the repository, with the extra ``distill``::

    python benchmarks/distillation.py
    python benchmarks/distillation.py --only step --quick
    python benchmarks/distillation.py --only resnet20-0.5,resnet56-0.5 --work FOLDER
    python benchmarks/distillation.py --only student --student pruned.onnx --teacher resnet56 --minutes 6

The models and their data lie in the folder that ONNXCOMPRESS_CASES names (default ../shared/cases). Students learn from
unlabelled training samples and are judged by the validation split. ``--steps-share X`` is for a machine that others
use: instead of as long as a row says, it trains X times as many steps as two idle cores would make in that time, by the
processor seconds that a step takes on one thread. ``--work`` keeps what pruning made. The last line on stdout is JSON.
The exit code is 1 where a target was missed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import Bench, Row, main, measured_on, other_rows, target_summary
from common import Case, alternate, save_samples
from torch import nn
from torch.nn import functional

import onnxcompress as oc
from onnxcompress.base import Context, PassResult
from onnxcompress.data import open_data
from onnxcompress.graph import input_specs
from onnxcompress.passes.distill import Distill
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.pipeline import Pipeline
from onnxcompress.recipe import Recipe, parse_recipe
from onnxcompress.stages import open_stages

SAMPLES = 1024
BATCH = 64
#: how much faster two idle cores are taken to be than one, in training steps a second
TWO_CORES = 1.6
#: the part of the time that is not for judging
TRAINING = 0.9


@dataclass(frozen=True)
class Student:
    """One row: what is pruned, what it learns from and how long, and the points that it may lose in the end."""

    case: str
    prune: Mapping[str, Any]
    samples: int
    minutes: float
    most: float
    aim: float
    #: samples that pruning sees
    pruned_on: int = SAMPLES
    options: Mapping[str, Any] = field(default_factory=dict)


STUDENTS = {
    "resnet56-0.5": Student("resnet56", {"macs": 0.5}, SAMPLES, 6, 2.6, 1.9),
    "resnet20-0.75": Student("resnet20", {"macs": 0.75}, SAMPLES, 6, 1.1, 0.7),
    "resnet20-0.5": Student("resnet20", {"macs": 0.5}, SAMPLES, 6, 5.0, 4.0),
    "mobilenetv2-0.67": Student("mobilenetv2_cifar10", {"macs": 0.67}, SAMPLES, 6, 2.5, 1.5),
    "minilm": Student("minilm", {"ffn": 0.7, "heads": 0.75}, 5749, 20, 1.0, 0.5, 512),
    "resnet56-all": Student("resnet56", {"macs": 0.5}, 50_000, 60, 1.6, 0.6),
}
#: recipes that are compared, and the row of the one command
ORDERS = ("prune-distil-int8", "prune-int8-distil")


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

    PARTS = ("step", *STUDENTS, "int8", "orders-resnet20", "orders-resnet56", "student")
    ON_REQUEST = ("resnet56-all", "orders-resnet56", "student")

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Which student to teach, how long, and where to keep what pruning made."""
        parser.add_argument("--work", type=Path, help="keep what pruning made here, and take it from here")
        parser.add_argument("--steps-share", type=float, help="train this share of the steps of two idle cores")
        parser.add_argument("--threads", type=int, default=0, help="threads to train with; 0: all cores")
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

    def part(self, name: str) -> None:
        """One part: a row of the table, an order of passes, or the method of that name."""
        if name in STUDENTS:
            self.row(name, STUDENTS[name])
        elif name.startswith("orders-"):
            self.orders(name)
        else:
            super().part(name)

    # -- the parts ------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """A training step of the executor against one of a hand-written module of the same network."""
        from onnxcompress.executor.network import Network
        from onnxcompress.executor.optimizers import make_optimizer

        graph = oc.load_recipe("lossless").pipeline()(oc.load(self.cases["resnet56"].model)).graph
        images = np.random.default_rng(0).standard_normal((BATCH, 3, 32, 32)).astype(np.float32)
        network = Network(graph)
        feeds = network.feeds({"input": images})
        module = ResNet56().to(memory_format=torch.channels_last)
        x = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
        adamw = partial(torch.optim.AdamW, lr=1e-4)
        muon = partial(make_optimizer, "muon", learning_rate=1e-4, weight_decay=0.0)
        runs = {
            "executor": trainer(adamw(network.parameters()), lambda: network(feeds)["logits"]),
            "executor, Muon": trainer(muon(network.trained), lambda: network(feeds)["logits"]),
            "module": trainer(adamw(module.parameters()), lambda: module(x)),
        }
        seconds = alternate(runs, 4 if self.quick else 15, random.Random(0).shuffle)
        self.details["step"] = {name: statistics.median(values) for name, values in seconds.items()}
        for name in ("executor", "executor, Muon"):
            ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["module"], strict=True))
            text = f"{ratio:.3f}x ({1000 * self.details['step'][name]:.0f} ms, batch {BATCH})"
            measure = f"training step, {name} / hand-written module, AdamW"
            self.add("step", "resnet56", measure, ratio, text, most=1.5, target="<= 1.5, aim 1.2")

    def int8(self) -> None:
        """An INT8 student, distilled: SQNR above what calibration alone reaches."""
        case = self.cases["mobilenetv2_cifar10"]
        graph = oc.load_recipe("lossless").pipeline()(oc.load(case.model)).graph
        data = open_data(list(case.calibration(SAMPLES, 16)), input_specs(graph))
        context = Context(original=graph, data=data)
        calibrated = InsertQdq()(graph, context).graph
        step = self.lesson(6.0, calibrated, graph, data)
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

    def row(self, name: str, student: Student) -> None:
        """A pruned model, and what it loses before and after its original taught it."""
        case = self.cases[student.case]
        graph = oc.load(case.model)
        samples = 256 if self.quick else student.samples
        data = self.data(case, samples)
        judging = Distill().hold_out(data, 0)
        assert judging is not None
        fitted = judging[0].take(min(student.pruned_on, judging[0].samples))
        start = self.pruned(graph, fitted, student.prune)
        lesson = self.lesson(student.minutes, start.graph, graph, data, start)
        result = lesson(start.graph, self.context(graph, data, start))
        whole = case.evaluate(oc.Session(case.model).run)
        before, after = (100 * (whole - case.evaluate(oc.Session(g).run)) for g in (start.graph, result.graph))
        told = result.report.details["distillation"]
        told |= {"points_lost": [before, after], "learning_rate": result.report.decisions["learning_rate"]}
        self.details[name] = told
        text = f"{after:.2f}, before {before:.2f} ({samples} samples, {self.duration(student.minutes, told['steps'])})"
        self.add(name, case.name, f"points lost, {_described(student)}", after, text, most=student.most)
        self.rows[-1] = replace_aim(self.rows[-1], after, student.aim)

    def orders(self, name: str) -> None:
        """Both orders of distilling and quantising from one pruned model, held against its float version and INT8."""
        case = self.cases[name.removeprefix("orders-")]
        samples = 256 if self.quick else SAMPLES
        data = self.work / f"{case.name}.{samples}.npz"
        if not data.exists():
            save_samples(data, {k: np.concatenate([b[k] for b in case.calibration(samples, 16)]) for k in ("input",)})
        judging = {"input": np.concatenate([batch["input"] for batch in self.validation(case.name)])}
        whole = case.evaluate(oc.Session(case.model).run)
        steps = self.details.get(f"{case.name}-0.5", {}).get("steps")
        if steps is None:
            steps = self.steps(6.0, *self.probe(case, samples))
        dense = self.work / f"{case.name}.dense.onnx"
        given = {"eval_data": judging, "max_drop": None, "benchmark": False, "threads": self.options.threads}
        oc.compress(case.model, data, dense, recipe="int8", **given)
        lost: dict[str, float] = {}
        files = {}
        for recipe in ("float", *ORDERS):
            output = self.work / f"{case.name}.{recipe}.onnx"
            oc.compress(case.model, data, output, recipe=_with_steps(recipe, steps), work_dir=self.work, **given)
            lost[recipe] = 100 * (whole - case.evaluate(oc.Session(output).run))
            files[recipe] = output
        self.details[name] = {"points_lost": lost, "steps": steps}
        for recipe in ORDERS:
            more = lost[recipe] - lost["float"]
            size = files[recipe].stat().st_size / case.model.stat().st_size
            speed = oc.benchmark(dense, files[recipe], judging, threads=1, seconds=2.0 if self.quick else 15.0)
            self.details[name][recipe] = {"size": size, "dense_int8_over_this": speed.ratio}
            text = f"{more:.2f} ({lost[recipe]:.2f}, float {lost['float']:.2f}; {self.duration(6.0, steps)})"
            measure = f"{recipe}, points lost beyond the float version"
            self.add(name, case.name, measure, more, text, most=0.3)
            held = case.name == "resnet56"  # of the others this is told only
            most, least, aim = (0.17, 1.1, 1.3) if held else (None, None, None)
            self.add(name, case.name, f"{recipe}, size / original", size, f"{size:.3f}", most=most)
            text = f"{speed.ratio:.2f}x [{speed.low:.2f}, {speed.high:.2f}]"
            self.add(name, case.name, f"{recipe}, time of dense INT8 / this", speed.ratio, text, least=least, aim=aim)

    # -- what they share ------------------------------------------------------------------------------------------

    @property
    def work(self) -> Path:
        """Where files go."""
        folder: Path = self.options.work or self.folder
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def data(self, case: Case, samples: int) -> Any:
        """Unlabelled training samples."""
        return open_data(list(case.calibration(samples, 16)), input_specs(oc.load(case.model)))

    def context(self, graph: Any, data: Any, start: PassResult | None = None) -> Context:
        """What the passes get; stages go to the work folder."""
        return Context(
            original=graph,
            data=data,
            threads=self.options.threads,
            kept={} if start is None else start.kept,
            stages=open_stages(self.work),
        )

    def pruned(self, graph: Any, data: Any, options: Mapping[str, Any]) -> PassResult:
        """The start of distillation, as the recipes make it."""
        recipe = _recipe("fold_constants", "eliminate_dead_nodes", {"prune_channels": dict(options)}, "fold_batch_norm")
        return Pipeline(recipe.passes)(graph, self.context(graph, data))

    def probe(self, case: Case, samples: int) -> tuple[Any, Any, Any, PassResult]:
        """A pruned model to count steps with."""
        graph, data = oc.load(case.model), self.data(case, samples)
        start = self.pruned(graph, data, {"macs": 0.5})
        return start.graph, graph, data, start

    def lesson(self, minutes: float, student: Any, graph: Any, data: Any, start: PassResult | None = None) -> Distill:
        """The pass with its defaults, for as long as the row says, or for as many steps as were asked for."""
        if self.options.steps_share is None and not self.quick:
            return Distill(minutes=minutes)
        return Distill(steps=20 if self.quick else self.steps(minutes, student, graph, data, start))

    def steps(self, minutes: float, student: Any, graph: Any, data: Any, start: PassResult | None = None) -> int | None:
        """How many steps two idle cores make in the time, times what was asked for; None: the time decides."""
        if self.options.steps_share is None:
            return 20 if self.quick else None
        seconds = []
        for count in (20, 40):  # both with as many evaluations
            begun = time.process_time()
            Distill(steps=count, learning_rate=1e-4)(student, self.context(graph, data, start))
            seconds.append(time.process_time() - begun)
        a_step = max(seconds[1] - seconds[0], 1e-3) / 20
        return max(1, int(self.options.steps_share * TRAINING * 60 * minutes * TWO_CORES / a_step))

    def duration(self, minutes: float, steps: int | None) -> str:
        """How long it was trained, in words."""
        if self.quick:
            return f"{steps} steps"
        if self.options.steps_share is None:
            return f"{minutes:g} min"
        return f"{steps} steps, {self.options.steps_share:.0%} of what two idle cores make in {minutes:g} min"

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


def replace_aim(row: Row, value: float, aim: float) -> Row:
    """``row`` with an aim that lies below its value."""
    return replace(row, target=f"{row.target}; aim {aim:g}", aim=value <= aim)


def _described(student: Student) -> str:
    return ", ".join(f"{name} {value}" for name, value in student.prune.items())


def _recipe(*passes: Any) -> Recipe:
    return parse_recipe(json.dumps({"version": 1, "passes": list(passes)}))


def _with_steps(name: str, steps: int | None) -> Recipe:
    """The named recipe, trained for ``steps``; "float": without what comes after distillation."""
    recipe = oc.load_recipe(ORDERS[0] if name == "float" else name)
    passes = tuple(Distill(steps=steps) if isinstance(step, Distill) and steps else step for step in recipe.passes)
    if name == "float":
        passes = passes[: [step.name for step in passes].index("distill") + 1]
    return replace(recipe, passes=passes)


def trainer(optimizer: torch.optim.Optimizer, answer: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """One training step: forwards, backwards, and what the optimizer makes of it."""

    def run() -> None:
        optimizer.zero_grad()
        answer().square().mean().backward()
        optimizer.step()

    return run


if __name__ == "__main__":
    sys.exit(main(Distillation, "Distillation on real models, with targets."))
