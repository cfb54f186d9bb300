"""What is no proper image is refused in one clear line, before it can cost anything."""

import os
import struct
import sys
import warnings
import zlib

import numpy as np
import PIL.Image
import pytest
from pictures import COLOURS, written

from gemma_jax import Image
from gemma_jax.vision.images import MAX_PIXELS


def png(width: int, height: int) -> bytes:
    """A PNG that declares this size, in greyscale, and holds almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 99)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture
def refused(tmp_path, capfd):
    """`refused(data)`: the message for a file of these bytes: one line that names the file, and
    nothing on stderr."""

    def call(data: bytes) -> str:
        path = tmp_path / "given"
        path.write_bytes(data)
        with pytest.raises(ValueError) as caught, warnings.catch_warnings():
            warnings.simplefilter("error")
            Image(path)
        message = str(caught.value)
        assert message.startswith(str(path)) and "\n" not in message
        assert capfd.readouterr() == ("", "")
        return message.removeprefix(str(path)).strip()

    return call


@pytest.mark.parametrize("data", [b"hello, world", b"\0" * 99, b"%PDF-1.7", b"%!PS-Adobe-3.0 EPSF"])
def test_not_an_image(refused, data):
    assert refused(data).startswith("is no image that can be read; expected AVIF, BMP")


def test_empty_file(refused):
    assert refused(b"") == "is empty; expected an image"


PHOTO = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
FILES = {
    form: written(PHOTO, form) for form in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
}


@pytest.mark.parametrize("form", FILES)
def test_cut_off_file(refused, form):
    for length in (len(FILES[form]) // 2, len(FILES[form]) - 40):
        assert "is cut off" in refused(FILES[form][:length])
    assert refused(FILES[form][:8]).startswith("is")


@pytest.mark.parametrize("form", FILES)
def test_damaged_file(form, capfd):
    """It is decoded to something, or refused; nothing else may happen."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = np.frombuffer(FILES[form], np.uint8).copy()
        data[rng.integers(0, min(len(data), 300), 5)] = rng.integers(0, 256, 5)
        try:
            assert Image(data.tobytes()).rgb.size <= 3 * MAX_PIXELS
        except ValueError as error:
            assert str(error).startswith("the image given as bytes") and "\n" not in str(error)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("size", [(1, 1), (1, 10000), (10000, 1)])
def test_sides_of_one_pixel(refused, size):
    picture = PIL.Image.new("RGB", size)
    message = "{} x {} pixels; an image must be at least 2 pixels on each side".format(*size)
    assert refused(written(picture, "PNG")) == f"is {message}"
    for source in (picture, np.asarray(picture)):
        with pytest.raises(ValueError, match=message):
            Image(source)


@pytest.mark.parametrize(
    ("size", "found"),
    [
        ((12_000, 9_000), "12000 x 9000"),
        ((2, 40_000_000), "2 x 40000000"),
        ((65_536, 2), "65536 x 2"),
        ((60_000, 60_000), "more than 178,956,970"),
        ((2**31 - 1, 2**31 - 1), "more than 178,956,970"),
    ],
)
def test_decompression_bombs(refused, size, found):
    """The size that the file declares decides, before any pixel is decoded."""
    assert refused(png(*size)) == (
        f"declares {found} pixels; expected at most 89,478,485, and 65,535 on a side; scale it down"
    )


def test_bomb_behind_a_small_header(refused):
    """The first frame of a GIF may be larger than its screen."""
    data = bytearray(written(PIL.Image.new("P", (8, 8)), "GIF"))
    frame = data.index(b",\0\0\0\0\x08\0\x08\0")
    data[frame + 5 : frame + 9] = struct.pack("<HH", 60_000, 60_000)
    assert "declares" in refused(bytes(data))


def test_size_limits_are_wide_enough():
    assert Image(np.zeros((65_535, 2), np.uint8)).height == 65_535
    assert Image(PIL.Image.new("L", (2, 2))).width == 2


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 20, 30), np.uint8), r"shape \[3, 20, 30\]; .* \.transpose\(1, 2, 0\)"),
        (np.zeros((20, 30, 2), np.uint8), r"expected \[height, width\] or \[height, width, 1, 3"),
        (np.zeros((1, 20, 30, 3), np.uint8), r"shape \[1, 20, 30, 3\]"),
        (np.zeros(9, np.uint8), r"shape \[9\]"),
        (np.zeros((0, 0, 3), np.uint8), "0 x 0 pixels; an image must be at least 2"),
        (np.zeros((2, 2), np.int64), "dtype int64; expected uint8, uint16, bool, or floats"),
        (np.full((2, 2), 16.0), r"floats from 16 to 16; expected \[0, 1\]: scale them"),
        (np.full((2, 2), -0.1), r"expected \[0, 1\]"),
        (np.full((2, 2), np.nan), r"expected \[0, 1\]"),
    ],
)
def test_wrong_arrays(array, message):
    with pytest.raises(ValueError, match=f"the image array .*{message}" if array.size else message):
        Image(array)


def test_values_beyond_sixteen_bits():
    with pytest.raises(ValueError, match=r"beyond 16 bits; expected \[0, 65535\]"):
        Image(PIL.Image.fromarray(np.full((2, 2), 70_000, np.int32)))


def test_wrong_sources():
    for source in (None, 3, [COLOURS], {}):
        with pytest.raises(ValueError, match=f"expected an image .* got {type(source).__name__}"):
            Image(source)
    with pytest.raises(ValueError, match="download the image, and give the file"):
        Image("https://example.org/cat.png")


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        Image(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):
        Image(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is no regular file"):
        Image(tmp_path / "pipe")


def test_without_pillow(monkeypatch):
    data = written(PIL.Image.fromarray(COLOURS), "PNG")
    for module in [name for name in sys.modules if name.partition(".")[0] == "PIL"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "gemma-jax\[vision\]"'):
        Image(data)
