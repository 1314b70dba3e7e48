"""Folders of images: decoding, preprocessing, classes; every wrong setting in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from onnxcompress.data import Preprocess, open_data
from onnxcompress.errors import DataError, RuntimeUnavailableError, UsageError
from onnxcompress.graph import InputSpec

F32 = np.dtype(np.float32)


def spec(*shape: int | str, dtype: Any = np.float32) -> list[InputSpec]:
    return [InputSpec("x", np.dtype(dtype), shape)]


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **({"lossless": True} if path.suffix == ".webp" else {}))


# -- the arithmetic -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_exact_values(tmp_path: Path, suffix: str, layout: str, order: str) -> None:
    """Without resizing every value follows from the pixels: crop, order, scale, mean, std, layout."""
    pixels = picture(10, 12)
    write(tmp_path / f"a.{suffix}", pixels)
    shape = ("N", 3, 6, 8) if layout == "NCHW" else ("N", 6, 8, 3)
    steps = f"crop=6x8,mean=0.1:0.2:0.3,std=0.5:0.6:0.7,layout={layout},order={order}"
    read = open_data(tmp_path, spec(*shape), preprocess=Preprocess.parse(steps)).first().feeds["x"]
    wanted = pixels[2:8, 2:10, :: 1 if order == "RGB" else -1] / 255.0
    wanted = (wanted - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    if layout == "NCHW":
        wanted = wanted.transpose(2, 0, 1)
    assert read.dtype == F32
    np.testing.assert_allclose(read[0], wanted, rtol=1e-5, atol=1e-6)


def test_jpeg_and_upper_case_suffix(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8, 3), 128, np.uint8)).save(tmp_path / "A.JPG", quality=100)
    Image.fromarray(np.full((8, 8, 3), 64, np.uint8)).save(tmp_path / "b.jpeg", quality=100)
    dataset = open_data(tmp_path, spec("N", 3, 8, 8), preprocess=Preprocess())
    np.testing.assert_allclose(dataset.first().feeds["x"][:, 0, 0, 0] * 255, [128, 64], atol=1)


def test_resize_is_pillows_and_keeps_the_aspect_ratio(tmp_path: Path) -> None:
    pixels = picture(40, 60)
    write(tmp_path / "a.png", pixels)
    read = open_data(tmp_path, spec("N", 3, 16, 16), preprocess=Preprocess.parse("size=20,crop=16")).first().feeds["x"]
    resized = np.asarray(Image.fromarray(pixels).resize((30, 20), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(read[0], resized[2:18, 7:23].transpose(2, 0, 1) / 255.0, atol=1e-6)


def test_exact_size_and_interpolation(tmp_path: Path) -> None:
    pixels = picture(40, 60)
    write(tmp_path / "a.png", pixels)
    steps = Preprocess.parse("size=10x14,interpolation=bicubic")
    read = open_data(tmp_path, spec("N", 3, "H", "W"), preprocess=steps).first().feeds["x"]
    resized = np.asarray(Image.fromarray(pixels).resize((14, 10), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(read[0], resized.transpose(2, 0, 1) / 255.0, atol=1e-6)


def test_gray_images_for_colour_models_and_the_reverse(tmp_path: Path) -> None:
    pixels = picture(8, 8)
    write(tmp_path / "colour" / "a.png", pixels)
    (tmp_path / "gray").mkdir()
    Image.fromarray(pixels[:, :, 0]).save(tmp_path / "gray" / "a.png")
    one = open_data(tmp_path / "colour", spec("N", 1, 8, 8), preprocess=Preprocess()).first().feeds["x"]
    luma = np.asarray(Image.fromarray(pixels).convert("L"))
    np.testing.assert_allclose(one[0, 0], luma / 255.0, atol=1e-6)
    three = open_data(tmp_path / "gray", spec("N", 3, 8, 8), preprocess=Preprocess()).first().feeds["x"]
    assert np.ptp(three, axis=1).max() == 0


def test_transparency_and_palettes_are_converted(tmp_path: Path) -> None:
    pixels = picture(8, 8)
    Image.fromarray(pixels).convert("RGBA").save(tmp_path / "a.png")
    Image.fromarray(pixels).convert("P").save(tmp_path / "b.png")
    assert open_data(tmp_path, spec("N", 3, 8, 8), preprocess=Preprocess()).first().feeds["x"].shape == (2, 3, 8, 8)


def test_uint8_models_get_pixels(tmp_path: Path) -> None:
    pixels = picture(8, 8)
    write(tmp_path / "a.png", pixels)
    read = open_data(tmp_path, spec("N", 8, 8, 3, dtype=np.uint8)).first().feeds["x"]
    np.testing.assert_array_equal(read[0], pixels)
    with pytest.raises(DataError, match=r"whole pixels \('x' \(uint8, \[N, 8, 8, 3\]\)\), which cannot be scaled"):
        open_data(tmp_path, spec("N", 8, 8, 3, dtype=np.uint8), preprocess=Preprocess.parse("mean=0.5"))


def test_float16_models(tmp_path: Path) -> None:
    write(tmp_path / "a.png", picture(8, 8))
    assert open_data(tmp_path, spec("N", 3, 8, 8, dtype=np.float16)).first().feeds["x"].dtype == np.float16


def test_presets(tmp_path: Path) -> None:
    write(tmp_path / "a.png", np.full((300, 300, 3), 255, np.uint8))
    image = spec("N", 3, 224, 224)
    corner = {
        name: open_data(tmp_path, image, preprocess=Preprocess.parse(name)).first().feeds["x"][0, :, 0, 0]
        for name in ("imagenet", "imagenet-tf", "imagenet-caffe")
    }
    np.testing.assert_allclose(
        corner["imagenet"], (1 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225], rtol=1e-5
    )
    np.testing.assert_allclose(corner["imagenet-tf"], [1, 1, 1])
    np.testing.assert_allclose(corner["imagenet-caffe"], [151, 138, 132])
    changed = Preprocess.parse("imagenet,size=342,crop=299")
    assert (changed.size, changed.crop, changed.mean) == (342, 299, (0.485, 0.456, 0.406))


def test_without_preprocess_images_cover_the_input_and_a_note_says_so(tmp_path: Path) -> None:
    write(tmp_path / "a.png", picture(50, 80))
    dataset = open_data(tmp_path, spec("N", 3, 16, 16))
    read = dataset.first().feeds["x"]
    assert read.shape == (1, 3, 16, 16) and read.min() >= 0 and read.max() <= 1
    assert len(dataset.notes) == 1 and "no preprocess given" in dataset.notes[0]


def test_batches_labels_views_and_fingerprint(tmp_path: Path) -> None:
    for number in range(12):
        write(tmp_path / f"{number}.png", np.full((4, 4, 3), number, np.uint8))
    dataset = open_data(tmp_path, spec("N", 3, 4, 4), preprocess=Preprocess.parse("scale=1"), batch=5)
    order = [int(v) for b in dataset for v in b.feeds["x"][:, 0, 0, 0]]
    assert order == list(range(12)) and not dataset.has_labels  # natural order: 2 before 10
    rest, held_out = dataset.split(0.25)
    assert (rest.samples, held_out.samples) == (9, 3)
    assert dataset.fingerprint() == dataset.rebatch(2).fingerprint() != rest.fingerprint()


def test_fixed_batch_drops_the_tail(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / f"{number}.png", picture(4, 4))
    dataset = open_data(tmp_path, spec(2, 3, 4, 4), preprocess=Preprocess())
    assert dataset.samples == 4 and "1 of 5 images dropped" in dataset.notes[0]


# -- classes ------------------------------------------------------------------------------------------------------


def labels(dataset: Any) -> list[int]:
    return [int(label) for batch in dataset for label in batch.labels]


def test_subfolders_are_classes_and_take_turns(tmp_path: Path) -> None:
    for name, count in [("dog", 3), ("cat", 2), ("ape", 1)]:
        for number in range(count):
            write(tmp_path / name / "deeper" / f"{number}.png", picture(4, 4))
    dataset = open_data(tmp_path, spec("N", 3, 4, 4), preprocess=Preprocess())
    assert labels(dataset) == [0, 1, 2, 1, 2, 2]
    assert dataset.notes == (
        f"{tmp_path}: the 3 subfolders are the classes, labels are their places in the sorted names, 'ape' is 0",
    )


def test_subfolders_called_by_numbers_are_their_own_labels(tmp_path: Path) -> None:
    for name in ("7", "10", "002"):
        write(tmp_path / name / "a.png", picture(4, 4))
    dataset = open_data(tmp_path, spec("N", 3, 4, 4), preprocess=Preprocess())
    assert labels(dataset) == [2, 7, 10] and "labels are their numbers" in dataset.notes[0]


def test_images_beside_subfolders(tmp_path: Path) -> None:
    write(tmp_path / "a.png", picture(4, 4))
    write(tmp_path / "cat" / "a.png", picture(4, 4))
    with pytest.raises(DataError, match="images beside the subfolder 'cat'"):
        open_data(tmp_path, spec("N", 3, 4, 4))


def test_images_and_arrays_in_one_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.png", picture(4, 4))
    np.save(tmp_path / "a.npy", np.zeros((1, 3, 4, 4), np.float32))
    with pytest.raises(DataError, match=r"holds both images and arrays \(a\.npy\)"):
        open_data(tmp_path, spec("N", 3, 4, 4))


# -- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "steps", "message"),
    [
        (("N", 3, 16, 16), "crop=8", r"makes images of 8x8 but the model takes height 16 .*; set crop=16x16"),
        (("N", 3, 16, 16), "size=12x16", r"makes images of 12x16 but the model takes height 16"),
        (("N", 3, 16, 16), "size=8", r"a\.png: 8x8 after resizing, smaller than the crop of 16x16; set a larger size"),
        (("N", 3, "H", "W"), "size=8", r"the model takes images of any size .*; set crop=HEIGHTxWIDTH"),
        (("N", 3, 16, 16), "mean=1:2", r"mean has 2 numbers but the model's images have 3 channels; give 1 or 3"),
        (("N", 1, 16, 16), "std=1:2:3", r"std has 3 numbers but the model's images have 1 channels"),
        (("N", 7, 16, 16), "size=16", r"so 7 channels; expected 1 or 3"),
        (("N", 3, 16, 16), "layout=NHWC", r"in layout NHWC, .* so 16 channels"),
        (("N", 16), "size=16", r"does not take one image input; it takes 'x' \(float32, \[N, 16\]\)"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, shape: tuple[int | str, ...], steps: str, message: str) -> None:
    write(tmp_path / "a.png", picture(20, 20))
    with pytest.raises(DataError, match=message) as caught:
        open_data(tmp_path, spec(*shape), preprocess=Preprocess.parse(steps)).first()
    assert "\n" not in str(caught.value)


def test_model_with_two_inputs(tmp_path: Path) -> None:
    write(tmp_path / "a.png", picture(4, 4))
    with pytest.raises(DataError, match="does not take one image input"):
        open_data(tmp_path, [*spec("N", 3, 4, 4), InputSpec("z", F32, ("N", 3, 4, 4))])


def test_broken_image_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.png", picture(30, 30))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.png").write_bytes(b"no image")
    dataset = open_data(tmp_path, spec("N", 3, 4, 4), batch=1)
    batches = iter(dataset)
    next(batches)
    with pytest.raises(DataError, match=r"b\.png: cannot be read as an image"):
        next(batches)
    (tmp_path / "b.png").unlink()
    with pytest.raises(DataError, match=r"c\.png: cannot be read as an image"):
        list(open_data(tmp_path, spec("N", 3, 4, 4), batch=1))


def test_sixteen_bit_images_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="more than 8 bits a channel"):
        open_data(tmp_path, spec("N", 1, 4, 4)).first()


def test_decompression_bomb_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.png", picture(30, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"a\.png: cannot be read as an image: Image size \(900 pixels\) exceeds limit"):
        open_data(tmp_path, spec("N", 3, 4, 4)).first()


def test_single_image_is_no_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.png", picture(4, 4))
    with pytest.raises(DataError, match="single image; give the folder"):
        open_data(tmp_path / "a.png", spec("N", 3, 4, 4))


def test_preprocess_is_for_images(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 4, 4), np.float32))
    for source in (tmp_path / "x.npy", tmp_path, np.zeros((1, 3, 4, 4), np.float32)):
        with pytest.raises(UsageError, match="preprocess is for folders of images"):
            open_data(source, spec("N", 3, 4, 4), preprocess=Preprocess())


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.png", picture(4, 4))
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install 'onnxcompress\[images\]'") as caught:
        open_data(tmp_path, spec("N", 3, 4, 4))
    assert caught.value.exit_code == 6


# -- parsing ------------------------------------------------------------------------------------------------------


def test_parse_everything() -> None:
    text = "size=256,crop=224x200,mean=0.485:0.456:0.406,std=0.5,scale=1,layout=NHWC,order=BGR,interpolation=nearest"
    parsed = Preprocess.parse(text)
    assert parsed == Preprocess(
        size=256,
        crop=(224, 200),
        mean=(0.485, 0.456, 0.406),
        std=(0.5,),
        scale=1.0,
        layout="NHWC",
        order="BGR",
        interpolation="nearest",
    )
    assert Preprocess.model_validate(json.loads(parsed.model_dump_json())) == parsed


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.yaml", "size: 256\ncrop: [224, 200]\nmean: [0.1, 0.2, 0.3]\nstd: 0.5\n"),
        ("p.json", '{"size": 256, "crop": "224x200", "mean": "0.1:0.2:0.3", "std": [0.5]}'),
    ],
)
def test_parse_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    wanted = Preprocess(size=256, crop=(224, 200), mean=(0.1, 0.2, 0.3), std=(0.5,))
    assert Preprocess.parse(str(tmp_path / name)) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sise=256", r"unknown key 'sise'; expected size, crop, mean, std, scale, layout, order, interpolation"),
        ("imagenett", r"'imagenett' is neither key=value nor a preset; .*presets imagenet, imagenet-tf"),
        ("size=big", r"size='big' cannot be used: expected a number of pixels or HEIGHTxWIDTH"),
        ("size=1x2x3", r"size='1x2x3' cannot be used"),
        ("size=0", r"size='0' cannot be used: expected 1 pixel or more"),
        ("scale=nan", r"scale='nan' cannot be used: expected a finite number"),
        ("scale=1e40", r"scale='1e40' cannot be used: expected a finite number"),
        ("std=0", r"std='0' cannot be used: expected finite numbers, and no zero in std"),
        ("mean=nan", r"mean='nan' cannot be used"),
        ("mean=a:b", r"mean='a:b' cannot be used"),
        ("layout=HWC", r"layout='HWC' cannot be used: Input should be 'NCHW' or 'NHWC'"),
        ("", r"'' is neither key=value nor a preset"),
        ("nothing.yaml", "nothing.yaml.: no such file"),
    ],
)
def test_parse_errors(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Preprocess.parse(text)
    assert "\n" not in str(caught.value)


def test_parse_file_that_is_no_mapping(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("- size\n")
    with pytest.raises(UsageError, match="expected a mapping of size, crop"):
        Preprocess.parse(str(tmp_path / "p.yaml"))
    (tmp_path / "p.yaml").write_text("size: [\n")
    with pytest.raises(UsageError, match="not valid YAML"):
        Preprocess.parse(str(tmp_path / "p.yaml"))


def test_what_is_no_image_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives PostScript to Ghostscript, whatever the file is called."""
    import subprocess

    started: list[Any] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **more: started.append(given))
    monkeypatch.setattr(subprocess, "check_call", lambda *given, **more: started.append(given))
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(DataError, match="cannot be read as an image"):
        next(iter(open_data(tmp_path, spec("n", 3, 8, 8))))
    assert started == []


def test_a_thin_image_is_not_enlarged_without_end(tmp_path: Path) -> None:
    Image.new("1", (2_000_000, 1)).save(tmp_path / "thin.png")
    with pytest.raises(DataError, match="1x2000000 would become 32x64000000"):
        next(iter(open_data(tmp_path, spec("n", 1, 32, 32))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x, x]\nmean: [*a, *a]\n", "anchors and aliases"),
        ("[" * 5000, "nested too deeply"),
        ("size: " + "9" * 5000, "cannot be read"),
        ("mean: " + "x" * 2_000_000, "larger than"),
    ],
)
def test_hostile_preprocessing(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "steps.yaml").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        Preprocess.parse(str(tmp_path / "steps.yaml"))
    assert len(str(caught.value)) < 1000
