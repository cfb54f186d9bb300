"""What prompts, prefill and decoder know of a kind of input beside text: one `Modality`.

A part of a `GemmaConfig` (`cfg.vision`, say) says by its type which modality it is of:
`modality_of` is told so once for each type, and `modalities_of` looks through a config.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch

import jax
import numpy as np

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.model import Gemma


@dataclass(frozen=True)
class Item:
    """What one item of a modality becomes in a prompt.

    Attributes:
      text: What stands in the place of its marker. Each marker in it is one run of soft tokens.
      num_tokens: Soft tokens of each run.
      inputs: What the encoder reads for each run.
    """

    text: str
    num_tokens: Sequence[int]
    inputs: Sequence[np.ndarray] = ()


@dataclass(frozen=True)
class Modality:
    """Says how inputs of one kind enter a text.

    Attributes:
      name: As in chat messages, `{"type": name, name: ...}`, and in `Prompt.media`.
      items: What several of them are called, for messages.
      marker: Text that says where an item goes.
      placeholder: Id of the tokens whose place its soft tokens take; may lie beyond the vocabulary.
      begin, end: Ids before and after each run of placeholders.
      tokens_per_item: Soft tokens of each run; `None` if `Item.num_tokens` says so for each.
      bidirectional: Whether the soft tokens of a run see each other both ways. If not, the mask
        stays causal, and a prompt may be read in pieces that end inside a run.
      prepare: From an item as users give it. Raises `ValueError` if it cannot be read.
      encode: From a model and the inputs of I runs, `[I, ...]`, to their soft tokens `[I, T, D]`;
        differentiable.
      placeholder_text: Text of a token that belongs to runs of soft tokens, refused in prompts;
        `None` where it is the marker itself.
    """

    name: str
    items: str
    marker: str
    placeholder: int
    begin: int
    end: int
    tokens_per_item: int | None
    bidirectional: bool
    prepare: Callable[[object], Item]
    encode: Callable[[Gemma, jax.Array], jax.Array]
    placeholder_text: str | None = None


@singledispatch
def modality_of(config: object, **options: object) -> Modality | None:
    """The modality that a part of a config is of, by its type; `None` for all other parts.

    Args:
      **options: How to prepare items, for all modalities; each takes what it knows.
    """
    return None


def modalities_of(cfg: GemmaConfig, **options: object) -> tuple[Modality, ...]:
    """What a model reads beside text. For `options` see `modality_of`."""
    parts = (getattr(cfg, field.name) for field in dataclasses.fields(cfg))
    return tuple(found for part in parts if (found := modality_of(part, **options)) is not None)


def check_media(media: Mapping[str, Sequence], modalities: Sequence[Modality]) -> None:
    """Raises `ValueError` if there are items that a model of these modalities cannot read."""
    known = [modality.name for modality in modalities]
    for name, items in media.items():
        if len(items) and name not in known:
            reads = f"text and {', '.join(known)} alone" if known else "text alone"
            raise ValueError(f"this model reads {reads}; {name} needs one with an encoder for it")
