"""Results of finished passes, so that only what comes after them runs when the end of a recipe changes.

A stage is what is there after a pass: the graph, what the passes up to it reported, what they removed and what they
left in the context. Its key follows from everything that it was made from: the contents of the model and of the
teacher (external data included), the passes up to it with all their options and the files that these name, the
fingerprint and the batches of the data, target, seed, threads, versions, this package's own sources and the processor,
on which timed decisions depend. A recipe whose options are what an earlier run decided finds the stages of that run.

On disk a stage is a folder, put in its place by one rename::

    <work folder>/stages/<key>/stage.txt       a checksum, and JSON: reports, kept positions, digests of the models
    <work folder>/stages/<key>/model.onnx      and reference.onnx where there is one, with external data if need be
    <work folder>/stages/<key>.same            the key of the stage that this one is

What is damaged, half-written or from elsewhere is not used: it is told, removed and made again. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx

from onnxcompress.atomic import write_file
from onnxcompress.base import Change, Context, Pass, PassReport, Refusal
from onnxcompress.environment import package_versions, processor
from onnxcompress.errors import OnnxCompressError, UsageError
from onnxcompress.graph import Graph, model_info, walk_graphs
from onnxcompress.io import content_sha256, load, save
from onnxcompress.kept import Kept, read_kept, write_kept
from onnxcompress.quantization.affine import Range
from onnxcompress.quantization.variants import Variants
from onnxcompress.shapes import GraphStats, TensorType
from onnxcompress.targets import get_target

__all__ = ["Stage", "StageRun", "Stages", "open_stages"]

_FORMAT = "onnxcompress stage 1"
#: seconds that a pass takes from which its result is held in memory
_COSTLY = 2.0


@dataclass(frozen=True)
class Stage:
    """What is there after some passes: the graph, their reports in order, and what they left in the context."""

    graph: Graph
    reports: tuple[PassReport, ...]
    kept: Kept
    reference: Graph | None = None
    variants: Variants | None = None


class _Store(Protocol):
    """Where stages are kept, by key."""

    def base(self, graph: Graph, context: Context) -> str:
        """The key of the graph before any pass."""
        ...

    def find(self, key: str, graph: Graph, context: Context) -> Stage | None:
        """The stage, or None where there is none that can be used."""
        ...

    def keep(self, keys: Sequence[str], stage: Stage, context: Context) -> None:
        """Keep a stage under several keys."""
        ...


@dataclass(frozen=True)
class Stages:
    """Keeps what passes make. ``pipeline`` asks it before it runs them."""

    store: _Store

    def start(self, passes: Sequence[Pass], graph: Graph, context: Context, unseen: Sequence[int]) -> StageRun:
        """The stages of one run of ``passes`` on ``graph``; ``unseen`` counts samples that are kept from each pass."""
        return StageRun(self.store, passes, graph, context, unseen)


def open_stages(folder: str | os.PathLike[str] | None = None) -> Stages:
    """Stages in ``folder``, which is made where it is missing; None: in memory, costly ones only.

    Raises:
        UsageError: it is no folder, or cannot be written to.
    """
    if folder is None:
        return Stages(_Memory())
    path = Path(folder)
    try:
        (path / "stages").mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path}: cannot be a work folder: {reason}; name another one") from error
    if not os.access(path / "stages", os.W_OK):
        raise UsageError(f"{path}: the work folder cannot be written to; name another one")
    return Stages(_Folder(path / "stages"))


class StageRun:
    """The stages of one run: which there are, and those that the run adds."""

    def __init__(
        self, store: _Store, passes: Sequence[Pass], graph: Graph, context: Context, unseen: Sequence[int]
    ) -> None:
        self._store, self._passes, self._graph, self._context = store, passes, graph, context
        self._unseen = unseen
        base = store.base(graph, context)
        self._keys = list(_chain(base, passes, unseen))
        #: the same with what was decided as options
        self._decided = base

    def finished(self) -> Stage | None:
        """The last stage that there is; its warnings, reference and variants are those of the context afterwards."""
        for number in range(len(self._passes), 0, -1):
            stage = self._store.find(self._keys[number - 1], self._graph, self._context)
            if stage is None or len(stage.reports) != number:
                continue
            steps = zip(self._passes, stage.reports, strict=False)
            reports = tuple(replace(report, options=_options(step)) for step, report in steps)
            for position, report in enumerate(reports):
                self._advance(position, report)
                for warning in report.warnings:
                    self._context.warn(warning)
            self._context.reference, self._context.variants = stage.reference, stage.variants
            return replace(stage, reports=reports)
        return None

    def keep(self, graph: Graph, reports: Sequence[PassReport], kept: Kept) -> None:
        """Keep what is there after the pass that made the last report."""
        number = len(reports)
        self._advance(number - 1, reports[-1])
        keys = dict.fromkeys((self._keys[number - 1], self._decided))
        stage = Stage(graph, tuple(reports), kept, self._context.reference, self._context.variants)
        self._store.keep(list(keys), stage, self._context)

    def _advance(self, position: int, report: PassReport) -> None:
        step = self._passes[position]
        if report.decisions:
            step = type(step).model_validate({**_options(step), **report.decisions})
        self._decided = next(_chain(self._decided, (step,), self._unseen[position : position + 1]))


def _options(step: Pass) -> dict[str, Any]:
    return step.model_dump(mode="json", exclude_defaults=True)


def _chain(base: str, passes: Sequence[Pass], unseen: Sequence[int]) -> Iterator[str]:
    """The key after each of ``passes``."""
    for step, held in zip(passes, unseen, strict=True):
        base = _sha256([base, _described(step), held])
        yield base


def _described(step: Pass) -> list[Any]:
    """A pass as plain data: its name, all options, and what else its result depends on."""
    inner = [_described(child) for child in getattr(step, "passes", ())]
    options = step.model_dump(mode="json", exclude={"passes"} if inner else None)
    return [step.name, options, step.depends_on(), inner]


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---- in memory ---------------------------------------------------------------------------------------------------


@dataclass
class _Memory:
    """Stages of this process; a graph and data are the same where they are the same objects."""

    _stages: dict[str, Stage] = field(default_factory=dict)
    #: held, so that no other object takes their place
    _seen: list[tuple[Any, ...]] = field(default_factory=list)

    def base(self, graph: Graph, context: Context) -> str:
        """The key of the graph before any pass."""
        own = (graph, context.original, context.data)
        same = [i for i, seen in enumerate(self._seen) if all(a is b for a, b in zip(own, seen, strict=True))]
        if not same:
            self._seen.append(own)
        number = same[0] if same else len(self._seen) - 1
        return _sha256([number, context.target, context.seed, context.threads])

    def find(self, key: str, graph: Graph, context: Context) -> Stage | None:
        """The stage, where it was worth to be kept."""
        return self._stages.get(key)

    def keep(self, keys: Sequence[str], stage: Stage, context: Context) -> None:
        """Keep what took long to make."""
        if stage.reports[-1].seconds >= _COSTLY:
            self._stages |= dict.fromkeys(keys, stage)


# ---- on disk -----------------------------------------------------------------------------------------------------


class _DamagedError(Exception):
    """A stage that cannot be used."""


@dataclass
class _Folder:
    """Stages in a folder, for later runs."""

    path: Path
    #: stages that this process made itself
    _own: set[str] = field(default_factory=set)

    def base(self, graph: Graph, context: Context) -> str:
        """The key of the graph before any pass."""
        data = context.data
        original = context.original
        about = {
            "format": _FORMAT,
            "model": content_sha256(graph),
            "source": model_info(graph).source_sha256,
            "teacher": None if original is None or original is graph else content_sha256(original),
            "data": None if data is None else [data.fingerprint(), data.samples, data.batch, len(data)],
            "context": [context.target, context.seed, context.threads, os.environ.get("OMP_NUM_THREADS")],
            "versions": package_versions(),
            "sources": _sources_sha256(),
            "processor": processor(),
        }
        return _sha256(about)

    def find(self, key: str, graph: Graph, context: Context) -> Stage | None:
        """The stage, read and checked; one that is damaged is removed."""
        link = self.path / f"{key}.same"
        try:
            if not (self.path / key).is_dir():
                if not link.is_file():
                    return None
                key = _checked_key(link.read_text(encoding="utf-8"))
                if not (self.path / key).is_dir():
                    return None
            stage = _read(self.path / key, key, graph)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OnnxCompressError, _DamagedError) as error:
            context.warn(
                f"{self.path / key}: the stage is damaged and was made again ({' '.join(str(error).split())[:120]})"
            )
            shutil.rmtree(self.path / key, ignore_errors=True)
            with suppress(OSError):
                link.unlink(missing_ok=True)
            return None
        if key not in self._own:
            stage = replace(stage, reports=tuple(replace(report, reused=True) for report in stage.reports))
        return stage

    def keep(self, keys: Sequence[str], stage: Stage, context: Context) -> None:
        """Write a stage; where that fails the run goes on."""
        if os.environ.get("RANK", "0") != "0":  # of the processes that torchrun started, one writes
            return
        key, *others = keys
        try:
            if not (self.path / key).is_dir():
                with tempfile.TemporaryDirectory(prefix=".new-", dir=self.path) as temporary:
                    made = Path(temporary) / "stage"
                    made.mkdir()
                    _write(made, key, stage)
                    try:
                        made.rename(self.path / key)
                    except OSError:
                        if not (self.path / key).is_dir():  # no other process was faster
                            raise
            for other in others:
                write_file(self.path / f"{other}.same", key.encode())
        except (OSError, OnnxCompressError) as error:
            reason = getattr(error, "strerror", None) or error
            context.warn(f"{self.path}: what {stage.reports[-1].name} made was not kept: {reason}")
            return
        self._own.add(key)


def _checked_key(text: str) -> str:
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise _DamagedError("its name of another stage is none")
    return text


@cache
def _sources_sha256() -> str:
    """Of this package's own code: what another version of it made is not reused."""
    digest = hashlib.sha256()
    spec = find_spec("onnxcompress.passes")
    passes = spec.submodule_search_locations if spec is not None else None
    for folder in (Path(__file__).parent, *map(Path, passes or ())):
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{file.relative_to(folder)}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _write(folder: Path, key: str, stage: Stage) -> None:
    models = {"model": _write_model(stage.graph, folder / "model.onnx")}
    if stage.reference is not None:
        models["reference"] = _write_model(stage.reference, folder / "reference.onnx")
    content = {
        "format": _FORMAT,
        "key": key,
        "models": models,
        "reports": [asdict(report) for report in stage.reports],
        "kept": write_kept(stage.kept),
        "variants": None if stage.variants is None else _variants_data(stage.variants),
    }
    text = json.dumps(content, default=_plain)
    write_file(folder / "stage.txt", f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}".encode())


