"""Calibration and evaluation data: from files, folders, functions and Python objects to batches that fit a model.

::

    data = open_data("samples.npz", input_specs(graph))
    rest, held_out = data.split(0.1, seed=0)
    for batch in rest.rebatch(32):
        session.run(batch.feeds)

Everything streams: memory does not grow with the number of samples. Nothing is ever unpickled.
"""

from __future__ import annotations

from onnxcompress.data.dataset import Batch, Dataset
from onnxcompress.data.images import Preprocess
from onnxcompress.data.sources import open_data
from onnxcompress.data.synthetic import synthetic_data

__all__ = ["Batch", "Dataset", "Preprocess", "open_data", "synthetic_data"]
