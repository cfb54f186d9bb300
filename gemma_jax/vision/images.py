"""Images in: whatever the user holds becomes 8-bit RGB, and that becomes what the tower reads.

Decoding needs Pillow (the extra `vision`), which is imported at first use. Files are taken for
hostile: their size is checked before anything is decoded, and whatever is wrong with one is a
`ValueError` of one line that names it.
"""

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from gemma_jax.encoder_config import ImageProcessing
from gemma_jax.vision.pan_and_scan import Box

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

# What Pillow decodes by itself; of its other formats, some start programs or are drawings.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
ORIENTATION = 0x0112  # EXIF tag
MIN_SIDE = 2  # hf takes a side of one pixel for a channel
MAX_SIDE = 65_535  # resizing 2 x 40,000,000 pixels would pass through 896 x 40,000,000
MAX_PIXELS = 89_478_485  # a quarter of a gigabyte in RGB, where Pillow begins to warn


class Image:
    """Reads one picture from a file, bytes, an array or PIL: decoded and checked.

    The orientation noted by a camera (EXIF) is applied. Palettes, greyscale and CMYK become RGB,
    and what is transparent lies on white (hf `convert_to_rgb`; hf's own reading of files drops the
    transparency before). Greyscale of 16 bits is scaled to 8, where hf clips it. Of an animation,
    the first frame counts.

    Args:
      source: Path of a file, its bytes, a PIL image, another `Image`, or an array: `[height,
        width]` or `[height, width, 1, 3 or 4]`; uint8, uint16, bool, or floats in [0, 1].

    Attributes:
      rgb: uint8 `[height, width, 3]`, read-only.

    Raises:
      ValueError: `source` is no image, is broken or cut off, or is too large or too small.
      FileNotFoundError: There is no such file.
      ImportError: Pillow is missing.

    Examples:
      >>> import gemma_jax as gj
      >>> import numpy as np
      >>> gj.Image("checkpoints/digits/two.png")
      Image(32 x 32)
      >>> gj.Image(np.zeros((480, 640), np.uint8)).rgb.shape
      (480, 640, 3)
    """

    def __init__(self, source: "str | os.PathLike | bytes | PilImage | np.ndarray | Image"):
        self.rgb = _read(source)
        self.rgb.setflags(write=False)

    @property
    def width(self) -> int:
        return self.rgb.shape[1]

    @property
    def height(self) -> int:
        return self.rgb.shape[0]

    def to_pil(self) -> "PilImage":
        return pillow().fromarray(self.rgb)

    def __repr__(self) -> str:
        return f"Image({self.width} x {self.height})"

    def _repr_png_(self) -> bytes:
        return self.to_pil()._repr_png_()


def preprocess(
    image: Image,
    size: int,
    crops: Sequence[Box] = (),
    processing: ImageProcessing = ImageProcessing(),
) -> np.ndarray:
    """What the vision tower reads: the whole image, then each of its crops.

    Every part is stretched to a square whatever its shape, with antialiasing and rounded to 8 bits,
    then moved from [0, 255] to [-1, 1], or wherever `processing` says (hf `Gemma3ImageProcessor`).

    Returns:
      float32 `[1 + crops, 3, size, size]`.
    """
    picture, kernel = image.to_pil(), pillow().Resampling[processing.resample.upper()]
    parts = [picture, *(picture.crop(box) for box in crops)]
    levels = np.stack([np.asarray(part.resize((size, size), kernel)) for part in parts])
    pixels = levels.transpose(0, 3, 1, 2).astype(np.float32, order="C")
    # In units of levels, as transformers fuses the two steps: by default 127.5, without rounding.
    pixels -= (np.array(processing.mean) / processing.rescale).astype(np.float32)[:, None, None]
    pixels /= (np.array(processing.std) / processing.rescale).astype(np.float32)[:, None, None]
    return pixels


def pillow():
    """The module `PIL.Image`."""
    try:
        import PIL.Image
    except ImportError:
        raise ImportError('images need Pillow: pip install "gemma-jax[vision]"') from None
    return PIL.Image


