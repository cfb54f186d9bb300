"""Images of every kind in, the official numbers out."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from pictures import COLOURS, written

from gemma_jax import Image, PanAndScan
from gemma_jax.vision.images import FORMATS, preprocess

DATA = Path(__file__).parent / "data"


# What the tower reads.


@pytest.mark.parametrize("name", ["gradient_300x700", "blocks_960x640"])
def test_pixels_as_in_transformers(name):
    """Stored from transformers 5.23 over torchvision 0.29.2, whose resize rounds differently from
    Pillow's in single pixels: one grey level is 2 / 255."""
    stored, image = np.load(DATA / "pixel_values.npz"), Image(DATA / f"{name}.png")
    pixels = preprocess(image, 896, PanAndScan().boxes(image.width, image.height))
    assert pixels.shape == (3, 3, 896, 896) and pixels.dtype == np.float32
    parts = {
        "grid": pixels[..., ::32, ::32],
        "corner": pixels[..., :8, :8],
        "centre": pixels[..., 440:456, 440:456],
        "end": pixels[..., -8:, -8:],
    }
    for part, values in parts.items():
        error = np.abs(values - stored[f"{name}.{part}"])
        assert error.max() <= 0.0079 and error.mean() <= 0.0008, part
    for i, part in enumerate(pixels.astype(np.float64)):
        assert np.abs(part.mean(axis=(1, 2)) - stored[f"{name}.mean"][i]).max() < 1e-5
        assert np.abs(part.std(axis=(1, 2)) - stored[f"{name}.std"][i]).max() < 1e-5


def test_levels_map_to_minus_one_to_one():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = preprocess(Image(levels), 16)
    expected = (np.arange(256) / 255 - 0.5) / 0.5
    assert pixels.flags.c_contiguous and pixels.min() == -1 and pixels.max() == 1
    for channel in pixels[0]:
        np.testing.assert_allclose(channel.ravel(), expected, atol=1e-7)


def test_shrinking_averages():
    """Without antialiasing, stripes of one pixel would survive."""
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    inner = preprocess(Image(stripes), 8)[..., 1:-1]
    assert np.abs(inner).max() <= 2 / 255


def test_a_crop_is_an_image_of_its_own():
    """Pixels around the crop do not leak into it."""
    rgb = np.random.default_rng(0).integers(0, 256, (40, 100, 3), dtype=np.uint8)
    boxes = [(0, 0, 50, 40), (50, 0, 100, 40)]
    alone = [preprocess(Image(rgb[:, left:right]), 28) for left, _, right, _ in boxes]
    together = preprocess(Image(rgb), 28, boxes)
    np.testing.assert_array_equal(together, np.concatenate([preprocess(Image(rgb), 28), *alone]))


# Sources.


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "colours.png"
    path.write_bytes(written(PIL.Image.fromarray(COLOURS), "PNG"))
    return path


@pytest.mark.parametrize(
    "source",
    [Path, str, Path.read_bytes, PIL.Image.open, Image, lambda path: COLOURS],
)
def test_sources(file, source):
    image = Image(source(file))
    assert np.array_equal(image.rgb, COLOURS) and image.rgb.dtype == np.uint8
    assert (image.width, image.height) == (3, 2)
    assert np.array_equal(np.asarray(image.to_pil()), COLOURS)
    assert np.array_equal(Image(image).rgb, COLOURS)


def test_jax_arrays():
    import jax.numpy as jnp

    assert np.array_equal(Image(jnp.asarray(COLOURS)).rgb, COLOURS)


def test_images_do_not_change():
    array = COLOURS.copy()
    image = Image(array)
    array[:] = 0
    assert np.array_equal(image.rgb, COLOURS)
    with pytest.raises(ValueError, match="read-only"):
        image.rgb[0, 0] = 0


def test_what_is_given_stays_as_it_is():
    picture = PIL.Image.new("RGBA", (3, 2), (200, 100, 0, 51))
    before = picture.tobytes()
    Image(picture)
    assert picture.mode == "RGBA" and picture.tobytes() == before
    opaque = PIL.Image.fromarray(COLOURS)
    image = Image(opaque)
    opaque.paste("black", (0, 0, 3, 2))
    assert np.array_equal(image.rgb, COLOURS)


def test_pillow_knows_the_formats():
    PIL.Image.init()
    assert set(FORMATS) <= PIL.Image.OPEN.keys()


