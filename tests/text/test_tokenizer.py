"""One vocabulary in three files gives the same ids; encode and decode keep their promises."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from text_samples import TEXTS, patient

from gemma_jax.text import Tokenizer, sentencepiece_proto
from gemma_jax.text.vocabulary import Kind, Vocabulary


@pytest.fixture(scope="module")
def all_three(tiny):
    return [Tokenizer.from_file(path) for path in (tiny.model, tiny.json, tiny.gguf)]


@pytest.fixture(scope="module")
def theirs(tiny):
    return tokenizers.Tokenizer.from_file(str(tiny.json))


@patient
@given(text=TEXTS, parse_special=st.booleans())
def test_three_files_give_the_same_ids(all_three, text, parse_special):
    expected, *others = [t.encode(text, parse_special=parse_special) for t in all_three]
    assert all(ids == expected for ids in others)
    for tokenizer in all_three:
        assert tokenizer.decode(expected) == text.replace("\u2581", " ")
        assert tokenizer.pieces(expected) == all_three[0].pieces(expected)


@patient
@given(text=TEXTS)
def test_ids_are_those_of_hugging_face(all_three, theirs, text):
    expected = theirs.encode(text, add_special_tokens=False).ids
    assert all_three[0].encode(text) == expected
    assert all_three[0].decode(expected) == theirs.decode(expected, skip_special_tokens=False)
    stripped = theirs.decode(expected, skip_special_tokens=True)
    assert all_three[0].decode(expected, skip_special=True) == stripped


def test_merges_count_not_ids(tiny, all_three):
    """A tokenizer.json whose ids are shuffled splits text as before."""
    root = json.loads(tiny.json.read_text(encoding="utf-8"))
    vocab, text = root["model"]["vocab"], "The quick brown fox returns the numbers  of the würfel."
    normal = [p for p, k in zip(tiny.table[0], tiny.table[2], strict=True) if k == Kind.NORMAL]
    shuffled = random.Random(0).sample(normal, len(normal))
    vocab |= dict(zip(shuffled, [vocab[piece] for piece in normal], strict=True))
    ours, other = all_three[0], Tokenizer.from_hf_json(json.dumps(root))
    assert other.encode(text) != ours.encode(text)
    assert other.pieces(other.encode(text)) == ours.pieces(ours.encode(text))


def test_merges_as_strings(tiny, all_three):
    root = json.loads(tiny.json.read_text(encoding="utf-8"))
    root["model"]["merges"] = [" ".join(merge) for merge in root["model"]["merges"]]
    text = "Tokenizers turn the text of a user\n\n\n  into numbers"
    assert Tokenizer.from_hf_json(json.dumps(root)).encode(text) == all_three[0].encode(text)


def test_ids_and_names(all_three):
    for t in all_three:
        assert (t.pad_id, t.eos_id, t.bos_id, t.unk_id) == (0, 1, 2, 3)
        assert t.stop_ids == (1, t.id_of("<end_of_turn>"))
        assert t.special_ids == all_three[0].special_ids
        assert t.vocab_size == all_three[0].vocab_size
        assert t.pieces([2, t.id_of("\u2581the")]) == ["<bos>", "\u2581the"]
        with pytest.raises(ValueError, match="no piece 'nonesuch'"):
            t.id_of("nonesuch")


@pytest.mark.parametrize("text", ["", "the dog", "<bos>", "<bos>the dog", "<eos><bos>"])
def test_bos_exactly_once(tokenizer, text):
    ids = tokenizer.encode(text, bos=True)
    assert ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.bos_id) == (2 if text == "<eos><bos>" else 1)


def test_specials_as_plain_text(tokenizer):
    text = "<bos><start_of_turn>user<end_of_turn>"
    plain = tokenizer.encode(text, parse_special=False)
    assert not set(plain) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(plain) == tokenizer.decode(plain, skip_special=True) == text
    assert tokenizer.encode(text, bos=True, parse_special=False) == [tokenizer.bos_id, *plain]
    # What is no marker of the prompt stays one piece.
    assert len(tokenizer.encode("<table>", parse_special=False)) == 1


def test_runs_are_matched_greedily(tokenizer):
    ids = tokenizer.encode(" " * 32 + "the" + "\n" * 33)
    assert tokenizer.pieces(ids) == ["\u2581" * 31, "\u2581the", "\n" * 31, "\n\n"]


def test_literal_marks_beside_spaces(all_three, theirs):
    """A run of U+2581 in the text is a piece of its own; a single one is a space like others."""
    for text, pieces in {
        "\u2581\u2581  \n": ["\u2581\u2581", "\u2581\u2581", "\n"],
        " \u2581\n": ["\u2581\u2581", "\n"],
        "\u2581the": ["\u2581the"],
    }.items():
        assert theirs.encode(text, add_special_tokens=False).tokens == pieces
        for tokenizer in all_three:
            assert tokenizer.pieces(tokenizer.encode(text)) == pieces


@patient
@given(st.data())
def test_decoding_any_ids_is_sentencepieces_decoding(tokenizer, data):
    """Also where bytes are no UTF-8: one U+FFFD per byte.

    Special ids are left out first, as Hugging Face does it; sentencepiece ends a character there.
    """
    limit = tokenizer.vocab_size - 1
    first = tokenizer.id_of("<0x00>")
    ids = st.one_of(st.integers(0, limit), st.integers(first + 0x7F, first + 0xFF))
    ids = [i for i in data.draw(st.lists(ids, max_size=12)) if i != tokenizer.unk_id]
    kept = [i for i in ids if i not in tokenizer._skipped]
    assert tokenizer.decode(ids, skip_special=True) == tokenizer._engine.decode(kept)


def test_decode_takes_arrays_and_refuses_strangers(tokenizer):
    ids = tokenizer.encode("the lazy dog")
    assert tokenizer.decode(np.array(ids, np.int32)) == "the lazy dog"
    for bad in (-1, 1 << 40):
        for function in (tokenizer.decode, tokenizer.pieces):
            with pytest.raises(ValueError, match=rf"expected ids of 0\.\.2147483647, got {bad}"):
                function([*ids, bad])
    with pytest.raises(TypeError):
        tokenizer.decode([1.5])


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff"])
def test_lone_surrogates_are_refused(tokenizer, text):
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode(text)


@patient
@given(st.lists(st.binary(min_size=1, max_size=400), unique=True, max_size=5))
def test_the_model_message_reads_back(extra):
    """Short and long pieces, holes aside: what is written is what is read."""
    extra = [piece.hex().encode() for piece in extra]
    pieces = [b"<pad>", b"<eos>", b"<bos>", b"<unk>", *extra]
    kinds = [3, 3, 3, 2, *[Kind.NORMAL] * len(extra)]
    vocab = Vocabulary.build(pieces, np.linspace(-7, 3, len(pieces)), kinds)
    again = sentencepiece_proto.read_model(sentencepiece_proto.write_model(vocab))
    assert (again.pieces, again.kinds) == (vocab.pieces, vocab.kinds)
    np.testing.assert_array_equal(again.scores, vocab.scores)


def test_holes_between_ids(tiny):
    root = json.loads(tiny.json.read_text(encoding="utf-8"))
    size = len(root["model"]["vocab"])
    root["added_tokens"].append({"id": size + 9, "content": "<audio_soft_token>", "special": True})
    tokenizer = Tokenizer.from_hf_json(json.dumps(root))
    assert tokenizer.vocab_size == size + 10
    assert tokenizer.encode("<audio_soft_token>") == [size + 9]
    assert tokenizer.decode([size, size + 9]) == "<audio_soft_token>"


def test_an_id_without_a_piece_is_no_text(tokenizer):
    """As transformers 5.24 decodes rows of an embedding beyond the vocabulary: to nothing."""
    ids = tokenizer.encode("the dog")
    beyond = [tokenizer.vocab_size, tokenizer.vocab_size + 99]
    assert tokenizer.decode([*beyond, *ids, *beyond]) == "the dog"
    assert tokenizer.pieces(beyond) == ["", ""]


def test_from_folder(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json or tokenizer\.model"):
        Tokenizer.from_folder(tmp_path)
    for path in (tiny.model, tiny.json):
        (tmp_path / path.name).write_bytes(path.read_bytes())
        assert Tokenizer.from_folder(tmp_path).encode("the dog") != []


def test_needs_no_jax():
    code = "import sys, gemma_jax.text; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
