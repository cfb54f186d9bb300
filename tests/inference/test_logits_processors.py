"""Logits processors: what they see, where they stand among the rules, and what they may return."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.tree_util import Partial
from marks import nightly

from gemma_jax import Batch, Conversation, Sampling, Session, forward, generate, score
from gemma_jax.inference.sampling import SamplingRows, penalised, sample
from gemma_jax.inference.speculation import SpeculativeSession
from gemma_jax.matformer import Slice

CFG = tiny.gemma3(2)
V = CFG.vocab_size
DRAFTS = {"own cache": Slice(ffn_widths=(24,) * 2), "the model's": Slice(ffn_widths=(48, 4))}


@pytest.fixture(scope="module")
def model():
    return tiny.model(CFG, "unrolled")


def prompt(length, seed=0):
    return tiny.tokens(CFG, 1, length, seed)[0].tolist()


def checksum(logits_BV, text_BS):
    """Only one token is possible: a sum of the whole text, to which every place counts."""
    weight_S = jnp.arange(1, text_BS.shape[1] + 1)
    sum_B = jnp.sum(jnp.where(text_BS >= 0, text_BS * weight_S, 0), axis=1) % V
    return jnp.where(jnp.arange(V) == sum_B[:, None], 0.0, -jnp.inf)


def with_checksums(ids, count):
    """The tokens that `checksum` allows behind `ids`."""
    text = list(ids)
    for _ in range(count):
        text.append(sum((s + 1) * token for s, token in enumerate(text)) % V)
    return text[len(ids) :]


@pytest.mark.parametrize("draft", [None, "own cache", *nightly("the model's")])
def test_a_processor_sees_the_whole_text_of_each_row(model, draft):
    prompts = [prompt(5), prompt(37), prompt(12)]
    options = {} if draft is None else dict(draft=DRAFTS[draft], draft_tokens=3)
    done = generate(
        model, None, prompts, max_new_tokens=14, chunk=16, logits_processors=checksum, **options
    )
    assert [row.token_ids for row in done] == [with_checksums(ids, 14) for ids in prompts]


@pytest.mark.parametrize("draft", [None, "own cache"])
def test_rows_that_come_and_go_and_turns(model, draft):
    options = dict(logits_processors=checksum)
    if draft is None:
        session = Session(model, 2, 128, **options)
    else:
        session = SpeculativeSession(model, 2, 128, draft=DRAFTS[draft], draft_tokens=3, **options)
    first, second, third, more = prompt(6), prompt(9, 1), prompt(4, 2), prompt(5, 3)
    session.prefill([first, None], max_new_tokens=12)
    session.decode([5, 0])
    session.prefill([None, second], max_new_tokens=8)
    assert session.decode([12, 8]) == [with_checksums(first, 12), with_checksums(second, 8)]
    session.clear(1)
    session.prefill([None, third], max_new_tokens=6)
    session.decode([12, 6])
    assert session.chosen[1] == with_checksums(third, 6)
    text = first + session.chosen[0] + more
    session.prefill([more, None], max_new_tokens=7)
    assert session.decode([7, 6])[0] == with_checksums(text, 7)


def test_a_stop_token_is_no_part_of_the_text_of_the_next_turn(model):
    first, more = prompt(6), prompt(5, 3)
    stop = with_checksums(first, 4)[-1]
    session = Session(model, 1, 64, stop_ids=[stop], logits_processors=checksum)
    session.prefill([first], max_new_tokens=9)
    said = session.decode(9)[0]
    assert said[-1] == stop and len(said) <= 4
    session.prefill([more], max_new_tokens=5)
    expected = with_checksums(first + said[:-1] + more, 5)
    assert session.decode(5)[0] == expected[: len(session.chosen[0])]


def turned(logits_BV, text_BS):
    """No linear map, so its place among the rules matters; depends on the last token."""
    last_B = jnp.take_along_axis(text_BS, jnp.sum(text_BS >= 0, axis=1)[:, None] - 1, axis=1)[:, 0]
    return jnp.abs(logits_BV) * jnp.where(last_B % 2 == 0, 1.0, -1.0)[:, None]


RULES = [
    Sampling(temperature=0.8, top_k=20, top_p=0.9),
    Sampling(temperature=0.7, repetition_penalty=1.7),
]


def by_hand(model, ids, sampling, processors, count, seed):
    """A loop on the host over passes of the whole text, padded to one length."""
    ids, chosen, width = list(ids), [], 64
    rows, key = SamplingRows.of([sampling], V), jax.random.key(seed)
    for _ in range(count):
        text_BS = np.full((1, width), -1, np.int32)
        text_BS[0, : len(ids)] = ids
        positions = np.where(text_BS >= 0, np.arange(width), -1)
        logits = forward(model, Batch(np.maximum(text_BS, 0), positions)).logits
        seen_BV = np.isin(np.arange(V), ids)[None]
        logits_BV = penalised(logits[:, len(ids) - 1], seen_BV, rows)
        for processor in processors:
            logits_BV = processor(logits_BV, text_BS)
        keys_B = jax.random.fold_in(key, len(ids))[None]
        chosen.append(int(jax.jit(sample)(logits_BV, keys_B, rows)[0]))
        ids.append(chosen[-1])
    return chosen


def test_choices_are_those_of_a_loop_by_hand(model):
    """After the penalty, before all other rules, in the order given; log-probabilities stay the
    model's."""
    bias = jax.random.normal(jax.random.key(1), (V,))
    processors = (turned, lambda logits_BV, text_BS: logits_BV + bias)
    prompts, seeds = [prompt(5), prompt(13)], [3, 4]
    done = generate(
        model, None, prompts, max_new_tokens=12, seed=seeds, sampling=RULES,
        logits_processors=processors,
    )  # fmt: skip
    for row, ids, seed, rule in zip(done, prompts, seeds, RULES):
        assert row.token_ids == by_hand(model, ids, rule, processors, 12, seed)
        scores = score(model, ids + row.token_ids)[len(ids) - 1 :]
        np.testing.assert_allclose(row.log_probs, scores, atol=2e-5)


