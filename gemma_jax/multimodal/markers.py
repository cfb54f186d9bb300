"""Markers in a text, `<start_of_...>`, become runs of placeholders."""

import re
from collections.abc import Mapping, Sequence

from gemma_jax.multimodal.modality import Item, Modality
from gemma_jax.text import Tokenizer
from gemma_jax.text.chat import BOS


def place_markers(text: str, modality: Modality, count: int) -> str:
    """`text` with one marker per item: its own, or `count` of them in front.

    Raises:
      ValueError: The text has markers of its own, but another number; or a placeholder.
    """
    items, marker, placeholder = modality.items, modality.marker, modality.placeholder_text
    if placeholder is not None and placeholder in text:
        raise ValueError(
            f"the text holds {placeholder}, which belongs to runs of soft tokens; mark {items} "
            f"by {marker}"
        )
    found = text.count(marker)
    if found == count:
        return text
    if found:
        raise ValueError(
            f"places for {items} in the text ({marker}): {found}, {items} given: {count}; "
            f"give as many {items} as places"
        )
    start = BOS if text.startswith(BOS) else ""
    return start + marker * count + text.removeprefix(start)


def expand_markers(
    tokenizer: Tokenizer,
    marked: str,
    modalities: Sequence[Modality],
    items: Mapping[str, Sequence[Item]],
    *,
    bos: bool = True,
) -> list[int]:
    """Ids of a text with one marker per item, with room for the soft tokens of each.

    What stands between two runs is tokenised as one text. The ids of a run come from its modality:
    a `tokenizer.model` need have no piece for them.

    Args:
      items: Name of a modality -> items in the order of its markers.
    """
    if not modalities:
        return tokenizer.encode(marked, bos=bos)
    by_marker = {modality.marker: modality for modality in modalities}
    texts = {m.marker: iter([item.text for item in items[m.name]]) for m in modalities}
    counts = {
        m.marker: iter([n for item in items[m.name] for n in item.num_tokens]) for m in modalities
    }
    markers = "|".join(map(re.escape, by_marker))
    text = re.sub(markers, lambda match: next(texts[match[0]]), marked)
    head, *tail = re.split(f"({markers})", text)
    ids = tokenizer.encode(head, bos=bos)
    for marker, part in zip(tail[::2], tail[1::2]):
        modality = by_marker[marker]
        ids += [modality.begin, *[modality.placeholder] * next(counts[marker]), modality.end]
        ids += tokenizer.encode(part)
    return ids
