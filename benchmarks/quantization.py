"""INT8 beside every peer on real models: accuracy, speed, size, and the time and memory that quantising takes.

Ours is the plain command ``onnxcompress compress MODEL --data SAMPLES -o OUT``. ONNX Runtime's quantiser runs beside
it, and other tools where ``--peer`` names the interpreter of an environment that holds them. Run from the root of the
repository::

    python benchmarks/quantization.py
    python benchmarks/quantization.py --only resnet20,minilm --quick
    python benchmarks/quantization.py --peer nncf=/path/to/python --tools nncf --output results.json --update
    python benchmarks/quantization.py --markdown benchmarks/results/quantization.json

The models and their data lie in the folder that ONNXCOMPRESS_CASES names (default ../shared/cases). The last line on
stdout is JSON. The exit code is 1 where a target was missed; a peer that fails is a row with its reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from bench import (
    Bench,
    Row,
    interval,
    main,
    measured_on,
    other_rows,
    revision,
    say,
    some_of,
    target_summary,
    timing,
)
from common import Case, measure_process, save_samples, table
from numpy.typing import NDArray
from tools import DYNAMIC, OURS, STATIC, TOOLS, Quantised, Variant, interpreters, quantise, variants

import onnxcompress as oc
from onnxcompress.data import Batch
from onnxcompress.demo import demo_calibration, demo_evaluation, demo_model_path
from onnxcompress.environment import describe_environment
from onnxcompress.io import model_bytes
from onnxcompress.session import Feeds, Session

BATCH = 16
#: calibration samples; squeezenet1.1 has 120
SAMPLES = 256
#: samples that take turns when models are timed
TIMED = 8
#: products of two neighbours are added in 16 bits by ``vpmaddubsw``
INT16 = np.iinfo(np.int16)
#: operators whose second input is a matrix of weights, multiplied with uint8 activations
PRODUCTS = {"Conv", "Gemm", "MatMul", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul"}


@dataclass(frozen=True)
class Target:
    """What ours must reach on a case, and what is aimed at; dB, shares, points, seconds."""

    sqnr: float
    sqnr_aim: float
    #: the file that ours must not be slower than
    rival: Variant
    #: least ratio of times, the rival's over ours
    speed: float
    speed_aim: float
    agreement: float | None = None
    drop: float | None = None
    size: float | None = None
    seconds: float | None = 60.0


TARGETS = {
    "resnet20": Target(30.5, 31.5, STATIC, 0.97, 1.0, agreement=0.993),
    "resnet56": Target(29.2, 30.5, STATIC, 0.97, 1.0, agreement=0.995),
    "mobilenetv2_cifar10": Target(30.8, 32.5, STATIC, 0.97, 1.0, agreement=0.992),
    "squeezenet1.1": Target(23.0, 24.0, STATIC, 0.97, 1.0, agreement=0.965),
    "minilm": Target(19.5, 21.0, DYNAMIC, 1.0, 1.2, drop=0.15, size=0.257, seconds=None),
}
#: cases with attention, where some tools are used in another way
TRANSFORMERS = {"minilm"}


class DemoCase:
    """The network and the digits that come with the package."""

    name = "demo"
    model = demo_model_path()

    def calibration(self, samples: int = 256, batch: int = 16) -> Iterator[Feeds]:
        """Batches of images."""
        images = demo_calibration()["input"][:samples]
        return ({"input": images[start : start + batch]} for start in range(0, len(images), batch))

    def evaluate(self, run: Callable[..., Any]) -> float:
        """Top-1 of ``run`` on images that are not among those to calibrate with."""
        data = demo_evaluation()
        return float((run({"input": data["input"]})["logits"].argmax(1) == data["labels"]).mean())


class Judge:
    """The original's metric and first output over the validation split, to hold other files against."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.metric, self._expected, self._feeds = self._evaluated(case.model)
        self.bytes = model_bytes(case.model)

    def _evaluated(self, model: Path) -> tuple[float, list[NDArray[Any]], list[Feeds]]:
        session = Session(model)
        outputs: list[NDArray[Any]] = []
        inputs: list[Feeds] = []

        def recording(feeds: Feeds) -> Mapping[str, Any]:
            found = session.run(feeds)
            outputs.append(np.asarray(next(iter(found.values()))))
            inputs.append(feeds)
            return found

        return self.case.evaluate(recording), outputs, inputs

    def judge(self, model: Path) -> dict[str, float | None]:
        """Metric, drop in points, SQNR in dB and agreement of a quantised file, as it is served."""
        metric, found, _ = self._evaluated(model)
        expected, actual = iter(self._expected), iter(found)
        output = oc.compare(
            lambda _: {"output": next(expected)},
            lambda _: {"output": next(actual)},
            [Batch({}, None, len(array)) for array in found],
        )[0]
        if not np.isfinite([metric, output.sqnr_db]).all():
            raise oc.OnnxCompressError(f"its outputs are not numbers: metric {metric}, SQNR {output.sqnr_db} dB")
        drop = 100 * (self.metric - metric)
        return {"metric": metric, "drop": drop, "sqnr_db": output.sqnr_db, "agreement": output.same_argmax}

    @cached_property
    def samples(self) -> list[Feeds]:
        """A few single samples from all over the validation split, to time models with."""
        chosen = np.linspace(0, len(self._feeds) - 1, TIMED).astype(int)
        positions = np.random.default_rng(0).random(TIMED)
        return [
            {name: array[(at := int(p * len(array))) : at + 1] for name, array in self._feeds[index].items()}
            for index, p in zip(chosen, positions, strict=True)
        ]