def without(*ids):
    """Forbids tokens."""

    def forbid(logits_BV, text_BS):
        return logits_BV.at[:, jnp.array(ids)].set(-jnp.inf)

    return forbid


@pytest.mark.parametrize("draft", [None, "own cache"])
def test_what_is_forbidden_is_never_drawn(model, draft):
    ids = tuple(range(0, V, 2))
    options = {} if draft is None else dict(draft=DRAFTS[draft], draft_tokens=3)
    done = generate(
        model, None, [prompt(5)] * 3, max_new_tokens=20, seed=[1, 2, 3], temperature=1.5,
        logits_processors=[without(*ids)], **options,
    )  # fmt: skip
    assert not set(ids) & {token for row in done for token in row.token_ids}


def test_what_is_not_legal_stays_so(model):
    @jax.tree_util.register_static
    class Odd:
        def __call__(self, state, drafts_BX):
            shape = (len(state.step_B), drafts_BX.shape[1] + 1, V)
            return jnp.broadcast_to(jnp.arange(V) % 2 == 1, shape)

    session = Session(
        model, 1, 64, allow=Odd(), logits_processors=lambda logits_BV, text_BS: 0 * logits_BV
    )
    session.prefill([prompt(5)], max_new_tokens=3)
    assert session.decode(3) == [[1, 1, 1]]


def test_arrays_of_a_pytree_may_change_without_compiling(model):
    traces = []

    def add(bias_V, logits_BV, text_BS):
        traces.append(None)
        return logits_BV + bias_V

    def said(token):
        bias_V = np.where(np.arange(V) == token, 1e3, 0).astype(np.float32)
        options = dict(max_new_tokens=4, logits_processors=Partial(add, bias_V))
        return generate(model, None, [prompt(5)], **options)[0].token_ids

    assert said(7) == [7] * 4
    count = len(traces)
    assert said(9) == [9] * 4 and len(traces) == count


def test_another_function_is_another_program(model):
    for token in (7, 9):
        [done] = generate(
            model, None, [prompt(5)], max_new_tokens=4,
            logits_processors=without(*(set(range(V)) - {token})),
        )  # fmt: skip
        assert done.token_ids == [token] * 4


def test_conversations_have_them(model):
    from words import Words

    tokenizer = Words(V)
    chat = Conversation(
        model, tokenizer, max_len=64, logits_processors=without(*(set(range(V)) - {50}))
    )
    assert chat.say("w1", max_new_tokens=3).split() == ["#50"] * 3


def odd_shape(logits_BV, text_BS):
    return logits_BV[0]


def too_few(logits_BV, text_BS):
    return logits_BV[:, :5]


def nothing(logits_BV, text_BS):
    pass


def whole_numbers(logits_BV, text_BS):
    return text_BS[:, :1] + jnp.zeros(logits_BV.shape, jnp.int32)


@pytest.mark.parametrize(
    "processor, message",
    [
        (odd_shape, r"odd_shape returned float32 \[96\]; expected .* float32 \[1, 96\]"),
        (too_few, r"too_few returned float32 \[1, 5\]; expected"),
        (nothing, "nothing returned NoneType; expected"),
        (whole_numbers, r"whole_numbers returned int32 \[1, 96\]; expected"),
        (Partial(odd_shape), "odd_shape returned"),
    ],
)
def test_what_is_no_logits_is_refused_by_name(model, processor, message):
    with pytest.raises(ValueError, match=f"the logits processor {message}"):
        generate(model, None, [prompt(5)], max_new_tokens=4, logits_processors=[processor])


@pytest.mark.parametrize("given, found", [([3], "3"), ("f", "'f'"), ([None], "None")])
def test_what_is_no_function_is_refused(model, given, found):
    message = rf"must be a function \(logits_BV, text_BS\) -> logits_BV, got {found}"
    with pytest.raises(ValueError, match=message):
        generate(model, None, [prompt(5)], logits_processors=given)


def test_without_processors_no_text_is_carried(model):
    """The compiled loop is the one it was before there were any."""
    session = Session(model, 1, 32)
    session.prefill([prompt(5)], max_new_tokens=2)
    assert session._state.text_BS is None
    session = Session(model, 1, 32, logits_processors=without(3))
    assert session._state.text_BS.shape == (1, 32)