def _write_model(graph: Graph, path: Path) -> dict[str, Any]:
    """Write a model; its digest, and the order of initializers that it came with, which exporting goes by."""
    orders = [list(model_info(part).initializer_order) for part in walk_graphs(graph)]
    return {"sha256": save(graph, path).sha256, "orders": orders}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise OnnxCompressError(f"a report holds a {type(value).__name__}, which is no plain data; please report this")


def _read(folder: Path, key: str, graph: Graph) -> Stage:
    digest, _, text = (folder / "stage.txt").read_text(encoding="utf-8").partition("\n")
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise _DamagedError("its checksum is another")
    content = json.loads(text)
    if content["format"] != _FORMAT or content["key"] != key:
        raise _DamagedError("it is another stage")
    models = content["models"]
    made = _read_model(folder / "model.onnx", models["model"], graph)
    reference = _read_model(folder / "reference.onnx", models["reference"], graph) if "reference" in models else None
    variants = None
    if content["variants"] is not None:
        if reference is None:
            raise _DamagedError("it lacks the graph that was quantised")
        variants = _variants_of(content["variants"], reference)
    return Stage(made, tuple(_report(r) for r in content["reports"]), read_kept(content["kept"]), reference, variants)


def _read_model(path: Path, about: Mapping[str, Any], source: Graph) -> Graph:
    """A model of a stage, as if it had come from the file that ``source`` came from."""
    graph = load(path)
    info, own = model_info(graph), model_info(source)
    if info.source_sha256 != about["sha256"]:
        raise _DamagedError(f"{path.name} is not what was written")
    for part, order in zip(walk_graphs(graph), about["orders"], strict=True):
        model_info(part).initializer_order = tuple(order)
    info.source_sha256, info.external_data, info.files = own.source_sha256, own.external_data, own.files
    info.keepsake = own.keepsake  # passes share it, and the order of declarations follows it
    return graph


