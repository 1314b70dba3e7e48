"""Fewer bits: which operators become integer, with which scales, how that is written, and how it is proven.

::

    placement -> calibration (observers, range_search) -> qdq -> audit         what insert_qdq is made of
    channel_scales, channel_statistics                                         what equalize_layers is made of
    layerwise                                                                  round_weights and correct_bias

:mod:`~onnxcompress.quantization.affine` is the arithmetic below all of them. The rule tables are in
:mod:`onnxcompress.targets`.
"""

__all__: list[str] = []
