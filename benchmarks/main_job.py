"""The main job on real models, each figure with its target.

Folding that keeps the outputs, INT8 against ONNX Runtime's own static quantisation in the same run, what the runtime
makes of the file, the time and memory that compressing takes, how far the benchmark can be trusted, and how fast the
command line starts. Run from the root of the repository::

    python benchmarks/main_job.py
    python benchmarks/main_job.py --only int8,audit --quick
    python benchmarks/main_job.py --markdown benchmarks/results/main_job.json

The models and their data lie in the folder that ONNXCOMPRESS_CASES names (default ../shared/cases); without them only
what needs none is measured. The last line on stdout is JSON. The exit code is 1 where a target was missed.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from aa import repeat, summary
from bench import Bench, Row, interval, main, measured_on, other_rows, rounded, say, target_summary, timing
from common import Case, alternate, quantize_static, quantize_static_input, run_process, save_samples, table

import onnxcompress as oc
from onnxcompress.base import Context
from onnxcompress.demo import demo_model_path
from onnxcompress.io import model_bytes
from onnxcompress.session import Feeds
from onnxcompress.targets import get_target

BATCH = 16
#: calibration samples; squeezenet1.1 has 120
SAMPLES = 256
#: cases that INT8 is meant for, and the agreement with fp32 that they must reach
AGREEMENT = {"resnet20": 0.988, "resnet56": 0.992, "mobilenetv2_cifar10": 0.989, "squeezenet1.1": 0.945}
#: operators that must not stay float in these cases, with what the runtime's optimiser calls them
INTEGER_OPERATORS = {
    *("Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Add", "Concat", "Slice"),
    *("Pad", "MaxPool", "NhwcMaxPool", "AveragePool", "GlobalAveragePool"),
}


class MainJob(Bench):
    """The parts of this script."""

    PARTS = ("fold", "int8", "audit", "time", "memory", "aa", "cli")

    @cached_property
    def quantised(self) -> dict[str, oc.CompressResult]:
        """The cases that INT8 is meant for, compressed once, judged by the whole validation split."""
        results = {}
        for name in AGREEMENT:
            case = self.cases[name]
            say(f"compressing {name}")
            results[name] = oc.compress(
                case.model,
                list(case.calibration(SAMPLES, BATCH)),
                self.folder / f"{name}.int8.onnx",
                eval_data=self.validation(name),
                evaluate=case.evaluate,
                benchmark=False,
                max_drop=None,
            )
        return results

    # -- the parts ------------------------------------------------------------------------------------------------

    def fold(self) -> None:
        """The recipe ``lossless`` keeps the outputs, with the runtime's own optimisation off."""
        for name, case in self.cases.items():
            feeds = list(case.calibration(64 if self.quick else 512, BATCH))
            folded = oc.load_recipe("lossless").pipeline()(oc.load(case.model))
            path = self.folder / f"{name}.folded.onnx"
            oc.save(folded.graph, path)
            data = open_feeds(case, feeds)
            worst = max(output.relative_l2 for output in oc.compare(case.model, path, data))
            nodes = f"{folded.report.before.nodes} -> {folded.report.after.nodes} nodes"
            text = f"{worst:.1e} ({data.samples} samples, {nodes})"
            self.add("fold", name, "relative L2 to the original", worst, text, most=1e-5)

    def int8(self) -> None:
        """Accuracy, speed and size against ``quantize_static`` on the same samples."""
        for name, agreement in AGREEMENT.items():
            case = self.cases[name]
            feeds = self.validation(name)
            theirs = self.folder / f"{name}.ort.onnx"
            prepared = quantize_static_input(case.model, self.folder / f"{name}.prepared.onnx")
            quantize_static(prepared, case.calibration(SAMPLES, BATCH), theirs)
            data = open_feeds(case, feeds)
            other = oc.compare(case.model, theirs, data, optimization=("all", "all"))[0]
            other_metric = case.evaluate(oc.Session(theirs).run)
            result = self.quantised[name]
            assert result.verification is not None
            own, metric = result.verification.outputs[0], result.metrics[0]
            own_bytes, other_bytes = model_bytes(result.output), model_bytes(theirs)
            own_same, other_same = own.same_argmax or 0.0, other.same_argmax or 0.0
            seconds = 3.0 if self.quick else 20.0
            speed = oc.benchmark(theirs, result.output, data, seconds=seconds)
            gain = oc.benchmark(case.model, result.output, data, seconds=seconds)

            part = "int8"
            text = f"{own.sqnr_db:.2f} dB, ORT {other.sqnr_db:.2f}"
            target = "not more than 0.3 dB below ORT"
            self.add(part, name, "SQNR", own.sqnr_db, text, least=other.sqnr_db - 0.3, target=target)
            text = f"{own_same:.2%}, ORT {other_same:.2%}"
            self.add(part, name, "agreement", own_same, text, least=agreement, target=f">= {agreement:.1%}")
            text = f"{metric.result:.4f}, fp32 {metric.original:.4f}, ORT {other_metric:.4f}"
            self.add(part, name, "metric", metric.result, text)
            self.add(part, name, "speed, ORT time / ours", speed.ratio, interval(speed), least=0.97)
            self.add(part, name, "speed, fp32 time / ours", gain.ratio, interval(gain))
            text = f"{own_bytes:,} bytes, ORT {other_bytes:,}, fp32 {result.before.bytes:,}"
            self.add(part, name, "file size", own_bytes, text, most=other_bytes, target="not larger than ORT's")
            self.details.setdefault(part, {})[name] = {
                "samples": {"calibration": SAMPLES if name != "squeezenet1.1" else 120, "validation": data.samples},
                "ours": asdict(own) | {"metric": metric.result, "bytes": own_bytes},
                "ort": asdict(other) | {"metric": other_metric, "bytes": other_bytes},
                "fp32": {"metric": metric.original, "bytes": result.before.bytes},
                "ort_over_ours": timing(speed),
                "fp32_over_ours": timing(gain),
            }

    def audit(self) -> None:
        """What the runtime makes of the written files."""
        for name, result in self.quantised.items():
            planned = result.audit or {}
            reasons = {node["operator"]: node["reason"] for node in planned.get("floats", ())}
            found = oc.audit(result.output, get_target(result.target))
            left = [node for node in found.floats if node.operator in INTEGER_OPERATORS]
            integer = ", ".join(f"{count} {op}" for op, count in found.integer.items())
            others = sorted({node.operator for node in found.floats})
            text = integer + "".join(f"; {op} is float: {reasons.get(op, 'no reason known')}" for op in others)
            target = "no Conv, Gemm, Add, pool, Concat, Slice, Pad in float"
            self.add("audit", name, "integer operators", len(left), text, most=0, target=target)
            broken = len(planned.get("mismatches", ())) + len(planned.get("stranded", ()))
            # No DQ at all is better than one: the runtime's QGemm may write floats itself.
            extra = max(found.quantize - 1, 0) + max(found.dequantize - 1, 0) + broken
            text = f"{found.quantize} Q, {found.dequantize} DQ, {broken} not as planned"
            self.add(
                "audit", name, "conversions left", extra, text, most=0, target="at most 1 Q and 1 DQ, all as planned"
            )
            self.details.setdefault("audit", {})[name] = found.to_dict()

    def time(self) -> None:
        """The time of compressing against that of ``quantize_static`` on the same feeds in memory."""
        case = self.cases["squeezenet1.1"]
        prepared = quantize_static_input(case.model, self.folder / "prepared.onnx")
        insert_qdq = oc.load_pass("insert_qdq")()
        order = random.Random(0)
        repetitions = 2 if self.quick else 7
        for batch in (BATCH, 1):
            feeds = list(case.calibration(120, batch))

            def quantize(feeds: list[Feeds] = feeds) -> None:
                quantize_static(prepared, feeds, self.folder / "ort.onnx")

            def one_pass(feeds: list[Feeds] = feeds) -> None:
                graph = oc.load(case.model)
                data = oc.open_data(feeds, oc.input_specs(graph))
                oc.save(insert_qdq(graph, Context(original=graph, data=data)).graph, self.folder / "pass.onnx")

            def whole(feeds: list[Feeds] = feeds) -> None:
                oc.compress(case.model, feeds, self.folder / "whole.onnx", benchmark=False, max_drop=None)

            jobs: dict[str, Callable[[], object]] = {
                "quantize_static": quantize,
                "insert_qdq": one_pass,
                "compress": whole,
            }
            if batch == BATCH:
                jobs["process"] = self.process_job(case, feeds)
            seconds = alternate(jobs, repetitions, order.shuffle)
            base = statistics.median(seconds["quantize_static"])
            named = f"squeezenet1.1, batch {batch}"
            for job, measure, most in (
                ("insert_qdq", "insert_qdq with load and save / quantize_static", 1.2),
                ("compress", "compress(benchmark=False) / quantize_static", 3.0),
                ("process", "compress --no-benchmark as a process / quantize_static", None),
            ):
                if job in seconds:
                    own = statistics.median(seconds[job])
                    text = f"{own / base:.2f}x ({own:.2f} s / {base:.2f} s)"
                    self.add("time", named, measure, own / base, text, most=most)
            self.details.setdefault("time", {})[f"batch {batch}"] = {k: rounded(v) for k, v in seconds.items()}

    def process_job(self, case: Case, feeds: Sequence[Feeds]) -> Callable[[], object]:
        """The command line on the same samples in a file, as a whole process."""
        data = self.folder / "squeezenet.npz"
        save_samples(data, {name: np.concatenate([f[name] for f in feeds]) for name in feeds[0]})
        command = compress_command(case.model, data, self.folder / "process.onnx")
        return lambda: run_process(command)

    def memory(self) -> None:
        """The peak of a whole process must not grow with the number of samples."""
        few, many = (16, 64) if self.quick else (64, 1000)
        generator = np.random.default_rng(0)
        for name in ("resnet20", "squeezenet1.1"):
            case = self.cases[name]
            specs = oc.input_specs(oc.load(case.model))
            peaks = []
            for samples in (few, many):
                data = self.folder / "samples.npz"
                shapes = {s.name: [d if isinstance(d, int) else samples for d in s.shape or ()] for s in specs}
                save_samples(data, {n: generator.random([samples, *s[1:]], np.float32) for n, s in shapes.items()})
                command = compress_command(case.model, data, self.folder / "process.onnx", "--batch", str(BATCH))
                peaks.append(run_process(command).peak_mib)
            ratio = peaks[1] / peaks[0]
            text = f"{ratio:.3f}x ({peaks[1]:.0f} MiB / {peaks[0]:.0f} MiB)"
            self.add("memory", name, f"peak at {many} samples / at {few}, batch {BATCH}", ratio, text, most=1.1)

    def aa(self) -> None:
        """A model against itself: the interval must hold 1."""
        repetitions = 5 if self.quick else 20
        model = onnx.load(demo_model_path())
        found = summary(repeat(model, repetitions, seconds=3.0 if self.quick else 10.0))
        covers = found["covers_1"]
        self.details["aa"] = found
        text = f"{covers} of {repetitions}, half width {found['half_width_median']:.2%}"
        least = 0.85 * repetitions
        self.add("aa", "demo model", "intervals that hold 1", covers, text, least=least, target=f">= {least:g} of them")

    def cli(self) -> None:
        """The start of the command line, once the files are in the machine's cache."""
        command = Path(sys.executable).parent / "onnxcompress"
        start = [command] if command.is_file() else [sys.executable, "-m", "onnxcompress"]
        run_process([*start, "--help"])
        seconds = [run_process([*start, "--help"]).seconds for _ in range(5 if self.quick else 15)]
        median = statistics.median(seconds)
        self.details["cli"] = rounded(seconds)
        self.add("cli", "--help", "seconds of the whole process", median, f"{median:.2f} s", most=0.5, target="< 0.5 s")

    @classmethod
    def markdown(cls, facts: Mapping[str, Any]) -> str:
        """The figures as they stand in README.md: one table for INT8, a line a case, and one for the rest."""
        rows = [Row(**row) for row in facts["rows"]]
        parts = [measured_on(facts, "main_job.py")]
        details = facts["details"].get("int8")
        if details:
            parts += [
                "INT8 on one thread against ONNX Runtime's static quantisation (`quantize_static`: QDQ, min-max, uint8 "
                "activations, int8 weights per channel) on the same samples; ORT / ours:",
                table(
                    ("case", "metric fp32", "ORT / ours", "SQNR, dB", "agreement", "time ORT / ours",
                     "time fp32 / ours", "size / fp32"),
                    [int8_cells(name, found) for name, found in details.items()],
                    aligned=False,
                ),
            ]  # fmt: skip
        parts += other_rows([r for r in rows if r.part != "int8" and r.measure])
        return "\n\n".join([*parts, target_summary(rows)])


