"""A trained vocabulary of a few hundred pieces, with the markers of Gemma 3."""

from gemma_jax.text.train_vocabulary import train_vocabulary

TEXT = "Räksmörgås: the capital of France is Paris.\n"
MARKERS = ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"]


def train(size: int = 320, text: str = TEXT) -> bytes:
    """The content of a `tokenizer.model`; 256 of its pieces are single bytes."""
    lines, symbols = text.splitlines(keepends=True) * 3, [*MARKERS, "\n", "Yes", "No"]
    return train_vocabulary(lines, size, symbols, hard_vocab_limit=False)
