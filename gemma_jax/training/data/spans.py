"""From characters of a text to tokens of it."""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from gemma_jax.multimodal.modality import Item, Modality
from gemma_jax.text import Tokenizer

Span = tuple[int, int]


class TokenSizes:
    """How many bytes of a text each token spells."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._known: dict[int, int] = {}

    def __call__(self, ids: Iterable[int]) -> np.ndarray:
        known = self._known
        ids = list(ids)
        for i in ids:
            if i not in known:
                known[i] = len(self._tokenizer.decode_bytes([i]))
        return np.fromiter((known[i] for i in ids), np.int64, len(ids))


def grown(
    text: str,
    spans: Sequence[Span],
    modalities: Sequence[Modality],
    items: Mapping[str, list[Item]],
) -> tuple[str, list[Span]]:
    """A text with what its items put in the place of their markers, and its spans there."""
    if not any(items.values()):
        return text, list(spans)
    texts = {m.marker: iter([item.text for item in items[m.name]]) for m in modalities}
    markers = re.compile("|".join(re.escape(marker) for marker in texts))
    growth, whole, end = np.zeros(len(text) + 1, np.int64), [], 0
    for match in markers.finditer(text):
        written = next(texts[match[0]])
        growth[match.end()] += len(written) - len(match[0])
        whole += [text[end : match.start()], written]
        end = match.end()
    moved = np.arange(len(text) + 1) + np.cumsum(growth)
    return "".join([*whole, text[end:]]), [(int(moved[a]), int(moved[b])) for a, b in spans]


def tokens_inside(sizes: np.ndarray, text: str, spans: Sequence[Span]) -> np.ndarray:
    """bool: which tokens spell a character that lies in one of the spans.

    Args:
      sizes: Bytes of each token, which together spell the text.

    Raises:
      ValueError: They do not.
    """
    ends = np.cumsum(sizes)
    spelled = _bytes(text)
    if (total := int(ends[-1]) if len(ends) else 0) != spelled:
        raise ValueError(
            f"the tokens spell {total} bytes and the text has {spelled}, so which of them are "
            "trained cannot be told; the vocabulary has no piece for some of the text"
        )
    inside = np.zeros(len(ends), bool)
    for low, high in spans:
        first, last = _bytes(text[:low]), _bytes(text[:high])
        inside |= (ends - sizes < last) & (ends > first)
    return inside


def _bytes(text: str) -> int:
    """As tokens spell it: in pieces, U+2581 stands for a space."""
    return len(text.replace("\u2581", " ").encode())
