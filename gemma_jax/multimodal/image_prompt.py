"""A text with images becomes token ids and pixels, as the official processor makes them.

Where an image goes, the text has the marker `<start_of_image>`. It grows into

    \\n\\n<start_of_image> <image_soft_token> x 256 <end_of_image>\\n\\n

and, with pan and scan, into a sentence that shows the whole image first and then its crops
(transformers `Gemma3Processor.replace_image_token`). What stands between images is tokenised as one
text: the newlines join those of their neighbours into longer pieces.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gemma_jax.config import VisionConfig
from gemma_jax.text import GEMMA3_MEDIA, Tokenizer
from gemma_jax.text.chat import BOS
from gemma_jax.vision.images import Image, preprocess
from gemma_jax.vision.pan_and_scan import PanAndScan

MARKER = GEMMA3_MEDIA["image"]
PLACEHOLDER = "<image_soft_token>"
_VIEW = f"\n\n{MARKER}\n\n"  # one view of an image: whole, or a crop


@dataclass(frozen=True, eq=False)
class Prompt:
    """Holds what a model is given: a text with images, as token ids and pixels.

    Attributes:
      token_ids: Ids of the whole prompt, soft-token placeholders included.
      pixels: float32 `[I, 3, size, size]` in [-1, 1], one entry per run of placeholders: each image
        whole, followed by its crops. Default: none.

    Examples:
      >>> import gemma_jax as gj
      >>> gj.Prompt([2, 10, 20]).pixels.shape  # a text alone
      (0, 3, 0, 0)
    """

    token_ids: list[int]
    pixels: np.ndarray = field(default_factory=lambda: np.zeros((0, 3, 0, 0), np.float32))


def image_prompt(
    tokenizer: Tokenizer,
    text: str,
    images: Sequence[object],
    vision: VisionConfig | None,
    *,
    pan_and_scan: PanAndScan | None = None,
    bos: bool = True,
) -> Prompt:
    """Makes the prompt of a text and its images: token ids with placeholders, and pixels.

    Args:
      text: Plain, or from `gemma_jax.text.render`. Without a single marker, the images come in
        front of it.
      images: What `Image` takes, in the order of the markers.
      vision: `model.cfg.vision`.
      pan_and_scan: How to add crops of images that are far from square; default: not at all.
      bos: Begin with <bos>; a text that already does keeps its one.

    Raises:
      ValueError: A model without a tower, another number of markers than of images, a soft-token
        placeholder in the text, or an image that cannot be read.

    Examples:
      >>> import gemma_jax as gj
      >>> model, tok = gj.load("checkpoints/digits")
      >>> image = gj.Image("checkpoints/digits/three.png")
      >>> prompt = gj.image_prompt(tok, "How many digits?", [image], model.cfg.vision)
      >>> prompt.pixels.shape, prompt.token_ids.count(model.cfg.vision.image_token)
      ((1, 3, 32, 32), 16)
    """
    vision = require_vision(vision)
    marked = place_markers(text, len(images))
    pictures = [Image(image) for image in images]
    crops = [_boxes(picture, pan_and_scan) for picture in pictures]
    ids = expand(tokenizer, marked, [len(boxes) for boxes in crops], vision, bos=bos)
    size = vision.image_size
    pixels = [preprocess(picture, size, boxes) for picture, boxes in zip(pictures, crops)]
    return Prompt(ids, np.concatenate([np.zeros((0, 3, size, size), np.float32), *pixels]))


def require_vision(vision: VisionConfig | None) -> VisionConfig:
    """`vision` itself; ValueError if there is none."""
    if vision is None:
        raise ValueError(
            "this model reads text alone; images need one with a vision tower, such as gemma3-4b-it"
        )
    return vision


def place_markers(text: str, count: int) -> str:
    """`text` with one marker per image: its own, or `count` of them in front.

    Raises:
      ValueError: The text has markers of its own, but another number; or a placeholder.
    """
    if PLACEHOLDER in text:
        raise ValueError(
            f"the text holds {PLACEHOLDER}, which would take the place of an image; mark images "
            f"by {MARKER}"
        )
    found = text.count(MARKER)
    if found == count:
        return text
    if found:
        raise ValueError(
            f"places for images in the text ({MARKER}): {found}, images given: {count}; "
            "give as many images as places"
        )
    start = BOS if text.startswith(BOS) else ""
    return start + MARKER * count + text.removeprefix(start)


def expand(
    tokenizer: Tokenizer,
    marked: str,
    num_crops: Sequence[int],
    vision: VisionConfig,
    *,
    bos: bool = True,
) -> list[int]:
    """Ids of a text with one marker per image, with room for every image and its crops.

    The ids of an image's tokens come from `vision`: a `tokenizer.model` has no piece for them.
    """
    crops = iter(num_crops)
    text = re.sub(MARKER, lambda _: _views(next(crops)), marked)
    head, *tail = text.split(MARKER)
    span = [vision.start_token, *[vision.image_token] * vision.num_soft_tokens, vision.end_token]
    ids = tokenizer.encode(head, bos=bos)
    for part in tail:
        ids += span + tokenizer.encode(part)
    return ids


def _views(crops: int) -> str:
    """What an image's marker becomes; each view in it is a marker again."""
    if not crops:
        return _VIEW
    return (
        f"Here is the original image {_VIEW} and here are some crops to help you see better "
        + " ".join([_VIEW] * crops)
    )


def _boxes(image: Image, pan_and_scan: PanAndScan | None) -> tuple:
    return pan_and_scan.boxes(image.width, image.height) if pan_and_scan else ()
