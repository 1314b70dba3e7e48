"""Fewer bits: which operators become integer, with which scales, how that is written, and how it is proven.

::

    input_levels -> placement -> calibration (observers, range_search) -> qdq -> audit     what insert_qdq is made of
    channel_scales, channel_statistics, inserted_scales                                    equalize_layers
    layerwise, rounding                                                                    round_weights, correct_bias

:mod:`~onnxcompress.quantization.affine` is the arithmetic below all of them. The rule tables are in
:mod:`onnxcompress.targets`.
"""

__all__: list[str] = []