def _read(source) -> np.ndarray:
    """uint8 `[height, width, 3]`."""
    if isinstance(source, Image):
        return source.rgb
    if isinstance(source, (str, os.PathLike)):
        return _read_file(os.fspath(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read_stream(io.BytesIO(source), "the image given as bytes")
    if hasattr(source, "__array__"):
        return _from_array(np.asarray(source), "the image array")
    if isinstance(source, pillow().Image):
        return _from_pil(source, getattr(source, "filename", "") or "the PIL image")
    kind = type(source).__name__
    raise ValueError(f"expected an image as a path, bytes, a PIL image or an array; got {kind}")


def _read_file(path: str) -> np.ndarray:
    if path.startswith(("http://", "https://", "data:")):
        raise ValueError(f"{path:.80} is no path: download the image, and give the file")
    if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
        raise ValueError(f"{path} is no regular file")  # reading a pipe could wait forever
    with open(path, "rb") as file:
        return _read_stream(file, path)


def _read_stream(file: BinaryIO, name: str) -> np.ndarray:
    if not file.read(1):
        raise ValueError(f"{name} is empty; expected an image")
    with _decoding(name):
        picture = pillow().open(file, formats=FORMATS)
    return _from_pil(picture, name)


def _from_pil(picture: "PilImage", name: str) -> np.ndarray:
    from PIL.ImageOps import exif_transpose

    _check_size(*picture.size, name)  # opening reads the header; pixels come with the line below
    with _decoding(name):
        if picture.getexif().get(ORIENTATION, 1) != 1:  # transposing would copy all the same
            picture = exif_transpose(picture)
        if picture.mode != "F" and not picture.mode.startswith("I"):
            return _to_rgb(picture)
        values = np.asarray(picture)
    if values.dtype == np.int32:  # mode "I" holds 16 bits in 32
        if values.min() < 0 or values.max() > 65_535:
            raise ValueError(f"{name} has values beyond 16 bits; expected [0, 65535]")
        values = values.astype(np.uint16)
    return _from_array(values, name)


def _to_rgb(picture: "PilImage") -> np.ndarray:
    if picture.has_transparency_data:
        rgba, picture = _as(picture, "RGBA"), pillow().new("RGB", picture.size, "white")
        picture.paste(rgba, mask=rgba)
    return np.asarray(_as(picture, "RGB"))


def _as(picture: "PilImage", mode: str) -> "PilImage":
    return picture if picture.mode == mode else picture.convert(mode)


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Whatever a decoder throws at bytes that somebody else made, as one line; no warnings."""
    pil = pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except pil.DecompressionBombError:
        raise _oversized(name, f"more than {2 * MAX_PIXELS:,}") from None
    except pil.UnidentifiedImageError:
        raise ValueError(
            f"{name} is no image that can be read; expected {', '.join(FORMATS)}"
        ) from None
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{name} is a broken image, or is cut off: {error}") from None


def _check_size(width: int, height: int, name: str) -> None:
    if min(width, height) < MIN_SIDE:
        raise ValueError(
            f"{name} is {width} x {height} pixels; "
            f"an image must be at least {MIN_SIDE} pixels on each side"
        )
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise _oversized(name, f"{width} x {height}")


def _oversized(name: str, size: str) -> ValueError:
    return ValueError(
        f"{name} declares {size} pixels; expected at most {MAX_PIXELS:,}, and {MAX_SIDE:,} on a "
        "side; scale it down"
    )


def _from_array(array: np.ndarray, name: str) -> np.ndarray:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4):
        first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        hint = "; move the channels to the end: .transpose(1, 2, 0)" if first else ""
        raise ValueError(
            f"{name} has shape {list(array.shape)}; expected [height, width] or "
            f"[height, width, 1, 3 or 4]{hint}"
        )
    height, width = array.shape[:2]
    _check_size(width, height, name)
    levels = _to_uint8(array.reshape(height, width, channels), name)
    if channels == 4:
        return _to_rgb(pillow().fromarray(levels))
    return np.array(np.broadcast_to(levels, (height, width, 3)))


def _to_uint8(values: np.ndarray, name: str) -> np.ndarray:
    """The nearest of 256 levels."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values * np.uint8(255)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # of either byte order
        return (values // 257 + (values % 257 > 128)).astype(np.uint8)
    if values.dtype.kind == "f":
        if not (values.min() >= 0 and values.max() <= 1):  # NaN is neither
            raise ValueError(
                f"{name} has floats from {values.min():g} to {values.max():g}; expected [0, 1]: "
                "scale them, or give uint8"
            )
        return np.rint(values.astype(np.float32) * 255).astype(np.uint8)
    raise ValueError(
        f"{name} has dtype {values.dtype}; expected uint8, uint16, bool, or floats in [0, 1]"
    )