def test_images_show_themselves():
    image = Image(COLOURS)
    assert repr(image) == "Image(3 x 2)"
    assert np.array_equal(Image(image._repr_png_()).rgb, COLOURS)


@pytest.mark.parametrize(
    ("array", "rgb"),
    [
        ([[0, 128], [129, 65535]], [[0, 0], [1, 255]]),  # 257 to a level, to the nearest
        ([[32767, 32896], [65406, 65407]], [[127, 128], [254, 255]]),
    ],
)
def test_sixteen_bits(array, rgb):
    array, rgb = np.array(array, np.uint16), np.array(rgb)[..., None].repeat(3, -1)
    pgm = b"P5 2 2 65535\n" + array.astype(">u2").tobytes()
    tiff = written(PIL.Image.fromarray(array), "TIFF")
    for source in (
        array,
        array.astype(">u2"),
        written(PIL.Image.fromarray(array), "PNG"),
        pgm,
        tiff,
    ):
        assert np.array_equal(Image(source).rgb, rgb)


@pytest.mark.parametrize("shape", [(2, 2), (2, 2, 1)])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, bool, np.float16, np.float32, np.float64])
def test_greyscale_arrays(kind, shape):
    white = {"u": np.iinfo(kind).max if kind in (np.uint8, np.uint16) else 0, "b": 1, "f": 1}
    array = np.array([0, 1, 1, 0]).reshape(shape) * white[np.dtype(kind).kind]
    expected = np.array([[0, 255], [255, 0]])[..., None].repeat(3, -1)
    assert np.array_equal(Image(array.astype(kind)).rgb, expected)


def test_floats_round_to_the_nearest_level():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    floats = levels.astype(np.float32) / 255
    tiff = written(PIL.Image.fromarray(floats), "TIFF")
    for source in (floats, floats + 0.3 / 255 * (floats < 1), tiff):
        assert np.array_equal(Image(source).rgb[..., 1], levels)


@pytest.mark.parametrize(
    "alpha, colour", [(0, (255, 255, 255)), (255, (200, 100, 0)), (51, (244, 224, 204))]
)
def test_transparency_lies_on_white(alpha, colour):
    """51 is a fifth of 255."""
    rgba = np.full((2, 2, 4), (200, 100, 0, alpha), np.uint8)
    picture = PIL.Image.fromarray(rgba)
    for source in (rgba, rgba / 255, picture, *(written(picture, f) for f in ("PNG", "TIFF"))):
        assert np.array_equal(np.unique(Image(source).rgb.reshape(-1, 3), axis=0), [colour])


def test_palettes():
    picture = PIL.Image.new("P", (2, 2))
    picture.putpalette([9, 8, 7, 200, 100, 0])
    picture.putpixel((1, 0), 1)
    expected = np.full((2, 2, 3), (9, 8, 7))
    expected[0, 1] = 200, 100, 0
    assert np.array_equal(Image(written(picture, "PNG")).rgb, expected)
    assert np.array_equal(Image(written(picture, "GIF")).rgb, expected)
    expected[0, 1] = 255
    for transparent in (1, b"\xff\0"):  # one entry, or the opacity of each
        assert np.array_equal(
            Image(written(picture, "PNG", transparency=transparent)).rgb, expected
        )


@pytest.mark.parametrize(
    ("mode", "value", "colour"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 255), (77, 77, 77)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_other_modes(mode, value, colour):
    picture = PIL.Image.new(mode, (4, 4), value)
    for source in (picture, written(picture, "TIFF")):
        assert np.array_equal(np.unique(Image(source).rgb.reshape(-1, 3), axis=0), [colour])


UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x[::-1].transpose(1, 0, 2),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: x[:, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_cameras_held_sideways(orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = written(PIL.Image.fromarray(COLOURS), "PNG", exif=exif)
    for source in (data, PIL.Image.open(io.BytesIO(data))):
        assert np.array_equal(Image(source).rgb, UPRIGHT[orientation](COLOURS))


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_counts(form):
    first, second = (PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if form == "WEBP" else {}
    data = written(first, form, save_all=True, append_images=[second], **options)
    assert PIL.Image.open(io.BytesIO(data)).n_frames == 2
    assert np.array_equal(np.unique(Image(data).rgb.reshape(-1, 3), axis=0), [(255, 0, 0)])
