"""Where soft tokens go in a text, and who sees whom there.

Local letters: I items that soft tokens come in.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from gemma_jax.decoder.model import Gemma
from gemma_jax.decoder.soft_tokens import SoftTokens
from gemma_jax.multimodal.modality import Modality, check_media, modalities_of


def soft_tokens(
    model: Gemma, tokens_BT: jax.Array, inputs: jax.Array | Mapping[str, jax.Array]
) -> SoftTokens:
    """Soft tokens for the placeholders in `tokens_BT`, in order, row by row; differentiable.

    Args:
      tokens_BT: int32 ids; every item has its run of placeholders.
      inputs: Name of a modality -> what its encoder reads, `[I, ...]` (`Clips` of `encode.py` for
        sounds of different lengths); or the array alone for the first of the model (float `[I, 3,
        size, size]` in [-1, 1] for Gemma 3).
    """
    modalities = modalities_of(model.cfg)
    if not isinstance(inputs, Mapping):
        inputs = {modalities[0].name if modalities else "soft token": inputs}
    check_media(inputs, modalities)
    if not inputs:
        raise ValueError("no inputs given; a text alone needs no soft tokens")
    used = [modality for modality in modalities if modality.name in inputs]
    return place(tokens_BT, used, [m.encode(model, inputs[m.name]) for m in used])


def place(
    tokens_BT: jax.Array, modalities: Sequence[Modality], encoded: Sequence[jax.Array]
) -> SoftTokens:
    """Puts soft tokens `[I, T, D]` of each of these modalities where their placeholders are."""
    embeddings_ITD = joined(encoded)
    counts, width = [len(soft_ITD) for soft_ITD in encoded], embeddings_ITD.shape[1]
    index_BT, block_BT = locate_all(tokens_BT, modalities, counts, width)
    return SoftTokens(embeddings_ITD=embeddings_ITD, index_BT=index_BT, block_BT=block_BT)


def joined(encoded: Sequence[jax.Array]) -> jax.Array:
    """Soft tokens `[I, T, D]` of several modalities, one after the other, all as wide as the widest
    of them."""
    width = max(soft_ITD.shape[1] for soft_ITD in encoded)
    same = [jnp.pad(a, ((0, 0), (0, width - a.shape[1]), (0, 0))) for a in encoded]
    return jnp.concatenate(same) if len(same) > 1 else encoded[0]


def locate_all(
    tokens_BT: jax.Array, modalities: Sequence[Modality], counts: Sequence[int], width: int
) -> tuple[jax.Array, jax.Array | None]:
    """`index_BT` and `block_BT` of `SoftTokens` for several modalities, `joined`.

    Args:
      counts: Items of each.
      width: Soft tokens that each item takes in the row of all.
    """
    index_BT = jnp.full(tokens_BT.shape, -1, jnp.int32)
    block_BT = jnp.zeros(tokens_BT.shape, jnp.int32)
    first = 0
    for modality, count in zip(modalities, counts):
        item_BT, offset_BT = _items(tokens_BT, modality)
        is_soft_BT, item_BT = item_BT >= 0, item_BT + first
        index_BT = jnp.where(is_soft_BT, item_BT * width + offset_BT, index_BT)
        if modality.bidirectional:
            block_BT = jnp.where(is_soft_BT, item_BT + 1, block_BT)
        first += count
    return index_BT, block_BT if any(modality.bidirectional for modality in modalities) else None


def locate(tokens_BT: jax.Array, modality: Modality) -> tuple[jax.Array, jax.Array | None]:
    """`index_BT` and `block_BT` of `SoftTokens` for one modality with a fixed number of tokens."""
    item_BT, offset_BT = _items(tokens_BT, modality)
    index_BT = jnp.where(item_BT >= 0, item_BT * modality.tokens_per_item + offset_BT, -1)
    block_BT = jnp.where(item_BT >= 0, item_BT + 1, 0) if modality.bidirectional else None
    return index_BT, block_BT


def runs(is_soft_BT: jax.Array) -> jax.Array:
    """int32 `[B, T]`: each run of True in a row is one block, numbered from 1; 0 elsewhere.

    How transformers finds blocks in `token_type_ids` (hf `get_block_sequence_ids_for_mask`).
    """
    is_soft_BT = jnp.asarray(is_soft_BT)
    return jnp.where(is_soft_BT, jnp.cumsum(_starts(is_soft_BT), axis=1), 0).astype(jnp.int32)


def check_places(places: int, given: int) -> None:
    """Raises `ValueError` if there are not as many soft tokens as places for them."""
    if places != given:
        raise ValueError(
            f"{places} placeholders of soft tokens in the prompt, {given} soft tokens given; "
            "every item needs its run of placeholders"
        )


def _items(tokens_BT: jax.Array, modality: Modality) -> tuple[jax.Array, jax.Array]:
    """Number of the item at each place through all rows, -1 in text; and the place inside it."""
    is_soft_BT = jnp.asarray(tokens_BT) == modality.placeholder
    count_BT = jnp.cumsum(is_soft_BT.ravel()).reshape(is_soft_BT.shape) - 1
    if (size := modality.tokens_per_item) is not None:
        item_BT, offset_BT = count_BT // size, count_BT % size
    else:  # runs are apart: each has its begin and its end
        starts_BT = _starts(is_soft_BT)
        item_BT = jnp.cumsum(starts_BT.ravel()).reshape(starts_BT.shape) - 1
        begun = jax.lax.cummax(jnp.where(starts_BT, count_BT, 0).ravel())
        offset_BT = count_BT - begun.reshape(starts_BT.shape)
    item_BT = jnp.where(is_soft_BT, item_BT, -1).astype(jnp.int32)
    return item_BT, jnp.where(is_soft_BT, offset_BT, 0).astype(jnp.int32)


def _starts(is_soft_BT: jax.Array) -> jax.Array:
    """Where a run begins."""
    return is_soft_BT & ~jnp.pad(is_soft_BT[:, :-1], ((0, 0), (1, 0)))
