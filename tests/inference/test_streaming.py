"""Text as it comes: the pieces of `stream`, and what leaving early does."""

import gc
import inspect
import threading
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from words import Words

from gemma_jax import Prompt, Session, generate, stream

CFG = tiny.gemma3(2, every=2)


@pytest.fixture(scope="module")
def model():
    return tiny.model(CFG, "unrolled")


@pytest.fixture(scope="module")
def words():
    return Words(CFG.vocab_size)


TEXT = "w5 w6 w7"
OPTIONS = dict(max_new_tokens=12, stop_ids=[])


def test_pieces_are_the_text_of_generate(model, words):
    more = dict(temperature=0.9, seed=5)
    whole = generate(model, words, TEXT, **OPTIONS, **more)
    seen = []
    generate(model, words, TEXT, on_text=lambda row, text: seen.append(text), **OPTIONS, **more)
    text = stream(model, words, TEXT, **OPTIONS, **more)
    pieces = list(text)
    assert "".join(pieces) == "".join(seen) == whole.text and len(pieces) > 1
    assert all(pieces)
    assert text.completion.text == whole.text
    assert text.completion.token_ids == whole.token_ids
    assert text.completion.prompt_token_ids == whole.prompt_token_ids
    assert text.completion.finish_reason == "length"
    np.testing.assert_allclose(text.completion.log_probs, whole.log_probs, atol=1e-5)
    assert list(text) == []  # it is over


def test_a_stop_text_ends_it(model, words):
    free = "".join(stream(model, words, TEXT, temperature=0.9, seed=5, **OPTIONS))
    stop = " ".join(free.split()[4:6])
    text = stream(model, words, TEXT, temperature=0.9, seed=5, stop=[stop], **OPTIONS)
    assert "".join(text) == free[: free.index(stop)] != ""
    assert text.completion.finish_reason == "stop"


@pytest.mark.parametrize("form", ["ids", "prompt", "messages"])
def test_every_form_of_one_prompt(model, words, form):
    ids = words.encode(TEXT, bos=True)
    chat = [{"role": "user", "content": "w5"}]
    one = {"ids": ids, "prompt": Prompt(ids), "messages": chat}[form]
    whole = generate(model, words, [one], **OPTIONS)[0]
    assert "".join(stream(model, words, one, **OPTIONS)) == whole.text


class Letters(Words):
    """Tokens 50 to 53 spell "é" and "漢" byte by byte, the others nothing."""

    def decode_bytes(self, ids, *, skip_special=False):
        spelled = dict(zip(range(50, 55), (b"\xc3", b"\xa9", b"\xe6", b"\xbc", b"\xa2")))
        return b"".join(spelled.get(i, b"") for i in ids)


def test_pieces_are_whole_characters(model):
    def spell(logits_BV, text_BS):
        last_B = jnp.max(jnp.where(text_BS >= 49, text_BS, 49), axis=1)  # 50, 51, ...
        return jnp.where(jnp.arange(CFG.vocab_size) == last_B[:, None] + 1, 0.0, -jnp.inf)

    options = dict(max_new_tokens=5, logits_processors=spell)
    assert list(stream(model, Letters(CFG.vocab_size), [2, 5], **options)) == ["é", "漢"]
    cut = dict(options, max_new_tokens=4)  # in the middle of a character
    assert "".join(stream(model, Letters(CFG.vocab_size), [2, 5], **cut)) == "é\ufffd\ufffd"


def test_leaving_early_ends_the_generation_and_frees_the_cache(model, words, monkeypatch):
    calls, decode = [], Session.decode
    monkeypatch.setattr(Session, "decode", lambda *given: calls.append(None) or decode(*given))
    threads = threading.active_count()
    gc.collect()
    gc.disable()  # no circle holds the session
    try:
        text = stream(model, words, TEXT, max_new_tokens=400, stop_ids=[])
        session = weakref.ref(text._written.session)
        for piece in text:
            assert piece
            break
        made = len(calls)
        assert made == 1
        so_far = text.completion
        assert so_far.text.startswith(piece) and so_far.finish_reason == "unfinished"
        assert len(so_far.token_ids) == len(so_far.log_probs) < 400
        assert threading.active_count() == threads
        del text
        assert session() is None
        assert len(calls) == made
    finally:
        gc.enable()


def test_the_arguments_are_those_of_generate():
    ours, theirs = (inspect.signature(f).parameters for f in (stream, generate))
    assert list(ours) == [name for name in theirs if name != "on_text"]
    for name in ours.keys() - {"tokenizer", "prompt", "sampling", "seed"}:  # of one prompt
        assert ours[name] == theirs[name]


@pytest.mark.parametrize(
    "prompts", [["w1", "w2"], [[2, 5], [2, 6]], [Prompt([2, 5])], [np.array([2, 5])]]
)
def test_several_prompts_are_refused(model, words, prompts):
    with pytest.raises(ValueError, match="stream takes one prompt; for several, generate has on_t"):
        stream(model, words, prompts)


def test_other_mistakes(model, words):
    with pytest.raises(ValueError, match="a stream of text needs a tokenizer"):
        stream(model, None, [2, 5])
    with pytest.raises(
        TypeError, match="stream has no argument 'max_tokens'; did you mean max_new"
    ):
        stream(model, words, TEXT, max_tokens=5)
    with pytest.raises(
        ValueError, match="the prompt is empty"
    ):  # at the call, not at the first piece
        stream(model, words, "")
