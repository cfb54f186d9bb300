"""Answers to what lm-eval asks, without lm-eval: BOS once, ids, texts that are written."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from words import Words

import gemma_jax as gj
from gemma_jax.evaluation.answerer import Answerer, GenerationSettings

GREEDY = {"until": [], "max_gen_toks": 6}


def requests(*args):
    return [SimpleNamespace(args=one) for one in args]


@pytest.fixture(scope="module")
def answerer():
    cfg = tiny.gemma3(3)
    return Answerer(tiny.model(cfg, "unrolled"), Words(cfg.vocab_size))


@pytest.fixture(scope="module")
def reader():
    """Of a real vocabulary, which no test asks for numbers."""
    model, tokenizer = gj.load("checkpoints/digits", modalities=("text",))
    return Answerer(model, tokenizer)


def test_bos_comes_once(answerer):
    assert answerer.encode("one two") == [2, 5, 6]
    assert answerer.encode("<bos> one two") == [2, 5, 6]
    assert answerer.encode_pair("", "one two") == ([2], [5, 6])
    assert answerer.encode_pair("", "<bos> one") == ([2], [5])
    assert answerer.encode_pair("<bos>", "one") == ([2], [5])


def test_spaces_belong_to_the_continuation(reader):
    context, continuation = reader.encode_pair("Which digit ", "is left?")
    assert (context, continuation) == reader.encode_pair("Which digit", " is left?")
    tok = reader.tokenizer
    assert tok.decode(context) + tok.decode(continuation) == "<bos>Which digit is left?"


def test_a_continuation_that_melts_into_the_context_has_no_tokens(reader):
    """Three of one sign may be one token: what comes behind the first two is then nothing."""
    tok = reader.tokenizer
    pair = next(
        ((text[:i], text[i:]) for text in tok.pieces(range(200, 359)) for i in range(1, len(text))
         if text.isalpha() and len(tok.encode(text)) == len(tok.encode(text[:i])) == 1),
    )  # fmt: skip
    assert reader.encode_pair(*pair)[1] == []
    assert reader.loglikelihood(requests(pair)) == [(0.0, True)]


def test_loglikelihoods_are_those_of_score(answerer):
    texts = [("one two", " three"), ("one two", " four five"), ("", "one two three")]
    for (context, continuation), (total, _) in zip(
        texts, answerer.loglikelihood(requests(*texts)), strict=True
    ):
        ids = answerer.encode(context + continuation)
        count = len(continuation.split())
        assert total == pytest.approx(gj.score(answerer.model, ids)[-count:].sum(), abs=1e-4)


def test_rolling_loglikelihoods_are_those_of_score(answerer):
    short = Answerer(answerer.model, answerer.tokenizer, max_length=16)
    texts = [" ".join("one two three four".split() * n) for n in (3, 12, 1)]
    found = short.loglikelihood_rolling(requests(*((text,) for text in [*texts, ""])))
    for text, total in zip(texts, found):
        ids = short.encode(text)
        assert total == pytest.approx(gj.score(short.model, ids, window=16).sum(), abs=2e-4)
    assert found[3] == 0
    whole = answerer.loglikelihood_rolling(requests((texts[1],)))[0]
    assert abs(whole - found[1]) > 1e-3  # the windows matter


def test_texts_are_those_of_generate(answerer):
    contexts = ["one two", "three four five six", "one", "two", "one two"]
    small = Answerer(answerer.model, answerer.tokenizer, batch_size=2)
    texts = small.generate_until(requests(*((text, GREEDY) for text in contexts)))
    for context, text in zip(contexts, texts, strict=True):
        done = gj.generate(answerer.model, answerer.tokenizer, context, max_new_tokens=6)
        assert text == done.text
    assert texts[0] == texts[4]


def test_texts_end_before_what_they_go_until(answerer):
    contexts = ["one", "two", "one two", "three four five six", "five", "six", "four"]
    texts = answerer.generate_until(requests(*((text, GREEDY) for text in contexts)))
    context, whole = next(pair for pair in zip(contexts, texts) if len(set(pair[1].split())) > 1)
    second = next(word for word in whole.split() if word != whole.split()[0]) + " "
    for until in (second, [second, ""], [second, "never"]):
        cut = answerer.generate_until(requests((context, {**GREEDY, "until": until})))[0]
        assert cut == whole[: whole.index(second)]


def test_what_is_drawn_depends_on_the_prompt_and_the_seed_alone(answerer):
    drawn = {**GREEDY, "do_sample": True, "temperature": 1.5}
    asked = [("one two", drawn), ("three", drawn), ("one two", drawn)]
    texts = answerer.generate_until(requests(*asked))
    assert texts[0] != texts[2]  # the same prompt again is another draw
    others = answerer.generate_until(requests(asked[1], ("four", GREEDY), asked[0], asked[2]))
    assert [others[2], others[0], others[3]] == texts
    other = Answerer(answerer.model, answerer.tokenizer, seed=1)
    assert other.generate_until(requests(*asked)) != texts


def test_settings():
    read = GenerationSettings.of
    assert read({}) == read({"do_sample": False, "temperature": 0.7, "until": None})
    assert read({"do_sample": True}).sampling.temperature == 1
    assert read({"temperature": 0.5, "top_k": 3}).sampling == gj.Sampling(temperature=0.5, top_k=3)
    assert read({"max_tokens": 7, "until": "x", "num_beams": 1}).max_new_tokens == 7
    assert read({"max_gen_toks": 3, "max_tokens": 7}).max_new_tokens == 3
    for given, message in (
        ({"num_beams": 4}, "'num_beams' is not known"),
        ({"max_gen_toks": 0}, "one at least"),
        ({"top_p": 3}, "top_p=3 must be"),
    ):
        with pytest.raises(ValueError, match=message):
            read(given)


def test_conversations(reader):
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}]
    asked = reader.apply_chat_template(said[:1])
    assert asked == "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    assert reader.apply_chat_template(said, add_generation_prompt=False) == asked + "Well,"
    empty = [said[0], {"role": "assistant", "content": ""}]
    assert reader.apply_chat_template(empty, add_generation_prompt=False) == asked
    assert reader.encode(asked).count(reader.tokenizer.bos_id) == 1


def test_what_does_not_fit_is_refused(answerer):
    short = Answerer(answerer.model, answerer.tokenizer, max_length=8)
    text = " ".join(["one"] * 8)
    with pytest.raises(
        ValueError, match="9 tokens and a continuation of 1 do not fit max_length=8"
    ):
        short.loglikelihood(requests((text, " two")))
    with pytest.raises(ValueError, match="4 tokens and 6 new ones do not fit max_length=8"):
        short.generate_until(requests(("one two three", GREEDY)))
    for wrong in ({"max_length": 0}, {"max_length": 513}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Answerer(answerer.model, answerer.tokenizer, **wrong)


def test_progress(answerer):
    seen = []
    teller = Answerer(
        answerer.model, answerer.tokenizer, progress=lambda *amounts: seen.append(amounts)
    )
    teller.generate_until(requests(("one two", GREEDY), ("three", GREEDY)))
    assert seen == [(2, 2)]
    assert np.isfinite(teller.loglikelihood(requests(("one", " two")))[0][0])
    assert seen[-1] == (1, 1)