def open_feeds(case: Case, feeds: Sequence[Mapping[str, Any]]) -> oc.Dataset:
    """Batches in memory as data for the model of ``case``."""
    return oc.open_data(list(feeds), oc.input_specs(oc.load(case.model)))


def compress_command(model: Path, data: Path, output: Path, *options: str) -> list[str | Path]:
    """The main job as a process, without a benchmark and without a budget that random samples might miss."""
    head: list[str | Path] = [sys.executable, "-m", "onnxcompress", "compress", model, "--data", data, "-o", output]
    return [*head, "--no-benchmark", "--max-drop", "100", "--quiet", *options]


def int8_cells(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of the INT8 table."""
    fp32, ort, ours = found["fp32"], found["ort"], found["ours"]
    speed, gain = found["ort_over_ours"], found["fp32_over_ours"]
    return (
        name,
        f"{fp32['metric']:.4f}",
        f"{ort['metric']:.4f} / {ours['metric']:.4f}",
        f"{ort['sqnr_db']:.1f} / {ours['sqnr_db']:.1f}",
        f"{ort['same_argmax']:.1%} / {ours['same_argmax']:.1%}",
        f"{speed['ratio']:.2f} [{speed['low']:.2f}, {speed['high']:.2f}]",
        f"{gain['ratio']:.2f} [{gain['low']:.2f}, {gain['high']:.2f}]",
        f"{ort['bytes'] / fp32['bytes']:.3f} / {ours['bytes'] / fp32['bytes']:.3f}",
    )


if __name__ == "__main__":
    sys.exit(main(MainJob, "Measure the main job on real models and hold it against its targets."))
