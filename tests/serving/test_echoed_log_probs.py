"""Completions that echo their prompt with its log-probabilities: `score` over the wire."""

import json

import numpy as np
import openai
import pytest
from serving_live import Scripted, live

import gemma_jax as gj
from gemma_jax.inference.requests import Piece

ATOL = 2e-5  # ten times the rounding of float32 sums in another order; mistakes show at 0.1
LONG = "the capital of France is Paris, Räksmörgås 漢字 and the capital of the other one is not "


@pytest.fixture(scope="module")
def create(talker):
    def call(**fields):
        fields = dict(model="tiny", temperature=0, echo=True, logprobs=2, max_tokens=3) | fields
        return talker.client().completions.create(**fields)

    return call


def scored(talker, ids):
    return gj.score(talker.engine.model, ids)


@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
def test_lists_cover_prompt_and_answer(create, talker, tokenizer, as_ids):
    """Several prompts beside each other, of more than one chunk and of one token."""
    prompts = [tokenizer.encode(text, bos=True) for text in (LONG, "and")]
    assert len(prompts[0]) > 32  # a chunk
    given = [*prompts, [2]] if as_ids else [LONG, "and"]
    done = create(prompt=given, n=2)
    for choice in done.choices:
        ids = ([*prompts, [2]] if as_ids else prompts)[choice.index // 2]
        echo = tokenizer.decode(ids) if as_ids else given[choice.index // 2]
        told = choice.logprobs
        assert choice.text.startswith(echo) and choice.finish_reason == "length"
        assert len(told.tokens) == len(told.top_logprobs) == len(told.text_offset) == len(ids) + 3
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
        whole = [*ids, *continued(talker, ids)]
        np.testing.assert_allclose(told.token_logprobs[1:], scored(talker, whole), atol=ATOL)
        assert told.tokens == [tokenizer.decode([i]) for i in whole]
        for token, value, top in list(zip(told.tokens, told.token_logprobs, told.top_logprobs))[1:]:
            assert 1 <= len(top) <= 2 and value <= max(top.values())
            assert token not in top or value <= top[token]
        for token, offset in zip(told.tokens, told.text_offset):
            if token != "<bos>" and "\ufffd" not in token:
                assert choice.text[offset:].startswith(token)
        assert told.text_offset[len(ids)] == len(echo)
    assert done.usage.prompt_tokens == sum(map(len, prompts)) + as_ids


def continued(talker, ids):
    model = talker.engine.model
    return gj.generate(model, None, gj.Prompt(ids), max_new_tokens=3).token_ids


def test_a_stream_adds_up_to_the_whole(create):
    whole = create(prompt=LONG).choices[0]
    parts = [event.choices[0] for event in create(prompt=LONG, stream=True)]
    assert len(parts) > 3 and "".join(part.text for part in parts) == whole.text
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        lists = [getattr(part.logprobs, name) for part in parts]
        assert [value for one in lists for value in one] == getattr(whole.logprobs, name)
    assert parts[-1].finish_reason == whole.finish_reason == "length"


def test_nothing_is_written_where_nothing_is_wanted(create, talker, tokenizer):
    done = create(prompt=LONG, max_tokens=0)
    ids = tokenizer.encode(LONG, bos=True)
    (choice,) = done.choices
    assert (choice.text, choice.finish_reason) == (LONG, "length")
    np.testing.assert_allclose(choice.logprobs.token_logprobs[1:], scored(talker, ids), atol=ATOL)
    assert done.usage.completion_tokens == 0 and done.usage.prompt_tokens == len(ids)
    plain = create(prompt="and", max_tokens=0, logprobs=None).choices[0]
    assert (plain.text, plain.logprobs) == ("and", None)
    own = create(prompt="and", max_tokens=0, logprobs=0).choices[0].logprobs
    assert own.top_logprobs == [None, *[{}] * (len(own.tokens) - 1)]
    with pytest.raises(openai.BadRequestError, match="max_tokens: expected 1") as caught:
        create(prompt="and", max_tokens=0, echo=False)
    assert caught.value.body["param"] == "max_tokens"


def test_what_was_read_before_leaves_no_gap(create):
    """A prompt that is found among earlier ones is read again."""
    plain = [create(prompt=LONG, echo=False, logprobs=None) for _ in range(2)]
    assert plain[1].usage.prompt_tokens_details.cached_tokens >= 32
    told = [create(prompt=LONG) for _ in range(2)]
    assert [one.usage.prompt_tokens_details.cached_tokens for one in told] == [0, 0]
    assert told[0].choices[0].logprobs == told[1].choices[0].logprobs
    assert told[0].choices[0].text == LONG + plain[0].choices[0].text


def test_the_token_that_ends_a_text_is_in_its_lists(served_by, tokenizer):
    """Who asked for one token behind a prompt counts on it being there."""
    ids = tokenizer.encode("and", bos=True)

    class Ending(Scripted):
        def submit(self, request, on_piece):
            n, end = len(request.prompt.token_ids) - 1, request.stop_ids[0]
            self.script = lambda request: [
                Piece(prompt_log_probs=[-1.0] * n, prompt_top_log_probs=[[(5, -0.5)]] * n),
                Piece(token_ids=[end], log_probs=[-0.1], top_log_probs=[[(end, -0.1)]],
                      finish_reason="stop"),
            ]  # fmt: skip
            return super().submit(request, on_piece)

    with live(served_by(Ending())) as running:
        ask = running.client().completions.create
        done = ask(model="tiny", prompt="and", echo=True, logprobs=1, max_tokens=1).choices[0]
        assert done.text == "and" and done.finish_reason == "stop"
        assert done.logprobs.token_logprobs == [None, *[-1.0] * (len(ids) - 1), -0.1]
        assert done.logprobs.tokens[-1] == tokenizer.decode([tokenizer.eos_id])
        assert done.logprobs.text_offset[-1] == len("and")


def test_lm_eval_finds_what_its_own_door_finds(talker, tokenizer):
    """`local-completions` sends ids to the server; `GemmaJax` scores them by itself."""
    for name in ("lm_eval", "tenacity", "aiohttp"):
        pytest.importorskip(
            name, reason='needs lm-eval with its clients: pip install "lm-eval[api]"'
        )
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from gemma_jax.harness import GemmaJax

    own = GemmaJax(talker.engine.model, tokenizer)
    remote = LocalCompletionsAPI(
        base_url=f"{talker.url}/v1/completions", model="tiny", tokenizer_backend=None,
        batch_size=3, max_length=256,
    )  # fmt: skip
    remote.tokenizer, remote.tokenized_requests = own, True  # ids, without transformers
    asked = []
    for context, answer in (
        (LONG, "Paris"),
        ("The sky is", " blue"),
        (LONG, "Paris and"),
        ("", "a"),
    ):
        ids = tokenizer.encode(context, bos=True)
        asked.append(((context, answer), ids, tokenizer.encode(answer)))
    best = continued(talker, asked[0][1])  # what the model itself says, so one answer is greedy
    asked.append((("", ""), asked[0][1], best))
    found, wanted = (one._loglikelihood_tokens(asked) for one in (remote, own))
    np.testing.assert_allclose(
        *([value for value, _ in side] for side in (found, wanted)), atol=1e-4
    )
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert wanted[-1][1] and not all(greedy for _, greedy in wanted)
    assert json.loads(talker.lines[-1])["status"] == 200
