"""The exceptions of onnxcompress, each with the exit code that the command line returns for it.

::

    OnnxCompressError                1   internal error: a guarantee was broken, please report it
    ├── UsageError                   2   an option or a combination of options cannot be used
    │   ├── RecipeError              2   a recipe is malformed or names an unknown pass or option
    │   └── DataError                2   calibration or evaluation data is missing, empty or does not fit the model
    ├── ModelError                   3   the file is no valid ONNX model, or cannot be handled
    │   └── UnsafeModelError         3   the file reaches outside its folder or is otherwise not safe to open
    ├── AccuracyError                4   the accuracy budget (``--max-drop``) was missed
    ├── SlowerError                  5   slower than ``--fail-if-slower-than`` allows
    ├── RuntimeUnavailableError      6   a runtime, a provider or an optional package is not there
    └── ResourceError                7   memory, time or disk ran out

Every message is one line that says what was found, what was expected and what to do.
"""

from __future__ import annotations

__all__ = [
    "AccuracyError",
    "DataError",
    "ModelError",
    "OnnxCompressError",
    "RecipeError",
    "ResourceError",
    "RuntimeUnavailableError",
    "SlowerError",
    "UnsafeModelError",
    "UsageError",
]


class OnnxCompressError(Exception):
    """Base of all errors raised on purpose; see the module docstring for the tree."""

    exit_code: int = 1


class UsageError(OnnxCompressError):
    """An option, or a combination of options, that cannot be used."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that is malformed or names an unknown pass or option."""


class DataError(UsageError):
    """Calibration or evaluation data that is missing, empty or does not fit the model."""


class ModelError(OnnxCompressError):
    """A file that is no valid ONNX model, or one that cannot be handled."""

    exit_code = 3


class UnsafeModelError(ModelError):
    """A file that is not safe to open, for example external data outside the model's folder."""


class AccuracyError(OnnxCompressError):
    """The accuracy budget was missed; nothing was written."""

    exit_code = 4


class SlowerError(OnnxCompressError):
    """The result is slower than the caller allows."""

    exit_code = 5


class RuntimeUnavailableError(OnnxCompressError):
    """A runtime, an execution provider or an optional package that is not installed."""

    exit_code = 6


class ResourceError(OnnxCompressError):
    """Memory, time or disk ran out."""

    exit_code = 7
