"""What one pass reads: tokens, where they stand, and what takes the place of some of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.soft_tokens import SoftTokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Inputs of one pass over `T` new tokens per row; `Batch(tokens_BT)` is plain text.

    Attributes:
      tokens_BT: int32 ids in `[0, V)`; the placeholders of soft tokens may lie beyond.
      positions_BT: int32, ascending along each row, -1 for padding on either side. Masks are made
        from them. Default: every token is real and follows on what the cache holds.
      rope_positions_BT: Positions for the rotary embedding if they are not `positions_BT`. Default
        for packed documents: counted from the first token of each.
      documents_BT: int32, ascending along each row: the number of the document that a token belongs
        to, for several texts packed in one row. No token sees another document. For passes without
        a cache.
      soft: Embeddings in the place of some tokens. A pass holds a bidirectional block whole.
      ffn_widths_L: int32; feed-forward channels per layer: computes as a MatFormer slice of these
        widths would, with one program for all widths. All channels are still computed, then masked:
        use it for training and for searching slices; for speed use `matformer.at`.

    Examples:
      >>> import numpy as np
      >>> Batch(np.array([[2, 5, 7]]), np.array([[0, 1, 2]])).tokens_BT.shape
      (1, 3)
    """

    tokens_BT: jax.Array
    positions_BT: jax.Array | None = None
    rope_positions_BT: jax.Array | None = None
    documents_BT: jax.Array | None = None
    soft: SoftTokens | None = None
    ffn_widths_L: jax.Array | None = None

    @classmethod
    def of(cls, tokens: "Batch | jax.typing.ArrayLike | Sequence[Sequence[int]]") -> "Batch":
        """A batch as it is; token ids `[B, T]`, an array or lists, as a batch of plain text.

        Raises:
          ValueError: Anything else, such as text or a single row of ids.
        """
        batch = tokens if isinstance(tokens, Batch) else cls(tokens)
        batch = replace(batch, tokens_BT=token_array(batch.tokens_BT))
        if isinstance(batch.ffn_widths_L, Sequence):
            batch = replace(batch, ffn_widths_L=np.array(batch.ffn_widths_L))
        if len(shape := batch.tokens_BT.shape) != 2:
            raise ValueError(
                f"tokens must be [B, T], one row of ids per text, got shape {list(shape)}; put a "
                "single text into a list: [ids]"
            )
        return batch

    @classmethod
    def padded(
        cls,
        rows: Sequence[Sequence[int]],
        width: int,
        *,
        count: int | None = None,
        starts: Sequence[int] | None = None,
    ) -> "Batch":
        """Rows of different lengths, padded on the right, in NumPy arrays.

        Args:
          width: Tokens of the batch T, as many as the longest row at least.
          count: Rows of the batch B; the last ones are empty. Default: as many as are given.
          starts: Position of each row's first token. Default: 0.

        Examples:
          >>> Batch.padded([[2, 5], [2]], 3, starts=[0, 7]).positions_BT.tolist()
          [[0, 1, -1], [7, -1, -1]]
        """
        tokens_BT = np.zeros((len(rows) if count is None else count, width), np.int32)
        positions_BT = np.full_like(tokens_BT, -1)
        for i, row in enumerate(rows):
            start = 0 if starts is None else starts[i]
            tokens_BT[i, : len(row)] = row
            positions_BT[i, : len(row)] = np.arange(start, start + len(row))
        return cls(tokens_BT, positions_BT)

    def check(self, cfg: GemmaConfig) -> None:
        """Refuses what can be seen to be wrong without waiting for a device.

        Ids are looked at in NumPy arrays of plain text without positions, where every token is
        real; widths in NumPy arrays; shapes always.

        Raises:
          ValueError: Ids that the model has no row for, widths that it does not have, or a text
            longer than its context.
        """
        plain = self.positions_BT is None and self.soft is None
        count, most = self.tokens_BT.shape[1], cfg.max_positions
        if self.positions_BT is None and self.documents_BT is None and count > most:
            raise ValueError(
                f"{count} tokens do not fit the model's context of {most}; shorten the text, or "
                f"load the model with config=lambda cfg: replace(cfg, max_positions={count})"
            )
        if plain and isinstance(self.tokens_BT, np.ndarray):
            _check_ids(self.tokens_BT, cfg)
        if self.ffn_widths_L is None:
            return
        d_ffs, shape = [spec.d_ff for spec in cfg.layers], np.shape(self.ffn_widths_L)
        if shape != (len(d_ffs),):
            raise ValueError(
                f"ffn_widths_L of shape {list(shape)} for {len(d_ffs)} layers; give one width each"
            )
        if isinstance(self.ffn_widths_L, np.ndarray):
            for layer, (width, d_ff) in enumerate(zip(self.ffn_widths_L.tolist(), d_ffs)):
                if not 1 <= width <= d_ff:
                    raise ValueError(f"width {width} of layer {layer} must lie in [1, {d_ff}]")


def power_of_two(n: int) -> int:
    """`n` rounded up to 1, 2, 4, 8, ...: shapes that repeat are compiled once."""
    return 1 << (n - 1).bit_length()


def token_array(tokens: object) -> jax.Array:
    """Token ids as an array of integers: arrays as they are, nested lists as a new one.

    Raises:
      ValueError: Text, rows of different lengths, or numbers that are no integers.
    """
    if _holds_text(tokens):
        raise ValueError(
            "expected token ids, got text; encode it first: tok.encode(text, bos=True)"
        )
    if not hasattr(tokens, "shape"):
        traced = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tokens))
        try:
            tokens = jnp.asarray(tokens) if traced else np.asarray(tokens)
        except (ValueError, TypeError):
            raise ValueError(
                "expected an array of token ids, got rows of different lengths or no numbers; "
                "pad shorter rows and say so in Batch.positions_BT"
            ) from None
    if not tokens.size:  # an empty list says nothing of its numbers
        return tokens.astype(np.int32)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"token ids must be integers, got {tokens.dtype} {list(tokens.shape)}")
    return tokens


def _holds_text(tokens: object) -> bool:
    while isinstance(tokens, (list, tuple)) and tokens:
        tokens = tokens[0]
    return isinstance(tokens, (str, bytes))


def _check_ids(tokens_BT: np.ndarray, cfg: GemmaConfig) -> None:
    """Every id is a row of the table, or of one for another modality."""
    known = (tokens_BT >= 0) & (tokens_BT < cfg.vocab_size)
    for ids in cfg.modality_vocabularies:
        known |= (tokens_BT >= ids.first_id) & (tokens_BT < ids.first_id + ids.vocab_size)
    if not known.all():
        raise ValueError(
            f"token id {tokens_BT[~known][0]} lies outside [0, {cfg.vocab_size}), the model's "
            "vocabulary"
        )