def _report(data: Mapping[str, Any]) -> PassReport:
    return PassReport(
        **{
            **data,
            "changes": tuple(Change(**item) for item in data["changes"]),
            "refusals": tuple(Refusal(**item) for item in data["refusals"]),
            "before": GraphStats(**data["before"]),
            "after": GraphStats(**data["after"]),
            "warnings": tuple(data["warnings"]),
            "children": tuple(_report(child) for child in data["children"]),
        }
    )


def _variants_data(variants: Variants) -> dict[str, Any]:
    return {
        "target": variants.target.name,
        "exclude_nodes": list(variants.exclude_nodes),
        "exclude_operators": list(variants.exclude_operators),
        "ranges": {name: [found.low, found.high] for name, found in variants.ranges.items()},
        "types": _types_data(variants.types),
        "sizes": _types_data(variants.sizes),
        "weight_range": variants.weight_range,
    }


def _variants_of(data: Mapping[str, Any], graph: Graph) -> Variants:
    return Variants(
        graph,
        get_target(data["target"]),
        tuple(data["exclude_nodes"]),
        tuple(data["exclude_operators"]),
        {name: Range(low, high) for name, (low, high) in data["ranges"].items()},
        _types_of(data["types"]),
        _types_of(data["sizes"]),
        data["weight_range"],
    )


def _types_data(types: Mapping[str, TensorType]) -> dict[str, Any]:
    return {name: [_type_number(t.dtype), None if t.shape is None else list(t.shape)] for name, t in types.items()}


def _types_of(data: Mapping[str, Any]) -> dict[str, TensorType]:
    return {
        name: TensorType(_type_of(number), None if shape is None else tuple(shape))
        for name, (number, shape) in data.items()
    }


def _type_number(dtype: np.dtype[Any] | None) -> int:
    return 0 if dtype is None else int(onnx.helper.np_dtype_to_tensor_dtype(dtype))


def _type_of(number: int) -> np.dtype[Any] | None:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(number)) if number else None