class Quantization(Bench):
    """The parts of this script: a case each, and what is measured apart."""

    PARTS = (*TARGETS, "observers", "x86-any", "demo")
    ON_REQUEST = ("demo",)

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """The tools to run, and where they are."""
        parser.add_argument(
            "--peer",
            type=_peer,
            action="append",
            default=[],
            metavar="NAME=PYTHON",
            help=f"the interpreter that has a peer installed; repeatable; {','.join(list(TOOLS)[2:])}",
        )
        parser.add_argument(
            "--tools",
            type=some_of(tuple(TOOLS), "tool"),
            default=None,
            metavar="NAME,...",
            help="run these only; default: ours, onnxruntime, and every --peer",
        )
        parser.add_argument(
            "--work",
            type=Path,
            metavar="FOLDER",
            help="keep the quantised files and what was measured of them there, and go on from it in a later run",
        )
        parser.add_argument("--no-times", action="store_true", help="leave the timing out, for a later run with --work")

    @cached_property
    def tools(self) -> dict[str, str]:
        """{tool: interpreter} of the tools to run."""
        known = interpreters(dict(self.options.peer))
        wanted = self.options.tools or tuple(known)
        missing = [tool for tool in wanted if tool not in known]
        if missing:
            raise SystemExit(f"where is {missing[0]}? give --peer {missing[0]}=PYTHON")
        return {tool: known[tool] for tool in TOOLS if tool in wanted}

    @cached_property
    def work(self) -> Path:
        """Where the quantised files go."""
        folder: Path = self.options.work or self.folder
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @cached_property
    def judges(self) -> dict[str, Judge]:
        """By case; filled as they are needed."""
        return {}

    def judge(self, name: str) -> Judge:
        """The judge of a case."""
        if name not in self.judges:
            self.judges.clear()  # one validation split in memory
            self.judges[name] = Judge(DemoCase() if name == "demo" else self.cases[name])
        return self.judges[name]

    # -- the parts ------------------------------------------------------------------------------------------------

    def part(self, name: str) -> None:
        """A case with all tools, or what is measured apart."""
        if name in TARGETS or name == "demo":
            self.case(name)
        else:
            {"observers": self.observers, "x86-any": self.x86_any}[name]()

    def case(self, name: str) -> None:
        """All tools on one case, and ours against its targets."""
        judge = self.judge(name)
        records = {}
        for tool, python in self.tools.items():
            for variant in variants(tool, transformer=name in TRANSFORMERS):
                record = self.measured(judge, tool, variant, python)
                records[record["label"]] = record
                say("     " + " | ".join(tool_cells(name, record)))
        self.details.setdefault("cases", {})[name] = {
            "fp32": {"metric": judge.metric, "bytes": judge.bytes},
            "tools": records,
        }
        if OURS.label in records:
            self.hold(name, records[OURS.label])

    def data(self, name: str, *, single: bool) -> Path:
        """Calibration samples: a folder with a file a batch, or a single file, which samples of one shape allow."""
        case = DemoCase() if name == "demo" else self.cases[name]
        samples = 32 if self.quick else SAMPLES
        path = self.work / f"{name}.{samples}{'.npz' if single else ''}"
        if not path.exists():
            batches = list(case.calibration(samples, BATCH))
            if single:
                save_samples(path, {key: np.concatenate([b[key] for b in batches]) for key in batches[0]})
            else:
                path.mkdir()
                for number, batch in enumerate(batches):
                    save_samples(path / f"{number:04d}.npz", batch)
        return path

    def measured(self, judge: Judge, tool: str, variant: Variant, python: str) -> dict[str, Any]:
        """One tool on one case: quantised, judged and timed; taken from the work folder as far as it is there."""
        name = judge.case.name
        output = self.file(name, variant)
        notes = output.with_suffix(".json")
        record: dict[str, Any] = {}
        if notes.is_file():
            record = json.loads(notes.read_text(encoding="utf-8"))
            if record["quick"] != self.quick or (tool == "onnxcompress" and record["revision"] != revision()):
                record = {}
        if not record:
            say(f"     {name}: {variant.label}")
            output.unlink(missing_ok=True)
            data = self.data(name, single=tool == "onnxcompress" and name not in TRANSFORMERS)
            options = ["--no-benchmark"] if self.quick else []
            found = quantise(tool, variant, python, judge.case.model, data, output, options)
            record = self.record(judge, found, output)
        if not record["failure"] and "fp32_over_this" not in record and not self.options.no_times:
            record |= self.times(judge, tool, output)
        notes.write_text(json.dumps(record, allow_nan=False), encoding="utf-8")
        return record

    def file(self, case: str, variant: Variant) -> Path:
        """Where the file that ``variant`` makes of ``case`` goes."""
        label = "".join(c if c.isalnum() else "-" for c in variant.label)
        return self.work / f"{case}.{label}.onnx"

    def record(self, judge: Judge, found: Quantised, output: Path) -> dict[str, Any]:
        """What is kept of a quantised file, the times excepted."""
        machine = describe_environment()
        record: dict[str, Any] = asdict(found) | {
            "date": machine["date"][:10],
            "cpu": machine["cpu"],
            "judged_by": machine["versions"]["onnxruntime"],
            "revision": revision(),
            "quick": self.quick,
            "size": found.bytes / judge.bytes,
        }
        if found.failure:
            return record
        try:
            return record | judge.judge(output)
        except Exception as error:  # whatever a peer's file makes of the runtime
            return record | {"failure": f"its file does not run: {type(error).__name__}: {error}"[:300]}

    def times(self, judge: Judge, tool: str, output: Path) -> dict[str, Any]:
        """The original's time over this file's."""
        own = tool == "onnxcompress"
        seconds = 1.0 if self.quick else 15.0 if own else 4.0
        return {"fp32_over_this": timing(oc.benchmark(judge.case.model, output, judge.samples, seconds=seconds))}

    def hold(self, name: str, record: Mapping[str, Any]) -> None:
        """Ours against the targets of the case."""
        target = TARGETS.get(name)
        if record["failure"]:
            self.add(name, name, "compress", 1, record["failure"], most=0, target="a result")
            return
        if target is None:
            return
        text = f"{record['sqnr_db']:.2f} dB"
        self.add(name, name, "SQNR", record["sqnr_db"], text, least=target.sqnr, aim=target.sqnr_aim)
        share = record["agreement"]
        self.add(name, name, "agreement", share, f"{share:.2%}", least=target.agreement)
        text = f"{record['metric']:.4f}, {record['drop']:.2f} points below fp32"
        self.add(name, name, "drop of the metric", record["drop"], text, most=target.drop)
        self.add(name, name, "size / fp32", record["size"], f"{record['size']:.4f}", most=target.size)
        text = f"{record['seconds']:.1f} s, peak {record['peak_gib']:.2f} GiB"
        self.add(name, name, "the whole command", record["seconds"], text, most=target.seconds)
        self.against_rival(name, target)

    def against_rival(self, name: str, target: Target) -> None:
        """The speed of ours against that of the best file of ONNX Runtime's quantiser, both measured in this run."""
        rival, own = self.file(name, target.rival), self.file(name, OURS)
        if self.options.no_times or not rival.is_file():
            return
        speed = oc.benchmark(rival, own, self.judge(name).samples, seconds=1.0 if self.quick else 15.0)
        self.details["cases"][name]["tools"][OURS.label]["rival_over_this"] = timing(speed)
        # A must of 1 means "not slower", and two equal files are not measured as exactly 1.
        value = max(speed.ratio, 1.0) if target.speed == 1.0 and speed.verdict == "SAME" else speed.ratio
        measure = f"speed, {target.rival.label} / ours"
        self.add(name, name, measure, value, interval(speed), least=target.speed, aim=target.speed_aim)

    def observers(self) -> None:
        """Time and peak memory of observers that need more than a minimum and a maximum, as whole processes."""
        name = "squeezenet1.1"
        model, data = self.cases[name].model, self.data(name, single=True)
        for observer in ("entropy", "mse"):
            command = [sys.executable, "-m", "onnxcompress", "insert-qdq", model, "--data", data]
            output = self.work / f"{name}.{observer}.onnx"
            run = measure_process([*command, "--observer", observer, "-o", output])
            if run.code != 0:
                self.add("observers", name, observer, 1, run.stderr.strip()[-300:], most=0, target="a result")
                continue
            gib = run.peak_mib / 1024
            self.add("observers", name, f"{observer}, peak", gib, f"{gib:.2f} GiB", most=1.0, target="<= 1 GiB")
            text = f"{run.seconds:.1f} s"
            self.add("observers", name, f"{observer}, time", run.seconds, text, most=6.0, target="<= 6 s")

    def x86_any(self) -> None:
        """The target ``x86-any`` beside ``cpu``: what its weights cost, and that no pair of products saturates."""
        for name in TARGETS:
            judge = self.judge(name)
            data = self.data(name, single=name not in TRANSFORMERS)
            cpu = self.details.get("cases", {}).get(name, {}).get("tools", {}).get(OURS.label, {}).get("sqnr_db")
            if cpu is None:
                cpu = self.own_sqnr(judge, data, "cpu")
            found = self.own_sqnr(judge, data, "x86-any")
            lost = cpu - found
            text = f"{lost:.2f} dB ({found:.2f} dB, cpu {cpu:.2f} dB)"
            self.add("x86-any", name, "SQNR below cpu", lost, text, most=0.5, target="<= 0.5 dB")
            pairs, weights = saturating_pairs(self.work / f"{name}.x86-any.onnx")
            text = f"{pairs} in {weights} weights"
            self.add("x86-any", name, "pairs of products that saturate", pairs, text, most=0, target="none")

    def own_sqnr(self, judge: Judge, data: Path, target: str) -> float:
        """The SQNR of the plain command's file for ``target``."""
        output = self.work / f"{judge.case.name}.{target}.onnx"
        found = quantise(
            *("onnxcompress", OURS, sys.executable, judge.case.model, data, output),
            ["--target", target, "--no-benchmark"],
        )
        if found.failure:
            raise SystemExit(f"compress --target {target} on {judge.case.name}: {found.failure}")
        sqnr = judge.judge(output)["sqnr_db"]
        assert sqnr is not None
        return sqnr

    # -- earlier runs, tables -------------------------------------------------------------------------------------

    @classmethod
    def merge(cls, earlier: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
        """``facts`` with what was not run taken from an ``earlier`` run, as far as that still holds.

        A peer's row is kept where it was judged on this machine by this version of ONNX Runtime: it does not depend on
        our commit, and says its own date. Ours is kept only at the same commit.
        """
        machine = facts["environment"]
        current = earlier["revision"] == facts["revision"] and earlier["quick"] == facts["quick"]

        def holds(record: Mapping[str, Any]) -> bool:
            same = record["cpu"] == machine["cpu"] and record["judged_by"] == machine["versions"]["onnxruntime"]
            own = record["tool"] == "onnxcompress" and record["revision"] != facts["revision"]
            return same and not own and record["quick"] == facts["quick"]

        cases = {}
        for name in cls.PARTS:
            old, new = (run["details"].get("cases", {}).get(name) for run in (earlier, facts))
            if old is None and new is None:
                continue
            kept = {label: r for label, r in (old or {"tools": {}})["tools"].items() if holds(r)}
            tools = kept | (new or {"tools": {}})["tools"]
            labels = [variant.label for tool in TOOLS.values() for variant in tool.variants]
            cases[name] = (new or old) | {"tools": {label: tools[label] for label in labels if label in tools}}
        ran = {row["part"] for row in facts["rows"]}
        rows = [row for row in earlier["rows"] if current and row["part"] not in ran] + facts["rows"]
        rows.sort(key=lambda row: cls.PARTS.index(row["part"]))
        load = earlier["load_1min"] if current else {}
        details = facts["details"] | {"cases": {name: case for name, case in cases.items() if case["tools"]}}
        return facts | {"rows": rows, "details": details, "load_1min": load | facts["load_1min"]}

    @classmethod
    def markdown(cls, facts: Mapping[str, Any]) -> str:
        """The figures as they stand in README.md: a line a case and tool, then the targets."""
        rows = [Row(**row) for row in facts["rows"]]
        cells = []
        for name, case in facts["details"].get("cases", {}).items():
            label = f"{name} ({case['fp32']['metric']:.4f})"
            cells += [tool_cells(label, record) for record in case["tools"].values()]
        head = ("case (fp32)", "tool", "metric", "drop, points", "SQNR, dB", "agreement", "time fp32 / this")
        results = table((*head, "seconds", "peak, GiB", "size / fp32", "date"), cells, aligned=False)
        parts = [measured_on(facts, "quantization.py"), NOTE, results, *other_rows(rows)]
        return "\n\n".join([*parts, target_summary(rows)])


NOTE = (
    "Metric, SQNR and agreement (same argmax as fp32): first output, whole validation split, as served. Time: one "
    "thread, batch 1, paired, 95 % interval. Seconds and peak: of the whole process, imports included; ours verifies "
    "its result and times it for ten seconds besides. pc: per channel."
)


def tool_cells(case: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of the table of tools."""
    tool = f"{record['label']} {record['version']}".strip()
    if record["failure"]:
        return (case, tool, f"fails: {record['failure']}".replace("|", "/"), *[""] * 7, record["date"])
    time = record.get("fp32_over_this")
    return (
        case,
        tool,
        f"{record['metric']:.4f}",
        f"{record['drop']:.2f}",
        f"{record['sqnr_db']:.1f}",
        f"{record['agreement']:.1%}",
        f"{time['ratio']:.2f} [{time['low']:.2f}, {time['high']:.2f}]" if time else "",
        f"{record['seconds']:.1f}",
        f"{record['peak_gib']:.2f}",
        f"{record['size']:.3f}",
        record["date"],
    )


def saturating_pairs(model: Path) -> tuple[int, int]:
    """(pairs of int8 weights whose products saturate when ``vpmaddubsw`` adds them, weights looked at) in a file.

    The instruction multiplies two uint8 activations with two int8 weights and adds both products in 16 bits. Which
    weights of an output channel meet is up to the kernel, so any two may: it is enough to look at neighbours in the
    order of size, of which the first and the last two are the worst of all pairs.
    """
    graph = onnx.load(model).graph
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    source = {node.output[0]: node for node in graph.node}
    consumers = [(node, node.input[1]) for node in graph.node if node.op_type in PRODUCTS]
    pairs = weights = 0
    for node, name in consumers:
        transposed = False
        while name in source and source[name].op_type in ("DequantizeLinear", "Transpose"):
            transposed ^= source[name].op_type == "Transpose"
            name = source[name].input[0]
        array = arrays.get(name)
        if array is None or array.dtype != np.int8:
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        channels = 0 if "Conv" in node.op_type or attributes.get("transB") else -1
        if transposed:
            array = np.swapaxes(array, -1, -2)
        pairs += _saturating(np.moveaxis(array, channels, 0).reshape(array.shape[channels], -1))
        weights += array.size
    return pairs, weights


def _saturating(rows: NDArray[np.int8]) -> int:
    """How many neighbours, in the order of size, saturate for some pair of activations; a row is a channel."""
    ordered = np.sort(rows.astype(np.int64), axis=1)
    worst = 255 * (ordered[:, :-1] + ordered[:, 1:])  # of one sign; with two signs one activation is 0 at the worst
    return int(((worst < INT16.min) | (worst > INT16.max)).sum())


def _peer(text: str) -> tuple[str, str]:
    """``NAME=PYTHON``."""
    name, _, python = text.partition("=")
    if name not in TOOLS or not python:
        raise argparse.ArgumentTypeError(f"{text!r}; expected NAME=PYTHON with a name of {','.join(list(TOOLS)[2:])}")
    if not Path(python).is_file():
        raise argparse.ArgumentTypeError(f"there is no {python}; expected the interpreter that has {name} installed")
    return name, str(Path(python).absolute())


if __name__ == "__main__":
    sys.exit(main(Quantization, "Measure INT8 beside every peer on real models and hold ours against its targets."))
