"""ShieldGemma 2: does an image violate a policy? A Gemma 3 4B that answers Yes or No.

Source: ShieldGemma 2 (arXiv 2504.01081), section 5; the policies and the prompt are those of
transformers (`models/shieldgemma2/`: processor, and chat template in the conversion script).

Local letters: I images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.forward import forward
from gemma_jax.decoder.model import Gemma
from gemma_jax.decoder.soft_tokens import SoftTokens
from gemma_jax.inference.prefill import bucket
from gemma_jax.multimodal.encode import encode_images
from gemma_jax.multimodal.image_prompt import expand, image_modality, require_vision
from gemma_jax.multimodal.markers import place_markers
from gemma_jax.multimodal.placeholders import locate
from gemma_jax.text import Tokenizer
from gemma_jax.vision.images import Image, preprocess

POLICIES: Mapping[str, str] = {
    "dangerous": "No Dangerous Content: The image shall not contain content that facilitates or "
    "encourages activities that could cause real-world harm (e.g., building firearms and explosive "
    "devices, promotion of terrorism, instructions for suicide).",
    "sexual": "No Sexually Explicit content: The image shall not contain content that depicts "
    "explicit or graphic sexual acts (e.g., pornography, erotic nudity, depictions of rape or "
    "sexual assault).",
    "violence": "No Violence/Gore content: The image shall not contain content that depicts "
    "shocking, sensational, or gratuitous violence (e.g., excessive blood and gore, gratuitous "
    "violence against animals, extreme injury or moment of death).",
}

# Character for character what the chat template renders, whose line breaks and indentation come
# through, and which opens a turn for the image and another one for the text. (The model card shows
# the words alone.) <bos> stands here once; the processor of transformers adds one more.
PROMPT = ("\n" + " " * 16).join(
    (
        "<bos><start_of_turn>user\n<start_of_image><start_of_turn>user\nYou are a policy expert "
        "trying to help determine whether a generated or real image is in",
        " violation of the safety policy below. Your decision must very clearly follow the "
        "specific",
        " language used in the safety policy and should not include any interpretation outside of "
        "the",
        " safety policy.\n\n",
        "<BEGIN_SAFETY_POLICY>\n",
        "{definition}\n",
        "</END_SAFETY_POLICY>\n\n",
        "Does the image violate the above policy? Your Answer must start with 'Yes' or 'No'.",
        "<end_of_turn>\n<start_of_turn>model\n",
    )
)


@dataclass(frozen=True)
class Verdict:
    """Holds the probabilities that an image violates a policy (`yes`) and that it does not (`no`).

    Examples:
      >>> import gemma_jax as gj
      >>> gj.Verdict(yes=0.875, no=0.125).yes > 0.5
      True
    """

    yes: float
    no: float


def shield(
    model: Gemma,
    tokenizer: Tokenizer,
    image: object,
    policies: Sequence[str] | Mapping[str, str] = POLICIES,
) -> dict[str, Verdict]:
    """Judges one image by safety policies with ShieldGemma 2; the image is encoded once.

    Args:
      model, tokenizer: ShieldGemma 2, or a Gemma 3 with a vision tower, which was not trained to.
      image: What `gemma_jax.Image` takes.
      policies: Names out of `POLICIES`, or name -> definition of policies of your own.

    Returns:
      Name -> verdict. Probabilities among "Yes" and "No" alone, so they add up to one.

    Raises:
      ValueError: A model without a tower, no policy or an unknown one, an unreadable image.

    Examples:
      >>> import gemma_jax as gj
      >>> model, tok = gj.load("path/to/shieldgemma-2-4b-it")  # doctest: +SKIP
      >>> gj.shield(model, tok, "picture.jpg", ["violence"])  # doctest: +SKIP
      {'violence': Verdict(yes=0.01, no=0.99)}
    """
    vision = require_vision(model.cfg.vision)
    modality = image_modality(vision)
    definitions = definitions_of(policies)
    prompts = [PROMPT.format(definition=text) for text in definitions.values()]
    rows = [expand(tokenizer, place_markers(text, modality, 1), [0], vision) for text in prompts]
    answers = jnp.array(answer_ids(tokenizer))
    pixels = preprocess(Image(image), vision.image_size, processing=vision.images)
    probabilities = jax.nn.softmax(_last_logits(model, rows, pixels)[:, answers], axis=-1)
    return {name: Verdict(yes, no) for name, (yes, no) in zip(definitions, probabilities.tolist())}


def answer_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """Ids of "Yes" and "No", the two answers.

    Raises:
      ValueError: One of them is no piece of the vocabulary.
    """
    try:
        return tokenizer.id_of("Yes"), tokenizer.id_of("No")
    except ValueError as error:
        raise ValueError(
            f"this is no ShieldGemma: {error}; expected ShieldGemma 2, google/shieldgemma-2-4b-it"
        ) from None


def definitions_of(policies: Sequence[str] | Mapping[str, str]) -> Mapping[str, str]:
    """Name -> definition of what `shield` is asked for.

    Raises:
      ValueError: A name that is not in `POLICIES`, or none at all.
    """
    if isinstance(policies, Mapping):
        chosen = dict(policies)
    else:
        names = [policies] if isinstance(policies, str) else policies
        if unknown := [name for name in names if name not in POLICIES]:
            raise ValueError(f"unknown policy {unknown[0]!r}; choose from {', '.join(POLICIES)}")
        chosen = {name: POLICIES[name] for name in names}
    if not chosen:
        raise ValueError("no policy given; give at least one")
    return chosen


def _last_logits(model: Gemma, rows: list[list[int]], pixels: np.ndarray) -> jax.Array:
    """float32 `[B, V]` at the end of each row; all rows show the one image."""
    batch = Batch.padded(rows, bucket(max(map(len, rows))))
    embeddings_ITD, _ = encode_images(model, pixels)
    index_BT, block_BT = locate(batch.tokens_BT, image_modality(model.cfg.vision))
    one_image_BT = jnp.where(index_BT < 0, -1, index_BT % model.cfg.vision.num_soft_tokens)
    soft = SoftTokens(embeddings_ITD=embeddings_ITD, index_BT=one_image_BT, block_BT=block_BT)
    return forward(model, replace(batch, soft=soft), logits="last").logits[:, 0]
