"""Gemma 3's own 262,144 pieces: ids of the published tokenizer, from all three files."""

import json
import time

import pytest
import tokenizers
from hypothesis import given, settings
from text_samples import DATA, TEXTS, patient

from gemma_jax.text import Tokenizer, encode_chat, gguf_header, sentencepiece_proto

STORED = json.loads((DATA / "tokenizer.json").read_text(encoding="utf-8"))
CHATS = json.loads((DATA / "chat.json").read_text(encoding="utf-8"))["chats"]


@pytest.fixture(scope="module")
def theirs(real_json):
    return tokenizers.Tokenizer.from_str(real_json)


@pytest.fixture(scope="module", params=["gguf", "json", "model"])
def each(request, real, real_gguf, tmp_path_factory):
    if request.param == "gguf":
        return real
    path = tmp_path_factory.mktemp("real") / f"tokenizer.{request.param}"
    if request.param == "json":
        path.write_text(request.getfixturevalue("real_json"), encoding="utf-8")
    else:
        vocab = gguf_header.read_vocabulary(gguf_header.read_header(real_gguf))
        path.write_bytes(sentencepiece_proto.write_model(vocab))
    return Tokenizer.from_file(path)


def test_stored_ids(each):
    assert each.vocab_size == STORED["vocab_size"]
    for stored in STORED["strings"]:
        ids = each.encode(stored["text"])
        assert ids == stored["ids"]
        assert each.pieces(ids) == stored["pieces"]
        assert each.decode(ids) == stored["decoded"]
        assert each.decode(ids, skip_special=True) == stored["decoded_skip_special"]


def test_stored_specials(each):
    names = {name: STORED["special"][name] for name in STORED["special"]}
    assert {name: each.id_of(f"<{name}>") for name in names} == names
    assert {name: each.special_ids[f"<{name}>"] for name in names} == names
    assert each.stop_ids == (1, 106)


@pytest.mark.parametrize("stored", CHATS)
def test_stored_chats(real, stored):
    prompt = stored["add_generation_prompt"]
    assert encode_chat(real, stored["messages"], add_generation_prompt=prompt) == stored["ids"]


def test_runs_of_spaces(each):
    ids = each.encode(" " * 32 + "return")
    assert each.pieces(ids) == ["\u2581" * 31, "\u2581return"]


@settings(patient, max_examples=300)
@given(text=TEXTS)
def test_random_texts_as_hugging_face(real, theirs, text):
    ids = real.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False).ids
    assert real.decode(ids) == text.replace("\u2581", " ")
    assert real.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


@settings(patient, max_examples=200)
@given(text=TEXTS)
def test_random_texts_from_each_file(each, real, text):
    for parse_special in (True, False):
        ids = real.encode(text, parse_special=parse_special)
        assert each.encode(text, parse_special=parse_special) == ids


def test_loads_fast(real_gguf):
    """0.35 s where it was written; the bound catches a return to seconds, not a busy machine."""
    start = time.process_time()
    Tokenizer.from_file(real_gguf)
    assert time.process_time() - start < 2
