"""Folders of images, and how an image becomes an input.

``Preprocess`` states the steps that the model was trained with, in torchvision's order: resize, centre crop, scale,
subtract the mean, divide by the standard deviation. Pillow reads and resizes; it is an extra.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, field_validator

from onnxcompress.data.columns import Column, MemoryColumn, Rows
from onnxcompress.data.dataset import Dataset, default_batch
from onnxcompress.data.fit import Fitter, describe_spec
from onnxcompress.data.order import IMAGE_SUFFIXES, natural_order
from onnxcompress.errors import DataError, RuntimeUnavailableError, UsageError
from onnxcompress.graph import InputSpec
from onnxcompress.plain_yaml import read_yaml

__all__ = ["PRESETS", "Preprocess", "image_dataset"]

#: Pillow's names of what may be in an image file, whatever its name says; others start programs (EPS: Ghostscript)
_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
#: pixels that an image may be enlarged to: one that is a single pixel high would fill the memory
_MOST_PIXELS = 1 << 27

Layout = Literal["NCHW", "NHWC"]
#: height and width, or one number: the shorter side for `size`, both sides for `crop`
Size = int | tuple[int, int]


def _parse_size(value: Any) -> Any:
    """``256`` or ``"256x320"`` (height x width)."""
    if isinstance(value, str):
        parts = value.lower().split("x")
        if not all(part.strip().isdecimal() for part in parts) or len(parts) > 2:
            raise ValueError("expected a number of pixels or HEIGHTxWIDTH")
        numbers = tuple(int(part) for part in parts)
        return numbers[0] if len(numbers) == 1 else numbers
    return value


def _parse_numbers(value: Any) -> Any:
    """``0.5``, ``"0.485:0.456:0.406"``, or a list."""
    if isinstance(value, str):
        return tuple(value.split(":"))
    return (value,) if isinstance(value, int | float) else value


Numbers = Annotated[tuple[float, ...], BeforeValidator(_parse_numbers)]


class Preprocess(BaseModel):
    """How an image becomes an input: ``((resized, cropped pixels) * scale - mean) / std``.

    ``Preprocess.parse("size=256,crop=224,mean=0.485:0.456:0.406,std=0.229:0.224:0.225")``
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: shorter side after resizing, or (height, width) exactly; None: as large as the model's input
    size: Annotated[Size | None, BeforeValidator(_parse_size)] = None
    #: side or (height, width) of the centre crop; None: as large as the model's input
    crop: Annotated[Size | None, BeforeValidator(_parse_size)] = None
    #: subtracted after scaling; one number or one a channel, in the order of the model's channels
    mean: Numbers = (0.0,)
    #: divided by, as `mean`
    std: Numbers = (1.0,)
    #: multiplied with pixel values 0 to 255; None: 1/255 for floating-point inputs and 1 for integer ones
    scale: float | None = None
    #: None: as the model's shape says, NCHW where it does not
    layout: Layout | None = None
    order: Literal["RGB", "BGR"] = "RGB"
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"

    @field_validator("size", "crop")
    @classmethod
    def _positive(cls, value: Size | None) -> Size | None:
        if value is not None and min(value if isinstance(value, tuple) else (value,)) < 1:
            raise ValueError("expected 1 pixel or more")
        return value

    @field_validator("scale")
    @classmethod
    def _usable(cls, value: float | None) -> float | None:
        if value is not None and not 0 < abs(value) < float(np.finfo(np.float32).max):
            raise ValueError("expected a finite number other than 0")
        return value

    @field_validator("mean", "std")
    @classmethod
    def _finite(cls, value: tuple[float, ...], info: Any) -> tuple[float, ...]:
        if not value or not all(np.isfinite(v) for v in value) or (info.field_name == "std" and 0.0 in value):
            raise ValueError("expected finite numbers, and no zero in std")
        return value

    @classmethod
    def parse(cls, text: str) -> Preprocess:
        """From ``key=value,...`` text, the name of a preset, a preset with changes (``imagenet,crop=299``), or a file.

        Numbers by channel are separated by colons, height and width by ``x``. A file ends in ``.yaml``, ``.yml`` or
        ``.json`` and holds the same keys.

        Raises:
            UsageError: an unknown key, a value that cannot be used, or no such file.
        """
        if Path(text).suffix.lower() in (".yaml", ".yml", ".json"):
            return cls._build(_read_mapping(Path(text)), text)
        values: dict[str, Any] = {}
        for number, part in enumerate(p.strip() for p in text.split(",")):
            key, equals, value = part.partition("=")
            if not equals and number == 0 and part in PRESETS:
                values.update(PRESETS[part])
            elif not equals:
                raise UsageError(
                    f"preprocess: {part!r} is neither key=value nor a preset; keys are {', '.join(cls.model_fields)}, "
                    f"presets {', '.join(PRESETS)}"
                )
            else:
                values[key.strip()] = value.strip()
        return cls._build(values, "preprocess")

    @classmethod
    def _build(cls, values: Mapping[str, Any], origin: str) -> Preprocess:
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0]) if first["loc"] else ""
            if first["type"] == "extra_forbidden":
                raise UsageError(f"{origin}: unknown key {key!r}; expected {', '.join(cls.model_fields)}") from error
            reason = first["msg"].removeprefix("Value error, ")
            raise UsageError(f"{origin}: {key}={repr(values.get(key))[:60]} cannot be used: {reason}") from error


