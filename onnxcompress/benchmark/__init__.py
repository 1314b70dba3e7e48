"""Time models so that the answer can be trusted: two against each other, or many on many runtimes.

- :mod:`~onnxcompress.benchmark.pairs`: the comparison of two, from which everything else is made
- :mod:`~onnxcompress.benchmark.runners`: a model on a runtime, in this process or in one of its own
- :mod:`~onnxcompress.benchmark.worker`: the program of such a process
- :mod:`~onnxcompress.benchmark.gate`: no time without right outputs
- :mod:`~onnxcompress.benchmark.extras`: cold start, peak memory, throughput
- :mod:`~onnxcompress.benchmark.matrix`: all models on all runtimes, and what of it goes into a report
"""

from __future__ import annotations

from onnxcompress.benchmark.matrix import MatrixResult, benchmark_models, trace_model
from onnxcompress.benchmark.pairs import BenchmarkResult, Model, ModelTiming, benchmark

__all__ = ["BenchmarkResult", "MatrixResult", "Model", "ModelTiming", "benchmark", "benchmark_models", "trace_model"]
