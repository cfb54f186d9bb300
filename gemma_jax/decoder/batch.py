"""What one pass reads: tokens, where they stand, and what takes the place of some of them."""

from dataclasses import dataclass

import jax

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
    def of(cls, tokens: "Batch | jax.Array") -> "Batch":
        """A batch as it is; token ids `[B, T]` as a batch of plain text."""
        return tokens if isinstance(tokens, Batch) else cls(tokens)
