"""No time without right outputs: what a model answers on a runtime is held against the reference first.

The reference is ONNX Runtime's CPU provider with its optimisations off, which computes the graph as it is written. A
runtime must give what the same model gives there; a model must give about what the first model gives there.

Float32 models on runtimes that compute in float32 differ by the order of operations only. Integers and lower precisions
are rounded elsewhere on every runtime, so what is asked of them is what ``compress`` asks of a result without a metric:
that they compute the same thing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from onnxcompress.data import Batch
from onnxcompress.errors import AccuracyError
from onnxcompress.graph import Graph
from onnxcompress.session import Feeds
from onnxcompress.verify import LEAST_SQNR, OutputComparison, Run, compare

__all__ = ["check_model", "check_runtime", "compare_outputs", "is_reduced", "outputs_of", "worst_sqnr"]

#: relative L2 that the order of operations may cost a float32 model on another runtime
SAME_PRECISION = 1e-3
#: share of equal integers, e.g. classes, that is asked for: with float32, and otherwise
SAME_INTEGERS = (0.95, 0.5)

#: how the names of operators on 8-bit and smaller integers begin
_INTEGER_OPERATORS = (
    *("Quantize", "Dequantize", "DynamicQuantize", "QLinear", "QGemm", "QAttention", "QEmbed"),
    *("MatMulInteger", "ConvInteger", "MatMulNBits"),
)


def is_reduced(graph: Graph) -> bool:
    """True where a model computes with fewer bits than float32 by itself."""
    if any(node.op.startswith(_INTEGER_OPERATORS) for node in graph.nodes):
        return True
    return any(str(getattr(t, "dtype", "")) in ("float16", "bfloat16") for t in graph.tensors().values())


def outputs_of(run: Run, feeds: Sequence[Feeds]) -> list[Mapping[str, Any]]:
    """What ``run`` answers to each batch."""
    return [run(dict(batch)) for batch in feeds]


def compare_outputs(
    reference: Sequence[Mapping[str, Any]], candidate: Sequence[Mapping[str, Any]], feeds: Sequence[Feeds]
) -> tuple[OutputComparison, ...]:
    """Every output of ``candidate`` against ``reference``'s, both as :func:`outputs_of` gives them.

    Raises:
        ModelError: the outputs differ in number, shape or type.
    """
    expected, actual = iter(reference), iter(candidate)
    batches = [Batch(dict(batch), None, 1) for batch in feeds]
    return tuple(compare(lambda _: next(expected), lambda _: next(actual), batches))


def check_runtime(outputs: Sequence[OutputComparison], *, exact: bool, where: str) -> None:
    """Refuse a runtime that does not give what the reference gives for the same model.

    Args:
        outputs: its outputs against the reference's.
        exact: a float32 model, computed in float32.
        where: the runtime, for the message.

    Raises:
        AccuracyError: they differ by more than rounding explains.
    """
    for output in outputs:
        if output.equal_elements is not None:
            if output.equal_elements < SAME_INTEGERS[not exact]:
                raise AccuracyError(
                    f"{where}: output {output.name!r} is equal to the reference's in only "
                    f"{100 * output.equal_elements:.3g} % of its elements"
                )
        elif output.nonfinite_mismatches:
            raise AccuracyError(
                f"{where}: output {output.name!r} has NaN or infinity where the reference has not, or the other way "
                f"round, at {output.nonfinite_mismatches} places"
            )
        elif exact and not output.relative_l2 <= SAME_PRECISION:
            raise AccuracyError(
                f"{where}: output {output.name!r} is off by {output.relative_l2:.2g} of its size; the order of "
                f"float32 operations explains {SAME_PRECISION:g} at most"
            )
        elif not exact and not output.sqnr_db >= LEAST_SQNR:
            raise AccuracyError(
                f"{where}: output {output.name!r} has {output.sqnr_db:.1f} dB SQNR to what the same model gives on the "
                f"reference; {LEAST_SQNR:g} dB is the least"
            )


def check_model(outputs: Sequence[OutputComparison], *, model: str, first: str) -> None:
    """Refuse to time models side by side that do not compute the same thing.

    Only the first floating-point output decides, as for ``compress``: further ones may be for training.

    Raises:
        AccuracyError: that output has less than 10 dB SQNR.
    """
    output = next((o for o in outputs if o.equal_elements is None), None)
    if output is not None and not output.sqnr_db >= LEAST_SQNR:
        raise AccuracyError(
            f"{model} does not compute what {first} computes: output {output.name!r} has {output.sqnr_db:.1f} dB SQNR, "
            f"{LEAST_SQNR:g} dB is the least"
        )


def worst_sqnr(outputs: Sequence[OutputComparison]) -> float | None:
    """The SQNR in dB of the first floating-point output, infinite where it is equal; None where there is none."""
    found = next((o.sqnr_db for o in outputs if o.equal_elements is None), None)
    return None if found is None or math.isnan(found) else found