#: the usual preparations of published models; ``imagenet,crop=299,size=342`` changes one
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # torchvision, timm: RGB in 0..1, normalised
    "imagenet": {"size": 256, "crop": 224, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    # TensorFlow, Keras "tf" mode: RGB in -1..1
    "imagenet-tf": {"size": 256, "crop": 224, "mean": (0.5,), "std": (0.5,)},
    # Caffe: BGR in 0..255, mean subtracted
    "imagenet-caffe": {"size": 256, "crop": 224, "mean": (104.0, 117.0, 123.0), "scale": 1.0, "order": "BGR"},
}


def _read_mapping(path: Path) -> Mapping[str, Any]:
    values = read_yaml(path)  # JSON is YAML
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"{path}: expected a mapping of {', '.join(Preprocess.model_fields)}")
    return values


def image_dataset(folder: Path, specs: Sequence[InputSpec], preprocess: Preprocess | None) -> Dataset:
    """The images of ``folder`` as samples of a model with one image input.

    Images in subfolders have the subfolder as their class: its number where all are called by numbers, else its place
    in the sorted names. Classes take turns, so that the first samples have all of them.

    Raises:
        DataError: the model does not take images, an image cannot be read, or sizes do not fit.
        RuntimeUnavailableError: Pillow is not installed.
    """
    _import_pillow()
    files, labels, notes = _list_images(folder)
    plan = _Plan(specs, preprocess if preprocess is not None else Preprocess(), folder, files[0])
    if preprocess is None:
        notes.append(
            f"{folder}: no preprocess given: pixels are scaled to 0..1 and not normalised; "
            "give the steps that the model was trained with, for example --preprocess imagenet"
            if plan.floating
            else f"{folder}: no preprocess given: pixels are passed on as they are, resized to the model's input"
        )
    columns: dict[str, Column] = {plan.spec.name: _ImageColumn(files, plan)}
    if labels is not None:
        name = "labels" if plan.spec.name != "labels" else "targets"
        columns[name] = MemoryColumn(np.array(labels, np.int64))
    fitter = Fitter(specs, feeds=False)
    chunk = fitter.fit(columns, str(folder))
    dataset = Dataset((chunk,), default_batch(chunk), fixed_batch=fitter.fixed_batch, notes=(*notes, *fitter.notes))
    dropped = chunk.samples - dataset.samples
    if dropped:
        dataset.notes += (
            f"{dropped} of {chunk.samples} images dropped: they do not fill a batch of {dataset.fixed_batch}, "
            "which the model's shapes demand",
        )
    return dataset


def _import_pillow() -> Any:
    try:
        import PIL.Image
    except ImportError as error:
        raise RuntimeUnavailableError(
            "Pillow is not installed, which reads images; install it with: pip install 'onnxcompress[images]'"
        ) from error
    return PIL.Image


