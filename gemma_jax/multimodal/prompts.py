"""What callers give, in any form, as token ids and pixels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.model import Gemma
from gemma_jax.multimodal.encode import encode_images
from gemma_jax.multimodal.image_prompt import Prompt, image_prompt
from gemma_jax.text import Tokenizer, images_of, render
from gemma_jax.vision.pan_and_scan import PanAndScan

Messages = Sequence[Mapping[str, object]]


def is_chat(prompt: object) -> bool:
    """Whether this is a list of chat messages, and not a list of prompts."""
    return (
        isinstance(prompt, Sequence)
        and len(prompt) > 0
        and all(isinstance(m, Mapping) for m in prompt)
    )


@dataclass(frozen=True)
class PromptReader:
    """Turns texts, messages and token ids into what one model reads.

    Attributes:
      tokenizer: `None` if only token ids will come.
      cfg: Of the model.
      pan_and_scan: How to crop images, or `None`.
    """

    tokenizer: Tokenizer | None
    cfg: GemmaConfig
    pan_and_scan: PanAndScan | None = None

    def all(self, prompts: Sequence, images: Sequence | None) -> list[Prompt]:
        """One `Prompt` each; `images` holds a list of images per prompt, or is `None`.

        Raises:
          ValueError: A prompt that is empty, or whose images do not fit it or this model.
        """
        images = [None] * len(prompts) if images is None else list(images)
        if len(images) != len(prompts):
            raise ValueError(
                f"{len(images)} lists of images for {len(prompts)} prompts; give one list for each"
            )
        return [self._one(prompt, own) for prompt, own in zip(prompts, images)]

    def text(self, text: str, images: Sequence, *, bos: bool = True) -> Prompt:
        """A text with its images."""
        if self.tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer; give one, or token ids")
        if not text:
            raise ValueError("the prompt is empty; give at least one character")
        if self.cfg.vision is None and not images:
            return Prompt(self.tokenizer.encode(text, bos=bos))
        return image_prompt(
            self.tokenizer, text, images, self.cfg.vision, pan_and_scan=self.pan_and_scan, bos=bos
        )

    def _one(self, prompt: object, images: Sequence | None) -> Prompt:
        if isinstance(prompt, str):
            return self.text(prompt, images or ())
        if images:
            raise ValueError("images go with a text; messages and Prompts hold their own")
        if isinstance(prompt, Prompt):
            return prompt
        if is_chat(prompt):
            return self.text(render(prompt), images_of(prompt))
        return Prompt([int(i) for i in prompt])


def encode_prompt_images(model: Gemma, prompt: Prompt) -> jax.Array | None:
    """Soft tokens `[I, T, D]` of the images of a prompt, `None` if it has none.

    One image at a time: the program is compiled once, and memory is bounded by one image.
    """
    if not len(prompt.pixels):
        return None
    return jnp.concatenate(
        [encode_images(model, np.asarray(one)[None])[0] for one in prompt.pixels]
    )
