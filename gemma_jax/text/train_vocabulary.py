"""Trains small vocabularies of Gemma's kind: byte-pair merges of raw text, and 256 bytes."""

import io
from collections.abc import Iterable, Sequence
from typing import Any

import sentencepiece


def train_vocabulary(
    lines: Iterable[str], size: int, symbols: Sequence[str] = (), **options: Any
) -> bytes:
    """Trains a vocabulary with SentencePiece.

    Text is taken as it is: no normalisation, no space in front, and bytes for what has no piece.

    Args:
      lines: The text to learn from.
      size: Pieces, the bytes and the four of control (0 to 3, as Gemma has them) included.
      symbols: Pieces that are never split, nor learned.
      options: Others of `SentencePieceTrainer`.

    Returns:
      The content of a `tokenizer.model`.

    Examples:
      >>> from gemma_jax.text import Tokenizer
      >>> data = train_vocabulary(["one two"] * 3, 300, ["<image>"], hard_vocab_limit=False)
      >>> tokenizer = Tokenizer.from_sentencepiece_bytes(data)
      >>> tokenizer.bos_id, tokenizer.encode("<image>")
      (2, [4])
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=list(symbols),
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "minloglevel": 2},
        **{"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "unk_piece": "<unk>"},
        **options,
    )
    return model.getvalue()
