"""What callers give, in any form, as token ids and what the encoders read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from types import MappingProxyType, NoneType

import jax
import numpy as np

from gemma_jax.decoder.model import Gemma
from gemma_jax.multimodal.markers import expand_markers, place_markers
from gemma_jax.multimodal.modality import Modality, check_media, modalities_of
from gemma_jax.multimodal.placeholders import check_places
from gemma_jax.text import (
    GEMMA3_MEDIA,
    GEMMA3N_MEDIA,
    Tokenizer,
    chat_bos,
    items_of,
    medium_of,
    render_chat,
)

Messages = Sequence[Mapping[str, object]]
_NOTHING: Mapping[str, Sequence] = MappingProxyType({})


class Prompt:
    """Holds what a model is given: token ids, and what their placeholders stand for.

    Attributes:
      token_ids: Ids of the whole prompt, soft-token placeholders included.
      media: Name of a modality -> what its encoder reads, one entry per run of placeholders.
      pixels: float32 `[I, 3, size, size]` in [-1, 1]: those of the pictures, each one whole,
        followed by its crops. Default: none.
      soft: Soft tokens `[T, D]` of each run, in the order of the text, where they are made already;
        `None`: encoders make them of the media.

    Examples:
      >>> import gemma_jax as gj
      >>> gj.Prompt([2, 10, 20]).pixels.shape  # a text alone
      (0, 3, 0, 0)
    """

    def __init__(
        self,
        token_ids: list[int],
        pixels: np.ndarray | None = None,
        *,
        media: Mapping[str, Sequence[np.ndarray]] = _NOTHING,
        soft: Sequence[jax.Array] | None = None,
    ):
        self.token_ids, self.soft = token_ids, soft
        self.media = dict(media) if pixels is None else {**media, "image": pixels}

    @property
    def pixels(self) -> np.ndarray:
        return np.asarray(self.media.get("image", np.zeros((0, 3, 0, 0), np.float32)))


def is_chat(prompt: object) -> bool:
    """Whether this is a list of chat messages, and not a list of prompts."""
    return (
        isinstance(prompt, Sequence)
        and len(prompt) > 0
        and all(isinstance(m, Mapping) for m in prompt)
    )


def is_content(prompt: object) -> bool:
    """Whether this is what one message says, texts and media in turn, and not a list of prompts."""
    if not isinstance(prompt, (list, tuple)):
        return False
    # A row of whole numbers in an array is a prompt as token ids, whatever arrays may be.
    return any(medium_of(part) and not is_token_ids(part) for part in prompt)


def is_token_ids(prompt: object) -> bool:
    """Whether this is one prompt as token ids, and not a list of prompts."""
    return (
        isinstance(prompt, (Sequence, np.ndarray))
        and not isinstance(prompt, (str, bytes))
        and all(isinstance(token, Integral) for token in prompt)
    )


def is_one_prompt(prompt: object) -> bool:
    """Whether this is one prompt, right or wrong, and not a list of them."""
    if isinstance(prompt, (str, bytes, Prompt)) or not isinstance(prompt, Iterable):
        return True
    return is_chat(prompt) or is_content(prompt) or (is_token_ids(prompt) and len(prompt) > 0)


def build_prompt(
    tokenizer: Tokenizer,
    text: str,
    modalities: Sequence[Modality],
    media: Mapping[str, Sequence],
    *,
    bos: bool = True,
) -> Prompt:
    """The prompt of a text and its items.

    Args:
      text: With one marker per item; items of a modality without a single marker come in front.
      modalities: What the model reads.
      media: Name of a modality -> items in the order of its markers.

    Raises:
      ValueError: Items that the model cannot read, another number of markers than of items, a
        placeholder in the text, or an item that cannot be read.
    """
    check_media(media, modalities)
    for modality in reversed(modalities):
        text = place_markers(text, modality, len(media.get(modality.name, ())))
    items = {m.name: [m.prepare(one) for one in media.get(m.name, ())] for m in modalities}
    ids = expand_markers(tokenizer, text, modalities, items, bos=bos)
    return Prompt(
        ids,
        media={
            name: [i for item in own for i in item.inputs] for name, own in items.items() if own
        },
    )


@dataclass(frozen=True)
class PromptReader:
    """Turns texts, messages and token ids into what one model reads.

    Attributes:
      tokenizer: `None` if only token ids will come.
      modalities: What the model reads beside text, from `modalities_of`.
    """

    tokenizer: Tokenizer | None
    modalities: Sequence[Modality] = ()

    def all(
        self, prompts: Sequence, media: Mapping[str, Sequence[Sequence | None] | None] = _NOTHING
    ) -> list[Prompt]:
        """One `Prompt` each.

        Args:
          media: Name of a modality -> a list of items per prompt, or `None`.

        Raises:
          ValueError: A prompt that is empty, or whose items do not fit it or this model.
        """
        given = {name: list(lists) for name, lists in media.items() if lists is not None}
        for name, lists in given.items():
            if len(lists) != len(prompts):
                raise ValueError(
                    f"{len(lists)} lists of {name} items for {len(prompts)} prompts; give one list "
                    "for each"
                )
            for items in lists:
                if not isinstance(items, (list, tuple, NoneType)):
                    raise ValueError(
                        f"expected the {name} items of a prompt as a list, got "
                        f"{type(items).__name__}"
                    )
        return [
            self._one(prompt, {name: lists[i] or () for name, lists in given.items()})
            for i, prompt in enumerate(prompts)
        ]

    def text(self, text: str, media: Mapping[str, Sequence] = _NOTHING, *, bos=True) -> Prompt:
        """A text with its items: name of a modality -> items in the order of its markers."""
        if self.tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer; give one, or token ids")
        if not text:
            raise ValueError("the prompt is empty; give at least one character")
        bos = bos and self.tokenizer.add_bos
        return build_prompt(self.tokenizer, text, self.modalities, media, bos=bos)

    def chat(self, messages: Messages) -> Prompt:
        """A conversation that the model is to go on with, in the format of its checkpoint."""
        if self.tokenizer is None:
            raise ValueError("chat messages need a tokenizer; give one, or token ids")
        text = render_chat(self.tokenizer, messages, media=self.markers)
        bos, media = chat_bos(self.tokenizer), self.media_of(messages)
        return build_prompt(self.tokenizer, text, self.modalities, media, bos=bos)

    @property
    def markers(self) -> Mapping[str, str]:
        """Type of an item in a message -> what marks its place in the text."""
        # Those that the model cannot read as well: they are refused with its reason later.
        return {**GEMMA3N_MEDIA, **GEMMA3_MEDIA, **{m.name: m.marker for m in self.modalities}}

    def media_of(self, messages: Messages) -> Mapping[str, Sequence]:
        """The items in messages: name of a modality -> items in the order of its markers."""
        return {name: items_of(messages, name) for name in self.markers}

    def _one(self, prompt: object, media: Mapping[str, Sequence]) -> Prompt:
        if isinstance(prompt, str):
            return self.text(prompt, media)
        if given := [name for name, items in media.items() if len(items)]:
            raise ValueError(
                f"{given[0]} items go with a text; messages and Prompts hold their own"
            )
        if isinstance(prompt, Prompt):
            return prompt
        if is_chat(prompt):
            return self.chat(prompt)
        if is_content(prompt):
            return self.chat([{"role": "user", "content": prompt}])
        if not is_token_ids(prompt):
            raise ValueError(
                "expected a text, a list of token ids, chat messages, a list of texts and media, "
                f"or a Prompt, got {prompt!r:.80}"
            )
        return Prompt([int(i) for i in prompt])


def encode_prompt(
    model: Gemma, prompt: Prompt, modalities: Sequence[Modality] | None = None
) -> list[jax.Array]:
    """Soft tokens `[T, D]` of each run of placeholders in a prompt, in the order of the text.

    One run at a time: a program is compiled once, and memory is bounded by one item.

    Args:
      modalities: With which the prompt was made; by default the model's.

    Raises:
      ValueError: Another number of placeholders than of soft tokens.
    """
    if prompt.soft is not None:
        return list(prompt.soft)
    modalities = modalities_of(model.cfg) if modalities is None else modalities
    check_media(prompt.media, modalities)
    ids, runs = np.array(prompt.token_ids), []
    for modality in modalities:
        inputs = prompt.media.get(modality.name, ())
        soft = [modality.encode(model, np.asarray(one)[None])[0] for one in inputs]
        places = np.flatnonzero(ids == modality.placeholder)
        ends = np.cumsum([len(one) for one in soft], dtype=int)
        check_places(len(places), ends[-1] if len(ends) else 0)
        runs += [(places[end - len(one)], one) for end, one in zip(ends, soft) if len(one)]
    return [one for _, one in sorted(runs, key=lambda run: run[0])]
