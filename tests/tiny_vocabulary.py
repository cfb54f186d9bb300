"""A trained vocabulary of a few hundred pieces, with the markers of Gemma 3."""

from collections.abc import Sequence
from pathlib import Path

from gemma_jax.text import Tokenizer
from gemma_jax.text.tokenizer_config import TokenizerConfig
from gemma_jax.text.train_vocabulary import train_vocabulary

TEXT = "Räksmörgås: the capital of France is Paris.\n"
MARKERS = ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"]


def train(size: int = 320, text: str = TEXT) -> bytes:
    """The content of a `tokenizer.model`; 256 of its pieces are single bytes."""
    lines, symbols = text.splitlines(keepends=True) * 3, [*MARKERS, "\n", "Yes", "No"]
    return train_vocabulary(lines, size, symbols, hard_vocab_limit=False)


def marked(folder: Path, markers: Sequence[str], specials: Sequence[str] = ()) -> Tokenizer:
    """A tokenizer with further markers, of which some are special tokens."""
    symbols = [*MARKERS, *markers, "\n", "Yes", "No"]
    lines, path = TEXT.splitlines(keepends=True) * 3, folder / "tokenizer.model"
    path.write_bytes(train_vocabulary(lines, 340, symbols, hard_vocab_limit=False))
    return Tokenizer.from_file(path, TokenizerConfig(specials=tuple(specials)))
