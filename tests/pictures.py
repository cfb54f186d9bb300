"""Small pictures for tests."""

import io

import numpy as np
import PIL.Image

COLOURS = np.array(
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[10, 20, 30], [200, 100, 50], [255, 255, 255]]],
    np.uint8,
)  # two rows of three


def written(picture: PIL.Image.Image, form: str, **options) -> bytes:
    """The bytes of a file of this format."""
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()
