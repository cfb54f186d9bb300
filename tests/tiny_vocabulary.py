"""A trained vocabulary of a few hundred pieces, with the markers of Gemma 3."""

import io

import sentencepiece

TEXT = "Räksmörgås: the capital of France is Paris.\n"
MARKERS = ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"]


def train(size: int = 320, text: str = TEXT) -> bytes:
    """The content of a `tokenizer.model`; 256 of its pieces are single bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines(keepends=True) * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=[*MARKERS, "\n", "Yes", "No"],
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "minloglevel": 2},
        **{"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "unk_piece": "<unk>"},
    )
    return model.getvalue()
