"""Static INT8: QuantizeLinear and DequantizeLinear where the target's runtime turns them into integer operators.

::

    x -> Conv -> Relu -> y        x -> Q -> DQ -> Conv(DQ(w_int8)) -> Relu -> Q -> DQ -> y
                                                  └──────── one QLinearConv ───────┘

Where quantisers go is decided by :mod:`onnxcompress.quantization.placement` from the target's rule table, ranges come
from :mod:`onnxcompress.quantization.calibration`, and the result is proven by :mod:`onnxcompress.quantization.audit`:
the runtime optimises the graph, and what did not become integer as planned is stripped and reported.

Source: ONNX operator specification of QuantizeLinear; B. Jacob et al., "Quantization and Training of Neural Networks
for Efficient Integer-Arithmetic-Only Inference", CVPR 2018.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, FiniteFloat, field_validator

from onnxcompress.base import Change, Context, Decision, Detail, Guarantee, Pass, Refusal
from onnxcompress.destination import checked_destination
from onnxcompress.environment import saturation_note
from onnxcompress.errors import DataError, ModelError, UsageError
from onnxcompress.graph import Graph, copy_graph, normal_domain, replace_contents, sort_nodes
from onnxcompress.opset import raise_opset
from onnxcompress.quantization.affine import Range
from onnxcompress.quantization.audit import FusionAudit, audit
from onnxcompress.quantization.calibration import calibrate, observe, range_of
from onnxcompress.quantization.calibration_cache import CalibrationKey, graph_sha256, read_ranges, write_ranges
from onnxcompress.quantization.canonical import to_canonical_form
from onnxcompress.quantization.input_levels import align_inputs, find_pictures
from onnxcompress.quantization.observers import CLIPPING_WEIGHT, PEAK_CLIPPING_WEIGHT, UINT8, WeightedMseObserver
from onnxcompress.quantization.placement import Placement, place, why
from onnxcompress.quantization.qdq import insert_quantizers
from onnxcompress.quantization.range_search import (
    RangeSearch,
    at_rung,
    default_evaluations,
    ladder,
    search_ranges,
    set_apart,
)
from onnxcompress.quantization.variants import Variants
from onnxcompress.shapes import TensorType, infer_shapes, node_macs
from onnxcompress.targets import Target, get_target

if TYPE_CHECKING:
    from onnxcompress.data import Dataset

__all__ = ["InsertQdq"]

_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


class InsertQdq(Pass):
    """Quantise activations and weights to 8 bits, calibrated on data."""

    name: ClassVar[str] = "insert_qdq"
    file_options: ClassVar[frozenset[str]] = frozenset({"calibration_cache"})

    observer: Literal["min_max", "percentile", "entropy", "mse", "weighted_mse", "auto"] = Field(
        "min_max", description="How ranges are found from calibration data; auto judges them by the model's outputs"
    )
    percentile: float = Field(
        99.99, ge=50, le=100, description="Percent of the values that observer percentile keeps, cut on both sides"
    )
    ranges: dict[str, tuple[FiniteFloat, FiniteFloat]] = Field(
        {}, description="Ranges [low, high] by tensor that are taken as they are, instead of observed ones"
    )
    search_evaluations: int | None = Field(
        None, ge=2, description="Candidates that observer auto runs at most; default: by the size of the model"
    )
    calibration_cache: Path | None = Field(
        None, description="JSON file that keeps the ranges for the next run on the same model and data"
    )
    weight_range: Literal["max", "mse"] = Field(
        "max", description="Weights keep their largest value (max) or the smallest mean squared error (mse)"
    )
    align_inputs: bool = Field(
        True,
        description="Put the scale of an image input onto the levels that its pixels come in",
    )
    exclude_nodes: tuple[str, ...] = Field((), description="Node names that stay float; * and ? match as in a shell")
    exclude_operators: tuple[str, ...] = Field((), description="Operator types that stay float, such as Gemm")
    audit: bool = Field(True, description="Check on the optimised graph what became integer, and strip what did not")

    @field_validator("ranges")
    @classmethod
    def _ordered(cls, ranges: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        for name, (low, high) in ranges.items():
            if low > high:
                raise ValueError(f"the range of {name!r} ends at {high}, below its start {low}")
        return ranges

    @property
    def guarantee(self) -> Guarantee:
        """Rounds to 256 levels: judged by the task metric."""
        return Guarantee.APPROXIMATE

    @property
    def needs_data(self) -> bool:
        """Ranges come from samples."""
        return True

    def requires(self, graph: Graph, context: Context) -> None:
        """The target must be known, and a cache must be writable."""
        get_target(context.target)
        if self.calibration_cache is not None:
            checked_destination(self.calibration_cache, {})

    def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal | Decision | Detail]:
        """Place, calibrate, write, audit; strip what the runtime did not make integer, and audit once more."""
        target = get_target(context.target)
        _warn_of_quantizers(graph if context.original is None else context.original, context)
        candidates = _has_candidates(graph, target)
        if candidates and graph.opset > target.maximum_opset:
            raise ModelError(
                f"the model has opset {graph.opset}, whose QuantizeLinear no runtime of target {target.name} has; "
                f"export it with opset {target.maximum_opset} at most"
            )
        if candidates and graph.opset < target.minimum_opset:
            before = graph.opset
            raise_opset(graph, target.minimum_opset)
            yield Change("opset", "", f"raised from {before} to {graph.opset}: per-channel weights need it")
        for node, detail in to_canonical_form(graph, infer_shapes(graph)):
            yield Change("rewritten", node.name, detail)
        sort_nodes(graph)
        pixels, inserted = yield from self._align(graph, target, context)
        sort_nodes(graph)

        prepared = copy_graph(graph)
        assert context.data is not None
        sizes = infer_shapes(prepared, context.data.sample_shapes())
        placement = self._place(prepared, target, inserted, sizes=sizes)
        ranges = yield from self._ranges(prepared, placement, target, pixels, inserted, context)
        _warn_of_empty_inputs(prepared, ranges, context)
        changes = _write(prepared, placement, ranges, self.weight_range)
        stripped: dict[str, str] = {}
        if self.audit and target.audited:
            proof = audit(prepared, target, placement)
            if proof.mismatches:
                stripped = {m.node: m.found for m in proof.mismatches}
                prepared = copy_graph(graph)
                placement = self._place(prepared, target, (*inserted, *stripped), sizes=sizes)
                missing = [s for s in _sources(placement) if s not in ranges]
                ranges |= self._calibrate(copy_graph(graph), placement, missing, context)
                changes = _write(prepared, placement, ranges, self.weight_range)
                proof = audit(prepared, target, placement)
            yield Detail("audit", _with_inserted(proof, inserted).to_dict())
            _warn_about(proof, context)
        context.reference = copy_graph(graph)
        context.variants = self._variants(context.reference, placement, ranges, (*inserted, *stripped))
        replace_contents(graph, prepared)
        _warn_of_the_target(placement, context)

        yield from changes
        for unit in placement.units:
            if not unit.integer and unit.node.name not in inserted:
                found = stripped.get(unit.node.name)
                reason = why(unit) if found is None else f"the runtime did not make it integer (it became {found})"
                yield Refusal(unit.node.name, f"{unit.node.op} stays float: {reason}")
        if self.observer == "auto" and _sources(placement):
            # A replay takes what was found, and searches nothing.
            searched = [name for name in _sources(placement) if name not in pixels]
            yield Decision("ranges", {name: [ranges[name].low, ranges[name].high] for name in searched})
        if stripped:
            yield Decision("exclude_nodes", [*self.exclude_nodes, *stripped])

    def _variants(
        self, graph: Graph, placement: Placement, ranges: Mapping[str, Range], stripped: tuple[str, ...]
    ) -> Variants:
        return Variants(
            graph,
            placement.target,
            (*self.exclude_nodes, *stripped),
            self.exclude_operators,
            ranges,
            placement.types,
            placement.sizes,
            self.weight_range,
        )

    def _place(
        self,
        graph: Graph,
        target: Target,
        left: tuple[str, ...],
        types: Mapping[str, TensorType] | None = None,
        sizes: Mapping[str, TensorType] | None = None,
    ) -> Placement:
        return place(
            graph,
            target,
            exclude_nodes=(*self.exclude_nodes, *left),
            exclude_operators=self.exclude_operators,
            types=types,
            sizes=sizes,
        )

    def _align(
        self, graph: Graph, target: Target, context: Context
    ) -> Generator[Change | Detail, None, tuple[dict[str, Range], tuple[str, ...]]]:
        """Ranges of the image inputs that are on the levels of their pixels now, and nodes that were inserted."""
        ranges: dict[str, Range] = {}
        inserted: list[str] = []
        if not self.align_inputs or not target.audited or target.activations != UINT8 or context.data is None:
            return ranges, ()  # other runtimes fuse operators around the quantisers in ways of their own
        pictures = find_pictures(graph)
        if pictures:
            placed = self._place(graph, target, ())
            alone = {sources[0] for sources in placed.sources.values() if len(sources) == 1} - set(self.ranges)
            pictures = [picture for picture in pictures if picture.tensor.name in alone]
        for found in align_inputs(graph, pictures, context.data, threads=context.threads):
            if found.range is None:
                yield Detail("input_levels", {found.tensor: found.detail})
            else:
                ranges[found.tensor] = found.range
                inserted.extend(found.nodes)
                yield Change("aligned", found.picture.readers[0].name, f"{found.picture.tensor.name}: {found.detail}")
        return ranges, tuple(inserted)

    def _ranges(
        self,
        graph: Graph,
        placement: Placement,
        target: Target,
        pixels: Mapping[str, Range],
        inserted: tuple[str, ...],
        context: Context,
    ) -> Generator[Detail, None, dict[str, Range]]:
        """The range of every source: given, of pixels, from the cache, or from the data."""
        ranges = self._given(graph, placement) | {name: pixels[name] for name in _sources(placement) if name in pixels}
        wanted = _sources(placement)
        if all(name in ranges for name in wanted):
            return ranges
        assert context.data is not None
        key = None
        if self.calibration_cache is not None:
            key = self._key(graph, context)
            cached = _cached(self.calibration_cache, key, context)
            if all(name in ranges or name in cached for name in wanted):
                return cached | ranges
        missing = [name for name in wanted if name not in ranges]
        if self.observer == "auto":
            found = yield from self._search(graph, placement, target, ranges, inserted, context)
        else:
            found = self._calibrate(graph, placement, missing, context)
        if self.calibration_cache is not None and key is not None:
            write_ranges(self.calibration_cache, key, found)
        return found | ranges

    def _given(self, graph: Graph, placement: Placement) -> dict[str, Range]:
        """The option ``ranges``; tensors that are not quantised (any more) need none and are passed over."""
        known = set() if not self.ranges else set(graph.tensors())
        sources = set(_sources(placement))
        given = {}
        for name, (low, high) in self.ranges.items():
            if name not in known:
                raise UsageError(
                    f"ranges: tensor {name!r} is not in the graph; expected the name of one of its tensors"
                )
            if name not in sources and name in placement.classes:
                others = ", ".join(repr(s) for s in placement.sources[placement.classes[name]])
                raise UsageError(f"ranges: tensor {name!r} shares the range of {others}; give a range for that instead")
            if name in sources:
                given[name] = Range(low, high)
        return given

    def _key(self, graph: Graph, context: Context) -> CalibrationKey | None:
        assert context.data is not None
        model = graph_sha256(graph)
        if model is None:
            context.warn("the model is above 2 GiB, so its ranges were not kept in the calibration cache")
            return None
        observer: dict[str, Any] = {"name": self.observer, "target": context.target}
        if self.observer == "percentile":
            observer["percentile"] = self.percentile
        if self.observer == "auto":
            options = {"search_evaluations", "weight_range", "exclude_nodes", "exclude_operators", "ranges"}
            observer |= {"seed": context.seed} | self.model_dump(mode="json", include=options)
        return CalibrationKey(model, context.data.fingerprint(), observer)

    def _calibrate(self, graph: Graph, placement: Placement, tensors: list[str], context: Context) -> dict[str, Range]:
        assert context.data is not None
        return calibrate(
            graph,
            tensors,
            context.data,
            "weighted_mse" if self.observer == "auto" else self.observer,
            shared=placement.sources.values(),
            scheme=placement.target.activations,
            percentile=self.percentile,
            peaks=placement.peaks(),
            threads=context.threads,
            progress=context.progress,
        )

    def _search(
        self,
        graph: Graph,
        placement: Placement,
        target: Target,
        given: Mapping[str, Range],
        inserted: tuple[str, ...],
        context: Context,
    ) -> Generator[Detail, None, dict[str, Range]]:
        """Ranges for all sources but ``given``, judged by the outputs."""
        assert context.data is not None
        open_classes = {
            name: [s for s in sources if s not in given]
            for name, sources in placement.sources.items()
            if any(s not in given for s in sources)
        }
        peaks = placement.peaks()
        observers = {
            name: WeightedMseObserver(
                target.activations, PEAK_CLIPPING_WEIGHT if peaks & set(sources) else CLIPPING_WEIGHT
            )
            for name, sources in open_classes.items()
        }
        watchers = {s: observers[name] for name, sources in open_classes.items() for s in sources}

        def see(data: Dataset) -> None:
            observe(graph, watchers, data, threads=context.threads, progress=context.progress)
            for name, watching in observers.items():
                range_of(open_classes[name][0], watching.min_max())

        try:
            rest, judging = set_apart(context.data, context.seed)
        except DataError as error:
            see(context.data)
            context.warn(f"{error}; taken instead: the observer weighted_mse")
            return {s: observers[name].range() for name, sources in open_classes.items() for s in sources}
        see(rest)
        rungs = {name: ladder(watching) for name, watching in observers.items()}

        def spread(ranges: Mapping[str, Range]) -> dict[str, Range]:
            return {s: ranges[name] for name, sources in open_classes.items() for s in sources}

        def written(ranges: Mapping[str, Range]) -> Graph:
            candidate = copy_graph(graph)
            _write(
                candidate,
                self._place(candidate, target, inserted, placement.types, placement.sizes),
                {**given, **spread(ranges)},
                self.weight_range,
            )
            return candidate

        evaluations = self.search_evaluations
        if evaluations is None:
            evaluations = default_evaluations(sum(node_macs(graph, placement.sizes).values()))
        refused: DataError | None = None
        try:
            found: RangeSearch = search_ranges(
                graph,
                written,
                rungs,
                judging,
                evaluations=evaluations,
                seed=context.seed,
                threads=context.threads,
                progress=context.progress,
            )
        except DataError as error:
            refused = error
        see(judging)  # what was judged by counts for the ranges as well
        if refused is not None:
            context.warn(f"{refused}; taken instead: the observer weighted_mse")
            return spread({name: watching.range() for name, watching in observers.items()})
        yield Detail("range_search", found.to_dict())
        return spread({name: at_rung(watching, found.clipping[name]) for name, watching in observers.items()})


def _with_inserted(proof: FusionAudit, inserted: Collection[str]) -> FusionAudit:
    """``proof`` with the reason of what this pass inserted itself, which nobody excluded."""
    reason = "it puts the input onto the levels of its pixels"
    floats = (replace(found, reason=reason) if found.node in inserted else found for found in proof.floats)
    return replace(proof, floats=tuple(floats))


def _sources(placement: Placement) -> list[str]:
    return [name for names in placement.sources.values() for name in names]


def _cached(path: Path, key: CalibrationKey | None, context: Context) -> dict[str, Range]:
    """The ranges in the cache; none where it does not exist or was made from something else."""
    held = read_ranges(path)
    if held is None or key is None:
        return {}
    difference = key.difference(held[0])
    if difference is not None:
        context.warn(f"{path}: the calibration cache was made from {difference}; calibrated anew, and replaced")
        return {}
    return held[1]


def _has_candidates(graph: Graph, target: Target) -> bool:
    return any(node.op in target.rules for node in graph.nodes)


def _write(
    graph: Graph, placement: Placement, ranges: Mapping[str, Range], weight_range: Literal["max", "mse"]
) -> list[Change]:
    written = insert_quantizers(graph, placement, ranges, weight_range=weight_range)
    changes = [Change("quantised", node.name, detail) for node, detail in written]
    sort_nodes(graph)
    return changes


def _warn_about(proof: FusionAudit, context: Context) -> None:
    if proof.mismatches:
        names = ", ".join(m.node for m in proof.mismatches[:5])
        context.warn(f"{len(proof.mismatches)} nodes did not become integer as planned: {names}")


def _warn_of_empty_inputs(graph: Graph, ranges: Mapping[str, Range], context: Context) -> None:
    """Arrays that were never filled calibrate without an error."""
    for tensor in graph.inputs:
        found = ranges.get(tensor.name)
        if found is not None and found.low == found.high == 0.0:
            context.warn(f"all values of input {tensor.name!r} in the data are 0: the ranges are no real sample's")


def _warn_of_quantizers(graph: Graph, context: Context) -> None:
    """A file that was quantised before gains nothing from a second time."""
    count = sum(node.op in _QUANTIZERS and normal_domain(node) == "" for node in graph.nodes)
    if count:
        context.warn(
            f"the model is quantised already ({count} QuantizeLinear or DequantizeLinear nodes), and what they touch "
            "stays as it is; give the float model to quantise it anew"
        )


def _warn_of_the_target(placement: Placement, context: Context) -> None:
    """What the target's table says about INT8, and that int8 weights times uint8 activations saturate without VNNI."""
    target = placement.target
    if target.int8_note is not None:
        context.warn(target.int8_note)
    weights = any(unit.rule is not None and unit.rule.weight is not None for unit in placement.integer_units)
    if weights and target.saturates:
        context.warn(saturation_note())