def _list_images(folder: Path) -> tuple[list[Path], list[int] | None, list[str]]:
    """Images in the order in which they are used, their classes where they lie in subfolders, and notes."""

    def images(place: Path, pattern: str) -> list[Path]:
        found = (f for f in place.glob(pattern) if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
        return sorted((f for f in found if not f.name.startswith(".")), key=lambda f: natural_order(str(f)))

    top = images(folder, "*")
    classes = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    members = [(place, images(place, "**/*")) for place in classes]
    members = [(place, found) for place, found in members if found]
    if top and members:
        raise DataError(
            f"{folder}: images beside the subfolder {members[0][0].name!r} of images; "
            "put all in subfolders, one a class, or none"
        )
    if top:
        return top, None, []
    numbered = all(place.name.isdecimal() for place, _ in members)
    turns = sorted(
        (turn, int(place.name) if numbered else index, file)
        for index, (place, found) in enumerate(members)
        for turn, file in enumerate(found)
    )
    how = "their numbers" if numbered else f"their places in the sorted names, {members[0][0].name!r} is 0"
    notes = [f"{folder}: the {len(members)} subfolders are the classes, labels are {how}"]
    return [file for *_, file in turns], [label for _, label, _ in turns], notes


class _Plan:
    """The steps for one model input, with every size and channel decided."""

    def __init__(self, specs: Sequence[InputSpec], preprocess: Preprocess, folder: Path, example: Path) -> None:
        required = [spec for spec in specs if not spec.optional]
        if len(required) != 1 or required[0].shape is None or len(required[0].shape) not in (3, 4):
            expected = ", ".join(describe_spec(spec) for spec in required)
            raise DataError(f"{folder}: images, but the model does not take one image input; it takes {expected}")
        self.spec = spec = required[0]
        self.preprocess = preprocess
        self.floating = spec.dtype.kind in "fV"
        if not self.floating and spec.dtype != np.uint8:
            raise DataError(f"{folder}: images, but the model takes {describe_spec(spec)}; expected float or uint8")
        image = (spec.shape or ())[-3:]
        self.layout: Layout = preprocess.layout or _layout_of(image)
        channels, height, width = image if self.layout == "NCHW" else (image[2], image[0], image[1])
        if channels not in (1, 3) and isinstance(channels, int):
            raise DataError(
                f"{folder}: images in layout {self.layout}, but the model takes {describe_spec(spec)}, so {channels} "
                "channels; expected 1 or 3, set layout=NCHW or layout=NHWC"
            )
        self.channels = channels if isinstance(channels, int) else 3
        self._set_sizes(height, width, folder, example)
        self._set_numbers(folder)

    def _set_sizes(self, height: int | str | None, width: int | str | None, folder: Path, example: Path) -> None:
        given = _pair(self.preprocess.crop)
        if given is None and isinstance(self.preprocess.size, tuple):
            given = self.preprocess.size
        taken = tuple(d if isinstance(d, int) else None for d in (height, width))
        if given is not None:
            for want, have, side in zip(taken, given, ("height", "width"), strict=True):
                if want is not None and want != have:
                    raise DataError(
                        f"{folder}: preprocess makes images of {given[0]}x{given[1]} but the model takes "
                        f"{side} {want} ({describe_spec(self.spec)}); set crop={_text(taken)}"
                    )
            self.size = given
        elif taken[0] is not None and taken[1] is not None:
            self.size = (taken[0], taken[1])
        elif self.preprocess.size is None and taken == (None, None):
            self.size = _open_size(example)
        else:
            raise DataError(
                f"{folder}: the model takes images of any size ({describe_spec(self.spec)}); set crop=HEIGHTxWIDTH"
            )

    def _set_numbers(self, folder: Path) -> None:
        for name, values in (("mean", self.preprocess.mean), ("std", self.preprocess.std)):
            if len(values) not in (1, self.channels):
                raise DataError(
                    f"{folder}: {name} has {len(values)} numbers but the model's images have {self.channels} channels; "
                    f"give 1 or {self.channels}"
                )
        scale = self.preprocess.scale
        neutral = scale in (None, 1.0) and set(self.preprocess.mean) == {0.0} and set(self.preprocess.std) == {1.0}
        if not self.floating and not neutral:
            raise DataError(
                f"{folder}: the model takes whole pixels ({describe_spec(self.spec)}), which cannot be scaled or "
                "normalised; leave out mean, std and scale"
            )
        self._scale = np.float32(1 / 255 if scale is None else scale)
        self._mean = np.array(self.preprocess.mean, np.float32)
        self._std = np.array(self.preprocess.std, np.float32)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape of one input without the batch."""
        if self.layout == "NCHW":
            return (self.channels, *self.size)
        return (*self.size, self.channels)

    def read(self, file: Path) -> NDArray[Any]:
        """One image as the model takes it, without the batch axis."""
        pillow = _import_pillow()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of odd metadata; what cannot be read raises
                with pillow.open(file, formats=_FORMATS) as opened:
                    if opened.mode.startswith(("I", "F")):
                        raise DataError(f"{file}: has more than 8 bits a channel ({opened.mode}); convert it to 8 bits")
                    image = opened.convert("RGB" if self.channels == 3 else "L")
            image = self._resized(image, file)
        except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
            raise DataError(f"{file}: cannot be read as an image: {' '.join(str(error).split())[:200]}") from error
        pixels = np.asarray(image, np.uint8).reshape(*self.size, self.channels)
        if self.channels == 3 and self.preprocess.order == "BGR":
            pixels = pixels[:, :, ::-1]
        if self.floating:
            values = ((pixels.astype(np.float32) * self._scale) - self._mean) / self._std
            pixels = values.astype(self.spec.dtype, copy=False)
        return pixels.transpose(2, 0, 1) if self.layout == "NCHW" else pixels

    def _resized(self, image: Any, file: Path) -> Any:
        """Resize and crop; the crop is centred as torchvision centres it, and must lie inside the image."""
        resampling = getattr(_import_pillow().Resampling, self.preprocess.interpolation.upper())
        height, width = self.size
        target = self.preprocess.size
        if isinstance(target, tuple):
            new = (target[1], target[0])
        elif target is not None:  # the shorter side
            short = min(image.size)
            new = (max(1, target * image.width // short), max(1, target * image.height // short))
        elif self.preprocess.crop is not None:
            new = image.size
        else:  # the smallest size that covers the model's input
            factor = max(width / image.width, height / image.height)
            new = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
        if new[0] * new[1] > max(_MOST_PIXELS, image.width * image.height):
            raise DataError(
                f"{file}: {image.height}x{image.width} would become {new[1]}x{new[0]} before it is cropped; expected "
                f"at most {_MOST_PIXELS} pixels, set another size or leave the image out"
            )
        if new != image.size:
            image = image.resize(new, resampling)
        if image.width < width or image.height < height:
            raise DataError(
                f"{file}: {image.height}x{image.width} after resizing, smaller than the crop of {height}x{width}; "
                "set a larger size"
            )
        left, upper = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, upper, left + width, upper + height))


def _layout_of(image: Sequence[int | str | None]) -> Layout:
    return "NHWC" if image[2] in (1, 3) and image[0] not in (1, 3) else "NCHW"


def _pair(size: Size | None) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else size


def _text(size: Sequence[int | None]) -> str:
    return "x".join("?" if d is None else str(d) for d in size)


def _open_size(file: Path) -> tuple[int, int]:
    """Height and width of an image."""
    pillow = _import_pillow()
    try:
        with pillow.open(file, formats=_FORMATS) as image:
            return int(image.height), int(image.width)
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise DataError(f"{file}: cannot be read as an image: {' '.join(str(error).split())[:200]}") from error


class _ImageColumn(Column):
    """Images that are read, resized and normalised when they are asked for."""

    def __init__(self, files: Sequence[Path], plan: _Plan) -> None:
        self.shape, self.dtype = (len(files), *plan.sample_shape), plan.spec.dtype
        self._files, self._plan = files, plan

    def rows(self, index: Rows) -> NDArray[Any]:
        """See :meth:`Column.rows`."""
        out = np.empty((len(index), *self.shape[1:]), self.dtype)
        for position, number in enumerate(index.tolist()):
            out[position] = self._plan.read(self._files[number])
        return out

    def whole(self) -> Column:
        """See :meth:`Column.whole`."""
        return MemoryColumn(self.rows(np.arange(len(self._files)))[None])
