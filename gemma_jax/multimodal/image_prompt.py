"""A text with images becomes token ids and pixels, as the official processors make them.

Where an image goes, the text has the marker `<start_of_image>` (Gemma 3), or the placeholder
`<image_soft_token>` itself (Gemma 3n). It grows into

    \\n\\n<start_of_image> <image_soft_token> x 256 <end_of_image>\\n\\n

and, in Gemma 3 with pan and scan, into a sentence that shows the whole image first and then its
crops (transformers `Gemma3Processor.replace_image_token`, `Gemma3nProcessor`). What stands between
images is tokenised as one text: the newlines join those of their neighbours into longer pieces.
"""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from gemma_jax.decoder.model import Gemma
from gemma_jax.encoder_config import ImageProcessing, MobileNetConfig, VisionConfig
from gemma_jax.multimodal.encode import encode_images
from gemma_jax.multimodal.markers import expand_markers
from gemma_jax.multimodal.modality import Item, Modality, modality_of
from gemma_jax.multimodal.prompts import Prompt, build_prompt
from gemma_jax.text import GEMMA3_MEDIA, GEMMA3N_MEDIA, Tokenizer
from gemma_jax.vision.images import Image, preprocess
from gemma_jax.vision.pan_and_scan import PanAndScan

MARKER = GEMMA3_MEDIA["image"]
PLACEHOLDER = GEMMA3N_MEDIA["image"]
Vision = VisionConfig | MobileNetConfig


@modality_of.register
def image_modality(
    vision: VisionConfig, *, pan_and_scan: PanAndScan | bool | None = None, **_: object
) -> Modality:
    """How images enter the text of a Gemma 3.

    Args:
      pan_and_scan: How to add crops of images that are far from square; True and False with the
        checkpoint's numbers, or not at all; default: as the checkpoint says.
    """
    cropping = _cropping(vision.images, pan_and_scan)
    return _modality(vision, MARKER, PLACEHOLDER, bidirectional=True, pan_and_scan=cropping)


@modality_of.register
def causal_image_modality(
    vision: MobileNetConfig, *, pan_and_scan: PanAndScan | bool | None = None, **_: object
) -> Modality:
    """How images enter the text of a Gemma 3n: whole, and read one soft token after the other.

    Raises:
      ValueError: Crops are asked for.
    """
    if pan_and_scan:
        raise ValueError("this model was trained on whole images; leave pan and scan out")
    # Gemma 3's marker is but the token in front of each run here.
    return _modality(vision, PLACEHOLDER, MARKER, bidirectional=False, pan_and_scan=None)


def _modality(
    vision: Vision,
    marker: str,
    refused: str,
    *,
    bidirectional: bool,
    pan_and_scan: PanAndScan | None,
) -> Modality:
    return Modality(
        name="image",
        items="images",
        marker=marker,
        placeholder=vision.image_token,
        begin=vision.start_token,
        end=vision.end_token,
        tokens_per_item=vision.num_soft_tokens,
        bidirectional=bidirectional,
        prepare=partial(_prepare, vision=vision, marker=marker, pan_and_scan=pan_and_scan),
        encode=_encode,
        placeholder_text=refused,
    )


def image_prompt(
    tokenizer: Tokenizer,
    text: str,
    images: Sequence[object],
    vision: Vision | None,
    *,
    pan_and_scan: PanAndScan | bool | None = None,
    bos: bool = True,
) -> Prompt:
    """Makes the prompt of a text and its images: token ids with placeholders, and pixels.

    Args:
      text: Plain, or from `gemma_jax.text.render`. Without a single marker, the images come in
        front of it.
      images: What `Image` takes, in the order of the markers.
      vision: `model.cfg.vision`.
      pan_and_scan: How to add crops, see `image_modality`.
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
    modality = modality_of(require_vision(vision), pan_and_scan=pan_and_scan)
    prompt = build_prompt(tokenizer, text, (modality,), {modality.name: images}, bos=bos)
    pixels = np.array(prompt.media.get(modality.name, ()), np.float32)
    return Prompt(prompt.token_ids, pixels.reshape(-1, 3, vision.image_size, vision.image_size))


def require_vision(vision: Vision | None) -> Vision:
    """`vision` itself; ValueError if there is none."""
    if vision is None:
        raise ValueError(
            "this model has no vision tower; images need one that has, such as gemma3-4b-it"
        )
    return vision


def expand(
    tokenizer: Tokenizer,
    marked: str,
    num_crops: Sequence[int],
    vision: VisionConfig,
    *,
    bos: bool = True,
) -> list[int]:
    """Ids of a text with one marker per image, with room for every image and its crops."""
    modality = image_modality(vision)
    items = {modality.name: [_item(crops, vision, MARKER) for crops in num_crops]}
    return expand_markers(tokenizer, marked, (modality,), items, bos=bos)


def _cropping(images: ImageProcessing, pan_and_scan: PanAndScan | bool | None) -> PanAndScan | None:
    if isinstance(pan_and_scan, PanAndScan):
        return pan_and_scan
    if not (images.pan_and_scan if pan_and_scan is None else pan_and_scan):
        return None
    return PanAndScan(
        min_crop_size=images.min_crop_size,
        max_num_crops=images.max_num_crops,
        min_ratio=images.min_ratio,
    )


def _prepare(
    source: object, *, vision: Vision, marker: str, pan_and_scan: PanAndScan | None
) -> Item:
    image = Image(source)
    boxes = pan_and_scan.boxes(image.width, image.height) if pan_and_scan else ()
    pixels = preprocess(image, vision.image_size, boxes, vision.images)
    return _item(len(boxes), vision, marker, pixels)


def _item(crops: int, vision: Vision, marker: str, pixels: Sequence[np.ndarray] = ()) -> Item:
    return Item(_views(crops, marker), [vision.num_soft_tokens] * (1 + crops), pixels)


def _encode(model: Gemma, pixels: jax.Array) -> jax.Array:
    return encode_images(model, pixels)[0]


def _views(crops: int, marker: str) -> str:
    """What an image's marker becomes; each view in it, whole or a crop, is a marker again."""
    view = f"\n\n{marker}\n\n"
    if not crops:
        return view
    return (
        f"Here is the original image {view} and here are some crops to help you see better "
        + " ".join([view] * crops)
    )
