"""The token loop as a caller sees it: stops, seeds, batches, conversations, errors."""

import chex
import jax
import numpy as np
import pytest
import tiny
from words import Words

from gemma_jax import Conversation, Sampling, Session, forward, generate, score
from gemma_jax.inference import session as session_module
from gemma_jax.inference.prefill import bucket
from gemma_jax.text import render


@pytest.fixture(scope="module")
def model():
    return tiny.model(tiny.gemma3(3))


@pytest.fixture(scope="module")
def words(model):
    return Words(model.cfg.vocab_size)


def prompt(length, seed=0):
    return tiny.tokens(tiny.gemma3(3), 1, length, seed)[0].tolist()


def test_a_stop_token_ends_a_row_and_stays_in_its_ids(model):
    free = generate(model, None, [prompt(5)], max_new_tokens=12)[0]
    stop = free.token_ids[6]
    first = free.token_ids.index(stop)
    done = generate(model, None, [prompt(5), prompt(9)], max_new_tokens=12, stop_ids=[stop])
    assert done[0].token_ids == free.token_ids[: first + 1]
    assert done[0].finish_reason == "stop" and len(done[0].log_probs) == first + 1
    other = generate(model, None, [prompt(9)], max_new_tokens=12, stop_ids=[stop])[0]
    assert done[1].token_ids == other.token_ids  # a row that goes on is not disturbed


def test_a_stop_text_is_cut_out_with_all_that_follows(model, words):
    free = generate(model, words, "w5 w6 w7", max_new_tokens=12, stop_ids=[])
    pieces = free.text.split()
    stop = f"{pieces[4]} {pieces[5]}"
    cut = free.text.index(stop)
    seen = []
    done = generate(
        model, words, "w5 w6 w7", max_new_tokens=12, stop=[stop], stop_ids=[],
        on_text=lambda row, text: seen.append(text),
    )  # fmt: skip
    assert done.text == free.text[:cut] == "".join(seen)
    assert done.finish_reason == "stop"
    assert done.token_ids == free.token_ids[: len(done.token_ids)]
    assert len(done.token_ids) <= 6


def test_seeds(model):
    hot = dict(max_new_tokens=16, temperature=1.5)
    twice = generate(model, None, [prompt(5), prompt(5)], seed=7, **hot)
    assert twice[0].token_ids == twice[1].token_ids
    apart = generate(model, None, [prompt(5), prompt(5)], seed=[7, 8], **hot)
    assert apart[0].token_ids == twice[0].token_ids != apart[1].token_ids


def test_log_probs_are_the_models_whatever_the_sampling(model):
    done = generate(
        model,
        None,
        [prompt(6)],
        max_new_tokens=10,
        temperature=2.0,
        top_k=5,
        repetition_penalty=1.3,
    )[0]
    ids = prompt(6) + done.token_ids
    np.testing.assert_allclose(done.log_probs, score(model, ids)[5:], atol=1e-5)


def test_score_in_chunks_equals_one_pass(model):
    ids = prompt(150)
    logits = np.asarray(forward(model, np.array([ids], np.int32)).logits[0])
    expected = jax.nn.log_softmax(logits)[np.arange(149), ids[1:]]
    np.testing.assert_allclose(score(model, ids), expected, atol=2e-5)


def test_one_compilation_per_bucket(model):
    chex.clear_trace_counter()
    counted = jax.jit(
        chex.assert_max_traces(session_module.advance.__wrapped__, n=1),
        static_argnames=("loop",),
    )
    original, session_module.advance = session_module.advance, counted
    try:
        for length, new in ((3, 9), (4, 12), (7, 9)):  # 16 of everything
            generate(model, None, [prompt(length)], max_new_tokens=new)
            generate(model, None, [prompt(length)], max_new_tokens=new)
    finally:
        session_module.advance = original


def test_buckets():
    assert [bucket(n) for n in (1, 16, 17, 1000, 1024, 1025, 3000)] == [
        16, 16, 32, 1024, 1024, 2048, 3072,
    ]  # fmt: skip


def test_a_conversation_is_one_long_text(model, words):
    """Turns over a kept cache choose what one pass over the whole rendered chat would choose."""
    chat = Conversation(model, words, system="s1 s2", sampling=Sampling(), max_len=256)
    answers = [chat.say(text, max_new_tokens=8) for text in ("w1 w2", "w3", "w4 w5 w6")]
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 3
    system = [{"role": "system", "content": "s1 s2"}]
    for turn, answer in enumerate(answers):
        history = system + list(chat.messages[: 2 * turn + 1])
        fresh = generate(model, words, [words.encode(render(history), bos=True)], max_new_tokens=8)[
            0
        ]
        assert fresh.text == answer


def test_a_conversation_that_outgrows_its_cache_says_so(model, words):
    chat = Conversation(model, words, max_len=32, sampling=Sampling())
    with pytest.raises(ValueError, match="outgrown its 32 tokens; start a new one"):
        for _ in range(9):
            chat.say("w1 w2 w3", max_new_tokens=4)


def test_an_answer_cut_short_stays_part_of_the_conversation(model, words):
    chat = Conversation(model, words, max_len=128, sampling=Sampling())
    stream = chat.stream("w1", max_new_tokens=8)
    piece = next(stream)
    stream.close()
    assert chat.messages[-1]["content"].startswith(piece)
    assert chat.say("w2", max_new_tokens=4)


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(prompt=[[]]), "prompt 0 is empty"),
        (dict(prompt=[]), "no prompt given"),
        (dict(prompt=[[1, 96]]), r"prompt 0 has ids outside \[0, 96\)"),
        (dict(prompt=[[-1]]), r"prompt 0 has ids outside"),
        (dict(prompt=[[5]], max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
        (dict(prompt=[[5] * 512]), "a prompt of 512 tokens leaves no room .* context of 512"),
        (dict(prompt=[[5] * 600]), "a prompt of 600 tokens leaves no room"),
        (dict(prompt=[[5]], seed=[1, 2]), "2 seeds for 1 prompts"),
        (dict(prompt="text"), "a text prompt needs a tokenizer"),
        (dict(prompt=[[5]], stop=["x"]), "stop texts need a tokenizer"),
        (dict(prompt=[[5]], temperature=-1.0), "temperature=-1.0 must be"),
        (dict(prompt=[[5]], sampling=Sampling(), top_k=3), r"give sampling, or its fields"),
    ],
)
def test_bad_calls(model, call, message):
    with pytest.raises(ValueError, match=message):
        generate(model, None, **call)


def test_an_empty_text_is_refused(model, words):
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate(model, words, "")


def test_the_context_bounds_new_tokens(model):
    done = generate(model, None, [prompt(500)], max_new_tokens=64)[0]
    assert len(done.token_ids) == 12 and done.finish_reason == "length"
    with pytest.raises(ValueError, match="513 tokens asked for, but the context holds"):
        Session(model, 1, 513)


@pytest.mark.parametrize(
    "ids, message",
    [
        ([], "at least two token ids"),
        ([5], "at least two token ids"),
        ([5, 96], r"ids must lie in \[0, 96\)"),
        ([5] * 513, "513 tokens do not fit the context of 512"),
    ],
)
def test_bad_scores(model, ids, message):
    with pytest.raises(ValueError, match=message):
        score(model, ids)


def test_unknown_captures_are_refused(model):
    with pytest.raises(ValueError, match=r"cannot capture \['attn'\]; choose from embeddings"):
        forward(model, np.ones((1, 3), np.int32), capture=("attn",))
